"""SALSA leaves the place where its loss is not finite, and trains on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from line_searches import never_stationary

import sasa_optax
from sasa_optax import LineSearch, Window

_TARGET, _RADIUS, _LEAP = 3.0, 20.0, 50
_OPTIONS: dict[str, Any] = {
    "test": never_stationary,
    "window": Window(min_samples=400, max_window=401),
}


def _salsa(**kwargs: Any) -> Any:
    return sasa_optax.salsa(**_OPTIONS, **kwargs)


def _after(direction: Any) -> Any:
    search = LineSearch(direction="update", max_learning_rate=1e7)
    return optax.chain(direction, sasa_optax.scale_by_salsa(search=search, **_OPTIONS))


_CHAINS = {
    "salsa": _salsa(),
    "apply_if_finite": _after(optax.apply_if_finite(optax.scale_by_adam(), 10)),
    "scale_by_adam": _after(optax.scale_by_adam()),
}


def _loss(x: jax.Array, noise: jax.Array) -> jax.Array:
    """A parabola inside a ball. Outside, neither it nor its gradient is finite."""
    inside = jnp.sum(x**2) < _RADIUS**2
    return jnp.sum((x - _TARGET + noise) ** 2) * jnp.where(inside, 1, jnp.inf)


@functools.cache
def _run(name: str, with_value: bool = True) -> Any:
    """Parameters, losses, rates and averages; before step 50 the rate is set to 1e6."""
    optimizer = _CHAINS[name] if name in _CHAINS else _salsa(average=False)

    def step(carry: Any, inputs: Any) -> Any:
        params, state = carry
        k, key = inputs
        noise = 0.1 * jax.random.normal(key, params.shape)
        scale = optax.tree.get(state, "scale")
        leap = jnp.where(k == _LEAP, 1e6 / 1e-3, scale)
        state = optax.tree.set(state, scale=leap.astype(scale.dtype))
        value, grads = jax.value_and_grad(_loss)(params, noise)
        extra = {"value": value} if with_value else {}
        updates, state = optimizer.update(
            grads, state, params, grad=grads, value_fn=_loss, noise=noise, **extra
        )
        seen = params, value, optax.tree.get(state, "learning_rate")
        averaged = optax.tree.get(state, "averaged", params)
        return (optax.apply_updates(params, updates), state), (*seen, averaged)

    keys = jax.random.split(jax.random.key(0), 350)
    params = jnp.zeros(4)
    scan = jax.jit(lambda *carry: jax.lax.scan(step, carry, (jnp.arange(350), keys)))
    return jax.tree.map(np.asarray, scan(params, optimizer.init(params))[1])


@pytest.mark.parametrize("with_value", [True, False])
@pytest.mark.parametrize("name", ["salsa", "apply_if_finite"])
def test_a_leap_out_of_the_domain_is_undone(name: str, with_value: bool) -> None:
    params, values, rates, averages = _run(name, with_value)
    lost = ~np.isfinite(values)
    assert lost[_LEAP + 1]
    assert not lost[:_LEAP].any()
    assert not lost[-100:].any()
    assert np.isfinite(params).all()
    # The average never sees the places where the loss is not finite.
    assert np.abs(averages).max() < _RADIUS
    for k in np.flatnonzero(lost):
        assert rates[k] == pytest.approx(rates[k - 1] / 2, rel=1e-5)
        rounding = 1e-6 * np.abs(params[k]).max()
        np.testing.assert_allclose(params[k + 1], averages[k], atol=rounding)
        np.testing.assert_allclose(averages[k], averages[k - 1])
    assert np.abs(params[-100:] - _TARGET).max() < 1.0
    assert np.abs(averages[-1] - _TARGET).max() < 0.2


def test_momentum_that_is_nan_for_good_leaves_the_average_standing() -> None:
    params, values, _, averages = _run("scale_by_adam")
    assert not np.isfinite(values[_LEAP + 1])
    assert np.isfinite(values[_LEAP + 2 :]).all()
    expected = np.broadcast_to(averages[_LEAP], params[_LEAP + 3 :].shape)
    np.testing.assert_allclose(params[_LEAP + 3 :], expected, rtol=1e-4)


def test_without_an_average_the_rate_falls() -> None:
    _, values, rates, _ = _run("salsa without an average")
    assert not np.isfinite(values[_LEAP + 1 :]).any()
    halved = rates[_LEAP] * 0.5 ** np.arange(1, 21)
    np.testing.assert_allclose(rates[_LEAP + 1 : _LEAP + 21], halved, rtol=1e-5)
