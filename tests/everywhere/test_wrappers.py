"""Each optimizer decides and moves the same inside optax's wrappers."""

import functools
from collections.abc import Callable
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


def _filled_in(params: Any) -> Callable[[Any], jax.Array]:
    """The loss of all parameters, as a function of what a mask leaves of them."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def loss(masked: Any) -> jax.Array:
        whole = jax.tree.map(
            lambda mine, x: x if is_masked(mine) else mine,
            *(masked, params),
            is_leaf=is_masked,
        )
        return squares(whole["a"]) + squares(whole["b"])

    return loss


def _run_of_a_part(
    name: str, optimizer: optax.GradientTransformationExtraArgs, hidden: jax.Array
) -> tuple[Any, Any]:
    """The parameters and the state after a run that hides ``b``, with this gradient."""
    params = {"a": jnp.asarray(START), "b": jnp.zeros(3)}
    state: Any = optimizer.init(params)

    @jax.jit
    def step(noise: jax.Array, params: Any, state: Any) -> Any:
        grads = {"a": grads_at(noise, params["a"]), "b": hidden}
        extra: dict[str, Any] = {"loss_fn": _filled_in(params)}
        if name in ("scale_by_ssls", "scale_by_salsa"):
            extra["grad"] = grads
        return take_step(optimizer.update, grads, state, params, **extra)

    for noise in NOISE:
        params, state = step(noise, params, state)
    return params, state


@_wrapped("`masked`")
@for_all
def test_masked(name: str) -> None:
    mask = {"a": True, "b": False}
    params, state = _run_of_a_part(
        name, optax.masked(small(name)[0], mask), jnp.zeros(3)
    )
    assert_as_in_a_loop((params["a"], state.inner_state), name)


@_wrapped("`partition`, each group deciding alone")
@for_all
def test_partition(name: str) -> None:
    groups: dict[Any, Any] = {"ours": small(name)[0], "frozen": optax.set_to_zero()}
    optimizer = optax.partition(groups, {"a": "ours", "b": "frozen"})
    params, state = _run_of_a_part(name, optimizer, jnp.ones(3))
    inner = state.inner_states["ours"].inner_state
    assert_as_in_a_loop((params["a"], inner), name)
    np.testing.assert_array_equal(params["b"], 0.0)


@pytest.mark.parametrize("make", [sasa_optax.ssls, sasa_optax.salsa])
def test_a_loss_that_fails_on_masked_parameters(make: Any) -> None:
    optimizer = optax.masked(make(), {"a": True, "b": False})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}

    def loss(params: Any) -> jax.Array:
        return jnp.sum(params["a"] * params["b"])

    with pytest.raises(ValueError, match="value_fn has failed on masked") as error:
        optimizer.update(params, optimizer.init(params), params, value_fn=loss)
    assert isinstance(error.value.__cause__, TypeError)
    with pytest.raises(KeyError, match="c"):
        make().update(
            params, make().init(params), params, value_fn=lambda params: params["c"]
        )


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


# Their updates need the loss. The optimizers here make one from the parameters, which
# hides that lookahead passes none on.
_NEED_THE_LOSS = (
    *("slope", "salsa", "scale_by_salsa", "ssls", "scale_by_ssls"),
    "adapt_on_progress",
)


@_wrapped("`lookahead`, around it")
@pytest.mark.parametrize("name", [name for name in ALL if name not in _NEED_THE_LOSS])
def test_lookahead(name: str) -> None:
    """With slow parameters that take each step in full, nothing changes."""
    optimizer = optax.lookahead(small(name)[0], sync_period=4, slow_step_size=1.0)
    params = optax.LookaheadParams.init_synced(jnp.asarray(START))
    state, update = started(optimizer, params)
    for noise in NOISE:
        params, state = take_step(update, grads_at(noise, params.fast), state, params)
    assert_as_in_a_loop((params.slow, state.fast_state), name)


@pytest.mark.parametrize("name", _NEED_THE_LOSS)
def test_lookahead_hides_the_loss(name: str) -> None:
    """Without it, `adapt_on_progress` never raises the rate, and others say so."""
    inner = getattr(sasa_optax, name)(0.1)
    lookahead = optax.lookahead(inner, sync_period=4, slow_step_size=1.0)
    optimizer = optax.with_extra_args_support(lookahead)
    params: Any = optax.LookaheadParams.init_synced(jnp.asarray(START))
    state: Any = optimizer.init(params)
    extra = {"value": jnp.float32(1), "grad": params.fast, "value_fn": squares}
    if name == "adapt_on_progress":
        _, state = optimizer.update(params.fast, state, params, **extra)
        assert not bool(optax.tree.get(state, "sees_loss"))
    else:
        with pytest.raises(ValueError, match=r"needed as the extra|needs `value_fn`"):
            optimizer.update(params.fast, state, params, **extra)


_PASSES_ON: dict[str, Callable[[Any], Any]] = {
    "chain": lambda inner: optax.chain(optax.sgd(0.1), inner),
    "named_chain": lambda inner: optax.named_chain(("it", inner)),
    "MultiSteps": lambda inner: optax.MultiSteps(inner, every_k_schedule=1),
    "masked": lambda inner: optax.masked(inner, {"a": True}),
    "partition": lambda inner: optax.partition({"ours": inner}, {"a": "ours"}),
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 5),
    "inject_hyperparams": lambda inner: optax.inject_hyperparams(lambda x: inner)(1.0),
}


@pytest.mark.parametrize("wrapper", _PASSES_ON)
def test_the_other_wrappers_pass_the_loss_on(wrapper: str) -> None:
    """So it does not matter here that the optimizers make their own."""
    seen: dict[str, Any] = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra)
        return updates, state

    probe = optax.GradientTransformationExtraArgs(lambda params: (), update)
    params = {"a": jnp.ones(2)}
    optimizer = _PASSES_ON[wrapper](probe)
    state = optimizer.init(params)
    extra = {"value": jnp.float32(3), "value_fn": squares}
    jax.eval_shape(lambda: optimizer.update(params, state, params, **extra))
    assert {"value", "value_fn"} <= set(seen)


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
