"""One place where our types meet optax's."""

from collections.abc import Callable
from typing import Any

import optax


def transformation(
    init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """The pair as optax takes it, whose types know no state but a tree of arrays."""
    return optax.GradientTransformationExtraArgs(init, update)
