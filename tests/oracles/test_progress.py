"""What progress is, against closed forms and against NumPy.

For an expectation, the coordinates of a leaf stand for the runs. Their noise is the
columns of a Hadamard matrix, which are orthogonal. So a sum over coordinates is exactly
the expectation for white noise, and no estimate.
"""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from progress_in_numpy import dissipation, expected_progress, horizons, weights
from states import part_of

import sasa_optax

pytestmark = pytest.mark.optimized

_WHITE = scipy.linalg.hadamard(512).astype(np.float64)


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
        progress = part_of(state, sasa_optax.ProgressState).progress
        return (optax.apply_updates(params, updates), state), progress

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
    """The horizon is 32 up to step 256. Progress goes from k/D to 63/D."""
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
    by_leaf = [expected_progress(x, momentum, age) for x in moves.values()]
    np.testing.assert_allclose(progress, np.mean(by_leaf, axis=0), rtol=1e-8)
    left = weights(60, age)[-1]
    for walk, x in zip(state.walks, moves.values(), strict=True):
        lengths = np.sum(x.reshape(60, -1) ** 2, axis=1)
        expected = dissipation(momentum) * np.sum(left**2 * lengths)
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
    # Another program may round differently.
    np.testing.assert_allclose(_measured(moves | frozen)[0], alone, rtol=1e-14)
    late = np.where(np.arange(60) < 20, 0.0, 1.0)[:, None] * np.ones(5)
    progress = _measured(moves | {"late": late})[0]
    np.testing.assert_allclose(progress[:20], alone[:20], rtol=1e-14)
    expected = (3 * alone + expected_progress(late))[20:] / 4
    np.testing.assert_allclose(progress[20:], expected, rtol=1e-9)
    np.testing.assert_array_equal(_measured(frozen)[0], 1.0)


# Around an optimum. The dynamics are stationary when measuring begins, at step 256. 256
# steps later the horizon is still 32, and the start no longer matters.
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
    """The closed form, for the rate of normalised momentum."""
    above = 1 - momentum / ((1 + momentum) * _HORIZON)
    below = 1 + momentum / ((1 - momentum) * _HORIZON) + (_HORIZON - 1) * rate
    return above / below


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.5, 1.0, 1.9])
def test_around_an_optimum_of_sgd(x64: None, rate: float) -> None:
    """It is tau/(tau + h - 1), for a relaxation time tau = 1/(rate * curvature)."""
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
    """The expectation comes from the covariance of iterate, momentum and x - c."""
    momentum, rate, kept = 0.8, 0.1, 1 - 1 / _HORIZON
    moved = np.array([-rate * (1 - nu * momentum), -rate * nu * momentum, 0])
    transition = np.array([[1, 0, 0], [1 - momentum, momentum, 0], [0, 0, kept]])
    transition = transition + np.outer([1, 0, kept], moved)
    of_noise = np.array([moved[0], 1 - momentum, kept * moved[0]])
    cov = scipy.linalg.solve_discrete_lyapunov(transition, np.outer(of_noise, of_noise))
    update = moved @ cov @ moved + moved[0] ** 2
    factor = dissipation(momentum, nu)
    walk = kept**2 / (1 - kept**2) * factor * update
    as_momentum = (factor - 1) / (factor + 1)
    progress = _around_an_optimum(rate, momentum, nu, as_momentum)
    assert progress == pytest.approx(cov[2, 2] / walk, rel=5e-3)
    assert progress == pytest.approx(1 / (1 + _HORIZON * rate), rel=0.15)


def test_around_an_optimum_of_optax(x64: None) -> None:
    """Optax makes the steps, away from the origin and at another curvature."""
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
    noise = jnp.asarray(_WHITE.T)
    (params, state), _ = jax.lax.scan(
        step, (params, optimizer.init(params)), noise[:256]
    )
    # The momentum continues, and measuring begins.
    fresh = sasa_optax.measure_progress(momentum).init(params)
    measured = part_of(fresh, sasa_optax.ProgressState)
    again = params, optax.tree.set(state, **measured._asdict())
    (_, state), _ = jax.lax.scan(step, again, noise[256:])
    expected = _with_momentum(rate, momentum)
    assert float(part_of(state, sasa_optax.ProgressState).progress) == pytest.approx(
        expected, rel=5e-3
    )


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_a_walk_of_momentum_is_near_one_once_the_horizon_is_long(
    x64: None, momentum: float
) -> None:
    """The steps are correlated, and D times longer. The horizon is 2000 to 2064."""
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
    left = weights(512)[-1]
    by_epoch = left.reshape(-1, epoch)
    pairs = np.sum(by_epoch.sum(1) ** 2 - np.sum(by_epoch**2, axis=1)) / (epoch - 1)
    expected = 1 - pairs / np.sum(left**2)
    assert progress[-1] == pytest.approx(expected, rel=0.1)
    assert expected < 0.75
    if epoch == 8:
        # Progress is as if a third of an epoch were the relaxation time.
        tau = (epoch + 1) / 3
        expected = np.mean(tau / horizons(512)[-64:])
        assert np.mean(progress[-64:]) == pytest.approx(expected, rel=0.1)


# What it does not depend on.


def test_it_does_not_depend_on_units_or_on_the_place(x64: None) -> None:
    moves = _random_moves(3)
    progress, _ = _measured(moves, 0.5)
    for factor in (2.0**-40, 2.0**40):
        scaled = jax.tree.map(lambda x, s=factor: s * x, moves)
        np.testing.assert_array_equal(_measured(scaled, 0.5)[0], progress)
    # Each leaf may have a unit of its own.
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
