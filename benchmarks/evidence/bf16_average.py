"""May the average take less memory on the device? Three cheaper ones, beside it.

    python -m benchmarks.evidence.bf16_average --publish

One run of AdamW at 1e-3 carries the average in float32 of `average_iterates`, one in
bfloat16 that is rounded stochastically, one in bfloat16 that is rounded to the nearest,
and one that takes every 16th iterate alone, as one on the host would. All follow the
same iterates, and are evaluated at a quarter, a half and all of the steps.
"""

import argparse
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sasa_optax
from benchmarks import processes, publishing
from benchmarks.evidence.contenders import METHODS, Setting
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import task_named
from benchmarks.evidence.training import Carry, step_fn
from benchmarks.publishing import DOCS, RESULTS, Row

TASKS = "digits-mlp", "char-transformer"
METHOD = METHODS["adamw-1e-3"]
LEAK_RATIO, MIN_HORIZON, HOST_INTERVAL = 8, 32, 16


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


class NarrowState(NamedTuple):
    num_steps: jax.Array
    averaged: optax.Params


def narrow_average(
    rounding: Callable[[jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """`average_iterates` with an average in bfloat16."""

    def init(params: optax.Params) -> NarrowState:
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return NarrowState(jnp.zeros((), jnp.int32), narrow)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, NarrowState]:
        new, num_steps = optax.apply_updates(params, updates), state.num_steps + 1
        weight = 1 / jnp.maximum(MIN_HORIZON, num_steps / LEAK_RATIO)
        keys = optax.tree.split_key_like(jax.random.key(num_steps), state.averaged)

        def moved(key: jax.Array, c: jax.Array, x: jax.Array) -> jax.Array:
            wide = c.astype(jnp.float32)
            return rounding(key, wide + weight * (x - wide))

        averaged = jax.tree.map(moved, keys, state.averaged, new)
        return updates, NarrowState(num_steps, averaged)

    return optax.GradientTransformation(init, update)


class HostState(NamedTuple):
    num_steps: jax.Array
    inner: Any


def host_average() -> optax.GradientTransformation:
    """`average_iterates` of every 16th iterate."""
    inner = sasa_optax.average_iterates(LEAK_RATIO, MIN_HORIZON / HOST_INTERVAL)

    def init(params: optax.Params) -> HostState:
        return HostState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, HostState]:
        num_steps = state.num_steps + 1
        _, moved = inner.update(updates, state.inner, params)
        is_due = num_steps % HOST_INTERVAL == 0
        kept = optax.tree.where(is_due, moved, state.inner)
        return updates, HostState(num_steps, kept)

    return optax.GradientTransformation(init, update)


AVERAGES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "float32": sasa_optax.average_iterates,
    "bfloat16, stochastic": lambda: narrow_average(round_stochastically),
    "bfloat16, nearest": lambda: narrow_average(round_to_nearest),
    "float32, every 16th": host_average,
}


def averages_in(opt_state: Any) -> dict[str, optax.Params]:
    """The averages of a run by name; that of the optimizer itself comes first."""
    params = [optax.tree.get(state, "averaged") for state in opt_state[1:]]
    return dict(zip(AVERAGES, params, strict=True))


def distance(x: optax.Params, y: optax.Params) -> jax.Array:
    wide = (optax.tree.cast(tree, jnp.float32) for tree in (x, y))
    return optax.tree.norm(optax.tree.sub(*wide))


def run_fn(task: Task) -> Callable[..., Any]:
    """A function from a key and initial parameters to what each average reached."""
    rate = jnp.float32(METHOD.rates[0])

    def run(key: jax.Array, params: Any, rest: Any, data: Any) -> Any:
        inner = METHOD.make(Setting(rate, task.budgets[-1], task))
        optimizer = optax.with_extra_args_support(
            optax.chain(inner, *(make() for make in AVERAGES.values()))
        )
        step = step_fn(task, METHOD, optimizer, data)

        def record(carry: Carry, key: jax.Array) -> Any:
            carry, _ = jax.lax.scan(step, carry, task.draw(key, data))
            averages = averages_in(carry.opt_state)
            wide = averages["float32"]
            to_iterate = distance(carry.params, wide)
            seen = {"last iterate": task.evaluate(carry.params, carry.rest, data)[1]}
            errors = {}
            for name, averaged in averages.items():
                like = optax.tree.cast_like(averaged, params)
                seen[name] = task.evaluate(like, carry.rest, data)[1]
                errors[name] = distance(averaged, wide) / to_iterate
            return carry, (seen, errors)

        opt_state = optimizer.init(params)
        carry = Carry(params, rest, opt_state, None, jnp.zeros((), jnp.int32))
        keys = jax.random.split(key, task.budgets[-1] // task.steps_per_record)
        return jax.lax.scan(record, carry, keys)[1]

    return run


def work(job: tuple[str, int]) -> list[Row]:
    """The rows of a run: one for each average and each part of the steps."""
    name, seed = job
    task = task_named(name)
    params, rest = task.init(seed)
    run = jax.jit(run_fn(task))
    found = jax.device_get(run(jax.random.key(seed), params, rest, task.data))
    metrics, errors = found
    return [
        {
            "task": name,
            "unit": task.unit,
            "seed": seed,
            "steps": steps,
            "average": average,
            "metric": float(values[at]),
            "error": float(errors[average][at]) if average in errors else None,
            "made": publishing.provenance(),
        }
        for average, values in metrics.items()
        for steps in task.parts
        for at in [steps // task.steps_per_record - 1]
    ]


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
    others = ["last iterate", *list(AVERAGES)[1:]]
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
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    args = parser.parse_args()
    jobs = [(task, seed) for task in args.tasks for seed in range(args.seeds)]
    done = dict(processes.run_all(work, jobs, args.workers))
    rows = [row for job in jobs for row in done[job].result()]
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
