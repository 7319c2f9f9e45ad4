"""Checks of arguments, with errors where the user made the mistake.

Traced values pass. `optax.inject_hyperparams` traces numbers after it has passed the
same numbers through these checks in its `init`.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sasa_optax._types import DType, Numeric

_LARGEST = np.iinfo(np.int32).max


def _scalar(name: str, value: Any, allowed: str) -> np.ndarray | None:
    """``value`` as a concrete real scalar; None if it is traced."""
    if isinstance(value, Tracer):
        return None
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    is_real = array.dtype.kind in "iuf" or array.dtype.name == "bfloat16"
    if array.ndim or not is_real:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    return array


def number(name: str, value: Numeric, interval: str) -> None:
    """Checks a real scalar against an interval such as "(0, 1]"."""
    allowed = f"a number in {interval}"
    array = _scalar(name, value, allowed)
    if array is None:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    x = float(array)
    above = x >= low if interval[0] == "[" else x > low
    below = x <= high if interval[-1] == "]" else x < high
    if not (above and below and math.isfinite(x)):
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def integer(name: str, value: Numeric, at_least: int) -> None:
    """Checks an integer that counters, which are int32, are compared with."""
    allowed = f"an integer of at least {at_least}"
    array = _scalar(name, value, allowed)
    if array is None:
        return
    if array.dtype.kind not in "iu" or int(array) < at_least:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    if int(array) > _LARGEST:
        raise ValueError(
            f"{name} must be an integer of at most {_LARGEST}, got {value!r}."
        )


def static_integer(name: str, value: Any, at_least: int) -> int:
    """As `integer`, for what fixes shapes or defaults and so cannot be traced."""
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} must be a Python integer, got a traced value ({value}). Under "
            f"optax.inject_hyperparams, name it in static_args."
        )
    integer(name, value, at_least)
    return int(value)


def fields(options: Any, **allowed: str | int) -> None:
    """Checks fields against an interval, or as integers of at least a number.

    None passes where it is the default.
    """
    for name, bound in allowed.items():
        if getattr(options, name) is None and getattr(type(options), name) is None:
            continue
        if isinstance(bound, str):
            number(name, getattr(options, name), bound)
        else:
            integer(name, getattr(options, name), bound)


def momentum(
    momentum: Numeric = 0.0, nu: Numeric = 1.0, weight_decay: Numeric = 0.0
) -> None:
    """Checks the options of quasi-hyperbolic momentum and of coupled weight decay."""
    number("momentum", momentum, "[0, 1)")
    number("nu", nu, "[0, 1]")
    number("weight_decay", weight_decay, "[0, inf)")


def choice(name: str, value: Any, choices: Iterable[str], *others: str) -> None:
    """Checks a name. The error also says what else is allowed."""
    if not isinstance(value, str) or value not in choices:
        allowed = " or ".join([*map(repr, choices), *others])
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def learning_rate(value: Any, *, allow_schedule: bool) -> None:
    if not callable(value):
        number("learning_rate", value, "(0, inf)")
    elif not allow_schedule:
        raise ValueError(
            f"learning_rate must be a number in (0, inf), got the schedule {value!r}."
        )


def params(params: optax.Params | None) -> optax.Params:
    if params is None:
        raise ValueError(
            "update needs the current parameters: call "
            "`updates, state = optimizer.update(grads, state, params)`."
        )
    return params


def state(state: Any, kind: type) -> None:
    if not isinstance(state, kind):
        name = "tuple" if kind is tuple else f"sasa_optax.{kind.__name__}"
        raise ValueError(
            f"The state must be a {name}, got a "
            f"{type(state).__name__}. A state fits the optimizer whose `init` made it, "
            "and another one only if `average` and `statistic` are the same: see "
            "docs/checkpointing.md."
        )


def instance(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a sasa_optax.{kind.__name__}, got {value!r}.")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def axis_name(value: Any, name: str = "axis_name") -> None:
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(isinstance(axis, str) for axis in names):
        raise ValueError(
            f"{name} must be the name of a mesh axis, a tuple of names, or None, got "
            f"{value!r}."
        )


def exceeds(
    name: str, value: Any, other_name: str, other: Any, or_equals: bool = False
) -> None:
    """Checks that an argument is greater than another, or at least the other."""
    if any(isinstance(x, Tracer) for x in (value, other)):
        return
    if not (value > other or (or_equals and value == other)):
        how = "at least" if or_equals else "greater than"
        raise ValueError(
            f"{name} must be {how} {other_name}, got {name}={value} and "
            f"{other_name}={other}."
        )


def scalar(name: str, value: Any, dtype: DType) -> jax.Array:
    """``value`` as an array of shape () and of ``dtype``."""
    array = jnp.asarray(value)
    if array.shape:
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}.")
    return array.astype(dtype)


def loss(name: str, value: Any) -> jax.Array:
    """``value`` as an array, which must be a floating-point scalar."""
    if isinstance(value, tuple | list | dict):
        raise ValueError(
            f"{name} must be a scalar, got a {type(value).__name__}: if the loss comes "
            "with auxiliary output, give the loss alone."
        )
    array = jnp.asarray(value)
    if array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be a floating-point scalar, got shape {array.shape} and "
            f"dtype {array.dtype}."
        )
    return array
