"""The code of the README, the import, and the promises of the package."""

import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax.contrib
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


def _blocks(page: str) -> list[str]:
    text = (_ROOT / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_code_in_the_readme_runs(monkeypatch: Any, tmp_path: Any) -> None:
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    # What the reader has is defined here.
    names: dict[str, Any] = {
        "params": jnp.zeros(5),
        "batches": jax.random.normal(jax.random.key(0), (400, 5)) + 1,
        "loss_fn": lambda params, batch: jnp.mean((params - batch) ** 2),
    }
    blocks = _blocks("README.md")
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "run.png").exists()
    np.testing.assert_allclose(names["model"], 1.0, atol=0.2)


def test_the_code_for_a_choice_runs(capsys: Any) -> None:
    (block,) = _blocks("docs/which-one.md")
    exec(block, {})
    assert "progress has stopped" in capsys.readouterr().out


def test_the_parts_of_ones_own_take_ten_lines() -> None:
    (block,) = _blocks("docs/good-to-know.md")
    assert len([line for line in block.splitlines() if line]) <= 10
    names: dict[str, Any] = {}
    exec(block, names)
    params = jnp.full(2, 2.0)
    optimizer = names["optimizer"]
    _, state = optimizer.update(params, optimizer.init(params), params)
    assert state.controller.window.buffer[0, 0] == 8.0


def test_every_choice_in_the_table_is_an_optimizer() -> None:
    text = (_ROOT / "docs/which-one.md").read_text()
    choices = re.findall(r"^\| (?:[^`|]+ \| )?`([^`]+)`", text, flags=re.MULTILINE)
    assert len(choices) == 14
    names = {**vars(optax.contrib), **vars(optax), **_PUBLIC, "S": 100}
    for choice in choices:
        optimizer = eval(choice, names)
        assert isinstance(optimizer, optax.GradientTransformation), choice


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
    ["SECURITY.md", *(f"docs/{page.name}" for page in (_ROOT / "docs").glob("*.md"))],
)
def test_links_within_the_repository_lead_somewhere(name: str) -> None:
    page = _ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def _project() -> dict[str, Any]:
    return tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]


def test_the_readme_suits_a_package_index() -> None:
    text = (_ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    # A page of the index has no neighbours, so that links are absolute.
    links = re.findall(r"^\[[\w-]+\]: (.*)$", text, flags=re.MULTILINE)
    assert not re.findall(r"\]\(|<a |<img ", text)
    assert all(link.startswith("https://") for link in links)
    urls = _project()["urls"]
    for link in links:
        if match := re.fullmatch(f"{urls['Repository']}/(?:blob|raw)/main/(.*)", link):
            assert (_ROOT / match[1]).exists(), link
        elif link.startswith(urls["Documentation"] + "/"):
            page = link.removeprefix(urls["Documentation"] + "/en/latest/")
            assert (_ROOT / "docs" / page).with_suffix(".md").exists(), link
        else:
            assert "sasa" not in link or link == urls["Documentation"], link


def test_the_badges_are_true() -> None:
    project, text = _project(), (_ROOT / "README.md").read_text()
    python, jax_versions, license_name = re.findall(r"img.shields.io/badge/(.*)-", text)
    classifiers = [f"{x} ::" for x in project["classifiers"]]
    named = re.findall(r"Python :: (3\.\d+) ::", " ".join(classifiers))
    assert python == f"Python-{named[0]}_to_{named[-1]}"
    assert project["requires-python"] == f">={named[0]}"
    (oldest,) = [x[5:] for x in project["dependencies"] if x.startswith("jax>=")]
    assert jax_versions.startswith(f"tested_with_JAX-{oldest}_to_")
    assert license_name == f"license-{project['license'].replace('-', '_')}"


def test_the_version_is_in_the_changelog_and_in_the_citation() -> None:
    version = re.escape(sasa_optax.__version__)
    changelog = (_ROOT / "CHANGELOG.md").read_text()
    dated = re.search(rf"^## {version} - (\S+)$", changelog, flags=re.MULTILINE)
    assert dated is not None
    assert changelog.index("## Unreleased") < dated.start()
    citation = (_ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([\w-]+): (\S+)$", citation, flags=re.MULTILINE))
    assert fields["version"] == sasa_optax.__version__
    assert fields["date-released"] == dated[1]
    assert fields["repository-code"] == _project()["urls"]["Repository"]
    assert fields["url"] == _project()["urls"]["Documentation"]
