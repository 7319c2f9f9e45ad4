"""Progress and the rate that follows it, against closed forms and against NumPy.

Where an expectation is meant, the coordinates of a leaf stand for the runs. Their noise
is the columns of a Hadamard matrix, which are orthogonal: a sum over coordinates is
then the expectation for white noise, exactly, and not an estimate of it.
"""

import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
import scipy.linalg

import sasa_optax
from sasa_optax import _adapt, _loss_gate

_PAGE = pathlib.Path(__file__).parent.parent / "docs" / "progress.md"
_CONSTANTS = {"_adapt": _adapt, "_loss_gate": _loss_gate}
_WHITE = scipy.linalg.hadamard(512).astype(np.float64)


def _horizons(steps: int, age: int = 0) -> np.ndarray:
    return np.maximum(32, np.arange(age + 1, age + steps + 1) / 8)


def _weights(steps: int, age: int = 0) -> np.ndarray:
    """How much of update j is left in x - c after step k; [k, j]."""
    kept = np.log1p(-1 / _horizons(steps, age))
    total = np.cumsum(kept)
    log_weights = total[:, None] - (total - kept)[None]
    return np.tril(np.exp(np.minimum(log_weights, 0)))


def _dissipation(momentum: float, nu: float = 1.0) -> float:
    """1 / (the variance of a direction made of white gradients of variance 1)."""
    lags = np.arange(10_000)
    impulse = nu * (1 - momentum) * momentum**lags
    impulse[0] += 1 - nu
    return 1 / float(np.sum(impulse**2))


def _expected(moves: np.ndarray, momentum: float = 0.0, age: int = 0) -> np.ndarray:
    """R of one leaf after each step, from sums over all updates; (steps, size)."""
    moves = moves.reshape(len(moves), -1)
    weights = _weights(len(moves), age)
    distances = np.sum((weights @ moves) ** 2, axis=1)
    walks = _dissipation(momentum) * (weights**2 @ np.sum(moves**2, axis=1))
    return distances / np.where(walks > 0, walks, 1)


@jax.jit
def _measured(moves: Any, momentum: Any = 0.0, age: Any = 0, start: Any = 0.0) -> Any:
    """Progress after each step, and the state at the end; leaves are (steps, ...)."""
    optimizer = sasa_optax.measure_progress(momentum)
    params = jax.tree.map(lambda x: jnp.full(x.shape[1:], start, x.dtype), moves)
    age = jnp.asarray(age, jnp.int32)
    state = optax.tree.set(optimizer.init(params), num_averaged=age)

    def step(carry: Any, updates: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(updates, state, params)
        return (optax.apply_updates(params, updates), state), state.progress

    (_, state), progress = jax.lax.scan(step, (params, state), moves)
    return progress, state


def _random_moves(seed: int, steps: int = 60) -> dict[str, np.ndarray]:
    """Three leaves of different shapes, rates and drifts."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (), "b": (3, 2), "c": (7,)}
    return {
        name: rng.uniform(0, 2)
        + rng.lognormal(size=(steps, *(1 for _ in shape)))
        * rng.normal(size=(steps, *shape))
        for name, shape in shapes.items()
    }


# What progress is.


_RATES = st.lists(st.tuples(st.integers(1, 200), st.floats(-3, 3)), min_size=1)


@hypothesis.given(rates=_RATES, age=st.sampled_from([0, 100, 255, 3000, 100_000]))
@hypothesis.settings(max_examples=20)
def test_it_is_one_for_white_noise_at_any_rates(
    x64: None, rates: list[tuple[int, float]], age: int
) -> None:
    blocks = [np.full(length, 10.0**log_rate) for length, log_rate in rates]
    of_step = np.resize(np.concatenate(blocks), len(_WHITE))
    progress, _ = _measured(of_step[:, None] * _WHITE.T, age=age)
    np.testing.assert_allclose(progress, 1, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_on_a_straight_line_it_has_a_closed_form(x64: None, momentum: float) -> None:
    """Then the horizon is 32 up to step 256; k/D to begin with, and 63/D in the end."""
    moves = np.tile([3.0, -4.0], (256, 1))
    progress, _ = _measured(moves, momentum)
    kept = (31 / 32) ** np.arange(1, 257)
    factor = (1 + momentum) / (1 - momentum)
    expected = 63 / factor * (1 - kept) / (1 + kept)
    np.testing.assert_allclose(progress, expected, rtol=1e-9)
    assert progress[0] == pytest.approx(1 / factor)
    assert progress[-1] == pytest.approx(63 / factor, rel=1e-3)
    assert progress[7] == pytest.approx(8 / factor, rel=0.01)


def test_on_a_long_straight_line_it_grows_with_the_horizon(x64: None) -> None:
    """x - c is (k - 8)/9 steps, and B is k/17 squared steps, for a horizon of k/8."""
    progress, state = _measured(np.ones((20_000, 1)))
    assert float(20_000 - state.average.averaged[0]) == pytest.approx(19_992 / 9)
    assert float(state.walks[0]) == pytest.approx(20_000 / 17, rel=2e-3)
    assert progress[-1] == pytest.approx(136 / 81 * 20_000 / 8, rel=2e-3)


@hypothesis.given(
    seed=st.integers(0, 999),
    momentum=st.floats(0, 0.99),
    age=st.sampled_from([0, 200, 10_000]),
)
@hypothesis.settings(max_examples=20)
def test_it_is_the_mean_over_the_leaves_of_sums_in_numpy(
    x64: None, seed: int, momentum: float, age: int
) -> None:
    moves = _random_moves(seed)
    progress, state = _measured(moves, momentum, age)
    by_leaf = [_expected(x, momentum, age) for x in moves.values()]
    np.testing.assert_allclose(progress, np.mean(by_leaf, axis=0), rtol=1e-8)
    weights = _weights(60, age)[-1]
    for walk, x in zip(state.walks, moves.values(), strict=True):
        lengths = np.sum(x.reshape(60, -1) ** 2, axis=1)
        expected = _dissipation(momentum) * np.sum(weights**2 * lengths)
        assert float(walk) == pytest.approx(expected)


def test_a_large_noisy_leaf_hides_no_drift_of_a_small_one(x64: None) -> None:
    steps = 256
    moves = {"kernel": 100 * _WHITE[:steps], "bias": 1e-3 * np.ones((steps, 1))}
    progress, _ = _measured(moves)
    kept = (31 / 32) ** np.arange(1, steps + 1)
    line = 63 * (1 - kept) / (1 + kept)
    np.testing.assert_allclose(progress, (1 + line) / 2, rtol=1e-9)
    together = np.concatenate(list(moves.values()), axis=1)
    assert _measured(together)[0][-1] == pytest.approx(1, abs=1e-6)


def test_leaves_that_have_not_moved_do_not_count(x64: None) -> None:
    moves = _random_moves(0)
    alone = _measured(moves)[0]
    frozen = {"frozen": np.zeros((60, 4)), "counts": np.ones((60, 2), int)}
    np.testing.assert_array_equal(_measured(moves | frozen)[0], alone)
    late = np.where(np.arange(60) < 20, 0.0, 1.0)[:, None] * np.ones(5)
    progress = _measured(moves | {"late": late})[0]
    np.testing.assert_array_equal(progress[:20], alone[:20])
    expected = (3 * alone + _expected(late))[20:] / 4
    np.testing.assert_allclose(progress[20:], expected, rtol=1e-9)
    np.testing.assert_array_equal(_measured(frozen)[0], 1.0)


# Around an optimum. The stationary law is reached before measuring begins, at step 256;
# 256 steps later the horizon is still 32, and the start forgotten.

_HORIZON = 32


def _around_an_optimum(
    rate: float, momentum: float = 0.0, nu: float = 1.0, as_momentum: float = 0.0
) -> float:
    """Progress of QHM, in NumPy, at curvature one and white noise of variance one."""
    x, d, moves = np.zeros(512), np.zeros(512), []
    for noise in _WHITE.T:
        grads = x + noise
        d = momentum * d + (1 - momentum) * grads
        moves.append(-rate * ((1 - nu) * grads + nu * d))
        x = x + moves[-1]
    return float(_measured(np.stack(moves)[256:], as_momentum)[0][-1])


def _with_momentum(rate: float, momentum: float) -> float:
    """The closed form; the rate is that of normalised momentum."""
    above = 1 - momentum / ((1 + momentum) * _HORIZON)
    below = 1 + momentum / ((1 - momentum) * _HORIZON) + (_HORIZON - 1) * rate
    return above / below


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.5, 1.0, 1.9])
def test_around_an_optimum_of_sgd(x64: None, rate: float) -> None:
    """tau/(tau + h - 1), where the relaxation time tau is one over rate*curvature."""
    tau = 1 / rate
    progress = _around_an_optimum(rate)
    assert progress == pytest.approx(tau / (tau + _HORIZON - 1), rel=2e-3)


@pytest.mark.parametrize("rate", [0.03, 0.3, 2.0])
@pytest.mark.parametrize("momentum", [0.5, 0.8])
def test_around_an_optimum_of_momentum(x64: None, momentum: float, rate: float) -> None:
    progress = _around_an_optimum(rate, momentum, as_momentum=momentum)
    assert progress == pytest.approx(_with_momentum(rate, momentum), rel=5e-3)


@pytest.mark.parametrize("nu", [0.0, 0.5, 0.9])
def test_around_an_optimum_of_qhm(x64: None, nu: float) -> None:
    """By the covariances of iterate, momentum and x - c, and with D of both numbers."""
    momentum, rate, kept = 0.8, 0.1, 1 - 1 / _HORIZON
    moved = np.array([-rate * (1 - nu * momentum), -rate * nu * momentum, 0])
    transition = np.array([[1, 0, 0], [1 - momentum, momentum, 0], [0, 0, kept]])
    transition = transition + np.outer([1, 0, kept], moved)
    of_noise = np.array([moved[0], 1 - momentum, kept * moved[0]])
    cov = scipy.linalg.solve_discrete_lyapunov(transition, np.outer(of_noise, of_noise))
    update = moved @ cov @ moved + moved[0] ** 2
    factor = _dissipation(momentum, nu)
    walk = kept**2 / (1 - kept**2) * factor * update
    as_momentum = (factor - 1) / (factor + 1)
    progress = _around_an_optimum(rate, momentum, nu, as_momentum)
    assert progress == pytest.approx(cov[2, 2] / walk, rel=5e-3)
    assert progress == pytest.approx(1 / (1 + _HORIZON * rate), rel=0.15)


def test_around_an_optimum_of_optax(x64: None) -> None:
    """With the optimizer in the loop, away from the origin, at another curvature."""
    curvature, momentum, rate = 2.5, 0.5, 0.1
    optimizer = optax.chain(
        optax.sgd((1 - momentum) * rate / curvature, momentum),
        sasa_optax.measure_progress(momentum),
    )

    def step(carry: Any, noise: jax.Array) -> Any:
        params, state = carry
        grads = curvature * (params - 5) + noise
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.full(512, 5.0)
    start = params, optimizer.init(params)
    (params, state), _ = jax.lax.scan(step, start, _WHITE[:, :256].T)
    again = params, (state[0], optimizer.init(params)[1])
    (_, state), _ = jax.lax.scan(step, again, _WHITE[:, 256:].T)
    expected = _with_momentum(rate, momentum)
    assert float(state[1].progress) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_a_walk_of_momentum_is_near_one_once_the_horizon_is_long(
    x64: None, momentum: float
) -> None:
    """Of steps that are correlated, D times longer: a horizon of 2000 to 2064 steps."""
    directions, d = [], np.zeros(512)
    for row in _WHITE.T:
        d = momentum * d + (1 - momentum) * row
        directions.append(d)
    progress, _ = _measured(np.stack(directions), momentum, age=16_000)
    short, _ = _measured(np.stack(directions)[:8], momentum)
    assert progress[-1] == pytest.approx(1, rel=0.04)
    assert np.all(short < 0.9)


@pytest.mark.parametrize("epoch", [8, 32, 256])
def test_without_replacement_it_is_lower(x64: None, epoch: int) -> None:
    """The noise of an epoch adds up to nothing, so its steps are anti-correlated."""
    rng = np.random.default_rng(0)
    values = np.tile(np.sign(np.arange(epoch) - epoch / 2 + 0.5), (2000, 1))
    epochs = [rng.permuted(values, axis=1).T for _ in range(512 // epoch)]
    progress, _ = _measured(np.concatenate(epochs))
    weights = _weights(512)[-1]
    by_epoch = weights.reshape(-1, epoch)
    pairs = np.sum(by_epoch.sum(1) ** 2 - np.sum(by_epoch**2, axis=1)) / (epoch - 1)
    expected = 1 - pairs / np.sum(weights**2)
    assert progress[-1] == pytest.approx(expected, rel=0.1)
    assert expected < 0.75
    if epoch == 8:
        # As if a third of an epoch were the relaxation time.
        tau = (epoch + 1) / 3
        expected = np.mean(tau / _horizons(512)[-64:])
        assert np.mean(progress[-64:]) == pytest.approx(expected, rel=0.1)


# What it does not depend on.


def test_it_does_not_depend_on_units_or_on_the_place(x64: None) -> None:
    moves = _random_moves(3)
    progress, _ = _measured(moves, 0.5)
    for factor in (2.0**-40, 2.0**40):
        scaled = jax.tree.map(lambda x, s=factor: s * x, moves)
        np.testing.assert_array_equal(_measured(scaled, 0.5)[0], progress)
    # Each leaf in a unit of its own.
    units = {"a": 1e-6, "b": 3.0, "c": 1e5}
    scaled = {name: units[name] * x for name, x in moves.items()}
    np.testing.assert_allclose(_measured(scaled, 0.5)[0], progress, rtol=1e-9)
    elsewhere = _measured(moves, 0.5, start=1000.0)[0]
    np.testing.assert_allclose(elsewhere, progress, rtol=1e-6)


def test_it_does_not_depend_on_the_order_or_on_the_axes(x64: None) -> None:
    moves = _random_moves(4)
    progress, _ = _measured(moves, 0.5)
    rng = np.random.default_rng(0)
    renamed = {"c": moves["a"], "a": moves["b"], "b": moves["c"]}
    turned = dict(moves)
    turned["c"] = moves["c"] @ scipy.linalg.qr(rng.normal(size=(7, 7)))[0]
    turned["b"] = rng.permutation(moves["b"].reshape(60, 6), axis=1).reshape(60, 2, 3)
    for others in (renamed, turned):
        np.testing.assert_allclose(_measured(others, 0.5)[0], progress, rtol=1e-9)


def test_a_scaled_loss_gives_the_same_run(x64: None) -> None:
    """SGD at a rate that is divided by as much. The loss is shifted too, and moved."""

    def scales(factor: float, shift: float, optimum: float) -> np.ndarray:
        def loss(x: jax.Array, noise: jax.Array) -> jax.Array:
            return factor * jnp.sum((x - optimum - noise) ** 2) + shift

        return _run(loss, optax.sgd(1e-3 / factor), optimum + 30)[0]["scale"]

    expected = scales(1.0, 0.0, 0.0)
    assert np.max(expected) > 2 * expected[-1]
    assert np.max(expected) > 5
    actual = scales(7.0, -300.0, 5.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


# The average, and the updates.


@pytest.mark.parametrize("name", ["adapt_on_progress", "measure_progress"])
def test_the_average_is_that_of_average_iterates(name: str) -> None:
    servo = getattr(sasa_optax, name)(0.0)
    optimizer = optax.chain(optax.adam(0.1), servo, sasa_optax.average_iterates())
    params = {"w": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3), "b": jnp.ones(3)}

    def step(carry: Any, noise: jax.Array) -> Any:
        params, state = carry
        grads = jax.tree.map(lambda x: x + noise, params)
        loss = optax.tree.norm(params, squared=True) + noise
        updates, state = optimizer.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    noise = np.random.default_rng(0).normal(size=400).astype(np.float32)
    (_, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), noise)
    chex.assert_trees_all_equal(
        sasa_optax.averaged_params(state[1]), sasa_optax.averaged_params(state[2])
    )


def test_measuring_leaves_the_updates_alone() -> None:
    optimizer = sasa_optax.measure_progress()
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "b": jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(5):
        given = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
        updates, state = jax.jit(optimizer.update)(given, state, params)
        chex.assert_trees_all_equal(updates, given)


# The rate that follows it.


def _run(
    loss: Callable[..., jax.Array],
    inner: optax.GradientTransformation,
    start: float,
    *,
    steps: int = 2000,
    size: int = 50,
    sees_loss: bool = True,
    noise_of_loss: float = 0.0,
    **arguments: Any,
) -> tuple[dict[str, np.ndarray], Any]:
    """What the servo did at each step, and its state at the end."""
    servo = sasa_optax.adapt_on_progress(0.0, **arguments)
    optimizer = optax.chain(inner, servo)
    params = jnp.full(size, start)

    @jax.jit
    def run(params: jax.Array, state: Any, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            noise = jax.random.normal(key, params.shape, params.dtype)
            value, grads = jax.value_and_grad(loss)(params, noise)
            value += noise_of_loss * jax.random.normal(key, (), params.dtype)
            seen = {"value": value} if sees_loss else {}
            updates, state = optimizer.update(grads, state, params, **seen)
            servo = state[1]
            seen = {"scale": servo.scale, "progress": servo.measured.progress}
            seen["last_rise"] = servo.last_rise
            return (optax.apply_updates(params, updates), state), seen

        return jax.lax.scan(step, (params, state), jax.random.split(key, steps))

    (_, state), seen = run(params, optimizer.init(params), jax.random.key(0))
    return {name: np.asarray(x) for name, x in seen.items()}, state[1]


def _quadratic(x: jax.Array, noise: jax.Array) -> jax.Array:
    return jnp.sum((x - noise) ** 2) / 2


def _line(x: jax.Array, noise: jax.Array) -> jax.Array:
    del noise
    return jnp.sum(x)


def _walk(x: jax.Array, noise: jax.Array) -> jax.Array:
    return jnp.sum(x * noise)


def _changes(scales: np.ndarray) -> np.ndarray:
    """Of the logarithm of the scale over a horizon, step by step from the second on."""
    return np.diff(np.log(scales)) * _horizons(len(scales))[1:]


def _corrections(last_rises: np.ndarray) -> np.ndarray:
    """By how much a fall is faster soon after a rise, from the second step on."""
    count = np.arange(2, len(last_rises) + 1)
    newest = np.maximum(last_rises[:-1], _adapt._SETTLING)
    return 1 + _adapt._CORRECTION * np.minimum(1, newest / count) ** 2


def test_on_a_noisy_quadratic_it_ends_in_a_power_law(x64: None) -> None:
    """In k to the -8*rho, and at no step does it fall faster than it may."""
    steps = 30_000
    seen, state = _run(_quadratic, optax.sgd(0.1), 3.0, steps=steps)
    scales, changes = seen["scale"], _changes(seen["scale"])
    power = 8 * _adapt._MOST_DOWN
    assert 0 < power < 1
    slope = np.log(scales[-1] / scales[steps // 2 - 1]) / np.log(2)
    assert slope == pytest.approx(-power, rel=0.1)
    fastest = _adapt._MOST_DOWN * _corrections(seen["last_rise"])
    assert np.all(changes >= -fastest * (1 + 1e-6))
    np.testing.assert_allclose(changes[-1000:], -fastest[-1000:], rtol=1e-6)
    assert int(state.num_overshoots) == int(state.num_brakes) == 0
    # The average comes as near as a mean of independent samples would, within some.
    distance = np.mean(np.asarray(state.measured.average.averaged) ** 2)
    assert distance < 3 * 17 / (2 * steps)


@pytest.mark.parametrize("target", [0.2, 0.6])
def test_it_rises_above_the_target_and_falls_below_it(x64: None, target: float) -> None:
    """From far away into a basin; by the formula, where it is not clipped."""
    seen, state = _run(_quadratic, optax.sgd(1e-3), 30.0, steps=3000, target=target)
    assert int(state.num_overshoots) == int(state.num_brakes) == 0
    progress, changes = seen["progress"][1:], _changes(seen["scale"])
    count = np.arange(2, 3001)
    settling = (_adapt._SETTLING / count) ** 2
    above = progress > target * (1 + settling)
    below = (progress < target) & (count >= _adapt._MIN_STEPS)
    error = np.log(progress / target)
    asked = np.maximum(_adapt._DOWN * error, -_adapt._MOST_DOWN)
    asked = asked * _corrections(seen["last_rise"])
    np.testing.assert_allclose(changes[below], asked[below], atol=1e-9)
    is_rise = changes > 1e-9
    assert np.sum(below) > 300
    assert np.sum(is_rise) > 50
    assert np.all(above[is_rise])
    asked = np.minimum(error - np.log1p(settling), _adapt._MOST_UP)
    np.testing.assert_allclose(changes[is_rise], asked[is_rise], atol=1e-9)
    np.testing.assert_allclose(changes[~below & ~is_rise], 0, atol=1e-9)


def test_it_rises_by_e_in_a_horizon_at_most(x64: None) -> None:
    seen, _ = _run(_line, optax.sgd(1e-3), 1.0, steps=500, noise_of_loss=1e-3)
    changes = _changes(seen["scale"])
    assert np.max(seen["progress"]) > 50
    assert np.max(changes) == pytest.approx(_adapt._MOST_UP)


def test_it_never_rises_without_the_loss(x64: None) -> None:
    seen, state = _run(_line, optax.sgd(1e-3), 1.0, steps=500, sees_loss=False)
    assert np.min(seen["progress"][64:]) > 30
    np.testing.assert_array_equal(seen["scale"], 1.0)
    assert not bool(state.sees_loss)
    seen, _ = _run(_quadratic, optax.sgd(0.5), 0.0, steps=500, sees_loss=False)
    assert np.all(np.diff(seen["scale"]) <= 0)
    assert seen["scale"][-1] < 0.9


def test_it_holds_to_its_bounds(x64: None) -> None:
    arguments = {"noise_of_loss": 1e-3, "max_scale": 3.0, "steps": 500}
    seen, _ = _run(_line, optax.sgd(1e-3), 1.0, **arguments)
    assert seen["scale"][-1] == np.max(seen["scale"]) == 3.0
    # At the bound it rises no more.
    assert seen["last_rise"][-1] == 1 + np.argmax(seen["scale"] == 3.0) < 300
    seen, _ = _run(_quadratic, optax.sgd(0.5), 0.0, steps=2000, min_scale=0.7)
    assert seen["scale"][-1] == np.min(seen["scale"]) == 0.7
    # A start outside of them is moved to them.
    for bounds, expected in [({"min_scale": 2.0}, 2.0), ({"max_scale": 0.5}, 0.5)]:
        optimizer = sasa_optax.adapt_on_progress(**bounds)
        state = optimizer.init(jnp.ones(2))
        assert float(state.scale) == expected
        updates, _ = optimizer.update(jnp.ones(2), state, jnp.ones(2))
        np.testing.assert_allclose(updates, expected)


def _stepped(
    optimizer: Any, params: jax.Array, state: Any, losses: Any, seed: int
) -> Any:
    """The parameters, and the states, after each step of noise."""

    @jax.jit
    def step(params: jax.Array, state: Any, update: jax.Array, loss: Any) -> Any:
        updates, state = optimizer.update(update, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    seen = []
    for loss in losses:
        update = jnp.asarray(rng.normal(size=params.shape), params.dtype)
        params, state = step(params, state, update, jnp.asarray(loss, jnp.float32))
        seen.append((params, state))
    return seen


@pytest.mark.parametrize("kind", ["losses", "nan"])
def test_a_brake_goes_back_to_the_average_and_begins_the_walk_anew(kind: str) -> None:
    """In single precision and exactly, as no coordinate changes by a factor of two."""
    optimizer = sasa_optax.adapt_on_progress(0.0)
    params = jnp.full(20, 100.0)
    rng = np.random.default_rng(0)
    falling = np.linspace(10, 0, 100) + 0.1 * rng.normal(size=100)
    bad = np.full(40, 20.0 if kind == "losses" else np.nan)
    seen = _stepped(optimizer, params, optimizer.init(params), falling, 0)
    before = seen[-1]
    for braked in _stepped(optimizer, *before, bad, 1):
        if int(braked[1].num_brakes) == 1:
            break
        before = braked
    params, state = braked
    assert int(state.num_brakes) == 1
    average = sasa_optax.averaged_params(before[1])
    np.testing.assert_array_equal(params, average)
    np.testing.assert_array_equal(sasa_optax.averaged_params(state), average)
    np.testing.assert_array_equal(state.measured.walks, 0.0)
    assert int(state.measured.num_walked) == 0
    assert float(state.measured.progress) == float(before[1].measured.progress)
    expected = before[1].scale / _adapt._CUT
    assert float(state.scale) == pytest.approx(float(expected), rel=0.01)
    if kind == "losses":
        assert not np.array_equal(before[0], average)
    # From there on progress is that of a new walk, though the horizon is not new.
    after = _stepped(optimizer, params, state, np.ones(30), 2)
    moves = np.diff([params, *(x for x, _ in after)], axis=0)
    age = int(state.measured.average.num_averaged)
    expected = _expected(moves.astype(np.float64), 0.0, age)
    actual = [float(state.measured.progress) for _, state in after]
    np.testing.assert_allclose(actual, expected, rtol=1e-3)
    assert actual[0] == pytest.approx(1, rel=1e-4)
    assert int(after[-1][1].measured.num_walked) == 30


def test_it_does_not_fall_before_the_walk_is_long() -> None:
    """At the start, and after a return, here since a loss is not finite."""
    # Told of a momentum that these updates do not have: progress is far below 1.
    optimizer = sasa_optax.adapt_on_progress(0.9)
    params, bad = jnp.full(20, 100.0), _adapt._MIN_STEPS + 50
    losses = np.ones(2 * bad)
    losses[bad - 1] = np.nan
    seen = _stepped(optimizer, params, optimizer.init(params), losses, 0)
    scales = np.array([1.0] + [float(state.scale) for _, state in seen])
    falls = 1 + np.flatnonzero(np.diff(scales) < 0)
    first, again = np.arange(_adapt._MIN_STEPS, bad), bad + _adapt._MIN_STEPS
    expected = np.append(first, np.arange(again, len(losses) + 1))
    np.testing.assert_array_equal(falls, expected)


# The page.


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the code of docs/progress.md leaves behind."""
    matplotlib.use("agg")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL):
            exec(block, names)
        names["pictures"] = list(pathlib.Path.cwd().glob("*.png"))
    return names


def test_the_code_of_the_page_trains(page: dict[str, Any]) -> None:
    averaged = page["averaged"]
    assert float(page["loss_of"](averaged)) < 0.5 * float(
        page["loss_of"](page["start"])
    )
    assert len(page["pictures"]) == 1


def test_the_page_states_the_constants_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| ([^|]*) \|", _PAGE.read_text(), re.M)
    defaults = inspect.signature(sasa_optax.adapt_on_progress).parameters
    assert len(rows) > 8
    for module, name, number in rows:
        if module == "adapt_on_progress":
            assert float(number) == defaults[name].default, name
        else:
            assert float(number) == getattr(_CONSTANTS[module], name), name


@pytest.mark.parametrize("losses", [[None, None], [np.nan, np.nan]])
def test_without_a_loss_nothing_is_divided_by_zero(losses: list[Any]) -> None:
    optimizer = sasa_optax.adapt_on_progress()
    params = jnp.ones(3)
    state = optimizer.init(params)
    with jax.disable_jit(), jax.debug_nans(losses[0] is None):
        for loss in losses:
            value = None if loss is None else jnp.float32(loss)
            updates, state = optimizer.update(
                jnp.full(3, 0.1), state, params, value=value
            )
            params = optax.apply_updates(params, updates)
    finite = state._replace(ceiling=state.scale)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(finite))
