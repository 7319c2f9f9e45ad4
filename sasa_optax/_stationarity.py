"""Tests for stationarity: has the mean of the recorded statistic settled?

A test is a function from `Samples` to a `TestResult`. It is called inside jit with the
window at its full capacity, and with the number of samples in it as a traced value.
"""

import enum
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from sasa_optax import _checks, _types, _window
from sasa_optax._conditional import cond
from sasa_optax._student_t import student_t_cdf, student_t_quantile
from sasa_optax._types import DType, Numeric


class Samples(NamedTuple):
    """The window, as a test sees it.

    Attributes:
      values: the samples, oldest first, then zeros; shape (max_window,).
      scales: their scales, likewise.
      num_samples: how many there are, shape (), int32; at least 4.
      step: the step of the newest sample, counted from 1, shape (), int32.
      num_drops: how often the rate was cut before, shape (), int32.
    """

    values: jax.Array
    scales: jax.Array
    num_samples: jax.Array
    step: jax.Array
    num_drops: jax.Array


class Reason(enum.IntEnum):
    """Why a test found that the dynamics still move. ``text`` says it in words.

    A test gives the first that holds, and NONE if the window is stationary.
    `ZeroMeanTest` has MEAN, HALF, SIGN and WIDTH, `EquivalenceTest` has SIZE and WIDTH,
    `SlopeTest` has SLOPE, and all have CONSTANT. A test of your own may give any.

    Example:
      >>> import sasa_optax
      >>> for reason in sasa_optax.Reason:
      ...     print(int(reason), reason.name, "-", reason.text)
      0 NONE - the dynamics still move
      1 NOT_FINITE - the result of the test is not finite
      2 CONSTANT - the samples do not vary
      3 MEAN - zero is outside the interval
      4 HALF - zero is outside the interval around the mean of one half
      5 SIGN - the means of the two halves have different signs
      6 SIZE - the mean is not below delta times the scale
      7 WIDTH - the interval is wider than delta allows
      8 SLOPE - the value still falls
    """

    text: str

    def __new__(cls, code: int, text: str) -> "Reason":
        reason = int.__new__(cls, code)
        reason._value_ = code
        reason.text = text
        return reason

    @classmethod
    def _missing_(cls, value: object) -> "Reason":
        # A test of someone's own may give any number.
        return cls.NONE

    NONE = 0, "the dynamics still move"
    NOT_FINITE = 1, "the result of the test is not finite"
    CONSTANT = 2, "the samples do not vary"
    MEAN = 3, "zero is outside the interval"
    HALF = 4, "zero is outside the interval around the mean of one half"
    SIGN = 5, "the means of the two halves have different signs"
    SIZE = 6, "the mean is not below delta times the scale"
    WIDTH = 7, "the interval is wider than delta allows"
    SLOPE = 8, "the value still falls"


class TestResult(NamedTuple):
    """The outcome of a test. An optimizer's state holds the newest.

    Attributes:
      at_step: the step at which the test ran, counted from 1; 0 if none has run. int32.
      mean: the mean of the samples (for the slope test, the slope).
      lower: the lower end of its confidence interval.
      upper: the upper end.
      p_value: as the test defines it.
      num_samples: the number of samples judged. int32.
      stationary: whether progress has stopped. bool.
      reason: if it has not, why: a `Reason`, as int32. If it has, or if the test does
        not say why, ``Reason.NONE``.

    All have shape (), and the dtype of the statistic where none is given here. A test
    of your own may leave out ``at_step``, ``num_samples`` and ``reason``.
    """

    at_step: Numeric = 0
    mean: Numeric = 0.0
    lower: Numeric = 0.0
    upper: Numeric = 0.0
    p_value: Numeric = 1.0
    num_samples: Numeric = 0
    stationary: Numeric = False
    reason: Numeric = Reason.NONE

    # Without this, pytest takes it for a test class.
    __test__ = False

    @property
    def step(self) -> Numeric:
        """The same as ``at_step``."""
        return self.at_step


StationarityTest = Callable[[Samples], TestResult]
TestLike = Literal["zero_mean", "equivalence", "slope"] | StationarityTest


class MeanEstimate(NamedTuple):
    """A mean, its standard error, and the degrees of freedom of the latter."""

    mean: jax.Array
    standard_error: jax.Array
    dof: jax.Array

    def half_width(self, significance: Numeric) -> jax.Array:
        """Half the width of the interval with confidence 1 - significance."""
        tail = jnp.asarray(significance, self.mean.dtype) / 2
        return -student_t_quantile(tail, self.dof) * self.standard_error

    def two_sided_p_value(self, distance: jax.Array) -> jax.Array:
        """P(|T| > distance / standard error); 1 where the samples do not vary."""
        varies = self.standard_error > 0
        t = distance / jnp.where(varies, self.standard_error, 1)
        return jnp.where(varies, 2 * student_t_cdf(-jnp.abs(t), self.dof), 1)

    def result(
        self,
        significance: Numeric,
        p_value: jax.Array,
        reasons: dict[Reason, jax.Array],
    ) -> TestResult:
        """The result of a test: stationary if no reason holds that it is not."""
        half_width = self.half_width(significance)
        lower, upper = self.mean - half_width, self.mean + half_width
        reason = jnp.int32(Reason.NONE)
        for code, holds in reversed(reasons.items()):
            reason = jnp.where(holds, jnp.int32(code), reason)
        stationary = reason == Reason.NONE
        return TestResult(0, self.mean, lower, upper, p_value, 0, stationary, reason)


def _in_window(values: jax.Array, num_samples: Numeric) -> jax.Array:
    return jnp.arange(values.size, dtype=jnp.int32) < num_samples


def _mean(values: jax.Array, stop: jax.Array, start: Numeric = 0) -> jax.Array:
    """The mean of the values from ``start`` to ``stop``."""
    # Offsets from the first value make the mean of a constant exact, so that samples
    # that do not vary are recognised.
    mask = _in_window(values, stop) & ~_in_window(values, start)
    offsets = jnp.where(mask, values - values[0], 0)
    count = jnp.maximum(stop - start, 1).astype(values.dtype)
    return values[0] + jnp.sum(offsets) / count


def _integer_sqrt(n: jax.Array) -> jax.Array:
    root = jnp.sqrt(n.astype(jnp.float32)).astype(jnp.int32)
    root -= (root * root > n).astype(jnp.int32)
    return root + ((root + 1) * (root + 1) <= n).astype(jnp.int32)


def _iid(centred: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(centred**2) / (n - 1).astype(centred.dtype), n - 1


def _batch_means(centred: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch = _integer_sqrt(n)
    num_batches = jax.lax.div(n, batch)
    largest = math.isqrt(centred.size)
    # Each batch is a row, so each sum runs over a contiguous row in a fixed order.
    row = jnp.arange(largest + 2, dtype=jnp.int32)[:, None]
    column = jnp.arange(largest, dtype=jnp.int32)[None, :]
    used = (row < num_batches) & (column < batch)
    index = jnp.where(used, row * batch + column, 0)
    sums = jnp.sum(jnp.where(used, centred[index], 0), axis=1)
    b, dof = batch.astype(centred.dtype), num_batches - 1
    return jnp.sum((sums / b) ** 2) * b / dof.astype(centred.dtype), dof


def _overlapping_batch_means(
    centred: jax.Array, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    batch = _integer_sqrt(n)
    dof = n - batch
    cumulative = jnp.concatenate([jnp.zeros_like(centred[:1]), jnp.cumsum(centred)])
    start = jnp.arange(centred.size, dtype=jnp.int32)
    end = jnp.minimum(start + batch, centred.size)
    n, b, m = (x.astype(centred.dtype) for x in (n, batch, dof))
    means = jnp.where(start <= dof, cumulative[end] - cumulative[start], 0) / b
    return jnp.sum(means**2) * n * b / ((m + 1) * m), dof


_VARIANCES = {
    "iid": _iid,
    "batch_means": _batch_means,
    "overlapping_batch_means": _overlapping_batch_means,
}


def estimate_mean(samples: Samples, variance: str = "batch_means") -> MeanEstimate:
    """The mean m of the n samples in a window, and its standard error sigma / sqrt(n).

    Args:
      samples: the window, with at least four samples.
      variance: how sigma^2 is estimated.

        - ``"iid"``: the sample variance, with n - 1 degrees of freedom.
        - ``"batch_means"``: b / (K - 1) * sum((Y_i - m)^2) with b = floor(sqrt(n)) and
          K = floor(n / b) batch means Y_i, and K - 1 degrees of freedom. It is right
          for correlated samples while b exceeds the correlation time.
        - ``"overlapping_batch_means"``: n b / ((n - b + 1) (n - b)) * sum((Y_i - m)^2)
          with all n - b + 1 means of length b, and n - b degrees of freedom.

    Returns:
      A `MeanEstimate` of scalars.

    Raises:
      ValueError: if ``variance`` is none of these.
    """
    _checks.choice("variance", variance, _VARIANCES)
    values = samples.values
    n = jnp.maximum(jnp.asarray(samples.num_samples, jnp.int32), 4)
    mean = _mean(values, n)
    centred = jnp.where(_in_window(values, n), values - mean, 0)
    sigma_squared, dof = _VARIANCES[variance](centred, n)
    standard_error = jnp.sqrt(sigma_squared / n.astype(values.dtype))
    return MeanEstimate(mean, standard_error, dof.astype(values.dtype))


def _check_samples(test: Any, samples: Any) -> None:
    if not isinstance(samples, Samples):
        raise TypeError(
            f"{test!r} judges sasa_optax.Samples, got {samples!r}. Under "
            "optax.inject_hyperparams, name `test` in static_args: it takes functions "
            "for schedules."
        )


@_types.options("variance")
class ZeroMeanTest:
    """The test of SASA+: could the mean of the statistic be zero?

    The dynamics count as stationary if zero lies in the confidence interval of the
    window's mean, and the means of the older and the newer half of the window (split at
    floor(n/2)) have the same sign. Until the first drop, the interval around the mean
    of each half must hold zero as well. ``p_value`` is that of the hypothesis that the
    mean is zero, so a stationary window has a large one. A window without any variation
    is not stationary.

    A short or noisy window has a wide interval, which holds zero though the mean is far
    from it. With ``delta``, an interval counts only if its half-width is below
    delta * v, where v is the window's mean scale. The test then takes as many samples
    as the dynamics ask for, and more after each drop.

    Attributes:
      significance: s in (0, 1); the interval's confidence is 1 - s. Default 0.05.
      variance: ``"iid"``, ``"batch_means"`` or ``"overlapping_batch_means"``; see
        `estimate_mean`. Default "batch_means".
      delta: how wide an interval may be, in (0, inf), as a share of the gradient's
        noise. With 0.25, a window too short to see the dynamics makes no drop (see
        docs/validity.md). Default None: any width.

    Raises:
      ValueError: if a field is out of range.
    """

    significance: Numeric = 0.05
    variance: str = "batch_means"
    delta: Numeric | None = None

    def __post_init__(self) -> None:
        _checks.fields(self, significance="(0, 1)", delta="(0, inf)")
        _checks.choice("variance", self.variance, _VARIANCES)

    @_types.traced_once
    def __call__(self, samples: Samples) -> TestResult:
        _check_samples(self, samples)
        estimate = estimate_mean(samples, self.variance)
        half = jnp.asarray(samples.num_samples, jnp.int32) >> 1
        older = _mean(samples.values, half)
        newer = _mean(samples.values, samples.num_samples, start=half)
        p_values = estimate.two_sided_p_value(jnp.stack([older, newer, estimate.mean]))
        is_outside = ~(p_values >= self.significance)
        half_is_outside = jnp.any(is_outside[:2])
        # Until the first drop the halves decide: if they pass, so does the mean, except
        # for rounding.
        mean_decides = (samples.num_drops > 0) | half_is_outside
        reasons = {
            Reason.CONSTANT: ~(estimate.standard_error > 0),
            Reason.MEAN: is_outside[2] & mean_decides,
            Reason.HALF: half_is_outside & (samples.num_drops == 0),
            Reason.SIGN: jnp.sign(older) != jnp.sign(newer),
        }
        if self.delta is not None:
            scale = _mean(samples.scales, samples.num_samples)
            bound = jnp.asarray(self.delta, scale.dtype) * scale
            half_width = estimate.half_width(self.significance)
            reasons[Reason.WIDTH] = ~(half_width < bound)
        return estimate.result(self.significance, p_values[2], reasons)


@_types.options("variance")
class EquivalenceTest:
    """The test of SASA: is the mean of the statistic negligible beside its scale?

    The dynamics count as stationary if the confidence interval of the window's mean
    lies inside (-delta * v, delta * v), where v is the window's mean scale. A window
    too short or too noisy does not pass. ``p_value`` is that of the hypothesis that the
    mean is *not* negligible, so a stationary window has a small one. A window without
    any variation is not stationary.

    Attributes:
      delta: the tolerance, in (0, inf), as a share of the gradient's noise, which is
        the scale of every statistic here. Default 0.02, that of SASA's authors.
      significance: s in (0, 1); the interval's confidence is 1 - s. Default 0.2.
      variance: as in `ZeroMeanTest`. Default "batch_means".

    Raises:
      ValueError: if a field is out of range.
    """

    delta: Numeric = 0.02
    significance: Numeric = 0.2
    variance: str = "batch_means"

    def __post_init__(self) -> None:
        _checks.fields(self, delta="(0, inf)", significance="(0, 1)")
        _checks.choice("variance", self.variance, _VARIANCES)

    @_types.traced_once
    def __call__(self, samples: Samples) -> TestResult:
        _check_samples(self, samples)
        estimate = estimate_mean(samples, self.variance)
        scale = _mean(samples.scales, samples.num_samples)
        margin = jnp.asarray(self.delta, scale.dtype) * scale - jnp.abs(estimate.mean)
        p_value = jnp.where(margin > 0, estimate.two_sided_p_value(margin), 1)
        reasons = {
            Reason.CONSTANT: ~(estimate.standard_error > 0),
            Reason.SIZE: ~(margin > 0),
            Reason.WIDTH: ~(p_value < self.significance),
        }
        return estimate.result(self.significance, p_value, reasons)


@_types.options("log_steps")
class SlopeTest:
    """The test of SLOPE: has the recorded value (the loss) stopped falling?

    It fits a line to the window by least squares. With t = r sqrt((n - 2) / (1 - r^2)),
    where r is the correlation of the n values and their steps, the value is still
    falling if P(T_{n-2} < t) < s; otherwise progress has stopped. ``mean``, ``lower``
    and ``upper`` are the slope per step and its interval of confidence 1 - s;
    ``p_value`` is P(T_{n-2} < t), small while the value falls. A window without any
    variation is not stationary.

    Attributes:
      significance: s in (0, 1). Default 0.05.
      log_steps: whether to regress on the logarithm of the step. Default False.

    Raises:
      ValueError: if a field is out of range.
    """

    significance: Numeric = 0.05
    log_steps: bool = False

    def __post_init__(self) -> None:
        _checks.fields(self, significance="(0, 1)")
        _checks.boolean("log_steps", self.log_steps)

    @_types.traced_once
    def __call__(self, samples: Samples) -> TestResult:
        _check_samples(self, samples)
        values, n = samples.values, jnp.maximum(samples.num_samples, 4)
        dtype, mask = values.dtype, _in_window(values, n)
        x = jnp.arange(values.size, dtype=jnp.int32).astype(dtype)
        if self.log_steps:
            # log(first + x) - log(first) keeps the digits that differ late in a run.
            first = jnp.maximum(samples.step - n + 1, 1)
            x = jnp.log1p(x / first.astype(dtype))
        x = jnp.where(mask, x - _mean(x, n), 0)
        y = jnp.where(mask, values - _mean(values, n), 0)
        sxx, sxy, syy = jnp.sum(x * x), jnp.sum(x * y), jnp.sum(y * y)
        slope, dof = sxy / sxx, (n - 2).astype(dtype)
        # The smallest normal number stands for the zero residual of a perfect line.
        residual = jnp.maximum(syy - slope * sxy, jnp.finfo(dtype).tiny)
        standard_error = jnp.sqrt(residual) / jnp.sqrt(dof * sxx)
        p_value = student_t_cdf(slope / standard_error, dof)
        reasons = {
            Reason.CONSTANT: ~(syy > 0),
            Reason.SLOPE: ~(p_value >= self.significance),
        }
        estimate = MeanEstimate(slope, standard_error, dof)
        return estimate.result(self.significance, p_value, reasons)


NAMED = {
    "zero_mean": ZeroMeanTest,
    "equivalence": EquivalenceTest,
    "slope": SlopeTest,
}


def as_test(test: TestLike) -> StationarityTest:
    """The test that was named or given."""
    if callable(test):
        return test
    _checks.choice("test", test, NAMED, "a function from Samples to TestResult")
    return NAMED[test]()


def no_result(dtype: DType) -> TestResult:
    """The newest result before the first test."""
    zero = jnp.zeros((), jnp.int32)
    floats = [jnp.asarray(x, dtype) for x in (0, 0, 0, 1)]
    flags = jnp.zeros((), bool), jnp.copy(zero)
    return TestResult._make([zero, *floats, jnp.copy(zero), *flags])


def judge(
    test: StationarityTest,
    window: _window.WindowState,
    num_samples: jax.Array,
    step: jax.Array,
    num_drops: jax.Array,
) -> TestResult:
    """What the test says of the newest ``num_samples``, in the dtypes of the state."""
    rows = _window.contents(window, num_samples)
    # Losses have no scale. The test that judges them reads none.
    result = test(Samples(rows[0], rows[-1], num_samples, step, num_drops))
    if not isinstance(result, TestResult):
        raise TypeError(f"test must return a TestResult, got {result!r} from {test!r}.")
    numbers = jnp.stack(
        [
            _checks.scalar(f"TestResult.{name}", getattr(result, name), rows.dtype)
            for name in ("mean", "lower", "upper", "p_value")
        ]
    )
    # A result that is not finite says nothing, and is kept out of the state.
    stationary = _checks.scalar("TestResult.stationary", result.stationary, bool)
    is_finite = jnp.all(jnp.isfinite(numbers))
    reason = _checks.scalar("TestResult.reason", result.reason, jnp.int32)
    reason = jnp.where(is_finite, reason, jnp.int32(Reason.NOT_FINITE))
    floats = jnp.nan_to_num(numbers)
    return TestResult._make(
        [step, *floats, num_samples, stationary & is_finite, reason]
    )


def judge_if(is_due: jax.Array, last: TestResult, *arguments: Any) -> TestResult:
    """The newest result: that of `judge` with these arguments if one is due."""
    return cond(is_due, lambda: judge(*arguments), lambda: last)
