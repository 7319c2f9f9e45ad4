"""The rate that follows progress: how far it moves, where it stops, what a brake does.

What the losses allow is in test_loss_gate.py, and what progress is in
oracles/test_progress.py.
"""

import functools
import inspect
import pathlib
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from progress_in_numpy import expected_progress, horizons, mean_stall, past_scales
from states import part_of

import sasa_optax
from sasa_optax import _adapt, _loss_gate

pytestmark = pytest.mark.optimized

_PAGE = pathlib.Path(__file__).parent.parent / "docs" / "progress.md"
_CONSTANTS = {"_adapt": _adapt, "_loss_gate": _loss_gate}


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

    def averages(noise: jax.Array) -> Any:
        start: Any = (params, optimizer.init(params))
        (_, (_, measured, averaged)), _ = jax.lax.scan(step, start, noise)
        return map(sasa_optax.averaged_params, (measured, averaged))

    noise = np.random.default_rng(0).normal(size=400)
    ours, theirs = averages(jnp.asarray(noise, jnp.float32))
    chex.assert_trees_all_equal(ours, theirs)


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


class _Task(NamedTuple):
    """A noisy loss of which gradient descent at a rate sees one sample at each step.

    Its expectation is curvature/2 ||x - optimum||^2 + tilt sum(x) + shift, up to a
    constant. The gradient is that of a sample, with noise of the optimum.
    """

    rate: float
    start: float
    curvature: float = 1.0
    optimum: float = 0.0
    tilt: float = 0.0
    shift: float = 0.0
    noise_of_loss: float = 0.0

    def loss(self, x: jax.Array, noise: jax.Array) -> jax.Array:
        bowl = jnp.sum((x - self.optimum - noise) ** 2) / 2
        return self.curvature * bowl + self.tilt * jnp.sum(x) + self.shift


class _Servo(NamedTuple):
    """Arguments of `adapt_on_progress`, which are traced."""

    target: float = 0.4
    min_scale: float = 0.0
    # None would make another program.
    max_scale: float = 1e30


_DEFAULT = _Servo()
_LINE = _Task(1e-3, 1.0, curvature=0.0, tilt=1.0)
_BLOCK = 500


def _chain(task: _Task, servo: _Servo) -> optax.GradientTransformationExtraArgs:
    adaptive = sasa_optax.adapt_on_progress(0.0, **servo._asdict())
    return optax.chain(optax.sgd(task.rate), adaptive)


# One program serves all tasks and lengths.
@functools.partial(jax.jit, static_argnames="sees_loss")
def _run_block(
    task: _Task, servo: _Servo, carry: Any, keys: Any, sees_loss: bool
) -> Any:
    optimizer = _chain(task, servo)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        noise = jax.random.normal(key, params.shape, params.dtype)
        value, grads = jax.value_and_grad(task.loss)(params, noise)
        value += task.noise_of_loss * jax.random.normal(key, (), params.dtype)
        given = {"value": value} if sees_loss else {}
        updates, state = optimizer.update(grads, state, params, **given)
        adaptive = part_of(state, sasa_optax.AdaptOnProgressState)
        seen = {
            "scale": adaptive.scale,
            "progress": adaptive.measured.progress,
            "past_scale": adaptive.past_scale,
            "last_rise": adaptive.last_rise,
        }
        return (optax.apply_updates(params, updates), state), seen

    return jax.lax.scan(step, carry, keys)


def _run(
    task: _Task,
    servo: _Servo = _DEFAULT,
    *,
    steps: int = 2000,
    sees_loss: bool = True,
) -> tuple[dict[str, np.ndarray], sasa_optax.AdaptOnProgressState]:
    """What the servo did at each step, and its state at the end."""
    # The type is given: a weak one would make another program of the first block.
    params = jnp.full(50, task.start, float)
    carry: Any = (params, _chain(task, servo).init(params))
    keys = np.asarray(jax.random.split(jax.random.PRNGKey(0), steps))
    blocks = []
    for keys_of_block in np.split(keys, steps // _BLOCK):
        carry, seen = _run_block(task, servo, carry, keys_of_block, sees_loss)
        blocks.append(seen)
    state = part_of(carry, sasa_optax.AdaptOnProgressState)
    return jax.tree.map(lambda *x: np.concatenate(x), *blocks), state


def _changes(scales: np.ndarray) -> np.ndarray:
    """Changes of the scale's logarithm over a horizon, from the second step on."""
    return np.diff(np.log(scales)) * horizons(len(scales))[1:]


def _corrections(last_rises: np.ndarray) -> np.ndarray:
    """The factors by which falls are faster after a rise, from the second step on."""
    count = np.arange(2, len(last_rises) + 1)
    newest = np.maximum(last_rises[:-1], _adapt._SETTLING)
    return 1 + _adapt._CORRECTION * np.minimum(1, newest / count) ** 2


def test_on_a_noisy_quadratic_it_ends_in_a_power_law(x64: None) -> None:
    """The scale goes as k^(-8 rho), and never falls faster than it may."""
    steps = 30_000
    seen, state = _run(_Task(0.01, 3.0), steps=steps)
    scales, changes = seen["scale"], _changes(seen["scale"])
    power = 8 * _adapt._MOST_DOWN
    assert 0 < power < 1
    slope = np.log(scales[-1] / scales[steps // 2 - 1]) / np.log(2)
    assert slope == pytest.approx(-power, rel=0.1)
    fastest = _adapt._MOST_DOWN * _corrections(seen["last_rise"])
    # Until progress has come down to its target, the loss may stall.
    is_walk = (seen["progress"][1:] < 1) & (seen["progress"][1:] > _DEFAULT.target)
    fastest += np.where(is_walk, _adapt._STALLED, 0)
    assert np.all(changes >= -fastest * (1 + 1e-6))
    np.testing.assert_allclose(changes[-1000:], -fastest[-1000:], rtol=1e-6)
    assert int(state.num_overshoots) == int(state.num_brakes) == 0
    assert not np.any((seen["progress"] > _DEFAULT.target) & (np.arange(steps) > 1000))
    # The average comes about as near as a mean of independent samples would.
    distance = np.mean(np.asarray(state.measured.average.averaged) ** 2)
    assert distance < 3 * 17 / (2 * steps)


def test_where_the_loss_has_stalled_it_does_not_freeze(x64: None) -> None:
    """From a rate just above its target the scale falls more slowly than 1/k."""
    steps = 30_000
    seen, state = _run(_Task(0.1, 3.0), steps=steps)
    slope = np.log(seen["scale"][-1] / seen["scale"][steps // 2 - 1]) / np.log(2)
    assert -1 < slope < -0.5
    # The mean of all samples has 1 / steps. With the average's weights, 8 (j / k)^7 for
    # sample j, it is 64 / 15 times as much, and more as the samples are correlated.
    distance = np.mean(np.asarray(state.measured.average.averaged) ** 2)
    assert distance < 2 * 64 / 15 / steps / 2


@pytest.mark.parametrize("target", [0.2, 0.6])
def test_it_rises_above_the_target_and_falls_below_it(x64: None, target: float) -> None:
    """A run comes from far away into a basin, and the scale follows the formula."""
    seen, state = _run(_Task(1e-3, 30.0), _Servo(target), steps=3000)
    assert int(state.num_overshoots) == int(state.num_brakes) == 0
    # The scale of each step is the one that the step before has left.
    scales = np.append(1, seen["scale"])[:-1]
    past = past_scales(scales)
    np.testing.assert_allclose(seen["past_scale"], past)
    progress, changes = (seen["progress"] * past / scales)[1:], _changes(seen["scale"])
    count = np.arange(2, 3001)
    settling = (_adapt._SETTLING / count) ** 2
    above = progress > target * (1 + settling)
    below = (progress < target) & (count >= _adapt.MIN_STEPS)
    error = np.log(progress / target)
    asked = np.maximum(_adapt._DOWN * error, -_adapt._MOST_DOWN)
    asked = asked * _corrections(seen["last_rise"])
    np.testing.assert_allclose(changes[below], asked[below], atol=1e-9)
    is_rise = changes > 1e-9
    assert np.sum(below) > 300
    assert np.sum(is_rise) > 50
    assert np.all(above[is_rise])
    asked = np.minimum(_adapt._UP * (error - np.log1p(settling)), _adapt._MOST_UP)
    np.testing.assert_allclose(changes[is_rise], asked[is_rise], atol=1e-9)
    np.testing.assert_allclose(changes[~below & ~is_rise], 0, atol=1e-9)


def test_it_rises_by_e_in_a_horizon_at_most(x64: None) -> None:
    seen, _ = _run(_LINE._replace(noise_of_loss=1e-3), steps=500)
    changes = _changes(seen["scale"])
    assert np.max(seen["progress"]) > 50
    assert np.max(changes) == pytest.approx(_adapt._MOST_UP)


@jax.jit
def _walk(momentum: jax.Array, losses: jax.Array) -> Any:
    """The scale and progress on a free walk, with the loss of each of its steps."""
    optimizer = sasa_optax.adapt_on_progress(momentum)
    params = jnp.zeros(1000)

    def step(state: Any, pair: Any) -> Any:
        key, loss = pair
        updates = jax.random.rademacher(key, params.shape, params.dtype)
        # The walk is free, so where it stands does not matter.
        updates /= state.scale
        updates, state = optimizer.update(updates, state, params, value=loss)
        centred = state.measured.average.averaged - updates
        average = state.measured.average._replace(averaged=centred)
        state = state._replace(measured=state.measured._replace(average=average))
        return state, (state.scale, state.measured.progress)

    keys = jax.random.split(jax.random.key(0), len(losses))
    return jax.lax.scan(step, optimizer.init(params), (keys, losses))[1]


# A dissipation above that of the walk lowers progress, one below raises it.
@pytest.mark.parametrize(
    ("momentum", "falls"), [(0.2, True), (-0.2, False)], ids=["between", "above one"]
)
def test_it_falls_where_a_walk_gains_nothing(
    x64: None, momentum: float, falls: bool
) -> None:
    losses = 3 * np.exp(-np.arange(8000) / 300)
    losses += 0.1 * np.random.default_rng(0).normal(size=8000)
    scales, progress = _walk(jnp.asarray(momentum), jnp.asarray(losses))
    end = slice(-2000, None)
    changes = _changes(np.asarray(scales))[end]
    inner = (progress[end] > 0.4) & (progress[end] < 1)
    assert np.all(inner) if falls else not np.any(inner)
    is_fall = changes < -1e-9
    assert np.all(changes >= -_adapt._STALLED - 1e-9)
    assert np.all(is_fall | np.isclose(changes, 0, atol=1e-9))
    if not falls:
        assert not np.any(is_fall)
        return
    # On a plateau the fast average is above the slow one in half of the steps, and the
    # scale falls as k^-0.88 on average.
    expected = _adapt._STALLED * mean_stall()
    assert 8 * expected == pytest.approx(0.88, abs=0.01)
    assert 0.3 < np.mean(is_fall) < 0.7
    assert -np.mean(changes) == pytest.approx(expected, rel=0.5)


def test_it_never_rises_without_the_loss(x64: None) -> None:
    seen, state = _run(_LINE, steps=500, sees_loss=False)
    assert np.min(seen["progress"][64:]) > 30
    np.testing.assert_array_equal(seen["scale"], 1.0)
    assert not bool(state.sees_loss)
    seen, _ = _run(_Task(0.5, 0.0), steps=500, sees_loss=False)
    assert np.all(np.diff(seen["scale"]) <= 0)
    assert seen["scale"][-1] < 0.9


def test_it_holds_to_its_bounds(x64: None) -> None:
    task = _LINE._replace(noise_of_loss=1e-3)
    seen, _ = _run(task, _Servo(max_scale=3.0), steps=500)
    assert seen["scale"][-1] == np.max(seen["scale"]) == 3.0
    # At the bound the scale no longer rises.
    assert seen["last_rise"][-1] == 1 + np.argmax(seen["scale"] == 3.0) < 300
    seen, _ = _run(_Task(0.5, 0.0), _Servo(min_scale=0.7), steps=2000)
    assert seen["scale"][-1] == np.min(seen["scale"]) == 0.7
    # A scale that starts outside the bounds is moved to them.
    bounds: list[tuple[dict[str, Any], float]]
    bounds = [({"min_scale": 2.0}, 2.0), ({"max_scale": 0.5}, 0.5)]
    for arguments, expected in bounds:
        optimizer = sasa_optax.adapt_on_progress(**arguments)
        state = optimizer.init(jnp.ones(2))
        assert float(optax.tree.get(state, "scale")) == expected
        updates, _ = jax.jit(optimizer.update)(jnp.ones(2), state, jnp.ones(2))
        np.testing.assert_allclose(updates, expected)


def test_a_scaled_loss_gives_the_same_run(x64: None) -> None:
    """The rate of SGD is divided by the factor. The loss is shifted and moved, too."""

    def scales(factor: float, shift: float, optimum: float) -> np.ndarray:
        start = optimum + 30
        task = _Task(1e-3 / factor, start, 2 * factor, optimum, shift=shift)
        return _run(task)[0]["scale"]

    expected = scales(1.0, 0.0, 0.0)
    assert np.max(expected) > 2 * expected[-1]
    assert np.max(expected) > 5
    actual = scales(7.0, -300.0, 5.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@jax.jit
def _one_step(
    momentum: Any, params: jax.Array, state: Any, update: jax.Array, loss: jax.Array
) -> Any:
    optimizer = sasa_optax.adapt_on_progress(momentum)
    updates, state = optimizer.update(update, state, params, value=loss)
    return optax.apply_updates(params, updates), state


def _stepped(
    params: jax.Array, state: Any, losses: Any, seed: int, momentum: float = 0.0
) -> list[Any]:
    """The parameters and the state after each step of noise."""
    rng = np.random.default_rng(seed)
    seen = []
    for loss in losses:
        update = jnp.asarray(rng.normal(size=params.shape), params.dtype)
        loss = jnp.asarray(loss, jnp.float32)
        params, state = _one_step(momentum, params, state, update, loss)
        seen.append((params, state))
    return seen


@pytest.mark.parametrize("kind", ["losses", "nan"])
def test_a_brake_goes_back_to_the_average_and_begins_the_walk_anew(kind: str) -> None:
    """It is exact in single precision: no coordinate changes by a factor of two."""
    optimizer = sasa_optax.adapt_on_progress(0.0)
    params = jnp.full(20, 100.0, float)
    rng = np.random.default_rng(0)
    falling = np.linspace(10, 0, 100) + 0.1 * rng.normal(size=100)
    bad = np.full(40, 20.0 if kind == "losses" else np.nan)
    seen = _stepped(params, optimizer.init(params), falling, 0)
    seen = seen[-1:] + _stepped(*seen[-1], bad, 1)
    first = next(k for k, (_, state) in enumerate(seen) if int(state.num_brakes))
    before, (params, state) = seen[first - 1 : first + 1]
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
        assert not np.array_equal(before[0], before[1].measured.average.averaged)
    # From there on progress is that of a new walk, with the horizon of the old one.
    after = _stepped(params, state, np.ones(30), 2)
    moves = np.diff([params, *(x for x, _ in after)], axis=0)
    age = int(state.measured.average.num_averaged)
    expected = expected_progress(moves.astype(np.float64), 0.0, age)
    actual = [float(state.measured.progress) for _, state in after]
    np.testing.assert_allclose(actual, expected, rtol=1e-3)
    assert actual[0] == pytest.approx(1, rel=1e-4)
    assert int(after[-1][1].measured.num_walked) == 30


def test_it_does_not_fall_before_the_walk_is_long() -> None:
    """At the start, and after a return. Here a loss that is not finite causes one."""
    # These updates have no momentum, so progress is far below 1.
    optimizer = sasa_optax.adapt_on_progress(0.9)
    params, bad = jnp.full(20, 100.0, float), _adapt.MIN_STEPS + 50
    losses = np.ones(2 * bad)
    losses[bad - 1] = np.nan
    seen = _stepped(params, optimizer.init(params), losses, 0, momentum=0.9)
    scales = np.array([1.0] + [float(state.scale) for _, state in seen])
    falls = 1 + np.flatnonzero(np.diff(scales) < 0)
    first, again = np.arange(_adapt.MIN_STEPS, bad), bad + _adapt.MIN_STEPS
    expected = np.append(first, np.arange(again, len(losses) + 1))
    np.testing.assert_array_equal(falls, expected)


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
    # Only the ceiling, which is infinite, is left out.
    finite = optax.tree.set(state, ceiling=jnp.zeros(()))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(finite))


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
