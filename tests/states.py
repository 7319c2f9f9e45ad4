"""A reader of optimizer states, which optax types as trees of arrays."""

from typing import Any, TypeVar

import jax

_State = TypeVar("_State")


def part_of(state: Any, kind: type[_State]) -> _State:
    """The one part of a nested state that is of this type."""

    def is_kind(node: Any) -> bool:
        return isinstance(node, kind)

    parts = jax.tree.leaves(state, is_leaf=is_kind)
    (found,) = (part for part in parts if isinstance(part, kind))
    return found
