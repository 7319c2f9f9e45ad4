"""Bad input is refused at construction. The error says what is allowed instead."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sasa_optax

Case = tuple[str, Any, str]

_WINDOW: list[Case] = [
    ("leak_ratio", 0, "an integer of at least 1"),
    ("leak_ratio", 1.5, "an integer of at least 1"),
    ("leak_ratio", True, "an integer of at least 1"),
    ("min_samples", 3, "an integer of at least 4"),
    ("test_interval", 0, "an integer of at least 1"),
    ("warmup_steps", -1, "an integer of at least 0"),
    ("max_window", 4, "an integer of at least 5"),
    ("max_window", 2.0**14, "an integer of at least 5"),
    ("scale_min_samples", "yes", "True or False"),
]
_COMMON: list[Case] = [
    ("factor", 1.0, "a number in (0, 1)"),
    ("factor", -0.1, "a number in (0, 1)"),
    ("factor", "0.1", "a number in (0, 1)"),
    ("factor", None, "a number in (0, 1)"),
    ("steps_per_epoch", 0, "an integer of at least 1"),
    ("steps_per_epoch", 10.0, "an integer of at least 1"),
    ("axis_name", 0, "the name of a mesh axis, a tuple of names, or None"),
    ("test", "mean", "'zero_mean' or 'equivalence' or 'slope' or a function from"),
    ("window", 1000, "a sasa_optax.Window"),
    ("window", {"leak_ratio": 4}, "a sasa_optax.Window"),
    ("average", "yes", "True or False"),
]
_RATE: list[Case] = [
    ("learning_rate", 0.0, "a number in (0, inf)"),
    ("learning_rate", -1.0, "a number in (0, inf)"),
    ("learning_rate", np.inf, "a number in (0, inf)"),
    ("learning_rate", np.nan, "a number in (0, inf)"),
    ("learning_rate", jnp.ones(2), "a number in (0, inf)"),
    ("min_learning_rate", -1e-3, "a number in [0, inf)"),
]
_MOMENTUM: list[Case] = [
    ("momentum", 1.0, "a number in [0, 1)"),
    ("weight_decay", -0.1, "a number in [0, inf)"),
]
_NU: list[Case] = [("nu", 1.1, "a number in [0, 1]")]
_STATISTIC: list[Case] = [
    ("statistic", "mean", "'master' or 'centred' or a Statistic or a function from"),
    ("statistic", None, "'master' or 'centred' or a Statistic or a function from"),
]
_LINE_SEARCH: list[Case] = [
    ("smoothing", 0.0, "a number in (0, 1]"),
    ("smoothing", 1.1, "a number in (0, 1]"),
    ("sufficient_decrease", 1.0, "a number in (0, 1)"),
    ("increase_factor", 0.9, "a number in [1, inf)"),
    ("decrease_factor", 1.0, "a number in (0, 1)"),
    ("max_trials", 0, "an integer of at least 1"),
    ("max_trials", 2.0, "an integer of at least 1"),
    ("direction", "g", "'gradient' or 'update'"),
    ("interval", 0, "an integer of at least 1"),
    ("max_learning_rate", 0.0, "a number in (0, inf)"),
    ("max_learning_rate", np.inf, "a number in (0, inf)"),
    ("loss_test", "slope", "a sasa_optax.SlopeTest"),
    ("loss_test", sasa_optax.ZeroMeanTest(), "a sasa_optax.SlopeTest"),
]
_SEARCHING: list[Case] = [
    ("learning_rate", max, "a number in (0, inf)"),  # a function, so a schedule
    ("search", "update", "a sasa_optax.LineSearch"),
    ("search", sasa_optax.Window(), "a sasa_optax.LineSearch"),
]

_PROGRESS: list[Case] = [
    ("momentum", 1.0, "a number in [0, 1)"),
    ("momentum", -0.1, "a number in [0, 1)"),
    ("momentum", None, "a number in [0, 1)"),
    ("axis_name", 0, "the name of a mesh axis, a tuple of names, or None"),
    ("dtype", "bfloat16", "float32 or float64, or None"),
    ("dtype", "int32", "float32 or float64, or None"),
]

_CASES: dict[Callable[..., Any], list[Case]] = {
    sasa_optax.Window: _WINDOW,
    sasa_optax.LineSearch: _LINE_SEARCH,
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
    sasa_optax.sasa_plus: _COMMON + _STATISTIC + _RATE + _MOMENTUM + _NU,
    sasa_optax.sasa: _COMMON + _RATE + _MOMENTUM,
    sasa_optax.scale_by_sasa_plus: _COMMON + _STATISTIC + _RATE,
    sasa_optax.slope: _COMMON + _RATE + _MOMENTUM + _NU,
    sasa_optax.reduce_on_stationarity: [
        *_COMMON,
        *_STATISTIC,
        ("min_scale", 1.5, "a number in [0, 1]"),
    ],
    sasa_optax.ssls: [
        *_SEARCHING,
        *_RATE,
        *_MOMENTUM,
        *_NU,
        ("steps_per_epoch", 0, "1"),
    ],
    sasa_optax.scale_by_ssls: _SEARCHING + _RATE,
    sasa_optax.salsa: _COMMON + _STATISTIC + _RATE + _MOMENTUM + _NU + _SEARCHING,
    sasa_optax.scale_by_salsa: _COMMON + _STATISTIC + _RATE + _SEARCHING,
    sasa_optax.qhm: _RATE[:5] + _MOMENTUM + _NU,
    sasa_optax.scale_by_qhm: _MOMENTUM[:1] + _NU,
    sasa_optax.master_statistic: _MOMENTUM[:1] + _NU,
    sasa_optax.centred_statistic: _MOMENTUM[:1] + _NU,
    sasa_optax.yaida_statistic: _MOMENTUM,
    sasa_optax.loss_statistic: _MOMENTUM[1:],
}
_HAVE_A_RATE = [
    make for make in _CASES if "learning_rate" in inspect.signature(make).parameters
]


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
    kwargs: dict[str, Any] = {"learning_rate": 0.1} if make in _HAVE_A_RATE else {}
    with pytest.raises(ValueError, match=name) as error:
        make(**kwargs | {name: value})
    message = str(error.value)
    assert message.startswith(f"{name} must be")
    assert allowed in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("window", "steps_per_epoch", "message"),
    [
        ({"max_window": 500}, None, "greater than min_samples.*500.*1000"),
        ({"max_window": 50}, 10, "greater than min_samples.*50.*100"),
        ({"max_window": 20, "min_samples": 20}, None, "than min_samples.*20.*20"),
    ],
)
def test_a_window_that_could_not_hold_what_a_test_needs(
    window: dict[str, Any], steps_per_epoch: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sasa_optax.sasa_plus(
            0.1, window=sasa_optax.Window(**window), steps_per_epoch=steps_per_epoch
        )


# Old keywords, and the place that the error names for each.
_MOVED_TO_WINDOW = {
    "leak_ratio": "window=sasa_optax.Window(leak_ratio=...)",
    "min_samples": "window=sasa_optax.Window(min_samples=...)",
    "test_interval": "window=sasa_optax.Window(test_interval=...)",
    "warmup_steps": "window=sasa_optax.Window(warmup_steps=...)",
    "max_window": "window=sasa_optax.Window(max_window=...)",
    "scale_min_samples": "window=sasa_optax.Window(scale_min_samples=...)",
}
_MOVED = _MOVED_TO_WINDOW | {
    "significance": "test=sasa_optax.ZeroMeanTest(significance=...)",
    "variance": "test=sasa_optax.ZeroMeanTest(variance=...)",
    "delta": "test=sasa_optax.ZeroMeanTest(delta=...)",
    "log_steps": "test=sasa_optax.SlopeTest(log_steps=...)",
}
# The default tests of these are of another kind.
_MOVED_OF_SASA = _MOVED_TO_WINDOW | {
    "significance": "test=sasa_optax.EquivalenceTest(significance=...)",
    "variance": "test=sasa_optax.EquivalenceTest(variance=...)",
    "delta": "test=sasa_optax.EquivalenceTest(delta=...)",
}
_MOVED_OF_SLOPE = _MOVED_TO_WINDOW | {
    "significance": "test=sasa_optax.SlopeTest(significance=...)",
    "log_steps": "test=sasa_optax.SlopeTest(log_steps=...)",
}
_MOVED_OF_SEARCH = {
    "smoothing": "search=sasa_optax.LineSearch(smoothing=...)",
    "sufficient_decrease": "search=sasa_optax.LineSearch(sufficient_decrease=...)",
    "increase_factor": "search=sasa_optax.LineSearch(increase_factor=...)",
    "decrease_factor": "search=sasa_optax.LineSearch(decrease_factor=...)",
    "max_trials": "search=sasa_optax.LineSearch(max_trials=...)",
    "max_learning_rate": "search=sasa_optax.LineSearch(max_learning_rate=...)",
    "search_direction": "search=sasa_optax.LineSearch(direction=...)",
    "search_interval": "search=sasa_optax.LineSearch(interval=...)",
    "interval": "search=sasa_optax.LineSearch(interval=...)",
}
_MOVED_OF = {
    sasa_optax.sasa: _MOVED_OF_SASA,
    sasa_optax.sasa_plus: _MOVED,
    sasa_optax.scale_by_sasa_plus: _MOVED,
    sasa_optax.reduce_on_stationarity: _MOVED,
    sasa_optax.slope: _MOVED_OF_SLOPE,
    sasa_optax.ssls: _MOVED_OF_SEARCH,
    sasa_optax.scale_by_ssls: _MOVED_OF_SEARCH,
    sasa_optax.salsa: _MOVED | _MOVED_OF_SEARCH,
    sasa_optax.scale_by_salsa: _MOVED | _MOVED_OF_SEARCH,
}


@pytest.mark.parametrize(
    ("make", "name", "place"),
    [
        pytest.param(make, name, place, id=f"{make.__name__}-{name}")
        for make, places in _MOVED_OF.items()
        for name, place in places.items()
    ],
)
def test_an_old_keyword_is_an_error_that_names_its_new_place(
    make: Callable[..., Any], name: str, place: str
) -> None:
    with pytest.raises(TypeError) as error:
        make(**{name: 1})
    assert str(error.value) == (
        f"{make.__name__}() got an unexpected keyword argument {name!r}: write {place}."
    )


@pytest.mark.parametrize("test", ["slope", sasa_optax.SlopeTest()])
def test_the_new_place_is_the_test_that_was_asked_for(test: Any) -> None:
    arguments: dict[str, Any] = {"test": test, "significance": 0.1}
    with pytest.raises(TypeError, match=r"write test=sasa_optax\.SlopeTest\(signif"):
        sasa_optax.sasa_plus(1.0, **arguments)


def test_a_function_without_a_window_names_none() -> None:
    arguments: dict[str, Any] = {"leak_ratio": 4}
    with pytest.raises(TypeError, match=r"argument 'leak_ratio'$"):
        sasa_optax.ssls(1.0, **arguments)


def test_the_new_places_exist() -> None:
    for places in _MOVED_OF.values():
        for place in places.values():
            match = re.fullmatch(r"(\w+)=sasa_optax\.(\w+)\((\w+)=\.\.\.\)", place)
            assert match is not None
            argument, name, field = match.groups()
            kind = getattr(sasa_optax, name)
            assert field in inspect.signature(kind).parameters
            assert argument in inspect.signature(sasa_optax.salsa).parameters


def test_a_keyword_that_never_existed_is_an_ordinary_error() -> None:
    unknown: dict[str, Any] = {"learning_rate": 0.1, "leek_ratio": 4}
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'leek_ratio'$"):
        sasa_optax.sasa_plus(**unknown)


@pytest.mark.parametrize(
    ("steps_per_epoch", "expected"), [(1, 100), (250, 250), (50_000, 1000)]
)
def test_steps_per_epoch_sets_what_was_not_given(
    steps_per_epoch: int, expected: int
) -> None:
    def fired(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
        return sasa_optax.TestResult(stationary=True)

    def first_test(**fields: Any) -> int:
        window = sasa_optax.Window(leak_ratio=1, **fields)
        optimizer = sasa_optax.scale_by_sasa_plus(
            0.1, test=fired, window=window, steps_per_epoch=steps_per_epoch
        )

        def step(state: Any, _: Any) -> Any:
            _, state = optimizer.update(jnp.ones(1), state, jnp.ones(1))
            return state, optax.tree.get(state, "last_test").at_step

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
    arguments: dict[str, Any] = {"learning_rate": 0.1} | kwargs
    optimizer = sasa_optax.scale_by_sasa_plus(**arguments)

    def step(params: jax.Array) -> Any:
        return optimizer.update(params, optimizer.init(params), params)

    with pytest.raises(error, match=message):
        step(jnp.ones(2))


_TOO_LARGE = [
    *((sasa_optax.Window, name) for name in ("leak_ratio", "min_samples")),
    *((sasa_optax.Window, name) for name in ("test_interval", "warmup_steps")),
    (sasa_optax.Window, "max_window"),
    *((sasa_optax.LineSearch, name) for name in ("interval", "max_trials")),
    (sasa_optax.average_iterates, "leak_ratio"),
    (sasa_optax.salsa, "steps_per_epoch"),
]


@pytest.mark.parametrize(("make", "name"), _TOO_LARGE)
def test_an_integer_beyond_the_counters(make: Callable[..., Any], name: str) -> None:
    for value in (2**31, np.int64(2**40), 10**18):
        message = f"{name} must be an integer of at most 2147483647, got {value!r}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make(**{name: value})


@pytest.mark.parametrize("name", ["test_interval", "warmup_steps"])
def test_the_largest_integer_means_never(name: str) -> None:
    fields: dict[str, Any] = {"test_interval": 1} | {name: 2**31 - 1}
    window = sasa_optax.Window(leak_ratio=1, min_samples=4, max_window=8, **fields)

    def fired(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
        return sasa_optax.TestResult(stationary=True)

    optimizer = sasa_optax.scale_by_sasa_plus(0.1, test=fired, window=window)
    x = jnp.ones(1)

    def step(state: Any, _: Any) -> Any:
        return optimizer.update(x, state, x)[1], None

    state, _ = jax.lax.scan(step, optimizer.init(x), None, length=9)
    assert int(optax.tree.get(state, "num_drops")) == 0
    has_run = int(optax.tree.get(state, "last_test").at_step) > 0
    assert has_run == (name == "warmup_steps")


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
    ("value", "shape", "dtype"),
    [
        (np.ones(2, np.float32), "(2,)", "float32"),
        (np.ones((1, 1), np.float32), "(1, 1)", "float32"),
        (3, "()", "int32"),
        (True, "()", "bool"),
        (np.complex64(1j), "()", "complex64"),
    ],
)
def test_a_loss_that_is_none(value: Any, shape: str, dtype: str) -> None:
    optimizer = sasa_optax.adapt_on_progress()
    x = jnp.ones(2)
    message = (
        f"value must be a floating-point scalar, got shape {shape} and dtype {dtype}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.jit(lambda x: optimizer.update(x, optimizer.init(x), x, value=value))(x)


def test_any_floating_type_is_a_loss() -> None:
    optimizer = sasa_optax.adapt_on_progress()
    x = jnp.ones(2)
    for value in (0.5, np.float32(0.5), np.float16(0.5), jnp.bfloat16(0.5)):
        _, state = optimizer.update(x, optimizer.init(x), x, value=value)
        fast = optax.tree.get(state, "fast")
        assert fast.dtype == jnp.float32
        assert float(fast) == 0.5


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


@pytest.mark.parametrize(
    "optimizer",
    [
        sasa_optax.sasa_plus(1.0),
        sasa_optax.scale_by_sasa_plus(1.0),
        sasa_optax.ssls(),
        sasa_optax.scale_by_qhm(),
        sasa_optax.average_iterates(),
        sasa_optax.measure_progress(),
        sasa_optax.adapt_on_progress(),
    ],
)
def test_the_state_of_another_optimizer(optimizer: Any) -> None:
    x = jnp.ones(2)
    kind, other = type(optimizer.init(x)).__name__, optax.scale_by_adam().init(x)
    expected = rf"must be a sasa_optax\.{kind}, got a ScaleByAdamState\."
    with pytest.raises(ValueError, match=expected):
        optimizer.update(x, other, x, value=x[0], value_fn=jnp.sum, grad=x)


def test_a_state_that_is_no_pair() -> None:
    """Beside its average, SALSA's state is one."""
    optimizer, x = sasa_optax.salsa(), jnp.ones(2)
    not_a_state: Any = None
    with pytest.raises(ValueError, match=r"must be a tuple, got a NoneType\."):
        optimizer.update(x, not_a_state, x, value_fn=jnp.sum)
