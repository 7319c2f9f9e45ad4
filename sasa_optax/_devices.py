"""Devices: how many there are, what differs between them, and sums over them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sasa_optax._types import AxisName


def num_devices(platform: str | None = None) -> int:
    """The number of devices of a platform, or of the default one; 0 without it."""
    try:
        return jax.device_count(backend=platform)
    except RuntimeError:
        return 0


def sum_over(
    axis_name: AxisName, rows: Sequence[Sequence[jax.Array]]
) -> list[list[jax.Array]]:
    """Sums scalars over the mesh axes over which they are partial sums.

    All scalars that vary over the same axes share one collective.
    """
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    summed = [list(row) for row in rows]
    places: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            places.setdefault(_axes_of(x, axes) if axes else (), []).append((i, j))
    for over, where in places.items():
        if over:
            sums = jax.lax.psum(jnp.stack([rows[i][j] for i, j in where]), over)
            for (i, j), x in zip(where, sums, strict=True):
                summed[i][j] = x
    return summed


def knows_what_varies(x: jax.Array) -> bool:
    """Whether JAX tracks what varies inside `jax.shard_map`; JAX 0.5 does not."""
    aval: Any = x.aval
    return hasattr(aval, "manual_axis_type") or hasattr(aval, "vma")


def _varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which a value inside `jax.shard_map` differs."""
    aval: Any = x.aval
    if hasattr(aval, "manual_axis_type"):
        return aval.manual_axis_type.varying
    # This is its name before JAX 0.10. JAX 0.5 has none.
    return getattr(aval, "vma", frozenset())


def _axes_of(x: jax.Array, axes: tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes among ``axes`` over which ``x`` is a partial sum."""
    # Where JAX does not track what varies, assume that everything does.
    is_known = all(axis in _varying_axes(jax.lax.axis_index(axis)) for axis in axes)
    if not is_known:
        return axes
    return tuple(axis for axis in axes if axis in _varying_axes(x))
