"""Fit the posterior of a Bayesian regression, with a loss that can be negative.

This is plain JAX: the parameters are in a dict, and there is no model library. The loss
is the negative ELBO of a Gaussian with independent coordinates, estimated from one
sample a step. The posterior is known in closed form. So the table can show how far from
it each way to set the rate ends, at the last iterate and at the average over the newest
iterates.

    python examples/elbo.py --steps 10000 --seeds 2 --out demo
"""

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sasa_optax

NUM_ROWS, NUM_FEATURES, NOISE = 500, 20, 0.1
ADAM_RATE = 3e-2
STEPS_PER_RECORD = 100

Event = sasa_optax.Cut | sasa_optax.Drop | sasa_optax.Switch
Params = dict[str, jax.Array]


class Regression(NamedTuple):
    """targets = features @ weights + noise, with a standard normal prior of weights.

    The fields ``mean`` and ``precision`` are those of the posterior.
    """

    features: np.ndarray
    targets: np.ndarray
    mean: np.ndarray
    precision: np.ndarray

    def gap(self, params: Params) -> float:
        """log evidence - ELBO, the divergence from the posterior, in nats."""
        error = np.asarray(params["mean"], np.float64) - self.mean
        log_std = np.asarray(params["log_std"], np.float64)
        traced = np.diag(self.precision) @ np.exp(2 * log_std)
        log_det = np.linalg.slogdet(self.precision)[1] + 2 * log_std.sum()
        quadratic = error @ self.precision @ error
        return float(traced + quadratic - NUM_FEATURES - log_det) / 2

    def smallest_gap(self) -> float:
        """The least gap of any Gaussian with independent coordinates."""
        log_det = np.linalg.slogdet(self.precision)[1]
        return float(np.log(np.diag(self.precision)).sum() - log_det) / 2


def draw_problem(seed: int) -> Regression:
    random = np.random.default_rng(seed)
    features = random.normal(size=(NUM_ROWS, NUM_FEATURES))
    targets = features @ random.normal(size=NUM_FEATURES)
    targets += NOISE * random.normal(size=NUM_ROWS)
    precision = features.T @ features / NOISE**2 + np.eye(NUM_FEATURES)
    mean = np.linalg.solve(precision, features.T @ targets / NOISE**2)
    return Regression(
        features.astype(np.float32), targets.astype(np.float32), mean, precision
    )


def init_params() -> Params:
    return {"mean": jnp.zeros(NUM_FEATURES), "log_std": jnp.full(NUM_FEATURES, -2.0)}


def loss_fn(params: Params, problem: Regression, key: jax.Array) -> jax.Array:
    """An estimate of the negative ELBO, in nats a row.

    It is random, but the key determines it, so all evaluations in a step see the same
    noise.
    """
    std = jnp.exp(params["log_std"])
    weights = params["mean"] + std * jax.random.normal(key, (NUM_FEATURES,))
    errors = (problem.targets - problem.features @ weights) / NOISE
    negative_log_likelihood = jnp.mean(errors**2) / 2 + jnp.log(NOISE)
    negative_log_likelihood += jnp.log(2 * jnp.pi) / 2
    divergence = jnp.sum(std**2 + params["mean"] ** 2 - 1 - 2 * params["log_std"]) / 2
    return negative_log_likelihood + divergence / NUM_ROWS


@dataclasses.dataclass(frozen=True)
class Run:
    """One fit: the gaps at each record, the rate at its end, and its time."""

    gaps: list[float]
    averaged_gaps: list[float]
    rate: float
    seconds: float
    history: sasa_optax.History


def steps_fn(
    optimizer: optax.GradientTransformationExtraArgs, problem: Regression
) -> Callable[..., Any]:
    """Compiles the steps from one record to the next."""

    def step(carry: Any, key: jax.Array) -> Any:
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, problem, key)
        # Each transformation takes what it needs of these, and ignores the rest.
        updates, opt_state = optimizer.update(
            grads,
            opt_state,
            params,
            value=loss,
            grad=grads,
            value_fn=loss_fn,
            problem=problem,
            key=key,
        )
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def steps(params: Params, opt_state: Any, keys: jax.Array) -> Any:
        carry, losses = jax.lax.scan(step, (params, opt_state), keys)
        return *carry, losses.mean()

    return steps


def fit(
    transformation: optax.GradientTransformation,
    problem: Regression,
    *,
    num_steps: int,
    seed: int,
    advance: Callable[[int], None],
    report: Callable[[Event], None] | None,
) -> Run:
    """Fits from scratch. With ``report``, keeps a history and reports its events."""
    started = time.perf_counter()
    optimizer = optax.with_extra_args_support(transformation)
    steps = steps_fn(optimizer, problem)
    params = init_params()
    opt_state = optimizer.init(params)
    history, gaps, averaged_gaps = sasa_optax.History(), [], []
    all_keys = jax.random.split(jax.random.key(seed), num_steps)
    for start in range(0, num_steps, STEPS_PER_RECORD):
        keys = all_keys[start : start + STEPS_PER_RECORD]
        params, opt_state, loss = steps(params, opt_state, keys)
        gaps.append(problem.gap(params))
        averaged: Any = sasa_optax.averaged_params(opt_state)
        averaged_gaps.append(problem.gap(averaged))
        if report is not None:
            event = history.record(sasa_optax.metrics(opt_state), loss=loss)
            if event is not None:
                report(event)
        advance(len(keys))
    seconds = time.perf_counter() - started
    return Run(gaps, averaged_gaps, rate_of(opt_state), seconds, history)


def rate_of(opt_state: Any) -> float:
    """The rate that the next step would use."""
    rate = optax.tree.get(opt_state, "learning_rate")
    if rate is not None:
        return float(rate)
    return ADAM_RATE * float(optax.tree.get(opt_state, "scale", 1.0))


def contenders() -> dict[str, optax.GradientTransformation]:
    window = sasa_optax.Window(min_samples=100)
    along_update = sasa_optax.LineSearch(direction="update")
    return {
        f"Adam, constant {ADAM_RATE:g}": optax.chain(
            optax.adam(ADAM_RATE), sasa_optax.average_iterates()
        ),
        "  + reduce_on_plateau": optax.chain(
            optax.adam(ADAM_RATE),
            # Without an average over some steps, it takes noise for a plateau at once.
            optax.contrib.reduce_on_plateau(accumulation_size=100),
            sasa_optax.average_iterates(),
        ),
        "  + reduce_on_stationarity": optax.chain(
            optax.adam(ADAM_RATE),
            sasa_optax.reduce_on_stationarity(window=window, average=True),
        ),
        "SALSA, nothing tuned": sasa_optax.salsa(window=window),
        "SALSA along Adam's updates": optax.chain(
            optax.scale_by_adam(),
            sasa_optax.scale_by_salsa(window=window, search=along_update),
        ),
    }


def picture(results: dict[str, list[Run]], best: float, path: pathlib.Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    for color, (name, runs) in enumerate(results.items()):
        steps = STEPS_PER_RECORD * np.arange(1, len(runs[0].gaps) + 1)
        last = np.median([run.gaps for run in runs], axis=0)
        averaged = np.median([run.averaged_gaps for run in runs], axis=0)
        ax.plot(steps, last, color=f"C{color}", alpha=0.3)
        ax.plot(steps, averaged, color=f"C{color}", label=name)
    ax.axhline(
        best, color="black", linestyle=":", label="independent coordinates' best"
    )
    ax.set(xlabel="step", ylabel="log evidence - ELBO, nats", yscale="log")
    ax.set_title("averaged (pale: the last iterate)", fontsize="medium")
    ax.legend(fontsize="small")
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def nats(gap: float) -> str:
    return f"{gap:.{2 if gap < 100 else 0}f}"


def summary(name: str, runs: list[Run], uses_history: bool) -> list[str]:
    """A row of the table: medians over the seeds, and the averaged models' range."""
    last = [run.gaps[-1] for run in runs]
    averaged = [run.averaged_gaps[-1] for run in runs]
    drops = sorted({len(run.history.drops) for run in runs})
    return [
        name,
        nats(statistics.median(last)),
        nats(statistics.median(averaged)),
        f"{nats(min(averaged))} to {nats(max(averaged))}",
        f"{statistics.median(run.rate for run in runs):.2g}",
        ", ".join(map(str, drops)) if uses_history else "-",
        f"{statistics.mean(run.seconds for run in runs):.1f}",
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    problem = draw_problem(0)
    results: dict[str, list[Run]] = {}
    title = "Negative ELBO: nats short of the evidence"
    table = Table(title=title, pad_edge=False, box=SIMPLE, collapse_padding=True)
    for heading in ("optimizer", "last", "averaged", "range", "rate", "drops", "s"):
        table.add_column(heading, no_wrap=True)
    with Progress(console=console) as progress:
        total = len(contenders()) * args.seeds * args.steps
        task = progress.add_task("fitting", total=total)
        for name, transformation in contenders().items():

            def report(event: Event, name: str = name.strip(" +")) -> None:
                console.print(f"{name}, {event}")

            is_ours = "SALSA" in name or "stationarity" in name
            progress.update(task, description=name.strip(" +"))
            results[name] = [
                fit(
                    transformation,
                    problem,
                    num_steps=args.steps,
                    seed=seed,
                    advance=lambda steps: progress.advance(task, steps),
                    report=report if is_ours else None,
                )
                for seed in range(args.seed, args.seed + args.seeds)
            ]
            table.add_row(*summary(name, results[name], is_ours))
    console.print(table)
    best = problem.smallest_gap()
    console.print(f"Independent coordinates leave {best:.2f} nats at best.")
    args.out.mkdir(parents=True, exist_ok=True)
    picture(results, best, args.out / "elbo.png")
    console.print(f"The gaps, step by step: {args.out / 'elbo.png'}")


if __name__ == "__main__":
    main()
