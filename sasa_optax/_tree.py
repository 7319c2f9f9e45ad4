"""Arithmetic over parameter trees that neither truncates nor changes a type."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

AxisName = str | tuple[str, ...] | None


def statistic_dtype(params: optax.Params) -> jnp.dtype:
    """float64 where a parameter is double precision, else float32."""
    double = (jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128))
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(params)]
    return jnp.dtype(jnp.float64 if any(d in double for d in dtypes) else jnp.float32)


def _widen(x: jax.typing.ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def scale(a: jax.typing.ArrayLike, x: optax.Updates) -> optax.Updates:
    """a*x, computed in at least float32, in the types of ``x``."""

    def multiply(x: jax.typing.ArrayLike) -> jax.Array:
        wide = _widen(x)
        return (jnp.asarray(a, wide.dtype) * wide).astype(jnp.asarray(x).dtype)

    return jax.tree.map(multiply, x)


def linear_combination(
    a: jax.typing.ArrayLike,
    x: optax.Updates,
    b: jax.typing.ArrayLike,
    y: optax.Updates,
) -> optax.Updates:
    """a*x + b*y, computed in at least float32, in the types of ``x``."""

    def combine(x: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> jax.Array:
        wide = _widen(x)
        dtype = wide.dtype
        total = jnp.asarray(a, dtype) * wide + jnp.asarray(b, dtype) * _widen(y).astype(
            dtype
        )
        return total.astype(jnp.asarray(x).dtype)

    return jax.tree.map(combine, x, y)


def _leaf_product(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Products and a sum: accelerators truncate the operands of a dot."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        real = _leaf_product(jnp.real(x), jnp.real(y), dtype)
        return real + _leaf_product(jnp.imag(x), jnp.imag(y), dtype)
    return jnp.sum(jnp.asarray(x).astype(dtype) * jnp.asarray(y).astype(dtype))


def _varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which a value inside `jax.shard_map` differs."""
    aval: Any = x.aval
    if hasattr(aval, "manual_axis_type"):
        return aval.manual_axis_type.varying
    # Its place before JAX 0.10; JAX 0.5 has none.
    return getattr(aval, "vma", frozenset())


def _axes_of(product: jax.Array, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``axes`` over which the product is a part of a sum."""
    # Where JAX keeps no account of what varies, everything is taken to.
    is_known = all(axis in _varying_axes(jax.lax.axis_index(axis)) for axis in axes)
    if not is_known:
        return axes
    return tuple(axis for axis in axes if axis in _varying_axes(product))


def inner_products(
    pairs: Sequence[tuple[optax.Params, optax.Params]],
    dtype: jax.typing.DTypeLike,
    axis_name: AxisName = None,
) -> list[jax.Array]:
    """The real parts of <x, y> over whole trees, scalars of ``dtype``.

    Over the axes ``axis_name``, where the trees are parts of larger ones, all of them
    are summed by one collective.
    """
    dtype = jnp.dtype(dtype)
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    # By the axes to sum over, one row of all products each.
    rows: dict[tuple[str, ...], list[jax.Array]] = {}
    for i, (x, y) in enumerate(pairs):
        products = jax.tree.map(lambda x, y: _leaf_product(x, y, dtype), x, y)
        for product in jax.tree.leaves(products):
            zeros = [jnp.zeros((), dtype) for _ in pairs]
            row = rows.setdefault(_axes_of(product, axes) if axes else (), zeros)
            row[i] += product
    totals = [jnp.zeros((), dtype) for _ in pairs]
    for over, row in rows.items():
        if over:
            row = jax.lax.psum(jnp.stack(row), over)
        totals = [total + part for total, part in zip(totals, row, strict=True)]
    return totals


def inner_product(
    x: optax.Params,
    y: optax.Params,
    dtype: jax.typing.DTypeLike,
    axis_name: AxisName = None,
) -> jax.Array:
    return inner_products([(x, y)], dtype, axis_name)[0]


def squared_norm(
    x: optax.Params, dtype: jax.typing.DTypeLike, axis_name: AxisName = None
) -> jax.Array:
    return inner_product(x, x, dtype, axis_name)
