"""Arithmetic over parameter trees that neither truncates nor changes a dtype."""

import jax
import jax.numpy as jnp
import optax

from sasa_optax._types import Numeric


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
