"""Each optimizer in JAX's modes with every option set, by constants and traced."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_option import PAIRS, Numbers, after_a_run, made, numeric_options
from optimizers import ALL, SERVOS, squares

import sasa_optax

for_all = pytest.mark.parametrize("name", ALL)
_transformed = functools.partial(
    pytest.mark.environment, "1. JAX's transformations and modes"
)


def _numbers(name: str) -> Numbers:
    return {option: pair[0] for option, pair in PAIRS[name].items()}


@for_all
def test_every_number_is_here(name: str) -> None:
    # The search of SSLS never ends.
    unused = {"search.loss_test.significance"} if "ssls" in name else set()
    assert set(PAIRS[name]) == numeric_options(name) - unused


# In double precision, as a decision may depend on rounding.
@_transformed("`vmap` over every number of every option")
@_transformed("traced options, which decide as constants do")
@for_all
def test_vmap_over_every_number(name: str, x64: None) -> None:
    """Each member differs from the first in one number, and runs as if alone."""
    constants = _numbers(name)
    numbers = {option: jnp.asarray(x) for option, x in constants.items()}
    members = [numbers]
    for option, (_, other) in PAIRS[name].items():
        members.append(numbers | {option: jnp.asarray(other)})
    run = functools.partial(after_a_run, name)
    compiled = jax.jit(run)
    alone = [compiled(member) for member in members]
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-9)
    close(alone[0], jax.jit(lambda: run(constants))())
    batch, expected = (
        jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in (members, alone)
    )
    close(jax.jit(jax.vmap(run))(batch), expected)
    # Every number makes a difference, or there would be nothing to see.
    for option, one in zip(PAIRS[name], alone[1:], strict=True):
        leaves = zip(*map(jax.tree.leaves, (alone[0], one)), strict=True)
        assert any(jnp.max(jnp.abs(1.0 * x - 1.0 * y)) > 1e-3 for x, y in leaves), (
            option
        )


# The modes that refuse what JAX would otherwise convert by itself.
_MODES = {
    '`jax_numpy_dtype_promotion="strict"`, every option set': functools.partial(
        jax.numpy_dtype_promotion, "strict"
    ),
    '`jax_numpy_rank_promotion="raise"`, every option set': functools.partial(
        jax.numpy_rank_promotion, "raise"
    ),
}


def _trace_a_step(
    name: str, numbers: Numbers, with_value: bool = True, **others: Any
) -> None:
    """Traces a step with numbers that are constants, then weakly typed, then arrays."""
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)}

    def first(numbers: Numbers) -> Any:
        optimizer = made(name, numbers, **others)
        extra: dict[str, Any] = {"grad": params, "value_fn": squares}
        if with_value:
            extra["value"] = jnp.float32(1)
        return optimizer.update(params, optimizer.init(params), params, **extra)

    jax.eval_shape(lambda: first(numbers))
    jax.eval_shape(first, numbers)
    jax.eval_shape(first, {option: jnp.asarray(x) for option, x in numbers.items()})


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=_transformed(mode))
        for name in ALL
        for mode in _MODES
    ],
)
def test_nothing_is_promoted(name: str, mode: str) -> None:
    with _MODES[mode]():
        _trace_a_step(name, _numbers(name))


_STATISTICS = [
    *("master", "centred", sasa_optax.yaida_statistic(0.5, 0.01)),
    sasa_optax.loss_statistic(0.01),
    lambda t: sasa_optax.Sample(t.inner_product(t.new_params, t.direction)),
]
_TESTS = [
    *("zero_mean", "equivalence", "slope", sasa_optax.SlopeTest(log_steps=False)),
    *(
        kind(variance=variance)
        for kind in (sasa_optax.ZeroMeanTest, sasa_optax.EquivalenceTest)
        for variance in ("iid", "batch_means", "overlapping_batch_means")
    ),
]


@pytest.mark.parametrize("mode", _MODES)
def test_no_part_is_promoted(mode: str) -> None:
    """Each statistic and test, by name and as an object, and ways to search."""
    numbers = {k: x for k, x in _numbers("salsa").items() if "." not in k}
    with _MODES[mode]():
        for statistic, test in zip(itertools.cycle(_STATISTICS), _TESTS):
            _trace_a_step("salsa", numbers, statistic=statistic, test=test)
        search = sasa_optax.LineSearch(direction="update", interval=2)
        _trace_a_step("salsa", numbers, with_value=False, search=search)
        _trace_a_step("qhm", {}, learning_rate=lambda step: 0.1)
        _trace_a_step("sasa_plus", {}, learning_rate=lambda step: 0.1)


# The optimizers with these options whose rate follows no continuous rule.
_DIFFERENTIABLE = [name for name in ALL if name not in (*SERVOS, "average_iterates")]
_HYPERPARAMETERS = ("learning_rate", "momentum", "nu", "weight_decay", "factor")


@_transformed("`grad` with respect to the rate, momentum, nu, weight decay and factor")
@pytest.mark.parametrize("name", _DIFFERENTIABLE)
def test_hypergradients(name: str, x64: None) -> None:
    """They are those of finite differences, at which every decision is the same."""
    numbers = _numbers(name)
    hypers = {k: jnp.float64(x) for k, x in numbers.items() if k in _HYPERPARAMETERS}

    @jax.jit
    @jax.value_and_grad
    def final(hypers: Numbers) -> jax.Array:
        params, _ = after_a_run(name, numbers | hypers)
        return jnp.sum((params - 1) ** 2)

    _, grads = final(hypers)
    for option, x in hypers.items():
        ends = [final(hypers | {option: x + sign * 1e-6})[0] for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope != 0, option
        np.testing.assert_allclose(grads[option], slope, rtol=1e-5, err_msg=option)
