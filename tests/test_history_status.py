"""A History in a line and in a notebook, and the page that shows both."""

import math
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import matplotlib
import optax
import pytest

import sasa_optax

matplotlib.use("agg")

_PAGE = pathlib.Path(__file__).parent.parent / "docs" / "watching.md"
_PARAMS = jnp.ones(3)


def _history(optimizer: Any, **changes: Any) -> sasa_optax.History:
    """A record of the optimizer's initial metrics, with some changes."""
    history = sasa_optax.History()
    history.record({**sasa_optax.metrics(optimizer.init(_PARAMS)), **changes})
    return history


_ADAPT = sasa_optax.adapt_on_progress()
_INJECTED = optax.inject_hyperparams(optax.adamw)(learning_rate=0.25)
_FIRST_TEST = "next test at step 8100"


@pytest.mark.parametrize(
    ("optimizer", "changes", "expected"),
    [
        (sasa_optax.sasa_plus(0.5), {}, f"step 0  learning rate 0.5  {_FIRST_TEST}"),
        (
            sasa_optax.salsa(),
            {"step": 7},
            f"step 7  learning rate 0.001  searching for the rate  {_FIRST_TEST}",
        ),
        (
            sasa_optax.ssls(),
            {"line_search_active": False},
            "step 0  learning rate 0.001",
        ),
        (
            _ADAPT,
            {"step": 63},
            "step 63  scale 1  progress 1 (target 0.4), too early to judge",
        ),
        (
            _ADAPT,
            {"step": 64, "sees_loss": True},
            "step 64  scale 1  progress 1 (target 0.4), may rise",
        ),
        (
            _ADAPT,
            {"step": 64},
            "step 64  scale 1  progress 1 (target 0.4), stays without a loss",
        ),
        (
            optax.chain(_INJECTED, _ADAPT),
            {"step": 99, "sees_loss": True, "expected_progress": 0.3, "progress": 0.2},
            "step 99  learning rate 0.25  progress 0.2 (target 0.4), may fall",
        ),
        (
            _ADAPT,
            {"step": 99, "sees_loss": True, "expected_progress": 0.3},
            "step 99  scale 1  progress 1 (target 0.4), has risen enough, may fall",
        ),
        (
            _ADAPT,
            {"step": 64, "sees_loss": True, "progress": 0.7, "loss_fast": 1.0},
            "step 64  scale 1  progress 0.7 (target 0.4), may fall",
        ),
        (
            _ADAPT,
            {"step": 64, "sees_loss": True, "progress": 0.3, "loss_fast": 1.0},
            "step 64  scale 1  progress 0.3 (target 0.4), may rise",
        ),
        (sasa_optax.measure_progress(), {}, "step 0  progress 1"),
    ],
)
def test_the_status_says_where_the_run_stands_and_what_comes_next(
    optimizer: Any, changes: dict[str, Any], expected: str
) -> None:
    assert _history(optimizer, **changes).status() == expected


def test_the_status_has_the_loss_of_the_newest_record() -> None:
    history = _history(sasa_optax.measure_progress())
    history.record({**history.rows[0], "step": 5}, loss=0.12345)
    assert history.status() == "step 5  loss 0.123  progress 1"


def test_a_notebook_shows_the_record_the_reasons_and_the_picture() -> None:
    shown = _history(_ADAPT, step=1234567, progress=0.54321)._repr_html_()
    for part in (
        "<th>progress</th>",
        "<td>1234567</td>",
        "<td>0.5432</td>",
        "stays without a loss",
        "The rate has not been cut.",
        'src="data:image/png;base64,iVBOR',
    ):
        assert part in shown
    assert "loss fast" not in shown


def test_a_notebook_shows_what_there_is(monkeypatch: Any) -> None:
    assert sasa_optax.History().status() == "nothing recorded yet"
    assert sasa_optax.History()._repr_html_() == "<p>History: nothing recorded yet.</p>"
    history = _history(_ADAPT)
    history.record({**history.rows[0], "step": 9}, loss=math.nan)
    assert "<td>nan</td>" in history._repr_html_()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = history._repr_html_()
    assert "<td>nan</td>" in shown
    assert "<img" not in shown


def test_a_notebook_shows_the_newest_of_many_events(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    history = _history(_ADAPT)
    for n in range(1, 13):
        cut = {"step": 100 * n, "num_brakes": n, "last_cut": 100 * n - 5}
        history.record({**history.rows[0], **cut})
    shown = history._repr_html_()
    assert re.findall(r"step (\d+): brake", shown) == [
        str(100 * n - 5) for n in range(7, 13)
    ]
    assert "(6 more before these)" in shown
    # The arrow between two scales is no tag.
    assert "scale 1 -&gt; 1" in shown


@pytest.fixture
def shell(monkeypatch: Any, tmp_path: Any) -> Iterator[Any]:
    """IPython's own shell, as a notebook has it."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    interactive = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    shell = interactive.instance()
    yield shell
    shell.history_manager.end_session()
    interactive.clear_instance()


def _without_digits(line: str) -> str:
    return re.sub(r"[\d.]+", "0", line)


def test_the_page_runs_in_a_shell_and_updates_one_display(shell: Any) -> None:
    from IPython.utils.capture import capture_output

    bar, notebook = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*)\n```", _PAGE.read_text())
    with capture_output() as captured:
        shell.run_cell(bar).raise_error()
    history = shell.user_ns["history"]
    assert history.status() in captured.stdout.replace("\n", " ")
    at_200 = sasa_optax.History()
    at_200.record(history.rows[3])
    assert _without_digits(at_200.status()) == _without_digits(printed)
    with capture_output() as captured:
        shell.run_cell(notebook).raise_error()
    assert [row["step"] for row in history.rows[-2:]] == [600, 800]
    outputs = captured.outputs
    assert [output.update for output in outputs] == [False, True, True]
    assert len({output.transient["display_id"] for output in outputs}) == 1
    for output, step in zip(outputs, (400, 600, 800), strict=True):
        assert f"<td>{step}</td>" in output.data["text/html"]
