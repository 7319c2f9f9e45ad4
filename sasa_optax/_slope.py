"""SLOPE: the rate drops when the loss stops falling."""

import optax

from sasa_optax._average import maybe_averaged
from sasa_optax._momentum import with_momentum
from sasa_optax._moved_keywords import names_moved_keywords
from sasa_optax._sasa import make_controller
from sasa_optax._stationarity import TestLike
from sasa_optax._statistics import loss_statistic
from sasa_optax._transformation import Optimizer
from sasa_optax._types import AxisName, Numeric
from sasa_optax._window import Window


@names_moved_keywords
def slope(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Numeric = 0.9,
    nu: Numeric = 1.0,
    weight_decay: Numeric = 0.0,
    *,
    steps_per_epoch: int | None = None,
    factor: Numeric = 0.5,
    min_learning_rate: Numeric = 0.0,
    test: TestLike = "slope",
    window: Window = Window(),
    average: bool = False,
    axis_name: AxisName = None,
) -> Optimizer:
    r"""SLOPE: momentum SGD whose rate drops when the mini-batch loss stops falling.

    Quasi-hyperbolic momentum (`scale_by_qhm`) makes the direction. At every step SLOPE
    records the loss, with coupled weight decay :math:`\lambda` plus
    :math:`\tfrac{\lambda}{2}\|x_{k+1}\|^2`. When `SlopeTest` finds that the recorded
    values no longer fall, the rate drops, and the momentum restarts. See `Zhang et al.,
    2020 <https://arxiv.org/abs/2002.10597>`_.

    Args:
      factor: what a drop multiplies the rate by, in (0, 1). Default 0.5.
      test: see `scale_by_sasa_plus`. Default "slope".
      learning_rate, momentum, nu, weight_decay, steps_per_epoch: see `sasa_plus`.
      min_learning_rate, window, average, axis_name: see `sasa_plus`.

    Returns:
      As `sasa_plus`. Its ``update`` also needs ``value``, the loss of the mini-batch.

    Raises:
      ValueError: if an argument is out of range, or ``params`` or ``value`` is missing.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> optimizer = sasa_optax.slope(0.5)
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> loss, grads = jax.value_and_grad(lambda x: jnp.sum(x**2))(params)
      >>> updates, state = optimizer.update(grads, state, params, value=loss)
    """
    controller = make_controller(
        learning_rate,
        loss_statistic(weight_decay),
        test,
        window,
        steps_per_epoch,
        factor=factor,
        min_learning_rate=min_learning_rate,
        axis_name=axis_name,
    )
    optimizer = with_momentum(controller, momentum, nu, weight_decay)
    return maybe_averaged(optimizer, average, window.leak_ratio)
