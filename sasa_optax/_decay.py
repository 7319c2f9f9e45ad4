"""Coupled weight decay: (weight_decay/2) ||x||^2 as a part of the loss."""

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _checks, _products, _tree
from sasa_optax._types import AxisName, DType, Numeric


def is_zero(weight_decay: Numeric) -> bool:
    """Whether the decay is known to vanish before anything is traced."""
    return isinstance(weight_decay, int | float) and weight_decay == 0


def decaying(params: optax.Params) -> optax.Params:
    """The parameters that decay, with zeros for integers and booleans."""

    def kept(x: Numeric) -> Numeric:
        is_inexact = jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact)
        return x if is_inexact else jnp.zeros_like(x)

    return jax.tree.map(kept, params)


def decayed_grads(
    grads: optax.Updates, weight_decay: Numeric, params: optax.Params | None
) -> optax.Updates:
    """The gradient of the loss with its regularizer."""
    if is_zero(weight_decay):
        return grads
    params = decaying(_checks.params(params))
    return _tree.linear_combination(1.0, grads, weight_decay, params)


def regularizer(
    weight_decay: Numeric,
    params: optax.Params,
    dtype: DType,
    axis_name: AxisName = None,
) -> Numeric:
    """(weight_decay/2) ||x||^2, shape ()."""
    if is_zero(weight_decay):
        return 0.0
    params = decaying(params)
    squared_norm = _products.inner_products([(params, params)], dtype, axis_name)[0]
    return jnp.asarray(weight_decay, dtype) / 2 * squared_norm
