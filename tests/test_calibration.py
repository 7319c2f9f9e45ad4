"""The theory of benchmarks/calibration.py against algebra and against the library."""

import importlib
from types import ModuleType

import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    return importlib.import_module("calibration")


# 50 = 7 * 7 + 1 leaves a value that no batch contains.
@pytest.mark.parametrize("n", [49, 50])
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("variance", ["iid", "batch_means", "overlapping_batch_means"])
def test_expected_variance_is_that_of_the_covariance_matrix(
    calibration: ModuleType, variance: str, phi: float, n: int
) -> None:
    index = np.arange(n)
    covariance = phi ** np.abs(index[:, None] - index) / (1 - phi**2)
    e = calibration.estimator(variance, n)
    start = e.starts[:, None]
    deviations = ((start <= index) & (index < start + e.batch)) / e.batch - 1 / n
    expected = e.factor * np.trace(deviations @ covariance @ deviations.T)
    got = calibration.expected_variance(e, n, phi)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("variance", ["iid", "batch_means"])
def test_theory_is_exact_for_independent_values(
    calibration: ModuleType, variance: str, n: int
) -> None:
    coverage = calibration.theoretical_coverage(variance, 0.0, n)
    np.testing.assert_allclose(coverage, 0.95, rtol=1e-10)


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_measured_coverage_is_what_theory_says(
    calibration: ModuleType, phi: float
) -> None:
    n, streams = 400, 2000
    measured = calibration.measured_coverage(jax.random.key(0), phi, n, streams)
    batch_means = measured[calibration.VARIANCES.index("batch_means")]
    theory = calibration.theoretical_coverage("batch_means", phi, n)
    error = calibration.standard_error(theory, streams)
    assert abs(batch_means - theory) <= 3.5 * error


def test_the_table_alone_is_replaced(calibration: ModuleType) -> None:
    page = f"before\n{calibration.START}\nold\n{calibration.END}\nafter\n"
    new = calibration.replace_table(page, "new")
    assert new == page.replace("old", "\nnew\n")
    assert calibration.replace_table(new, "new") == new
