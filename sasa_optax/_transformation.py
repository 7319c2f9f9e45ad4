"""Optimizers from their two functions, whose updates check what they are given."""

from collections.abc import Callable
from typing import Any

import optax

from sasa_optax import _checks

Optimizer = optax.GradientTransformationExtraArgs


def transformation(
    init: Callable[..., Any],
    update: Callable[..., Any],
    state_type: type,
    needs_params: bool = True,
) -> Optimizer:
    """An optimizer whose ``update`` gets a state of its own, and the parameters.

    Optax types the states of its functions as trees of arrays, hence Any.
    """

    def checked(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        _checks.state(state, state_type)
        if needs_params:
            _checks.params(params)
        return update(updates, state, params, **extra_args)

    return Optimizer(init, checked)
