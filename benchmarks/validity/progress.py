"""Does the servo find a rate as good as the best that hindsight finds?

On the noisy quadratics of `validity.py`, whose expected loss is known exactly:
`adapt_on_progress` behind the optimizer of the cell, from its rate and from a hundredth
of it, beside the same optimizer at constant rates and under rates that fall like a
power of the step. All of them see the same noise, and all are judged by the excess loss
of their average over the newest eighth of the steps.

    make validity                                          # this too, into docs/
    python benchmarks/validity_progress.py --publish       # this alone
    python benchmarks/validity_progress.py --cells base    # a part
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import validity

import sasa_optax

RESULTS = validity.RESULTS.with_name("validity_progress.json")
MARKERS = "<!-- progress table -->", "<!-- /progress table -->"
# The grid of rates: at rate 1 in this unit the slowest relaxation is the whole run.
RATES = tuple(10 ** (j / 2) for j in range(8))
# A schedule is rate * (1 + k / HOLD)^-gamma; with gamma 0 it is constant.
HOLD = 1000
GAMMAS = 0.0, 0.5, 0.75, 1.0
# The servo starts from these, times the rate of the cell.
STARTS = 1.0, 0.01
# With more steps, or with more runs in a thousand dimensions, a cell would take above
# 20 seconds.
MOST_STEPS, MOST_STEPS_LARGE = 300_000, 60_000
MOST_RUNS_LARGE = 4
MOMENTS = "third", "end"
# Not those that differ from another in the window of a test: the servo has none.
CELLS = tuple(
    cell
    for cell in validity.CELLS
    if isinstance(cell, validity.Quadratic) and cell.min_samples is None
)
Row = dict[str, Any]


def optimizer_of(
    cell: validity.Quadratic, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    if cell.direction == "adam":
        return optax.adam(rate)
    return sasa_optax.qhm(rate, momentum=cell.momentum)


def averaged(
    cell: validity.Quadratic, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    return optax.chain(optimizer_of(cell, rate), sasa_optax.average_iterates())


def served(
    cell: validity.Quadratic, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    servo = sasa_optax.adapt_on_progress(cell.momentum)
    return optax.chain(optimizer_of(cell, rate), servo)


Make = Callable[[validity.Quadratic, optax.ScalarOrSchedule], Any]


def first_runs(
    cell: validity.Quadratic, make: Make, rates: jax.Array, runs: int
) -> Any:
    """Parameters and states; the leading axes are those of rates and of runs."""
    params = validity.first_params(cell, runs)
    return jax.vmap(lambda rate: (params, jax.vmap(make(cell, rate).init)(params)))(
        rates
    )


def moved(
    cell: validity.Quadratic, make: Make, rates: jax.Array, k: jax.Array, runs: Any
) -> Any:
    """One step of the runs at each rate. The noise does not depend on the rate."""

    def one(rate: jax.Array, runs: Any) -> Any:
        return validity.steps_of(cell, make(cell, rate))(k, runs)

    return jax.vmap(one)(rates, runs)


def excess_of(cell: validity.Quadratic, runs: Any) -> np.ndarray:
    """The expected loss of the averages over the minimum; shape (rates, runs)."""
    offset = np.asarray(sasa_optax.averaged_params(runs[1]), float) - cell.distance
    with np.errstate(over="ignore", invalid="ignore"):
        excess = np.sum(cell.eigenvalues * offset**2, axis=-1) / 2
    return np.where(np.isfinite(excess), excess, np.inf)


@dataclasses.dataclass(frozen=True)
class Race:
    """What all of them came to in a cell.

    Attributes:
      schedules: excess loss at each moment, under each schedule, in each run; shape
        (moments, schedules, runs).
      servos: the same of the servo; shape (moments, starts, runs).
      rate: of the servo at the end; shape (starts, runs), like all that follow.
      highest: its highest rate.
      overshoots: its cuts after a rise that went too far.
      brakes: its cuts after which it returned to the average.
    """

    schedules: np.ndarray
    servos: np.ndarray
    rate: np.ndarray
    highest: np.ndarray
    overshoots: np.ndarray
    brakes: np.ndarray


def race(
    cell: validity.Quadratic,
    steps: int,
    runs: int,
    schedules: Sequence[tuple[float, float]],
    starts: Sequence[float] = STARTS,
) -> Race:
    """All (rate, gamma) of ``schedules``, and the servo, on the same noise."""
    rates, gammas = jnp.asarray(schedules, jnp.float32).T
    servo_rates = cell.rate * jnp.asarray(starts, jnp.float32)

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
        jnp.ones((len(starts), runs)),
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
    """Of schedules in runs, the one whose mean is least."""
    means = np.mean(excess, axis=1)
    i = int(np.argmin(means))
    rate, gamma = schedules[i]
    return {"excess": float(means[i]), "rate": rate, "gamma": gamma}


def compared(servo: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The ratio of two means over the same runs, and its standard error."""
    ratio = np.mean(servo) / np.mean(other)
    rest = np.std(servo - ratio * other, ddof=1) / np.mean(other)
    return float(ratio), float(rest / len(servo) ** 0.5)


def measure(cell: validity.Quadratic, steps: int, runs: int) -> Row:
    """A row: the servo beside the best schedules of each kind, at each moment."""
    began = time.process_time()
    rates = [rate * cell.condition / steps for rate in RATES]
    schedules = [(rate, gamma) for gamma in GAMMAS for rate in rates]
    result = race(cell, steps, runs, schedules)
    kinds = {"constant": GAMMAS[:1], "power": GAMMAS[1:]}
    best: Row = {}
    servos: list[Row] = [{"start": start, "ratio": {}} for start in STARTS]
    for kind, gammas in kinds.items():
        chosen = [i for i, (_, gamma) in enumerate(schedules) if gamma in gammas]
        for moment, plain, served_ in zip(
            MOMENTS, result.schedules, result.servos, strict=True
        ):
            own = best_of(plain[chosen], [schedules[i] for i in chosen])
            other = plain[schedules.index((own["rate"], own["gamma"]))]
            best.setdefault(moment, {})[kind] = own
            for row, excess in zip(servos, served_, strict=True):
                pair = compared(excess, other)
                row["ratio"].setdefault(moment, {})[kind] = pair
                row.setdefault("excess", {})[moment] = float(np.mean(excess))
    for i, row in enumerate(servos):
        row["rate"] = [float(np.min(result.rate[i])), float(np.max(result.rate[i]))]
        row["highest"] = float(np.max(result.highest[i]))
        row["overshoots"] = [int(x) for x in result.overshoots[i]]
        row["brakes"] = [int(x) for x in result.brakes[i]]
    return {
        "cell": {**dataclasses.asdict(cell), "rate": cell.rate},
        "steps": steps,
        "runs": runs,
        "best": best,
        "servos": servos,
        "seconds": time.process_time() - began,
        "made": validity.provenance(),
    }


def sizes_of(cell: validity.Quadratic, runs: int) -> tuple[int, int]:
    """Steps and runs."""
    if cell.dimension > 100:
        return min(cell.steps, MOST_STEPS_LARGE), min(runs, MOST_RUNS_LARGE)
    return min(cell.steps, MOST_STEPS), runs


def joined(texts: Sequence[str]) -> str:
    """Both starts: the same text is not said twice."""
    return texts[0] if len(set(texts)) == 1 else " · ".join(texts)


def ratio_text(row: Row, moment: str, kind: str) -> str:
    return joined([f"{servo['ratio'][moment][kind][0]:.2f}" for servo in row["servos"]])


def best_text(row: Row, kind: str) -> str:
    """The rate of the schedule that is best at the end."""
    own = row["best"]["end"][kind]
    fall = f", k^{validity.MINUS}{own['gamma']:g}" if own["gamma"] else ""
    return f"{own['rate']:.2g}{fall}"


def range_text(servo: Row) -> str:
    low, high = (f"{rate:.2g}" for rate in servo["rate"])
    return low if low == high else f"{low} to {high}"


def cuts_text(row: Row) -> str:
    """In all runs from both starts."""
    cuts, brakes = (
        [count for servo in row["servos"] for count in servo[kind]]
        for kind in ("overshoots", "brakes")
    )
    num_runs = np.count_nonzero(np.add(cuts, brakes))
    runs = f" in {num_runs} of {len(cuts)} runs" if num_runs else ""
    return f"{sum(cuts)} · {sum(brakes)}{runs}"


def columns_of(row: Row) -> list[str]:
    ratios = [
        ratio_text(row, moment, kind)
        for moment in MOMENTS
        for kind in ("constant", "power")
    ]
    return [
        row["cell"]["name"],
        f"{row['steps']:,}",
        *ratios,
        best_text(row, "constant"),
        best_text(row, "power"),
        f"{row['cell']['rate']:g}",
        joined([range_text(servo) for servo in row["servos"]]),
        joined([f"{servo['highest']:.2g}" for servo in row["servos"]]),
        cuts_text(row),
    ]


HEADS = (
    "cell",
    "steps",
    "third, / constant",
    "third, / power",
    "end, / constant",
    "end, / power",
    "best constant",
    "best power",
    "first rate",
    "rate at the end",
    "highest rate",
    "cuts · brakes",
)


def page_content(rows: Sequence[Row]) -> str:
    lines = [validity.line_of(HEADS), "|---" + "|--:" * (len(HEADS) - 1) + "|"]
    lines += [validity.line_of(columns_of(row)) for row in rows]
    made = validity.made_line(list(rows), RESULTS.name)
    minutes = sum(row["seconds"] for row in rows) / 60
    return "\n".join([*lines, "", f"{made} It took {minutes:.0f} minutes on one core."])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS])
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--publish", action="store_true", help="into docs/")
    parser.add_argument("--page", type=pathlib.Path, default=validity.PAGE)
    return parser.parse_args(argv)


def merged(rows: Sequence[Row], row: Row) -> list[Row]:
    """With this row in place of the cell's older one."""
    names = [cell.name for cell in CELLS]
    others = [x for x in rows if x["cell"]["name"] != row["cell"]["name"]]
    return sorted([*others, row], key=lambda x: names.index(x["cell"]["name"]))


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    rows = validity.load(args.out)
    for cell in CELLS:
        if args.cells is None or cell.name in args.cells:
            row = measure(cell, *sizes_of(cell, args.runs))
            rows = merged(rows, row)
            seconds = f"{row['seconds']:.0f} s"
            print(*columns_of(row), seconds, sep="  ", flush=True)
            validity.save(rows, args.out)
    if args.publish:
        validity.write_table(args.page, page_content(rows), MARKERS)


if __name__ == "__main__":
    main()
