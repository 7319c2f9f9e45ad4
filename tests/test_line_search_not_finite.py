"""A line search records nothing that is not finite; a lost loss makes the rate fall."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from line_searches import Salsa, active, for_given_or_not, search_of

import sasa_optax

x64 = pytest.mark.usefixtures("x64")
get = optax.tree.get


@functools.partial(jax.jit, static_argnames="with_value")
def step_off_a_cliff(beyond: jax.Array, with_value: bool) -> Any:
    """A step with a loss that is 1 at ones, and ``beyond`` elsewhere."""
    optimizer, x = sasa_optax.scale_by_ssls(0.1), jnp.ones(2)

    def cliff(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(x == 1), 1.0, beyond)

    extra = {"value": jnp.float32(1.0)} if with_value else {}
    state = optimizer.init(x)
    return optimizer.update(x, state, x, grad=x, value_fn=cliff, **extra)


@pytest.mark.parametrize("debug_nans", [False, True])
@pytest.mark.parametrize("beyond", [np.nan, np.inf, -np.inf])
@for_given_or_not
def test_a_trial_that_is_not_finite_fails(
    beyond: float, with_value: bool, debug_nans: bool
) -> None:
    with jax.debug_nans(debug_nans):
        updates, state = step_off_a_cliff(beyond, with_value)
    found = search_of(state)
    assert float(found.step_size) == pytest.approx(0.05)
    assert float(get(state, "learning_rate")) == pytest.approx(0.095)
    assert int(found.num_evaluations) == (2 if with_value else 3)
    assert int(get(state, "num_nonfinite")) == 0
    chex.assert_tree_all_finite((updates, state))


def assert_untouched(
    before: Any, after: Any, num_evaluations: int, falls: bool = False
) -> None:
    """Nothing has moved but the counters, and the rate if it ``falls``."""
    chex.assert_tree_all_finite(after)
    # The step itself was made, so an average has moved.
    old, new = search_of(before), search_of(after)
    step, num_nonfinite = new.controller.step, new.controller.num_nonfinite
    assert int(step) == int(old.controller.step) + 1
    assert int(num_nonfinite) == int(old.controller.num_nonfinite) + 1
    factor, rate = 0.5 if falls else 1.0, old.controller.learning_rate
    assert rate is not None
    unmoved = old._replace(
        is_lost=np.True_,
        num_evaluations=old.num_evaluations + num_evaluations,
        controller=old.controller._replace(
            step=step,
            num_nonfinite=num_nonfinite,
            scale=old.controller.scale * factor,
            learning_rate=rate * factor,
        ),
    )
    # The slot that is written next may hold anything that is finite.
    chex.assert_trees_all_close(new, unmoved, rtol=1e-6 if falls else 0)


@x64
@pytest.mark.parametrize(
    ("offset", "grad"),
    [(np.nan, 0.01), (np.inf, 0.01), (-np.inf, 0.01), (0.0, np.nan), (0.0, -np.inf)],
)
@for_given_or_not
def test_a_step_that_is_not_finite_is_not_recorded_by_salsa(
    offset: float, grad: float, with_value: bool
) -> None:
    run = Salsa(with_value)
    before = run.run(-np.arange(3.0))[-1]
    after = run.step(offset, grad)
    num_evaluations, falls = 0 if with_value else 1, not np.isfinite(offset)
    assert_untouched(before, after, num_evaluations, falls)


@x64
@pytest.mark.parametrize(("offset", "grad"), [(np.nan, 0.01), (-9.0, np.nan)])
def test_neither_does_one_between_searches(offset: float, grad: float) -> None:
    run = Salsa(interval=5)
    before = run.run(-np.arange(3.0))[-1]
    assert_untouched(before, run.step(offset, grad), 0, falls=np.isnan(offset))


@jax.jit
def two_steps(interval: Any, offset: Any, slope: Any) -> Any:
    """The states after a good step, and after one with this offset and slope."""
    search = sasa_optax.LineSearch(interval=interval)
    optimizer, x = sasa_optax.scale_by_ssls(0.1, search=search), jnp.ones(2)

    def state_after(state: Any, slope: Any, offset: Any) -> Any:
        grads, value = slope * x, jnp.sum(x) + offset
        return optimizer.update(
            grads, state, x, grad=grads, value=value, value_fn=jnp.sum
        )[1]

    before = state_after(optimizer.init(x), 1.0, 0.0)
    return before, state_after(before, slope, offset)


@pytest.mark.parametrize(
    ("offset", "slope"), [(np.nan, 1.0), (-np.inf, 1.0), (0.0, np.nan), (0.0, np.inf)]
)
@pytest.mark.parametrize("interval", [1, 2])
def test_a_step_that_is_not_finite_is_not_recorded_by_ssls(
    offset: float, slope: float, interval: int
) -> None:
    """With an interval of two, the step comes between two searches."""
    before, after = two_steps(interval, offset, slope)
    assert_untouched(before, after, 0, falls=not np.isfinite(offset))


@x64
def test_salsa_still_counts_what_is_not_finite_after_the_search() -> None:
    run = Salsa()
    before = run.run(np.arange(8.0))[-1]
    assert active([before]) == [False]
    for offset, grad in ((0.0, np.nan), (np.nan, np.nan)):
        after = run.step(offset, grad)
        assert_untouched(before, after, num_evaluations=0)
        before = after
