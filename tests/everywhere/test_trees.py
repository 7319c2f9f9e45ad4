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
from optimizers import (
    ALL,
    PLAIN,
    SMALL,
    decided,
    small,
    squares,
    take_step,
    without_momentum,
)
from plain_loop import (
    COUNTS,
    NOISE,
    START,
    assert_as_in_a_loop,
    grads_at,
    run,
    run_plainly,
)

import sasa_optax

for_all = pytest.mark.parametrize("name", ALL)
_typed = functools.partial(pytest.mark.environment, "2. Types and trees")

_TREES: dict[str, Any] = {
    "float8": [np.ones(2, t) for t in (jnp.float8_e4m3fn, jnp.float8_e5m2)],
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


@_typed("integers and booleans among the parameters, with updates of zero")
@for_all
def test_what_is_no_floating_point_number_is_left_alone(name: str) -> None:
    """The rest decides and moves as without, and an average holds what is newest."""
    optimizer, _ = small(name)
    step = jax.jit(optimizer.update)
    params = {"a": jnp.asarray(START), "count": jnp.int8(7), "flag": jnp.array([True])}
    state = optimizer.init(params)
    for k, noise in enumerate(NOISE[:12]):
        grads = jax.tree.map(jnp.zeros_like, params)
        grads["a"] = grads_at(noise, params["a"])
        params, state = take_step(step, grads, state, params)
        assert params["count"] == 7 + k
        assert params["flag"] == (k % 2 == 0)
        for _, averaged in optax.tree.get_all_with_path(state, "averaged"):
            chex.assert_trees_all_equal_dtypes(averaged, params)
            assert averaged["count"] == 7 + k
            assert averaged["flag"] == (k % 2 == 0)
        params["count"] += 1
        params["flag"] = ~params["flag"]
    if optax.tree.get_all_with_path(state, "averaged"):
        model: Any = sasa_optax.averaged_params(state, params)
        assert model["count"] == params["count"]
        assert model["flag"] == params["flag"]
    expected = run_plainly(name, 12)
    np.testing.assert_allclose(params["a"], expected[0], rtol=1e-4)
    one, other = (decided(x) for x in (state, expected[1]))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


_DECAYING = ("sasa", "sasa_plus", "slope", "salsa")


@_typed("integers and booleans among the parameters, with updates of zero", *_DECAYING)
@pytest.mark.parametrize("name", _DECAYING)
def test_what_is_no_floating_point_number_does_not_decay(name: str) -> None:
    """It does not count in what is recorded either."""
    optimizer = getattr(sasa_optax, name)(1.0, weight_decay=0.5, **SMALL)
    number = {"a": jnp.asarray(START)}
    params = number | {"count": jnp.int8(7), "flag": jnp.array([True])}
    after = []
    for tree in (number, params):
        grads = jax.tree.map(jnp.zeros_like, tree) | number
        extra = {"value": jnp.float32(1), "value_fn": squares}
        updates, state = optimizer.update(grads, optimizer.init(tree), tree, **extra)
        samples = [optax.tree.get(state, field) for field in ("window", "losses")]
        after.append((updates["a"], samples))
    chex.assert_trees_all_close(*after, rtol=1e-6)
    assert updates["count"] == 0
    assert not updates["flag"]


@_typed("Python and NumPy numbers, without jit")
@for_all
def test_python_numbers(name: str) -> None:
    """They move as arrays of single precision do."""
    optimizer, update = small(name)
    kinds = (float, np.float64)
    numbers: Any = [kind(1.0) for kind in kinds]
    arrays = [jnp.float32(x) for x in numbers]
    states = [optimizer.init(numbers), optimizer.init(arrays)]
    for noise in NOISE[:6]:
        grads = list(grads_at(noise, np.asarray(arrays)))
        arrays, states[1] = take_step(update, grads, states[1], arrays)
        grads = [kind(g) for kind, g in zip(kinds, grads, strict=True)]
        numbers, states[0] = take_step(optimizer.update, grads, states[0], numbers)
        assert not any(leaf.aval.weak_type for leaf in jax.tree.leaves(states[0]))
        numbers = [kind(x) for kind, x in zip(kinds, numbers, strict=True)]
    np.testing.assert_allclose(numbers, arrays, rtol=1e-5)
    one, other = map(decided, states)
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_average_of_float8_has_more_digits() -> None:
    optimizer = sasa_optax.average_iterates(min_horizon=4.0)
    params = jnp.ones(2, jnp.float8_e4m3fn)
    _, state = optimizer.update(params / 4, optimizer.init(params), params)
    # Between 1 and 2 there are seven numbers of float8.
    averaged = sasa_optax.averaged_params(state)
    chex.assert_trees_all_equal(averaged, jnp.full(2, 1 + 1 / 16))


@pytest.mark.parametrize("update", [None, np.zeros((), jax.dtypes.float0)])
def test_optax_adds_neither_none_nor_float0(update: Any) -> None:
    """If it ever does, integers and booleans should take such updates here."""
    with pytest.raises(TypeError):
        optax.apply_updates({"count": jnp.int32(7)}, {"count": update})
