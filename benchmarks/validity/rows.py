"""The rows of the results: which are wanted, which are there, and how to get them."""

import argparse
import dataclasses
import operator
import os
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import processes
from benchmarks.publishing import Row, provenance
from benchmarks.validity import coverage, drops
from benchmarks.validity.cells import CELLS, QUICK, START, Cell, Quadratic
from benchmarks.validity.coverage import COVERED, STATISTICS
from benchmarks.validity.law import EARLY
from benchmarks.validity.methods import METHODS, method_named


@dataclasses.dataclass(frozen=True)
class Task:
    """A row to be: a method ("drops") or a statistic ("coverage") in a cell."""

    section: str
    cell: Cell
    name: str
    seeds: int

    @property
    def settings(self) -> Row:
        cell = {**dataclasses.asdict(self.cell), "steps": self.cell.steps}
        own = {"section": self.section, "method": self.name, "seeds": self.seeds}
        return {**own, "cell": cell, "start": START, "early_above": EARLY}

    def run(self) -> Row:
        if self.section == "drops":
            measured = drops.measure(self.cell, self.name, self.seeds)
        else:
            assert isinstance(self.cell, Quadratic)
            measured = coverage.measure(self.cell, self.name, self.seeds)
        return {**self.settings, **measured, "made": provenance()}


def applies(method: str, cell: Cell) -> bool:
    is_adam = isinstance(cell, Quadratic) and cell.direction == "adam"
    return method_named(method).any_direction or not is_adam


def tasks_of(args: argparse.Namespace) -> Iterator[Task]:
    cells: list[Cell] = [QUICK] if args.quick else list(CELLS)
    if args.cells is not None:
        cells = [cell for cell in cells if cell.name in args.cells]
    if "drops" in args.sections:
        for cell in cells:
            # A thousand dimensions cost fifty times as much as twenty.
            seeds = args.seeds // 2 if cell.is_large else args.seeds
            for method in args.methods:
                if applies(method, cell):
                    yield Task("drops", cell, method, seeds)
    if "coverage" in args.sections:
        for cell in COVERED:
            if cell in cells:
                for statistic in STATISTICS:
                    # An interval is cheap beside a run.
                    yield Task("coverage", cell, statistic, 8 * args.seeds)


def is_row_of(task: Task, row: Row) -> bool:
    return task.settings.items() <= row.items()


def place_of(row: Row) -> tuple[Any, ...]:
    """Orders the tables. A newer row replaces an older one of the same place."""

    def rank(name: str, names: Sequence[str]) -> tuple[int, str]:
        return (names.index(name) if name in names else len(names)), name

    names = [*METHODS, *STATISTICS]
    cell = rank(row["cell"]["name"], [cell.name for cell in CELLS])
    return row["section"] != "drops", cell, rank(row["method"], names)


def run_all(tasks: list[Task], jobs: int) -> Iterator[Row]:
    """Yields the rows as they are finished."""
    if jobs == 1:
        yield from map(Task.run, tasks)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    done = processes.run_all(operator.methodcaller("run"), tasks, jobs)
    yield from (future.result() for _, future in done)
