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

from sasa_optax._types import Numeric


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
    allowed = f"an integer of at least {at_least}"
    array = _scalar(name, value, allowed)
    if array is None:
        return
    if array.dtype.kind not in "iu" or int(array) < at_least:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def static_integer(name: str, value: Any, at_least: int) -> int:
    """As `integer`, for what fixes shapes or defaults and so cannot be traced."""
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} must be a Python integer, got a traced value ({value}). Under "
            f"optax.inject_hyperparams, name it in static_args."
        )
    integer(name, value, at_least)
    return int(value)


def choice(name: str, value: Any, choices: Iterable[str], *others: str) -> None:
    """Checks a name. The error also says what else is allowed."""
    if not isinstance(value, str) or value not in choices:
        allowed = " or ".join([*map(repr, choices), *others])
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def learning_rate(value: Any, *, allow_schedule: bool) -> None:
    if callable(value):
        if allow_schedule:
            return
        raise ValueError(
            f"learning_rate must be a number in (0, inf), got the schedule {value!r}."
        )
    number("learning_rate", value, "(0, inf)")


def params(params: optax.Params | None) -> optax.Params:
    if params is None:
        raise ValueError(
            "update needs the current parameters: call "
            "`updates, state = optimizer.update(grads, state, params)`."
        )
    return params


def instance(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a sasa_optax.{kind.__name__}, got {value!r}.")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def axis_name(name: str, value: Any) -> None:
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(isinstance(axis, str) for axis in names):
        raise ValueError(
            f"{name} must be the name of a mesh axis, a tuple of names, or None, got "
            f"{value!r}."
        )


def exceeds(name: str, value: Any, other_name: str, other: Any) -> None:
    _compare(name, value, "greater than", other_name, other)


def at_least(name: str, value: Any, other_name: str, other: Any) -> None:
    _compare(name, value, "at least", other_name, other)


def _compare(name: str, value: Any, how: str, other_name: str, other: Any) -> None:
    if any(isinstance(x, Tracer) for x in (value, other)):
        return
    holds = value > other if how == "greater than" else value >= other
    if not holds:
        raise ValueError(
            f"{name} must be {how} {other_name}, got {name}={value} and "
            f"{other_name}={other}."
        )


def scalar(name: str, value: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
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
