"""docs/from-statopt.md: its tables are true, its code runs.

What is said here of statopt 0.2 was read in its source, and counted in runs of it.
"""

import ast
import functools
import inspect
import pathlib
import re
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from statopt_guide import (
    FUNCTIONS,
    GUIDE,
    PROSE,
    ROOT,
    always_stationary,
    code,
    make,
    options_class,
    paths,
    run_guide,
    signature,
    table,
)

import sasa_optax

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
# A dash in the guide's tables means that there is no such argument.
_ABSENT = "\N{EN DASH}"
# What the optimizers of statopt keep in `optimizer.state` for the user to see.
_STATOPT_STATE = {
    *("lr", "nSteps", "stats_x1d", "stats_ld2", "stats_val", "stats_test"),
    *("stats_stationary", "stats_mean", "stats_lb", "stats_ub", "conf", "slope"),
    *("composite_test", "switched", "cosine", "ls_eta", "ls_cnt"),
}
# The row of the table, P, T, and how often a step called `Tensor.item`.
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


# The guide's tables.


class _Row(NamedTuple):
    """A row of a table of arguments, for one class and one function."""

    statopt_class: str
    statopt_name: str
    statopt_default: str
    write_here: str
    function: str
    our_default: str


def _arguments() -> Iterator[_Row]:
    ours = dict(zip(_STATOPT, FUNCTIONS, strict=True))
    for first_cell in ("all classes", "tests", "line search"):
        header, *rows = table(first_cell)
        column = {name: i for i, cell in enumerate(header) for name in code(cell)}
        write_here = header.index("write here")
        for row in rows:
            for statopt_class, function in ours.items():
                if statopt_class in column:
                    yield _Row(
                        statopt_class,
                        code(row[0])[0],
                        row[column[statopt_class]],
                        row[write_here],
                        function,
                        row[column[function]],
                    )


def _default(cell: str) -> Any:
    return None if cell == "required" else ast.literal_eval(code(cell)[0])


def _translations(row: _Row) -> dict[Any, Any]:
    pairs = re.findall(r"`([^`]+)` → `([^`]+)`", row.write_here)
    return {ast.literal_eval(old): ast.literal_eval(new) for old, new in pairs}


def _translated(row: _Row) -> bool:
    return row.our_default not in (_ABSENT, "required")


def _to_write(row: _Row) -> list[str]:
    """The paths in a row. The first is for all functions, others are for some."""
    first = code(row.write_here)[:1]
    also = re.findall(r"in `(\w+)` also `([\w.]+)`", row.write_here)
    return first + [path for function, path in also if function == row.function]


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
        defaults = paths(row.function)
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
    optimizer = make(function, {path: value} if path else {})
    params = jnp.ones(2)
    state = optimizer.init(params)

    def loss(params: jax.Array) -> jax.Array:
        return jnp.sum(params**2)

    def update(grads: Any, state: Any, params: Any, value: Any) -> Any:
        return optimizer.update(grads, state, params, value=value, value_fn=loss)

    program = jax.make_jaxpr(update)(params, state, params, jnp.float32(1.0))
    return str(program), [np.asarray(const).tolist() for const in program.consts]


def test_a_default_that_depends_is_what_is_stated() -> None:
    """Such defaults are None. Written out, they make the same program."""
    found = set()
    for row in _arguments():
        path = code(row.write_here)[0] if _translated(row) else ""
        if path and paths(row.function)[path] is None:
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


@pytest.mark.parametrize(
    ("function", "default"), [("sasa_plus", None), ("slope", "slope"), ("salsa", None)]
)
def test_the_test_that_is_left_out_is_that_of_the_table(
    function: str, default: str | None
) -> None:
    assert signature(function)["test"].default == default
    significance = paths(function)["test.significance"]
    left_out = _program(function)
    assert left_out == _program(function, "test", options_class(function, "test")())
    assert left_out != _program(function, "test.significance", significance / 2)


def test_values_to_translate_are_those_of_statopt_and_ours() -> None:
    seen = set()
    for row in _arguments():
        if row.statopt_default == _ABSENT:
            continue
        for old, new in _translations(row).items():
            seen.add((row.statopt_name, old))
            make(row.function, {code(row.write_here)[0]: new})
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
            assert name == options_class(function, path).__name__
            found |= _written_in(function, keyword.value, f"{path}.")
        else:
            found[path] = ast.literal_eval(keyword.value)
    return found


def test_the_defaults_of_statopt_are_written_as_the_table_says() -> None:
    calls = {}
    for statopt_class, here, call in table("class of statopt")[1:]:
        function = code(here)[0]
        parsed = ast.parse(code(call)[0]).body[0]
        assert isinstance(parsed, ast.Expr)
        assert isinstance(parsed.value, ast.Call)
        assert ast.unparse(parsed.value.func) == function
        given = _written_in(function, parsed.value)
        calls[code(statopt_class)[0]] = given
        make(function, given)
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
    # An object counts as mapped if one of its fields is.
    mapped |= {path.rpartition(".")[0] for path in mapped}
    mapped |= {path.partition(".")[0] for path in mapped}
    offered = {path for function in FUNCTIONS for path in paths(function)}
    new = {path for path in offered if path not in mapped and path.count(".") < 2}
    (listed,) = re.findall(r"^[^|\n]*\bnew here\b.*?\n\n", GUIDE, re.M | re.S | re.I)
    assert set(code(listed)) - mapped == new


def test_the_table_of_the_state_names_what_there_is() -> None:
    keys = sasa_optax.metrics(sasa_optax.salsa().init(jnp.ones(2)))
    left, right = set(), set()
    for statopt_names, here in table("`optimizer.state[…]`")[1:]:
        left |= set(code(statopt_names))
        right |= {name for name in code(here) if name.isidentifier()}
    assert left == _STATOPT_STATE
    assert right - {"slope"} <= set(keys)


def test_the_newest_sample_is_where_the_guide_says() -> None:
    optimizer = sasa_optax.sasa_plus(0.5, test=always_stationary)
    params = jnp.array([1.0, 2.0])
    updates, opt_state = optimizer.update(params, optimizer.init(params), params)
    where = dict(table("`optimizer.state[…]`"))
    expression, window = code(where["`stats_val`"])
    names = {"opt_state": opt_state, "optax": optax}
    sample = eval(expression, {"window": eval(window, names)})
    after = np.sum(np.asarray(optax.apply_updates(params, updates)) ** 2)
    np.testing.assert_allclose(sample, (5.0 - after) / (2 * 0.5), rtol=1e-6)


def test_statopts_reads_are_what_the_table_says() -> None:
    each_step, at_a_test = {}, {}
    for row, formula, tests in table("reads")[1:]:
        name = row.replace("`", "")
        each_step[name] = code(formula)[0]
        at_a_test[name] = [int(count) for count in code(tests)]
    assert at_a_test == _STATOPT_READS_AT_A_TEST
    for name, tensors, trials, count in _STATOPT_READS:
        assert eval(each_step[name], {"P": tensors, "T": trials}) == count
    example = eval(each_step["SALSA, searching"], {"P": 100, "T": 1})
    assert f"is {example} times a step for P = 100 and T = 1." in PROSE


def test_every_test_and_page_that_is_named_exists() -> None:
    arguments = {"test_interval", *sasa_optax.metrics(sasa_optax.salsa().init(()))}
    names = set(re.findall(r"`(test_\w+)`", GUIDE)) - arguments
    assert len(names) == 20
    oracles = pathlib.Path(__file__).parent
    sources = [path.read_text() for path in oracles.glob("test_*.py")]
    for name in names:
        assert any(f"def {name}(" in text for text in sources), name
    for target in re.findall(r"\]\(([^)#:]+)\)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target


def test_the_traces_are_those_that_are_reproduced() -> None:
    traces = {path.stem for path in (ROOT / "tests" / "golden").glob("*.npz")}
    listed = PROSE[PROSE.index("step by step:") : PROSE.index("## The loop")]
    assert set(code(listed)) == traces
    assert "eight traces" in PROSE
    assert len(traces) == 8
    reproduced = pathlib.Path(__file__).with_name("test_golden.py").read_text()
    assert all(f'"{name}"' in reproduced for name in traces)


# The guide's code.


def test_the_loop_of_the_guide_switches_and_drops() -> None:
    guide = run_guide()
    history = guide["history"]
    assert history.switch is not None
    assert history.switch.learning_rate > 1.0
    assert len(history.drops) == 1
    # After the events it says when the next test is due.
    assert guide["printed"].splitlines() == history.explain().splitlines()[:-1]
    assert history.rows[-1]["loss"] < history.rows[0]["loss"] / 2


def test_the_switch_by_hand_takes_the_rate_along() -> None:
    guide = run_guide()
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
        sasa_optax.sasa_plus(0.5, test=always_stationary),
    )
    params = {"w": jnp.full(2, 3.0), "b": jnp.full(2, 2.0)}
    state = optimizer.init(params)
    expected, trace = {"w": 3.0, "b": 2.0}, {"w": 0.0, "b": 0.0}

    def step(params: Any, state: Any, gradient: float) -> Any:
        grads = jax.tree.map(lambda x: jnp.full_like(x, gradient), params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in (0.1, -0.2, 0.3):
        params, state = jax.jit(step)(params, state, gradient)
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
    optimizers: dict[Hashable, optax.GradientTransformation] = {
        "w": sasa_optax.sasa_plus(1.0, momentum=0.0, test=always_stationary),
        "b": sasa_optax.sasa_plus(0.1, momentum=0.0, test=always_stationary),
        "frozen": optax.set_to_zero(),
    }
    optimizer = optax.partition(optimizers, labels)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    moved = {"w": -1.0, "b": -0.1, "frozen": 0.0}
    chex.assert_trees_all_close(
        updates, {name: jnp.full(2, x) for name, x in moved.items()}, rtol=1e-6
    )
    rates = [k for k in sasa_optax.metrics(state) if k.endswith("learning_rate")]
    assert len(rates) == 2

    def value_fn(params: Any) -> jax.Array:
        return sum((jnp.sum(x**2) for x in params.values()), jnp.zeros(()))

    searching = optax.partition(optimizers | {"w": sasa_optax.ssls()}, labels)
    with pytest.raises(ValueError, match="MaskedNode"):
        searching.update(params, searching.init(params), params, value_fn=value_fn)


def test_a_schedule_is_for_all_but_the_line_searches() -> None:
    schedule = optax.linear_schedule(0.1, 1.0, 10)
    for function in ("qhm", "sasa_plus", "slope"):
        make(function, {"learning_rate": schedule})
    for function in ("ssls", "salsa"):
        with pytest.raises(ValueError, match="learning_rate must be a number"):
            make(function, {"learning_rate": schedule})
