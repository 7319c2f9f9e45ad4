"""Windows to test, and calls of the tests for stationarity that compile each once."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sasa_optax import (
    MeanEstimate,
    Samples,
    TestResult,
    estimate_mean,
)

VARIANCES = ("iid", "batch_means", "overlapping_batch_means")
# This is 16^2 + 2*16. Windows of such lengths have the most batches for their length.
MAX_WINDOW = 288
# Stands beyond the samples, where it must not matter.
JUNK = 1e30


@functools.partial(jax.jit, static_argnums=1)
def estimate(samples: Samples, variance: str) -> MeanEstimate:
    return estimate_mean(samples, variance)


@jax.jit
def judge(test: Any, samples: Samples) -> TestResult:
    """What a test object says of a window. The numbers in the object are traced."""
    return test(samples)


def padded(values: np.ndarray, max_window: int, padding: float) -> np.ndarray:
    return np.pad(
        values,
        (0, max_window - len(values)),
        constant_values=values.dtype.type(padding),
    )


def make_samples(
    values: np.ndarray,
    scales: np.ndarray | None = None,
    step: int | None = None,
    num_drops: int = 1,
    max_window: int = MAX_WINDOW,
    padding: float = JUNK,
) -> Samples:
    scales = np.ones_like(values) if scales is None else scales
    return Samples(
        values=jnp.asarray(padded(values, max_window, padding)),
        scales=jnp.asarray(padded(scales, max_window, padding)),
        num_samples=jnp.int32(len(values)),
        step=jnp.int32(len(values) if step is None else step),
        num_drops=jnp.int32(num_drops),
    )


def stack(samples: list[Samples]) -> Samples:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *samples)


class Noise(NamedTuple):
    """The process that samples are drawn from."""

    kind: str
    seed: int

    def draw(self, n: int, dtype: np.dtype) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        noise = rng.normal(size=n)
        if self.kind == "ar1":
            for i in range(1, n):
                noise[i] += 0.7 * noise[i - 1]
        if self.kind == "offset":
            noise += 1e3
        if self.kind == "shifted":
            noise += rng.normal() / math.sqrt(n)
        return noise.astype(dtype)
