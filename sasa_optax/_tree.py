"""Arithmetic over parameter trees that neither truncates nor changes a type."""

import jax
import jax.numpy as jnp
import optax


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


def inner_product(
    x: optax.Params, y: optax.Params, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The real part of <x, y> over the whole tree, a scalar of ``dtype``.

    Products and a sum rather than a dot: accelerators truncate the operands of a
    dot at default precision.
    """

    def leaf_product(x: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> jax.Array:
        if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
            real = leaf_product(jnp.real(x), jnp.real(y))
            return real + leaf_product(jnp.imag(x), jnp.imag(y))
        return jnp.sum(jnp.asarray(x).astype(dtype) * jnp.asarray(y).astype(dtype))

    products = jax.tree.leaves(jax.tree.map(leaf_product, x, y))
    return sum(products, start=jnp.zeros((), dtype))


def squared_norm(x: optax.Params, dtype: jax.typing.DTypeLike) -> jax.Array:
    return inner_product(x, x, dtype)
