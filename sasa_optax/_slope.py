"""SLOPE: the rate drops when the loss stops falling."""

import jax
import optax

from sasa_optax._controller import Controller
from sasa_optax._momentum import with_momentum
from sasa_optax._stationarity import SlopeTest
from sasa_optax._statistics import loss_statistic


def slope(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    nu: jax.typing.ArrayLike = 1.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    steps_per_epoch: int | None = None,
    factor: jax.typing.ArrayLike = 0.5,
    significance: jax.typing.ArrayLike = 0.05,
    log_steps: bool = False,
    leak_ratio: jax.typing.ArrayLike = 8,
    min_samples: jax.typing.ArrayLike | None = None,
    test_interval: jax.typing.ArrayLike | None = None,
    warmup_steps: jax.typing.ArrayLike = 0,
    max_window: int = 16384,
    min_learning_rate: jax.typing.ArrayLike = 0.0,
    scale_min_samples: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    average: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""SLOPE: momentum SGD whose rate drops when the mini-batch loss stops falling.

    Quasi-hyperbolic momentum (`scale_by_qhm`) makes the direction. At every step it
    records the loss, with coupled weight decay :math:`\lambda` plus
    :math:`\tfrac{\lambda}{2}\|x_{k+1}\|^2`. With r the correlation of the n newest
    losses and their steps, and

    .. math::

      t = r\sqrt{\frac{n - 2}{1 - r^2}},

    the loss is still falling if :math:`P(T_{n-2} < t)` is below ``significance``;
    otherwise the rate drops, and the momentum starts afresh.

    **The rate** is that of normalised momentum: 1.0 with ``momentum=0.9`` moves like
    ``optax.sgd(0.1, momentum=0.9)``.

    Args:
      learning_rate: a positive number, a scalar array, or an optax schedule, such as a
        warm-up, which the drops then scale.
      momentum: beta, in [0, 1). Default 0.9.
      nu: the weight of the average, in [0, 1]; 1 is normalised momentum, 0 plain SGD,
        ``momentum`` Nesterov's. Default 1.0.
      weight_decay: coupled L2: this times the parameters is added to the gradients, in
        [0, inf). Default 0.0.
      factor: what a drop multiplies the rate by, in (0, 1). Default 0.5.
      significance: of the test, in (0, 1). Default 0.05.
      log_steps: regress the loss on the logarithm of the step. Default False.
      steps_per_epoch: see `scale_by_sasa_plus`, as for all that follow.
      leak_ratio: default 8.
      min_samples: default 1000.
      test_interval: default 100.
      warmup_steps: default 0.
      max_window: default 16384.
      min_learning_rate: default 0.0.
      scale_min_samples: default False.
      axis_name: default None.
      average: default False.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `SasaState`; its
      ``update`` needs ``params`` and ``value``, the loss of the mini-batch.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` or ``value`` is missing.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> optimizer = sasa_optax.slope(0.5)
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> loss, grads = jax.value_and_grad(lambda x: jnp.sum(x**2))(params)
      >>> updates, state = optimizer.update(grads, state, params, value=loss)
      >>> print(optax.tree.get(state, "learning_rate"))
      0.5

    References:
      Zhang, Lang, Liu and Xiao, `Statistical adaptive stochastic gradient methods
      <https://arxiv.org/abs/2002.10597>`_, 2020.
    """
    controller = Controller(
        learning_rate=learning_rate,
        statistic=loss_statistic(weight_decay),
        test=SlopeTest(significance, log_steps),
        factor=factor,
        leak_ratio=leak_ratio,
        min_samples=min_samples,
        test_interval=test_interval,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
        max_window=max_window,
        min_learning_rate=min_learning_rate,
        scale_min_samples=scale_min_samples,
        axis_name=axis_name,
        average=average,
    )
    return with_momentum(controller.transformation(), momentum, nu, weight_decay)
