"""docs/from-statopt.md: its text, its tables, what its code does, and its arguments."""

import contextlib
import dataclasses
import functools
import inspect
import io
import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

import sasa_optax

ROOT = pathlib.Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "from-statopt.md").read_text()
PROSE = " ".join(GUIDE.split())


def tables() -> list[list[list[str]]]:
    """The tables as lists of rows, which are lists of cells. The header is a row."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in map(str.strip, GUIDE.splitlines()):
        if not line.startswith("|"):
            inside = False
        elif not set(line) <= set("|-: "):
            if not inside:
                tables.append([])
            tables[-1].append([cell.strip() for cell in line[1:-1].split("|")])
            inside = True
    return tables


def table(first_cell: str) -> list[list[str]]:
    return next(table for table in tables() if table[0][0] == first_cell)


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@functools.cache
def run_guide() -> dict[str, Any]:
    """The names that the code of the guide leaves behind, and what it printed."""
    loop, manual = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(loop, names)
    after_the_switch = dict(names)
    exec(manual, after_the_switch)
    return names | {"printed": printed.getvalue(), "manual": after_the_switch}


# What to write here is a path: the name of an argument, or, behind a dot, that of a
# field of the object that is the argument.

FUNCTIONS = ("qhm", "sasa_plus", "slope", "ssls", "salsa")
_REQUIRES_A_RATE = ("qhm", "sasa_plus", "slope")
_OPTIONS: dict[str, type] = {
    "window": sasa_optax.Window,
    "search": sasa_optax.LineSearch,
    "search.loss_test": sasa_optax.SlopeTest,
}


def options_class(function: str, path: str) -> type:
    """The class of the object at a path."""
    own = sasa_optax.SlopeTest if function == "slope" else sasa_optax.ZeroMeanTest
    return own if path == "test" else _OPTIONS[path]


def signature(function: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(sasa_optax, function)).parameters


def paths(function: str) -> dict[str, Any]:
    """The paths that a call can set, with their defaults."""
    found: dict[str, Any] = {}
    for name, parameter in signature(function).items():
        found[name] = parameter.default
        if name == "test" or name in _OPTIONS:
            options = options_class(function, name)()
            assert parameter.default in (options, None, "slope")
            found |= _fields(name, options)
    return found


def _fields(path: str, options: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        default = getattr(options, field.name)
        found[f"{path}.{field.name}"] = default
        if dataclasses.is_dataclass(default):
            found |= _fields(f"{path}.{field.name}", default)
    return found


def _keywords(function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call that sets these paths to these values."""
    names: dict[str, dict[str, Any]] = {}
    for path, value in arguments.items():
        name, _, field = path.partition(".")
        names.setdefault(name, {})[field] = value
    return {
        name: fields[""] if "" in fields else _nested(function, name, fields)
        for name, fields in names.items()
    }


def _nested(function: str, path: str, fields: Mapping[str, Any]) -> Any:
    made: dict[str, Any] = {}
    for name, value in fields.items():
        field, _, rest = name.partition(".")
        inner = f"{path}.{field}"
        made[field] = _nested(function, inner, {rest: value}) if rest else value
    return options_class(function, path)(**made)


def make(
    function: str, arguments: Mapping[str, Any] = types.MappingProxyType({})
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with these values at these paths."""
    required = {"learning_rate": 0.5} if function in _REQUIRES_A_RATE else {}
    make = getattr(sasa_optax, function)
    keywords = _keywords(function, arguments)
    return optax.with_extra_args_support(make(**required | keywords))


def always_stationary(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
    """A test that fires whenever it is asked; its mean is the sum of the samples."""
    return sasa_optax.TestResult(mean=jnp.sum(samples.values), stationary=True)
