"""Quasi-hyperbolic momentum, in its normalised form."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _checks, _tree, _types


class ScaleByQhmState(NamedTuple):
    """The state of `scale_by_qhm`.

    Attributes:
      trace: h_k, the exponential average of the gradients; like the parameters.
    """

    trace: optax.Updates


def check_qhm(momentum: jax.typing.ArrayLike, nu: jax.typing.ArrayLike) -> None:
    _checks.number("momentum", momentum, "[0, 1)")
    _checks.number("nu", nu, "[0, 1]")


def init_trace(params: optax.Params) -> optax.Updates:
    return jax.tree.map(jnp.zeros_like, params)


def qhm_step(
    grads: optax.Updates,
    trace: optax.Updates,
    momentum: jax.typing.ArrayLike,
    nu: jax.typing.ArrayLike,
    restart: jax.typing.ArrayLike = False,
) -> tuple[optax.Updates, optax.Updates]:
    """The direction d_k and the trace h_k; ``restart`` forgets h_{k-1} in passing."""
    decay = jnp.where(restart, 0.0, momentum)
    if _checks.is_zero(momentum):
        # Nothing is remembered: zero times what is not finite would be, too.
        trace = jax.tree.map(jnp.zeros_like, grads)
    trace = _tree.linear_combination(1 - momentum, grads, decay, trace)
    if isinstance(nu, int | float) and nu == 1:
        # The direction is the trace itself, which is in memory: a statistic that
        # reduces over it needs no temporary.
        return trace, trace
    return _tree.linear_combination(1 - nu, grads, nu, trace), trace


def add_coupled_decay(
    grads: optax.Updates,
    weight_decay: jax.typing.ArrayLike,
    params: optax.Params | None,
) -> optax.Updates:
    """The gradient of the loss plus (weight_decay/2) ||x||^2."""
    if _checks.is_zero(weight_decay):
        return grads
    params = _checks.params(params, "weight_decay")
    return _tree.linear_combination(1.0, grads, weight_decay, params)


def coupled_decay_loss(
    weight_decay: jax.typing.ArrayLike,
    params: optax.Params,
    dtype: jax.typing.DTypeLike,
    axis_name: _tree.AxisName = None,
) -> jax.typing.ArrayLike:
    """(weight_decay/2) ||x||^2, what `add_coupled_decay` adds the gradient of."""
    if _checks.is_zero(weight_decay):
        return 0.0
    squared_norm = _tree.squared_norm(params, dtype, axis_name)
    return jnp.asarray(weight_decay, dtype) / 2 * squared_norm


def scale_by_qhm(
    momentum: jax.typing.ArrayLike = 0.9, nu: jax.typing.ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Averages gradients by quasi-hyperbolic momentum, normalised.

    .. math::

      h_k = (1-\beta) g_k + \beta h_{k-1}, \qquad d_k = (1-\nu) g_k + \nu h_k

    With ``nu=1`` it is normalised momentum, with ``nu=0`` plain SGD, and with
    ``nu=momentum`` Nesterov's.

    **The rate.** Because h is an average, not a sum, a rate of 1.0 with
    ``momentum=0.9`` moves like ``optax.sgd(0.1, momentum=0.9)``: multiply the rate you
    know from there by 1 / (1 - momentum), that is by 10.

    Args:
      momentum: beta, in [0, 1). Default 0.9.
      nu: the weight of the average, in [0, 1]. Default 1.0.

    Returns:
      An `optax.GradientTransformationExtraArgs` from gradients to directions of the
      same dtypes, whose state is a `ScaleByQhmState`; it ignores extra arguments.

    Raises:
      ValueError: at construction, if an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import sasa_optax
      >>> optimizer = sasa_optax.scale_by_qhm(momentum=0.9, nu=0.7)
      >>> state = optimizer.init(jnp.zeros(2))
      >>> direction, state = optimizer.update(jnp.array([1.0, 2.0]), state)
      >>> print(direction)
      [0.37 0.74]

    References:
      Ma and Yarats, `Quasi-hyperbolic momentum and Adam for deep learning
      <https://arxiv.org/abs/1810.06801>`_, ICLR 2019.
    """
    check_qhm(momentum, nu)

    def init(params: optax.Params) -> ScaleByQhmState:
        return ScaleByQhmState(init_trace(params))

    def update(
        updates: optax.Updates,
        state: ScaleByQhmState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByQhmState]:
        del params, extra_args
        direction, trace = qhm_step(updates, state.trace, momentum, nu)
        return direction, ScaleByQhmState(trace)

    return _types.transformation(init, update)


def qhm(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    nu: jax.typing.ArrayLike = 1.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """SGD with quasi-hyperbolic momentum: what SASA+ and SALSA move by.

    See `scale_by_qhm` for the equations. The rate is that of *normalised* momentum: 1.0
    with ``momentum=0.9`` moves like ``optax.sgd(0.1, momentum=0.9)``.

    Args:
      learning_rate: a positive number, scalar array or optax schedule.
      momentum: beta, in [0, 1). Default 0.9.
      nu: the weight of the average, in [0, 1]; 1 is normalised momentum, 0 plain SGD,
        ``momentum`` Nesterov's. Default 1.0.
      weight_decay: coupled L2: this times the parameters is added to the gradients, in
        [0, inf). Default 0.0.

    Returns:
      An `optax.GradientTransformation`; with ``weight_decay`` its ``update`` needs the
      parameters.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        the parameters are needed and missing.

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

    References:
      Ma and Yarats, `Quasi-hyperbolic momentum and Adam for deep learning
      <https://arxiv.org/abs/1810.06801>`_, ICLR 2019.
    """
    _checks.learning_rate(learning_rate, allow_schedule=True)
    _checks.number("weight_decay", weight_decay, "[0, inf)")

    def coupled_decay(
        updates: optax.Updates, params: optax.Params | None
    ) -> optax.Updates:
        return add_coupled_decay(updates, weight_decay, params)

    return optax.chain(
        optax.stateless(coupled_decay),
        scale_by_qhm(momentum, nu),
        optax.scale_by_learning_rate(learning_rate),
    )
