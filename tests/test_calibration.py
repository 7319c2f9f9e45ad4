"""The theory of `benchmarks.validity.calibration` against algebra and the library."""

from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import publishing
from benchmarks.validity import calibration

pytestmark = pytest.mark.optimized


# 50 = 7 * 7 + 1 leaves a value that no batch contains.
@pytest.mark.parametrize("n", [49, 50])
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("variance", ["iid", "batch_means", "overlapping_batch_means"])
def test_expected_variance_is_that_of_the_covariance_matrix(
    variance: str, phi: float, n: int
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
def test_theory_is_exact_for_independent_values(variance: str, n: int) -> None:
    coverage = calibration.theoretical_coverage(variance, 0.0, n)
    np.testing.assert_allclose(coverage, 0.95, rtol=1e-10)


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_measured_coverage_is_what_theory_says(phi: float) -> None:
    n, streams = 400, 2000
    measured = calibration.measured_coverage(jax.random.key(0), phi, n, streams)
    batch_means = measured[calibration.VARIANCES.index("batch_means")]
    theory = calibration.theoretical_coverage("batch_means", phi, n)
    error = calibration.standard_error(theory, streams)
    assert abs(batch_means - theory) <= 3.5 * error


def test_only_the_named_parts_are_replaced(tmp_path: Path) -> None:
    text = "before\n<!-- a -->\nold\n<!-- /a -->\nafter\n<!-- b -->old<!-- /b -->\n"
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    for _ in range(2):
        publishing.write(page, {"a": "new φ"})
        new = text.replace("\nold\n", "\n\nnew φ\n\n")
        assert page.read_text(encoding="utf-8") == new
    with pytest.raises(SystemExit, match="lacks the markers <!-- c -->"):
        publishing.write(page, {"c": "new"})


def test_a_row_replaces_that_of_the_same_place() -> None:
    rows = [{"name": "a", "x": 1}, {"name": "b", "x": 2}]
    merged = publishing.merged(rows, {"name": "a", "x": 3}, lambda row: row["name"])
    assert merged == [{"name": "a", "x": 3}, {"name": "b", "x": 2}]


def test_a_table_is_what_markdown_takes_for_one() -> None:
    table = publishing.markdown(["name", "x"], [["a", 1], ["b", 2.5]])
    lines = ["| name | x |", "| --- | --: |", "| a | 1 |", "| b | 2.5 |"]
    assert table.splitlines() == lines


def test_provenance_has_the_versions_that_run() -> None:
    made = publishing.provenance()
    assert made["jax"] == jax.__version__
    assert made["numpy"] == np.__version__
    sentence = publishing.made_by("make it", made | {"device": "cpu", "cores": 2})
    assert sentence.startswith("Made by `make it` on a 2-core ")
    assert f" CPU, JAX {jax.__version__}, " in sentence
