"""The optimizer's step alone, and what precedes the first step."""

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.performance.cases import BASELINES, CASES, PEERS, Case
from benchmarks.performance.timing import Steps, beside
from benchmarks.publishing import Row

NUM_LEAVES = 20
PEERS_SIZES = (10**6, 2 * 10**7)


def flat(size: int) -> dict[str, jax.Array]:
    leaf = jnp.full(size // NUM_LEAVES, 0.1)
    return {f"w{i:02}": jnp.copy(leaf) for i in range(NUM_LEAVES)}


def transformer_tree() -> dict[str, Any]:
    """24 blocks of width 256, 290 leaves, 21 million parameters in bfloat16."""
    width = 256
    inputs = {"qkv": 1, "out": 1, "up": 1, "down": 4}
    outputs = {"qkv": 3, "out": 1, "up": 4, "down": 1, "norm1": 1, "norm2": 1}
    shapes: dict[str, tuple[int, ...]] = {"norm1": (width,), "norm2": (width,)}
    shapes |= {name: (n * width, outputs[name] * width) for name, n in inputs.items()}
    shapes |= {f"{name}_bias": (n * width,) for name, n in outputs.items()}
    blocks = [
        {name: jnp.full(shape, 0.1, jnp.bfloat16) for name, shape in shapes.items()}
        for _ in range(24)
    ]
    embeddings = {
        name: jnp.full((4096, width), 0.1, jnp.bfloat16) for name in ("in", "out")
    }
    return {"blocks": blocks, "embeddings": embeddings}


def in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def sum_of_squares(params: Any) -> jax.Array:
    leaves = jax.tree.leaves(in_float32(params))
    return jnp.stack([jnp.sum(x**2) for x in leaves]).sum()


def update_step(case: Case) -> Callable[[Any, Any], Any]:
    """The update alone, with gradients in float32 whatever the parameters are."""
    optimizer = optax.with_extra_args_support(case.make())

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        extra: dict[str, Any] = {"value": jnp.float32(1)}
        if case.searches:
            extra |= {"grad": grads, "value_fn": sum_of_squares}
        updates, state = optimizer.update(in_float32(grads), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def optimizer_steps(case: Case | str, params: Any) -> Steps:
    """The update alone, with moments in float32 whatever the parameters are."""
    if isinstance(case, str):
        case = Case(case, case, BASELINES[case])
    state = case.prepare(case.make().init(in_float32(params)))
    grads = jax.tree.map(lambda x: x * 0.01, params)
    return Steps(update_step(case), (params, state), grads)


def tree_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compared(
    section: str, tree: str, params: Any, rounds: int, cases: Iterable[Case] = CASES
) -> Iterator[tuple[Row, Steps, Steps]]:
    """The row of each case, the steps of its baseline, and its own."""
    bases = functools.cache(lambda name: optimizer_steps(name, params))
    for case in cases:
        base, steps = bases(case.baseline), optimizer_steps(case, params)
        row = {
            "section": section,
            "tree": tree,
            "case": case.name,
            "baseline": case.baseline,
            **beside(base.seconds, steps.seconds, rounds),
        }
        yield row, base, steps


def bench_optimizer(name: str, params: Any, rounds: int) -> Iterator[Row]:
    """The time, the temporaries and the traffic of each update."""
    size = tree_bytes(params)
    for row, base, steps in compared("optimizer", name, params, rounds):
        yield row | {
            "temporary": steps.temporary_bytes() / size,
            "bytes": steps.bytes_accessed() / size,
            "baseline_bytes": base.bytes_accessed() / size,
        }


def bench_peers(rounds: int) -> Iterator[Row]:
    """The memory and the time of what docs/peers.md compares, in float32."""
    for size in PEERS_SIZES:
        params, tree = flat(size), f"{size:.0e}"
        rows = compared("peers", tree, params, rounds, PEERS)
        for case, (row, _, steps) in zip(PEERS, rows, strict=True):
            state = jax.eval_shape(case.make().init, params)
            yield row | {
                "copies": tree_bytes(state) / tree_bytes(params),
                "temporary": steps.temporary_bytes() / tree_bytes(params),
            }


def many_leaves(num: int) -> list[jax.Array]:
    """Leaves of the size of a bias or of a norm's weights, four to a layer."""
    sizes = (256, 256, 1024, 256)
    return [jnp.full(sizes[i % 4], 0.1) for i in range(num)]


def bench_leaves(rounds: int) -> Iterator[Row]:
    """The time to compile the update of many small leaves, and to run it."""
    for num in (100, 500, 1000):
        params, tree = many_leaves(num), f"{num} leaves"
        for row, base, steps in compared("leaves", tree, params, rounds):
            yield row | {
                "compile_s": steps.compile_seconds,
                "baseline_compile_s": base.compile_seconds,
            }


def bench_start(rounds: int) -> Iterator[Row]:
    """The time to compile each update, and the size of its state."""
    params = flat(1000)
    for case in CASES:
        runs = []
        for each in [case.baseline, case] * rounds:
            jax.clear_caches()
            runs.append(optimizer_steps(each, params))
        base, steps = runs[::2], runs[1::2]
        compile_s, baseline_compile_s = (
            statistics.median(run.compile_seconds for run in runs)
            for runs in (steps, base)
        )
        yield {
            "section": "start",
            "case": case.name,
            "baseline": case.baseline,
            "compile_s": compile_s,
            "baseline_compile_s": baseline_compile_s,
            "state_kb": tree_bytes(steps[0].carry[1]) / 1000,
            "baseline_state_kb": tree_bytes(base[0].carry[1]) / 1000,
        }
