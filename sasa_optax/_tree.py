"""Arithmetic over parameter trees that neither truncates nor changes a type."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

AxisName = str | tuple[str, ...] | None

# What is computed together on a CPU: more than the cost of a dispatch, less than a
# cache. Between 1 and 4 MB makes little difference. A cache's worth needs no groups.
_GROUP_BYTES, _CACHE_BYTES = 2_000_000, 8_000_000


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


def subtract(x: optax.Params, y: optax.Params) -> optax.Params:
    """x - y, in the types of ``y``."""
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype) - y, x, y)


def _leaf_product(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Products and a sum: accelerators truncate the operands of a dot."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        real = _leaf_product(jnp.real(x), jnp.real(y), dtype)
        return real + _leaf_product(jnp.imag(x), jnp.imag(y), dtype)
    return jnp.sum(jnp.asarray(x).astype(dtype) * jnp.asarray(y).astype(dtype))


def knows_what_varies(x: jax.Array) -> bool:
    """Whether this JAX keeps account of it inside `jax.shard_map`; 0.5 does not."""
    aval: Any = x.aval
    return hasattr(aval, "manual_axis_type") or hasattr(aval, "vma")


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


def leaf_products(
    pairs: Sequence[tuple[optax.Params, optax.Params]],
    dtype: jax.typing.DTypeLike,
    axis_name: AxisName = None,
) -> list[jax.Array]:
    """The real parts of <x, y> of each leaf by itself, of shape (leaves,) each.

    Over the axes ``axis_name``, where the trees are parts of larger ones, all of them
    are summed by one collective.
    """
    dtype = jnp.dtype(dtype)
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    rows = [list(map(jax.tree.leaves, pair)) for pair in pairs]
    products = [
        _leaf_product(x, y, dtype)
        for xs, ys in rows
        for x, y in zip(xs, ys, strict=True)
    ]
    over = [_axes_of(product, axes) if axes else () for product in products]
    for some in sorted({each for each in over if each}):
        places = [i for i, each in enumerate(over) if each == some]
        sums = jax.lax.psum(jnp.stack([products[i] for i in places]), some)
        for i, total in zip(places, sums, strict=True):
            products[i] = total
    shape = len(pairs), len(products) // len(pairs)
    return list(jnp.stack([jnp.zeros((), dtype), *products])[1:].reshape(shape))


def inner_product(
    x: optax.Params,
    y: optax.Params,
    dtype: jax.typing.DTypeLike,
    axis_name: AxisName = None,
) -> jax.Array:
    return inner_products([(x, y)], dtype, axis_name)[0]


def in_sequence(
    direction: optax.Updates,
    others: Sequence[Any],
    sums: Callable[..., list[jax.Array]],
    rate: jax.Array,
    step: jax.Array,
) -> tuple[optax.Updates, jax.Array]:
    """The direction, its leaves computed in sequence; and a scalar that is true.

    No number is changed. Left to itself XLA on CPU updates all leaves, then sums over
    all of them, when they are no longer in the cache; and a direction such as Adam's it
    computes for the update and again for the sums, beside a copy of the parameters. So
    each leaf is divided by a one that XLA cannot know to be one: a quotient is not
    computed twice. And the one of the leaves that follow, after some megabytes, is made
    from the ``sums`` over those before: of their directions, and their parts of the
    ``others``. The last one must be used, which is what the scalar is for.

    Accelerators fuse the sums with the update. Among several devices each of these
    groups would wait for a collective over the one before.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return direction, jnp.ones((), bool)
    one = jnp.where(step < 0, jnp.zeros_like(rate), 1)
    total = sum(d.nbytes for d in jax.tree.leaves(direction))
    group_bytes = _GROUP_BYTES if total > _CACHE_BYTES else math.inf
    group: list[tuple[jax.Array, ...]] = []

    def compute(d: jax.Array, *others: jax.Array) -> jax.Array:
        nonlocal one
        if not jnp.issubdtype(d.dtype, jnp.floating):
            return d
        d = d / one.astype(d.dtype)
        group.append((d, *others))
        if sum(d.nbytes for d, *_ in group) >= group_bytes:
            used = sums(*map(list, zip(*group, strict=True)))
            never = jax.lax.stop_gradient(sum(used, jnp.zeros_like(rate)))
            one = jnp.where(step < 0, never, one)
            group.clear()
        return d

    direction = jax.tree.map(compute, direction, *others)
    return direction, one > 0


def squared_norm(
    x: optax.Params, dtype: jax.typing.DTypeLike, axis_name: AxisName = None
) -> jax.Array:
    return inner_product(x, x, dtype, axis_name)
