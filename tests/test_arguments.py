"""Bad input is refused at construction, naming argument, value and what is allowed."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sasa_optax

_COMMON: list[tuple[str, Any, str]] = [
    ("factor", 1.0, "a number in (0, 1)"),
    ("factor", -0.1, "a number in (0, 1)"),
    ("factor", "0.1", "a number in (0, 1)"),
    ("factor", None, "a number in (0, 1)"),
    ("significance", 0.0, "a number in (0, 1)"),
    ("variance", "mb", "'iid' or 'batch_means' or 'overlapping_batch_means'"),
    ("leak_ratio", 0, "an integer of at least 1"),
    ("leak_ratio", 1.5, "an integer of at least 1"),
    ("leak_ratio", True, "an integer of at least 1"),
    ("min_samples", 3, "an integer of at least 4"),
    ("test_interval", 0, "an integer of at least 1"),
    ("steps_per_epoch", 0, "an integer of at least 1"),
    ("steps_per_epoch", 10.0, "an integer of at least 1"),
    ("warmup_steps", -1, "an integer of at least 0"),
    ("max_window", 4, "an integer of at least 5"),
    ("scale_min_samples", "yes", "True or False"),
    ("axis_name", 0, "the name of a mesh axis, a tuple of names, or None"),
    ("max_window", 2.0**14, "an integer of at least 5"),
]
_RATE: list[tuple[str, Any, str]] = [
    ("learning_rate", 0.0, "a number in (0, inf)"),
    ("learning_rate", -1.0, "a number in (0, inf)"),
    ("learning_rate", np.inf, "a number in (0, inf)"),
    ("learning_rate", np.nan, "a number in (0, inf)"),
    ("learning_rate", jnp.ones(2), "a number in (0, inf)"),
    ("min_learning_rate", -1e-3, "a number in [0, inf)"),
]
_MOMENTUM: list[tuple[str, Any, str]] = [
    ("momentum", 1.0, "a number in [0, 1)"),
    ("weight_decay", -0.1, "a number in [0, inf)"),
]
_NU: list[tuple[str, Any, str]] = [("nu", 1.1, "a number in [0, 1]")]
_PARTS: list[tuple[str, Any, str]] = [
    ("test", "slope", "'zero_mean' or 'equivalence'"),
    ("statistic", "mean", "'master', 'centred', or a function from Transition"),
]

_SEARCH: list[tuple[str, Any, str]] = [
    ("learning_rate", max, "a number in (0, inf)"),  # a function, so a schedule
    ("smoothing", 0.0, "a number in (0, 1]"),
    ("smoothing", 1.1, "a number in (0, 1]"),
    ("sufficient_decrease", 1.0, "a number in (0, 1)"),
    ("increase_factor", 0.9, "a number in [1, inf)"),
    ("decrease_factor", 1.0, "a number in (0, 1)"),
    ("max_trials", 0, "an integer of at least 1"),
    ("max_trials", 2.0, "an integer of at least 1"),
    ("search_direction", "g", "'gradient' or 'update'"),
    ("search_interval", 0, "an integer of at least 1"),
    ("max_learning_rate", 0.0, "a number in (0, inf)"),
    ("max_learning_rate", np.inf, "a number in (0, inf)"),
]

_PROGRESS: list[tuple[str, Any, str]] = [
    ("momentum", 1.0, "a number in [0, 1)"),
    ("momentum", -0.1, "a number in [0, 1)"),
    ("momentum", None, "a number in [0, 1)"),
    ("axis_name", 0, "the name of a mesh axis, a tuple of names, or None"),
    ("dtype", "bfloat16", "float32 or float64, or None"),
    ("dtype", "int32", "float32 or float64, or None"),
]

_CASES = {
    sasa_optax.measure_progress: _PROGRESS,
    sasa_optax.adapt_on_progress: [
        *_PROGRESS,
        ("target", 0.0, "a number in (0, 1)"),
        ("target", 1.0, "a number in (0, 1)"),
        ("target", "0.4", "a number in (0, 1)"),
        ("min_scale", -0.1, "a number in [0, inf)"),
        ("min_scale", np.inf, "a number in [0, inf)"),
        ("max_scale", 0.0, "a number in (0, inf)"),
        ("max_scale", np.nan, "a number in (0, inf)"),
    ],
    sasa_optax.sasa_plus: _COMMON + _RATE + _MOMENTUM + _NU + _PARTS,
    sasa_optax.sasa: [*_COMMON, *_RATE, *_MOMENTUM, ("delta", 0, "(0, inf)")],
    sasa_optax.scale_by_sasa_plus: _COMMON + _RATE + _PARTS,
    sasa_optax.slope: [
        *(case for case in _COMMON if case[0] != "variance"),
        *_RATE,
        *_MOMENTUM,
        *_NU,
    ],
    sasa_optax.reduce_on_stationarity: [
        *_COMMON,
        *_PARTS,
        ("min_scale", 1.5, "a number in [0, 1]"),
    ],
    sasa_optax.ssls: [*_SEARCH, *_RATE, *_MOMENTUM, *_NU, ("steps_per_epoch", 0, "1")],
    sasa_optax.scale_by_ssls: _SEARCH + _RATE,
    sasa_optax.salsa: _COMMON + _RATE + _MOMENTUM + _NU + _PARTS + _SEARCH,
    sasa_optax.scale_by_salsa: _COMMON + _RATE + _PARTS + _SEARCH,
    sasa_optax.qhm: _RATE[:5] + _MOMENTUM + _NU,
    sasa_optax.scale_by_qhm: _MOMENTUM[:1] + _NU,
}


@pytest.mark.parametrize(
    ("make", "name", "value", "allowed"),
    [
        pytest.param(make, *case, id=f"{make.__name__}-{case[0]}-{case[1]}")
        for make, cases in _CASES.items()
        for case in cases
    ],
)
def test_bad_arguments(
    make: Callable[..., Any], name: str, value: Any, allowed: str
) -> None:
    needs_rate = make not in (
        sasa_optax.adapt_on_progress,
        sasa_optax.measure_progress,
        sasa_optax.reduce_on_stationarity,
        sasa_optax.scale_by_qhm,
    )
    kwargs: dict[str, Any] = {"learning_rate": 0.1} if needs_rate else {}
    with pytest.raises(ValueError, match=name) as error:
        make(**kwargs | {name: value})
    message = str(error.value)
    assert message.startswith(f"{name} must be")
    assert allowed in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_window": 500}, "greater than min_samples.*500.*1000"),
        (
            {"max_window": 50, "steps_per_epoch": 10},
            "greater than min_samples.*50.*100",
        ),
        ({"max_window": 20, "min_samples": 20}, "greater than min_samples.*20.*20"),
        ({"delta": -1.0}, r"delta must be .* \(0, inf\)"),
        (
            {"test": sasa_optax.ZeroMeanTest(), "significance": 0.1},
            "significance is for",
        ),
        ({"test": sasa_optax.ZeroMeanTest(), "delta": 0.1}, "delta is for"),
        ({"test": "equivalence", "delta": -1.0}, r"delta must be .* \(0, inf\)"),
    ],
)
def test_arguments_that_do_not_fit_together(
    kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sasa_optax.sasa_plus(0.1, **kwargs)


@pytest.mark.parametrize(
    ("steps_per_epoch", "expected"), [(1, 100), (250, 250), (50_000, 1000)]
)
def test_steps_per_epoch_sets_what_was_not_given(
    steps_per_epoch: int, expected: int
) -> None:
    def fired(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
        return sasa_optax.TestResult(stationary=True)

    def first_test(**kwargs: Any) -> int:
        optimizer = sasa_optax.scale_by_sasa_plus(
            0.1, test=fired, leak_ratio=1, steps_per_epoch=steps_per_epoch, **kwargs
        )

        def step(state: Any, _: None) -> Any:
            _, state = optimizer.update(jnp.ones(1), state, jnp.ones(1))
            return state, state.last_test.step

        scan = jax.jit(lambda state: jax.lax.scan(step, state, None, length=2100))
        _, steps = scan(optimizer.init(jnp.ones(1)))
        return int(steps[steps > 0][0])

    # More than min_samples samples, at a multiple of test_interval.
    assert first_test() == 2 * expected
    assert first_test(test_interval=1) == expected + 1
    assert first_test(min_samples=4) == expected


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"statistic": lambda t: 1.0}, TypeError, "must return a Sample, got 1.0"),
        (
            {"statistic": lambda t: sasa_optax.Sample(jnp.ones(3))},
            ValueError,
            re.escape("Sample.value must be a scalar, got shape (3,)"),
        ),
        ({"test": lambda s: True}, TypeError, "must return a TestResult, got True"),
        (
            {"test": lambda s: sasa_optax.TestResult(mean=s.values)},
            ValueError,
            re.escape("TestResult.mean must be a scalar, got shape (16384,)"),
        ),
        (
            {"learning_rate": lambda step: jnp.ones(2)},
            ValueError,
            re.escape("learning_rate must be a scalar, got shape (2,)"),
        ),
    ],
)
def test_parts_of_ones_own_that_return_the_wrong_thing(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = sasa_optax.scale_by_sasa_plus(**{"learning_rate": 0.1} | kwargs)

    def step(params: jax.Array) -> Any:
        return optimizer.update(params, optimizer.init(params), params)

    with pytest.raises(error, match=message):
        step(jnp.ones(2))


def test_the_largest_scale_is_at_least_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"max_scale must be .*min_scale.*0\.5"):
        sasa_optax.adapt_on_progress(min_scale=0.5, max_scale=0.4)


@pytest.mark.parametrize("name", ["adapt_on_progress", "measure_progress"])
def test_progress_without_params_says_what_to_call(name: str) -> None:
    optimizer = getattr(sasa_optax, name)()
    state = optimizer.init(jnp.ones(2))
    with pytest.raises(ValueError, match=r"optimizer\.update\(grads, state, params"):
        optimizer.update(jnp.ones(2), state, value=jnp.float32(1))


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (np.ones(2, np.float32), "float32 of shape (2,)"),
        (np.ones((1, 1), np.float32), "float32 of shape (1, 1)"),
        (3, "int32 of shape ()"),
        (True, "bool of shape ()"),
        (np.complex64(1j), "complex64 of shape ()"),
    ],
)
def test_a_loss_that_is_none(value: Any, got: str) -> None:
    optimizer = sasa_optax.adapt_on_progress()
    x = jnp.ones(2)
    with pytest.raises(ValueError, match="value must be the loss") as error:
        jax.jit(lambda x: optimizer.update(x, optimizer.init(x), x, value=value))(x)
    assert f"got {got}" in str(error.value)
    call = "optimizer.update(grads, state, params, value=loss)"
    assert call in str(error.value)


def test_any_floating_type_is_a_loss() -> None:
    optimizer = sasa_optax.adapt_on_progress()
    x = jnp.ones(2)
    for value in (0.5, np.float32(0.5), np.float16(0.5), jnp.bfloat16(0.5)):
        _, state = optimizer.update(x, optimizer.init(x), x, value=value)
        assert state.losses.fast.dtype == jnp.float32
        assert float(state.losses.fast) == 0.5


def test_steps_per_epoch_cannot_be_traced() -> None:
    with pytest.raises(ValueError, match="static_args"):
        jax.jit(
            lambda steps: sasa_optax.sasa_plus(0.1, steps_per_epoch=steps).init(
                jnp.ones(2)
            )
        )(5)


def test_weight_decay_without_params_says_what_to_call() -> None:
    optimizer = sasa_optax.qhm(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"optimizer\.update\(grads, state, params"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
