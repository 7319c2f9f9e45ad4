"""What is decided: has the mean of the recorded statistic settled?

A test is a function from `Samples` to a `TestResult`, called inside jit with the window
at its full capacity and the number of samples in it as a traced value.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sasa_optax import _checks
from sasa_optax._student_t import student_t_cdf, student_t_quantile


class Samples(NamedTuple):
    """The window, as a test sees it.

    Attributes:
      values: the samples, oldest first, then zeros; shape (max_window,).
      scales: their scales, likewise; None where the test says ``uses_scale = False``.
      num_samples: how many there are, shape (), int32; at least 4.
      step: the step of the newest sample, counted from 1, shape (), int32.
      num_drops: how often the rate was cut before, shape (), int32.
    """

    values: jax.Array
    scales: jax.Array | None
    num_samples: jax.Array
    step: jax.Array
    num_drops: jax.Array


class TestResult(NamedTuple):
    """The outcome of a test; in an optimizer's state, of the newest.

    Attributes:
      step: the step at which it ran, counted from 1; 0 if none has run. int32.
      mean: the mean of the samples (for the slope test, the slope).
      lower: the lower end of its confidence interval.
      upper: the upper end.
      p_value: as the test defines it.
      num_samples: the number of samples judged. int32.
      stationary: whether progress has stopped. bool.

    All have shape (); those without a dtype here are float32, or float64 where a
    parameter is. A test of your own may leave out ``step`` and ``num_samples``, which
    the controller fills in.
    """

    step: jax.typing.ArrayLike = 0
    mean: jax.typing.ArrayLike = 0.0
    lower: jax.typing.ArrayLike = 0.0
    upper: jax.typing.ArrayLike = 0.0
    p_value: jax.typing.ArrayLike = 1.0
    num_samples: jax.typing.ArrayLike = 0
    stationary: jax.typing.ArrayLike = False

    # Tell pytest that this is no test class, whatever its name.
    __test__ = False


StationarityTest = Callable[[Samples], TestResult]


class MeanEstimate(NamedTuple):
    """A mean, its standard error, and the degrees of freedom behind the latter."""

    mean: jax.Array
    standard_error: jax.Array
    dof: jax.Array


def _in_window(values: jax.Array, num_samples: jax.Array) -> jax.Array:
    return jnp.arange(values.size, dtype=jnp.int32) < num_samples


def _mean(
    values: jax.Array, stop: jax.Array, start: jax.typing.ArrayLike = 0
) -> jax.Array:
    """Of the values from ``start`` to ``stop``."""
    # Relative to the first value, so that the mean of a constant is exactly that, and
    # values that do not vary are seen not to.
    mask = _in_window(values, stop) & ~_in_window(values, jnp.asarray(start))
    offsets = jnp.where(mask, values - values[0], 0)
    count = jnp.maximum(stop - start, 1).astype(values.dtype)
    return values[0] + jnp.sum(offsets) / count


def _integer_sqrt(n: jax.Array) -> jax.Array:
    root = jnp.sqrt(n.astype(jnp.float32)).astype(jnp.int32)
    root -= (root * root > n).astype(jnp.int32)
    return root + ((root + 1) * (root + 1) <= n).astype(jnp.int32)


def _iid(centred: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    dof = n - 1
    return jnp.sum(centred**2) / dof.astype(centred.dtype), dof


def _batch_means(centred: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch = _integer_sqrt(n)
    num_batches = n // batch
    largest = math.isqrt(centred.size)
    # One row a batch, so that each sum is over a contiguous row, in a fixed order.
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
    b, count = batch.astype(centred.dtype), (dof + 1).astype(centred.dtype)
    means = jnp.where(start <= dof, cumulative[end] - cumulative[start], 0) / b
    n, m = n.astype(centred.dtype), dof.astype(centred.dtype)
    return jnp.sum(means**2) * n * b / (count * m), dof


_VARIANCES = {
    "iid": _iid,
    "batch_means": _batch_means,
    "overlapping_batch_means": _overlapping_batch_means,
}


def estimate_mean(samples: Samples, variance: str = "batch_means") -> MeanEstimate:
    """The mean of the window and its standard error, sigma / sqrt(n).

    Args:
      samples: the window; n samples with mean m.
      variance: how sigma^2 is estimated.

        - ``"iid"``: the sample variance, with n - 1 degrees of freedom.
        - ``"batch_means"``: with b = floor(sqrt(n)) and K = floor(n / b) batch means
          Y_i, b / (K - 1) * sum((Y_i - m)^2), with K - 1 degrees of freedom. Right for
          correlated samples, as long as b exceeds the correlation time.
        - ``"overlapping_batch_means"``: with all n - b + 1 means of length b,
          n b / ((n - b + 1) (n - b)) * sum((Y_i - m)^2), n - b degrees of freedom.

    Returns:
      A `MeanEstimate` of scalars. Where fewer than four samples are there, all its
      fields are finite, but mean nothing.

    Raises:
      ValueError: if ``variance`` is none of these.
    """
    _checks.choice("variance", variance, tuple(_VARIANCES))
    n = jnp.maximum(samples.num_samples, 4)
    mask = _in_window(samples.values, n)
    mean = _mean(samples.values, n)
    centred = jnp.where(mask, samples.values - mean, 0)
    sigma_squared, dof = _VARIANCES[variance](centred, n)
    dtype = samples.values.dtype
    standard_error = jnp.sqrt(sigma_squared / n.astype(dtype))
    return MeanEstimate(mean, standard_error, dof.astype(dtype))


def _two_sided_p_value(distance: jax.Array, estimate: MeanEstimate) -> jax.Array:
    """P(|T| > distance / standard error); 1 where the samples do not vary."""
    varies = estimate.standard_error > 0
    t = distance / jnp.where(varies, estimate.standard_error, 1)
    return jnp.where(varies, 2 * student_t_cdf(-jnp.abs(t), estimate.dof), 1)


def _half_width(significance: jax.typing.ArrayLike, e: MeanEstimate) -> jax.Array:
    tail = jnp.asarray(significance, e.mean.dtype) / 2
    return -student_t_quantile(tail, e.dof) * e.standard_error


@dataclasses.dataclass(frozen=True)
class ZeroMeanTest:
    """The test of SASA+: could the mean of the statistic be zero?

    Stationary if zero lies in the confidence interval of the window's mean, and the
    older and the newer half of the window (split at floor(n/2)) have means of the same
    sign. Until the first drop, the interval around the mean of each half must hold
    zero as well. ``p_value`` is that of the hypothesis that the mean is zero, so a
    stationary window has a large one. A window without any variation says nothing,
    and is not stationary.

    A short or noisy window has a wide interval, which holds zero though the mean is far
    from it. With ``delta``, an interval counts only once it is narrow: its half-width
    must be below delta * v, with v the window's mean scale. It then takes as many
    samples as the dynamics ask for, and more after each drop.

    Attributes:
      significance: s in (0, 1); the interval's confidence is 1 - s. Default 0.05.
      variance: see `estimate_mean`. Default "batch_means".
      delta: how wide an interval may be, in (0, inf), or None, the default, for any
        width. For `master_statistic` at momentum 0.9 take 5; its scale is
        (1 + momentum)/(1 - momentum) times smaller than that of the fluctuations.

    Raises:
      ValueError: at construction, if an argument is out of range.
    """

    significance: jax.typing.ArrayLike = 0.05
    variance: str = "batch_means"
    delta: jax.typing.ArrayLike | None = None

    def __post_init__(self) -> None:
        _checks.number("significance", self.significance, "(0, 1)")
        _checks.choice("variance", self.variance, tuple(_VARIANCES))
        if self.delta is not None:
            _checks.number("delta", self.delta, "(0, inf)")

    @property
    def uses_scale(self) -> bool:
        return self.delta is not None

    def _is_narrow(
        self, half_width: jax.Array, samples: Samples
    ) -> jax.typing.ArrayLike:
        if self.delta is None:
            return True
        assert samples.scales is not None
        scale = _mean(samples.scales, samples.num_samples)
        return half_width < jnp.asarray(self.delta, scale.dtype) * scale

    def __call__(self, samples: Samples) -> TestResult:
        estimate = estimate_mean(samples, self.variance)
        half_width = _half_width(self.significance, estimate)
        half = samples.num_samples // 2
        older = _mean(samples.values, half)
        newer = _mean(samples.values, samples.num_samples, start=half)

        means = jnp.stack([older, newer, estimate.mean])
        p_values = _two_sided_p_value(means, estimate)
        could_be_zero = p_values >= self.significance
        zero_inside = jnp.where(
            samples.num_drops == 0,
            could_be_zero[0] & could_be_zero[1],
            could_be_zero[2],
        )
        same_sign = jnp.sign(older) == jnp.sign(newer)
        says_something = estimate.standard_error > 0
        says_something &= self._is_narrow(half_width, samples)
        return TestResult(
            mean=estimate.mean,
            lower=estimate.mean - half_width,
            upper=estimate.mean + half_width,
            p_value=p_values[2],
            stationary=zero_inside & same_sign & says_something,
        )


@dataclasses.dataclass(frozen=True)
class EquivalenceTest:
    """The test of SASA: is the mean of the statistic negligible beside its scale?

    Stationary if the confidence interval of the window's mean lies inside
    (-delta * v, delta * v), with v the window's mean scale. It asks for positive
    evidence: a window too short or too noisy does not pass. ``p_value`` is that of the
    hypothesis that the mean is *not* negligible, so a stationary window has a small
    one. A window without any variation says nothing, and is not stationary.

    Attributes:
      delta: the tolerance, in (0, inf). Default 0.02, for the scale of
        `yaida_statistic`; that of `master_statistic` is (1 + momentum)/(1 - momentum)
        times smaller, so it asks for a larger one.
      significance: s in (0, 1); the interval's confidence is 1 - s. Default 0.2.
      variance: see `estimate_mean`. Default "batch_means".

    Raises:
      ValueError: at construction, if an argument is out of range.
    """

    delta: jax.typing.ArrayLike = 0.02
    significance: jax.typing.ArrayLike = 0.2
    variance: str = "batch_means"
    uses_scale = True

    def __post_init__(self) -> None:
        _checks.number("delta", self.delta, "(0, inf)")
        _checks.number("significance", self.significance, "(0, 1)")
        _checks.choice("variance", self.variance, tuple(_VARIANCES))

    def __call__(self, samples: Samples) -> TestResult:
        assert samples.scales is not None
        estimate = estimate_mean(samples, self.variance)
        half_width = _half_width(self.significance, estimate)
        delta = jnp.asarray(self.delta, estimate.mean.dtype)
        tolerance = delta * _mean(samples.scales, samples.num_samples)
        margin = tolerance - jnp.abs(estimate.mean)
        p_value = jnp.where(margin > 0, _two_sided_p_value(margin, estimate), 1)
        return TestResult(
            mean=estimate.mean,
            lower=estimate.mean - half_width,
            upper=estimate.mean + half_width,
            p_value=p_value,
            stationary=(p_value < self.significance) & (estimate.standard_error > 0),
        )


@dataclasses.dataclass(frozen=True)
class SlopeTest:
    """The test of SLOPE: has the recorded value (the loss) stopped falling?

    Fits a line to the window by least squares. With t = r sqrt((n - 2) / (1 - r^2)),
    still decreasing if P(T_{n-2} < t) < s; otherwise progress has stopped. ``mean``,
    ``lower`` and ``upper`` are the slope per step and its interval of confidence
    1 - s; ``p_value`` is P(T_{n-2} < t), small while the value falls. A window without
    any variation says nothing, and is not stationary.

    Attributes:
      significance: s in (0, 1). Default 0.05.
      log_steps: regress on the logarithm of the step instead. Default False.

    Raises:
      ValueError: at construction, if an argument is out of range.
    """

    significance: jax.typing.ArrayLike = 0.05
    log_steps: bool = False
    uses_scale = False

    def __post_init__(self) -> None:
        _checks.number("significance", self.significance, "(0, 1)")

    def __call__(self, samples: Samples) -> TestResult:
        dtype = samples.values.dtype
        n = jnp.maximum(samples.num_samples, 4)
        mask = _in_window(samples.values, n)
        x = jnp.arange(samples.values.size, dtype=jnp.int32).astype(dtype)
        if self.log_steps:
            # log(first + x) less log(first): the digits that differ late in a run.
            first = jnp.maximum(samples.step - n + 1, 1)
            x = jnp.log1p(x / first.astype(dtype))
        x = jnp.where(mask, x - _mean(x, n), 0)
        y = jnp.where(mask, samples.values - _mean(samples.values, n), 0)
        sxx, sxy, syy = jnp.sum(x * x), jnp.sum(x * y), jnp.sum(y * y)
        slope = sxy / sxx
        dof = (n - 2).astype(dtype)
        # The smallest normal number stands for the zero residual of a perfect line.
        residual = jnp.maximum(syy - slope * sxy, jnp.finfo(dtype).tiny)
        standard_error = jnp.sqrt(residual) / jnp.sqrt(dof * sxx)
        half_width = _half_width(
            self.significance, MeanEstimate(slope, standard_error, dof)
        )
        p_value = student_t_cdf(slope / standard_error, dof)
        return TestResult(
            mean=slope,
            lower=slope - half_width,
            upper=slope + half_width,
            p_value=p_value,
            stationary=(p_value >= self.significance) & (syy > 0),
        )
