"""The code of the README, the import, and the promises of the package."""

import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import sasa_optax

_ROOT = pathlib.Path(__file__).parent.parent
_PUBLIC = {
    name: public
    for name, public in vars(sasa_optax).items()
    if not name.startswith("_")
}
_FUNCTIONS = [name for name, x in _PUBLIC.items() if inspect.isfunction(x)]
_CLASSES = [name for name, x in _PUBLIC.items() if inspect.isclass(x)]


def test_the_code_in_the_readme_runs(
    monkeypatch: Any, tmp_path: Any, capsys: Any
) -> None:
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    text = (_ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    # The first block is the reader's loop. What the reader has is defined here.
    names: dict[str, Any] = {
        "params": jnp.zeros(5),
        "batches": jax.random.normal(jax.random.key(0), (400, 5)) + 1,
        "loss_fn": lambda params, batch: jnp.mean((params - batch) ** 2),
    }
    exec(blocks[0], names)
    assert (tmp_path / "run.png").exists()
    np.testing.assert_allclose(names["model"], 1.0, atol=0.2)
    for block in blocks[1:]:
        exec(block, names)
    assert "progress has stopped" in capsys.readouterr().out
    params = names["params"]
    names["optimizer"].update(params, names["optimizer"].init(params), params)


def test_the_parts_of_ones_own_take_ten_lines() -> None:
    text = (_ROOT / "README.md").read_text()
    block = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[2]
    assert len([line for line in block.splitlines() if line]) <= 10


def test_importing_it_needs_the_core_dependencies_alone() -> None:
    code = """
import sys, jax, optax, numpy
before = set(sys.modules)
import sasa_optax
new = {name.partition(".")[0] for name in set(sys.modules) - before}
new -= {"sasa_optax", "jax", "optax", "numpy"}
print(*sorted(new - set(sys.stdlib_module_names)))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert run.stdout.split() == []


def test_the_public_names_exist_and_are_documented() -> None:
    assert len(_PUBLIC) > 40
    for name, public in _PUBLIC.items():
        # This is a type of functions, which has no docstring.
        if name != "StationarityTest":
            assert public.__doc__, name
    for name in ("adapt_on_progress", "qhm", "sasa", "reduce_on_stationarity"):
        assert ">>>" in getattr(sasa_optax, name).__doc__


@pytest.mark.parametrize("name", [*_FUNCTIONS, *_CLASSES])
def test_it_has_few_parameters(name: str) -> None:
    assert len(inspect.signature(_PUBLIC[name]).parameters) <= 14


def test_the_oldest_versions_are_those_that_are_tested() -> None:
    requirements = importlib.metadata.requires("sasa-optax") or []
    stated = {
        name: version
        for requirement in requirements
        if "extra" not in requirement
        for name, version in re.findall(r"^(\w+)>=([\d.]+)", requirement)
    }
    pinned = dict(
        line.split("==")
        for line in (_ROOT / "tests" / "oldest.txt").read_text().splitlines()
        if "==" in line
    )
    assert set(stated) == {"jax", "optax", "numpy"}
    for name, version in stated.items():
        assert pinned[name].startswith(version)


def test_type_information_is_shipped() -> None:
    assert (pathlib.Path(sasa_optax.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "name",
    ["README.md", *(f"docs/{page.name}" for page in (_ROOT / "docs").glob("*.md"))],
)
def test_links_within_the_repository_lead_somewhere(name: str) -> None:
    page = _ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
