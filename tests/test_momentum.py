"""When momentum is kept, and when it restarts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import SMALL, always_stationary, never_stationary

import sasa_optax

_BETA = 0.9
_GRADS = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def _traces(grads: np.ndarray) -> np.ndarray:
    """The average h after each step, computed by NumPy."""
    h, traces = np.zeros(grads.shape[1]), []
    for g in grads:
        h = (1 - _BETA) * g + _BETA * h
        traces.append(h)
    return np.array(traces)


@functools.cache
def _compiled(name: str) -> tuple[Any, Any]:
    """An optimizer whose window is too long for a test, and its update."""
    window = sasa_optax.Window(min_samples=100)
    if name == "slope":
        optimizer = sasa_optax.slope(
            1.0, momentum=_BETA, test=never_stationary, window=window
        )
    else:
        optimizer = sasa_optax.sasa_plus(
            1.0,
            momentum=_BETA,
            test=never_stationary,
            window=window,
            statistic=lambda t: sasa_optax.Sample(jnp.asarray(t.value)),
        )
    return optimizer, jax.jit(optimizer.update)


def _run(
    optimizer: Any, update: Any, grads: np.ndarray, losses: np.ndarray
) -> list[Any]:
    """The states after each step, at parameters that stay the same."""
    params = jnp.ones(3)
    state, states = optimizer.init(params), []
    for g, loss in zip(grads, losses, strict=True):
        _, state = update(jnp.asarray(g), state, params, value=jnp.float32(loss))
        states.append(state)
    return states


# During the first steps the window is empty, as it is after a drop.
_MISSING = {
    "from the start": [0, 1, 2, 3],
    "now and then": [2, 5, 6, 9],
    "always": list(range(12)),
}


@pytest.mark.parametrize("missing", _MISSING.values(), ids=_MISSING.keys())
@pytest.mark.parametrize("name", ["slope", "a statistic of one's own"])
def test_a_sample_that_is_missing_does_not_restart_momentum(
    name: str, missing: list[int]
) -> None:
    """A loss may be NaN, and a statistic may return NaN to skip a sample."""
    losses = np.ones(12)
    losses[missing] = np.nan
    states = _run(*_compiled(name), _GRADS, losses)
    assert int(states[-1].controller.num_nonfinite) == len(missing)
    traces = np.array([state.trace for state in states])
    np.testing.assert_allclose(traces, _traces(_GRADS), rtol=1e-5, atol=1e-6)


def test_momentum_restarts_after_a_drop_and_only_then() -> None:
    optimizer = sasa_optax.sasa_plus(
        1.0, momentum=_BETA, test=always_stationary, **SMALL
    )
    states = _run(optimizer, jax.jit(optimizer.update), _GRADS, np.ones(12))
    # More than four samples come with the fifth step, and again with the tenth.
    drops = [int(state.controller.num_drops) for state in states]
    assert drops == [0] * 4 + [1] * 5 + [2] * 3
    parts = [_traces(_GRADS[:5]), _traces(_GRADS[5:10]), _traces(_GRADS[10:])]
    traces = np.array([state.trace for state in states])
    np.testing.assert_allclose(traces, np.concatenate(parts), rtol=1e-5, atol=1e-6)


def test_a_drop_makes_momentum_forget_what_is_not_finite() -> None:
    """SLOPE tests losses, which may be finite where a gradient was not."""
    optimizer = sasa_optax.slope(1.0, momentum=_BETA, test=always_stationary, **SMALL)
    grads = _GRADS[:8].copy()
    grads[2] = [np.nan, np.inf, -np.inf]
    states = _run(optimizer, jax.jit(optimizer.update), grads, np.arange(8.0))
    assert int(states[4].controller.num_drops) == 1
    assert not np.any(np.isfinite(states[4].trace))
    restarted = np.array([state.trace for state in states[5:]])
    np.testing.assert_allclose(restarted, _traces(grads[5:]), rtol=1e-5, atol=1e-6)
