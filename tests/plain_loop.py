"""What each optimizer does in a plain loop over a compiled step.

Every transformation, wrapper and layout must reproduce this. The golden traces and
other tests compare such loops with independent sources.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from optimizers import small, take_step

NOISE = 0.1 * np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
START = np.ones(2, np.float32)
COUNTS = {jnp.dtype(jnp.int32), jnp.dtype(bool)}


def grads_at(noise: Any, params: Any) -> Any:
    """The noisy gradients of a quadratic, on which the dynamics become stationary."""
    return noise + 0.1 * params


def run(
    update: Callable[..., Any], params: Any, state: Any, noise: Any
) -> tuple[Any, Any]:
    for row in noise:
        params, state = take_step(update, grads_at(row, params), state, params)
    return params, state


@functools.cache
def run_plainly(name: str, num_steps: int = len(NOISE)) -> tuple[Any, Any]:
    optimizer, update = small(name)
    params = jnp.asarray(START)
    return run(update, params, optimizer.init(params), NOISE[:num_steps])


def assert_as_in_a_loop(
    actual: tuple[Any, Any], name: str, num_steps: int = len(NOISE)
) -> None:
    # Leaves are compared because a mask changes the structure of the state.
    leaves = jax.tree.leaves(actual)
    expected = jax.tree.leaves(run_plainly(name, num_steps))
    chex.assert_trees_all_close(leaves, expected, rtol=1e-4, atol=1e-5)
    counts = [[x for x in tree if x.dtype in COUNTS] for tree in (leaves, expected)]
    chex.assert_trees_all_equal(*counts)
