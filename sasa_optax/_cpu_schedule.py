"""The order of work on a CPU: update a few leaves, sum over them, then the next few.

By default XLA on a CPU updates all leaves and then sums over all of them, when they are
no longer in the cache. It also computes a direction such as Adam's twice, once for the
update and once for the sums, beside a copy of the parameters. On a GPU this order
changes nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _devices, _products
from sasa_optax._types import DType

# A group of leaves is worth more than a dispatch costs, and fits into a cache. Between
# 1 and 4 MB makes little difference. What fits into a cache as a whole needs no groups.
_GROUP_BYTES, _CACHE_BYTES = 2_000_000, 8_000_000

Rows = list[jax.Array]


def in_groups(
    direction: optax.Updates,
    others: Any,
    products: Callable[[Any, Any], Rows],
    step: jax.Array,
    dtype: DType,
) -> tuple[optax.Updates, Rows]:
    """The direction, and its products with other trees, computed group by group.

    No number is changed. Each leaf of the direction is divided by a one that XLA cannot
    know to be one, because XLA does not compute a quotient twice. The one of each group
    depends on the products of the group before.

    Args:
      direction: the tree that the products read.
      others: a tree whose subtrees with the structure of ``direction`` are cut into
        groups along with it.
      products: maps the parts of both to a vector for each pair of trees, a number for
        each leaf. In a part, the leaves of other groups are None.
      step: steps taken, shape (), int32.
      dtype: the dtype of the products.

    Returns:
      A direction equal to the argument, and the vectors of all groups joined. Use the
      returned direction, or XLA computes it twice.
    """
    is_never = _is_never(step)
    if is_never is None:
        return direction, products(direction, others)
    leaves, structure = jax.tree.flatten(direction)
    leaves = list(map(jnp.asarray, leaves))
    groups, rows = _groups(leaves), []
    one = jnp.where(is_never, 0, jnp.ones((), dtype))
    for group in groups:
        leaves[group.start : group.stop] = (_divided(leaves[i], one) for i in group)
        parts = jax.tree.unflatten(structure, leaves), others
        found = products(*(_part(parts, structure, group) if groups[1:] else parts))
        if not found:
            return direction, []
        rows.append(found)
        used = _products.total(jnp.concatenate(found))
        # Each one has a second use. Otherwise XLA turns the division into a product and
        # computes that twice.
        one = jnp.where(is_never, jax.lax.stop_gradient(used), one)
    joined = [jnp.concatenate(parts) for parts in zip(*rows, strict=True)]
    joined[0] = joined[0] / one
    return jax.tree.unflatten(structure, leaves), joined


def _is_never(step: jax.Array) -> jax.Array | None:
    """False, as a scalar that XLA cannot fold on a CPU; None to leave the order."""
    # Among several devices, each group would wait for a collective.
    if _devices.num_devices("cpu") != 1:
        return None
    return jax.lax.platform_dependent(
        step, cpu=lambda step: step < 0, default=lambda step: jnp.zeros_like(step, bool)
    )


def _groups(leaves: Sequence[jax.Array]) -> list[range]:
    """Consecutive leaves, in groups of some megabytes."""
    if sum(x.nbytes for x in leaves) <= _CACHE_BYTES:
        return [range(len(leaves))]
    groups, start, size = [], 0, 0
    for stop, x in enumerate(leaves, 1):
        size += x.nbytes
        if size >= _GROUP_BYTES or stop == len(leaves):
            groups.append(range(start, stop))
            start, size = stop, 0
    return groups


def _divided(x: jax.Array, one: jax.Array) -> jax.Array:
    is_real = jnp.issubdtype(x.dtype, jnp.floating)
    return x / one.astype(x.dtype) if is_real else x


def _part(trees: Any, structure: Any, group: range) -> Any:
    def is_cut(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    def cut(node: Any) -> Any:
        if not is_cut(node):
            return node
        leaves = [
            x if i in group else None for i, x in enumerate(jax.tree.leaves(node))
        ]
        return jax.tree.unflatten(structure, leaves)

    return jax.tree.map(cut, trees, is_leaf=is_cut)
