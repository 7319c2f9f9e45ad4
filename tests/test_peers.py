"""docs/peers.md: its examples, what they show, and the rows that it quotes."""

import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sasa_optax
from benchmarks.performance import tables

_DOCS = pathlib.Path(__file__).parent.parent / "docs"
_PAGE = (_DOCS / "peers.md").read_text()


@functools.cache
def _names_of(heading: str) -> dict[str, Any]:
    """What the code below a heading leaves behind."""
    section = _PAGE.partition(f"### {heading}\n")[2].partition("\n### ")[0]
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        exec(block, names)
    return names


def test_behind_prodigy_the_rate_comes_down() -> None:
    names = _names_of("A rate that comes down")
    scale = sasa_optax.metrics(names["opt_state"])["scale"]
    np.testing.assert_allclose(scale, 0.021, atol=0.002)
    np.testing.assert_allclose(names["opt_state"][0].estim_lr, 0.37, atol=0.03)


def test_a_run_that_is_extended_is_one_that_was_not_stopped() -> None:
    names = _names_of("Stop or extend a run at any time")
    whole, _ = jax.lax.scan(names["step"], names["start"], names["noise"])
    for there, here in zip(
        *map(jax.tree.leaves, (names["extended"], whole)), strict=True
    ):
        np.testing.assert_array_equal(there, here)
    better: Any = sasa_optax.averaged_params(names["extended"][1])
    models = better, names["model"], names["stopped"][0]
    errors = [float(jnp.mean((x - 1) ** 2)) for x in models]
    assert errors == sorted(errors)


def test_numpyro_passes_the_loss() -> None:
    pytest.importorskip("numpyro")
    names = _names_of("No plumbing for the loss")
    metrics = sasa_optax.metrics(names["result"].state.optim_state)
    assert bool(metrics["sees_loss"])
    np.testing.assert_allclose(names["averaged"]["mean_auto_loc"], 3.0, atol=0.05)


def test_a_plateau_below_zero_is_none_for_optax() -> None:
    plateau = optax.contrib.reduce_on_plateau(patience=2)
    update = jax.jit(plateau.update)
    for value, scale in ((1.0, 1e-4), (-1.0, 1.0)):
        state: Any = plateau.init(jnp.ones(1))
        for _ in range(10):
            _, state = update(jnp.ones(1), state, value=value)
        np.testing.assert_allclose(state.scale, scale, rtol=1e-5)


def test_a_spike_is_no_plateau() -> None:
    names = _names_of("No false plateau after a spike")
    run = names["state_after_a_spike"]
    assert float(run(optax.contrib.reduce_on_plateau()).scale) == 0
    state = run(sasa_optax.reduce_on_stationarity(steps_per_epoch=100))
    assert float(state.scale) == 1
    assert int(state.last_test.at_step) > 1000
    metrics = sasa_optax.metrics(run(sasa_optax.adapt_on_progress()))
    assert int(metrics["num_brakes"]) == 1


def test_the_examples_are_short() -> None:
    for block in re.findall(r"```python\n(.*?)```", _PAGE, flags=re.DOTALL):
        assert len([line for line in block.splitlines() if line]) <= 15


def test_the_results_are_those_of_the_evidence() -> None:
    """If not: `python -m benchmarks.performance --sections --publish`."""
    evidence = (_DOCS / "evidence.md").read_text()
    for name, table in tables.quoted(evidence).items():
        assert table in _PAGE, name
