"""Inner products of trees, in few sums.

XLA compiles a sum for each of a thousand leaves in a minute. So small leaves of one
size share a sum, which takes seconds.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sasa_optax import _devices
from sasa_optax._types import AxisName, DType

Pair = tuple[optax.Params, optax.Params]
Pairs = Sequence[Pair]

# Leaves of at most this size share a sum. It costs a copy of them.
_SMALL = 4096
# XLA takes long to put together more than this.
_MOST_IN_A_SUM = 64


def leaf_products(
    pairs: Pairs, dtype: DType, axis_name: AxisName = None
) -> list[jax.Array]:
    """The real part of <x, y> for each leaf: shape (leaves,), for each pair of trees.

    They are summed over the mesh axes ``axis_name``, across which the trees are
    sharded.
    """
    leaves = [_leaves(*pair) for pair in pairs]
    if axis_name is None and _are_whole():
        return [_in_few_sums(xs, ys, dtype) for xs, ys in leaves]
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
    """A product and a sum, since accelerators truncate the operands of a dot."""
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
        real = _product(jnp.real(x), jnp.real(y), dtype)
        return real + _product(jnp.imag(x), jnp.imag(y), dtype)
    return jnp.sum(x.astype(dtype) * y.astype(dtype))


def _stacked(row: Sequence[jax.Array], dtype: DType) -> jax.Array:
    return jnp.stack(row) if row else jnp.zeros((0,), dtype)


def _in_few_sums(
    xs: Sequence[jax.Array], ys: Sequence[jax.Array], dtype: DType
) -> jax.Array:
    """A product for each pair of leaves, where small ones of a size share a sum."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        is_complex = jnp.iscomplexobj(x) or jnp.iscomplexobj(y)
        is_shared = x.size <= _SMALL and x.shape == y.shape and not is_complex
        by_size.setdefault((x.size, -1) if is_shared else (x.size, i), []).append(i)
    groups = [
        group[start : start + _MOST_IN_A_SUM]
        for group in by_size.values()
        for start in range(0, len(group), _MOST_IN_A_SUM)
    ]
    order = [i for group in groups for i in group]
    sums = [
        _products([xs[i] for i in group], [ys[i] for i in group], dtype)
        for group in groups
    ]
    row = jnp.concatenate(sums) if sums else jnp.zeros((0,), dtype)
    return row if order == sorted(order) else row[np.argsort(order)]


def _products(
    xs: Sequence[jax.Array], ys: Sequence[jax.Array], dtype: DType
) -> jax.Array:
    """A product for each pair of leaves of one size, in a single sum."""
    if len(xs) == 1:
        return _product(xs[0], ys[0], dtype)[None]

    def joined(leaves: Sequence[jax.Array]) -> jax.Array:
        return jnp.concatenate([x.astype(dtype).reshape(1, x.size) for x in leaves])

    return jnp.sum(joined(xs) * joined(ys), axis=1)
