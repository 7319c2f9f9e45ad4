"""Random arguments, trees and steps, good and bad.

The arguments are traced, so that all examples of a tree share one compilation. What the
window and the rate must be is counted in plain Python.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import SERVOS, squares, without_momentum

import sasa_optax
from sasa_optax import _adapt

_STEPS = 60
_CAPACITY = 12
_TREES: dict[str, Any] = {
    "single": np.ones(3, np.float32),
    "half": {"a": np.ones((2, 2), jnp.bfloat16), "b": np.ones((), np.float16)},
    "mixed": [np.ones(2, np.float32), (), {"c": np.ones(2, np.complex64)}, None],
    "double": (np.ones(2, np.float64), np.ones((0, 2), np.float32)),
}
_FALLING = [
    "sasa",
    "sasa_plus",
    "slope",
    "scale_by_sasa_plus",
    "reduce_on_stationarity",
]
# The tests of those that do not use the zero-mean test.
_TESTS: dict[str, Any] = {
    "sasa": sasa_optax.EquivalenceTest,
    "slope": sasa_optax.SlopeTest,
}
_environment = pytest.mark.environment

arguments = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.1, 0.5, 0.9]),
        "leak_ratio": st.integers(1, 10),
        "min_samples": st.integers(4, 11),
        "test_interval": st.integers(1, 7),
        "warmup_steps": st.integers(0, 30),
        "floor": st.sampled_from([0.0, 1e-3, 0.3, 1.0]),
        "significance": st.sampled_from([0.01, 0.2, 0.9]),
        "scale_min_samples": st.booleans(),
    }
)
# Each step is a good one, or its gradients are filled with this number.
steps = st.lists(
    st.sampled_from([None] * 8 + [np.nan, np.inf, -np.inf, 0.0, 1e30]),
    min_size=_STEPS,
    max_size=_STEPS,
)


def _optimizer(name: str, arguments: dict[str, Any]) -> Any:
    arguments = dict(arguments)
    floor = arguments.pop("floor")
    if name == "ssls":
        return sasa_optax.ssls(1.0, min_learning_rate=floor)
    test = _TESTS.get(name, sasa_optax.ZeroMeanTest)
    options: dict[str, Any] = {
        "factor": arguments.pop("factor"),
        "test": test(significance=arguments.pop("significance")),
        "window": sasa_optax.Window(max_window=_CAPACITY, **arguments),
    }
    if name == "reduce_on_stationarity":
        return sasa_optax.reduce_on_stationarity(min_scale=floor, **options)
    return getattr(sasa_optax, name)(1.0, min_learning_rate=floor, **options)


def _update(optimizer: Any, grads: Any, state: Any, params: Any) -> Any:
    return optimizer.update(
        grads, state, params, value=squares(grads), grad=grads, value_fn=squares
    )


@functools.cache
def _runs(name: str, **static: Any) -> Callable[..., Any]:
    """A function of traced arguments that gives the updates and states of all steps."""

    @jax.jit
    def run(arguments: Any, params: Any, seed: Any, fills: Any, is_bad: Any) -> Any:
        optimizer = _optimizer(name, arguments | static)

        def step(carry: Any, x: Any) -> Any:
            params, state = carry
            key, fill, is_bad = x
            grads = jax.tree.map(
                lambda p: jnp.where(
                    is_bad, fill, jax.random.normal(key, p.shape) + 0.1 * p.real
                ).astype(p.dtype),
                params,
            )
            updates, state = _update(optimizer, grads, state, params)
            # A bad step moves nothing, as under optax.apply_if_finite.
            moved = optax.apply_updates(params, updates)
            params = jax.tree.map(
                lambda new, old: jnp.where(is_bad, old, new), moved, params
            )
            return (params, state), (updates, state)

        keys = jax.random.split(jax.random.key(seed), _STEPS)
        start = params, optimizer.init(params)
        return start[1], jax.lax.scan(step, start, (keys, fills, is_bad))[1]

    return run


def _history(name: str, kind: str, arguments: Any, fills: Any, seed: int) -> Any:
    params = jax.tree.map(jnp.asarray, _TREES[kind])
    is_bad = np.array([fill is not None for fill in fills])
    # It makes another program, and does not depend on the tree.
    if "scale_min_samples" in arguments:
        arguments["scale_min_samples"] &= kind == "single"
    numbers = np.array([fill or 0.0 for fill in fills], np.float32)
    static = {key: x for key, x in arguments.items() if isinstance(x, bool)}
    traced = {key: x for key, x in arguments.items() if key not in static}
    run = _runs(name, **static)
    first, (updates, states) = run(traced, params, seed, numbers, is_bad)
    chex.assert_trees_all_equal_dtypes(updates, jax.tree.map(lambda x: x[None], params))
    chex.assert_trees_all_equal_dtypes(states, first)
    states = without_momentum(states)
    chex.assert_tree_all_finite(states)
    return jax.tree.map(np.asarray, states)


def _cases(names: list[str], title: str) -> Any:
    mark = _environment("8. Fuzzing", title)
    return pytest.mark.parametrize(
        ("name", "kind"),
        [pytest.param(name, kind, marks=mark) for name in names for kind in _TREES],
    )


@_cases(_FALLING, "the rate only falls, to its floor; drops equal the history")
@hypothesis.given(arguments=arguments, fills=steps, seed=st.integers(0, 2**16))
def test_the_rate_falls_by_drops_alone(
    x64: None, name: str, kind: str, arguments: Any, fills: Any, seed: int
) -> None:
    states = _history(name, kind, arguments, fills, seed)
    scales = np.concatenate([[1.0], states.scale])
    assert np.all(np.diff(scales) <= 0)
    assert scales.min() >= (1 - 1e-6) * arguments["floor"]
    num_drops = np.concatenate([[0], states.num_drops])
    np.testing.assert_array_equal(np.diff(num_drops), np.diff(scales) < 0)
    assert np.all(np.flatnonzero(np.diff(num_drops)) + 1 > arguments["warmup_steps"])
    fired = states.last_test.stationary & (states.last_test.at_step == states.step)
    assert np.all(fired[np.diff(num_drops) > 0])
    history, metrics = sasa_optax.History(), sasa_optax.metrics(states)
    columns = jax.device_get(metrics)
    for step in range(_STEPS):
        history.record({name: column[step] for name, column in columns.items()})
    assert len(history.drops) == num_drops[-1]


@_cases(_FALLING, "the window is as long as its rule says; bad steps are counted")
@hypothesis.given(arguments=arguments, fills=steps, seed=st.integers(0, 2**16))
def test_the_window_follows_its_rule(
    x64: None, name: str, kind: str, arguments: Any, fills: Any, seed: int
) -> None:
    states = _history(name, kind, arguments, fills, seed)
    total, num_nonfinite, num_drops = 0, 0, 0

    def needed() -> int:
        if not arguments["scale_min_samples"]:
            return arguments["min_samples"]
        grown = arguments["min_samples"] / arguments["factor"] ** num_drops
        return round(min(grown, _CAPACITY - 1))

    def kept(total: int) -> int:
        return min(math.ceil(total / arguments["leak_ratio"]), _CAPACITY)

    def is_due(step: int, total: int) -> bool:
        return step % arguments["test_interval"] == 0 and kept(total) > needed()

    for k in range(_STEPS):
        is_counted = states.num_nonfinite[k] > num_nonfinite
        num_nonfinite += is_counted
        assert states.num_nonfinite[k] == num_nonfinite
        if fills[k] is not None and not np.isfinite(fills[k]):
            assert is_counted
        total += not is_counted
        has_run = not is_counted and is_due(k + 1, total)
        assert (states.last_test.at_step[k] == k + 1) == has_run
        if has_run:
            assert states.last_test.num_samples[k] == kept(total)
        if states.num_drops[k] > num_drops:
            total, num_drops = 0, num_drops + 1
        assert states.window.total[k] == total
        ahead = itertools.count(1)
        to_wait = next(n for n in ahead if is_due(k + 1 + n, total + n))
        assert states.next_test[k] == k + 1 + to_wait


servo_arguments = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.9, 0.99]),
        "target": st.sampled_from([1e-3, 0.4, 0.99]),
        "min_scale": st.sampled_from([0.0, 0.3]),
        "max_scale": st.sampled_from([1.0, 1.01, 1e6]),
        "age": st.sampled_from([0, 100, 1000, 2**31 - 30]),
    }
)
# At each step, the loss and the gradients are multiplied by these numbers.
servo_steps = st.lists(
    st.tuples(
        st.sampled_from([1.0] * 8 + [np.nan, np.inf, -np.inf, 0.0, -10.0, 100.0, 1e38]),
        st.sampled_from([1.0] * 8 + [np.nan, np.inf, -np.inf, 0.0, 1e30]),
    ),
    min_size=_STEPS,
    max_size=_STEPS,
)


@functools.cache
def _servo_runs(name: str) -> Callable[..., Any]:
    """A function of traced arguments that gives the states before and after steps."""

    @jax.jit
    def run(arguments: Any, params: Any, seed: Any, losses: Any, fills: Any) -> Any:
        kept = dict(arguments)
        age = kept.pop("age")
        if name == "measure_progress":
            kept = {"momentum": kept["momentum"]}
        optimizer = getattr(sasa_optax, name)(**kept)

        def step(carry: Any, x: Any) -> Any:
            params, state = carry
            key, loss, fill = x
            updates = jax.tree.map(
                lambda p: (
                    -0.1 * fill * (jax.random.normal(key, p.shape) + p.real)
                ).astype(p.dtype),
                params,
            )
            # A step that is not finite moves nothing, as under `apply_if_finite`.
            is_good = jnp.all(
                jnp.stack([jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates)])
            )
            updates = jax.tree.map(lambda u: jnp.where(is_good, u, 0), updates)
            updates, new = optimizer.update(
                updates, state, params, value=loss * squares(params)
            )
            moved = optax.apply_updates(params, updates)
            # The parameters must not overflow either.
            params = jax.tree.map(lambda x: jnp.clip(x.real, -1e3, 1e3), moved)
            params = jax.tree.map(lambda x, m: x.astype(m.dtype), params, moved)
            return (params, new), (updates, new)

        keys = jax.random.split(jax.random.key(seed), _STEPS)
        state = optimizer.init(params)
        state = optax.tree.set(state, num_averaged=age, num_walked=age)
        return state, jax.lax.scan(step, (params, state), (keys, losses, fills))[1]

    return run


@_cases(list(SERVOS), "the scale keeps its bounds; all that moves it is accounted for")
@hypothesis.given(
    arguments=servo_arguments, steps=servo_steps, seed=st.integers(0, 2**16)
)
def test_the_scale_keeps_its_bounds(
    x64: None, name: str, kind: str, arguments: Any, steps: Any, seed: int
) -> None:
    params = jax.tree.map(jnp.asarray, _TREES[kind])
    losses, fills = np.array(steps, np.float32).T
    arguments |= {"age": np.int32(arguments["age"])}
    first, (updates, states) = _servo_runs(name)(arguments, params, seed, losses, fills)
    chex.assert_trees_all_equal_dtypes(updates, jax.tree.map(lambda x: x[None], params))
    chex.assert_trees_all_equal_dtypes(states, first)
    chex.assert_tree_all_finite(updates)
    progress = np.asarray(optax.tree.get(states, "progress"))
    assert np.all(progress >= 0)
    counts = np.asarray(optax.tree.get(states, "num_averaged"), np.int64)
    ages = int(arguments["age"]) + 1 + np.arange(_STEPS)
    np.testing.assert_array_equal(counts, np.minimum(ages, 2**31 - 1))
    if name == "measure_progress":
        chex.assert_tree_all_finite(states)
        np.testing.assert_array_equal(states.num_walked, states.average.num_averaged)
        return
    chex.assert_tree_all_finite(states._replace(ceiling=states.scale))
    _assert_accounted_for(arguments, jax.tree.map(np.asarray, (first, states)), losses)


def _assert_accounted_for(arguments: Any, history: Any, losses: np.ndarray) -> None:
    first, states = history
    steps = np.asarray(states.measured.average.num_averaged, np.float64)
    scales = np.append(first.scale, states.scale)
    lowest, highest = arguments["min_scale"], arguments["max_scale"]
    assert scales.min() >= lowest * (1 - 1e-6)
    assert scales.max() <= highest * (1 + 1e-6)
    counters = (states.num_overshoots, states.num_brakes, states.num_nonfinite)
    is_overshoot, is_brake, is_missed = (
        np.diff(np.append(0, x)).astype(bool) for x in counters
    )
    is_cut = is_overshoot | is_brake
    assert not np.any(is_overshoot & is_brake)
    # A loss counts as missed if it is not finite, or too large to be squared.
    assert np.all(is_missed[~np.isfinite(losses)])
    assert not np.any(is_missed & (np.abs(losses) <= 100))
    # At the end of int32, all steps have the same number.
    is_counted = steps < 2**31 - 1
    np.testing.assert_array_equal(
        (states.last_cut == steps) & is_counted, is_cut & is_counted
    )
    ratios = scales[1:] / scales[:-1]
    cut = np.maximum(scales[:-1] / _adapt._CUT, lowest)
    np.testing.assert_allclose(scales[1:][is_cut], cut[is_cut], rtol=1e-5)
    np.testing.assert_allclose(states.past_scale[is_cut], cut[is_cut], rtol=1e-5)
    assert np.all(states.past_scale >= lowest * (1 - 1e-5))
    assert np.all(states.past_scale <= highest * (1 + 1e-5))
    fastest = np.exp(_adapt._MOST_UP / np.maximum(32, steps / 8))
    assert np.all(ratios <= fastest * (1 + 1e-6))
    rises = ratios > 1
    assert not np.any(rises & (is_cut | is_missed))
    assert np.all(scales[1:] <= np.maximum(states.ceiling, lowest) * (1 + 1e-6))
    # Only rises are recorded, and a cut forgets them. A walk restarts where the
    # parameters return. Until it is long enough, only a cut lowers the rate.
    last_rise, num_walked = 0, int(first.measured.num_walked)
    for k, step in enumerate(steps):
        last_rise = step if rises[k] else 0 if is_cut[k] else last_rise
        assert states.last_rise[k] == last_rise
        returns = is_brake[k] or is_missed[k]
        num_walked = 0 if returns else min(num_walked + 1, 2**31 - 1)
        assert states.measured.num_walked[k] == num_walked
    fell = (ratios < 1) & ~is_cut
    assert np.all(states.measured.num_walked[fell] >= _adapt.MIN_STEPS)
    # Progress stays the same where the parameters return.
    progress = np.append(first.measured.progress, states.measured.progress)
    returns = is_brake | is_missed
    np.testing.assert_array_equal(progress[1:][returns], progress[:-1][returns])


@_cases(["salsa", "ssls"], "the line search stays finite and within its bounds")
@hypothesis.given(arguments=arguments, fills=steps, seed=st.integers(0, 2**16))
def test_the_line_search(
    x64: None, name: str, kind: str, arguments: Any, fills: Any, seed: int
) -> None:
    if name == "ssls":
        arguments = {"floor": arguments["floor"]}
    states = _history(name, kind, arguments, fills, seed)
    # For SALSA, an average is kept beside this state.
    search = states if name == "ssls" else states[0]
    rates = np.concatenate([[1.0], search.controller.learning_rate])
    assert rates.min() > 0
    assert np.all(np.diff(search.num_evaluations) >= 0)
    # Once the search has ended it stays so, and the rate only falls.
    active = search.line_search_active
    assert np.all(np.diff(active.astype(int)) <= 0)
    assert np.all(np.diff(rates[1:])[~active[:-1]] <= 0)
    assert np.all(np.diff(search.num_evaluations)[~active[:-1]] == 0)
