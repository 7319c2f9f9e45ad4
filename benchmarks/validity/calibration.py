"""Do the 95 % confidence intervals hold the true mean in 95 % of all windows?

Draws zero-mean Gaussian windows, i.i.d. and AR(1), counts how often the interval of
`sasa_optax.ZeroMeanTest` holds zero, and writes the share, beside the one that theory
expects, into the table of docs/calibration.md.

    make calibration
    python -m benchmarks.validity.calibration --streams 4000 --seed 0
"""

import argparse
import functools
import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import sasa_optax
from benchmarks import publishing

SIGNIFICANCE = 0.05
VARIANCES = ("iid", "batch_means", "overlapping_batch_means")
PHIS = (0.0, 0.5, 0.9)
LENGTHS = (100, 1000, 10000)
PART = "table"
# So many streams are in memory at once, 10 MB of the longest.
CHUNK = 250


class Estimator(NamedTuple):
    """sigma^2 = factor * the sum over batches of (batch mean - window mean)^2."""

    batch: int
    starts: np.ndarray
    factor: float
    dof: int
    effective_dof: float


def estimator(variance: str, n: int) -> Estimator:
    b = math.isqrt(n)
    k = n // b
    if variance == "iid":
        return Estimator(1, np.arange(n), 1 / (n - 1), n - 1, n - 1)
    if variance == "batch_means":
        return Estimator(b, b * np.arange(k), b / (k - 1), k - 1, k - 1)
    # Overlapping batches are far from independent. In long windows, this sigma^2 varies
    # as if it had 1.5 n / b degrees of freedom, not n - b.
    starts = np.arange(n - b + 1)
    factor = n * b / (len(starts) * (n - b))
    return Estimator(b, starts, factor, n - b, 1.5 * n / b)


def variance_of_sum(k: np.ndarray | int, phi: float) -> np.ndarray:
    """Var(z_1 + ... + z_k) = gamma_0 (k + 2 sum_{j<k} (k - j) phi^j), summed up."""
    k = np.asarray(k, np.float64)
    linear = k * (1 + phi) / (1 - phi)
    return (linear - 2 * phi * (1 - phi**k) / (1 - phi) ** 2) / (1 - phi**2)


def expected_variance(e: Estimator, n: int, phi: float) -> float:
    """E[sigma^2], also where n / b leaves a remainder that no batch contains."""
    left, right = e.starts, n - e.starts - e.batch
    batch, window = variance_of_sum(e.batch, phi), variance_of_sum(n, phi)
    # With S = L + B + R, polarisation gives 2 Cov(B, S) = Var(L + B) - Var(L)
    # + Var(B + R) - Var(R), and each of these is a sum of consecutive values.
    covariance = 0.5 * (
        variance_of_sum(left + e.batch, phi)
        - variance_of_sum(left, phi)
        + variance_of_sum(right + e.batch, phi)
        - variance_of_sum(right, phi)
    )
    squares = batch / e.batch**2 + window / n**2 - 2 * covariance / (e.batch * n)
    return float(e.factor * np.sum(squares))


def theoretical_coverage(variance: str, phi: float, n: int) -> float:
    """P(|T| <= t sqrt(E[sigma^2] / (n Var(mean)))), T with the effective dof.

    It takes sigma^2 for a multiple of chi-squared that is independent of the mean.
    """
    e = estimator(variance, n)
    ratio = expected_variance(e, n, phi) / (variance_of_sum(n, phi) / n)
    quantile = stats.t.ppf(1 - SIGNIFICANCE / 2, e.dof)
    return float(1 - 2 * stats.t.sf(quantile * np.sqrt(ratio), e.effective_dof))


def stream(key: jax.Array, phi: jax.Array, n: int) -> jax.Array:
    """z_k = phi z_{k-1} + a standard normal, from a stationary start."""
    noise = jax.random.normal(key, (n,), jnp.float32)
    start = noise[0] / jnp.sqrt(1 - phi**2)

    def step(z: jax.Array, innovation: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = phi * z + innovation
        return z, z

    _, later = jax.lax.scan(step, start, noise[1:])
    return jnp.concatenate([start[None], later])


def holds_zero(values: jax.Array, variance: str) -> jax.Array:
    n, zero = jnp.int32(values.size), jnp.int32(0)
    test = sasa_optax.ZeroMeanTest(SIGNIFICANCE, variance)
    scales = jnp.ones_like(values)
    result = test(sasa_optax.Samples(values, scales, n, n, zero))
    return jnp.less_equal(result.lower, 0) & jnp.greater_equal(result.upper, 0)


@functools.partial(jax.jit, static_argnames="n")
def intervals_hold_zero(keys: jax.Array, phi: jax.Array, n: int) -> jax.Array:
    """One row for each stream, one column for each of `VARIANCES`."""

    def one(key: jax.Array) -> jax.Array:
        values = stream(key, phi, n)
        return jnp.stack([holds_zero(values, variance) for variance in VARIANCES])

    return jax.lax.map(one, keys, batch_size=CHUNK)


def measured_coverage(key: jax.Array, phi: float, n: int, streams: int) -> list[float]:
    """The share of streams whose interval holds zero, for each of `VARIANCES`."""
    keys = jax.random.split(key, streams)
    held = intervals_hold_zero(keys, jnp.float32(phi), n)
    return np.mean(np.asarray(held), axis=0).tolist()


def standard_error(coverage: float, streams: int) -> float:
    return math.sqrt(coverage * (1 - coverage) / streams)


def line(key: jax.Array, phi: float, n: int, streams: int) -> list[str]:
    """A line of the table."""
    cells = [f"AR(1), φ = {phi}" if phi else "i.i.d.", str(n)]
    measured = measured_coverage(key, phi, n, streams)
    for variance, share in zip(VARIANCES, measured, strict=True):
        error = standard_error(share, streams)
        cells.append(f"{100 * share:.1f} ± {100 * error:.1f}")
        cells.append(f"{100 * theoretical_coverage(variance, phi, n):.1f}")
    return cells


def lines(streams: int, seed: int) -> Iterator[list[str]]:
    """Measures and prints one line after the other."""
    cases = list(itertools.product(PHIS, LENGTHS))
    keys = jax.random.split(jax.random.key(seed), len(cases))
    for key, (phi, n) in zip(keys, cases, strict=True):
        measured = line(key, phi, n, streams)
        print(*measured, sep="  ", flush=True)
        yield measured


def page_content(streams: int, seed: int) -> str:
    columns = (head for name in VARIANCES for head in (f"`{name}`", "theory"))
    heads = ["stream", "n", *columns]
    table = publishing.markdown(heads, lines(streams, seed))
    command = "python -m benchmarks.validity.calibration"
    command += f" --streams {streams} --seed {seed}"
    return f"{table}\n\n{publishing.made_by(command, publishing.provenance())}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    page = publishing.DOCS / "calibration.md"
    parser.add_argument("--page", type=pathlib.Path, default=page)
    args = parser.parse_args()
    publishing.write(args.page, {PART: page_content(args.streams, args.seed)})


if __name__ == "__main__":
    main()
