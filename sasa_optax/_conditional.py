"""A conditional that is still one under `jax.vmap`, and does not hold up a GPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from sasa_optax import _devices


def cond(
    predicate: jax.Array, true_fun: Callable[[], Any], false_fun: Callable[[], Any]
) -> Any:
    """`jax.lax.cond` for a ``true_fun`` that is rarely needed.

    `jax.vmap` turns `jax.lax.cond` into a select, so each member of a population would
    pay for ``true_fun`` at every step. Here the population pays when a member needs it.
    On a GPU a conditional waits until the host has read the predicate, which costs more
    than a small ``true_fun``. So there it is a select. No gradient passes through.
    """
    # On JAX 0.5, `jax.shard_map` has no rule for what follows.
    if not _devices.knows_what_varies(predicate):
        return jax.lax.cond(predicate, true_fun, false_fun)
    (of_true, true_values), (of_false, false_values) = (
        _closed(function) for function in (true_fun, false_fun)
    )

    def select(predicate: jax.Array, true_values: Any, false_values: Any) -> Any:
        return _selected(predicate, of_true(true_values), of_false(false_values))

    def conditional(predicate: jax.Array, true_values: Any, false_values: Any) -> Any:
        return _batched_cond(predicate, of_true, true_values, of_false, false_values)

    return jax.lax.platform_dependent(
        predicate,
        true_values,
        false_values,
        cuda=select,
        rocm=select,
        default=conditional,
    )


def _selected(predicate: jax.Array, if_true: Any, if_false: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(predicate, x, y), if_true, if_false)


def _closed(function: Callable[[], Any]) -> tuple[Callable[[Any], Any], Any]:
    """A function of the traced values that ``function`` closes over, and these."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)()

    def call(values: Any) -> Any:
        closed = jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, values)
        leaves = jax.extend.core.jaxpr_as_fun(closed)()
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return call, jax.lax.stop_gradient(jaxpr.consts)


def _batched_cond(
    predicate: jax.Array,
    true_fun: Callable[[Any], Any],
    true_values: Any,
    false_fun: Callable[[Any], Any],
    false_values: Any,
) -> Any:
    @custom_vmap
    def call(predicate: jax.Array, true_values: Any, false_values: Any) -> Any:
        return jax.lax.cond(
            predicate, lambda: true_fun(true_values), lambda: false_fun(false_values)
        )

    @call.def_vmap
    def of_population(axis_size: int, in_batched: Any, *operands: Any) -> Any:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)

        def select(predicate: jax.Array, true_values: Any, false_values: Any) -> Any:
            return _selected(predicate, true_fun(true_values), false_fun(false_values))

        def none(predicate: jax.Array, true_values: Any, false_values: Any) -> Any:
            del predicate, true_values
            return false_fun(false_values)

        some, none = (
            jax.vmap(fun, in_axes=tuple(axes), axis_size=axis_size)
            for fun in (select, none)
        )
        predicates = operands[0]
        result = cond(
            jnp.any(predicates), lambda: some(*operands), lambda: none(*operands)
        )
        return result, jax.tree.map(lambda _: True, result)

    return call(predicate, true_values, false_values)
