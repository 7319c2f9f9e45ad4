"""The contribution to optax: its own tests, and the same numbers as here."""

import importlib.util
import pathlib
import sys
import types
import unittest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sasa_optax

_FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "optax-contribution"
_NAME = "_reduce_on_stationarity"
pytest.importorskip("optax._src.test_utils", reason="optax 0.2.7 or newer")


def _loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A file of the folder, as the module of optax.contrib that it would be."""
    whole = f"optax.contrib.{name}"
    spec = importlib.util.spec_from_file_location(whole, _FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, whole, module)
    monkeypatch.setattr(optax.contrib, name, module, raising=False)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def contribution(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return _loaded(_NAME, monkeypatch)


def test_its_own_tests_pass(
    contribution: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _loaded(f"{_NAME}_test", monkeypatch)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun >= 20
    assert not result.errors + result.failures + result.skipped


def _trained(optimizer: Any) -> tuple[Any, Any]:
    """The parameters after a run of noisy gradients, and the scale at each step."""
    params = {"w": jnp.full((4, 3), 2.0), "b": jnp.zeros(2)}
    chain = optax.chain(optax.sgd(0.1, momentum=0.9), optimizer)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        keys = optax.tree_utils.tree_split_key_like(key, params)
        noise = jax.tree.map(lambda x, k: jax.random.normal(k, x.shape), params, keys)
        grads = jax.tree.map(jnp.add, params, noise)
        updates, state = chain.update(grads, state, params)
        scale = optax.tree_utils.tree_get(state, "scale")
        return (optax.apply_updates(params, updates), state), scale

    keys = jax.random.split(jax.random.key(0), 1500)
    (params, _), scales = jax.lax.scan(step, (params, chain.init(params)), keys)
    return params, scales


def test_it_does_what_ours_does(contribution: types.ModuleType) -> None:
    small: dict[str, Any] = {"min_samples": 20, "test_interval": 10}
    ours = sasa_optax.reduce_on_stationarity(
        window=sasa_optax.Window(max_window=64, **small)
    )
    theirs = contribution.reduce_on_stationarity(max_samples=64, **small)

    params, scales = _trained(theirs)
    expected, expected_scales = _trained(ours)
    assert np.unique(scales).size >= 3
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
    for leaf, other in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)


def test_it_imports_what_optax_has_alone() -> None:
    lines = (_FOLDER / f"{_NAME}.py").read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert {line.split()[1].partition(".")[0] for line in imports} == {
        "jax",
        "math",
        "optax",
        "typing",
    }
