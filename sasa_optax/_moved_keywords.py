"""Errors that name the object in which an option lives."""

import functools
import inspect
from collections.abc import Callable, Container
from typing import Any, ParamSpec, TypeVar

from sasa_optax._line_search import LineSearch
from sasa_optax._stationarity import NAMED
from sasa_optax._window import Window

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Keywords without a field of that name, from when all options were keywords.
_RENAMED = {"search_direction": "direction", "search_interval": "interval"}


def _place(option: str, arguments: Container[str], test: Any) -> str | None:
    """The argument whose object has the option as a field."""
    asked = NAMED.get(test) if isinstance(test, str) else type(test)
    # The test that was asked for comes before the others.
    tests = sorted(NAMED.values(), key=lambda kind: kind is not asked)
    kinds = [("window", Window), ("search", LineSearch), *(("test", t) for t in tests)]
    for argument, kind in kinds:
        if argument in arguments and option in inspect.signature(kind).parameters:
            return f"{argument}=sasa_optax.{kind.__name__}({option}=...)"
    return None


def names_moved_keywords(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Adds to the TypeError of an option's keyword the object that has it as a field.

    Raises:
      TypeError: if the function is called with the keyword.
    """
    accepted = inspect.signature(function).parameters
    default = accepted["test"].default if "test" in accepted else None

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        for name in kwargs.keys() - accepted.keys():
            test = kwargs.get("test", default)
            if place := _place(_RENAMED.get(name, name), accepted, test):
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument "
                    f"{name!r}: write {place}."
                )
        return function(*args, **kwargs)

    return checked
