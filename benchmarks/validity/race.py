"""`adapt_on_progress` beside constant and falling rates, all on the same noise."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sasa_optax
from benchmarks.publishing import Row, provenance
from benchmarks.validity import simulation
from benchmarks.validity.cells import Quadratic

# The grid of rates; at rate 1 in this unit, the slowest relaxation takes the whole run.
RATES = tuple(10 ** (j / 2) for j in range(8))
# A schedule is rate * (1 + k / HOLD)^-gamma; with gamma 0 it is constant.
HOLD = 1000
GAMMAS = 0.0, 0.5, 0.75, 1.0
KINDS = {"constant": GAMMAS[:1], "power": GAMMAS[1:]}
# The servo starts from these, times the rate of the cell.
STARTS = 1.0, 0.01
# The runs are judged after a third of the steps and after all of them.
MOMENTS = "third", "end"

Make = Callable[[Quadratic, optax.ScalarOrSchedule], Any]


def optimizer_of(
    cell: Quadratic, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    if cell.direction == "adam":
        return optax.adam(rate)
    return sasa_optax.qhm(rate, momentum=cell.momentum)


def averaged(
    cell: Quadratic, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    return optax.chain(optimizer_of(cell, rate), sasa_optax.average_iterates())


def served(
    cell: Quadratic, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    servo = sasa_optax.adapt_on_progress(cell.momentum)
    return optax.chain(optimizer_of(cell, rate), servo)


def first_runs(cell: Quadratic, make: Make, rates: jax.Array, runs: int) -> Any:
    """Parameters and states, with leading axes of rates and of runs."""
    params = simulation.first_params(cell, runs)

    def one(rate: jax.Array) -> Any:
        return params, jax.vmap(make(cell, rate).init)(params)

    return jax.vmap(one)(rates)


def moved(
    cell: Quadratic, make: Make, rates: jax.Array, k: jax.Array, runs: Any
) -> Any:
    """One step of the runs at each rate. The noise does not depend on the rate."""

    def one(rate: jax.Array, runs: Any) -> Any:
        return simulation.steps_of(cell, make(cell, rate))(k, runs)

    return jax.vmap(one)(rates, runs)


def excess_of(cell: Quadratic, runs: Any) -> np.ndarray:
    """The expected loss of the averages above the minimum; shape (rates, runs)."""
    offset = np.asarray(sasa_optax.averaged_params(runs[1]), float) - cell.distance
    with np.errstate(over="ignore", invalid="ignore"):
        excess = np.sum(cell.eigenvalues * offset**2, axis=-1) / 2
    return np.where(np.isfinite(excess), excess, np.inf)


@dataclasses.dataclass(frozen=True)
class Race:
    """The outcome in a cell.

    Attributes:
      schedules: the excess loss at each moment, under each schedule, in each run; shape
        (moments, schedules, runs).
      servos: the same for the servo; shape (moments, starts, runs).
      rate: the servo's rate at the end; shape (starts, runs), as for all that follow.
      highest: its highest rate.
      overshoots: the number of its cuts after a rise that went too far.
      brakes: the number of its cuts after which it returned to the average.
    """

    schedules: np.ndarray
    servos: np.ndarray
    rate: np.ndarray
    highest: np.ndarray
    overshoots: np.ndarray
    brakes: np.ndarray


def race(
    cell: Quadratic, steps: int, runs: int, schedules: Sequence[tuple[float, float]]
) -> Race:
    """Runs each (rate, gamma) of ``schedules``, and the servo, on the same noise."""
    rates, gammas = jnp.asarray(schedules, jnp.float32).T
    servo_rates = cell.rate * jnp.asarray(STARTS, jnp.float32)

    def step(k: jax.Array, carry: Any) -> Any:
        plain, servos, highest = carry
        plain = moved(cell, averaged, rates * (1 + k / HOLD) ** -gammas, k, plain)
        servos = moved(cell, served, servo_rates, k, servos)
        return plain, servos, jnp.maximum(highest, optax.tree.get(servos[1], "scale"))

    @jax.jit
    def advance(first: jax.Array, last: jax.Array, carry: Any) -> Any:
        return jax.lax.fori_loop(first, last, step, carry)

    carry = (
        first_runs(cell, averaged, rates, runs),
        first_runs(cell, served, servo_rates, runs),
        jnp.ones((len(STARTS), runs)),
    )
    excess = []
    for first, last in ((0, steps // 3), (steps // 3, steps)):
        carry = advance(jnp.int32(first), jnp.int32(last), carry)
        excess.append([excess_of(cell, runs) for runs in carry[:2]])
    state, base = carry[1][1], np.asarray(servo_rates)[:, None]
    return Race(
        *(np.stack(both) for both in zip(*excess, strict=True)),
        rate=base * np.asarray(optax.tree.get(state, "scale")),
        highest=base * np.asarray(carry[2]),
        overshoots=np.asarray(optax.tree.get(state, "num_overshoots")),
        brakes=np.asarray(optax.tree.get(state, "num_brakes")),
    )


def best_of(excess: np.ndarray, schedules: Sequence[tuple[float, float]]) -> Row:
    """The schedule with the least mean over the runs."""
    means = np.mean(excess, axis=1)
    i = int(np.argmin(means))
    rate, gamma = schedules[i]
    return {"excess": float(means[i]), "rate": rate, "gamma": gamma}


def compared(servo: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The ratio of two means over the same runs, and its standard error."""
    ratio = np.mean(servo) / np.mean(other)
    rest = np.std(servo - ratio * other, ddof=1) / np.mean(other)
    return float(ratio), float(rest / len(servo) ** 0.5)


def summary(result: Race, schedules: Sequence[tuple[float, float]]) -> Row:
    """The best schedule of each kind at each moment, and the servo beside it."""
    best: Row = {moment: {} for moment in MOMENTS}
    servos: list[Row] = [
        {
            "start": start,
            "ratio": {moment: {} for moment in MOMENTS},
            "excess": dict(zip(MOMENTS, means.tolist(), strict=True)),
            "rate": [float(np.min(rate)), float(np.max(rate))],
            "highest": float(np.max(highest)),
            "overshoots": overshoots.tolist(),
            "brakes": brakes.tolist(),
        }
        for start, means, rate, highest, overshoots, brakes in zip(
            *(STARTS, np.mean(result.servos, axis=2).T, result.rate, result.highest),
            *(result.overshoots, result.brakes),
            strict=True,
        )
    ]
    for kind, gammas in KINDS.items():
        chosen = [pair for pair in schedules if pair[1] in gammas]
        index = [schedules.index(pair) for pair in chosen]
        for m, moment in enumerate(MOMENTS):
            own = best_of(result.schedules[m][index], chosen)
            best[moment][kind] = own
            rival = result.schedules[m][schedules.index((own["rate"], own["gamma"]))]
            for row, excess in zip(servos, result.servos[m], strict=True):
                row["ratio"][moment][kind] = compared(excess, rival)
    return {"best": best, "servos": servos}


def measure(cell: Quadratic, steps: int, runs: int) -> Row:
    """A row of the results."""
    began = time.process_time()
    rates = [rate * cell.condition / steps for rate in RATES]
    schedules = [(rate, gamma) for gamma in GAMMAS for rate in rates]
    found = summary(race(cell, steps, runs, schedules), schedules)
    return {
        "cell": {**dataclasses.asdict(cell), "rate": cell.rate},
        "steps": steps,
        "runs": runs,
        **found,
        "seconds": time.process_time() - began,
        "made": provenance(),
    }
