"""Each optimizer takes parameters of every type, in every kind of tree."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import ALL, PLAIN, SMALL, decided, small, without_momentum
from plain_loop import COUNTS, NOISE, START, assert_as_in_a_loop, run, run_plainly

for_all = pytest.mark.parametrize("name", ALL)
_typed = functools.partial(pytest.mark.environment, "2. Types and trees")

_TREES: dict[str, Any] = {
    "float16": np.ones(2, np.float16),
    "bfloat16": np.ones(2, jnp.bfloat16),
    "float32": np.ones(2, np.float32),
    "float64": np.ones(2, np.float64),
    "complex64": np.ones(2, np.complex64),
    "mixed": [np.ones(2, t) for t in (np.float16, jnp.bfloat16, np.float32)],
    "scalars": {"a": np.float32(1.0), "b": np.ones((), np.float32)},
    "empty leaves": {"a": np.ones((0, 3), np.float32), "b": np.ones(2, np.float32)},
    "`None` leaves": {"a": None, "b": np.ones(2, np.float32)},
}


def _all_kinds(test: Callable[..., None]) -> Callable[..., None]:
    cases = [
        pytest.param(name, kind, marks=_typed(kind)) for name in ALL for kind in _TREES
    ]
    return pytest.mark.parametrize(("name", "kind"), cases)(test)


@_all_kinds
def test_types_and_shapes_never_change(name: str, kind: str, x64: None) -> None:
    optimizer = ALL[name](**SMALL)
    params = jax.tree.map(jnp.asarray, _TREES[kind])
    state = optimizer.init(params)
    types = jax.eval_shape(optimizer.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(types, (params, state))
    assert not any(leaf.aval.weak_type for leaf in jax.tree.leaves(state))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(types[1]))
    wide = jnp.float64 if kind == "float64" else jnp.float32
    if name not in PLAIN:
        leaves = jax.tree.leaves(without_momentum(state))
        # Averages of complex numbers are complex.
        assert {x.real.dtype for x in leaves} - COUNTS == {jnp.dtype(wide)}


@_typed("mixed")
@_typed("empty leaves")
@_typed("`None` leaves")
@_typed("scalars")
@for_all
def test_a_tree_of_everything(name: str) -> None:
    """The tree moves as the same numbers in one array of single precision do."""
    optimizer, update = small(name)
    start = jnp.ones(8)
    grads = 0.25 * jnp.arange(-3.0, 5.0)
    params = {
        "half": jnp.ones(2, jnp.float16),
        "brain": jnp.ones(2, jnp.bfloat16),
        "single": jnp.ones((1, 2)),
        "complex": jnp.ones(1, jnp.complex64) * (1 + 1j),
        "empty": jnp.ones((0, 3)),
        "none": None,
    }
    mixed = {
        "half": grads[:2].astype(jnp.float16),
        "brain": grads[2:4].astype(jnp.bfloat16),
        "single": grads[None, 4:6],
        "complex": grads[6:7] + 1j * grads[7:8],
        "empty": jnp.ones((0, 3)),
        "none": None,
    }
    whole = update(grads, optimizer.init(start), start)
    parts = jax.jit(optimizer.update)(mixed, optimizer.init(params), params)
    flat = [jnp.asarray(parts[0][key]) for key in ("half", "brain", "single")]
    joined = [x.ravel().astype(jnp.float32) for x in flat]
    z = parts[0]["complex"]
    joined = jnp.concatenate([*joined, z.real, z.imag])
    np.testing.assert_allclose(joined, whole[0], rtol=0.01)
    for field in ("window", "num_nonfinite"):
        one, other = (optax.tree.get(state, field) for _, state in (whole, parts))
        chex.assert_trees_all_close(one, other, rtol=0.02)
    one, other = (decided(state) for _, state in (whole, parts))
    chex.assert_trees_all_close(one, other, rtol=0.02)


@_typed("complex64")
@for_all
def test_a_complex_number_is_two_real_ones(name: str) -> None:
    optimizer, _ = small(name)
    params = jnp.asarray(START)
    noise = NOISE[:8, :1] + 1j * NOISE[:8, 1:]
    z = params[:1] + 1j * params[1:]
    z, state = run(jax.jit(optimizer.update), z, optimizer.init(z), noise)
    pair, expected = run_plainly(name, 8)
    np.testing.assert_allclose([z[0].real, z[0].imag], pair, rtol=1e-4)
    chex.assert_trees_all_close(decided(state), decided(expected), rtol=1e-3, atol=1e-6)


@_typed("parameters committed to a device")
@for_all
def test_committed_parameters(name: str) -> None:
    device = jax.devices()[-1]
    optimizer, update = small(name)
    params = jax.device_put(START, device)
    actual = run(update, params, optimizer.init(params), NOISE)
    assert {d for x in jax.tree.leaves(actual) for d in x.devices()} == {device}
    assert_as_in_a_loop(actual, name)
