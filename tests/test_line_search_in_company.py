"""A line search inside optax's wrappers, and under JAX's transformations."""

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
    rates,
    search_of,
)

import sasa_optax

get = optax.tree.get


def test_multi_steps_gives_it_the_mean_gradient_at_every_other_step() -> None:
    salsa = sasa_optax.salsa(
        0.01,
        momentum=0.75,
        weight_decay=0.5,
        test=never_stationary,
        window=sasa_optax.Window(max_window=8, min_samples=4),
    )
    optimizer = optax.MultiSteps(salsa, every_k_schedule=2)
    x = jnp.array([1.0, -2.0])
    state = optimizer.init(x)
    step = jax.jit(lambda g, s: optimizer.update(g, s, x, value_fn=jnp.sum))
    counts, moves = [], []
    for k in range(4):
        # The means for the second parameter are 1 and 3, decay included.
        updates, state = step(jnp.full(2, 1.5 + k), state)
        counts.append(int(search_of(state).num_evaluations))
        moves.append(float(updates[1]))
    assert counts == [0, 2, 2, 4]
    expected = [0, -0.011 * 1 / 4, 0, -0.0121 * (3 / 4 + 3 / 16)]
    np.testing.assert_allclose(moves, expected, rtol=1e-5)
    losses = losses_of(state).buffer[0, :2]
    np.testing.assert_allclose(losses, -1 + 0.5 / 2 * 5, rtol=1e-6)


def test_inject_hyperparams_leaves_every_number_open_to_change() -> None:
    def make(
        learning_rate: Any, smoothing: Any, max_learning_rate: Any, max_trials: Any
    ) -> optax.GradientTransformation:
        search = sasa_optax.LineSearch(
            smoothing=smoothing,
            max_learning_rate=max_learning_rate,
            max_trials=max_trials,
        )
        return sasa_optax.ssls(learning_rate, momentum=0.0, search=search)

    injected = optax.inject_hyperparams(make)(
        0.01, smoothing=0.25, max_learning_rate=1.0, max_trials=3
    )
    optimizer = optax.with_extra_args_support(injected)
    x, compiled = jnp.ones(2), []

    @jax.jit
    def step(state: Any) -> Any:
        compiled.append(None)
        return optimizer.update(jnp.ones(2), state, x, value_fn=jnp.sum)

    updates, state = step(optimizer.init(x))
    rate = 0.01 * 1.25
    np.testing.assert_allclose(updates, -rate, rtol=1e-6)
    # The search has found a multiple of the rate given, and keeps it.
    state.hyperparams["learning_rate"] = jnp.float32(0.02)
    updates, state = step(state)
    rate = 2 * rate * 1.25
    np.testing.assert_allclose(updates, -rate, rtol=1e-6)
    state.hyperparams["smoothing"] = jnp.float32(0.5)
    updates, state = step(state)
    rate *= 1.5
    np.testing.assert_allclose(updates, -rate, rtol=1e-6)
    state.hyperparams["max_learning_rate"] = jnp.float32(0.04)
    updates, state = step(state)
    np.testing.assert_allclose(updates, -0.04, rtol=1e-6)
    assert len(compiled) == 1


def test_inject_hyperparams_takes_steps_per_epoch_as_static() -> None:
    make = optax.inject_hyperparams(sasa_optax.ssls, static_args="steps_per_epoch")
    optimizer = optax.with_extra_args_support(make(0.01, steps_per_epoch=25))
    x = jnp.ones(2)
    _, state = jax.jit(functools.partial(optimizer.update, value_fn=jnp.sum))(
        x, optimizer.init(x), x
    )
    assert rates([search_of(state)]) == pytest.approx([0.012])


def test_under_a_mask_value_fn_gets_the_masked_parameters() -> None:
    params = {"w": jnp.array([2.0]), "frozen": jnp.array([1.0])}
    mask = {"w": True, "frozen": False}
    optimizer = optax.chain(
        optax.masked(sasa_optax.ssls(0.6, momentum=0.0), mask),
        optax.masked(optax.set_to_zero(), {"w": False, "frozen": True}),
    )

    def value_fn(masked: Any) -> jax.Array:
        assert jax.tree.leaves(masked["frozen"]) == []
        return quadratic(masked["w"]) + quadratic(params["frozen"])

    state = optimizer.init(params)
    updates, state = jax.jit(functools.partial(optimizer.update, value_fn=value_fn))(
        params, state, params
    )
    rate = 0.9 * 0.6 + 0.1 * 1.2
    np.testing.assert_allclose(updates["w"], -rate * params["w"], rtol=1e-6)
    np.testing.assert_array_equal(updates["frozen"], 0.0)
    np.testing.assert_allclose(get(state, "learning_rate"), rate, rtol=1e-6)


def test_behind_a_clip_it_searches_along_the_clipped_gradient() -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), sasa_optax.ssls(5.0))
    state = one_step(optimizer, quadratic, jnp.array([3.0, 4.0]))
    # (5 - eta)^2 / 2 <= 25/2 - 0.05 eta up to 9.9: ten is too much, five is not.
    assert float(search_of(state).step_size) == pytest.approx(5.0)
    # Along the gradient itself it would have been too much, as 1.9 is the limit.
    state = one_step(sasa_optax.ssls(5.0), quadratic, jnp.array([3.0, 4.0]))
    assert float(search_of(state).step_size) == pytest.approx(2.5)


def test_inside_apply_if_finite() -> None:
    wrapped = optax.apply_if_finite(sasa_optax.ssls(0.1, momentum=0.0), 5)
    optimizer = optax.with_extra_args_support(wrapped)
    x = jnp.ones(2)

    @jax.jit
    def step(grads: jax.Array, state: Any) -> Any:
        return optimizer.update(grads, state, x, value_fn=quadratic)

    def inner(state: Any) -> Any:
        return state.inner_state

    state = optimizer.init(x)
    updates, after = step(x * jnp.nan, state)
    np.testing.assert_array_equal(updates, 0.0)
    chex.assert_trees_all_equal(inner(after), inner(state))
    updates, after = step(x, after)
    np.testing.assert_allclose(updates, -0.11, rtol=1e-6)


def test_under_vmap_every_member_searches_for_itself() -> None:
    optimizer = sasa_optax.ssls(
        0.5,
        momentum=0.5,
        search=sasa_optax.LineSearch(smoothing=0.5, max_trials=4),
    )

    def run(x: jax.Array, curvature: jax.Array) -> Any:
        batches = {"curvature": jnp.broadcast_to(curvature, (10,))}
        return history(
            optimizer,
            lambda x, curvature: quadratic(x, 0.0, curvature),
            x,
            batches,
            with_value=False,
        )

    xs = jnp.array([[1.0, 2.0], [3.0, 0.0], [-1.0, 5.0]])
    curvatures = jnp.array([0.1, 3.0, 40.0])
    together = jax.vmap(run)(xs, curvatures)
    alone = jax.jit(run)
    for k in range(3):
        member = jax.tree.map(lambda leaf, k=k: leaf[k], together)
        chex.assert_trees_all_close(
            member, alone(xs[k], curvatures[k]), rtol=1e-5, atol=1e-6
        )
    counts = search_of(together[1]).num_evaluations[:, -1]
    assert len(set(counts.tolist())) > 1


@pytest.mark.usefixtures("x64")
@for_given_or_not
def test_gradients_pass_through_the_steps_but_not_the_search(with_value: bool) -> None:
    optimizer = sasa_optax.ssls(0.3, momentum=0.0)
    curvature = jnp.array([1.0, 2.0])

    def loss(x: jax.Array, target: Any = 0.0) -> jax.Array:
        return quadratic(x, target, curvature)

    def unrolled(x: jax.Array, target: Any = 0.0) -> Any:
        params, states = history(
            optimizer,
            functools.partial(loss, target=target),
            x,
            num_steps=3,
            with_value=with_value,
        )
        return params[-1].sum(), get(states, "learning_rate")

    x = jnp.array([1.0, -2.0])
    (_, found), grads = jax.jit(jax.value_and_grad(unrolled, has_aux=True))(x)
    # For a constant rate, each step multiplies by 1 - rate * curvature.
    steps = 1 - np.asarray(found)[:, None] * np.asarray(curvature)
    np.testing.assert_allclose(grads, steps.prod(axis=0), rtol=1e-12)
    _, tangent = jax.jvp(lambda x: unrolled(x)[0], (x,), (jnp.ones(2),))
    np.testing.assert_allclose(tangent, steps.prod(axis=0).sum(), rtol=1e-12)
    # value_fn may be a function of what is differentiated.
    of_target = jax.grad(lambda target: unrolled(x, target)[0])(0.0)
    np.testing.assert_allclose(of_target, (1 - steps.prod(axis=0)).sum(), rtol=1e-12)


def test_one_compilation_and_buffers_that_are_donated() -> None:
    optimizer, compiled = sasa_optax.ssls(0.1, weight_decay=0.01), []

    def loss(params: jax.Array, batch: jax.Array) -> jax.Array:
        return quadratic(params, batch)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        compiled.append(None)
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(
            grads, state, params, value=value, value_fn=loss, batch=batch
        )
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(2)
    state: Any = optimizer.init(params)
    for k in range(5):
        # Buffers that no step changes, such as the unused last test, are kept.
        controller = state.controller.controller
        old = params, state.trace, controller.step, controller.scale
        params, state = step(params, state, jnp.full(2, float(k)))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert len(compiled) == 1
    chex.assert_tree_all_finite((params, state))
    assert int(get(state, "step")) == 5
