"""A conditional that stays one under `jax.vmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from sasa_optax import _tree


def cond(
    predicate: jax.Array,
    true_fun: Callable[..., Any],
    false_fun: Callable[..., Any],
    *operands: Any,
) -> Any:
    """`jax.lax.cond`, for a ``true_fun`` that is rarely needed.

    `jax.vmap` makes a select of `jax.lax.cond`, so that each member of a population
    pays for ``true_fun`` at every step. This one goes there if any member must. The
    functions must not close over traced values.
    """
    # There `jax.shard_map` has no rule for what follows.
    if not _tree.knows_what_varies(predicate):
        return jax.lax.cond(predicate, true_fun, false_fun, *operands)

    @custom_vmap
    def call(predicate: jax.Array, *operands: Any) -> Any:
        return jax.lax.cond(predicate, true_fun, false_fun, *operands)

    @call.def_vmap
    def of_population(
        axis_size: int, in_batched: Any, predicate: jax.Array, *operands: Any
    ) -> Any:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)

        def select(predicate: jax.Array, *operands: Any) -> Any:
            def pick(x: jax.Array, y: jax.Array) -> jax.Array:
                return jnp.where(predicate, x, y)

            return jax.tree.map(pick, true_fun(*operands), false_fun(*operands))

        def none(predicate: jax.Array, *operands: Any) -> Any:
            del predicate
            return false_fun(*operands)

        some, none = (
            jax.vmap(fun, in_axes=tuple(axes), axis_size=axis_size)
            for fun in (select, none)
        )
        result = cond(jnp.any(predicate), some, none, predicate, *operands)
        return result, jax.tree.map(lambda _: True, result)

    return call(predicate, *operands)
