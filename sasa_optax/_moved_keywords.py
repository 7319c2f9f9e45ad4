"""Errors that say where an option now lives."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sasa_optax._stationarity import NAMED

_P = ParamSpec("_P")
_T = TypeVar("_T")

# The argument, the class, and the fields whose names are the old keywords.
_OBJECTS = {
    "window=sasa_optax.Window": (
        *("leak_ratio", "min_samples", "test_interval", "warmup_steps", "max_window"),
        "scale_min_samples",
    ),
    "test=sasa_optax.EquivalenceTest": ("delta",),
    "test=sasa_optax.ZeroMeanTest": ("significance", "variance"),
    "test=sasa_optax.SlopeTest": ("log_steps",),
    "search=sasa_optax.LineSearch": (
        *("smoothing", "sufficient_decrease", "increase_factor", "decrease_factor"),
        *("max_trials", "max_learning_rate"),
    ),
}
_PLACES = {
    name: f"{place}({name}=...)" for place, names in _OBJECTS.items() for name in names
} | {
    "search_direction": "search=sasa_optax.LineSearch(direction=...)",
    "search_interval": "search=sasa_optax.LineSearch(interval=...)",
}


def names_moved_keywords(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Adds to the TypeError of an option's keyword the object that has it as a field.

    Raises:
      TypeError: if the function is called with the keyword.
    """
    accepted = inspect.signature(function).parameters
    kind = NAMED.get(accepted["test"].default) if "test" in accepted else None

    def place(name: str) -> str:
        # The option is that of the function's own test, if that test has it.
        if kind is not None and hasattr(kind, name):
            return f"test=sasa_optax.{kind.__name__}({name}=...)"
        return _PLACES[name]

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        for name in kwargs.keys() & _PLACES.keys() - accepted.keys():
            raise TypeError(
                f"{function.__name__}() got an unexpected keyword argument {name!r}: "
                f"write {place(name)}."
            )
        return function(*args, **kwargs)

    return checked
