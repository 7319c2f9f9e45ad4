"""The leaky bucket: of all samples since the last drop, keep the newest part."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


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
