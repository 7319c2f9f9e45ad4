"""docs/from-statopt.md: its tables are true, its code runs, its differences are real.

What is said here of statopt 0.2 was read in its source, and counted in runs of it.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import math
import pathlib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import sasa_optax

_ROOT = pathlib.Path(__file__).parent.parent
_GUIDE = (_ROOT / "docs" / "from-statopt.md").read_text()
_PROSE = " ".join(_GUIDE.split())

# The classes of statopt, with the arguments and defaults in their code.
_QHM: dict[str, Any] = {
    "params": None,
    "lr": -1,
    "momentum": 0,
    "qhm_nu": 1,
    "weight_decay": 0,
}
_TESTS: dict[str, Any] = {
    "warmup": 1000,
    "drop_factor": 10,
    "significance": 0.05,
    "var_mode": "mb",
    "leak_ratio": 8,
    "minN_stats": 1000,
    "testfreq": 100,
    "logstats": 0,
}
_SSLS: dict[str, Any] = {
    **_QHM,
    "lr": 1e-3,
    "gamma": 0.1,
    "ls_sdc": 0.05,
    "ls_inc": 2.0,
    "ls_dec": 0.5,
    "ls_max": 2,
    "ls_evl": 1,
    "ls_dir": "g",
    "ls_cos": 0,
}
_STATOPT = {
    "QHM": _QHM,
    "SASA": _QHM | _TESTS,
    "SLOPE": _QHM | _TESTS | {"warmup": 100, "drop_factor": 2, "var_mode": "linear"},
    "SSLS": _SSLS,
    "SALSA": _SSLS | {"auto_switch": 1} | _TESTS | {"warmup": 0},
}
_STATOPT_CHOICES = {
    "var_mode": {"mb", "olbm", "iid", "linear", "log"},
    "ls_dir": {"g", "d"},
}
# A dash in the guide's tables: no such argument.
_ABSENT = "\N{EN DASH}"
# What its optimizers keep in `optimizer.state` for the user to see.
_STATOPT_STATE = {
    *("lr", "nSteps", "stats_x1d", "stats_ld2", "stats_val", "stats_test"),
    *("stats_stationary", "stats_mean", "stats_lb", "stats_ub", "conf", "slope"),
    *("composite_test", "switched", "cosine", "ls_eta", "ls_cnt"),
}
# How often it called `Tensor.item` in a step: the row of the table, P, T, the count.
_STATOPT_READS = [
    ("SASA", 1, 0, 2),
    ("SASA", 7, 0, 14),
    ("SLOPE", 3, 0, 4),
    ("SLOPE", 7, 0, 8),
    ("SSLS", 3, 1, 17),
    ("SSLS", 3, 2, 21),
    ("SSLS", 7, 5, 69),
    ("SALSA, searching", 3, 1, 23),
    ("SALSA, searching", 3, 2, 27),
    ("SALSA, searching", 7, 2, 59),
    ("SALSA, switched", 2, 0, 4),
]
_STATOPT_READS_AT_A_TEST = {
    "SASA": [4],
    "SLOPE": [3],
    "SSLS": [0],
    "SALSA, searching": [4, 3],
    "SALSA, switched": [4],
}

# Small enough that a test comes within a few steps.
_SMALL = sasa_optax.Window(min_samples=4, test_interval=1, leak_ratio=1, max_window=64)


# The guide's tables.


def _tables() -> list[list[list[str]]]:
    """Each a list of rows, each a list of cells; the first is the header."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in map(str.strip, _GUIDE.splitlines()):
        if not line.startswith("|"):
            inside = False
        elif not set(line) <= set("|-: "):
            if not inside:
                tables.append([])
            tables[-1].append([cell.strip() for cell in line[1:-1].split("|")])
            inside = True
    return tables


def _table(first_cell: str) -> list[list[str]]:
    return next(table for table in _tables() if table[0][0] == first_cell)


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


class _Row(NamedTuple):
    """A row of a table of arguments, for one class and one function."""

    statopt_class: str
    statopt_name: str
    statopt_default: str
    write_here: str
    function: str
    our_default: str


def _arguments() -> Iterator[_Row]:
    ours = dict(zip(_STATOPT, _FUNCTIONS, strict=True))
    for first_cell in ("all classes", "tests", "line search"):
        header, *rows = _table(first_cell)
        column = {name: i for i, cell in enumerate(header) for name in _code(cell)}
        write_here = header.index("write here")
        for row in rows:
            for statopt_class, function in ours.items():
                if statopt_class in column:
                    yield _Row(
                        statopt_class,
                        _code(row[0])[0],
                        row[column[statopt_class]],
                        row[write_here],
                        function,
                        row[column[function]],
                    )


def _default(cell: str) -> Any:
    return None if cell == "required" else ast.literal_eval(_code(cell)[0])


def _translations(row: _Row) -> dict[Any, Any]:
    pairs = re.findall(r"`([^`]+)` → `([^`]+)`", row.write_here)
    return {ast.literal_eval(old): ast.literal_eval(new) for old, new in pairs}


def _translated(row: _Row) -> bool:
    return row.our_default not in (_ABSENT, "required")


# What to write here is a path: that of an argument, or, behind a dot, of a field of the
# object that is the argument.

_FUNCTIONS = ("qhm", "sasa_plus", "slope", "ssls", "salsa")
_OPTIONS: dict[str, type] = {
    "window": sasa_optax.Window,
    "search": sasa_optax.LineSearch,
    "search.loss_test": sasa_optax.SlopeTest,
}


def _options(function: str, path: str) -> type:
    """The class of the object at a path."""
    own = sasa_optax.SlopeTest if function == "slope" else sasa_optax.ZeroMeanTest
    return own if path == "test" else _OPTIONS[path]


def _signature(function: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(sasa_optax, function)).parameters


def _paths(function: str) -> dict[str, Any]:
    """All that can be written in a call, with the defaults."""
    found: dict[str, Any] = {}
    for name, parameter in _signature(function).items():
        found[name] = parameter.default
        if name == "test" or name in _OPTIONS:
            options = _options(function, name)()
            assert parameter.default in (options, None)
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


def _to_write(row: _Row) -> list[str]:
    """The paths in a row: the first is for all functions, others are for the named."""
    first = _code(row.write_here)[:1]
    also = re.findall(r"in `(\w+)` also `([\w.]+)`", row.write_here)
    return first + [path for function, path in also if function == row.function]


def _keywords(function: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call, from paths and values."""
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
    return _options(function, path)(**made)


def _make(
    function: str, arguments: Mapping[str, Any] = types.MappingProxyType({})
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, from paths and values."""
    required = {"learning_rate": 0.5} if function in _REQUIRES_A_RATE else {}
    make = getattr(sasa_optax, function)
    keywords = _keywords(function, arguments)
    return optax.with_extra_args_support(make(**required | keywords))


_REQUIRES_A_RATE = ("qhm", "sasa_plus", "slope")


def test_every_argument_of_statopt_is_in_the_tables_with_its_default() -> None:
    stated: dict[str, dict[str, Any]] = {name: {} for name in _STATOPT}
    for row in _arguments():
        if row.statopt_default != _ABSENT:
            assert row.statopt_name not in stated[row.statopt_class], row
            default = _default(row.statopt_default)
            stated[row.statopt_class][row.statopt_name] = default
    assert stated == _STATOPT


def test_every_argument_to_write_here_exists_and_has_the_default_stated() -> None:
    for row in _arguments():
        defaults = _paths(row.function)
        if row.our_default == _ABSENT:
            assert not set(_to_write(row)) & set(defaults), row
        for path in _to_write(row) if row.our_default != _ABSENT else []:
            if row.our_default == "required":
                assert defaults[path] is inspect.Parameter.empty, row
            elif defaults[path] is not None:
                assert defaults[path] == _default(row.our_default), row


@functools.cache
def _program(function: str, path: str = "", value: Any = None) -> tuple[str, Any]:
    """What a step is compiled from, and the state at the start."""
    optimizer = _make(function, {path: value} if path else {})
    params = jnp.ones(2)
    state = optimizer.init(params)

    def loss(params: jax.Array) -> jax.Array:
        return jnp.sum(params**2)

    def update(grads: Any, state: Any, params: Any, value: Any) -> Any:
        return optimizer.update(grads, state, params, value=value, value_fn=loss)

    program = jax.make_jaxpr(update)(params, state, params, jnp.float32(1.0))
    return str(program), [np.asarray(const).tolist() for const in program.consts]


def test_a_default_that_depends_is_what_is_stated() -> None:
    """Those are None in the signature; written out they make the same program."""
    found = set()
    for row in _arguments():
        path = _code(row.write_here)[0] if _translated(row) else ""
        if path and _paths(row.function)[path] is None:
            stated = _default(row.our_default)
            left_out = _program(row.function)
            assert left_out == _program(row.function, path, stated), row
            if path not in found:
                other = stated // 2 if isinstance(stated, int) else stated / 2
                assert left_out != _program(row.function, path, other), row
            found.add(path)
    assert found == {
        *("window.min_samples", "window.test_interval"),
        *("search.smoothing", "search.sufficient_decrease"),
    }


@pytest.mark.parametrize("function", ["sasa_plus", "salsa"])
def test_the_test_that_is_left_out_is_that_of_the_table(function: str) -> None:
    assert _signature(function)["test"].default is None
    significance = _paths(function)["test.significance"]
    left_out = _program(function)
    assert left_out == _program(function, "test", sasa_optax.ZeroMeanTest())
    assert left_out != _program(function, "test.significance", significance / 2)


def test_values_to_translate_are_those_of_statopt_and_ours() -> None:
    seen = set()
    for row in _arguments():
        if row.statopt_default == _ABSENT:
            continue
        for old, new in _translations(row).items():
            seen.add((row.statopt_name, old))
            _make(row.function, {_code(row.write_here)[0]: new})
            if row.statopt_name == "drop_factor":
                assert new == 1 / old
            else:
                assert old in _STATOPT_CHOICES[row.statopt_name]
    complete = {(name, x) for name, xs in _STATOPT_CHOICES.items() for x in xs}
    assert seen == complete | {("drop_factor", 10), ("drop_factor", 2)}


def _written_in(function: str, call: ast.Call, prefix: str = "") -> dict[str, Any]:
    """The paths and values of a call in the guide."""
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        path = f"{prefix}{keyword.arg}"
        if isinstance(keyword.value, ast.Call):
            name = ast.unparse(keyword.value.func)
            assert name == _options(function, path).__name__
            found |= _written_in(function, keyword.value, f"{path}.")
        else:
            found[path] = ast.literal_eval(keyword.value)
    return found


def test_the_defaults_of_statopt_are_written_as_the_table_says() -> None:
    calls = {}
    for statopt_class, here, call in _table("class of statopt")[1:]:
        function = _code(here)[0]
        parsed = ast.parse(_code(call)[0]).body[0]
        assert isinstance(parsed, ast.Expr)
        assert isinstance(parsed.value, ast.Call)
        assert ast.unparse(parsed.value.func) == function
        given = _written_in(function, parsed.value)
        calls[_code(statopt_class)[0]] = given
        _make(function, given)
    assert set(calls) == set(_STATOPT)
    for row in _arguments():
        if _translated(row) and row.statopt_default != _ABSENT:
            wanted = _default(row.statopt_default)
            wanted = _translations(row).get(wanted, wanted)
            for path in _to_write(row):
                given = calls[row.statopt_class]
                assert given.get(path, _default(row.our_default)) == wanted, row


def test_what_is_new_here_is_listed() -> None:
    mapped = {path for row in _arguments() for path in _to_write(row)}
    # An object is not new where one of its fields is not.
    mapped |= {path.rpartition(".")[0] for path in mapped}
    mapped |= {path.partition(".")[0] for path in mapped}
    offered = {path for function in _FUNCTIONS for path in _paths(function)}
    new = {path for path in offered if path not in mapped and path.count(".") < 2}
    (listed,) = re.findall(r"^[^|\n]*\bnew here\b.*?\n\n", _GUIDE, re.M | re.S | re.I)
    assert set(_code(listed)) - mapped == new


def test_the_table_of_the_state_names_what_there_is() -> None:
    keys = sasa_optax.metrics(sasa_optax.salsa().init(jnp.ones(2)))
    left, right = set(), set()
    for statopt_names, here in _table("`optimizer.state[…]`")[1:]:
        left |= set(_code(statopt_names))
        right |= {name for name in _code(here) if name.isidentifier()}
    assert left == _STATOPT_STATE
    assert right - {"slope"} <= set(keys)


def test_the_newest_sample_is_where_the_guide_says() -> None:
    optimizer = sasa_optax.sasa_plus(0.5, test=_always_stationary)
    params = jnp.array([1.0, 2.0])
    updates, opt_state = optimizer.update(params, optimizer.init(params), params)
    where = dict(_table("`optimizer.state[…]`"))
    expression, window = _code(where["`stats_val`"])
    names = {"opt_state": opt_state, "optax": optax}
    sample = eval(expression, {"window": eval(window, names)})
    after = np.sum(np.asarray(params + updates) ** 2)
    np.testing.assert_allclose(sample, (5.0 - after) / (2 * 0.5), rtol=1e-6)


def test_statopts_reads_are_what_the_table_says() -> None:
    each_step, at_a_test = {}, {}
    for row, formula, tests in _table("reads")[1:]:
        name = row.replace("`", "")
        each_step[name] = _code(formula)[0]
        at_a_test[name] = [int(count) for count in _code(tests)]
    assert at_a_test == _STATOPT_READS_AT_A_TEST
    for name, tensors, trials, count in _STATOPT_READS:
        assert eval(each_step[name], {"P": tensors, "T": trials}) == count
    example = eval(each_step["SALSA, searching"], {"P": 100, "T": 1})
    assert f"is {example} times a step for P = 100 and T = 1." in _PROSE


def test_every_test_and_page_that_is_named_exists() -> None:
    arguments = {"test_interval", *sasa_optax.metrics(sasa_optax.salsa().init(()))}
    names = set(re.findall(r"`(test_\w+)`", _GUIDE)) - arguments
    assert len(names) == 20
    for name in names:
        assert callable(globals().get(name)), name
    for target in re.findall(r"\]\(([^)#:]+)\)", _GUIDE):
        assert (_ROOT / "docs" / target).exists(), target


def test_the_traces_are_those_that_are_reproduced() -> None:
    traces = {path.stem for path in (_ROOT / "tests" / "golden").glob("*.npz")}
    listed = _PROSE[_PROSE.index("step by step:") : _PROSE.index("## The loop")]
    assert set(_code(listed)) == traces
    assert "eight traces" in _PROSE
    assert len(traces) == 8
    reproduced = (_ROOT / "tests" / "test_golden.py").read_text()
    assert all(f'"{name}"' in reproduced for name in traces)


# The guide's code.


@pytest.fixture(scope="module")
def guide() -> dict[str, Any]:
    """The names that the code of the guide leaves behind, and what it printed."""
    loop, manual = re.findall(r"```python\n(.*?)```", _GUIDE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(loop, names)
    after_the_switch = dict(names)
    exec(manual, after_the_switch)
    return names | {"printed": printed.getvalue(), "manual": after_the_switch}


def test_the_loop_of_the_guide_switches_and_drops(guide: dict[str, Any]) -> None:
    history = guide["history"]
    assert history.switch is not None
    assert history.switch.learning_rate > 1.0
    assert len(history.drops) == 1
    assert guide["printed"].splitlines() == history.explain().splitlines()
    assert history.rows[-1]["loss"] < history.rows[0]["loss"] / 2


def test_the_switch_by_hand_takes_the_rate_along(guide: dict[str, Any]) -> None:
    manual = guide["manual"]
    state, metrics = manual["opt_state"], sasa_optax.metrics(manual["opt_state"])
    assert float(metrics["learning_rate"]) == float(manual["rate"])
    assert int(metrics["step"]) == 0
    # The momentum starts afresh.
    assert not any(trace.any() for trace in jax.tree.leaves(state.trace))


def test_a_group_may_have_a_weight_decay_of_its_own() -> None:
    mask = {"w": True, "b": False}
    optimizer = optax.chain(
        optax.masked(optax.add_decayed_weights(1e-3), mask),
        sasa_optax.sasa_plus(0.5, test=_always_stationary),
    )
    params = {"w": jnp.full(2, 3.0), "b": jnp.full(2, 2.0)}
    state = optimizer.init(params)
    expected, trace = {"w": 3.0, "b": 2.0}, {"w": 0.0, "b": 0.0}
    for gradient in (0.1, -0.2, 0.3):
        grads = jax.tree.map(lambda x, g=gradient: jnp.full_like(x, g), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, decay in (("w", 1e-3), ("b", 0.0)):
            decayed = gradient + decay * expected[name]
            trace[name] = 0.1 * decayed + 0.9 * trace[name]
            expected[name] -= 0.5 * trace[name]
    for name, x in expected.items():
        np.testing.assert_allclose(params[name], x, rtol=1e-6)
    assert int(sasa_optax.metrics(state)["step"]) == 3


def test_a_group_may_have_an_optimizer_of_its_own_or_none() -> None:
    params = {"w": jnp.ones(2), "b": jnp.ones(2), "frozen": jnp.ones(2)}
    labels = {name: name for name in params}
    optimizers = {
        "w": sasa_optax.sasa_plus(1.0, momentum=0.0, test=_always_stationary),
        "b": sasa_optax.sasa_plus(0.1, momentum=0.0, test=_always_stationary),
        "frozen": optax.set_to_zero(),
    }
    optimizer = optax.partition(optimizers, labels)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    moved = {name: float(update[0]) for name, update in updates.items()}
    assert moved == pytest.approx({"w": -1.0, "b": -0.1, "frozen": 0.0})
    rates = [k for k in sasa_optax.metrics(state) if k.endswith("learning_rate")]
    assert len(rates) == 2

    def value_fn(params: Any) -> jax.Array:
        return sum(jnp.sum(x**2) for x in params.values())

    searching = optax.partition(optimizers | {"w": sasa_optax.ssls()}, labels)
    with pytest.raises(TypeError, match="MaskedNode"):
        searching.update(params, searching.init(params), params, value_fn=value_fn)


def test_a_schedule_is_for_all_but_the_line_searches() -> None:
    schedule = optax.linear_schedule(0.1, 1.0, 10)
    for function in ("qhm", "sasa_plus", "slope"):
        _make(function, {"learning_rate": schedule})
    for function in ("ssls", "salsa"):
        with pytest.raises(ValueError, match="learning_rate must be a number"):
            _make(function, {"learning_rate": schedule})


# Against what statopt recorded.


class _Test(NamedTuple):
    """A test that statopt made, with the samples that it judged."""

    values: np.ndarray
    num_drops: int
    half_width: float
    stationary: bool


def _recorded(name: str) -> tuple[str | None, list[_Test]]:
    """The variance mode of a trace, and its tests."""
    with np.load(_ROOT / "tests" / "golden" / f"{name}.npz") as arrays:
        trace = dict(arrays)
    meta = json.loads(str(trace["meta"]))
    tests, last_drop, num_drops = [], 0, 0
    for step, _, lower, upper, stationary in trace["tests"]:
        kept = -(-(int(step) - last_drop) // meta["statopt_kwargs"]["leak_ratio"])
        values = trace["statistic"][int(step) - kept : int(step)]
        tests.append(_Test(values, num_drops, (upper - lower) / 2, bool(stationary)))
        if stationary:
            last_drop, num_drops = int(step), num_drops + 1
    return meta["var_mode"], tests


@functools.partial(jax.jit, static_argnums=0)
def _judge(
    variance: str, values: jax.Array, num_samples: jax.Array, num_drops: jax.Array
) -> sasa_optax.TestResult:
    step = jnp.zeros((), jnp.int32)
    samples = sasa_optax.Samples(values, None, num_samples, step, num_drops)
    return sasa_optax.ZeroMeanTest(variance=variance)(samples)


def _ours(tests: list[_Test], variance: str) -> tuple[np.ndarray, list[bool]]:
    """The half-widths and decisions of our test, on the samples of statopt's."""
    results = []
    for test in tests:
        num_samples = len(test.values)
        padded = np.pad(test.values, (0, 1400 - num_samples))
        counts = np.int32(num_samples), np.int32(test.num_drops)
        results.append(jax.device_get(_judge(variance, padded, *counts)))
    widths = [result.upper - result.lower for result in results]
    return np.array(widths) / 2, [bool(result.stationary) for result in results]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sasa_plus_iid", "salsa_iid"])
def test_mb_is_the_variance_of_independent_samples(name: str) -> None:
    var_mode, tests = _recorded(name)
    # No mode was given, so it was the default, "mb".
    assert var_mode is None
    assert _STATOPT["SASA"]["var_mode"] == _STATOPT["SALSA"]["var_mode"] == "mb"
    recorded = np.array([test.half_width for test in tests])
    iid, decisions = _ours(tests, "iid")
    np.testing.assert_allclose(iid, recorded, rtol=1e-8)
    assert decisions == [test.stationary for test in tests]
    # These are correlated samples, whose mean is less certain.
    batch_means, _ = _ours(tests, "batch_means")
    assert np.median(batch_means / recorded) > 1.5


def _dof(num_samples: int) -> tuple[int, int]:
    """Of batch means: in statopt, and by the number of batches."""
    length = math.isqrt(num_samples)
    return length - 1, num_samples // length - 1


def _quantile(dof: int | np.ndarray) -> Any:
    return scipy.stats.t.ppf(0.975, dof)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sasa_plus_batch_means", "salsa_batch_means"])
def test_batch_means_have_as_many_degrees_of_freedom_as_batches_less_one(
    name: str,
) -> None:
    var_mode, tests = _recorded(name)
    assert var_mode == "bm"
    widths, decisions = _ours(tests, "batch_means")
    theirs, right = np.array([_dof(len(test.values)) for test in tests]).T
    errors = []
    for values, *_ in tests:
        length = math.isqrt(len(values))
        batches = values[: len(values) // length * length].reshape(-1, length)
        squares = np.sum((batches.mean(axis=1) - values.mean()) ** 2)
        variance = length / (len(batches) - 1) * squares
        errors.append(math.sqrt(variance / len(values)))
    recorded = np.array([test.half_width for test in tests])
    np.testing.assert_allclose(recorded, errors * _quantile(theirs), rtol=1e-8)
    np.testing.assert_allclose(widths, errors * _quantile(right), rtol=1e-6)
    # Now and then the two agree.
    assert np.mean(theirs != right) > 0.5
    assert 0.01 < np.abs(widths / recorded - 1).max() < 0.0165
    assert decisions == [test.stationary for test in tests]


def test_the_largest_error_of_statopts_degrees_of_freedom() -> None:
    # statopt tests no fewer, and our default window holds no more.
    sizes = np.arange(101, 16385)
    theirs, right = np.array([_dof(size) for size in sizes]).T
    errors = np.abs(_quantile(theirs) / _quantile(right) - 1)
    worst = errors.argmax()
    figure = f"{100 * errors[worst]:.1f} % at most ({sizes[worst]} samples)"
    assert f"up to 1.6 % in the golden traces and {figure}" in _PROSE


def test_the_rate_can_have_a_floor() -> None:
    with np.load(_ROOT / "tests" / "golden" / "sasa_plus_batch_means.npz") as trace:
        assert f"to {trace['lr'][-1]:.0e} in `sasa_plus_batch_means`" in _PROSE

    @jax.jit
    def rate_at_the_end(floor: float) -> jax.Array:
        optimizer = sasa_optax.sasa_plus(
            0.5, test=_always_stationary, min_learning_rate=floor, window=_SMALL
        )
        return _on_losses(optimizer, jnp.zeros(100))["learning_rate"][-1]

    # Which is the default.
    arguments = inspect.signature(sasa_optax.sasa_plus).parameters
    assert arguments["min_learning_rate"].default == 0.0
    assert rate_at_the_end(0.0) < 1e-15
    assert rate_at_the_end(0.02) == np.float32(0.02)


# What the runs are like.


def _always_stationary(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
    return sasa_optax.TestResult(mean=jnp.sum(samples.values), stationary=True)


def _warming_up(warmup_steps: Any) -> sasa_optax.Window:
    return dataclasses.replace(_SMALL, warmup_steps=warmup_steps)


def _statopt_slots(num_steps: int, leak_ratio: int) -> int:
    """Of its buffer, by the rule in the guide: so long since the last drop."""
    slots, end = 1000, 0
    for step in range(1, num_steps + 1):
        if end == slots:
            slots *= 2
        end += 1
        kept = -(-step // leak_ratio)
        if end - kept >= kept:
            end = kept
    return slots


def test_the_memory_of_samples_is_fixed_and_statopts_grows() -> None:
    optimizer = sasa_optax.sasa_plus(
        0.1, test=_always_stationary, window=_warming_up(10**6)
    )

    def num_bytes(state: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def step(state: Any, grads: jax.Array) -> Any:
        return optimizer.update(grads, state, jnp.ones(2))[1], None

    start, grads = optimizer.init(jnp.ones(2)), jnp.ones((3000, 2))
    state, _ = jax.jit(lambda start: jax.lax.scan(step, start, grads))(start)
    assert int(optax.tree.get(state, "window").total) == 3000
    assert num_bytes(state) == num_bytes(start)
    assert _statopt_slots(3000, leak_ratio=1) == 4000

    eight, all_of_them = _statopt_slots(10**6, 8), _statopt_slots(10**6, 1)
    assert f"need {eight} slots for {10**6 // 8} samples" in _PROSE
    assert f"with `leak_ratio=1` {all_of_them} for all" in _PROSE
    window = sasa_optax.Window()
    full = window.leak_ratio * window.max_window
    assert f"`leak_ratio * max_window` = {full} steps" in _PROSE


def _batches(guide: dict[str, Any], num_steps: int) -> list[tuple[Any, Any]]:
    """Those of the guide's loop, on the device."""
    images, labels = guide["images"], guide["labels"]
    starts = [32 * (step % 20) for step in range(1, num_steps + 1)]
    return [(images[i : i + 32], labels[i : i + 32]) for i in starts]


def test_steps_run_without_a_transfer(guide: dict[str, Any]) -> None:
    train_step, optimizer = guide["train_step"], guide["optimizer"]
    params = jax.tree.map(jnp.zeros_like, guide["params"])
    state, batches = optimizer.init(params), _batches(guide, 1200)
    # A CPU's memory is the host's, so there the guard sees one way only. For the
    # other: a compiled step could not wait for the host but by a callback.
    program = train_step.lower(params, state, *batches[0]).as_text()
    assert not re.search("callback|infeed|outfeed", program)
    with jax.transfer_guard("disallow"):
        for batch in batches:
            params, state, _ = train_step(params, state, *batch)
        with pytest.raises(Exception, match="host-to-device"):
            train_step(params, state, *map(np.asarray, batches[0]))
    metrics = sasa_optax.metrics(state)
    assert not bool(metrics["line_search_active"])
    assert int(metrics["num_drops"]) == 1


def test_nothing_is_printed(guide: dict[str, Any], capfd: Any) -> None:
    params = jax.tree.map(jnp.zeros_like, guide["params"])
    state = guide["optimizer"].init(params)
    for batch in _batches(guide, 1200):
        params, state, _ = guide["train_step"](params, state, *batch)
    jax.effects_barrier()
    metrics = jax.device_get(sasa_optax.metrics(state))
    assert not metrics["line_search_active"]
    assert metrics["num_drops"] == 1
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("average", [True, False])
def test_the_state_of_salsa_holds_momentum_and_average_and_no_other_copy(
    average: bool,
) -> None:
    def num_bytes(size: int) -> int:
        state = sasa_optax.salsa(average=average).init(jnp.zeros(size))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    assert num_bytes(20_000) - num_bytes(10_000) == (1 + average) * 4 * 10_000


def _search_once(
    trial_loss: Any, loss: Any, grad: float = 1.0, *, give_value: bool = True
) -> dict[str, float]:
    """The metrics after a step of SSLS from rate 1, where every trial has one loss."""
    optimizer, params = sasa_optax.ssls(1.0, momentum=0.0), jnp.zeros(1)

    def value_fn(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(x == params), loss, trial_loss).astype(loss.dtype)

    _, state = optimizer.update(
        jnp.full(1, grad),
        optimizer.init(params),
        params,
        value=loss if give_value else None,
        value_fn=value_fn,
    )
    return {name: float(x) for name, x in sasa_optax.metrics(state).items()}


# The rate after a step, by statopt's rule: of a first trial that is accepted, and of
# two that fail, or no descent.
_UP, _DOWN = 0.9 + 0.1 * 2.0, 0.9 + 0.1 * 0.5


def test_a_search_evaluates_the_loss_once_for_each_trial() -> None:
    loss = jnp.float32(5.0)
    for trial_loss, trials, rate in ((0.0, 1, _UP), (9.0, 2, _DOWN)):
        for give_value in (True, False):
            metrics = _search_once(trial_loss, loss, give_value=give_value)
            assert metrics["num_evaluations"] == trials + (not give_value)
            assert metrics["learning_rate"] == pytest.approx(rate)


def test_a_nan_trial_fails() -> None:
    metrics = _search_once(jnp.nan, jnp.float32(5.0))
    assert metrics["learning_rate"] == pytest.approx(_DOWN)
    # How statopt asks whether a trial has failed.
    assert not math.nan > 5.0


def test_a_gradient_of_zero_is_no_descent() -> None:
    metrics = _search_once(5.0, jnp.float32(5.0), grad=0.0)
    assert metrics["learning_rate"] == pytest.approx(_DOWN)
    assert metrics["num_evaluations"] == 0


@pytest.mark.parametrize(("rise", "rate"), [(0.0, _UP), (4.0, _DOWN)])
def test_a_rise_within_rounding_is_no_failure(rise: float, rate: float) -> None:
    loss = jnp.asarray(256.0, jnp.bfloat16)
    # The decrease that is asked for, of 0.05 * 2, is less than half of what bfloat16
    # resolves there: statopt's condition fails at once.
    assert loss - jnp.bfloat16(0.1) == loss
    assert 256.0 > 256.0 - 0.05 * 2.0
    metrics = _search_once(256.0 + rise, loss)
    assert metrics["learning_rate"] == pytest.approx(rate)


def _on_losses(optimizer: Any, losses: jax.Array) -> dict[str, jax.Array]:
    """The metrics of a run on these losses, every trial of which is accepted."""
    update = optax.with_extra_args_support(optimizer).update
    params = jnp.ones(2)

    def step(state: Any, loss: jax.Array) -> Any:
        _, state = update(
            params, state, params, value=loss, value_fn=lambda params: loss - 100
        )
        return state, sasa_optax.metrics(state)

    return jax.lax.scan(step, optimizer.init(params), losses)[1]


@jax.jit
def _salsa_on_losses(losses: jax.Array, warmup_steps: Any) -> dict[str, jax.Array]:
    """Its test of the statistic fires from step 5 on, and acts after the warm-up."""
    optimizer = sasa_optax.salsa(
        1e-6, test=_always_stationary, window=_warming_up(warmup_steps)
    )
    return _on_losses(optimizer, losses)


@jax.jit
def _slope_on_losses(losses: jax.Array) -> dict[str, jax.Array]:
    return _on_losses(sasa_optax.slope(1e-6, window=_SMALL), losses)


_FALLING = -np.arange(40, dtype=np.float32)


def test_a_test_that_fires_during_warmup_does_not_end_the_search() -> None:
    metrics = _salsa_on_losses(_FALLING, 20)
    assert metrics["test_stationary"].tolist() == [False] * 4 + [True] * 36
    assert metrics["line_search_active"].tolist() == [True] * 20 + [False] * 20
    without = _salsa_on_losses(_FALLING, 0)
    assert without["line_search_active"].tolist() == [True] * 4 + [False] * 36


def test_a_nan_sample_is_left_out() -> None:
    # The samples of SASA+, of which the result holds the sum.
    optimizer = sasa_optax.sasa_plus(
        1.0, momentum=0.0, test=_always_stationary, window=_warming_up(100)
    )
    params = jnp.ones(2)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for gradient in (0.1, 0.2, np.nan, 0.3, 0.4, 0.5):
        # The momentum is another matter: it stays NaN, as anywhere.
        state = state._replace(trace=jnp.zeros(2))
        _, state = update(jnp.full(2, gradient), state, params)
    metrics = sasa_optax.metrics(state)
    assert int(metrics["num_nonfinite"]) == 1
    assert int(metrics["test_num_samples"]) == 5
    gradients = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    samples = 2 * (gradients - gradients**2 / 2)
    np.testing.assert_allclose(metrics["test_mean"], samples.sum(), rtol=1e-5)

    # The losses of SLOPE and SALSA.
    losses = _FALLING.copy()
    losses[20] = np.nan
    slope = _slope_on_losses(losses)
    assert int(slope["num_drops"][-1]) == 0
    assert int(slope["num_nonfinite"][-1]) == 1
    assert _salsa_on_losses(losses, 100)["line_search_active"].all()
    # How statopt asks whether the losses still fall, and how long a sample stays.
    assert not scipy.stats.linregress(np.arange(40), losses).pvalue < 0.05
    for ratio, sample in ((8, 700), (2, 700), (4, 301)):
        steps = np.arange(sample, 4 * sample)
        oldest = steps + steps // -ratio + 1
        assert steps[oldest > sample][0] == math.ceil(sample * ratio / (ratio - 1))


def test_losses_that_do_not_vary_drop_nothing() -> None:
    losses = np.full(40, 0.7, np.float32)
    assert not _slope_on_losses(losses)["num_drops"].any()
    assert _salsa_on_losses(losses, 100)["line_search_active"].all()
    # They do where losses rise.
    assert _slope_on_losses(-_FALLING)["num_drops"][-1] > 0
    # Where there is no variation, statopt takes zero for the correlation.
    assert scipy.stats.t.cdf(0.0, 38) >= 0.05


def test_statistics_of_bfloat16_parameters_are_float32() -> None:
    params = jnp.ones(2, jnp.bfloat16)
    for function in ("sasa_plus", "slope", "salsa"):
        state = _make(function).init(params)
        assert optax.tree.get(state, "window").buffer.dtype == jnp.float32
    losses = optax.tree.get(sasa_optax.salsa().init(params), "losses")
    assert losses.buffer.dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_log_steps_count_from_the_start_of_the_training() -> None:
    rng = np.random.default_rng(0)
    losses = np.arange(60.0) + rng.normal(size=60)
    optimizer = sasa_optax.slope(
        jnp.float64(1.0),
        test=sasa_optax.SlopeTest(log_steps=True),
        window=sasa_optax.Window(
            min_samples=10, test_interval=30, leak_ratio=2, max_window=64
        ),
    )
    metrics = jax.jit(functools.partial(_on_losses, optimizer))(losses)
    assert np.flatnonzero(np.diff(metrics["num_drops"], prepend=0)).tolist() == [29, 59]
    for step in (30, 60):
        steps = np.arange(step - 14, step + 1)
        line: Any = scipy.stats.linregress(np.log(steps), losses[steps - 1])
        assert metrics["test_mean"][step - 1] == pytest.approx(line.slope, rel=1e-5)
    # In statopt the second test sees steps 15 to 29 again, counted from the drop.
    since: Any = scipy.stats.linregress(np.log(np.arange(15, 30)), losses[45:])
    assert metrics["test_mean"][-1] > 1.5 * since.slope


def test_what_statopt_lets_pass_is_refused() -> None:
    for path, value in (("search.smoothing", 5.0), ("momentum", 1.0), ("nu", 7.0)):
        with pytest.raises(ValueError, match=f"{path.split('.')[-1]} must be"):
            _make("salsa", {path: value})
    # And what it refuses, is not.
    _make("sasa_plus", {"window.min_samples": 4})
    with pytest.raises(ValueError, match="min_samples must be"):
        _make("sasa_plus", {"window.min_samples": 3})


def test_after_the_switch_nothing_is_evaluated(guide: dict[str, Any]) -> None:
    rows = guide["history"].rows
    evaluations = np.array([row["num_evaluations"] for row in rows])
    end = int(np.argmin([row["line_search_active"] for row in rows]))
    assert 0 < end < len(rows) - 5
    # A row is written every 50 steps.
    assert np.all(np.diff(evaluations[:end]) >= 50)
    assert np.all(evaluations[end:] == evaluations[end])


def test_the_search_of_ssls_never_ends() -> None:
    # Losses that make SALSA end its own.
    run = jax.jit(functools.partial(_on_losses, sasa_optax.ssls(1e-6)))
    assert run(-_FALLING)["line_search_active"].all()
    assert not _salsa_on_losses(-_FALLING, 100)["line_search_active"][-1]
