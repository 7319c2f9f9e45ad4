"""Statistics that are written outside the package."""

import inspect
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_statistic
import pytest
from optimizers import never_stationary

import sasa_optax
from sasa_optax import _devices

_ROOT = pathlib.Path(__file__).parent.parent


def test_it_takes_at_most_25_lines() -> None:
    parts = (own_statistic.Lagged, own_statistic.lagged_statistic)
    lines = "".join(map(inspect.getsource, parts)).splitlines()
    assert len([line for line in lines if line]) <= 25


def test_it_records_what_its_formula_says() -> None:
    params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}
    actual, expected = own_statistic.recorded(params, 20)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_it_records_the_same_where_leaves_are_computed_in_groups() -> None:
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(_ROOT),
        "XLA_FLAGS": "",
    }
    process = subprocess.run(
        [sys.executable, own_statistic.__file__],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    output = json.loads(process.stdout)
    assert output["num_groups"] == 3
    # These are sums of three million numbers in single precision.
    np.testing.assert_allclose(output["actual"], output["expected"], rtol=1e-3)
    assert len(set(np.round(output["actual"]))) == 4


def test_its_state_may_be_donated_and_keeps_its_types() -> None:
    optimizer = sasa_optax.sasa_plus(
        0.1, statistic=own_statistic.lagged_statistic(), test=never_stationary
    )
    params = jnp.ones(3)
    state: Any = optimizer.init(params)
    types = jax.eval_shape(optimizer.update, params, state, params)[1]
    assert jax.tree.structure(types) == jax.tree.structure(state)
    update: Any = jax.jit(optimizer.update, donate_argnums=1)
    for _ in range(3):
        old: Any = state
        _, state = update(jnp.ones(3), state, params)
        assert all(x.is_deleted() for x in jax.tree.leaves(old.controller.statistic))


def test_a_sample_that_is_not_finite_leaves_no_trace_in_the_state() -> None:
    optimizer = sasa_optax.sasa_plus(
        0.1, statistic=own_statistic.lagged_statistic(), test=never_stationary
    )
    params = jnp.ones(3)
    update = jax.jit(optimizer.update)
    _, state = update(params, optimizer.init(params), params)
    _, after = update(jnp.full(3, jnp.nan), state, params)
    assert int(after.controller.num_nonfinite) == 1
    chex.assert_trees_all_equal(after.controller.statistic, state.controller.statistic)


# What a statistic costs.

_SHAPE = (7, 11)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def _num_reductions(optimizer: optax.GradientTransformation) -> int:
    """How many operations of the update turn a parameter's array into a scalar."""
    params = [jnp.ones(_SHAPE), jnp.ones(_SHAPE)]
    update = optax.with_extra_args_support(optimizer).update
    traced = jax.make_jaxpr(update)(
        params, optimizer.init(params), params, value=jnp.float32(1)
    )
    shapes = [
        ([x.aval.shape for x in equation.invars], equation.outvars[0].aval.shape)
        for equation in _equations(traced.jaxpr)
        if equation.primitive.name.startswith(("reduce", "dot_general"))
    ]
    return sum(_SHAPE in inputs and not output for inputs, output in shapes)


def _of_the_loss(t: sasa_optax.Transition) -> sasa_optax.Sample:
    assert t.value is not None
    return sasa_optax.Sample(t.value)


@pytest.mark.parametrize(
    ("statistic", "num_products"),
    [
        (_of_the_loss, 0),
        (sasa_optax.loss_statistic(), 0),
        (sasa_optax.loss_statistic(weight_decay=0.1), 1),
        ("master", 2),
        ("centred", 3),
        (own_statistic.lagged_statistic(), 2),
    ],
)
def test_the_update_reduces_nothing_else_than_what_is_to_be_multiplied(
    statistic: Any, num_products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a single device, leaves of a size share a sum.
    monkeypatch.setattr(_devices, "num_devices", lambda platform=None: 2)
    assert _num_reductions(sasa_optax.qhm(0.1)) == 0
    optimizer = sasa_optax.sasa_plus(0.1, statistic=statistic)
    # There are two parameters.
    assert _num_reductions(optimizer) == 2 * num_products
