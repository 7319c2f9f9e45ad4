"""Momentum under a controller: what the complete optimizers share."""

from typing import Any, NamedTuple

import jax
import optax

from sasa_optax import _checks, _types, _window
from sasa_optax._controller import ControllerState
from sasa_optax._qhm import add_coupled_decay, check_qhm, init_trace, qhm_step


class SasaState(NamedTuple):
    """The state of `sasa`, `sasa_plus`, `slope`, `ssls` and `salsa`.

    Attributes:
      trace: h_k, the exponential average of the gradients; like the parameters.
      controller: the `ControllerState`, which holds the learning rate.
    """

    trace: optax.Updates
    controller: ControllerState


def with_momentum(
    controller: Any,
    momentum: jax.typing.ArrayLike,
    nu: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """A controller, driven by QHM that starts afresh after each drop."""
    check_qhm(momentum, nu)
    _checks.number("weight_decay", weight_decay, "[0, inf)")

    def init(params: optax.Params) -> SasaState:
        return SasaState(init_trace(params), controller.init(params))

    def update(
        updates: optax.Updates,
        state: SasaState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SasaState]:
        params = _checks.params(params, "The test for stationarity")
        grads = add_coupled_decay(updates, weight_decay, params)
        # The window is empty after a drop, and at the start, when the trace is zero.
        window = state.controller.window
        restart = False if window is None else _window.is_empty(window)
        direction, trace = qhm_step(grads, state.trace, momentum, nu, restart)
        # The decay is left to those who need it: a line search, which ends, would
        # otherwise have the sum of the two written to memory for good.
        extra_args |= {
            "grad": updates,
            "coupled_decay": weight_decay,
            "with_direction": True,
        }
        (updates, used), controlled = controller.update(
            direction, state.controller, params, **extra_args
        )
        # What the controller computed is kept, or XLA would compute it once more.
        return updates, SasaState(used if direction is trace else trace, controlled)

    return _types.transformation(init, update)
