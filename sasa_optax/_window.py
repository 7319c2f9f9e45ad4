"""The window of samples: the newest part of those since the last drop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _checks, _epochs, _types
from sasa_optax._types import DType, Numeric


@_types.options("max_window", "scale_min_samples")
class Window:
    """Which samples a test sees, and how often it runs.

    The window keeps the newest ``ceil(total / leak_ratio)`` of the ``total`` samples
    since the last drop, the leaky bucket of the papers.

    Attributes:
      leak_ratio: the window keeps the newest 1/leak_ratio of the samples, an integer of
        at least 1. Default 8.
      min_samples: no test runs before the window keeps more samples than this, an
        integer of at least 4. Default None: 1000, or one epoch of ``steps_per_epoch``
        between 100 (fewer samples say nothing) and 1000.
      test_interval: the number of steps between tests, an integer of at least 1.
        Default None: 100, or one epoch within the same limits.
      warmup_steps: the rate does not drop in this many first steps, an integer of at
        least 0. Default 0.
      max_window: the capacity, an integer greater than ``min_samples``. A sample and
        its scale take 8 bytes, or 16 in float64. Default 16384.
      scale_min_samples: after each drop ``min_samples`` grows by 1/factor, up to what
        ``max_window`` can hold: at a rate ten times smaller, the dynamics need ten
        times the steps to become stationary. This keeps the rate of a long run from
        vanishing. Default False, as in the papers.

    Raises:
      ValueError: if a field is out of range.

    Example:
      >>> import sasa_optax
      >>> window = sasa_optax.Window(leak_ratio=4, min_samples=200)
      >>> optimizer = sasa_optax.sasa_plus(1.0, window=window)
    """

    leak_ratio: Numeric = 8
    min_samples: Numeric | None = None
    test_interval: Numeric | None = None
    warmup_steps: Numeric = 0
    max_window: int = 16384
    scale_min_samples: bool = False

    def __post_init__(self) -> None:
        _checks.fields(
            self, leak_ratio=1, min_samples=4, test_interval=1, warmup_steps=0
        )
        most = _checks.static_integer("max_window", self.max_window, 5)
        _checks.boolean("scale_min_samples", self.scale_min_samples)
        if self.min_samples is not None:
            _checks.exceeds("max_window", most, "min_samples", self.min_samples)

    def resolved(self, steps_per_epoch: int | None) -> "Window":
        """The window with its defaults filled in."""
        defaults = _epochs.defaults(steps_per_epoch)
        return _types.with_defaults(
            self,
            min_samples=defaults.min_samples,
            test_interval=defaults.test_interval,
        )

    def samples_needed(self, num_drops: jax.Array, factor: Numeric) -> jax.Array:
        """A test needs more samples than this, and never more than fit."""
        least = jnp.asarray(self.min_samples, jnp.int32)
        if not self.scale_min_samples:
            return least
        shrunk = jnp.asarray(factor, jnp.float32) ** num_drops.astype(jnp.float32)
        grown = least.astype(jnp.float32) / shrunk
        most = jnp.float32(self.max_window - 1)
        return jnp.round(jnp.minimum(grown, most)).astype(jnp.int32)

    def num_kept(self, state: "WindowState") -> jax.Array:
        total, leak_ratio = state.total, jnp.asarray(self.leak_ratio, jnp.int32)
        # Written so that the ceiling cannot overflow.
        is_more = jax.lax.rem(total, leak_ratio) > 0
        leaked = jax.lax.div(total, leak_ratio) + is_more.astype(jnp.int32)
        return jnp.minimum(leaked, state.buffer.shape[1])

    @_types.traced_once
    def next_test(
        self, step: jax.Array, total: jax.Array, num_drops: jax.Array, factor: Numeric
    ) -> jax.Array:
        """The first step after this one at which a test can run, shape (), int32."""
        needed = self.samples_needed(num_drops, factor)
        # Unsigned integers hold the sum of any two counters.
        step, total, needed, leak_ratio, interval = (
            jnp.asarray(x, jnp.uint32)
            for x in (step, total, needed, self.leak_ratio, self.test_interval)
        )
        last, most = (jnp.uint32(jnp.iinfo(x).max) for x in (jnp.int32, jnp.uint32))
        fits = leak_ratio <= (most - 1) // needed
        enough = jnp.where(fits, needed * leak_ratio + 1, most)
        missing = jnp.minimum(jnp.maximum(enough, total + 1) - total, last)
        due = jnp.minimum(step + missing, last)
        rounded_up = (due + interval - 1) // interval * interval
        return jnp.minimum(rounded_up, last).astype(jnp.int32)

    def check(self, state: "WindowState") -> None:
        """Checks that the state is that of a window of this capacity."""
        capacity = state.buffer.shape[1]
        if capacity != self.max_window:
            raise ValueError(
                f"The state holds a window of {capacity} samples, but max_window is "
                f"{self.max_window}: to continue with it, call "
                f"`state = sasa_optax.resize_window(state, {self.max_window})`."
            )


class WindowState(NamedTuple):
    """A ring buffer of the newest samples.

    Attributes:
      buffer: the samples, shape (width, max_window), float32 or float64.
      head: the place of the next sample, shape (), int32.
      total: the number of samples since the window was emptied, shape (), int32.
    """

    buffer: jax.Array
    head: jax.Array
    total: jax.Array


def empty(width: int, capacity: int, dtype: DType) -> WindowState:
    buffer = jnp.zeros((width, capacity), dtype)
    return WindowState(buffer, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def push(state: WindowState, sample: jax.Array, keep: jax.Array) -> WindowState:
    """Appends ``sample``, shape (width,), where ``keep`` is true."""
    head, capacity = state.head, jnp.int32(state.buffer.shape[1])
    old = jax.lax.dynamic_index_in_dim(state.buffer, head, axis=1, keepdims=False)
    new = jnp.where(keep, sample, old)
    return WindowState(
        buffer=jax.lax.dynamic_update_index_in_dim(state.buffer, new, head, axis=1),
        head=jnp.where(keep, jax.lax.rem(head + 1, capacity), head),
        total=jnp.where(keep, optax.safe_increment(state.total), state.total),
    )


def clear(state: WindowState, when: jax.Array) -> WindowState:
    return state._replace(total=jnp.where(when, 0, state.total))


def contents(state: WindowState, num_samples: jax.Array) -> jax.Array:
    """The newest ``num_samples``, oldest first, then zeros; shape of the buffer."""
    capacity = state.buffer.shape[1]
    index = jnp.arange(capacity, dtype=jnp.int32)
    # Not negative, as XLA's own remainder wants it.
    start = state.head - num_samples + capacity
    ordered = state.buffer[:, jax.lax.rem(start + index, jnp.int32(capacity))]
    return jnp.where(index < num_samples, ordered, 0)


def _resized(state: WindowState, capacity: int) -> WindowState:
    old = state.buffer.shape[1]
    num_stored = jnp.minimum(state.total, min(old, capacity))
    newest = contents(state, num_stored)[:, :capacity]
    buffer = jnp.pad(newest, ((0, 0), (0, max(0, capacity - old))))
    # A full window has lost samples, which must not count in a larger one.
    is_larger = capacity > old
    total = jnp.minimum(state.total, old) if is_larger else jnp.copy(state.total)
    return WindowState(buffer, head=num_stored % capacity, total=total)


def resize_window(opt_state: Any, max_window: int) -> Any:
    """Fits a saved state to an optimizer with another ``max_window``.

    The newest samples are kept, as many as fit. Samples that an old, smaller window has
    lost do not come back: what it still holds counts as all there were since the drop.

    Args:
      opt_state: the optimizer's state, however nested, with any number of windows.
      max_window: the capacity of the optimizer that continues, at least 5.

    Returns:
      A state of the same structure and dtypes. Its windows share no buffer with the old
      ones.

    Raises:
      ValueError: if there is no `WindowState` in ``opt_state``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sasa_optax
      >>> saved = sasa_optax.sasa_plus(1.0).init(jnp.ones(3))
      >>> state = sasa_optax.resize_window(saved, max_window=4096)
      >>> window = sasa_optax.Window(max_window=4096)
      >>> optimizer = sasa_optax.sasa_plus(1.0, window=window)
      >>> updates, state = optimizer.update(jnp.ones(3), state, jnp.ones(3))
    """
    capacity = _checks.static_integer("max_window", max_window, 5)

    def is_window(node: Any) -> bool:
        return isinstance(node, WindowState)

    def resize(node: Any) -> Any:
        return _resized(node, capacity) if is_window(node) else node

    if not any(map(is_window, jax.tree.leaves(opt_state, is_leaf=is_window))):
        raise ValueError(
            f"opt_state must be the state of an optimizer with a window, got "
            f"{jax.tree.structure(opt_state)}."
        )
    return jax.tree.map(resize, opt_state, is_leaf=is_window)
