"""The statistics, compared with their definitions and with closed forms."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import never_stationary, started, take_step

import sasa_optax
from sasa_optax import _stationarity

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
        parts = [
            jnp.sum(jnp.sin(x) + (x - jax.random.normal(k, x.shape)) ** 2)
            for x, k in zip(leaves, keys, strict=True)
        ]
        return sum(parts, jnp.zeros(()))

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
    ours = sasa_optax.reduce_on_stationarity(test=never_stationary)
    optimizer = optax.chain(_OPTIMIZERS[name], ours)
    trajectory, state = _run(optimizer, params, 8)
    # The direction is minus the updates and the rate the scale, which is one.
    expected = -np.diff([_squared_norm(params) for params in trajectory]) / 2
    np.testing.assert_allclose(_recorded(state, 8), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("learning_rate", "nu"), [(1.0, 0.0), (0.1, 0.7), (1e-3, 1.0)])
def test_master_statistic_divides_by_the_rate(learning_rate: float, nu: float) -> None:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), _PARAMS)
    optimizer = sasa_optax.sasa_plus(
        learning_rate, nu=nu, weight_decay=0.01, test=never_stationary
    )
    trajectory, state = _run(optimizer, params, 8)
    changes = np.diff([_squared_norm(params) for params in trajectory])
    np.testing.assert_allclose(
        _recorded(state, 8), -changes / (2 * learning_rate), rtol=1e-8
    )


@pytest.mark.usefixtures("x64")
def test_yaida_statistic_follows_its_definition() -> None:
    beta, alpha, weight_decay = 0.8, 0.05, 0.01
    rng = np.random.default_rng(0)
    optimizer = sasa_optax.sasa(
        alpha, momentum=beta, weight_decay=weight_decay, test=never_stationary
    )
    params = jnp.asarray(rng.normal(size=5))
    state, update = started(optimizer, params)
    momentum = np.zeros(5)
    for k in range(6):
        gradient = rng.normal(size=5)
        x = np.asarray(params)
        decayed = gradient + weight_decay * x
        momentum = (1 - beta) * decayed + beta * momentum
        v = alpha / 2 * (1 + beta) / (1 - beta) * np.sum(momentum**2)
        params, state = take_step(update, jnp.asarray(gradient), state, params)
        recorded = np.asarray(state.controller.window.buffer)[:, k]
        expected = np.array([x @ decayed - v, v])
        np.testing.assert_allclose(recorded, expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sasa", "sasa_plus"])
def test_statistics_have_mean_zero_at_stationarity(name: str) -> None:
    """A long run on a noisy quadratic. The mean may be off by 5 standard errors."""
    make = getattr(sasa_optax, name)
    optimizer = make(0.2, momentum=0.5, test=never_stationary)
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


def _sampled(
    statistic: sasa_optax.Statistic, transition: sasa_optax.Transition, state: Any = ()
) -> Any:
    """What the statistic records of a transition, computed as the controller does."""
    products = transition.inner_products(*statistic.pairs(transition, state))
    return statistic.sample(products, transition, state)[0]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_is_widened_before_it_is_summed(dtype: Any) -> None:
    # The square of 1 + eps needs twice the digits of the type.
    x = jnp.full(2, 1 + jnp.finfo(dtype).eps, dtype)
    transition = sasa_optax.Transition(x, x, x, x, jnp.float32(0.5), None)
    sample = _sampled(sasa_optax.master_statistic(momentum=0.5), transition)
    exact = 2 * float(x[0]) ** 2
    np.testing.assert_allclose(sample.value, 1.25 * exact, rtol=1e-7)
    np.testing.assert_allclose(sample.scale, 3 * 0.25 * exact, rtol=1e-7)
    chex.assert_type([sample.value, sample.scale], jnp.float32)


def test_complex_parameters_count_by_their_real_inner_product() -> None:
    x = jnp.array([1 + 2j, -1j])
    d = jnp.array([0.5 - 1j, 2 + 1j])
    transition = sasa_optax.Transition(x, x, d, d, jnp.float32(0.1), None)
    expected = np.vdot(x, d).real + 0.05 * np.linalg.norm(d) ** 2
    sample = _sampled(sasa_optax.master_statistic(), transition)
    np.testing.assert_allclose(sample.value, expected, rtol=1e-6)
    chex.assert_type(sample.value, jnp.float32)


# The statistic that is measured from an average.


def _transition(x: Any, direction: Any, rate: float) -> sasa_optax.Transition:
    x, direction = map(jnp.asarray, (x, direction))
    return sasa_optax.Transition(
        params=x,
        new_params=x - rate * direction,
        direction=direction,
        grad=direction,
        learning_rate=jnp.asarray(rate, x.dtype),
        value=None,
    )


def _centred_at(centre: Any, weight: float) -> sasa_optax.AverageState:
    """A centre that the next iterate enters with this weight, at most 1/32."""
    # The weight at step k + 1 is 2 / (k + 1).
    return sasa_optax.AverageState(jnp.int32(2 / weight - 1), jnp.asarray(centre))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rate", "weight"), [(0.3, 1 / 50), (2.0, 1 / 32), (1e-4, 1 / 500)]
)
def test_centred_statistic_is_the_change_of_the_squared_distance(
    rate: float, weight: float
) -> None:
    x, c, d = np.random.default_rng(0).normal(size=(3, 7))
    new_x = x - rate * d
    new_c = c + weight * (new_x - c)
    statistic = sasa_optax.centred_statistic(momentum=0.0)
    transition, centre = _transition(x, d, rate), _centred_at(c, weight)
    sample = _sampled(statistic, transition, centre)
    change = np.sum((new_x - new_c) ** 2) - np.sum((x - c) ** 2)
    assert float(sample.value) == pytest.approx(-change / (2 * rate))
    lag = (1 - (1 - weight) ** 2) / (2 * rate) * np.sum((new_x - c) ** 2)
    noise = rate / 2 * np.sum(d**2)
    assert float(sample.scale) == pytest.approx(noise - 3 * lag)
    products = transition.inner_products(*statistic.pairs(transition, centre))
    _, after = statistic.sample(products, transition, centre)
    np.testing.assert_allclose(after.averaged, new_c, rtol=1e-12)
    assert int(after.num_averaged) == int(centre.num_averaged) + 1


@pytest.mark.usefixtures("x64")
def test_centred_statistic_measures_from_what_the_state_averages() -> None:
    """In a whole run, the centre averages over the newest half of the iterates."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), _PARAMS)
    optimizer = sasa_optax.sasa_plus(0.1, statistic="centred", test=never_stationary)
    trajectory, state = _run(optimizer, params, 80)
    xs = np.array([np.concatenate([x["w"].ravel(), x["b"]]) for x in trajectory])
    centre, distances = xs[0], [0.0]
    for k, x in enumerate(xs[1:], start=1):
        centre = centre + (x - centre) / max(32, k / 2)
        distances.append(np.sum((x - centre) ** 2))
    expected = -np.diff(distances) / (2 * 0.1)
    np.testing.assert_allclose(_recorded(state, 80), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "make", [sasa_optax.master_statistic, sasa_optax.centred_statistic]
)
@pytest.mark.parametrize(("momentum", "nu"), [(0.9, 1.0), (0.9, 0.7), (0.5, 0.5)])
def test_the_scale_is_the_noise_of_the_gradient(
    make: Callable[..., sasa_optax.Statistic], momentum: float, nu: float
) -> None:
    """White noise in the gradients reaches the direction through its response."""
    gradients = np.append(1.0, np.zeros(999))
    h, answer = 0.0, []
    for g in gradients:
        h = (1 - momentum) * g + momentum * h
        answer.append((1 - nu) * g + nu * h)
    direction = np.array([np.sqrt(np.sum(np.square(answer)))], np.float32)
    # The step ends at the centre, so nothing lags.
    transition = _transition(direction, direction, 1.0)
    statistic = make(momentum, nu)
    state = statistic.init(jnp.zeros(1))
    sample = _sampled(statistic, transition, state)
    assert float(sample.scale) == pytest.approx(0.5, rel=1e-5)


def test_yaida_statistic_has_the_same_scale_as_the_master_statistic() -> None:
    x, d = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    transition = _transition(x, d, 0.3)
    yaida, master = (
        _sampled(make(momentum=0.8), transition)
        for make in (sasa_optax.yaida_statistic, sasa_optax.master_statistic)
    )
    assert float(yaida.scale) == pytest.approx(9 * 0.15 * np.sum(d**2), rel=1e-6)
    assert float(yaida.scale) == float(master.scale)


@pytest.mark.parametrize(
    ("statistic", "test"),
    [
        (sasa_optax.master_statistic(), sasa_optax.ZeroMeanTest()),
        (sasa_optax.yaida_statistic(), sasa_optax.EquivalenceTest(delta=0.02)),
        (sasa_optax.centred_statistic(), sasa_optax.EquivalenceTest(delta=0.35)),
        (sasa_optax.loss_statistic(), sasa_optax.SlopeTest()),
    ],
)
def test_each_statistic_names_the_test_that_it_is_meant_for(
    statistic: sasa_optax.Statistic, test: sasa_optax.StationarityTest
) -> None:
    assert _stationarity.as_test(statistic.test) == test


@pytest.mark.parametrize("shift", [4096.0, -(2.0**16)])
def test_centred_statistic_is_exactly_invariant_under_translation(shift: float) -> None:
    """All numbers here, and their sums and products, are exact in float32."""
    x, c, d = np.random.default_rng(0).integers(-8, 8, (3, 9)).astype(np.float32) / 8
    statistic = sasa_optax.centred_statistic()
    here = _sampled(statistic, _transition(x, d, 0.5), _centred_at(c, 1 / 64))
    there = _sampled(
        statistic, _transition(x + shift, d, 0.5), _centred_at(c + shift, 1 / 64)
    )
    chex.assert_trees_all_equal(here, there)
    master = sasa_optax.master_statistic()
    moved = _sampled(master, _transition(x + shift, d, 0.5))
    assert abs(float(moved.value) - float(here.value)) > 100


@functools.cache
def _far(distance: float) -> Any:
    """The window after 20,000 steps on a quadratic, with its optimum at a distance."""
    optimizer = sasa_optax.sasa_plus(
        0.2, 0.5, statistic="centred", test=never_stationary
    )
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
@pytest.mark.parametrize("horizon", [32, 500])
def test_its_scale_at_stationarity_is_the_closed_form(horizon: int) -> None:
    """Plain SGD in one dimension is AR(1), and so is its distance from an average."""
    rate, curvature, optimum, steps = 0.05, 1.0, 7.0, 400_000
    phi, weight = 1 - rate * curvature, 1 / horizon
    statistic = sasa_optax.centred_statistic(momentum=0.0)

    def step(carry: Any, noise: jax.Array) -> Any:
        x, c = carry
        direction = curvature * (x - optimum) + noise
        transition = _transition(x, direction, rate)
        sample = _sampled(statistic, transition, _centred_at(c, weight))
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
    # Relative to the noise, the lag is about the relaxation time over the horizon.
    if horizon == 500:
        assert lag / (rate / 2) == pytest.approx(1 / (rate * curvature * horizon), 0.1)


def _drifting(velocity: Any, **arguments: Any) -> Any:
    """The end of 12,000 steps of noise, with a velocity that depends on the step."""
    window = sasa_optax.Window(min_samples=200)
    optimizer = sasa_optax.sasa_plus(
        0.1, statistic="centred", window=window, **arguments
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
    # It lags by a third of the way, as the weights of the newest half grow.
    lag = np.asarray(x - state.statistic.averaged)
    np.testing.assert_allclose(lag, 12_000 * 0.03 / 3, rtol=0.1)


@pytest.mark.usefixtures("x64")
def test_a_drift_at_constant_distance_is_seen_by_the_lag_alone() -> None:
    """With steps of a/k, the centre stays behind by a/2 and the value has mean zero."""
    fooled = _drifting(lambda k: 20 / k, test="zero_mean")[1]
    assert int(fooled.num_drops) > 0
    x, state = _drifting(lambda k: 20 / k)
    assert int(state.num_drops) == 0
    lag = np.asarray(x - state.statistic.averaged)
    assert lag.mean() == pytest.approx(10, rel=0.2)
    assert np.all(np.asarray(state.window.buffer)[1, 1000:12_000] < 0)


def test_the_centre_takes_one_copy_of_the_parameters() -> None:
    def copies(**arguments: Any) -> int:
        optimizer = sasa_optax.scale_by_sasa_plus(1.0, **arguments)
        leaves = jax.tree.leaves(optimizer.init(jnp.zeros(77)))
        return sum(x.shape == (77,) for x in leaves)

    assert copies() == 0
    assert copies(statistic="centred") == 1
    assert copies(average=True) == 1
    assert copies(statistic="centred", average=True) == 2


@pytest.mark.parametrize("make", [sasa_optax.sasa_plus, sasa_optax.scale_by_sasa_plus])
def test_centred_statistic_under_a_rate_that_rises_from_zero(make: Any) -> None:
    warmup = optax.linear_schedule(0.0, 0.1, 10)
    optimizer = make(warmup, statistic="centred", test=never_stationary)
    noise = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    params = jnp.ones(3)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for g in jnp.asarray(noise):
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    assert int(optax.tree.get(state, "num_nonfinite")) == 0
    window = optax.tree.get(state, "window")
    assert int(window.total) == len(noise)
    samples = np.asarray(window.buffer)[:, : len(noise)]
    assert np.all(np.isfinite(samples))
    # Nothing has moved in the first step.
    np.testing.assert_array_equal(samples[:, 0], 0.0)
