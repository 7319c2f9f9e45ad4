"""The examples, as a user runs them."""

import gzip
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import sasa_optax
from examples import elbo

_ROOT = pathlib.Path(__file__).parent.parent


def _run_example(name: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, _ROOT / "examples" / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.example
def test_the_digits_example_runs(tmp_path: pathlib.Path) -> None:
    printed = _run_example("digits", "--epochs=10", "--seeds=1", f"--out={tmp_path}")
    assert "SALSA, nothing tuned" in printed
    assert (tmp_path / "digits.png").exists()
    history = sasa_optax.History.from_jsonl(tmp_path / "digits.jsonl")
    assert history.rows[-1]["step"] == 175
    assert history.rows[-1]["loss"] < history.rows[0]["loss"] / 2


def _write_idx(path: pathlib.Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


@pytest.mark.example
def test_the_fashion_mnist_example_runs(tmp_path: pathlib.Path) -> None:
    random = np.random.default_rng(0)
    for part, num_images in (("train", 5256), ("t10k", 100)):
        labels = random.integers(10, size=num_images).astype(np.uint8)
        # The brightness of an image tells its label.
        images = np.broadcast_to(25 * labels[:, None, None], (num_images, 28, 28))
        _write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images.astype(np.uint8))
        _write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    printed = _run_example(
        "fashion_mnist",
        "--epochs=8",
        "--batch-size=64",
        "--peaks=1.0",
        f"--data={tmp_path}",
        f"--out={tmp_path}",
    )
    assert "SALSA, nothing tuned" in printed
    assert (tmp_path / "fashion_mnist.png").exists()
    runs = json.loads((tmp_path / "fashion_mnist.json").read_text())["runs"]
    assert runs["SALSA, nothing tuned"][0]["test"] > 30


@pytest.mark.example
def test_the_elbo_example_runs(tmp_path: pathlib.Path) -> None:
    printed = _run_example("elbo", "--steps=200", "--seeds=1", f"--out={tmp_path}")
    assert "SALSA, nothing tuned" in printed
    assert (tmp_path / "elbo.png").exists()


def test_the_gap_of_the_elbo_example_is_evidence_less_elbo() -> None:
    problem, params = elbo.draw_problem(0), elbo.init_params()
    # The log density of the targets, with the weights integrated out.
    features = problem.features.astype(np.float64)
    covariance = elbo.NOISE**2 * np.eye(len(features)) + features @ features.T
    # The types that SciPy infers allow no matrix.
    arguments: dict[str, Any] = {"cov": covariance}
    evidence = scipy.stats.multivariate_normal(**arguments).logpdf(problem.targets)
    params = {"mean": jnp.asarray(problem.mean), "log_std": params["log_std"] - 3}
    keys = jax.random.split(jax.random.key(0), 20_000)

    @jax.jit
    @jax.vmap
    def loss(key: jax.Array) -> jax.Array:
        return elbo.loss_fn(params, problem, key)

    losses = loss(keys)
    elbos = -elbo.NUM_ROWS * np.asarray(losses, np.float64)
    error = elbos.std() / len(keys) ** 0.5
    assert abs(evidence - elbos.mean() - problem.gap(params)) < 4 * error + 0.02


@pytest.mark.example
def test_the_language_model_example_runs(tmp_path: pathlib.Path) -> None:
    _run_example("char_lm", "--steps=30", "--seeds=1", f"--out={tmp_path}")
    assert len(list(tmp_path.glob("*.png"))) == 2
