"""Measures for `test_performance.py`, in a process with a single CPU device.

Prints, as JSON, what XLA says of the compiled update of each case at ten million
parameters in twenty leaves; and by how much the numbers of a run differ if the leaves
are not computed in groups.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optimizers import ALL

import sasa_optax
from sasa_optax import _cpu_schedule

NUM_LEAVES, LEAF_SIZE = 20, 500_000
GROUPED_STEPS = 40


def _reduced(optimizer: Any) -> Any:
    return optax.chain(optimizer, sasa_optax.reduce_on_stationarity())


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-3),
    "sasa_plus": sasa_optax.sasa_plus(1.0),
    "sasa_plus, decay": sasa_optax.sasa_plus(1.0, weight_decay=1e-4),
    "sasa_plus, nu": sasa_optax.sasa_plus(1.0, nu=0.7),
    "sasa": sasa_optax.sasa(1.0),
    "sasa, decay": sasa_optax.sasa(1.0, weight_decay=1e-4),
    "slope": sasa_optax.slope(1.0),
    "sgd, averaged": optax.chain(
        optax.sgd(0.1, momentum=0.9), sasa_optax.average_iterates()
    ),
    "adamw, averaged": optax.chain(optax.adamw(1e-3), sasa_optax.average_iterates()),
    "sasa_plus, averaged": sasa_optax.sasa_plus(1.0, average=True),
    "sasa_plus, centred": sasa_optax.sasa_plus(1.0, statistic="centred"),
    "adamw, measured": optax.chain(optax.adamw(1e-3), sasa_optax.measure_progress()),
    "adamw, adapted": optax.chain(optax.adamw(1e-3), sasa_optax.adapt_on_progress()),
    "adamw, reduced": _reduced(optax.adamw(1e-3)),
    "adam, scale_by_sasa_plus": optax.chain(
        optax.scale_by_adam(), sasa_optax.scale_by_sasa_plus(1e-3)
    ),
}


def _step(optimizer: Any, carry: Any, grads: Any) -> Any:
    params, state = carry
    updates, state = optimizer.update(grads, state, params, value=jnp.float32(1))
    return optax.apply_updates(params, updates), state


def _compiled(optimizer: Any) -> dict[str, float]:
    optimizer = optax.with_extra_args_support(optimizer)
    leaf = jax.ShapeDtypeStruct((LEAF_SIZE,), jnp.float32)
    params = {f"w{i:02}": leaf for i in range(NUM_LEAVES)}
    state = jax.eval_shape(optimizer.init, params)
    step = jax.jit(functools.partial(_step, optimizer), donate_argnums=0)
    compiled = step.lower((params, state), params).compile()
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    size = 4 * NUM_LEAVES * LEAF_SIZE
    return {
        "temporary": memory.temp_size_in_bytes / size,
        "passes": cost["bytes accessed"] / size,
    }


def _make_groups_small() -> None:
    """A leaf need not have megabytes to be a group of its own."""
    _cpu_schedule._GROUP_BYTES //= 1000
    _cpu_schedule._CACHE_BYTES //= 1000


def _run(optimizer: Any, bad_leaf: str | None = None) -> Any:
    """The end of a run with leaves of several types, each a group of its own."""
    size = _cpu_schedule._CACHE_BYTES // 4
    params = {
        "a": jnp.linspace(-1, 1, size),
        "b": jnp.ones(2 * size, jnp.bfloat16),
        "c": jnp.full(3, 1 + 1j),
        "d": jnp.ones(size),
    }

    def noisy(carry: Any, key: Any) -> Any:
        params, _ = carry
        grads = jax.tree.map(
            lambda x: (x + jax.random.normal(key, (1,))).astype(x.dtype), params
        )
        if bad_leaf is not None:
            grads[bad_leaf] = jnp.full_like(grads[bad_leaf], jnp.nan)
        return _step(optimizer, carry, grads), None

    keys = jax.random.split(jax.random.key(0), GROUPED_STEPS)
    start = params, optimizer.init(params)
    return jax.jit(lambda carry: jax.lax.scan(noisy, carry, keys)[0])(start)


def _difference(x: Any, y: Any) -> float:
    """The largest difference, relative to numbers above one."""

    def between(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.complex64), b.astype(jnp.complex64)
        distance = jnp.abs(a - b) / jnp.maximum(jnp.abs(b), 1)
        return jnp.max(jnp.where(a == b, 0, distance))

    return float(jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(between, x, y)))))


COMPARED = {
    "reduced": optax.chain(
        optax.sgd(0.1),
        sasa_optax.reduce_on_stationarity(
            window=sasa_optax.Window(
                min_samples=4, test_interval=5, max_window=64, leak_ratio=1
            )
        ),
    ),
    # Its losses so far are above those of `_step`, so the rate rises.
    "adapted": ALL["adapt_on_progress"](),
}


def _at_once(
    direction: Any, others: Any, products: Callable[[Any, Any], Any], *_: Any
) -> Any:
    """What `_cpu_schedule.in_groups` does where the order of work is left to XLA."""
    return direction, products(direction, others)


def main() -> None:
    assert jax.device_count() == 1
    compiled = {name: _compiled(o) for name, o in OPTIMIZERS.items()}
    _make_groups_small()
    in_groups = {name: _run(o) for name, o in COMPARED.items()}
    harmed = {name: _run(o, bad_leaf="a")[0] for name, o in COMPARED.items()}
    _cpu_schedule.in_groups = _at_once
    at_once = {name: _run(o) for name, o in COMPARED.items()}
    result = {
        "compiled": compiled,
        "num_drops": int(optax.tree.get(in_groups["reduced"], "num_drops")),
        "scale": float(optax.tree.get(in_groups["adapted"], "scale")),
        "difference": {k: _difference(in_groups[k], at_once[k]) for k in COMPARED},
        "finite": {
            name: {k: bool(jnp.all(jnp.isfinite(x))) for k, x in params.items()}
            for name, params in harmed.items()
        },
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
