"""The tests for stationarity, compared with NumPy and SciPy in double precision."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from samples import (
    MAX_WINDOW,
    VARIANCES,
    Noise,
    estimate,
    judge,
    make_samples,
    stack,
)
from scipy import stats

from sasa_optax import (
    EquivalenceTest,
    MeanEstimate,
    SlopeTest,
    TestResult,
    ZeroMeanTest,
)

F32 = np.dtype("float32")
# The second holds for what needs a quantile or a probability.
TOLERANCE = {"float32": 1e-3, "float64": 1e-9}
T_TOLERANCE = {"float32": 1e-3, "float64": 1e-7}

for_each_variance = pytest.mark.parametrize("variance", VARIANCES)
# Some tests take long to compile: all variances in one type, all types in one variance.
for_some_variances = pytest.mark.parametrize(
    ("dtype", "variance"),
    [*(("float32", variance) for variance in VARIANCES), ("float64", "batch_means")],
    indirect=["dtype"],
)


# The formulas, as they stand in the papers.


class Reference(NamedTuple):
    mean: float
    standard_error: float
    dof: int

    def half_width(self, significance: float) -> float:
        return float(stats.t.isf(significance / 2, self.dof)) * self.standard_error

    def interval(self, significance: float) -> tuple[float, float]:
        half_width = self.half_width(significance)
        return self.mean - half_width, self.mean + half_width


def reference_estimate(values: np.ndarray, variance: str) -> Reference:
    z = values.astype(np.float64)
    n, mean = len(z), z.mean()
    if variance == "iid":
        return Reference(mean, z.std(ddof=1) / math.sqrt(n), n - 1)
    b = math.isqrt(n)
    if variance == "batch_means":
        k = n // b
        y = np.array([z[i * b : (i + 1) * b].mean() for i in range(k)])
        sigma_squared, dof = b / (k - 1) * np.sum((y - mean) ** 2), k - 1
    else:
        y = np.array([z[i : i + b].mean() for i in range(n - b + 1)])
        factor = n * b / ((n - b + 1) * (n - b))
        sigma_squared, dof = factor * np.sum((y - mean) ** 2), n - b
    return Reference(mean, math.sqrt(sigma_squared / n), dof)


def reference_zero_mean(
    values: np.ndarray, expected: Reference, num_drops: int, significance: float
) -> bool:
    half = len(values) // 2
    older = values[:half].astype(np.float64).mean()
    newer = values[half:].astype(np.float64).mean()
    half_width = expected.half_width(significance)
    judged = [older, newer] if num_drops == 0 else [expected.mean]
    zero_inside = all(m - half_width <= 0 <= m + half_width for m in judged)
    return zero_inside and (older > 0) == (newer > 0)


def reference_equivalence(
    scales: np.ndarray, expected: Reference, delta: float, significance: float
) -> bool:
    tolerance = delta * scales.astype(np.float64).mean()
    lower, upper = expected.interval(significance)
    return bool(-tolerance < lower and upper < tolerance)


def clear_cut(decide: Callable[[float], bool], significance: float) -> bool:
    """Whether rounding cannot change the decision."""
    return decide(significance * 0.99) == decide(significance * 1.01)


noises = st.builds(
    Noise,
    st.sampled_from(["gaussian", "ar1", "offset", "shifted"]),
    st.integers(0, 2**32 - 1),
)
significances = st.floats(0.002, 0.8)


def lengths(max_window: int) -> st.SearchStrategy[int]:
    # At these lengths, that of a batch or the number of batches changes.
    edges = {
        b * b + c for b in range(2, math.isqrt(max_window) + 1) for c in (-1, 0, b)
    }
    return st.integers(4, max_window) | st.sampled_from(
        sorted(n for n in edges if 4 <= n <= max_window)
    )


def assert_estimates(actual: MeanEstimate, values: np.ndarray, variance: str) -> None:
    mean, standard_error, dof = reference_estimate(values, variance)
    # Centring a sample rounds it by about this much.
    rounding = 4 * np.finfo(values.dtype).eps * np.max(np.abs(values))
    tolerance = TOLERANCE[values.dtype.name]
    np.testing.assert_allclose(actual.mean, mean, rtol=0, atol=rounding)
    np.testing.assert_allclose(
        actual.standard_error, standard_error, rtol=tolerance, atol=rounding
    )
    assert actual.dof == dof


def assert_interval(
    result: TestResult, expected: tuple[float, float], values: np.ndarray
) -> None:
    lower, upper = expected
    tolerance = T_TOLERANCE[values.dtype.name] * (upper - lower)
    tolerance += 16 * np.finfo(values.dtype).eps * np.max(np.abs(values))
    np.testing.assert_allclose(result.lower, lower, rtol=0, atol=tolerance)
    np.testing.assert_allclose(result.upper, upper, rtol=0, atol=tolerance)


def assert_slope(
    result: TestResult, x: np.ndarray, values: np.ndarray, significance: float
) -> None:
    n, tolerance = len(x), T_TOLERANCE[values.dtype.name]
    _, mean, lower, upper, p_value, _, stationary, _ = jax.device_get(result)
    # Their stubs do not know the fields of what SciPy returns.
    fit: Any = stats.linregress(x, values.astype(np.float64), alternative="less")
    # The interval tells the standard error, and that tells r.
    standard_error = (upper - lower) / 2 / stats.t.isf(significance / 2, n - 2)
    t = mean / standard_error
    r = t / math.sqrt(n - 2 + t**2)
    assert r == pytest.approx(fit.rvalue, abs=tolerance)
    assert standard_error == pytest.approx(fit.stderr, rel=tolerance)
    # Rounding must be small beside the uncertainty of a slope without correlation.
    unit = fit.stderr / math.sqrt(1 - fit.rvalue**2)
    assert mean == pytest.approx(fit.slope, abs=tolerance * unit)
    assert p_value == pytest.approx(fit.pvalue, abs=tolerance)
    if abs(fit.pvalue - significance) > tolerance:
        assert stationary == (fit.pvalue >= significance)


# Estimates.


@for_each_variance
def test_estimates_at_every_length(dtype: np.dtype, variance: str) -> None:
    for n in range(4, MAX_WINDOW + 1):
        values = Noise("ar1", n).draw(n, dtype)
        assert_estimates(estimate(make_samples(values), variance), values, variance)


@for_each_variance
@given(noise=noises, n=lengths(MAX_WINDOW))
def test_estimates(dtype: np.dtype, variance: str, noise: Noise, n: int) -> None:
    values = noise.draw(n, dtype)
    assert_estimates(estimate(make_samples(values), variance), values, variance)


@for_each_variance
@settings(max_examples=settings().max_examples // 5)
@given(noise=noises, n=lengths(16384))
def test_estimates_in_a_large_window(
    dtype: np.dtype, variance: str, noise: Noise, n: int
) -> None:
    values = noise.draw(n, dtype)
    samples = make_samples(values, max_window=16384)
    assert_estimates(estimate(samples, variance), values, variance)


@pytest.mark.parametrize("variance", ["batch_means", "overlapping_batch_means"])
@pytest.mark.parametrize("n", [5, 8, 9, 15])
def test_estimates_in_a_full_small_window(n: int, variance: str) -> None:
    values = Noise("gaussian", n).draw(n, F32)
    samples = make_samples(values, max_window=n)
    assert_estimates(estimate(samples, variance), values, variance)


# The zero-mean test.


@for_some_variances
@given(
    noise=noises,
    n=lengths(MAX_WINDOW),
    significance=significances,
    num_drops=st.integers(0, 2),
)
def test_zero_mean(
    dtype: np.dtype,
    variance: str,
    noise: Noise,
    n: int,
    significance: float,
    num_drops: int,
) -> None:
    values = noise.draw(n, dtype)
    samples = make_samples(values, num_drops=num_drops)
    result = judge(ZeroMeanTest(significance, variance), samples)

    mean, standard_error, dof = expected = reference_estimate(values, variance)
    p_value = 2 * stats.t.sf(abs(mean) / standard_error, dof)
    assert_interval(result, expected.interval(significance), values)
    np.testing.assert_allclose(
        result.p_value, p_value, rtol=0, atol=T_TOLERANCE[dtype.name]
    )

    decide = functools.partial(reference_zero_mean, values, expected, num_drops)
    assume(clear_cut(decide, significance))
    assert result.stationary == decide(significance)


@given(n=lengths(MAX_WINDOW), seed=st.integers(0, 2**32 - 1))
def test_a_wide_interval_says_nothing(n: int, seed: int) -> None:
    values = Noise("gaussian", seed).draw(n, F32)
    scales = np.random.default_rng(seed).uniform(0.5, 1.5, n).astype(F32)
    samples = make_samples(values, scales)
    at_any_width = bool(judge(ZeroMeanTest(), samples).stationary)
    half_width = reference_estimate(values, "batch_means").half_width(0.05)
    delta = half_width / np.mean(scales, dtype=np.float64)
    assert not judge(ZeroMeanTest(delta=0.99 * delta), samples).stationary
    wide = judge(ZeroMeanTest(delta=1.01 * delta), samples)
    assert wide.stationary == at_any_width


def test_zero_mean_of_many_windows_at_once() -> None:
    sizes = np.random.default_rng(0).integers(4, MAX_WINDOW, 200)
    values = [Noise("shifted", k).draw(n, F32) for k, n in enumerate(sizes)]
    drops = [k % 2 for k in range(200)]
    samples = [make_samples(z, num_drops=d) for z, d in zip(values, drops, strict=True)]
    stationary = jax.jit(jax.vmap(ZeroMeanTest(0.3)))(stack(samples)).stationary

    outcomes = set()
    for z, d, actual in zip(values, drops, stationary, strict=True):
        expected = reference_estimate(z, "batch_means")
        decide = functools.partial(reference_zero_mean, z, expected, d)
        if clear_cut(decide, 0.3):
            assert actual == decide(0.3)
            outcomes.add((d, bool(actual)))
    # Otherwise, the loop above would say little.
    assert len(outcomes) == 4


# The equivalence test.


@for_some_variances
@given(
    noise=noises,
    n=lengths(MAX_WINDOW),
    significance=significances,
    delta=st.floats(0.01, 2),
)
def test_equivalence(
    dtype: np.dtype,
    variance: str,
    noise: Noise,
    n: int,
    significance: float,
    delta: float,
) -> None:
    values = noise.draw(n, dtype)
    scales = Noise("gaussian", noise.seed + 1).draw(n, dtype) ** 2
    result = judge(
        EquivalenceTest(delta, significance, variance), make_samples(values, scales)
    )

    mean, standard_error, dof = expected = reference_estimate(values, variance)
    assert_interval(result, expected.interval(significance), values)
    # At this significance the wider end of the interval meets the tolerance.
    margin = delta * scales.astype(np.float64).mean() - abs(mean)
    p_value = 2 * stats.t.sf(margin / standard_error, dof) if margin > 0 else 1
    np.testing.assert_allclose(
        result.p_value, p_value, rtol=0, atol=T_TOLERANCE[dtype.name]
    )

    decide = functools.partial(reference_equivalence, scales, expected, delta)
    assume(clear_cut(decide, significance))
    assert result.stationary == decide(significance)


def test_equivalence_of_many_windows_at_once() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(4, MAX_WINDOW, 200)
    values = [Noise("shifted", k).draw(n, F32) for k, n in enumerate(sizes)]
    scales = [rng.uniform(0, 4) * rng.uniform(size=n).astype(F32) for n in sizes]
    samples = [make_samples(*pair) for pair in zip(values, scales, strict=True)]
    stationary = jax.jit(jax.vmap(EquivalenceTest(0.2)))(stack(samples)).stationary

    outcomes = []
    for z, v, actual in zip(values, scales, stationary, strict=True):
        expected = reference_estimate(z, "batch_means")
        decide = functools.partial(reference_equivalence, v, expected, 0.2)
        if clear_cut(decide, 0.2):
            assert actual == decide(0.2)
            outcomes.append(bool(actual))
    assert 20 < sum(outcomes) < len(outcomes) - 20


# The slope test.


@pytest.mark.parametrize("log_steps", [False, True])
@given(
    noise=noises,
    n=lengths(MAX_WINDOW),
    steps_before=st.integers(0, 300),
    trend=st.floats(-2, 2),
    significance=significances,
)
def test_slope(
    dtype: np.dtype,
    log_steps: bool,
    noise: Noise,
    n: int,
    steps_before: int,
    trend: float,
    significance: float,
) -> None:
    x = np.arange(steps_before + 1, steps_before + n + 1, dtype=np.float64)
    x = np.log(x) if log_steps else x
    # The trend is visible, but not beyond doubt.
    drift = trend * math.sqrt(12 / n) * (x - x.mean()) / np.ptp(x)
    values = noise.draw(n, dtype) + drift.astype(dtype)
    samples = make_samples(values, step=steps_before + n)
    result = judge(SlopeTest(significance, log_steps), samples)
    assert_slope(result, x, values, significance)


@pytest.mark.parametrize("step", [10**4, 10**6, 10**8])
def test_slope_over_log_steps_late_in_a_run(step: int) -> None:
    """The logarithms of late steps differ by less than float32 resolves."""
    x = np.log(np.arange(step - MAX_WINDOW + 1, step + 1))
    trend = 0.5 * (x - x.mean()) / np.ptp(x)
    values = Noise("gaussian", 0).draw(MAX_WINDOW, F32) - trend.astype(F32)
    samples = make_samples(values, step=step)
    result = judge(SlopeTest(log_steps=True), samples)
    assert_slope(result, x, values, 0.05)
