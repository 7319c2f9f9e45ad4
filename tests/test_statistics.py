"""The statistics, against their definitions and against closed forms."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sasa_optax

_PARAMS = {"w": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "b": [jnp.array(0.5)]}

_OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-2),
    "rmsprop": optax.rmsprop(1e-2),
    "adagrad": optax.adagrad(1e-1),
    "lamb": optax.lamb(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "muon": optax.contrib.muon(1e-2),
    "prodigy": optax.contrib.prodigy(1.0),
}


def _run(
    optimizer: optax.GradientTransformation, params: Any, num_steps: int
) -> tuple[list[Any], Any]:
    """The parameters before each step and after the last, and the last state."""

    def loss(params: Any, key: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(params)
        keys = jax.random.split(key, len(leaves))
        return sum(
            jnp.sum(jnp.sin(x) + (x - jax.random.normal(k, x.shape)) ** 2)
            for x, k in zip(leaves, keys, strict=True)
        )

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return optax.apply_updates(params, updates), state

    state, trajectory = optimizer.init(params), [params]
    for key in jax.random.split(jax.random.key(0), num_steps):
        params, state = step(params, state, key)
        trajectory.append(params)
    return trajectory, state


def _squared_norm(params: Any) -> float:
    return sum(float(np.sum(np.asarray(x) ** 2)) for x in jax.tree.leaves(params))


def _recorded(state: Any, num_steps: int) -> np.ndarray:
    return np.asarray(optax.tree.get(state, "window").buffer)[0, :num_steps]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_master_statistic_is_the_change_of_the_squared_norm(name: str) -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), _PARAMS)
    optimizer = optax.chain(_OPTIMIZERS[name], sasa_optax.reduce_on_stationarity())
    trajectory, state = _run(optimizer, params, 8)
    # The direction is minus the updates and the rate the scale, which is one.
    expected = -np.diff([_squared_norm(params) for params in trajectory]) / 2
    np.testing.assert_allclose(_recorded(state, 8), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("learning_rate", "nu"), [(1.0, 0.0), (0.1, 0.7), (1e-3, 1.0)])
def test_master_statistic_divides_by_the_rate(learning_rate: float, nu: float) -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), _PARAMS)
    optimizer = sasa_optax.sasa_plus(learning_rate, nu=nu, weight_decay=0.01)
    trajectory, state = _run(optimizer, params, 8)
    changes = np.diff([_squared_norm(params) for params in trajectory])
    np.testing.assert_allclose(
        _recorded(state, 8), -changes / (2 * learning_rate), rtol=1e-8
    )


@pytest.mark.usefixtures("x64")
def test_yaida_statistic_follows_its_definition() -> None:
    beta, alpha, weight_decay = 0.8, 0.05, 0.01
    rng = np.random.default_rng(0)
    optimizer = sasa_optax.sasa(alpha, momentum=beta, weight_decay=weight_decay)
    params = jnp.asarray(rng.normal(size=5))
    state = optimizer.init(params)
    momentum = np.zeros(5)
    for k in range(6):
        gradient = rng.normal(size=5)
        x = np.asarray(params)
        decayed = gradient + weight_decay * x
        momentum = (1 - beta) * decayed + beta * momentum
        v = alpha / 2 * (1 + beta) / (1 - beta) * np.sum(momentum**2)
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        recorded = np.asarray(state.controller.window.buffer)[:, k]
        np.testing.assert_allclose(recorded, [x @ decayed - v, v], rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sasa", "sasa_plus"])
def test_statistics_have_mean_zero_at_stationarity(name: str) -> None:
    """Noisy gradients of a quadratic, long after the start; 5 standard errors."""
    optimizer = getattr(sasa_optax, name)(0.2, momentum=0.5, min_samples=16383)
    curvature = jnp.array([0.3, 1.0, 2.0])

    def step(carry: Any, noise: jax.Array) -> Any:
        x, state = carry
        updates, state = optimizer.update(curvature * (x - 1) + noise, state, x)
        return (optax.apply_updates(x, updates), state), None

    noise = jax.random.normal(jax.random.key(1), (20000, 3))
    x = jnp.ones(3)
    (_, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, noise))(
        (x, optimizer.init(x))
    )
    samples = np.asarray(state.controller.window.buffer)[0]
    batches = samples.reshape(64, -1).mean(axis=1)
    error = batches.std(ddof=1) / np.sqrt(len(batches))
    assert abs(batches.mean()) < 5 * error
    # The Yaida statistic without its v, or with x_{k+1} for x_k, misses by far more.
    assert error < 0.05


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_is_widened_before_it_is_summed(dtype: Any) -> None:
    # The square of 1 + eps needs twice the digits of the type.
    x = jnp.full(2, 1 + jnp.finfo(dtype).eps, dtype)
    transition = sasa_optax.Transition(x, x, x, x, jnp.float32(0.5), None)
    sample = sasa_optax.master_statistic(transition)
    exact = 2 * float(x[0]) ** 2
    np.testing.assert_allclose(sample.value, 1.25 * exact, rtol=1e-7)
    chex.assert_type([sample.value, sample.scale], jnp.float32)


def test_complex_parameters_count_by_their_real_inner_product() -> None:
    x = jnp.array([1 + 2j, -1j])
    d = jnp.array([0.5 - 1j, 2 + 1j])
    transition = sasa_optax.Transition(None, x, d, d, jnp.float32(0.1), None)
    expected = np.vdot(x, d).real + 0.05 * np.linalg.norm(d) ** 2
    sample = sasa_optax.master_statistic(transition)
    np.testing.assert_allclose(sample.value, expected, rtol=1e-6)
    chex.assert_type(sample.value, jnp.float32)
