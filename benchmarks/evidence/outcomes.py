"""What each method came to on a task within a budget, and how methods compare."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.evidence.contenders import COSINES, METHODS, Method, method_named
from benchmarks.evidence.runs import Key, at
from benchmarks.evidence.task import Task
from benchmarks.publishing import Row

Rows = dict[Key, Row]
LEADING = "adamw-progress"


class Outcome(NamedTuple):
    """What a method came to on a task within a budget; lists have one item a seed."""

    method: str
    rate: float
    test: list[float]
    train: list[float]
    area: list[float]
    seconds: list[float]
    drops: list[float]
    rows: list[Row]

    @property
    def mean(self) -> float:
        return statistics.mean(self.test)

    @property
    def spread(self) -> float:
        if len(self.test) < 2 or not all(map(math.isfinite, self.test)):
            return 0.0
        return statistics.stdev(self.test)


def outcome(rows: Rows, task: Task, name: str, budget: int) -> Outcome | None:
    """None if the runs are not there."""
    method = method_named(name)
    steps = budget if method.knows_horizon else task.budgets[-1]
    mine = [
        row
        for key, row in rows.items()
        if (key.task, key.method, key.steps) == (task.name, name, steps)
    ]
    rate = chosen_rate(method, mine, steps, budget)
    runs = [row for row in mine if row["rate"] == rate]
    if not runs:
        return None
    count = len(runs[0]["test"]) * budget // steps
    # A run without a horizon continues beyond the budget.
    share = budget / steps
    return Outcome(
        name,
        rate,
        [at(row["test"], steps, budget) for row in runs],
        [at(row["train"], steps, budget) for row in runs],
        [mean_of(row["test"][:count]) for row in runs],
        [share * row["seconds"] for row in runs],
        [row["drops"][count - 1] for row in runs],
        runs,
    )


def chosen_rate(method: Method, rows: list[Row], steps: int, budget: int) -> float:
    """The best by the validation data of the first seed, as in `tuning.tune`."""
    first = [row for row in rows if row["seed"] == 0]
    if not method.is_tuned or not first:
        return method.rates[0]
    best = min(first, key=lambda row: at(row["validation"], steps, budget))
    return best["rate"]


def mean_of(curve: list[float | None]) -> float:
    return statistics.mean(math.inf if x is None else x for x in curve)


def outcomes(
    rows: Rows, task: Task, budget: int, names: Iterable[str] = tuple(METHODS)
) -> dict[str, Outcome]:
    found = {name: outcome(rows, task, name, budget) for name in names}
    return {name: each for name, each in found.items() if each is not None}


def best_tuned(found: dict[str, Outcome]) -> Outcome:
    """The best baseline by the test data itself, which flatters it."""
    tuned = [each for name, each in found.items() if is_baseline(name)]
    return min(tuned, key=lambda each: each.mean)


def has_baseline(found: dict[str, Outcome]) -> bool:
    return any(map(is_baseline, found))


def is_baseline(name: str) -> bool:
    return METHODS[name].is_tuned and not METHODS[name].is_ours


def gap(task: Task, mine: Outcome, best: Outcome) -> float:
    """The distance in the unit of the metric, or in percent of the best loss."""
    difference = mine.mean - best.mean
    if task.has_absolute_tolerance:
        return difference
    return 100 * difference / abs(best.mean)


def tolerance(task: Task) -> float:
    return task.tolerance if task.has_absolute_tolerance else 100 * task.tolerance


def ranks(found: dict[str, Outcome]) -> dict[str, float]:
    """The ranks of the methods without tuning, from 1; equals share a mean rank."""
    means = {name: x.mean for name, x in found.items() if not METHODS[name].is_tuned}
    return {
        name: 1
        + sum(other < mean for other in means.values())
        + (sum(other == mean for other in means.values()) - 1) / 2
        for name, mean in means.items()
    }


def best_schedule(
    rows: Rows, task: Task, budget: int, schedules: Iterable[str] = COSINES
) -> Outcome:
    """The best of these methods, each tuned for this budget."""
    found = outcomes(rows, task, budget, schedules)
    return min(found.values(), key=lambda each: each.mean)


def has_anytime(rows: Rows, task: Task, schedules: Iterable[str] = COSINES) -> bool:
    """Whether a schedule and `LEADING` were run for a quarter, a half and all of it."""
    return all(
        bool(outcomes(rows, task, budget, names))
        for budget in task.parts
        for names in (schedules, [LEADING])
    )


def by_rate(rows: Rows, task: Task, name: str) -> list[tuple[float, float]]:
    """The initial rates that were run, each with the mean over its final results."""
    steps, points = task.budgets[-1], []
    for rate in METHODS[name].sensitivity_rates:
        ends = [
            at(row["test"], steps, steps)
            for key, row in rows.items()
            if key[:3] == (task.name, name, rate) and key.steps == steps
        ]
        if ends:
            points.append((rate, statistics.mean(ends)))
    return points


def has_sensitivity(rows: Rows, task: Task) -> bool:
    names = [name for name, each in METHODS.items() if each.sensitivity_rates]
    return all(len(by_rate(rows, task, name)) > 5 for name in names)
