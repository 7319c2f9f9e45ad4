"""Each optimizer decides and moves the same inside optax's wrappers."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import ALL, PLAIN, SERVOS, decided, small, squares, started, take_step
from plain_loop import NOISE, START, assert_as_in_a_loop, grads_at, run, run_plainly

import sasa_optax

for_all = pytest.mark.parametrize("name", ALL)
_wrapped = functools.partial(pytest.mark.environment, "4. optax")
_faulty = functools.partial(pytest.mark.environment, "7. Faults")


@_wrapped("`chain`")
@_wrapped("`named_chain`")
@_wrapped("`tree.get`")
@for_all
def test_chains(name: str) -> None:
    params = jnp.asarray(START)
    clip = optax.clip_by_global_norm(1e6)
    optimizer = optax.chain(clip, optax.named_chain(("it", small(name)[0])))
    params, state = run(
        jax.jit(optimizer.update), params, optimizer.init(params), NOISE
    )
    assert_as_in_a_loop((params, state[1]["it"]), name)
    if name not in PLAIN and name != "measure_progress":
        scale = optax.tree.get(state, "scale")
        expected = float(optax.tree.get(run_plainly(name)[1], "scale"))
        # A scale that is no power of the factor depends on rounding.
        assert float(scale) == pytest.approx(expected, rel=1e-6 * (name in SERVOS))


@_wrapped("`MultiSteps`: one step in k, on the mean gradient")
@for_all
def test_multi_steps(name: str) -> None:
    optimizer = optax.MultiSteps(small(name)[0], every_k_schedule=2)
    params = jnp.asarray(START)
    state, update = started(optimizer.gradient_transformation(), params)
    for noise in NOISE[:12]:
        # The mean of the two is the gradient.
        for part in (0.5, 1.5):
            grads = part * grads_at(noise, params)
            moved, state = take_step(update, grads, state, params)
            if part == 0.5:
                chex.assert_trees_all_equal(moved, params)
        params = moved
    assert_as_in_a_loop((params, state.inner_opt_state), name, 12)


# A line search under these would call `value_fn` with the masked parameters.
for_all_without_search = pytest.mark.parametrize(
    "name", [name for name in ALL if "salsa" not in name and "ssls" not in name]
)


@_wrapped("`masked`")
@for_all_without_search
def test_masked(name: str) -> None:
    mask = {"a": True, "b": False}
    optimizer = optax.masked(small(name)[0], mask)
    params = {"a": jnp.asarray(START), "b": jnp.ones(3)}
    noise = [{"a": row, "b": np.zeros(3, np.float32)} for row in NOISE]
    state, update = started(optimizer, params)
    for row in noise:
        grads = {"a": grads_at(row["a"], params["a"]), "b": row["b"]}
        params, state = take_step(update, grads, state, params)
    assert_as_in_a_loop((params["a"], state.inner_state), name)


@_wrapped("`partition`, each group deciding alone")
@for_all_without_search
def test_partition(name: str) -> None:
    groups: dict[Any, Any] = {"ours": small(name)[0], "frozen": optax.set_to_zero()}
    optimizer = optax.partition(groups, {"a": "ours", "b": "frozen"})
    params = {"a": jnp.asarray(START), "b": jnp.ones(3)}
    state, update = started(optimizer, params)
    for noise in NOISE:
        grads = {"a": grads_at(noise, params["a"]), "b": jnp.ones(3)}
        params, state = take_step(update, grads, state, params)
    inner = state.inner_states["ours"].inner_state
    assert_as_in_a_loop((params["a"], inner), name)
    np.testing.assert_array_equal(params["b"], 1.0)


@_wrapped("`transforms.freeze`, after it")
@for_all
def test_frozen(name: str) -> None:
    """A frozen parameter does not move, and does not keep the rest from deciding."""
    mask = {"a": False, "b": True}
    frozen = optax.transforms.freeze(mask)
    optimizer = optax.chain(frozen, small(name)[0], frozen)
    params = {"a": jnp.asarray(START), "b": jnp.zeros(3)}
    state, update = started(optimizer, params)
    for noise in NOISE:
        grads = {"a": grads_at(noise, params["a"]), "b": jnp.ones(3)}
        params, state = take_step(update, grads, state, params)
    np.testing.assert_array_equal(params["b"], 0.0)
    expected = run_plainly(name)
    np.testing.assert_allclose(params["a"], expected[0], rtol=1e-4)
    one, other = (decided(x) for x in (state[1], expected[1]))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


@_wrapped("`lookahead`, around it")
@for_all
def test_lookahead(name: str) -> None:
    """With slow parameters that take each step in full, nothing changes."""
    optimizer = optax.lookahead(small(name)[0], sync_period=4, slow_step_size=1.0)
    params = optax.LookaheadParams.init_synced(jnp.asarray(START))
    state, update = started(optimizer, params)
    for noise in NOISE:
        params, state = take_step(update, grads_at(noise, params.fast), state, params)
    assert_as_in_a_loop((params.slow, state.fast_state), name)


@_wrapped("`tree.map_params`")
@for_all
def test_map_params(name: str) -> None:
    """Momentum and averages are like the parameters, and nothing else is."""
    optimizer, _ = small(name)
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    state = optimizer.init(params)
    doubled = optax.tree.map_params(
        optimizer, lambda x: x + 1, state, transform_non_params=lambda x: x
    )
    like_params = {"trace", "averaged"}

    def wanted(path: Any, x: jax.Array) -> jax.Array:
        names = {getattr(key, "name", None) for key in path}
        return x + 1 if names & like_params else x

    chex.assert_trees_all_equal(doubled, jax.tree.map_with_path(wanted, state))


@_wrapped("`apply_if_finite`: bad steps leave no trace")
@_faulty("NaN and Inf gradients under `apply_if_finite`: exact recovery")
@for_all
def test_recovery_is_exact_after_apply_if_finite(name: str) -> None:
    optimizer = optax.apply_if_finite(small(name)[0], max_consecutive_errors=5)
    bad = np.full((3, 2), np.nan, np.float32)
    bad[1] = np.inf
    noise = np.concatenate([NOISE[:8], bad, NOISE[8:], bad[:1]])
    params = jnp.asarray(START)
    update = jax.jit(optimizer.update)
    params, state = run(update, params, optimizer.init(params), noise)
    assert int(state.total_notfinite) == 4
    start = jnp.asarray(START)
    good = run(update, start, optimizer.init(start), NOISE)
    chex.assert_trees_all_equal(
        (params, state.inner_state), (good[0], good[1].inner_state)
    )
    assert_as_in_a_loop((params, state.inner_state), name)


@_wrapped("`lookahead`, around it")
@pytest.mark.parametrize("name", ["adapt_on_progress"])
def test_lookahead_hides_the_loss(name: str) -> None:
    """Lookahead passes no loss on, and without a loss the scale only falls."""
    alone = getattr(sasa_optax, name)(0.0)
    inner = optax.chain(optax.sgd(0.1), alone)
    params: Any = optax.LookaheadParams.init_synced(jnp.asarray(START))
    optimizer = optax.lookahead(inner, sync_period=4, slow_step_size=1.0)
    optimizer = optax.with_extra_args_support(optimizer)
    state, update = started(optimizer, params)
    scales = [1.0]
    for noise in jax.random.normal(jax.random.key(0), (128, 2)):
        grads = grads_at(noise, params.fast)
        value = squares(params.fast)
        params, state = take_step(update, grads, state, params, value=value)
        scales.append(float(optax.tree.get(state, "scale")))
    assert not bool(optax.tree.get(state, "sees_loss"))
    assert np.all(np.diff(scales) <= 0)
    assert scales[-1] < 1
