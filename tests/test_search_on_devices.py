"""A line search whose examples are spread over devices."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_devices import NUM_DEVICES, mapped_over

import sasa_optax


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
@pytest.mark.parametrize("passes_value", [False, True])
@pytest.mark.parametrize("by", ["pmap", "shard_map"])
@pytest.mark.parametrize("kind", ["ssls", "salsa"])
def test_a_search_over_the_examples_of_all_devices(
    kind: str, by: str, passes_value: bool
) -> None:
    """Each device has the loss of its own examples. Their mean decides."""

    def value_fn(x: jax.Array, examples: jax.Array) -> jax.Array:
        curvatures = 1 + examples**2
        return jnp.mean(jnp.sum(curvatures * (x - examples) ** 2, axis=-1))

    def step(x: Any, state: Any, examples: Any, axis: str | None) -> Any:
        search = sasa_optax.LineSearch(batch_axis_name=axis)
        optimizer = getattr(sasa_optax, kind)(search=search, steps_per_epoch=4)
        value, grads = jax.value_and_grad(value_fn)(x, examples)
        if axis is not None:
            grads = jax.lax.pmean(grads, axis)
        extra: Any = {"value": value} if passes_value else {}
        updates, state = optimizer.update(
            grads, state, x, value_fn=value_fn, examples=examples, **extra
        )
        return optax.apply_updates(x, updates), state

    rng = np.random.default_rng(0)
    # What a device sees differs much from what the others see.
    spread = np.arange(NUM_DEVICES, dtype=np.float32)[:, None, None]
    batches = spread * rng.normal(size=(12, NUM_DEVICES, 4, 3)).astype(np.float32)
    x = jnp.full(3, 2.0)
    state = getattr(sasa_optax, kind)(steps_per_epoch=4).init(x)
    expected = actual = (x, state)
    alone = jax.jit(functools.partial(step, axis=None))
    for batch in batches:
        expected = alone(*expected, batch.reshape(-1, 3))
    parallel = functools.partial(step, axis="data")
    if by == "pmap":
        actual = jax.tree.map(lambda x: np.stack([x] * NUM_DEVICES), actual)
        mapped = jax.pmap(parallel, axis_name="data")
        for batch in batches:
            actual = mapped(*actual, batch)
        for leaf in jax.tree.leaves(actual):
            np.testing.assert_array_equal(leaf, np.stack([leaf[0]] * NUM_DEVICES))
        actual = jax.tree.map(lambda x: x[0], actual)
    else:
        mesh = Mesh(jax.devices(), ("data",))
        specs = (P(), P(), P("data"))
        mapped = jax.jit(mapped_over(parallel, mesh, specs, (P(), P()), check=False))
        for batch in batches:
            actual = mapped(*actual, batch.reshape(-1, 3))
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-5)
    assert float(optax.tree.get(actual[1], "learning_rate")) > 2e-3
