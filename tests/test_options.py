"""The objects that hold options are frozen trees, whose numbers may be traced."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from optimizers import SMALL, smaller, squares, started

import sasa_optax
from sasa_optax import _types

_STEPS = 60
_NOISE = jax.random.normal(jax.random.key(0), (_STEPS, 3))


def _after_a_run(optimizer: optax.GradientTransformationExtraArgs) -> Any:
    """The parameters and the state after a noisy descent on a quadratic."""

    def step(carry: Any, noise: jax.Array) -> Any:
        params, state = carry
        grads = params + noise
        updates, state = optimizer.update(
            grads, state, params, value=squares(params), value_fn=squares
        )
        return (optax.apply_updates(params, updates), state), None

    params = jnp.ones(3)
    return jax.lax.scan(step, (params, optimizer.init(params)), _NOISE)[0]


# The object made from a value of the field, a run with this object, and the values.
_FIELDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], list[Any]]] = {
    "ZeroMeanTest.significance": (
        lambda x: sasa_optax.ZeroMeanTest(significance=x),
        lambda test: _after_a_run(sasa_optax.sasa_plus(1.0, test=test, **SMALL)),
        [0.01, 0.5, 0.9],
    ),
    "ZeroMeanTest.delta": (
        lambda x: sasa_optax.ZeroMeanTest(delta=x),
        lambda test: _after_a_run(sasa_optax.sasa_plus(1.0, test=test, **SMALL)),
        [0.01, 0.2, 2.0],
    ),
    "EquivalenceTest.delta": (
        lambda x: sasa_optax.EquivalenceTest(delta=x),
        lambda test: _after_a_run(sasa_optax.sasa(1.0, test=test, **SMALL)),
        [0.01, 0.3, 3.0],
    ),
    "SlopeTest.significance": (
        lambda x: sasa_optax.SlopeTest(significance=x),
        lambda test: _after_a_run(sasa_optax.slope(1.0, test=test, **SMALL)),
        [0.001, 0.5, 0.999],
    ),
    "Window.leak_ratio": (
        lambda x: smaller(leak_ratio=x)["window"],
        lambda window: _after_a_run(sasa_optax.sasa_plus(1.0, window=window)),
        [1, 3, 6],
    ),
    "LineSearch.smoothing": (
        lambda x: sasa_optax.LineSearch(smoothing=x),
        lambda search: _after_a_run(sasa_optax.ssls(0.1, search=search)),
        [0.1, 0.5, 1.0],
    ),
}


@pytest.mark.parametrize("name", _FIELDS)
def test_vmap_over_a_field_is_a_loop_over_its_values(name: str) -> None:
    make, run, values = _FIELDS[name]
    run_alone = jax.jit(run)
    alone = [run_alone(make(x)) for x in values]
    scales = [float(optax.tree.get(state, "scale")) for _, state in alone]
    assert len(set(scales)) == len(values)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)

    built_inside = jax.jit(jax.vmap(lambda x: run(make(x))))(jnp.asarray(values))
    chex.assert_trees_all_close(built_inside, expected, rtol=1e-4, atol=1e-5)
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(make, values))
    given = jax.jit(jax.vmap(run))(batch)
    chex.assert_trees_all_close(given, expected, rtol=1e-4, atol=1e-5)


def test_a_test_of_ones_own_may_close_over_what_is_mapped() -> None:
    def run(threshold: jax.Array) -> Any:
        def is_small(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
            mean = sasa_optax.estimate_mean(samples).mean
            is_small = jnp.abs(mean) < threshold
            return sasa_optax.TestResult(mean=mean, stationary=is_small)

        return _after_a_run(sasa_optax.sasa_plus(1.0, test=is_small, **SMALL))

    thresholds = jnp.array([0.0, 0.05, 10.0])
    alone = [jax.jit(run)(x) for x in thresholds]
    num_drops = [int(optax.tree.get(state, "num_drops")) for _, state in alone]
    assert num_drops[0] == 0 < num_drops[1] < num_drops[2]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    mapped = jax.jit(jax.vmap(run))(thresholds)
    chex.assert_trees_all_close(mapped, expected, rtol=1e-4, atol=1e-5)


def test_all_optimizers_share_one_trace_of_a_test() -> None:
    traced = []

    @_types.options()
    class Constant:
        mean: float = 0.5

        @_types.traced_once
        def __call__(self, samples: sasa_optax.Samples) -> sasa_optax.TestResult:
            traced.append(samples)
            return sasa_optax.TestResult(mean=self.mean)

    for mean in (0.25, 0.75):
        _, state = _after_a_run(sasa_optax.sasa_plus(1.0, test=Constant(mean), **SMALL))
        assert float(optax.tree.get(state, "last_test").mean) == mean
    assert len(traced) == 1


class _Never(sasa_optax.ZeroMeanTest):
    """A class derived from options is no pytree."""

    def __call__(self, samples: sasa_optax.Samples) -> sasa_optax.TestResult:
        return super().__call__(samples)._replace(stationary=False)


class _Small(sasa_optax.Window):
    pass


def test_classes_may_be_derived_from_options() -> None:
    num_drops, means = [], []
    for test in (sasa_optax.ZeroMeanTest(), _Never()):
        window = _Small(leak_ratio=1, min_samples=4, test_interval=1, max_window=32)
        optimizer = sasa_optax.sasa_plus(1.0, test=test, window=window)
        _, state = _after_a_run(optimizer)
        num_drops.append(int(optax.tree.get(state, "num_drops")))
        means.append(float(optax.tree.get(state, "last_test").mean))
    assert num_drops[0] > num_drops[1] == 0
    assert all(means)


_OBJECTS = [
    sasa_optax.Window(),
    sasa_optax.LineSearch(),
    sasa_optax.ZeroMeanTest(),
    sasa_optax.EquivalenceTest(),
    sasa_optax.SlopeTest(),
]


@pytest.mark.parametrize("options", _OBJECTS, ids=lambda x: type(x).__name__)
def test_they_are_frozen_trees_of_their_numbers(options: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.significance = 0.5
    leaves, structure = jax.tree.flatten(options)
    assert jax.tree.unflatten(structure, leaves) == options
    # A field that fixes shapes or chooses code is no leaf.
    assert leaves
    assert all(type(x) in (int, float) for x in leaves)
    assert 16384 not in leaves


# `optax.inject_hyperparams` takes every argument that can be called for a schedule.

_TESTS = [
    sasa_optax.ZeroMeanTest(),
    sasa_optax.EquivalenceTest(),
    sasa_optax.SlopeTest(),
]


@pytest.mark.parametrize("test", _TESTS, ids=lambda x: type(x).__name__)
def test_inject_hyperparams_needs_a_test_object_among_the_static_arguments(
    test: sasa_optax.StationarityTest,
) -> None:
    params = jnp.ones(2)
    taken_for_a_schedule = optax.inject_hyperparams(sasa_optax.sasa_plus)(
        1.0, test=test
    )
    with pytest.raises(TypeError, match="name `test` in static_args"):
        taken_for_a_schedule.init(params)
    make = optax.inject_hyperparams(sasa_optax.sasa_plus, static_args="test")
    optimizer = make(1.0, test=test, **SMALL)
    state = optimizer.init(params)
    updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.leaves(updates)[0].shape == (2,)


def test_inject_hyperparams_takes_the_other_objects_as_they_are() -> None:
    statistic = sasa_optax.master_statistic(momentum=0.5)
    window = sasa_optax.Window(leak_ratio=3, max_window=2000)
    optimizer = optax.inject_hyperparams(sasa_optax.salsa)(
        1.0, statistic=statistic, window=window, search=sasa_optax.LineSearch()
    )
    params = jnp.ones(2)
    state, _ = started(optimizer, params)
    assert {"learning_rate", "momentum", "factor"} <= set(state.hyperparams)
    assert not {"statistic", "window", "search"} & set(state.hyperparams)
    update = functools.partial(optimizer.update, value_fn=squares)
    _, after = jax.eval_shape(update, params, state, params)
    assert optax.tree.get(after, "losses").buffer.shape == (1, 2000)
