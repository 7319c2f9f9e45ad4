"""What the losses allow: the averages against NumPy, the verdicts on known losses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from progress_in_numpy import horizons, mean_stall

import sasa_optax
from sasa_optax import _adapt, _loss_gate


def _scanned(scan: Callable[..., Any], *columns: np.ndarray) -> Any:
    """What a scan gives for each row. Padding to a few lengths saves compilations."""
    num_rows = len(columns[0])
    length = 1024
    while length < num_rows:
        length *= 4
    padded = [np.pad(x, (0, length - num_rows), mode="edge") for x in columns]
    return jax.tree.map(lambda x: np.asarray(x)[:num_rows], scan(*padded))


@jax.jit
def _watch(losses: jax.Array) -> Any:
    start = _loss_gate.start(losses.dtype)
    steps = jnp.arange(1, len(losses) + 1)
    horizons = jnp.maximum(32, steps / 8).astype(losses.dtype)

    def step(state: Any, pair: Any) -> Any:
        state, verdict = _loss_gate.watch(state, *pair)
        return state, (verdict, state)

    return jax.lax.scan(step, start, (losses, horizons))[1]


def _watched(losses: np.ndarray) -> Any:
    """The verdict on each loss and the state after it, each of shape (steps,)."""
    return _scanned(_watch, losses)


def _verdicts(losses: np.ndarray) -> dict[str, np.ndarray]:
    return _watched(losses)[0]._asdict()


def _noise(steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=steps)


def _levels(*blocks: tuple[int, float], noise: float = 0.1) -> np.ndarray:
    """Noisy losses, with a number of steps at each level."""
    level = np.concatenate([np.full(length, level) for length, level in blocks])
    return level + noise * _noise(len(level))


def _normalized(horizons: np.ndarray) -> np.ndarray:
    """Weights of loss j, after step k, in an average over the horizons; [k, j]."""
    steps = len(horizons)
    of_new = 1 / np.minimum(np.arange(1, steps + 1), horizons)
    weights = np.zeros((steps, steps))
    for k in range(steps):
        weights[k] = weights[k - 1] * (1 - of_new[k])
        weights[k, k] = of_new[k]
    return weights


# The averages.


def test_the_averages_are_weighted_sums(x64: None) -> None:
    steps = 700
    losses = np.linspace(5, 1, steps) ** 2 + _noise(steps)
    _, states = _watched(losses)
    longer = horizons(steps)
    shorter = np.maximum(_loss_gate._MIN_FAST, _loss_gate._FAST_SHARE * longer)
    fast, slow = _normalized(shorter), _normalized(longer)
    np.testing.assert_allclose(np.sum(fast, axis=1), 1)
    np.testing.assert_allclose(states.fast, fast @ losses)
    np.testing.assert_allclose(states.slow, slow @ losses)
    variance = np.sum(fast * (losses - (fast @ losses)[:, None]) ** 2, axis=1)
    np.testing.assert_allclose(states.variance, variance, atol=1e-12)
    # The standard deviation of a sum of so many independent losses, once it has left
    # the plain mean behind.
    spread = np.sqrt(np.asarray(states.variance) * np.sum(fast**2, axis=1))
    fewest = _loss_gate._MIN_FAST
    assert float(states.first[-1]) == pytest.approx(np.mean(losses[:fewest]))
    bounds = np.asarray(states.fast) + _loss_gate._NUM_DEVIATIONS * spread
    best = np.minimum.accumulate(bounds[300:])
    best = np.minimum(states.best[299], best)
    np.testing.assert_allclose(states.best[300:], best, rtol=1e-6)
    assert len(np.unique(best)) > 100


def test_the_first_losses_are_a_plain_mean(x64: None) -> None:
    losses = _noise(_loss_gate._MIN_FAST)
    _, states = _watched(losses)
    means = np.cumsum(losses) / np.arange(1, len(losses) + 1)
    np.testing.assert_allclose(states.fast, means)
    np.testing.assert_allclose(states.slow, means)
    assert float(states.variance[-1]) == pytest.approx(np.var(losses))


# Whether the rate may rise.


def test_it_may_rise_while_the_loss_falls(x64: None) -> None:
    """It may rise at each step of the fall and for some horizons more, not for ever."""
    falling = np.exp(-np.arange(1500) / 500) + 0.02 * _noise(1500)
    may_rise = _verdicts(falling)["may_rise"]
    # The first loss has no variance.
    assert not may_rise[0]
    assert np.all(may_rise[1:1000])
    flat = np.concatenate([falling, falling[-1] + 0.02 * _noise(6000, seed=1)])
    may_rise = _verdicts(flat)["may_rise"]
    assert np.mean(may_rise[4500:]) < 0.05


def test_it_may_rise_where_nothing_has_been_gained_yet(x64: None) -> None:
    """A plateau at the start: such a run needs more rate, not less."""
    verdicts = _verdicts(7 + _noise(3000))
    assert np.all(verdicts["may_rise"][1:])
    assert not np.any(verdicts["is_above"] | verdicts["is_lost"])


def test_it_has_stalled_where_it_no_longer_falls(x64: None) -> None:
    """A little on a plateau, fully in a rise, not at all before a gain or in a fall."""
    falling = np.exp(-np.arange(1500) / 500) + 0.02 * _noise(1500)
    flat = falling[-1] + 0.02 * _noise(12_000, seed=1)
    stalled = _verdicts(np.concatenate([falling, flat]))["stalled"]
    assert not np.any(stalled[:1000])
    assert 0.3 < np.mean(stalled[6000:] > 0) < 0.7
    assert np.mean(stalled[6000:]) == pytest.approx(mean_stall(), rel=0.5)
    rising = flat[:3000] + np.linspace(0, 0.2, 3000)
    stalled = _verdicts(np.concatenate([falling, rising]))["stalled"]
    assert np.all(stalled[3000:] > 0)
    assert np.all(stalled[-1000:] == 1)
    assert not np.any(_verdicts(7 + _noise(3000))["stalled"])


@pytest.mark.parametrize("loss", [0.0, -3.0, 7.123, 1e-30, 1e15])
def test_a_constant_loss_allows_nothing(dtype: np.dtype, loss: float) -> None:
    verdicts = _verdicts(np.full(500, loss, dtype))
    for name, verdict in verdicts.items():
        assert not np.any(verdict), name


def test_without_a_loss_nothing_is_allowed_and_nothing_is_wrong() -> None:
    assert not any(map(bool, _loss_gate.unseen(jnp.float32)))


def test_a_gain_is_real_beyond_the_noise_of_both_averages(x64: None) -> None:
    """The fast average becomes exact in a long run, the first one does not."""
    steps = 20_000
    watch, (_, states) = jax.jit(_loss_gate.watch), _watched(_noise(steps))
    for deviations, is_real in [(0.8, False), (1.2, True)]:
        gain = deviations * _loss_gate._REAL / _loss_gate._MIN_FAST**0.5
        # The state is changed as if the first average had been so far above the best.
        state = jax.tree.map(lambda x: x[-1], states)
        state = state._replace(
            slow=state.fast, first=state.best + gain * np.sqrt(state.variance)
        )
        _, verdict = watch(state, state.fast, jnp.asarray(steps / 8))
        # The loss stands still, so the rate may rise only before there is a real gain.
        assert bool(verdict.may_rise) == (not is_real)
        assert not bool(verdict.is_above | verdict.is_lost)


# What has been lost.


def test_it_may_not_rise_while_above(x64: None) -> None:
    """Not even while the loss falls back."""
    losses = _levels((40, 10.0), (400, 0.0), noise=0.05)
    back = np.linspace(6, 0, 400) + 0.05 * _noise(400, seed=1)
    verdicts, states = _watched(np.append(losses, back))
    is_above = np.asarray(verdicts.is_above)
    is_falling = states.slow - states.fast > _loss_gate._FALLING * 10
    assert np.sum(is_above & is_falling) > 50
    assert not np.any(is_above & verdicts.may_rise)
    assert np.mean(verdicts.may_rise[is_falling & ~is_above]) > 0.9


@pytest.mark.parametrize("gain", [3.0, 100.0])
def test_noise_alone_is_no_loss(x64: None, gain: float) -> None:
    """A run that falls and then stays where it is, in the noise of a batch."""
    steps = 10_000
    for seed in range(4):
        losses = gain * np.exp(-np.arange(steps) / 200) + _noise(steps, seed)
        verdicts = _verdicts(losses)
        assert not np.any(verdicts["is_lost"])
        if gain > 10:
            assert not np.any(verdicts["is_above"])


def test_noise_alone_is_no_gain_and_no_loss(x64: None) -> None:
    """A long plateau before anything is gained. Over 10,000 losses nothing is lost."""
    for seed in range(8):
        verdicts = _verdicts(_noise(10_000, seed))
        assert not np.any(verdicts["is_lost"])
        assert not np.any(verdicts["is_above"])


@pytest.mark.parametrize("lost", [-0.05, 0.0, 0.05])
@pytest.mark.parametrize("share", ["OVERSHOOT", "BRAKE"])
def test_it_depends_on_the_share_of_the_gain_that_is_lost(
    x64: None, share: str, lost: float
) -> None:
    """Ten were gained; the limits are at a tenth and at half of that."""
    limit = getattr(_loss_gate, share)
    level = 10 * (limit + lost)
    losses = _levels((40, 10.0), (400, 0.0), (400, level), noise=0.01)
    verdicts = _verdicts(losses)
    name = {"OVERSHOOT": "is_above", "BRAKE": "is_lost"}[share]
    found = verdicts[name]
    assert not np.any(found[:440])
    if lost:
        assert found[-1] == (lost > 0)
        assert np.any(found) == (lost > 0)
    # A loss of half is a loss of a tenth as well.
    assert np.all(verdicts["is_above"] | ~verdicts["is_lost"])


def test_a_loss_that_explodes_does_not_hide_in_its_own_noise(x64: None) -> None:
    """As when batch size 1 destroys a network, a few losses are enormous."""
    random = np.random.default_rng(0)
    losses = _levels((40, 10.0), (400, 0.0))
    bursts = 10 * np.exp(3 * random.normal(size=400))
    verdicts = _verdicts(np.concatenate([losses, bursts]))
    assert np.any(verdicts["is_lost"][440:])


def test_a_single_large_loss_is_no_loss_of_the_model(x64: None) -> None:
    losses = _levels((40, 10.0), (400, 0.0))
    for size in (20.0, 1e3, 1e9):
        losses[300] = size
        verdicts = _verdicts(losses)
        assert not np.any(verdicts["is_above"] | verdicts["is_lost"])


def test_where_nothing_was_gained_the_start_is_the_limit(x64: None) -> None:
    """The limit adds deviations of the first average, as seen then, and of the fast."""
    spread = 0.1 * np.resize([1.0, -1.0], 400)
    of_first = 0.1 / _loss_gate._MIN_FAST**0.5
    of_fast = 0.1 / (2 * _loss_gate._MIN_FAST - 1) ** 0.5
    limit = _loss_gate._REAL * of_first + _loss_gate._NUM_DEVIATIONS * of_fast
    for share, is_lost in [(0.9, False), (1.1, True)]:
        losses = np.concatenate([5 + spread[:100], 5 + share * limit + spread])
        verdicts = _verdicts(losses)
        assert verdicts["is_lost"][-1] == is_lost
        assert not np.any(verdicts["is_lost"][:100])
        assert not np.any(verdicts["is_above"])


def test_a_real_gain_stays_real_where_the_loss_explodes(x64: None) -> None:
    """The noise of the explosion is larger than the gain; the model is lost at once."""
    falling = _levels((40, 10.0), (400, 0.0))
    exploding = np.exp(np.linspace(0, 12, 40)) * (1 + 0.5 * _noise(40, seed=1))
    verdicts, states = _watched(np.append(falling, exploding))
    assert bool(np.all(states.has_gained[100:]))
    noise = np.sqrt(states.variance[-1] / _loss_gate._MIN_FAST)
    assert states.first[-1] - states.best[-1] < _loss_gate._REAL * noise
    assert verdicts.is_lost[-1]
    assert not np.any(verdicts.may_rise[-10:])


@pytest.mark.parametrize("factor", [1.0, 2.0**-20, 3.0, 2.0**20])
@pytest.mark.parametrize("shift", [0.0, -12.0, -1000.0, 1000.0])
def test_the_zero_and_the_unit_of_the_loss_do_not_matter(
    x64: None, factor: float, shift: float
) -> None:
    losses = _levels((40, 10.0), (300, 0.0), (100, 2.0), (200, 0.5), (300, 7.0))
    expected = _verdicts(losses)
    # All of them occur.
    for name in ("may_rise", "stalled", "is_above", "is_lost"):
        assert 0 < np.sum(expected[name] > 0) < len(losses)
    actual = _verdicts(factor * (losses + shift))
    for name, verdict in expected.items():
        np.testing.assert_allclose(actual[name], verdict, atol=1e-9, err_msg=name)


# What the servo does about it. Updates along a line make the rate rise. Updates that
# change their sign do not.


@jax.jit
def _run(signs: jax.Array, losses: jax.Array) -> Any:
    optimizer = sasa_optax.adapt_on_progress(0.0)
    params = jnp.zeros(3)

    def step(carry: Any, pair: Any) -> Any:
        params, state = carry
        sign, loss = pair
        updates = jnp.full(3, sign, jnp.float32)
        updates, state = optimizer.update(updates, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    return jax.lax.scan(step, (params, optimizer.init(params)), (signs, losses))[1]


def _steps(losses: np.ndarray, *, rises: bool) -> list[Any]:
    """The parameters and the servo's state after each step."""
    signs = np.ones(len(losses)) if rises else np.resize([1.0, -1.0], len(losses))
    seen = _scanned(_run, signs.astype(np.float32), losses.astype(np.float32))
    return [jax.tree.map(lambda x, k=k: x[k], seen) for k in range(len(losses))]


@pytest.mark.parametrize("rises", [False, True])
def test_an_overshoot_is_cut_only_where_the_rate_has_risen(rises: bool) -> None:
    level = 10 * (_loss_gate.OVERSHOOT + _loss_gate.BRAKE) / 2
    falling = np.linspace(10, 0, 150) + 0.05 * _noise(150)
    losses = np.append(falling, level + 0.05 * _noise(60, seed=1))
    seen = _steps(losses, rises=rises)
    # The losses at this level are above.
    assert np.sum(_verdicts(losses)["is_above"]) > 10
    (_, before), (_, after) = seen[149], seen[-1]
    assert int(after.num_brakes) == 0
    assert int(after.num_overshoots) == rises
    if rises:
        assert float(before.scale) > 2
        # There is one cut, as a cut is no rise. The parameters are not put back.
        cut = next(k for k, (_, state) in enumerate(seen) if state.num_overshoots)
        assert int(seen[cut][1].last_cut) == cut + 1
        expected = float(seen[cut - 1][1].scale) / _adapt._CUT
        assert float(seen[cut][1].scale) == pytest.approx(expected)
        # The loss of now, with its deviations, becomes the best.
        losses = seen[cut][1].losses
        error = (losses.variance / (2 * _loss_gate._MIN_FAST - 1)) ** 0.5
        best = losses.fast + _loss_gate._NUM_DEVIATIONS * error
        assert float(losses.best) == pytest.approx(float(best), rel=1e-5)
        assert float(best) > float(seen[cut - 1][1].losses.best) + 1
        assert not np.array_equal(
            seen[cut][0], seen[cut - 1][1].measured.average.averaged
        )
    else:
        assert int(after.last_cut) == 0
        assert np.isinf(after.ceiling)


def test_within_a_horizon_of_a_cut_there_is_no_other_overshoot() -> None:
    """The loss is good again at once, so that the rate rises, and then bad for long."""
    level = 10 * (_loss_gate.OVERSHOOT + _loss_gate.BRAKE) / 2
    falling = np.linspace(10, 0, 150)
    blocks = [np.full(33, level), np.full(5, -3.0), np.full(60, 2 * level)]
    losses = np.concatenate([falling, *blocks]) + 0.05 * _noise(248)
    is_above = _verdicts(losses)["is_above"]
    states = [state for _, state in _steps(losses, rises=True)]
    cuts = np.unique([int(state.last_cut) for state in states])[1:]
    assert int(states[-1].num_overshoots) == len(cuts) == 2
    assert int(states[cuts[1] - 2].last_rise) > cuts[0]
    assert np.all(is_above[cuts[1] - 6 : cuts[1]])
    assert not np.any(is_above[cuts[0] + 4 : cuts[0] + 10])
    assert cuts[1] == cuts[0] + 32 + 1


def test_after_an_overshoot_the_rate_rises_but_slowly() -> None:
    level = 10 * (_loss_gate.OVERSHOOT + _loss_gate.BRAKE) / 2
    falling = np.linspace(10, 0, 150)
    losses = np.concatenate([falling, np.full(60, level), np.linspace(level, 0, 400)])
    seen = _steps(losses + 0.05 * _noise(len(losses)), rises=True)
    states = [state for _, state in seen]
    assert int(states[-1].num_overshoots) == 1
    cut = int(states[-1].last_cut)
    # Once the scale has reached the ceiling, it rises with it.
    scales = np.array([float(state.scale) for state in states[cut - 1 :]])
    logs = np.cumsum(_adapt._CEILING_RISE / horizons(len(losses))[cut - 1 : -1])
    highest = scales[0] * np.exp(np.append(0, logs))
    assert np.all(scales <= highest * (1 + 1e-4))
    assert scales[-1] > 1.2 * scales[0]


def test_a_loss_that_falls_back_slowly_is_one_overshoot() -> None:
    """It is above for long, and falls: each rise would be cut again at once."""
    level = 10 * (_loss_gate.OVERSHOOT + _loss_gate.BRAKE) / 2
    falling, back = np.linspace(10, 0, 150), np.linspace(level, 0, 400)
    losses = np.concatenate([falling, np.full(300, level), back])
    _, state = _steps(losses + 0.05 * _noise(len(losses)), rises=True)[-1]
    assert int(state.num_overshoots) == 1
    assert float(state.scale) > 1


def test_a_brake_comes_at_half_of_the_gain_whether_or_not_the_rate_rose() -> None:
    for share, num_brakes in [(-0.1, 0), (0.1, 1)]:
        level = 10 * (_loss_gate.BRAKE + share)
        losses = _levels((40, 10.0), (200, 0.0), (60, level), noise=0.05)
        seen = _steps(losses, rises=False)
        assert int(seen[-1][1].num_brakes) == num_brakes
        # The first and the best loss start afresh, so the model is not lost again.
        if num_brakes:
            assert int(seen[-1][1].losses.num_losses) < 60


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("num_bad", [1, 2, 50])
def test_losses_that_are_not_finite_cut_once_from_the_second_on(
    num_bad: int, bad: float
) -> None:
    good = np.linspace(10, 9, 40) + 0.1 * _noise(40)
    losses = np.concatenate([good, np.full(num_bad, bad), good])
    seen = _steps(losses, rises=True)
    params, before = seen[39]
    average = before.measured.average.averaged
    assert not np.array_equal(params, average)
    during = seen[40 : 40 + num_bad]
    for k, (params, state) in enumerate(during, 1):
        np.testing.assert_allclose(params, average, rtol=1e-6)
        assert int(state.num_nonfinite) == k
        assert int(state.num_brakes) == (k > 1)
        assert int(state.losses.num_missed) == k
    expected = float(before.scale) / (_adapt._CUT if num_bad > 1 else 1)
    assert float(during[-1][1].scale) == pytest.approx(expected, rel=1e-5)
    _, after = seen[-1]
    assert int(after.num_brakes) == (num_bad > 1)
    assert int(after.losses.num_missed) == 0
    assert all(np.all(np.isfinite(x)) for x in after.losses)


def test_bad_losses_far_apart_never_cut() -> None:
    losses = np.linspace(10, 9, 120) + 0.1 * _noise(120)
    losses[[30, 32, 34, 60]] = np.nan
    _, state = _steps(losses, rises=True)[-1]
    assert int(state.num_nonfinite) == 4
    assert int(state.num_brakes) == 0
    assert np.isinf(state.ceiling)


def test_a_bad_loss_leaves_no_trace_in_the_averages(x64: None) -> None:
    """Only the step counts: the horizon depends on the steps. Here it is still 32."""
    losses = 5 + _noise(100)
    _, expected = _watched(losses)
    _, states = _watched(np.insert(losses, 50, np.nan))
    for name, one in states._asdict().items():
        np.testing.assert_allclose(one[-1], getattr(expected, name)[-1], err_msg=name)
