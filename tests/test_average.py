"""The averaged model: what is averaged, and how to read it."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import SMALL, always_stationary, smaller, squares, started, take_step

import sasa_optax

_STEPS = 40
_NOISE = np.random.default_rng(0).normal(size=(_STEPS, 5))


def _averaged(opt_state: Any, params: Any = None) -> Any:
    return sasa_optax.averaged_params(opt_state, params)


def _weights(steps: int, leak_ratio: float, min_horizon: float) -> np.ndarray:
    """The weights of x_0, ..., x_steps in the average; shape (steps + 1,)."""
    k = np.arange(1, steps + 1)
    of_new = 1 / np.maximum(min_horizon, k / leak_ratio)
    # A weight is multiplied by this until the end.
    kept = np.cumprod(np.append(1, (1 - of_new)[::-1]))[::-1]
    return kept * np.append(1, of_new)


def _iterates(optimizer: Any, params: jax.Array, noise: Any = _NOISE) -> Any:
    """x_0, x_1, ..., and the state after each step."""
    update = optax.with_extra_args_support(optimizer).update

    @jax.jit
    def step(params: jax.Array, state: Any, row: jax.Array) -> Any:
        grads = (row + 0.1 * params).astype(params.dtype)
        updates, state = update(
            grads, state, params, value=squares(params), grad=grads, value_fn=squares
        )
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    xs, states = [params], [state]
    for row in noise:
        params, state = step(params, state, row)
        xs.append(params)
        states.append(state)
    return xs, states


@jax.jit
def _average_of(leak_ratio: Any, min_horizon: Any, xs: jax.Array) -> Any:
    optimizer = sasa_optax.average_iterates(leak_ratio, min_horizon)

    def step(state: Any, pair: Any) -> Any:
        return optimizer.update(pair[1] - pair[0], state, pair[0])[1], None

    start = optimizer.init(xs[0])
    return jax.lax.scan(step, start, (xs[:-1], xs[1:]))[0]


@hypothesis.given(
    leak_ratio=st.integers(1, 20), min_horizon=st.floats(1, 50), seed=st.integers(0, 99)
)
def test_it_is_the_weighted_sum(
    x64: None, leak_ratio: int, min_horizon: float, seed: int
) -> None:
    xs = np.random.default_rng(seed).normal(size=(_STEPS + 1, 3))
    state = _average_of(leak_ratio, min_horizon, xs)
    expected = _weights(_STEPS, leak_ratio, min_horizon) @ xs
    actual = _averaged(state)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)
    assert int(state.num_averaged) == _STEPS


def test_nearly_all_weight_is_on_the_newest_part() -> None:
    """For leak_ratio=8 the newest quarter has 90 %, the older half less than 1 %."""
    weights = _weights(100_000, 8, 32)
    assert np.sum(weights) == pytest.approx(1)
    assert np.sum(weights[75_000:]) > 0.89
    assert np.sum(weights[:50_000]) < 0.01


def test_the_updates_are_left_alone() -> None:
    params = jnp.ones(5)
    plain, _ = _iterates(optax.adamw(0.1), params)
    chained = optax.chain(optax.adamw(0.1), sasa_optax.average_iterates())
    averaged, _ = _iterates(chained, params)
    chex.assert_trees_all_equal(plain, averaged)


_WITH_AVERAGE: dict[str, Any] = {
    "sasa": functools.partial(sasa_optax.sasa, 1.0),
    "sasa_plus": functools.partial(sasa_optax.sasa_plus, 1.0),
    "sasa_plus_centred": functools.partial(
        sasa_optax.sasa_plus, 1.0, statistic="centred"
    ),
    "slope": functools.partial(sasa_optax.slope, 1.0),
    "salsa": sasa_optax.salsa,
    "scale_by_sasa_plus": functools.partial(sasa_optax.scale_by_sasa_plus, 1.0),
    "scale_by_salsa": sasa_optax.scale_by_salsa,
    "reduce_on_stationarity": sasa_optax.reduce_on_stationarity,
}


@functools.cache
def _run_both(name: str) -> Callable[[int], Any]:
    """The histories with ``average=True`` and with `average_iterates` behind it."""

    @jax.jit
    def run(leak_ratio: Any) -> Any:
        arguments = smaller(leak_ratio=leak_ratio) | {"test": always_stationary}
        make = _WITH_AVERAGE[name]
        behind = sasa_optax.average_iterates(leak_ratio)
        optimizers = (
            make(**arguments, average=True),
            optax.chain(make(**arguments, average=False), behind),
        )

        def history(optimizer: Any) -> Any:
            def step(carry: Any, row: jax.Array) -> Any:
                params, state = carry
                grads = (row + 0.1 * params).astype(params.dtype)
                params, state = take_step(
                    optimizer.update,
                    grads,
                    state,
                    params,
                    value=squares(params),
                    grad=grads,
                    value_fn=squares,
                )
                num_drops = optax.tree.get(state, "num_drops")
                return (params, state), (params, _averaged(state), num_drops)

            params = jnp.ones(5)
            start = params, optimizer.init(params)
            return jax.lax.scan(step, start, jnp.asarray(_NOISE))[1]

        return tuple(map(history, optimizers))

    return run


@pytest.mark.parametrize("leak_ratio", [2, 3])
@pytest.mark.parametrize("name", _WITH_AVERAGE)
def test_average_true_is_average_iterates_behind_it(name: str, leak_ratio: int) -> None:
    with_it, behind = _run_both(name)(leak_ratio)
    # SALSA averages an iterate a step later, when its loss is known to be finite.
    late = "salsa" in name
    same = [(x[0], x[2]) if late else x for x in (with_it, behind)]
    chex.assert_trees_all_close(*same, rtol=1e-5)
    params, averages, num_drops = with_it
    weights = [_weights(k, leak_ratio, 32) for k in range(1, _STEPS + 1)]
    iterates = np.concatenate([np.ones((1 + late, 5)), params])
    expected = [weight @ iterates[: len(weight)] for weight in weights]
    np.testing.assert_allclose(averages, expected, rtol=1e-5)
    assert num_drops[-1] > 1


def test_a_drop_leaves_the_average_as_it_is() -> None:
    optimizer = sasa_optax.sasa_plus(1.0, **SMALL, test=always_stationary, average=True)
    xs, states = _iterates(optimizer, jnp.ones(5))
    assert int(optax.tree.get(states[-1], "num_drops")) > 3
    expected = _weights(_STEPS, 1, 32) @ np.asarray(xs)
    actual = _averaged(states[-1])
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_by_default_only_salsa_averages() -> None:
    for name, make in _WITH_AVERAGE.items():
        state = make().init(jnp.ones(2))
        # It is the pair of the optimizer's own state and that of `average_iterates`.
        averages = isinstance(state[-1], sasa_optax.AverageState)
        assert averages == ("salsa" in name)


# Types.


@pytest.mark.parametrize(
    ("dtype", "of_average", "kept"),
    [
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float32", None, "float32"),
        ("float32", "float64", "float64"),
        ("float64", None, "float64"),
        ("float64", "float32", "float64"),
        ("complex64", None, "complex64"),
        ("complex64", "float64", "complex128"),
        ("int32", None, "int32"),
    ],
)
def test_types(x64: None, dtype: str, of_average: str | None, kept: str) -> None:
    params = {"x": jnp.ones(3, dtype)}
    optimizer = sasa_optax.average_iterates(dtype=of_average)
    state, update = started(optimizer, params)
    assert state.averaged["x"].dtype == kept
    updates, new = update(params, state, params)
    chex.assert_trees_all_equal_dtypes(new, state)
    chex.assert_trees_all_equal(updates, params)
    params = optax.apply_updates(params, updates)
    actual = _averaged(new, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, params)
    # Integers are not averaged.
    expected = 2 if dtype == "int32" else 1 + 1 / 32
    assert complex(actual["x"][0]) == pytest.approx(expected, rel=1e-2)


def test_it_does_not_stand_still_in_half_precision() -> None:
    """An average in bfloat16 would have stopped moving long before."""
    optimizer = sasa_optax.average_iterates(leak_ratio=1)
    zero, one = jnp.zeros(1, jnp.bfloat16), jnp.ones(1, jnp.bfloat16)

    def step(state: Any, k: jax.Array) -> Any:
        x = jnp.where(k % 2 == 0, zero, one)
        return optimizer.update(zero, state, x)[1], None

    state, _ = jax.lax.scan(step, optimizer.init(zero), jnp.arange(20_000))
    assert float(_averaged(state)[0]) == pytest.approx(0.5, abs=1e-3)


# Reading it.


def _taken(optimizer: Any, params: Any) -> tuple[Any, Any]:
    """The state and the parameters after one step, for gradients of one."""
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = update(grads, optimizer.init(params), params)
    return state, optax.apply_updates(params, updates)


_SGD = optax.chain(optax.sgd(1.0), sasa_optax.average_iterates())
# After one step from x = 1 to x = 0.
_AFTER_ONE = 1 - 1 / 32


def test_from_a_chain_inside_jit_and_out() -> None:
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    state, params = _taken(optax.chain(optax.clip(9.0), _SGD), params)
    for given in (None, params):
        actual = _averaged(state, given)
        chex.assert_trees_all_close(
            actual, jax.tree.map(lambda x: jnp.full_like(x, _AFTER_ONE), params)
        )
        chex.assert_trees_all_equal(
            actual, jax.jit(sasa_optax.averaged_params)(state, given)
        )


def test_the_state_may_be_donated_afterwards() -> None:
    state, params = _taken(_SGD, jnp.ones(3))
    kept = [
        _averaged(state),
        _averaged(state, params),
    ]
    jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(state)
    for average in kept:
        np.testing.assert_allclose(average, _AFTER_ONE)


@pytest.mark.parametrize(
    "mask", [{"a": True, "b": {"c": False}}, {"a": True, "b": False}]
)
def test_from_masked(mask: Any) -> None:
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
    optimizer = optax.chain(
        optax.sgd(1.0), optax.masked(sasa_optax.average_iterates(), mask)
    )
    state, params = _taken(optimizer, params)
    actual = _averaged(state, params)
    chex.assert_trees_all_equal_structs(actual, params)
    np.testing.assert_allclose(actual["a"], _AFTER_ONE)
    # The parameters stand in for what is not averaged.
    np.testing.assert_allclose(actual["b"]["c"], 0.0)
    with pytest.raises(ValueError, match="params is needed"):
        _averaged(state)


def test_from_partition() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4)}
    optimizer = optax.partition(
        {"fast": _SGD, "slow": _SGD, "none": optax.sgd(1.0)},
        {"a": "fast", "b": "slow", "c": "none"},
    )
    state, params = _taken(optimizer, params)
    actual = _averaged(state, params)
    np.testing.assert_allclose(actual["a"], _AFTER_ONE)
    np.testing.assert_allclose(actual["b"], _AFTER_ONE)
    np.testing.assert_allclose(actual["c"], 0.0)
    with pytest.raises(ValueError, match="params is needed"):
        _averaged(state)


def test_from_multi_steps() -> None:
    optimizer = optax.MultiSteps(_SGD, every_k_schedule=2)
    params = jnp.ones(3)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for expected in (1.0, _AFTER_ONE):
        updates, state = update(jnp.ones(3), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(_averaged(state, params), expected, rtol=1e-6)


def test_the_centre_of_a_statistic_is_not_the_averaged_model() -> None:
    optimizer = sasa_optax.sasa_plus(1.0, statistic="centred")
    state, params = _taken(optimizer, jnp.ones(3))
    with pytest.raises(ValueError, match="opt_state must hold an average"):
        _averaged(state, params)


# Errors.


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("leak_ratio", 0, "an integer of at least 1"),
        ("leak_ratio", 2.5, "an integer of at least 1"),
        ("min_horizon", 0.5, r"a number in \[1, inf\)"),
        ("min_horizon", np.inf, r"a number in \[1, inf\)"),
        ("dtype", jnp.bfloat16, "float32 or float64, or None"),
        ("dtype", jnp.int32, "float32 or float64, or None"),
        ("dtype", "complex64", "float32 or float64, or None"),
    ],
)
def test_bad_arguments(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {allowed}, got"):
        sasa_optax.average_iterates(**{name: value})


def test_double_precision_must_be_there() -> None:
    with pytest.raises(ValueError, match="'float64', unless `jax_enable_x64` is set"):
        sasa_optax.average_iterates(dtype="float64")


def test_average_must_be_a_boolean() -> None:
    arguments: dict[str, Any] = {"average": 8}
    with pytest.raises(ValueError, match="average must be True or False, got 8"):
        sasa_optax.sasa_plus(1.0, **arguments)


def test_update_needs_params() -> None:
    optimizer = sasa_optax.average_iterates()
    with pytest.raises(ValueError, match="update needs the current parameters"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


def test_no_average_or_two() -> None:
    params = jnp.ones(2)
    with pytest.raises(ValueError, match="opt_state must hold an average"):
        _averaged(optax.adam(1.0).init(params), params)
    two = optax.chain(_SGD, sasa_optax.average_iterates())
    with pytest.raises(ValueError, match=r"averages the parameter .* twice"):
        _averaged(two.init(params), params)


def test_params_of_another_structure_or_shape() -> None:
    state = _SGD.init({"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"params must have the structure .* no \['b"):
        _averaged(state, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"params must have the shapes .* \(4,\) for"):
        _averaged(state, {"a": jnp.ones(2), "b": jnp.ones(4)})


def test_a_saved_run_goes_on_with_an_average() -> None:
    params = jnp.ones(2)
    state = sasa_optax.sasa_plus(1.0).init(params)
    optimizer = sasa_optax.sasa_plus(1.0, average=True)
    (_, fresh), update = started(optimizer, params)
    _, (after, average) = update(params, (state, fresh), params)
    assert int(after.controller.step) == int(average.num_averaged) == 1


_OTHERS = {
    "with an average": ({}, {"average": True}),
    "without its average": ({"average": True}, {}),
    "with another statistic": ({}, {"statistic": "centred"}),
    "without its statistic": ({"statistic": "centred"}, {}),
}


@pytest.mark.parametrize("which", _OTHERS)
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(sasa_optax.sasa_plus, 1.0),
        functools.partial(sasa_optax.scale_by_sasa_plus, 1.0),
    ],
)
def test_a_state_of_other_options_says_so(make: Any, which: str) -> None:
    saved, wanted = _OTHERS[which]
    params = jnp.ones(2)
    state = make(**saved).init(params)
    with pytest.raises(ValueError, match=r"The (state|number of updates and states) "):
        make(**wanted).update(params, state, params)


# Numbers that are not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_enters(bad: float) -> None:
    params = jnp.ones(2)
    state, update = started(_SGD, params)
    for gradient in ([1.0, 1.0], [1.0, bad], [0.0, bad]):
        params, state = take_step(update, jnp.array(gradient), state, params)
    average = _averaged(state)
    # The average of the bad coordinate stays; the other moves on.
    assert float(average[1]) == pytest.approx(_AFTER_ONE)
    assert float(average[0]) < _AFTER_ONE


def test_a_distance_that_overflows_does_not_enter() -> None:
    most = float(np.finfo(np.float32).max)
    optimizer = sasa_optax.average_iterates()
    state = optimizer.init(jnp.full(1, -most))
    _, state = optimizer.update(jnp.zeros(1), state, jnp.full(1, most))
    assert np.isfinite(_averaged(state)[0])
