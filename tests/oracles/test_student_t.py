"""Student's t, compared with SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, DTypeLike
from scipy import stats

from sasa_optax import student_t_cdf, student_t_quantile

# The degrees of freedom are an argument, so they are always traced.
cdf = jax.jit(student_t_cdf)
quantile = jax.jit(student_t_quantile)

# The documentation promises these.
CDF_TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
QUANTILE_TOLERANCE = {"float32": 5e-5, "float64": 1e-8}
DOFS = np.unique([*range(1, 61), *np.geomspace(60, 16384, 60).astype(int)])
EDGES = np.array([1, 2, 3, 25, 26, 27, 16384])


# Each grid has 256 rows, so that each function is compiled once for each type.
def column(values: ArrayLike, dtype: DTypeLike) -> np.ndarray:
    return np.asarray(values, dtype)[:, None]


def test_known_value() -> None:
    assert quantile(0.975, 10) == pytest.approx(2.228, abs=5e-4)
    assert cdf(2.228, 10) == pytest.approx(0.975, abs=5e-5)


def test_cdf_is_that_of_scipy(dtype: np.dtype) -> None:
    t = column([*np.linspace(-12, 12, 252), -1e3, -60, 60, 1e3], dtype)
    dof = DOFS.astype(dtype)
    # SciPy gets the rounded arguments, so that only the function is compared.
    expected = stats.t.cdf(t.astype(float), DOFS)
    np.testing.assert_allclose(
        cdf(t, dof), expected, rtol=0, atol=CDF_TOLERANCE[dtype.name]
    )


def test_quantile_is_that_of_scipy(dtype: np.dtype) -> None:
    tail = np.geomspace(1e-5, 0.49 if dtype == np.float32 else 0.4999, 128)
    p = column([*tail, *(1 - tail)], dtype)
    expected = stats.t.ppf(p.astype(float), DOFS)
    tolerance = QUANTILE_TOLERANCE[dtype.name]
    np.testing.assert_allclose(
        quantile(p, DOFS.astype(dtype)), expected, rtol=tolerance
    )


def test_symmetry(dtype: np.dtype) -> None:
    # 1 - p is exact for multiples of 1/256.
    t, p = np.linspace(0, 30, 128), np.arange(1, 129) / 256
    dof = DOFS.astype(dtype)
    low, high = np.split(cdf(column([*-t, *t], dtype), dof), 2)
    np.testing.assert_allclose(low, 1 - high, rtol=0, atol=1e-6)
    np.testing.assert_allclose(low[0], 0.5, rtol=4 * np.finfo(dtype).eps)
    low, high = np.split(quantile(column([*p, *(1 - p)], dtype), dof), 2)
    np.testing.assert_allclose(low, -high, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(low[-1], 0, rtol=0, atol=1e-6)


# The slack of the monotonicity tests is far below the error that SciPy allows, and
# above rounding.
@given(t=st.tuples(st.floats(-50, 50), st.floats(-50, 50)), dof=st.integers(1, 16384))
def test_cdf_rises_with_t(x64: None, t: tuple[float, float], dof: int) -> None:
    low, high = cdf(np.sort(t), float(dof))
    assert 0 <= low <= high + 1e-13
    assert high <= 1


@given(
    p=st.tuples(st.floats(1e-4, 0.9999), st.floats(1e-4, 0.9999)),
    dof=st.integers(1, 16384),
)
def test_quantile_rises_with_p(x64: None, p: tuple[float, float], dof: int) -> None:
    low, high = quantile(np.sort(p), float(dof))
    assert low <= high + 1e-9


@given(t=st.floats(0, 50), dof=st.integers(1, 16383))
def test_tails_shrink_with_dof(x64: None, t: float, dof: int) -> None:
    fewer, more = cdf(t, np.array([dof, dof + 1.0]))
    assert fewer <= more + 1e-13


# These two are not jitted, so that every single operation is checked for NaN, and in
# float32, where squares overflow first.
def test_extreme_t_gives_finite_probabilities() -> None:
    t = [0, 1e-30, 1e-3, 1, 1e3, 1e20, 3e38]
    t = column([*t, *np.negative(t)], np.float32)
    with jax.disable_jit(), jax.debug_nans(True):
        actual = student_t_cdf(t, EDGES.astype(np.float32))
    expected = stats.t.cdf(t.astype(float), EDGES)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_extreme_p_gives_finite_quantiles() -> None:
    tail = np.array([1e-6, 1e-3, 0.25, 0.499999])
    p = column([*tail, *(1 - tail)], np.float32)
    with jax.disable_jit(), jax.debug_nans(True):
        actual = student_t_quantile(p, EDGES.astype(np.float32))
    assert np.all(np.isfinite(actual))
    np.testing.assert_array_equal(np.sign(actual) - np.sign(p - 0.5), 0)


@pytest.mark.parametrize("function", [student_t_cdf, student_t_quantile])
@pytest.mark.parametrize(
    ("x", "dof", "expected"),
    [
        (np.float32(0.5), np.float32(5), "float32"),
        (np.float32(0.5), np.int32(5), "float32"),
        (np.float32(0.5), 5, "float32"),
        (jnp.bfloat16(0.5), np.float16(5), "float32"),
        (np.float64(0.5), np.float32(5), "float64"),
        (np.float32(0.5), np.float64(5), "float64"),
        (np.float64(0.5), 5, "float64"),
    ],
)
def test_result_type(x64: None, function, x, dof, expected: str) -> None:
    assert jax.eval_shape(function, x, dof).dtype == expected


@pytest.mark.parametrize("dof", [5, 5.0, np.int64(5), np.float64(5)])
def test_python_and_integer_scalars_are_accepted(dof: float) -> None:
    assert jax.eval_shape(student_t_cdf, 1, dof).dtype == np.float32
    assert jax.eval_shape(student_t_quantile, 0.5, dof).dtype == np.float32


@pytest.mark.parametrize("function", [student_t_cdf, student_t_quantile])
def test_shapes_broadcast(function) -> None:
    result = jax.eval_shape(function, np.full((3, 1), 0.5), np.ones(4))
    assert result.shape == (3, 4)
