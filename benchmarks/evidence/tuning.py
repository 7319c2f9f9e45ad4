"""Which runs a method needs on a task: the search for its rate, then all seeds."""

import itertools
import math
from collections.abc import Iterable

from benchmarks.evidence.runs import Runs, at

# The grid extends to its sides, by factors of about three, but no further than this.
LEAST_RATE, MOST_RATE = 1e-5, 100.0


def neighbour(rates: Iterable[float], upwards: bool) -> float:
    """The next of ..., 0.1, 0.3, 1, 3, 10, ... beyond the given rates."""
    grid = [
        float(f"{digit}e{exponent}") for exponent in range(-8, 4) for digit in (1, 3)
    ]
    if upwards:
        return min(rate for rate in grid if rate > 1.01 * max(rates))
    return max(rate for rate in grid if rate < 0.99 * min(rates))


def tune(runs: Runs, seed: int, num_steps: int, budget: int) -> float:
    """The rate that is best on validation data after ``budget`` of the steps."""
    scores: dict[float, float] = {}
    # The inner rates come first, as most searches need not go on to the ends.
    pending = list(runs.method.rates[1:-1] or runs.method.rates)
    while pending:
        for rate in pending:
            row = runs(rate, seed, num_steps)
            scores[rate] = at(row["validation"], num_steps, budget)
        best = min(scores, key=lambda rate: scores[rate])
        pending = []
        if math.isfinite(scores[best]) and best in (min(scores), max(scores)):
            rate = neighbour(scores, upwards=best == max(scores))
            pending = [rate] if LEAST_RATE <= rate <= MOST_RATE else []
    return min(scores, key=lambda rate: scores[rate])


def train(runs: Runs, seeds: int, budgets: Iterable[int]) -> None:
    """Makes the runs that the report shows at these budgets."""
    method, task = runs.method, runs.task
    for budget in budgets:
        # A method that does not know the horizon passes the smaller budgets on its way.
        num_steps = budget if method.knows_horizon else task.budgets[-1]
        rate = method.rates[0]
        if method.is_tuned:
            rate = tune(runs, 0, num_steps, budget)
        for seed in range(seeds):
            runs(rate, seed, num_steps)


def train_sensitivity(runs: Runs, seeds: int) -> None:
    for rate, seed in itertools.product(runs.method.sensitivity_rates, range(seeds)):
        runs(rate, seed, runs.task.budgets[-1])
