"""Arithmetic over parameter trees that neither truncates nor changes a dtype."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sasa_optax._types import AxisName, DType, Numeric

Pair = tuple[optax.Params, optax.Params]
Pairs = Sequence[Pair]


def statistic_dtype(params: optax.Params) -> jnp.dtype:
    """float64 where a parameter is double precision, else float32."""
    double = (jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128))
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(params)]
    return jnp.dtype(jnp.float64 if any(d in double for d in dtypes) else jnp.float32)


def _widen(x: Numeric) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def scale(a: Numeric, x: optax.Updates) -> optax.Updates:
    """a*x, computed in at least float32, in the dtypes of ``x``."""

    def multiply(x: Numeric) -> jax.Array:
        wide = _widen(x)
        return (jnp.asarray(a, wide.dtype) * wide).astype(jnp.asarray(x).dtype)

    return jax.tree.map(multiply, x)


def linear_combination(
    a: Numeric, x: optax.Updates, b: Numeric, y: optax.Updates
) -> optax.Updates:
    """a*x + b*y, computed in at least float32, in the dtypes of ``x``."""

    def combine(x: Numeric, y: Numeric) -> jax.Array:
        wide = _widen(x)
        scaled = jnp.asarray(b, wide.dtype) * _widen(y).astype(wide.dtype)
        total = jnp.asarray(a, wide.dtype) * wide + scaled
        return total.astype(jnp.asarray(x).dtype)

    return jax.tree.map(combine, x, y)


def subtract(x: optax.Params, y: optax.Params) -> optax.Params:
    """x - y, in the dtypes of ``y``."""
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype) - y, x, y)


def _leaf_product(x: Numeric, y: Numeric, dtype: DType) -> jax.Array:
    """A product and a sum, since accelerators truncate the operands of a dot."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        real = _leaf_product(jnp.real(x), jnp.real(y), dtype)
        return real + _leaf_product(jnp.imag(x), jnp.imag(y), dtype)
    return jnp.sum(jnp.asarray(x).astype(dtype) * jnp.asarray(y).astype(dtype))


def leaf_products(pairs: Pairs, dtype: DType) -> list[list[jax.Array]]:
    """The real part of <x, y> for each leaf: a row for each pair of trees."""
    return [
        jax.tree.leaves(jax.tree.map(lambda x, y: _leaf_product(x, y, dtype), *pair))
        for pair in pairs
    ]


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


def total(row: Sequence[jax.Array], dtype: DType) -> jax.Array:
    return sum(row, jnp.zeros((), dtype))


def inner_products(
    pairs: Pairs, dtype: DType, axis_name: AxisName = None
) -> list[jax.Array]:
    """The real parts of <x, y> over whole trees, scalars of ``dtype``.

    They are summed over the mesh axes ``axis_name``, across which the trees are
    sharded.
    """
    rows = sum_over(axis_name, leaf_products(pairs, dtype))
    return [total(row, dtype) for row in rows]


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
