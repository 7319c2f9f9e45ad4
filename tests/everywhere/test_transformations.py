"""Each optimizer decides and moves the same under JAX's transformations and modes."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.test_util import check_grads
from optimizers import ALL, PARAMS, SMALL, small
from plain_loop import COUNTS, NOISE, START, assert_as_in_a_loop, run

for_all = pytest.mark.parametrize("name", ALL)
_transformed = functools.partial(
    pytest.mark.environment, "1. JAX's transformations and modes"
)


@_transformed("no jit; `jax_debug_nans`")
@for_all
def test_without_jit_no_operation_makes_nan(name: str) -> None:
    optimizer, _ = small(name)
    params = jnp.asarray(START)
    with jax.disable_jit(), jax.debug_nans(True):
        actual = run(optimizer.update, params, optimizer.init(params), NOISE[:6])
    assert_as_in_a_loop(actual, name, 6)


@_transformed("`lax.scan`")
@for_all
def test_scan(name: str) -> None:
    optimizer, _ = small(name)

    def step(carry: Any, noise: jax.Array) -> Any:
        params, state = carry
        return run(optimizer.update, params, state, noise[None]), None

    params = jnp.asarray(START)
    scanned, _ = jax.jit(functools.partial(jax.lax.scan, step))(
        (params, optimizer.init(params)), NOISE
    )
    assert_as_in_a_loop(scanned, name)


@_transformed("`vmap` over a population, each member deciding alone")
@for_all
def test_vmap(name: str) -> None:
    optimizer, update = small(name)
    noise = 0.1 * jax.random.normal(jax.random.key(1), (24, 3, 2))
    params = jnp.stack([jnp.asarray(START) * k for k in (1, 2, 3)])
    step = jax.jit(jax.vmap(optimizer.update))
    population = run(step, params, jax.vmap(optimizer.init)(params), noise)
    for member in range(3):
        alone = run(
            update, params[member], optimizer.init(params[member]), noise[:, member]
        )
        one = jax.tree.map(lambda x, member=member: x[member], population)
        chex.assert_trees_all_close(one, alone, rtol=1e-4, atol=1e-5)


@_transformed("`grad` through an update")
@_transformed("`jax.checkpoint` (remat)")
@for_all
def test_gradients_pass_through(name: str) -> None:
    optimizer, _ = small(name)

    def after_two_steps(params: jax.Array) -> jax.Array:
        params, _ = run(optimizer.update, params, optimizer.init(params), NOISE[:2])
        return jnp.sum(params**2)

    x = jnp.asarray(START)
    for function in (after_two_steps, jax.checkpoint(after_two_steps)):
        check_grads(
            jax.jit(function), (x,), order=1, modes=["rev"], atol=0.05, rtol=0.05
        )


@_transformed("donated parameters and state")
@_transformed("compiled ahead of time")
@_transformed("one compilation for all steps")
@for_all
def test_donated_and_compiled_ahead_of_time(name: str) -> None:
    optimizer, _ = small(name)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, noise: Any) -> Any:
        return run(optimizer.update, params, state, noise[None])

    params = jnp.array(START)
    state = jax.tree.map(jnp.copy, optimizer.init(params))
    compiled = step.lower(params, state, NOISE[0]).compile()
    for noise in NOISE:
        old = params, optax.tree.get(state, "window"), optax.tree.get(state, "trace")
        # This takes only the types and shapes that it was compiled for.
        params, state = compiled(params, state, noise)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert_as_in_a_loop((params, state), name)


@_transformed("donated parameters and state")
@for_all
def test_every_leaf_has_a_buffer_of_its_own(name: str) -> None:
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    for init in (ALL[name]().init, jax.jit(ALL[name]().init)):
        leaves = jax.tree.leaves((params, init(params)))
        pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
        assert len(pointers) == len(leaves)


@_transformed("`jax_enable_x64`")
@for_all
def test_double_precision(name: str, x64: None) -> None:
    optimizer = ALL[name](**SMALL)
    params = jnp.asarray(START, jnp.float64)
    state = optimizer.init(params)
    params, state = run(jax.jit(optimizer.update), params, state, NOISE[:8])
    types = {x.dtype for x in jax.tree.leaves((params, state))}
    assert types - COUNTS == {jnp.dtype(jnp.float64)}
    assert_as_in_a_loop((params, state), name, 8)


@_transformed("`jax_enable_x64`")
@for_all
def test_single_precision_stays_where_double_is_enabled(name: str, x64: None) -> None:
    optimizer = ALL[name](**SMALL)
    params = jnp.asarray(START, jnp.float32)
    types = jax.eval_shape(optimizer.update, params, optimizer.init(params), params)
    assert jnp.float64 not in {x.dtype for x in jax.tree.leaves(types)}
