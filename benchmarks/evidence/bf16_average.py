"""May the average take less memory on the device? Three cheaper ones, beside it.

    python -m benchmarks.evidence.bf16_average --publish

One run of AdamW at 1e-3 carries the average in float32 of `average_iterates`, one in
bfloat16 that is rounded stochastically, one in bfloat16 that is rounded to the nearest,
and one that takes every 16th iterate alone, as one on the host would. All follow the
same iterates, and are evaluated at a quarter, a half and all of the steps.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import sasa_optax
from benchmarks import publishing
from benchmarks.evidence.contenders import METHODS, Setting
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import task_named
from benchmarks.evidence.training import Carry, step_fn
from benchmarks.publishing import DOCS, RESULTS, Row

TASKS = "digits-mlp", "char-transformer"
METHOD = METHODS["adamw-1e-3"]
LEAK_RATIO, MIN_HORIZON, HOST_INTERVAL = 8, 32, 16
NAMES = (
    "last iterate",
    "float32",
    "bfloat16, stochastic",
    "bfloat16, nearest",
    f"float32, every {HOST_INTERVAL}th",
)


def round_to_nearest(key: jax.Array, x: jax.Array) -> jax.Array:
    del key
    return x.astype(jnp.bfloat16)


def round_stochastically(key: jax.Array, x: jax.Array) -> jax.Array:
    """A float32 as one of the two bfloat16 around it, such that the mean is x.

    A bfloat16 is the upper half of a float32. A random lower half is added, whose carry
    is as probable as the lower half of x is large.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


class Averages(NamedTuple):
    """The cheaper averages, each as one vector."""

    stochastic: jax.Array
    nearest: jax.Array
    host: jax.Array


def start(x: jax.Array) -> Averages:
    narrow = x.astype(jnp.bfloat16)
    return Averages(narrow, narrow, x)


def moved(averages: Averages, x: jax.Array, num_steps: jax.Array) -> Averages:
    """The averages after the iterate of a step, with the weight of the library's."""
    weight = 1 / jnp.maximum(MIN_HORIZON, num_steps / LEAK_RATIO)

    def narrow(rounding: Callable[..., jax.Array], c: jax.Array) -> jax.Array:
        key = jax.random.key(num_steps, impl="rbg")
        wide = c.astype(jnp.float32)
        return rounding(key, wide + weight * (x - wide))

    is_due = num_steps % HOST_INTERVAL == 0
    of_host = jnp.where(is_due, HOST_INTERVAL * weight, 0)
    return Averages(
        narrow(round_stochastically, averages.stochastic),
        narrow(round_to_nearest, averages.nearest),
        averages.host + of_host * (x - averages.host),
    )


def run_fn(task: Task) -> Callable[..., Any]:
    """From a key and initial parameters to what each average reached, and its error.

    The error is the distance from the average in float32, as a share of how far that
    one is from the iterate.
    """
    setting = Setting(jnp.float32(METHOD.rates[0]), task.budgets[-1], task)
    optimizer = optax.with_extra_args_support(
        optax.chain(METHOD.make(setting), sasa_optax.average_iterates())
    )

    def run(key: jax.Array, params: Any, rest: Any, data: Any) -> Any:
        step = step_fn(task, METHOD, optimizer, data)
        flat, unravel = ravel_pytree(params)

        def both(carry: tuple[Carry, Averages], batch: Any) -> Any:
            training, _ = step(carry[0], batch)
            x = ravel_pytree(training.params)[0]
            return (training, moved(carry[1], x, training.num_steps)), None

        def quarter(carry: Any, keys: jax.Array) -> Any:
            def record(carry: Any, key: jax.Array) -> Any:
                return jax.lax.scan(both, carry, task.draw(key, data))

            carry, _ = jax.lax.scan(record, carry, keys)
            training, averages = carry
            wide = sasa_optax.averaged_params(training.opt_state)
            trees = training.params, wide
            vectors = [ravel_pytree(tree)[0] for tree in trees]
            vectors += [x.astype(jnp.float32) for x in averages]
            errors = [jnp.linalg.norm(x - vectors[1]) for x in vectors]
            metrics = jax.lax.map(
                lambda x: task.evaluate(unravel(x), training.rest, data)[1],
                jnp.stack(vectors),
            )
            return carry, (metrics, jnp.stack(errors) / errors[0])

        opt_state = optimizer.init(params)
        training = Carry(params, rest, opt_state, None, jnp.zeros((), jnp.int32))
        keys = jax.random.split(key, task.budgets[-1] // task.steps_per_record)
        return jax.lax.scan(quarter, (training, start(flat)), keys.reshape(4, -1))[1]

    return run


def work(name: str, seeds: int) -> list[Row]:
    """The rows of a task: one for each seed, average and part of the steps."""
    task = task_named(name)
    run, rows = jax.jit(run_fn(task)), []
    for seed in range(seeds):
        params, rest = task.init(seed)
        found = jax.device_get(run(jax.random.key(seed), params, rest, task.data))
        for steps, at in zip(task.parts, (0, 1, 3), strict=True):
            for average, metric, error in zip(
                NAMES, *(values[at] for values in found), strict=True
            ):
                numbers = {"metric": float(metric), "error": float(error)}
                of = {"seed": seed, "steps": steps, "average": average}
                rows.append({"task": name, "unit": task.unit, **of, **numbers})
    return [row | {"made": publishing.provenance()} for row in rows]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def gap(rows: list[Row], average: str) -> float:
    """The mean distance from the average in float32, in points or in percent."""
    metric = {(row["seed"], row["average"]): row["metric"] for row in rows}
    seeds = {row["seed"] for row in rows}
    wide = mean(metric[seed, "float32"] for seed in seeds)
    gap = mean(metric[seed, average] - metric[seed, "float32"] for seed in seeds)
    return gap if rows[0]["unit"] == "% error" else 100 * gap / wide


def table(rows: list[Row]) -> str:
    """The gaps of each average, and how far it is from the one in float32."""
    others = [name for name in NAMES if name != "float32"]
    heads = ["task, steps", "float32", *others, "error, stochastic"]
    lines = []
    for task, steps in dict.fromkeys((row["task"], row["steps"]) for row in rows):
        own = [row for row in rows if (row["task"], row["steps"]) == (task, steps)]
        wide = mean(row["metric"] for row in own if row["average"] == "float32")
        error = mean(
            row["error"] for row in own if row["average"] == "bfloat16, stochastic"
        )
        gaps = [f"{gap(own, average):+.2f}" for average in others]
        unit = own[0]["unit"]
        lines.append([f"{task}, {steps}", f"{wide:.4g} {unit}", *gaps, f"{error:.2f}"])
    return publishing.markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    args = parser.parse_args()
    rows = [row for task in args.tasks for row in work(task, args.seeds)]
    print(table(rows))
    if args.publish:
        publishing.save(rows, RESULTS / "bf16-average.json")
        made = publishing.made_by(
            "python -m benchmarks.evidence.bf16_average --publish",
            publishing.newest(rows),
        )
        part = {"bf16": f"{table(rows)}\n\n{made}"}
        publishing.write(DOCS / "scale.md", part)


if __name__ == "__main__":
    main()
