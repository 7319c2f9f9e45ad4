"""Numbers that are not finite, and steps of zero, are no evidence and do no harm."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import ALL, PLAIN, SERVOS, decided, small, take_step, without_momentum
from plain_loop import NOISE, START, grads_at, run

import sasa_optax

_faulty = functools.partial(pytest.mark.environment, "7. Faults")


def _assert_untouched(
    before: Any, after: Any, num_bad: int, factor: float = 1.0
) -> None:
    chex.assert_tree_all_finite(without_momentum(after))
    get = optax.tree.get
    counted = int(get(after, "num_nonfinite")) - int(get(before, "num_nonfinite"))
    assert counted == num_bad
    for field in ("num_drops", "last_test", "step_size"):
        chex.assert_trees_all_equal(get(after, field), get(before, field))
    for field in ("scale", "learning_rate"):
        expected = jax.tree.map(lambda x: factor * x, get(before, field))
        chex.assert_trees_all_equal(get(after, field), expected)
    window = get(before, "window")
    if window is not None:
        assert int(get(after, "window").total) == int(window.total)


for_all_controllers = pytest.mark.parametrize(
    "name", [x for x in ALL if x not in (*PLAIN, *SERVOS)]
)
for_all_servos = pytest.mark.parametrize("name", SERVOS)


@_faulty("NaN or Inf gradients, for one step or many: counted, no more")
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("num_bad", [1, 5])
@for_all_controllers
def test_gradients_that_are_not_finite(name: str, num_bad: int, bad: float) -> None:
    """The square of 1e30 overflows in single precision, though it is finite."""
    optimizer, update = small(name)
    params = jnp.asarray(START)
    params, before = run(update, params, optimizer.init(params), NOISE[:8])
    after = before
    for _ in range(num_bad):
        updates, after = update(jnp.full(2, bad), after, params)
        assert updates.shape == params.shape
    _assert_untouched(before, after, num_bad)


@_faulty("NaN or Inf parameters: counted, and a line search halves the rate")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", [x for x in ALL if x not in (*PLAIN, *SERVOS, "slope")]
)
def test_parameters_that_are_not_finite(name: str, bad: float) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(START)
    params, before = run(update, params, optimizer.init(params), NOISE[:8])
    broken = params.at[0].set(bad)
    _, after = update(grads_at(NOISE[8], params), before, broken)
    searches = bool(optax.tree.get(before, "line_search_active", False))
    _assert_untouched(before, after, 1, factor=0.5 if searches else 1.0)


@_faulty("gradients of zero are no evidence")
@for_all_controllers
def test_gradients_of_zero(name: str) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(START)
    state = optimizer.init(params)
    for _ in range(20):
        _, state = update(jnp.zeros(2), state, params)
    assert int(optax.tree.get(state, "num_drops")) == 0
    chex.assert_tree_all_finite(state)


@_faulty("gradients of zero are no evidence")
@for_all_servos
def test_updates_of_zero(name: str) -> None:
    """The run has never moved, or it comes to a standstill."""
    optimizer, update = small(name)
    params = jnp.asarray(START)
    new = optimizer.init(params)
    old = run(update, params, new, NOISE)[1]
    for start in (new, old):
        state, params = start, optax.tree.get(start, "averaged")
        for _ in range(100):
            updates, state = update(jnp.zeros(2), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params, optax.tree.get(start, "averaged"))
        before, after = map(decided, (start, state))
        assert float(after["progress"]) <= float(before["progress"])
        assert float(after.get("scale", 0)) <= float(before.get("scale", 0))
        _assert_finite(state)


def _assert_finite(state: Any) -> None:
    """All is finite except for the ceiling, which is infinite before the first cut."""
    if optax.tree.get(state, "ceiling") is not None:
        assert float(optax.tree.get(state, "ceiling")) > 0
        state = optax.tree.set(state, ceiling=jnp.zeros(()))
    chex.assert_tree_all_finite(state)


_BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])


@_faulty("NaN or Inf in gradients or parameters: progress and average as before")
@_BAD
@pytest.mark.parametrize("where", ["gradients", "parameters"])
@for_all_servos
def test_progress_of_what_is_not_finite(name: str, where: str, bad: float) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(START)
    params, before = run(update, params, optimizer.init(params), NOISE[:12])
    grads = grads_at(NOISE[12], params)
    if where == "gradients":
        grads = grads.at[0].set(bad)
    broken = params if where == "gradients" else params.at[0].set(bad)
    after = before
    loss = jnp.sum(params**2)
    for _ in range(3):
        updates, after = update(grads, after, broken, value=loss)
        assert updates.shape == params.shape
        _assert_finite(after)
        one, other = (optax.tree.get(state, "measured") for state in (before, after))
        one, other = (before[1], after[1]) if one is None else (one, other)
        np.testing.assert_array_equal(one.progress, other.progress)
        np.testing.assert_array_equal(one.walks, other.walks)
        if not np.isfinite(bad):
            averages = one.average.averaged, other.average.averaged
            np.testing.assert_array_equal(*(x[0] for x in averages))
            assert not np.array_equal(*(x[1] for x in averages))


@_faulty("NaN or Inf losses, for one step: back to the average; for many: one brake")
@_BAD
@pytest.mark.parametrize("num_bad", [1, 50])
@pytest.mark.parametrize("name", ["adapt_on_progress"])
def test_losses_that_are_not_finite(name: str, num_bad: int, bad: float) -> None:
    """The square of 1e30 overflows in single precision, though it is finite."""
    optimizer, update = small(name)
    params = jnp.asarray(START)
    params, before = run(update, params, optimizer.init(params), NOISE[:6])
    state, scale = before, float(optax.tree.get(before, "scale"))
    average = np.asarray(START)
    for _ in range(num_bad):
        average = np.asarray(sasa_optax.averaged_params(state))
        grads, value = jnp.full(2, np.nan), jnp.float32(bad)
        params, state = take_step(update, grads, state, params, value=value)
        np.testing.assert_allclose(params, average, rtol=1e-6)
        _assert_finite(state)
    assert int(optax.tree.get(state, "num_nonfinite")) == num_bad
    assert int(optax.tree.get(state, "num_brakes")) == (num_bad > 1)
    cut = scale / 4 if num_bad > 1 else scale
    assert float(optax.tree.get(state, "scale")) == pytest.approx(cut, rel=0.1)
    params, state = run(update, params, state, np.tile(NOISE, (20, 1)))
    assert int(optax.tree.get(state, "num_brakes")) <= 1
    assert float(jnp.sum(params**2)) < float(np.sum(average**2))


@_faulty("`apply_if_finite` around what is before it: it trains on")
@pytest.mark.parametrize("name", ["adapt_on_progress"])
def test_it_trains_on_after_gradients_and_losses_that_are_nan(name: str) -> None:
    inner = optax.apply_if_finite(optax.adamw(1e-2), max_consecutive_errors=100)
    optimizer = optax.chain(inner, getattr(sasa_optax, name)())

    @jax.jit
    def step(params: Any, state: Any, noise: jax.Array, is_bad: jax.Array) -> Any:
        def loss(params: jax.Array) -> jax.Array:
            return jnp.sum((params - 3 + noise) ** 2) * jnp.where(is_bad, jnp.nan, 1)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(4)
    state = optimizer.init(params)
    noise = jax.random.normal(jax.random.key(0), (1000, 4))
    for k, row in enumerate(noise):
        is_bad = 150 <= k < 160
        average = np.asarray(sasa_optax.averaged_params(state))
        params, state = step(params, state, row, is_bad)
        assert np.all(np.isfinite(params))
        if is_bad:
            np.testing.assert_allclose(params, average, rtol=1e-6)
    average = np.asarray(sasa_optax.averaged_params(state))
    assert np.max(np.abs(average - 3)) < 0.3
    assert int(optax.tree.get(state, "num_brakes")) == 1
    assert int(optax.tree.get(state, "num_nonfinite")) == 10
    assert int(optax.tree.get(state, "last_rise")) > 160
    _assert_finite(state)


@_faulty("a loss that never changes never raises the rate")
@pytest.mark.parametrize("name", ["adapt_on_progress"])
@pytest.mark.parametrize("loss", [0.0, -3.0, 1e-30, 7.123, 1e15])
def test_a_constant_loss(name: str, loss: float) -> None:
    optimizer = optax.chain(optax.sgd(0.1), getattr(sasa_optax, name)(0.0))

    def step(carry: Any, noise: jax.Array) -> Any:
        params, state = carry
        # The parameters move along a straight line, where the rate would rise.
        grads = jnp.ones(2) + noise
        value = jnp.float32(loss)
        carry = take_step(optimizer.update, grads, state, params, value=value)
        seen = (optax.tree.get(carry[1], name) for name in ("scale", "progress"))
        return carry, tuple(seen)

    params = jnp.asarray(START)
    noise = jnp.asarray(np.tile(NOISE, (21, 1))[:500])
    (_, state), (scales, progress) = jax.lax.scan(
        step, (params, optimizer.init(params)), noise
    )
    assert progress[-1] > 10
    np.testing.assert_array_equal(scales, 1.0)
    assert int(optax.tree.get(state, "num_brakes")) == 0
    _assert_finite(state)


@_faulty("counters at the end of int32 stay there")
@for_all_servos
def test_counters_of_servos_at_their_end(name: str) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(START)
    end = jnp.int32(np.iinfo(np.int32).max)
    state = optax.tree.set(optimizer.init(params), num_averaged=end)
    if name == "adapt_on_progress":
        fields = ("num_losses", "num_missed", "num_nonfinite")
        state = optax.tree.set(state, **dict.fromkeys(fields, end))
        # The best loss is that of now. Otherwise a brake would restart the count.
        state = optax.tree.set(state, best=optax.tree.get(state, "fast"))
    for loss in (1.0, 1.0, np.nan):
        value = jnp.float32(loss)
        updates, state = update(jnp.ones(2), state, params, value=value)
        assert np.all(np.isfinite(updates))
        assert int(optax.tree.get(state, "num_averaged")) == int(end)
        assert int(optax.tree.get(state, "num_nonfinite", end)) == int(end)
        assert int(optax.tree.get(state, "num_losses", end)) == int(end)
        _assert_finite(state)


@_faulty("counters at the end of int32 stay there")
@for_all_controllers
def test_counters_at_their_end(name: str) -> None:
    optimizer, update = small(name)
    params = jnp.asarray(START)
    state = optimizer.init(params)
    end = jnp.int32(np.iinfo(np.int32).max)
    counters = ("step", "num_nonfinite", "total", "num_evaluations", "num_averaged")

    def is_counter(path: Any, _: Any) -> bool:
        return getattr(path[-1], "name", None) in counters

    at_end = jax.tree_util.tree_map_with_path(
        lambda path, x: end if is_counter(path, x) else x, state
    )
    after = at_end
    for grads in jnp.asarray(NOISE[:6]):
        updates, after = update(grads, after, params)
        assert np.all(np.isfinite(updates))
    _, after = update(jnp.full(2, np.nan), after, params)
    leaves = jax.tree_util.tree_leaves_with_path(after)
    counts = [int(x) for path, x in leaves if is_counter(path, x)]
    # A drop may have emptied the window. No counter became negative.
    assert set(counts) <= {0, int(end)}
    assert int(optax.tree.get(after, "step")) == int(end)
    chex.assert_tree_all_finite(without_momentum(after))


@_faulty("momentum 0 forgets a gradient that is not finite")
@pytest.mark.parametrize("name", ["sasa", "sasa_plus", "qhm"])
def test_without_momentum_nothing_bad_is_remembered(name: str) -> None:
    optimizer = getattr(sasa_optax, name)(0.5, momentum=0.0)
    params = jnp.asarray(START)
    state = optimizer.init(params)
    _, state = optimizer.update(jnp.full(2, np.nan), state, params)
    updates, _ = optimizer.update(jnp.ones(2), state, params)
    np.testing.assert_array_equal(updates, -0.5)
