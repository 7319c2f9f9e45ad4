"""What one search finds, what the rate makes of it, and how both are counted."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from line_searches import (
    for_given_or_not,
    history,
    losses_of,
    never_stationary,
    one_step,
    quadratic,
    search_of,
)

import sasa_optax

get = optax.tree.get


# Numbers are traced, so one compiled search serves many of them.
@functools.partial(jax.jit, static_argnames="with_value")
def search_parabola(
    search: sasa_optax.LineSearch, rate: float, with_value: bool
) -> Any:
    """The state after a step from 2, where the loss is x^2/2."""
    optimizer = sasa_optax.scale_by_ssls(rate, search=search)
    return one_step(optimizer, quadratic, jnp.array([2.0]), with_value=with_value)


@pytest.mark.parametrize(
    ("rate", "kwargs", "step_size", "num_trials"),
    [
        # On x^2/2 a step may be as long as 2 * (1 - sufficient_decrease).
        (0.6, {}, 1.2, 1),
        (0.94, {}, 1.88, 1),
        (0.96, {}, 0.96, 2),
        (1.5, {}, 1.5, 2),
        (5.0, {}, 2.5, 2),
        (5.0, {"max_trials": 1}, 5.0, 1),
        (5.0, {"max_trials": 9}, 1.25, 4),
        (5.0, {"max_trials": 9, "increase_factor": 1.0}, 1.25, 3),
        (5.0, {"decrease_factor": 0.1}, 1.0, 2),
        (0.49, {"sufficient_decrease": 0.5}, 0.98, 1),
        (0.51, {"sufficient_decrease": 0.5}, 0.51, 2),
    ],
)
@for_given_or_not
def test_what_one_search_finds_on_a_parabola(
    rate: float,
    kwargs: dict[str, Any],
    step_size: float,
    num_trials: int,
    with_value: bool,
) -> None:
    search = sasa_optax.LineSearch(smoothing=0.25, sufficient_decrease=0.05)
    search = dataclasses.replace(search, **kwargs)
    state = search_parabola(search, rate, with_value)
    found = search_of(state)
    assert float(found.step_size) == pytest.approx(step_size, rel=1e-6)
    assert int(found.num_evaluations) == num_trials + (0 if with_value else 1)
    smoothed = 0.75 * rate + 0.25 * step_size
    assert float(get(state, "learning_rate")) == pytest.approx(smoothed, rel=1e-6)


@pytest.mark.parametrize(
    ("rate", "along", "kwargs", "step_size"),
    [
        # A step may be as long as 2 * (1 - sufficient_decrease), 1.9 or 1.1.
        (0.56, "gradient", {}, 1.12),
        (0.54, "update", {}, 1.08),
        (0.56, "update", {}, 0.56),
        (0.56, "update", {"sufficient_decrease": 0.05}, 1.12),
    ],
)
def test_along_an_update_more_decrease_is_asked_for(
    rate: float, along: Any, kwargs: dict[str, Any], step_size: float
) -> None:
    search = sasa_optax.LineSearch(direction=along, **kwargs)
    state = search_parabola(search, rate, with_value=True)
    np.testing.assert_allclose(search_of(state).step_size, step_size, rtol=1e-6)


def test_the_step_is_made_with_the_new_rate_along_the_direction() -> None:
    optimizer = sasa_optax.ssls(0.5, momentum=0.75)
    x = jnp.array([1.0, -2.0])
    params, states = history(optimizer, quadratic, x, num_steps=1)
    rate = 0.5 * 0.9 + 1.0 * 0.1
    np.testing.assert_allclose(get(states, "learning_rate"), [rate], rtol=1e-6)
    np.testing.assert_allclose(params[0], (1 - rate * 0.25) * x, rtol=1e-6)


@functools.partial(jax.jit, static_argnames="with_value")
def step_along(sign: float, with_value: bool) -> Any:
    """The state after a step whose direction is ``sign`` times the gradient."""
    search = sasa_optax.LineSearch(
        direction="update", smoothing=0.25, decrease_factor=0.2, max_learning_rate=1.0
    )
    optimizer = sasa_optax.scale_by_ssls(0.1, search=search)
    chain = optax.chain(optax.scale(sign), optimizer)
    return one_step(chain, quadratic, jnp.ones(2), with_value=with_value)


@pytest.mark.parametrize("sign", [0.0, -1.0])
@for_given_or_not
def test_without_descent_the_rate_falls_and_nothing_is_tried(
    sign: float, with_value: bool
) -> None:
    state = step_along(sign, with_value)
    found = search_of(state)
    assert float(found.step_size) == pytest.approx(0.02)
    rate = 0.75 * 0.1 + 0.25 * 0.02
    assert float(get(state, "learning_rate")) == pytest.approx(rate)
    assert int(found.num_evaluations) == (0 if with_value else 1)


@for_given_or_not
def test_a_gradient_of_zero_makes_the_rate_fall(with_value: bool) -> None:
    optimizer = sasa_optax.ssls(0.1)
    state = one_step(optimizer, quadratic, jnp.zeros(2), with_value=with_value)
    assert float(get(state, "learning_rate")) == pytest.approx(0.095)
    assert int(search_of(state).num_evaluations) == (0 if with_value else 1)


def test_salsa_records_the_loss_with_its_weight_decay() -> None:
    optimizer = sasa_optax.salsa(
        0.1,
        weight_decay=0.5,
        test=never_stationary,
        window=sasa_optax.Window(min_samples=4, max_window=8),
    )
    x = jnp.array([1.0, -2.0])
    value = jnp.float32(7.0)
    update = functools.partial(optimizer.update, value_fn=jnp.sum, value=value)
    _, state = jax.jit(update)(x, optimizer.init(x), x)
    recorded = losses_of(state).buffer[0, 0]
    assert float(recorded) == pytest.approx(7.0 + 0.5 / 2 * 5.0)


# What is counted, and how often it is searched.


@for_given_or_not
def test_ssls_counts_its_evaluations(with_value: bool) -> None:
    calls: list[None] = []

    def counted(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(None))
        return quadratic(x)

    optimizer = sasa_optax.scale_by_ssls(
        0.4, search=sasa_optax.LineSearch(smoothing=0.5, max_trials=3)
    )

    @jax.jit
    def step(x: jax.Array, state: Any) -> Any:
        extra = {"value": quadratic(x)} if with_value else {}
        return optimizer.update(x, state, x, grad=x, value_fn=counted, **extra)

    x = jnp.array([1.0, -1.0])
    state = optimizer.init(x)
    seen = []
    for _ in range(8):
        before = len(calls)
        updates, state = step(x, state)
        x = x + updates
        jax.effects_barrier()
        assert len(calls) == int(search_of(state).num_evaluations)
        seen.append(len(calls) - before)
    # Some searches succeed at once, others do not.
    assert len(set(seen)) > 1


def test_the_count_of_evaluations_stays_at_its_end() -> None:
    optimizer = sasa_optax.scale_by_ssls()
    x = jnp.ones(2)
    most = np.iinfo(np.int32).max
    state = optax.tree.set(optimizer.init(x), num_evaluations=jnp.int32(most))
    _, state = optimizer.update(x, state, x, grad=x, value_fn=quadratic)
    assert int(search_of(state).num_evaluations) == most


@jax.jit
def search_downhill(search: sasa_optax.LineSearch) -> Any:
    optimizer = sasa_optax.scale_by_ssls(0.01, search=search)
    return history(optimizer, jnp.sum, -jnp.ones(2), num_steps=11)[1]


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_smoothing_is_compounded_over_the_steps_between_searches(
    interval: int, gamma: float
) -> None:
    states = search_downhill(
        sasa_optax.LineSearch(smoothing=gamma, increase_factor=3.0, interval=interval)
    )
    kept = (1 - gamma) ** interval
    growth = kept + (1 - kept) * 3.0
    searches = 1 + np.arange(11) // interval
    np.testing.assert_allclose(
        get(states, "learning_rate"), 0.01 * growth**searches, rtol=1e-5
    )
    step_sizes = 0.03 * growth ** (searches - 1)
    np.testing.assert_allclose(search_of(states).step_size, step_sizes, rtol=1e-5)
    assert search_of(states).num_evaluations.tolist() == searches.tolist()


@pytest.mark.parametrize(("steps_per_epoch", "gamma"), [(1, 1.0), (25, 0.2)])
def test_steps_per_epoch_sets_the_smoothing(steps_per_epoch: int, gamma: float) -> None:
    for given_, smoothing in [(None, gamma), (0.5, 0.5)]:
        optimizer = sasa_optax.ssls(
            0.01,
            steps_per_epoch=steps_per_epoch,
            search=sasa_optax.LineSearch(smoothing=given_),
        )
        state = one_step(optimizer, jnp.sum, jnp.ones(2))
        rate = get(state, "learning_rate")
        assert float(rate) == pytest.approx(0.01 * (1 + smoothing))


# Types of all kinds.


@for_given_or_not
def test_rounding_of_a_bfloat16_loss_is_no_failure(with_value: bool) -> None:
    def loss(x: jax.Array) -> jax.Array:
        return quadratic(x).astype(jnp.bfloat16)

    optimizer = sasa_optax.scale_by_ssls(1e-3)
    x = jnp.full(1, np.sqrt(4.6), jnp.float32)

    # The parameters stay, so each search sees the same parabola, of height 2.3.
    def step(state: Any, _: None) -> Any:
        extra = {"value": loss(x)} if with_value else {}
        state = optimizer.update(x, state, x, grad=x, value_fn=loss, **extra)[1]
        return state, get(state, "learning_rate")

    scan = jax.jit(lambda state: jax.lax.scan(step, state, None, length=150)[1])
    found = np.asarray(scan(optimizer.init(x)))
    np.testing.assert_allclose(found[:30], 1e-3 * 1.1 ** np.arange(1, 31), rtol=1e-5)
    # In the end twice the rate is beyond 1.9, and so too much; the rate itself is not.
    assert 0.93 < found[-1] < 1.05
    assert found[-1] == found[-20]


@pytest.mark.parametrize("name", ["ssls", "salsa", "scale_by_ssls", "scale_by_salsa"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@for_given_or_not
def test_types_never_change(name: str, dtype: str, with_value: bool) -> None:
    optimizer = getattr(sasa_optax, name)()
    params = {"a": jnp.ones(2, dtype), "b": jnp.ones((2, 2), dtype)}

    def loss(params: Any) -> jax.Array:
        return quadratic(params["a"]) + quadratic(params["b"])

    state = optimizer.init(params)
    extra = {"value": loss(params)} if with_value else {}
    update = functools.partial(optimizer.update, grad=params, value_fn=loss, **extra)
    with jax.numpy_dtype_promotion("strict"):
        updates, after = jax.eval_shape(update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(after))
    assert not any(leaf.aval.weak_type for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_parameters_are_optimized(dtype: str) -> None:
    with jax.numpy_dtype_promotion("strict"):
        optimizer = sasa_optax.ssls(0.1, momentum=0.5)
        params, states = history(
            optimizer,
            lambda x: quadratic(x, jnp.ones((), dtype), jnp.ones((), dtype)),
            jnp.full(3, 3.0, dtype),
            num_steps=40,
        )
    assert params.dtype == dtype
    assert get(states, "learning_rate").dtype == jnp.float32
    np.testing.assert_allclose(params[-1].astype(np.float32), 1.0, atol=0.05)


# Bounds of the rate.


def test_the_rate_stays_within_its_bounds() -> None:
    def loss(x: jax.Array, slope: jax.Array) -> jax.Array:
        return slope * jnp.sum(x)

    search = sasa_optax.LineSearch(max_learning_rate=0.015)
    optimizer = sasa_optax.scale_by_ssls(0.011, min_learning_rate=0.01, search=search)
    slopes = jnp.repeat(jnp.array([1.0, 0.0, 1.0]), 10)
    _, states = history(optimizer, loss, jnp.ones(2), {"slope": slopes})
    rate, expected = 0.011, []
    for slope in np.asarray(slopes):
        rate = rate * 1.1 if slope else rate * 0.95
        rate = min(max(rate, 0.01), 0.015)
        expected.append(rate)
    found = get(states, "learning_rate")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.max() <= np.float32(0.015)
    assert found.min() >= np.float32(0.01)
    assert float(found[19]) == pytest.approx(0.01)


def test_a_rate_that_starts_below_the_least_stays_where_it_is() -> None:
    optimizer = sasa_optax.scale_by_ssls(0.01, min_learning_rate=0.1)
    _, states = history(optimizer, quadratic, jnp.zeros(2), num_steps=3)
    np.testing.assert_allclose(get(states, "learning_rate"), 0.01, rtol=1e-6)


@functools.partial(jax.jit, static_argnames="with_value")
def run_downhill(steepness: float, with_value: bool) -> Any:
    """The states on a plane, where the rate becomes what each search finds."""
    search = sasa_optax.LineSearch(increase_factor=10.0, smoothing=1.0)

    def loss(x: jax.Array) -> jax.Array:
        return -steepness * jnp.sum(x)

    return history(
        sasa_optax.ssls(search=search),
        loss,
        jnp.ones(2),
        num_steps=300,
        with_value=with_value,
    )[1]


@pytest.mark.parametrize("steepness", [1.0, 1e10])
@for_given_or_not
def test_a_loss_without_a_minimum_leaves_a_finite_state(
    steepness: float, with_value: bool
) -> None:
    states = run_downhill(steepness, with_value)
    chex.assert_tree_all_finite(states)
    found = np.asarray(get(states, "learning_rate"))
    assert found.max() > 1e15
    assert np.isfinite(found.max() ** 2)
    # The steep one ends at minus infinity, where the rate falls.
    assert (found[-1] == found.max()) == (steepness == 1.0)


def test_salsa_on_a_loss_without_a_minimum_stays_finite() -> None:
    optimizer = sasa_optax.salsa(
        window=sasa_optax.Window(min_samples=200, max_window=300, leak_ratio=1)
    )
    _, states = history(optimizer, lambda x: -jnp.sum(x), jnp.ones(2), num_steps=600)
    chex.assert_tree_all_finite(states)
    assert float(get(states, "learning_rate")[-1]) > 1e15


def test_a_rate_that_only_falls_never_vanishes() -> None:
    def loss(x: jax.Array, slope: jax.Array) -> jax.Array:
        return slope * jnp.sum(x)

    search = sasa_optax.LineSearch(smoothing=1.0, decrease_factor=0.01)
    optimizer = sasa_optax.scale_by_ssls(search=search)
    slopes = jnp.concatenate([jnp.zeros(300), jnp.ones(200)])
    _, states = history(optimizer, loss, jnp.ones(2), {"slope": slopes})
    found = get(states, "learning_rate")
    assert 0 < float(found[299]) < 1e-15
    # So it can come back.
    assert float(found[-1]) > 1.0


@jax.jit
def end_of_search_downhill(search: sasa_optax.LineSearch) -> Any:
    optimizer = sasa_optax.scale_by_ssls(0.01, search=search)
    states = history(optimizer, jnp.sum, -jnp.ones(2), num_steps=60)[1]
    return get(states, "learning_rate")[-1]


@pytest.mark.parametrize(
    ("along", "kwargs", "rate"),
    [
        ("gradient", {}, 0.01 * 1.1**60),
        ("update", {}, 1.0),
        ("update", {"max_learning_rate": 10.0}, 0.01 * 1.1**60),
    ],
)
def test_only_along_an_update_there_is_a_bound_by_default(
    along: Any, kwargs: dict[str, Any], rate: float
) -> None:
    """Every trial is accepted, as on separable data."""
    found = end_of_search_downhill(sasa_optax.LineSearch(direction=along, **kwargs))
    assert float(found) == pytest.approx(rate, rel=1e-5)
