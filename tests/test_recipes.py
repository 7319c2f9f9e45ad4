"""The recipes of docs/recipes.md, as they are printed."""

import pathlib
import re
from typing import Any

import numpy as np
import pytest

import sasa_optax

_PAGE = pathlib.Path(__file__).parent.parent / "docs" / "recipes.md"
_INTRO, *_SECTIONS = re.split(r"^## ", _PAGE.read_text(), flags=re.MULTILINE)
_BY_TITLE = {text.splitlines()[0]: text for text in _SECTIONS}


def _blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def run(request: pytest.FixtureRequest, monkeypatch: Any) -> dict[str, Any]:
    """What the code of a section leaves behind."""
    # The page sets it for good, and after the test it must be as before.
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    names: dict[str, Any] = {}
    for block in _blocks(_INTRO) + _blocks(_BY_TITLE[request.param]):
        exec(block, names)
    return names


def _recipe(title: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", [title], indirect=True)


def _assert_adapted(opt_state: Any) -> None:
    metrics = sasa_optax.metrics(opt_state)
    assert int(metrics["step"]) == 200
    assert bool(metrics["sees_loss"])
    assert float(metrics["scale"]) > 3


def _assert_searched(opt_state: Any) -> None:
    metrics = sasa_optax.metrics(opt_state)
    assert int(metrics["step"]) == 20
    assert int(metrics["num_evaluations"]) >= 20
    assert float(metrics["learning_rate"]) > 0.002


@_recipe("Haiku, or a loop of your own")
def test_haiku(run: dict[str, Any]) -> None:
    _assert_searched(run["opt_state"])
    assert run["loss_fn"](run["average"]) < run["loss_fn"](run["start"])


@_recipe("Flax NNX")
def test_nnx(run: dict[str, Any]) -> None:
    nnx = run["nnx"]
    _assert_adapted(run["optimizer"].opt_state)
    run["average"].eval()
    assert run["loss_fn"](run["average"]) < 1
    _assert_searched(run["search_optimizer"].opt_state)
    # A search leaves no trace: there is one pass in training mode, and no other.
    model = run["searched"]
    trained = nnx.clone(model)
    run["loss_fn"](trained)
    run["search_step"](model, run["search_optimizer"])
    np.testing.assert_allclose(model.norm.mean[...], trained.norm.mean[...], rtol=1e-5)
    assert model.dropout.rngs.count[...] == trained.dropout.rngs.count[...]
    assert not model.dropout.deterministic


@_recipe("Flax Linen")
def test_linen(run: dict[str, Any]) -> None:
    state = run["state"]
    assert int(state.step) == 200
    _assert_adapted(state.opt_state)
    averaged = run["squared_error"](run["model"].apply(run["average"], run["images"]))
    start = run["squared_error"](run["model"].apply(run["params"], run["images"]))
    assert averaged < start / 2


@_recipe("Equinox")
def test_equinox(run: dict[str, Any]) -> None:
    _assert_adapted(run["state"])
    assert run["loss_fn"](run["average"]) < 1
    _assert_searched(run["searched_state"])


@_recipe("Optimistix")
def test_optimistix(run: dict[str, Any]) -> None:
    np.testing.assert_allclose(run["solution"].value, 1, atol=0.01)
    metrics = sasa_optax.metrics(run["solution"].state.opt_state)
    assert int(metrics["num_evaluations"]) > 100


@_recipe("Keras 3")
def test_keras(run: dict[str, Any]) -> None:
    _assert_adapted(run["opt_state"])
    model = run["model"]
    for variable, value in zip(model.trainable_variables, run["average"], strict=True):
        np.testing.assert_array_equal(variable.value, value)
    # The average lags behind, on the way down.
    newest, _ = run["loss_fn"](run["params"], run["rest"])
    averaged, _ = run["loss_fn"](run["average"], run["rest"])
    assert newest < averaged


def test_the_table_counts_the_lines_that_are_marked() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \|$", _INTRO, re.MULTILINE)
    assert len(rows) == 5
    for title, *printed in rows:
        blocks = _blocks(_BY_TITLE[title])
        counts = [
            len(re.findall("# (?:new|changed)$", x, re.MULTILINE)) for x in blocks
        ]
        counts = counts or [0]
        assert [int(n) for n in printed] == [counts[0], counts[-1]], title
