"""The leaky bucket: of all samples since the last drop, keep the newest part."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _checks


class Window(NamedTuple):
    """A ring buffer of the newest samples.

    Of ``total`` samples pushed since the window was last emptied, the newest
    ``ceil(total / leak_ratio)`` count, and never more than the capacity.

    Attributes:
      buffer: the samples, shape (width, capacity), float32 or float64.
      head: where the next sample goes, shape (), int32.
      total: samples since the window was emptied, shape (), int32.
    """

    buffer: jax.Array
    head: jax.Array
    total: jax.Array


def empty(width: int, capacity: int, dtype: jax.typing.DTypeLike) -> Window:
    return Window(
        buffer=jnp.zeros((width, capacity), dtype),
        head=jnp.zeros((), jnp.int32),
        total=jnp.zeros((), jnp.int32),
    )


def push(window: Window, sample: jax.Array, keep: jax.Array) -> Window:
    """Appends ``sample``, shape (width,), where ``keep`` is true."""
    head = window.head
    old = jax.lax.dynamic_index_in_dim(window.buffer, head, axis=1, keepdims=False)
    buffer = jax.lax.dynamic_update_index_in_dim(
        window.buffer, jnp.where(keep, sample, old), head, axis=1
    )
    capacity = buffer.shape[1]
    return Window(
        buffer=buffer,
        head=jnp.where(keep, (head + 1) % capacity, head),
        total=jnp.where(keep, optax.safe_increment(window.total), window.total),
    )


def clear(window: Window, when: jax.Array) -> Window:
    return window._replace(total=jnp.where(when, 0, window.total))


def is_empty(window: Window) -> jax.Array:
    return window.total == 0


def num_kept(window: Window, leak_ratio: jax.typing.ArrayLike) -> jax.Array:
    # The ceiling is written so that it cannot overflow.
    leaked = -(-window.total // jnp.asarray(leak_ratio, jnp.int32))
    return jnp.minimum(leaked, window.buffer.shape[1])


def contents(window: Window, num_samples: jax.Array) -> jax.Array:
    """The newest ``num_samples``, oldest first, then zeros; shape (width, capacity)."""
    capacity = window.buffer.shape[1]
    index = jnp.arange(capacity, dtype=jnp.int32)
    ordered = window.buffer[:, (window.head - num_samples + index) % capacity]
    return jnp.where(index < num_samples, ordered, 0)


def _resized(window: Window, capacity: int) -> Window:
    old = window.buffer.shape[1]
    num_stored = jnp.minimum(window.total, min(old, capacity))
    newest = contents(window, num_stored)[:, :capacity]
    buffer = jnp.pad(newest, ((0, 0), (0, max(0, capacity - old))))
    # Of a window that was full, no more may count than was stored.
    is_larger = capacity > old
    total = jnp.minimum(window.total, old) if is_larger else jnp.copy(window.total)
    return Window(buffer, head=num_stored % capacity, total=total)


def resize_window(opt_state: Any, max_window: int) -> Any:
    """Makes a saved state fit an optimizer with another ``max_window``.

    The newest samples are kept, as many as fit. If the old window had overflowed and
    the new one is larger, the samples that were lost do not come back: what it holds
    counts as all there were since the drop, and ``leak_ratio`` leaves a part of them.

    Args:
      opt_state: the optimizer's state, however nested, with any number of windows.
      max_window: as given to the optimizer that will go on with it, at least 5.

    Returns:
      A state of the same structure and dtypes, which shares no buffer of the windows.

    Raises:
      ValueError: if there is no `Window` in ``opt_state``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sasa_optax
      >>> saved = sasa_optax.sasa_plus(1.0).init(jnp.ones(3))
      >>> state = sasa_optax.resize_window(saved, max_window=4096)
      >>> optimizer = sasa_optax.sasa_plus(1.0, max_window=4096)
      >>> updates, state = optimizer.update(jnp.ones(3), state, jnp.ones(3))
    """
    capacity = _checks.static_integer("max_window", max_window, 5)

    def is_window(node: Any) -> bool:
        return isinstance(node, Window)

    if not any(map(is_window, jax.tree.leaves(opt_state, is_leaf=is_window))):
        raise ValueError(
            f"opt_state must be the state of an optimizer with a window, got "
            f"{jax.tree.structure(opt_state)}."
        )
    return jax.tree.map(
        lambda node: _resized(node, capacity) if is_window(node) else node,
        opt_state,
        is_leaf=is_window,
    )
