"""When a test fires: how early, how late, and what it leaves of the rate."""

from collections.abc import Sequence

import numpy as np

from benchmarks.publishing import Row
from benchmarks.validity import simulation
from benchmarks.validity.cells import Cell, Series
from benchmarks.validity.law import EARLY
from benchmarks.validity.methods import method_named
from benchmarks.validity.truth import truth_of

# The rate has collapsed below this share of what the legitimate drops leave.
COLLAPSED = 0.01


def share(mask: Sequence[bool] | np.ndarray) -> float | None:
    return float(np.mean(mask)) if len(mask) else None


def quartiles(values: np.ndarray) -> list[float] | None:
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist() if len(values) else None


def summary(
    runs: simulation.Runs, early: list[list[bool]], settled: int, unit: float
) -> Row:
    """``early`` has, for each run, a verdict on each drop that could be judged."""
    first = runs.steps[:, 0]
    fired = first[first >= 0]
    return {
        "early": share([bool(e) and e[0] for e in early]),
        "never": share(first < 0),
        "delay": quartiles((fired - settled) / unit),
        "second": share(runs.drops >= 2),
        "second_early": share([e[1] for e in early if len(e) > 1]),
        "drops": quartiles(runs.drops),
        "rate": quartiles(runs.scale),
        "settled": settled / unit,
    }


def measure(cell: Cell, name: str, seeds: int) -> Row:
    method = method_named(name)
    if isinstance(cell, Series):
        runs = simulation.run_series(cell, method, seeds)
        early = [[bool(s < cell.trend)] if s >= 0 else [] for s in runs.steps[:, 0]]
        # The stream does not feel the rate, so the rate rightly falls for ever.
        return summary(runs, early, cell.trend, cell.relaxation) | {"collapsed": None}
    runs = simulation.run_quadratic(cell, method, seeds)
    truth, factor = truth_of(cell), method.factor
    excess = [truth.excess_at(s[s >= 0].tolist(), factor) for s in runs.steps]
    early = [[x > EARLY for x in row] for row in excess]
    possible = truth.possible_drops(factor)
    return summary(runs, early, truth.settled, cell.relaxation) | {
        "excess": quartiles(np.array([row[0] for row in excess if row])),
        "possible": possible,
        "collapsed": share(runs.scale < COLLAPSED * factor**possible),
    }
