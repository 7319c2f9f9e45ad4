"""Inner products of trees, in few sums.

XLA compiles a sum for each of a thousand leaves in a minute. So small leaves of one
size share a sum, which takes seconds. On a GPU all products of a large leaf share one.
XLA computes them in the loop that updates the leaf. With two sums in that loop it would
no longer update in place, but copy the parameters and the state of the optimizer.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sasa_optax import _devices
from sasa_optax._types import AxisName, DType

Pair = tuple[optax.Params, optax.Params]
Pairs = Sequence[Pair]
# For each pair of trees, the leaves of both.
Leaves = Sequence[tuple[Sequence[jax.Array], Sequence[jax.Array]]]
LeafPair = tuple[jax.Array, jax.Array]
Terms = Sequence[jax.Array]
Axes = tuple[int, ...] | None
Rows = list[jax.Array]
# Maps the terms of all products of one leaf to these products.
Sums = Callable[[Terms, Axes], Rows]

# Leaves of at most this size share a sum. It costs a copy of them.
_SMALL = 4096
# XLA takes long to put together more than this.
_MOST_IN_A_SUM = 64


def leaf_products(pairs: Pairs, dtype: DType, axis_name: AxisName = None) -> Rows:
    """The real part of <x, y> for each leaf: shape (leaves,), for each pair of trees.

    They are summed over the mesh axes ``axis_name``, across which the trees are
    sharded. No gradient passes through.
    """
    leaves = [_leaves(*pair) for pair in jax.lax.stop_gradient(pairs)]
    if axis_name is None and _are_whole():
        on_gpu, elsewhere = (
            _sums(jnp.dtype(dtype), sums) for sums in (together, apart)
        )
        return jax.lax.platform_dependent(
            leaves, cuda=on_gpu, rocm=on_gpu, default=elsewhere
        )
    rows = [
        [_product(x, y, dtype) for x, y in zip(*pair, strict=True)] for pair in leaves
    ]
    return [_stacked(row, dtype) for row in _devices.sum_over(axis_name, rows)]


def total(row: jax.Array) -> jax.Array:
    # Through the barrier XLA cannot see that the row is a stack of scalars. It would
    # turn the sum into a chain of additions, which takes minutes to compile.
    return jnp.sum(jax.lax.optimization_barrier(row))


def inner_products(
    pairs: Pairs, dtype: DType, axis_name: AxisName = None
) -> list[jax.Array]:
    """The real parts of <x, y> over whole trees, scalars of ``dtype``."""
    return [total(row) for row in leaf_products(pairs, dtype, axis_name)]


def _leaves(
    x: optax.Params, y: optax.Params
) -> tuple[list[jax.Array], list[jax.Array]]:
    xs, structure = jax.tree.flatten(x)
    ys = structure.flatten_up_to(y)
    return list(map(jnp.asarray, xs)), list(map(jnp.asarray, ys))


def _are_whole() -> bool:
    """Whether all arrays are whole on their device: sharded ones would be gathered."""
    return _devices.num_devices() == 1 and _devices.num_devices("cpu") <= 1


def _product(x: jax.Array, y: jax.Array, dtype: DType) -> jax.Array:
    return jnp.sum(_terms(x, y, dtype))


def _terms(x: jax.Array, y: jax.Array, dtype: DType) -> jax.Array:
    """What is summed; not by a dot, whose operands accelerators truncate."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        real = _terms(jnp.real(x), jnp.real(y), dtype)
        return real + _terms(jnp.imag(x), jnp.imag(y), dtype)
    return x.astype(dtype) * y.astype(dtype)


def _stacked(row: Sequence[jax.Array], dtype: DType) -> jax.Array:
    return jnp.stack(row) if row else jnp.zeros((0,), dtype)


# A function of its own for each case, as JAX traces a new function again.
@functools.cache
def _sums(dtype: jnp.dtype, sums: Sums) -> Callable[[Leaves], Rows]:
    return functools.partial(in_few_sums, dtype=dtype, sums=sums)


def apart(terms: Terms, axes: Axes) -> Rows:
    """The sums of all products of a leaf, one after the other."""
    return [jnp.sum(x, axes) for x in terms]


def together(terms: Terms, axes: Axes) -> Rows:
    """The same in a single reduction, unless their shapes differ."""
    if len({x.shape for x in terms}) > 1:
        return apart(terms, axes)
    axes = tuple(range(terms[0].ndim)) if axes is None else axes
    zeros = [jnp.zeros((), x.dtype) for x in terms]
    return list(jax.lax.reduce(list(terms), zeros, _added, axes))


def _added(x: Terms, y: Terms) -> Rows:
    return [jnp.add(*pair) for pair in zip(x, y, strict=True)]


def in_few_sums(leaves: Leaves, dtype: DType, sums: Sums) -> Rows:
    """A product for each leaf of each pair, where small leaves of a size share sums."""
    by_leaf = list(zip(*(zip(*pair, strict=True) for pair in leaves), strict=True))
    groups = _groups(by_leaf)
    order = [i for group in groups for i in group]
    found = [_group_sums([by_leaf[i] for i in group], dtype, sums) for group in groups]
    if not found:
        return [jnp.zeros((0,), dtype) for _ in leaves]
    rows = [jnp.concatenate(parts) for parts in zip(*found, strict=True)]
    is_sorted = order == sorted(order)
    return rows if is_sorted else [row[np.argsort(order)] for row in rows]


def _groups(by_leaf: Sequence[Sequence[LeafPair]]) -> list[list[int]]:
    """The numbers of the leaves that share sums, in groups that XLA can digest."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for i, pairs in enumerate(by_leaf):
        sizes = tuple(x.size for x, _ in pairs)
        is_shared = max(sizes) <= _SMALL and all(
            x.shape == y.shape and not jnp.iscomplexobj(x) and not jnp.iscomplexobj(y)
            for x, y in pairs
        )
        by_size.setdefault((*sizes, -1 if is_shared else i), []).append(i)
    return [
        group[start : start + _MOST_IN_A_SUM]
        for group in by_size.values()
        for start in range(0, len(group), _MOST_IN_A_SUM)
    ]


def _group_sums(group: Sequence[Sequence[LeafPair]], dtype: DType, sums: Sums) -> Rows:
    """For each pair of trees, its products of the leaves of a group."""
    if len(group) == 1:
        return [x[None] for x in sums([_terms(x, y, dtype) for x, y in group[0]], None)]

    def joined(leaves: Sequence[jax.Array]) -> jax.Array:
        return jnp.concatenate([x.astype(dtype).reshape(1, x.size) for x in leaves])

    terms = [
        joined([x for x, _ in pairs]) * joined([y for _, y in pairs])
        for pairs in zip(*group, strict=True)
    ]
    return sums(terms, (1,))
