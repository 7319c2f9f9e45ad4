"""The statistics, against their definitions and against closed forms."""

import functools
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


# The statistic that is measured from an average.


def _transition(x: Any, centre: Any, direction: Any, rate: float, weight: float) -> Any:
    x, centre, direction = map(jnp.asarray, (x, centre, direction))
    dtype = x.dtype
    return sasa_optax.Transition(
        params=x,
        new_params=x - rate * direction,
        direction=direction,
        grad=direction,
        learning_rate=jnp.asarray(rate, dtype),
        value=None,
        centre=centre,
        centre_weight=jnp.asarray(weight, dtype),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("rate", "weight"), [(0.3, 0.01), (2.0, 0.5), (1e-4, 1.0)])
def test_centred_statistic_is_the_change_of_the_squared_distance(
    rate: float, weight: float
) -> None:
    x, c, d = np.random.default_rng(0).normal(size=(3, 7))
    new_x = x - rate * d
    new_c = c + weight * (new_x - c)
    statistic = sasa_optax.centred_statistic(momentum=0.0)
    sample = statistic(_transition(x, c, d, rate, weight))
    change = np.sum((new_x - new_c) ** 2) - np.sum((x - c) ** 2)
    assert float(sample.value) == pytest.approx(-change / (2 * rate))
    lag = (1 - (1 - weight) ** 2) / (2 * rate) * np.sum((new_x - c) ** 2)
    noise = rate / 2 * np.sum(d**2)
    assert float(sample.scale) == pytest.approx(noise - 3 * lag)


@pytest.mark.usefixtures("x64")
def test_centred_statistic_measures_from_what_the_state_averages() -> None:
    """A whole run of the optimizer, with c written out as the newest half."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), _PARAMS)
    optimizer = sasa_optax.sasa_plus(0.1, statistic="centred")
    trajectory, state = _run(optimizer, params, 80)
    xs = np.array([np.concatenate([x["w"].ravel(), x["b"]]) for x in trajectory])
    centre, distances = xs[0], [0.0]
    for k, x in enumerate(xs[1:], start=1):
        centre = centre + (x - centre) / max(32, k / 2)
        distances.append(np.sum((x - centre) ** 2))
    expected = -np.diff(distances) / (2 * 0.1)
    np.testing.assert_allclose(_recorded(state, 80), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("momentum", "nu"), [(0.9, 1.0), (0.9, 0.7), (0.5, 0.5)])
def test_its_noise_is_that_of_the_gradient(momentum: float, nu: float) -> None:
    """Whatever the momentum: the direction's answer to a unit impulse, squared."""
    gradients = np.append(1.0, np.zeros(999))
    h, answer = 0.0, []
    for g in gradients:
        h = (1 - momentum) * g + momentum * h
        answer.append((1 - nu) * g + nu * h)
    direction = np.array([np.sqrt(np.sum(np.square(answer)))], np.float32)
    zero = np.zeros(1, np.float32)
    transition = _transition(-direction, zero, -direction, 1.0, 0.1)
    sample = sasa_optax.centred_statistic(momentum, nu)(transition)
    assert float(sample.scale) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("shift", [4096.0, -(2.0**16)])
def test_centred_statistic_is_exactly_invariant_under_translation(shift: float) -> None:
    """In numbers that are exact, and so is all that is made of them here."""
    x, c, d = np.random.default_rng(0).integers(-8, 8, (3, 9)).astype(np.float32) / 8
    statistic = sasa_optax.centred_statistic()
    here = statistic(_transition(x, c, d, 0.5, 0.25))
    there = statistic(_transition(x + shift, c + shift, d, 0.5, 0.25))
    chex.assert_trees_all_equal(here, there)
    moved = sasa_optax.master_statistic(_transition(x + shift, c, d, 0.5, 0.25))
    assert abs(float(moved.value) - float(here.value)) > 100


@functools.cache
def _far(distance: float) -> Any:
    """The window after 20,000 steps on a quadratic, from its optimum."""
    optimizer = sasa_optax.sasa_plus(0.2, 0.5, statistic="centred", min_samples=16383)
    curvature = jnp.array([0.3, 1.0, 2.0])
    noise = jax.random.normal(jax.random.key(1), (20000, 3))

    def step(carry: Any, noise: jax.Array) -> Any:
        x, state = carry
        updates, state = optimizer.update(curvature * (x - distance) + noise, state, x)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.full(3, distance)
    (_, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, noise))(
        (x, optimizer.init(x))
    )
    return np.asarray(state.controller.window.buffer)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("distance", [0.0, 1.0, 1000.0])
def test_centred_statistic_has_mean_zero_wherever_the_optimum_is(
    distance: float,
) -> None:
    values, scales = _far(distance)
    batches = values.reshape(64, -1).mean(axis=1)
    error = batches.std(ddof=1) / 8
    assert abs(batches.mean()) < 5 * error
    assert error < 0.02 * scales.mean()
    np.testing.assert_allclose(values, _far(0.0)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("horizon", [20.0, 500.0])
def test_its_scale_at_stationarity_is_the_closed_form(horizon: float) -> None:
    """Plain SGD in one dimension is AR(1), and so is its distance from an average."""
    rate, curvature, optimum, steps = 0.05, 1.0, 7.0, 400_000
    phi, weight = 1 - rate * curvature, 1 / horizon
    statistic = sasa_optax.centred_statistic(momentum=0.0)

    def step(carry: Any, noise: jax.Array) -> Any:
        x, c = carry
        direction = curvature * (x - optimum) + noise
        sample = statistic(_transition(x, c, direction, rate, weight))
        new_x = x - rate * direction
        return (new_x, c + weight * (new_x - c)), sample

    noise = jax.random.normal(jax.random.key(0), (steps, 1), jnp.float64)
    start = jnp.full(1, optimum, jnp.float64), jnp.full(1, optimum, jnp.float64)
    _, samples = jax.jit(lambda c: jax.lax.scan(step, c, noise))(start)
    variance = rate**2 / (1 - phi**2)
    with_new = weight * phi / (1 - (1 - weight) * phi)
    of_centre = weight / (2 - weight) * (1 + (1 - weight) * phi)
    of_centre /= 1 - (1 - weight) * phi
    distance = variance * (1 - 2 * with_new + of_centre)
    lag = (1 - (1 - weight) ** 2) / (2 * rate) * distance
    expected = rate / 2 * (curvature**2 * variance + 1) - 3 * lag
    assert float(samples.scale.mean()) == pytest.approx(expected, rel=0.03)
    # The lag is about the relaxation time over the horizon, of the noise.
    if horizon == 500:
        assert lag / (rate / 2) == pytest.approx(1 / (rate * curvature * horizon), 0.1)


def _drifting(velocity: Any, **arguments: Any) -> Any:
    """After 12,000 steps of noise and a velocity, a function of the step."""
    optimizer = sasa_optax.sasa_plus(
        0.1, statistic="centred", min_samples=200, **arguments
    )

    def step(carry: Any, row: Any) -> Any:
        x, state = carry
        k, noise = row
        updates, state = optimizer.update(noise - velocity(k) / 0.1, state, x)
        return (optax.apply_updates(x, updates), state), None

    noise = jax.random.normal(jax.random.key(0), (12_000, 20), jnp.float64)
    x = jnp.zeros(20, jnp.float64)
    carry = x, optimizer.init(x)
    rows = jnp.arange(1, 12_001), noise
    (x, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, rows))(carry)
    return x, state.controller


@pytest.mark.usefixtures("x64")
def test_under_a_steady_drift_the_centre_lags_and_nothing_fires() -> None:
    x, state = _drifting(lambda k: 0.03)
    assert int(state.num_drops) == 0
    # By a third of the way: the weights of the newest half grow with the step.
    lag = np.asarray(x - state.centre.averaged)
    np.testing.assert_allclose(lag, 12_000 * 0.03 / 3, rtol=0.1)


@pytest.mark.usefixtures("x64")
def test_a_drift_at_constant_distance_is_seen_by_the_lag_alone() -> None:
    """At a/k steps the centre stays behind by a/2, and the value's mean is zero."""
    fooled = _drifting(lambda k: 20 / k, test="zero_mean")[1]
    assert int(fooled.num_drops) > 0
    x, state = _drifting(lambda k: 20 / k)
    assert int(state.num_drops) == 0
    lag = np.asarray(x - state.centre.averaged)
    assert lag.mean() == pytest.approx(10, rel=0.2)
    assert np.all(np.asarray(state.window.buffer)[1, 1000:12_000] < 0)


def test_the_centre_is_shared_with_an_average_over_the_newest_half() -> None:
    def copies(**arguments: Any) -> int:
        optimizer = sasa_optax.sasa_plus(1.0, statistic="centred", **arguments)
        state = optimizer.init(jnp.zeros(77)).controller
        return sum(x.shape == (77,) for x in jax.tree.leaves(state))

    assert copies() == 1
    assert copies(average=True) == 2
    assert copies(average=True, leak_ratio=2) == 1


def test_a_statistic_of_ones_own_may_ask_for_the_centre() -> None:
    class Distance:
        uses_centre = True

        def __call__(self, t: sasa_optax.Transition) -> sasa_optax.Sample:
            assert t.centre is not None
            return sasa_optax.Sample(t.squared_norm(t.new_params - t.centre))

    optimizer = sasa_optax.sasa_plus(1.0, momentum=0.0, statistic=Distance())
    x = jnp.ones(2)
    _, state = optimizer.update(jnp.ones(2), optimizer.init(x), x)
    assert float(state.controller.window.buffer[0, 0]) == 2.0
