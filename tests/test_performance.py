"""What XLA makes of the update: memory traffic, temporaries, compilations.

No test here is timed; `benchmarks.performance` is what takes times.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from optimizers import ALL

import sasa_optax

_ROOT = pathlib.Path(__file__).parent.parent

_from_jax_0_10 = pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="XLA copies what it sums over before JAX 0.10, as docs/performance.md says",
)


@pytest.fixture(scope="module")
def one_device() -> dict[str, Any]:
    script = pathlib.Path(__file__).with_name("one_device.py")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


# As shares of the parameters. What momentum's statistics need is the window, laid out
# in order for the test; what Adam's do is the update of two megabytes' worth of leaves.
@_from_jax_0_10
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("sasa_plus", 0.01),
        ("sasa_plus, decay", 0.01),
        ("sasa", 0.01),
        ("sasa, decay", 0.01),
        ("slope", 0.01),
        ("sasa_plus, nu", 0.1),
        ("adamw, reduced", 0.1),
        ("adamw, measured", 0.1),
        ("adamw, adapted", 0.1),
        ("adam, scale_by_sasa_plus", 0.1),
        ("sgd, averaged", 0.001),
        ("adamw, averaged", 0.001),
        ("sasa_plus, averaged", 0.01),
        ("sasa_plus, centred", 0.1),
    ],
)
def test_temporaries(one_device: dict[str, Any], name: str, most: float) -> None:
    assert one_device["compiled"][name]["temporary"] < most


# Beyond the plain optimizer's, in reads and writes of all parameters: <x', d> is two
# and <d, d> one; <x', g> and <d, g> two each; ||x'||^2 one. A coupled decay reads x_k.
# A direction that was not in memory is written, and read for the update, and what it
# is made of is read by itself. An average c is read and written, and x' read again.
# Progress puts the direction d into memory (3), averages (3), reads d for ||d||^2 (1),
# and writes x' - c, reads it for its square and for the average, and c once more (4).
# That the parameters may return to the average reads this for the update (1).
@_from_jax_0_10
@pytest.mark.parametrize(
    ("name", "plain", "most"),
    [
        ("sasa_plus", "sgd", 3),
        ("sasa_plus, decay", "sgd", 3 + 1),
        ("sasa", "sgd", 5),
        ("sasa, decay", "sgd", 5 + 3 + 1),
        ("slope", "sgd", 0),
        ("adamw, reduced", "adamw", 3 + 3),
        ("adamw, measured", "adamw", 3 + 3 + 1 + 4),
        ("adamw, adapted", "adamw", 3 + 3 + 1 + 4 + 1),
        ("sgd, averaged", "sgd", 3),
        ("sasa_plus, averaged", "sasa_plus", 3),
    ],
)
def test_passes_over_the_parameters(
    one_device: dict[str, Any], name: str, plain: str, most: int
) -> None:
    compiled = one_device["compiled"]
    added = compiled[name]["passes"] - compiled[plain]["passes"]
    # The window and the test, which have nothing to do with the parameters.
    assert added < most + 0.2


@pytest.mark.parametrize("name", ["reduced", "adapted"])
def test_computed_in_sequence_the_numbers_are_the_same(
    one_device: dict[str, Any], name: str
) -> None:
    assert one_device["num_drops"] > 0
    assert one_device["scale"] != 1
    assert one_device["difference"][name] < 1e-4


@pytest.mark.parametrize("name", ["reduced", "adapted"])
def test_computed_in_sequence_a_bad_leaf_harms_no_other(
    one_device: dict[str, Any], name: str
) -> None:
    finite = {"a": False, "b": True, "c": True, "d": True}
    assert one_device["finite"][name] == finite


@pytest.mark.example
def test_the_guide_measures_a_model_of_ones_own(tmp_path: pathlib.Path) -> None:
    page = (_ROOT / "docs" / "performance.md").read_text()
    module = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "my_training.py").write_text(module)
    command = [sys.executable, "-m", "benchmarks.performance"]
    arguments = ["--own", "my_training:make_step", "--rounds", "3"]
    process = subprocess.run(
        [*command, *arguments],
        cwd=_ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "my_training:make_step" in process.stdout
    assert "reduce_on_stationarity" in process.stdout


@pytest.mark.skipif(
    jax.__version_info__ < (0, 6),
    reason="on JAX 0.5 vmap makes a select of the test: docs/everywhere.md",
)
def test_a_population_tests_only_when_a_member_must() -> None:
    """What `jax.vmap` makes of `jax.lax.cond` would test all of them at each step."""
    calls = []

    def counting(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
        jax.debug.callback(lambda step: calls.append(int(step)), samples.step)
        return sasa_optax.TestResult(mean=samples.values[0])

    window = sasa_optax.Window(min_samples=4, test_interval=8)
    optimizer = sasa_optax.sasa_plus(0.1, test=counting, window=window)
    params = jnp.ones((3, 2))
    state = jax.vmap(optimizer.init)(params)
    update = jax.jit(jax.vmap(optimizer.update))
    for _ in range(80):
        _, state = update(params, state, params)
    jax.effects_barrier()
    assert sorted(calls) == sorted(3 * [40, 48, 56, 64, 72, 80])


@pytest.mark.parametrize("name", ALL)
def test_the_state_is_small(name: str) -> None:
    """A window of 16384 numbers each for samples, scales and losses."""
    params = jnp.zeros(1000)
    state = jax.eval_shape(ALL[name]().init, params)
    leaves = [x for x in jax.tree.leaves(state) if x.shape != params.shape]
    assert sum(x.size * x.dtype.itemsize for x in leaves) < 200_000
