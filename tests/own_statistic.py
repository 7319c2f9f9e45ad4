"""A statistic with a state of its own, as a user of the package would write it.

Run as a script, with a single CPU device, it prints as JSON what a run records when the
leaves are computed in groups, and what it should record.
"""

import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optimizers import never_stationary, started, take_step

import sasa_optax
from sasa_optax import _cpu_schedule


class Lagged(NamedTuple):
    average: optax.Params
    previous: optax.Updates


def lagged_statistic(weight: float = 0.1) -> sasa_optax.Statistic:
    """<g_k, g_{k-1}> + <x_{k+1} - c_k, g_{k-1}>, with an average c of the iterates."""

    def init(params: optax.Params) -> Lagged:
        return Lagged(jax.tree.map(jnp.copy, params), optax.tree.zeros_like(params))

    def pairs(t: Any, state: Lagged) -> Any:
        offset = jax.tree.map(jnp.subtract, t.new_params, state.average)
        return [(t.grad, state.previous), (offset, state.previous)]

    def sample(products: list[jax.Array], t: Any, state: Lagged) -> Any:
        value = products[0] + products[1]
        moved = jax.tree.map(
            lambda c, x: c + weight * (x - c), state.average, t.new_params
        )
        new = Lagged(moved, t.grad)
        is_good = jnp.isfinite(value)
        new = jax.tree.map(lambda x, old: jnp.where(is_good, x, old), new, state)
        return sasa_optax.Sample(value), new

    return sasa_optax.Statistic(init, pairs, sample)


def recorded(params: Any, num_steps: int, seed: int = 0) -> tuple[Any, np.ndarray]:
    """The samples of a run under jit, and the same computed by NumPy."""
    optimizer = sasa_optax.scale_by_sasa_plus(
        0.1, statistic=lagged_statistic(), test=never_stationary
    )
    (state, update), expected = started(optimizer, params), []
    rng = np.random.default_rng(seed)
    average = previous = None
    for _ in range(num_steps):
        grads = jax.tree.map(
            lambda x: x + rng.normal(size=x.shape).astype(x.dtype), params
        )
        new_params, state = take_step(update, grads, state, params)
        x, new_x, g = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
            for tree in (params, new_params, grads)
        )
        average = x.astype(np.float64) if average is None else average
        previous = np.zeros_like(average) if previous is None else previous
        expected.append(g @ previous + (new_x - average) @ previous)
        average, previous = average + 0.1 * (new_x - average), g.astype(np.float64)
        params = new_params
    return np.asarray(state.window.buffer)[0, :num_steps], np.array(expected)


def main() -> None:
    assert jax.device_count() == 1
    params = {f"w{i}": jnp.ones((1000, 1000)) for i in range(3)}
    groups = _cpu_schedule._groups(jax.tree.leaves(params))
    actual, expected = recorded(params, 4)
    output = {
        "num_groups": len(groups),
        "actual": actual.tolist(),
        "expected": expected.tolist(),
    }
    json.dump(output, sys.stdout)


if __name__ == "__main__":
    main()
