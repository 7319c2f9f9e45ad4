"""The tests for stationarity: windows that say nothing, and bad arguments."""

import math
from collections.abc import Callable

import jax
import numpy as np
import pytest
from samples import (
    MAX_WINDOW,
    VARIANCES,
    Noise,
    estimate,
    judge,
    make_samples,
)

from sasa_optax import (
    EquivalenceTest,
    MeanEstimate,
    Reason,
    SlopeTest,
    StationarityTest,
    TestResult,
    ZeroMeanTest,
    estimate_mean,
)

F32 = np.dtype("float32")
for_each_variance = pytest.mark.parametrize("variance", VARIANCES)


@pytest.mark.parametrize(
    ("older", "newer", "before_first_drop", "later"),
    [
        # The mean is near zero, but the halves lie on either side.
        (-0.1, 0.1, Reason.SIGN, Reason.SIGN),
        # Both halves are near zero, on the same side.
        (0.1, 0.15, Reason.NONE, Reason.NONE),
        (-0.1, -0.15, Reason.NONE, Reason.NONE),
        # The newer half is too far from zero, the window as a whole is not.
        (0.05, 1.0, Reason.HALF, Reason.NONE),
        (0.5, 0.05, Reason.NONE, Reason.NONE),
        # Both are too far.
        (5.0, 5.0, Reason.MEAN, Reason.MEAN),
    ],
)
def test_zero_mean_judges_halves_until_the_first_drop(
    older: float, newer: float, before_first_drop: Reason, later: Reason
) -> None:
    # The noise has mean zero in each half; 5 samples are older, 6 are newer.
    noise = np.array([1, -1, 0, 1, -1, 1, -1, 1, -1, 1, -1], np.float32)
    values = noise + np.repeat(np.array([older, newer], np.float32), [5, 6])
    # The half-width is about 0.7.
    for num_drops, expected in [(0, before_first_drop), (1, later), (7, later)]:
        result = judge(
            ZeroMeanTest(variance="iid"), make_samples(values, num_drops=num_drops)
        )
        assert result.reason == expected
        assert result.stationary == (expected == Reason.NONE)


@pytest.mark.parametrize(
    ("test", "offset", "expected"),
    [
        # The half-width is about 0.7, or 0.4 where the significance is 0.2.
        (ZeroMeanTest(variance="iid", delta=0.9), 0.1, Reason.NONE),
        (ZeroMeanTest(variance="iid", delta=0.5), 0.1, Reason.WIDTH),
        (EquivalenceTest(variance="iid", delta=0.9), 0.1, Reason.NONE),
        (EquivalenceTest(variance="iid", delta=0.3), 0.1, Reason.WIDTH),
        (EquivalenceTest(variance="iid", delta=0.9), -1.0, Reason.SIZE),
        (SlopeTest(), 0.1, Reason.NONE),
    ],
)
def test_a_window_that_is_not_stationary_has_a_reason(
    test: StationarityTest, offset: float, expected: Reason
) -> None:
    noise = np.array([1, -1, 0, 1, -1, 1, -1, 1, -1, 1, -1], np.float32)
    result = judge(test, make_samples(noise + np.float32(offset), num_drops=1))
    assert result.reason == expected
    assert result.stationary == (expected == Reason.NONE)


@pytest.mark.parametrize("log_steps", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_slope_of_a_perfect_line(dtype: np.dtype, sign: int, log_steps: bool) -> None:
    x = np.arange(1, 41)
    values = sign * (np.log(x) if log_steps else x).astype(dtype)
    result = judge(SlopeTest(log_steps=log_steps), make_samples(values))
    assert_finite(result)
    assert result.mean == pytest.approx(sign, rel=1e-5)
    assert result.p_value == pytest.approx(max(sign, 0), abs=1e-6)
    assert result.stationary == (sign > 0)
    assert result.reason == (Reason.NONE if sign > 0 else Reason.SLOPE)


# Windows that say nothing.

TESTS: dict[str, StationarityTest] = {
    "zero_mean-iid": ZeroMeanTest(variance="iid"),
    "zero_mean-batch": ZeroMeanTest(),
    "zero_mean-overlapping": ZeroMeanTest(variance="overlapping_batch_means"),
    "zero_mean-delta": ZeroMeanTest(delta=1.0),
    "equivalence-iid": EquivalenceTest(variance="iid"),
    "equivalence-batch": EquivalenceTest(),
    "equivalence-overlapping": EquivalenceTest(variance="overlapping_batch_means"),
    "slope": SlopeTest(),
    "slope-log": SlopeTest(log_steps=True),
}
for_each_test = pytest.mark.parametrize("test", TESTS.values(), ids=TESTS.keys())


def assert_finite(result: TestResult) -> None:
    assert all(np.isfinite(field) for field in result)


@pytest.mark.parametrize("constant", [0, 1, -0.7, 0.1, 1000.1])
@for_each_test
def test_no_variation_is_never_stationary(
    test: StationarityTest, constant: float
) -> None:
    for n in (4, 7, 37, 100, MAX_WINDOW):
        values = np.full(n, constant, np.float32)
        # Scales so large that the equivalence test would take any mean for zero.
        samples = make_samples(values, scales=np.full_like(values, 1e6))
        result = judge(test, samples)
        assert_finite(result)
        assert not result.stationary
        assert result.reason == Reason.CONSTANT


@pytest.mark.parametrize(
    "test",
    [
        ZeroMeanTest(),
        EquivalenceTest(variance="overlapping_batch_means"),
        SlopeTest(log_steps=True),
    ],
    ids=["zero_mean", "equivalence", "slope"],
)
def test_no_operation_makes_nan(test: StationarityTest) -> None:
    # Not jitted, so that every single operation is checked, masked or not.
    with jax.disable_jit(), jax.debug_nans(True):
        for values in (np.zeros(5, F32), np.full(7, 0.1, F32), np.zeros(0, F32)):
            assert_finite(test(make_samples(values, padding=0.0)))


@for_each_test
def test_a_count_may_be_of_any_integer_type(test: StationarityTest, x64: None) -> None:
    samples = make_samples(np.random.default_rng(0).normal(size=50))
    expected = judge(test, samples)
    for count in (50, np.int64(50), np.int32(50)):
        result = test(samples._replace(num_samples=count))
        np.testing.assert_allclose(result.p_value, expected.p_value, rtol=1e-6)


@pytest.mark.parametrize("num_samples", [0, 1, 2, 3])
@for_each_test
def test_too_few_samples_give_finite_results(
    test: StationarityTest, num_samples: int
) -> None:
    values = Noise("gaussian", 0).draw(num_samples, F32)
    # The window pads with zeros.
    assert_finite(judge(test, make_samples(values, padding=0.0)))


@for_each_variance
def test_estimates_of_an_empty_window_are_finite(variance: str) -> None:
    samples = make_samples(np.zeros(0, np.float32), padding=0.0)
    assert all(np.isfinite(field) for field in estimate(samples, variance))


# Arguments.

NOT_IN_0_1 = [0, 1, -0.1, 1.5, math.nan, math.inf, "0.05", [0.05], None, True]
NOT_POSITIVE = [0, -0.1, math.nan, math.inf, "0.05", [0.05], None, True]
NO_VARIANCE = ["batch", "nonsense", "", None, 3]
VARIANCE_RANGE = "'iid' or 'batch_means' or 'overlapping_batch_means'"


def estimate_noise(variance: str) -> MeanEstimate:
    return estimate_mean(make_samples(Noise("gaussian", 0).draw(9, F32)), variance)


@pytest.mark.parametrize(
    ("function", "name", "value", "allowed"),
    [
        *((ZeroMeanTest, "significance", x, "(0, 1)") for x in NOT_IN_0_1),
        *((EquivalenceTest, "significance", x, "(0, 1)") for x in NOT_IN_0_1),
        *((SlopeTest, "significance", x, "(0, 1)") for x in NOT_IN_0_1),
        *((EquivalenceTest, "delta", x, "(0, inf)") for x in NOT_POSITIVE),
        *(
            (ZeroMeanTest, "delta", x, "(0, inf)")
            for x in NOT_POSITIVE
            if x is not None
        ),
        *((ZeroMeanTest, "variance", x, VARIANCE_RANGE) for x in NO_VARIANCE),
        *((EquivalenceTest, "variance", x, VARIANCE_RANGE) for x in NO_VARIANCE),
        (estimate_noise, "variance", "batch", VARIANCE_RANGE),
    ],
)
def test_arguments_are_checked(
    function: Callable[..., object], name: str, value: object, allowed: str
) -> None:
    with pytest.raises(ValueError, match=name) as error:
        function(**{name: value})
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)
