"""Every optimizer with every option set, made of a flat dict of its numbers.

Numbers may be traced. That of an object has the path of its field as its name, such as
"search.loss_test.significance".
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optimizers import SERVOS, Optimizer, in_midrun, squares

import sasa_optax
from sasa_optax._types import Numeric

_NOISE = jnp.asarray(0.5 * np.random.default_rng(0).normal(size=(64, 3)), jnp.float32)

Numbers = dict[str, Any]

# For each number a value, and another one with which the run below turns out otherwise.
Pairs = dict[str, tuple[float, float]]

_RATE: Pairs = {
    "learning_rate": (0.5, 0.2),
    "min_learning_rate": (0.01, 0.3),
    "factor": (0.5, 0.25),
}
_MOMENTUM: Pairs = {"momentum": (0.5, 0.8), "weight_decay": (0.01, 0.2)}
_NU: Pairs = {"nu": (0.7, 0.3)}
_WINDOW: Pairs = {
    "window.leak_ratio": (1, 2),
    "window.min_samples": (4, 6),
    "window.test_interval": (1, 3),
    "window.warmup_steps": (6, 55),
}
_ZERO_MEAN: Pairs = {"test.significance": (0.5, 0.1), "test.delta": (0.5, 0.005)}
_EQUIVALENCE: Pairs = {"test.significance": (0.5, 0.1), "test.delta": (3.0, 0.1)}
_SLOPE: Pairs = {"test.significance": (0.2, 0.6)}
_SEARCH: Pairs = {
    "search.smoothing": (0.3, 0.1),
    "search.sufficient_decrease": (0.4, 0.9),
    "search.increase_factor": (2.0, 3.0),
    "search.decrease_factor": (0.5, 0.25),
    "search.max_trials": (3, 1),
    "search.interval": (1, 2),
    "search.max_learning_rate": (30.0, 0.55),
}
_ENDING: Pairs = {"search.loss_test.significance": (0.001, 0.5)}

_SEARCHED: Pairs = {"learning_rate": (2.0, 0.2), "min_learning_rate": (0.01, 1.8)}
_SEARCHED |= _SEARCH

_CONTROLLED = _RATE | _WINDOW | _ZERO_MEAN
_UP_TO_THE_TEST = _RATE | _MOMENTUM | _WINDOW

# The names are those of `optimizers.ALL`.
PAIRS: dict[str, Pairs] = {
    "sasa": _UP_TO_THE_TEST | _EQUIVALENCE,
    "sasa_plus": _UP_TO_THE_TEST | _NU | _ZERO_MEAN,
    "sasa_plus_centred": _UP_TO_THE_TEST | _NU | _EQUIVALENCE,
    "scale_by_sasa_plus": _CONTROLLED,
    "reduce_on_stationarity": {
        "factor": (0.5, 0.25),
        "min_scale": (0.01, 0.4),
        **_WINDOW,
        **_ZERO_MEAN,
    },
    "slope": _UP_TO_THE_TEST | _NU | _SLOPE,
    "salsa": _UP_TO_THE_TEST | _NU | _ZERO_MEAN | _SEARCH | _ENDING,
    "scale_by_salsa": _CONTROLLED | _SEARCH | _ENDING,
    "ssls": _SEARCHED | _MOMENTUM | _NU,
    "scale_by_ssls": _SEARCHED,
    "qhm": {"learning_rate": (0.5, 0.2)} | _MOMENTUM | _NU,
    "average_iterates": {"leak_ratio": (2, 1), "min_horizon": (3.0, 9.0)},
    "adapt_on_progress": {
        "momentum": (0.0, 0.5),
        "target": (0.4, 0.7),
        "min_scale": (0.0, 0.3),
        "max_scale": (1.5, 0.9),
    },
    "measure_progress": {"momentum": (0.0, 0.5)},
}

_OBJECTS: dict[str, Callable[..., Any]] = {
    "window": functools.partial(
        sasa_optax.Window, max_window=32, scale_min_samples=True
    ),
    "search": sasa_optax.LineSearch,
    "loss_test": functools.partial(sasa_optax.SlopeTest, log_steps=True),
}
_TESTS = {
    "sasa": sasa_optax.EquivalenceTest,
    "sasa_plus_centred": sasa_optax.EquivalenceTest,
    "slope": sasa_optax.SlopeTest,
}


def _nested(numbers: Numbers) -> dict[str, Any]:
    """The numbers of each object in a dict of its own."""
    found: dict[str, Any] = {}
    for name, x in numbers.items():
        first, _, rest = name.partition(".")
        if rest:
            found.setdefault(first, {})[rest] = x
        else:
            found[first] = x
    return found


_NUMERIC = (Numeric, Numeric | None, float | jax.Array, optax.ScalarOrSchedule)


def numeric_options(name: str) -> set[str]:
    """The names of all numbers that its signature and its objects have."""

    def of(make: Callable[..., Any], prefix: str = "") -> Iterator[str]:
        for option, parameter in inspect.signature(make).parameters.items():
            kind = parameter.annotation
            if kind in _NUMERIC:
                yield prefix + option
            elif option in ("window", "search", "loss_test"):
                yield from of(kind, f"{prefix}{option}.")
            elif option == "test":
                yield from of(_test_of(name), f"{prefix}test.")

    return set(of(_function(name)))


def _function(name: str) -> Callable[..., Any]:
    return getattr(sasa_optax, name.removesuffix("_centred"))


def _test_of(name: str) -> Callable[..., Any]:
    return _TESTS.get(name, sasa_optax.ZeroMeanTest)


def made(name: str, numbers: Numbers, **others: Any) -> Optimizer:
    """The optimizer of this name in `PAIRS` with these numbers and other arguments."""
    objects = _OBJECTS | {"test": _test_of(name)}

    def arguments(numbers: Numbers) -> dict[str, Any]:
        return {
            key: objects[key](**arguments(x)) if isinstance(x, dict) else x
            for key, x in _nested(numbers).items()
        }

    own = arguments(numbers)
    if name == "sasa_plus_centred":
        momentum = own["momentum"], own["nu"]
        others = {"statistic": sasa_optax.centred_statistic(*momentum)} | others
    optimizer = _function(name)(**own | others)
    if name in (*SERVOS, "average_iterates", "reduce_on_stationarity"):
        optimizer = optax.chain(optax.sgd(0.5), optimizer)
    return optax.with_extra_args_support(optimizer)


def step(optimizer: Optimizer, noise: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """A step on a noisy quadratic."""

    def loss(params: jax.Array) -> jax.Array:
        return squares(params - noise) / 2

    grads = params - noise
    updates, state = optimizer.update(
        grads, state, params, value=loss(params), grad=grads, value_fn=loss
    )
    return optax.apply_updates(params, updates), state


def after_a_run(name: str, numbers: Numbers) -> tuple[Any, Any]:
    """The parameters and the state after 64 steps, which soon become stationary."""
    optimizer = made(name, numbers)
    params = jnp.ones(3)
    state: Any = optimizer.init(params)
    if name in SERVOS:
        state = in_midrun(state, params)

    def one(carry: Any, noise: jax.Array) -> Any:
        return step(optimizer, noise, *carry), None

    return jax.lax.scan(one, (params, state), _NOISE)[0]
