"""Quasi-hyperbolic momentum, alone and under a controller that restarts it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _checks, _decay, _tree
from sasa_optax._controller import ExtraArgs, RateController
from sasa_optax._transformation import Optimizer, transformation
from sasa_optax._types import Numeric


class ScaleByQhmState(NamedTuple):
    """The state of `scale_by_qhm`.

    Attributes:
      trace: h_k, the exponential average of the gradients; like the parameters.
    """

    trace: optax.Updates


class MomentumState(NamedTuple):
    """The state of `sasa`, `sasa_plus`, `slope`, `ssls` and `salsa`.

    Attributes:
      trace: h_k, the exponential average of the gradients; like the parameters.
      controller: the `ControllerState`, which holds the learning rate. For `ssls` and
        `salsa` it is a `LineSearchState`, with the `ControllerState` in it.
    """

    trace: optax.Updates
    controller: Any


def _init_trace(params: optax.Params) -> optax.Updates:
    return jax.tree.map(jnp.zeros_like, params)


def _qhm_step(
    grads: optax.Updates, trace: optax.Updates, momentum: Numeric, nu: Numeric
) -> tuple[optax.Updates, optax.Updates]:
    """The direction d_k and the trace h_k."""
    if isinstance(momentum, int | float) and momentum == 0:
        # Nothing is remembered, not even what is not finite.
        trace = jax.tree.map(jnp.zeros_like, grads)
    trace = _tree.linear_combination(1 - momentum, grads, momentum, trace)
    if isinstance(nu, int | float) and nu == 1:
        # The direction is the trace itself, which is in memory. A statistic that
        # reduces over it needs no temporary.
        return trace, trace
    return _tree.linear_combination(1 - nu, grads, nu, trace), trace


def with_momentum(
    controller: RateController, momentum: Numeric, nu: Numeric, weight_decay: Numeric
) -> Optimizer:
    """A controller behind QHM that restarts after each drop."""
    _checks.momentum(momentum, nu, weight_decay)

    def init(params: optax.Params) -> MomentumState:
        return MomentumState(_init_trace(params), controller.init(params))

    def update(
        updates: optax.Updates,
        state: MomentumState,
        params: optax.Params,
        *,
        grad: optax.Updates | None = None,
        value: Numeric | None = None,
        **others: Any,
    ) -> tuple[optax.Updates, MomentumState]:
        del grad
        grads = _decay.decayed_grads(updates, weight_decay, params)
        # Zeroed in the pass that reads it: at the drop itself, the trace had already
        # been written.
        restarts = controller.restarts_momentum(state.controller)
        kept = jax.tree.map(lambda h: jnp.where(restarts, 0, h), state.trace)
        direction, trace = _qhm_step(grads, kept, momentum, nu)
        # The decay itself is passed on instead of the decayed gradients. A line search,
        # which ends, would otherwise make XLA write these to memory for good.
        extra = ExtraArgs(updates, value, weight_decay, others)
        to_keep, updates, controlled = controller.step(
            direction, state.controller, params, extra
        )
        trace = to_keep if direction is trace else trace
        return updates, MomentumState(trace, controlled)

    return transformation(init, update, MomentumState)


def scale_by_qhm(momentum: Numeric = 0.9, nu: Numeric = 1.0) -> Optimizer:
    r"""Averages gradients by quasi-hyperbolic momentum, normalised.

    .. math::

      h_k = (1-\beta) g_k + \beta h_{k-1}, \qquad d_k = (1-\nu) g_k + \nu h_k

    With ``nu=1`` it is normalised momentum, with ``nu=0`` plain SGD, and with
    ``nu=momentum`` Nesterov's (`Ma and Yarats, 2019
    <https://arxiv.org/abs/1810.06801>`_).

    **The rate.** Because h is an average and not a sum, a rate of 1.0 with
    ``momentum=0.9`` moves like ``optax.sgd(0.1, momentum=0.9)``. Multiply a rate that
    you know from there by 1 / (1 - momentum), which is 10.

    Args:
      momentum: beta, in [0, 1). Default 0.9.
      nu: the weight of the average, in [0, 1]. Default 1.0.

    Returns:
      An `optax.GradientTransformationExtraArgs` from gradients to directions of the
      same dtypes, whose state is a `ScaleByQhmState`. It ignores extra arguments.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import sasa_optax
      >>> optimizer = sasa_optax.scale_by_qhm(momentum=0.9, nu=0.7)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> direction, state = optimizer.update(jnp.array([1.0, 2.0]), state)
      >>> print(direction)
      [0.37 0.74]
    """
    _checks.momentum(momentum, nu)

    def init(params: optax.Params) -> ScaleByQhmState:
        return ScaleByQhmState(_init_trace(params))

    def update(
        updates: optax.Updates, state: ScaleByQhmState, *_: Any, **__: Any
    ) -> tuple[optax.Updates, ScaleByQhmState]:
        direction, trace = _qhm_step(updates, state.trace, momentum, nu)
        return direction, ScaleByQhmState(trace)

    return transformation(init, update, ScaleByQhmState, needs_params=False)


def qhm(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Numeric = 0.9,
    nu: Numeric = 1.0,
    weight_decay: Numeric = 0.0,
) -> optax.GradientTransformation:
    """SGD with quasi-hyperbolic momentum, which SASA+ and SALSA are built on.

    Args:
      learning_rate: a positive number, scalar array or optax schedule. It is the rate
        of *normalised* momentum: see `scale_by_qhm`, which also has the equations.
      momentum: beta, in [0, 1). Default 0.9.
      nu: the weight of the average, in [0, 1]; 1 is normalised momentum, 0 plain SGD,
        ``momentum`` Nesterov's. Default 1.0.
      weight_decay: coupled L2: this times the parameters is added to the gradients, in
        [0, inf). Default 0.0.

    Returns:
      An `optax.GradientTransformation`. With ``weight_decay`` its ``update`` needs the
      parameters.

    Raises:
      ValueError: if an argument is out of range, or the parameters are needed and
        missing.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> loss = lambda x: jnp.sum((x - 3.0) ** 2)
      >>> optimizer = sasa_optax.qhm(learning_rate=0.5, momentum=0.9)
      >>> params = jnp.zeros(2)
      >>> state = optimizer.init(params)
      >>> for _ in range(200):
      ...     grads = jax.grad(loss)(params)
      ...     updates, state = optimizer.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(2))
      [3. 3.]
    """
    _checks.learning_rate(learning_rate, allow_schedule=True)
    _checks.momentum(momentum, nu, weight_decay)

    def decayed(grads: optax.Updates, params: optax.Params | None) -> optax.Updates:
        return _decay.decayed_grads(grads, weight_decay, params)

    return optax.chain(
        optax.stateless(decayed),
        scale_by_qhm(momentum, nu),
        optax.scale_by_learning_rate(learning_rate),
    )
