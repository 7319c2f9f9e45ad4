# Copyright 2026 DeepMind Technologies Limited. All Rights Reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# ==============================================================================
"""Reduce the learning rate when the training dynamics are stationary.

At a constant learning rate, training ends up in a stationary state: the
parameters move around, and make no further progress. The transformation finds
this out from the parameters and the updates alone, by a statistical test, and
then reduces the learning rate. It needs neither the loss nor a validation
metric.
"""

import math
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
from optax._src import base
from optax._src import numerics
from optax._src import update
import optax.tree

# Of the samples since the newest reduction, the newest 1/8 are tested.
_LEAK_RATIO = 8


class ReduceOnStationarityState(NamedTuple):
  """State for :func:`optax.contrib.reduce_on_stationarity`."""

  scale: jax.Array  # shape=()
  count: jax.Array  # shape=(), dtype=jnp.int32
  num_reductions: jax.Array  # shape=(), dtype=jnp.int32
  # The samples since the newest reduction, in a ring buffer, and their number.
  samples: jax.Array  # shape=(max_samples,)
  num_samples: jax.Array  # shape=(), dtype=jnp.int32


def reduce_on_stationarity(
    factor: float = 0.1,
    min_samples: int = 1000,
    test_interval: int = 100,
    significance: float = 0.05,
    min_scale: float = 0.0,
    max_samples: int = 16384,
) -> base.GradientTransformationExtraArgs:
  r"""Reduce the learning rate when the dynamics are stationary (SASA+).

  Chain it after a complete optimizer that runs at a constant learning rate,
  like :func:`optax.contrib.reduce_on_plateau`. With :math:`u_k` the updates of
  that optimizer and :math:`s` the scale that multiplies them, it records at
  each step

  .. math::

    \Delta_k = \tfrac{s}{2} \|u_k\|^2 - \langle x_{k+1}, u_k \rangle
             = \frac{\|x_k\|^2 - \|x_{k+1}\|^2}{2 s}.

  The mean of :math:`\Delta_k` is zero under any stationary dynamics, whatever
  made the updates: momentum, preconditioning, clipping or weight decay. Every
  ``test_interval`` steps, a test looks at the newest eighth of the samples
  since the newest reduction. It estimates their variance by batch means, since
  they are correlated. The dynamics count as stationary if zero lies in the
  confidence interval of the mean, and if the means of the older and the newer
  half have the same sign. Until the first reduction, zero must lie in the
  interval around the mean of each half. The scale is then multiplied by
  ``factor``, and recording starts anew.

  Args:
    factor: Factor by which to reduce the learning rate, in (0, 1).
    min_samples: A test needs more samples than this, at least 4. So the first
      runs after more than ``8 * min_samples`` steps. An epoch is a good choice.
    test_interval: Number of steps between tests.
    significance: The confidence of the interval is one minus this.
    min_scale: Scale at which the reductions stop.
    max_samples: Capacity for samples, more than ``min_samples``.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` object. Its ``update``
    needs ``params``. Samples that are not finite are left out.

  Examples:
    >>> import optax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> solver = optax.chain(
    ...     optax.sgd(0.1),
    ...     optax.contrib.reduce_on_stationarity(min_samples=100),
    ... )
    >>> params = jnp.full(10, 5.0)
    >>> opt_state = solver.init(params)
    >>> def step(carry, key):
    ...   params, opt_state = carry
    ...   grad = params + jax.random.normal(key, params.shape)  # noisy gradient
    ...   updates, opt_state = solver.update(grad, opt_state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   return (params, opt_state), None
    >>> keys = jax.random.split(jax.random.key(0), 2000)
    >>> (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), keys)
    >>> print('Scale: {:.1f}'.format(optax.tree.get(opt_state, 'scale')))
    Scale: 0.1

  References:
    Zhang et al, `Statistical Adaptive Stochastic Gradient Methods
    <https://arxiv.org/abs/2002.10597>`_, 2020

    Lang et al, `Using Statistics to Automate Stochastic Optimization
    <https://arxiv.org/abs/1909.09785>`_, 2019

  .. seealso::
    :func:`optax.contrib.reduce_on_plateau` reduces the learning rate when a
    metric that is passed to it has stopped improving.
  """
  if not 0.0 < factor < 1.0:
    raise ValueError(f"factor must be in the range (0, 1), got {factor}.")
  if not 0.0 < significance < 1.0:
    raise ValueError(
        f"significance must be in the range (0, 1), got {significance}."
    )
  if not 4 <= min_samples < max_samples:
    raise ValueError(
        "min_samples must be at least 4 and less than max_samples, got "
        f"min_samples = {min_samples} and max_samples = {max_samples}."
    )
  if test_interval < 1:
    raise ValueError(f"test_interval must be positive, got {test_interval}.")

  def init_fn(params: base.Params) -> ReduceOnStationarityState:
    # In half precision the samples would say nothing, so the state is never
    # narrower than float32.
    dtype = jnp.finfo(optax.tree.dtype(params, "promote")).dtype
    dtype = jnp.promote_types(dtype, jnp.float32)
    return ReduceOnStationarityState(
        scale=jnp.ones([], dtype),
        count=jnp.zeros([], jnp.int32),
        num_reductions=jnp.zeros([], jnp.int32),
        samples=jnp.zeros([max_samples], dtype),
        num_samples=jnp.zeros([], jnp.int32),
    )

  def update_fn(
      updates: base.Updates,
      state: ReduceOnStationarityState,
      params: Optional[base.Params] = None,
      **extra_args: Any,
  ) -> tuple[base.Updates, ReduceOnStationarityState]:
    del extra_args
    if params is None:
      raise ValueError(base.NO_PARAMS_MSG)
    scale = state.scale
    scaled = jax.tree.map(lambda u: (scale * u).astype(u.dtype), updates)
    new_params = update.apply_updates(params, scaled)
    sample = scale / 2 * _real_vdot(updates, updates, scale.dtype)
    sample -= _real_vdot(new_params, updates, scale.dtype)
    is_finite = jnp.isfinite(sample)

    place = state.num_samples % max_samples
    kept = jnp.where(is_finite, sample, state.samples[place])
    samples = state.samples.at[place].set(kept)
    num_samples = jnp.where(
        is_finite, numerics.safe_increment(state.num_samples), state.num_samples
    )
    count = numerics.safe_increment(state.count)

    num_tested = jnp.minimum(-(-num_samples // _LEAK_RATIO), max_samples)
    is_due = is_finite & (count % test_interval == 0)
    is_due &= num_tested > min_samples
    is_stationary = jax.lax.cond(
        is_due,
        lambda: _is_stationary(
            _newest(samples, num_samples, num_tested),
            num_tested,
            state.num_reductions == 0,
            significance,
        ),
        lambda: jnp.zeros([], bool),
    )
    is_reduced = is_stationary & (scale > min_scale)
    reduced = jnp.maximum(factor * scale, min_scale).astype(scale.dtype)
    return scaled, ReduceOnStationarityState(
        scale=jnp.where(is_reduced, reduced, scale),
        count=count,
        num_reductions=state.num_reductions + is_reduced.astype(jnp.int32),
        samples=samples,
        num_samples=jnp.where(is_reduced, 0, num_samples),
    )

  # pyrefly: ignore[bad-argument-type]
  return base.GradientTransformationExtraArgs(init_fn, update_fn)


def _real_vdot(tree_x, tree_y, dtype):
  """The real part of the inner product of two trees, in at least ``dtype``."""

  def leaf_vdot(x, y):
    x = x.astype(jnp.promote_types(x.dtype, dtype))
    y = y.astype(jnp.promote_types(y.dtype, dtype))
    return jnp.sum(jnp.real(x * jnp.conj(y))).astype(dtype)

  return optax.tree.sum(jax.tree.map(leaf_vdot, tree_x, tree_y))


def _newest(samples, num_samples, num_tested):
  """The newest samples of a ring buffer, oldest first, then zeros."""
  index = jnp.arange(samples.size)
  ordered = samples[(num_samples - num_tested + index) % samples.size]
  return jnp.where(index < num_tested, ordered, 0)


def _is_stationary(samples, n, is_first, significance):
  """Whether the mean of the first n samples may be zero."""
  index = jnp.arange(samples.size)

  def mean(start, stop):
    # Offsets from the first make the mean of equal samples exact.
    is_inside = (start <= index) & (index < stop)
    offsets = jnp.where(is_inside, samples - samples[0], 0)
    return samples[0] + jnp.sum(offsets) / (stop - start)

  means = jnp.stack([mean(0, n // 2), mean(n // 2, n), mean(0, n)])
  # The batches are as long as they are many. The half keeps the root of a
  # square number from being rounded down.
  length = jnp.sqrt(n + 0.5).astype(jnp.int32)
  num_batches = n // length
  centred = jnp.where(index < num_batches * length, samples - means[2], 0)
  sums = jax.ops.segment_sum(
      centred, index // length, num_segments=math.isqrt(samples.size) + 2
  )
  dof = (num_batches - 1).astype(samples.dtype)
  variance = jnp.sum(sums**2) / length / dof
  error = jnp.sqrt(variance / n)

  t = jnp.abs(means) / jnp.where(error > 0, error, 1)
  # The probability that Student's t is larger in size than this.
  p_values = jax.scipy.special.betainc(dof / 2, 0.5, dof / (dof + t**2))
  may_be_zero = p_values >= significance
  return (
      (error > 0)
      & (jnp.sign(means[0]) == jnp.sign(means[1]))
      & jnp.where(is_first, may_be_zero[0] & may_be_zero[1], may_be_zero[2])
  )
