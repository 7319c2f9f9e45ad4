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
"""Tests for the transformation in `_reduce_on_stationarity.py`."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax._src import test_utils
from optax.contrib import _reduce_on_stationarity
import scipy.stats

# The first test needs more than 4 samples, of the newest eighth, so it runs
# after 33 steps: at step 40.
_TRANSFORM = _reduce_on_stationarity.reduce_on_stationarity(
    min_samples=4, test_interval=10, min_scale=0.05, max_samples=64
)
_UPDATE = jax.jit(_TRANSFORM.update)
_DECISIONS = jax.jit(
    jax.vmap(
        _reduce_on_stationarity._is_stationary, in_axes=(0, None, None, None)
    )
)


@functools.partial(jax.jit, static_argnums=0)
def _run(transform, updates, params):
  """The last state, and the scales and the updates after each step."""

  def step(carry, updates):
    params, state = carry
    updates, state = transform.update(updates, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (state.scale, updates)

  start = params, transform.init(params)
  (_, state), (scales, updates) = jax.lax.scan(step, start, updates)
  return state, scales, updates


def _moving_in_place(dtype='float32'):
  """Updates that go back and forth by chance, and do not lead anywhere."""
  places = np.random.default_rng(0).normal(size=(401, 3))
  updates = np.diff(places, axis=0)
  return jnp.asarray(updates, dtype), jnp.asarray(places[0], dtype)


def _reference(samples, is_first, significance):
  """The test by NumPy and SciPy, in float64."""
  n = len(samples)
  length = int(np.sqrt(n))
  num_batches = n // length
  batches = samples[: num_batches * length].reshape(num_batches, length)
  deviations = batches.mean(axis=1) - samples.mean()
  variance = length * np.sum(deviations**2) / (num_batches - 1)
  older, newer = samples[: n // 2].mean(), samples[n // 2 :].mean()
  means = np.array([older, newer] if is_first else [samples.mean()])
  t = np.abs(means) / np.sqrt(variance / n)
  p_values = 2 * scipy.stats.t.sf(t, num_batches - 1)
  return np.sign(older) == np.sign(newer) and np.all(p_values >= significance)


class ReduceOnStationarityTest(parameterized.TestCase):
  """Tests for reduce_on_stationarity."""

  def tearDown(self):
    super().tearDown()
    jax.config.update('jax_enable_x64', False)

  @parameterized.parameters('bfloat16', 'float32', 'float64')
  def test_reduces_where_nothing_moves_on(self, dtype):
    """The scale is reduced at tests alone, and the dtypes are kept."""
    jax.config.update('jax_enable_x64', dtype == 'float64')
    state, scales, updates = _run(_TRANSFORM, *_moving_in_place(dtype))
    scales = np.asarray(scales)
    steps = 1 + np.flatnonzero(np.diff(scales, prepend=1))
    self.assertGreaterEqual(steps[0], 40)
    np.testing.assert_array_equal(steps % 10, 0)
    # The second reduction ends at min_scale.
    np.testing.assert_allclose(scales[steps - 1], [0.1, 0.05], rtol=1e-6)
    self.assertEqual(state.num_reductions, 2)
    self.assertEqual(updates.dtype, dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    self.assertEqual(state.scale.dtype, wide)
    self.assertEqual(state.samples.dtype, wide)

  @parameterized.parameters(-1.0, 0.0)
  def test_does_not_reduce(self, update):
    """Neither along a straight line, nor where nothing moves at all."""
    updates = jnp.full((400, 3), update)
    _, scales, _ = _run(_TRANSFORM, updates, jnp.full(3, 1000.0))
    np.testing.assert_array_equal(scales, 1)

  def test_records_the_change_of_the_squared_norm(self):
    """A sample is what half the squared norm loses, over the scale."""
    parts = np.random.default_rng(0).normal(size=(2, 3, 2))
    params, updates = jnp.asarray(parts[..., 0] + 1j * parts[..., 1])
    state = _TRANSFORM.init(params)._replace(scale=jnp.asarray(0.5))
    _, state = _UPDATE(updates, state, params)
    old, new = (
        jnp.sum(jnp.abs(x) ** 2) for x in (params, params + 0.5 * updates)
    )
    np.testing.assert_allclose(state.samples[0], old - new, rtol=1e-4)
    self.assertEqual(state.num_samples, 1)

  @parameterized.product(n=(5, 16, 24, 63, 64), is_first=(True, False))
  def test_agrees_with_scipy(self, n, is_first):
    """The decision is that of NumPy and SciPy."""
    samples = np.random.default_rng(n).normal(size=(40, n))
    # Means of many sizes: some windows are stationary, and some are not.
    samples += np.linspace(-1.5, 1.5, 40)[:, None]
    padded = np.pad(samples, ((0, 0), (0, 64 - n))).astype(np.float32)
    decisions = set()
    for significance in (0.05, 0.5):
      actual = _DECISIONS(padded, n, is_first, significance)
      expected = [_reference(x, is_first, significance) for x in samples]
      np.testing.assert_array_equal(actual, expected)
      decisions.update(map(bool, expected))
    self.assertEqual(decisions, {True, False})

  def test_the_newest_samples_come_from_the_ring_in_their_order(self):
    """Also where the ring has been filled more than once."""
    ring = jnp.array([8.0, 9.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    newest = _reduce_on_stationarity._newest(ring, jnp.int32(10), jnp.int32(3))
    np.testing.assert_array_equal(newest, [7, 8, 9, 0, 0, 0, 0, 0])

  def test_leaves_out_what_is_not_finite(self):
    """A step that is not finite leaves the samples as they were."""
    params = jnp.ones(3)
    _, state = _UPDATE(params, _TRANSFORM.init(params), params)
    _, after = _UPDATE(params * jnp.nan, state, params)
    self.assertEqual(after.count, 2)
    test_utils.assert_trees_all_equal(
        after._replace(count=0), state._replace(count=0)
    )

  def test_needs_params(self):
    """Without params it raises optax's error."""
    with self.assertRaisesRegex(ValueError, 'params'):
      _TRANSFORM.update(jnp.ones(3), _TRANSFORM.init(jnp.ones(3)))

  @parameterized.parameters(
      {'factor': 1.0},
      {'significance': 0.0},
      {'min_samples': 3},
      {'min_samples': 64, 'max_samples': 64},
      {'test_interval': 0},
  )
  def test_refuses(self, **options):
    """An argument out of range is refused by name."""
    with self.assertRaisesRegex(ValueError, next(iter(options))):
      _reduce_on_stationarity.reduce_on_stationarity(**options)


if __name__ == '__main__':
  absltest.main()
