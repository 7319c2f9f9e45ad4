"""Types that the whole package shares, and the decorator of its option objects."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, dataclass_transform

import jax
import numpy as np
import optax

# The real part of `jax.typing.ArrayLike`; Python takes an int or a bool for a float.
Numeric = jax.Array | np.ndarray | np.bool_ | np.integer | np.floating | float
DType = jax.typing.DTypeLike
AxisName = str | tuple[str, ...] | None

_Options = TypeVar("_Options")
_P = ParamSpec("_P")
_T = TypeVar("_T")


def is_masked(node: Any) -> bool:
    """Whether it stands for what `optax.masked` and `optax.partition` hide."""
    return isinstance(node, optax.MaskedNode)


@dataclass_transform(frozen_default=True)
def options(*static: str) -> Callable[[type[_Options]], type[_Options]]:
    """Makes a class a frozen dataclass and a pytree whose leaves are its fields.

    Numbers in the fields may then be traced, so `jax.vmap` maps over them. The fields
    named by ``static`` belong to the structure of the tree.
    """

    def decorate(cls: type[_Options]) -> type[_Options]:
        made: Any = dataclasses.dataclass(frozen=True)(cls)
        names = [field.name for field in dataclasses.fields(made)]
        traced = [name for name in names if name not in static]

        def flatten(options: Any) -> tuple[list[Any], tuple[Any, ...]]:
            keys = map(jax.tree_util.GetAttrKey, traced)
            leaves = [getattr(options, name) for name in traced]
            fixed = tuple(getattr(options, name) for name in static)
            return list(zip(keys, leaves, strict=True)), fixed

        def unflatten(fixed: tuple[Any, ...], leaves: Iterable[Any]) -> _Options:
            # JAX also puts batches and placeholders here, so nothing is checked.
            options = object.__new__(made)
            for name, value in zip((*traced, *static), (*leaves, *fixed), strict=True):
                object.__setattr__(options, name, value)
            return options

        jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
        return made

    return decorate


def traced_once(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """A method of an options object, traced once for all optimizers that use it.

    Called outside jit, as by ``init``, it is compiled as a whole. Classes derived from
    options are no pytrees, so their methods are traced where they are used.
    """
    compiled = jax.jit(method)

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        is_tree = not jax.tree_util.all_leaves(args[:1])
        return (compiled if is_tree else method)(*args, **kwargs)

    return call


def with_defaults(options: _Options, **defaults: Any) -> _Options:
    """The options, with a default in place of each of these fields that is None."""
    given: Any = options
    missing = {k: v for k, v in defaults.items() if getattr(given, k) is None}
    return dataclasses.replace(given, **missing)
