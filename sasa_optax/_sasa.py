"""SASA and SASA+: the optimizers, and the forms to put into a chain.

Each is a controller with a statistic and a test:

  SASA+: `master_statistic`, `ZeroMeanTest`, quasi-hyperbolic momentum.
  SASA: `yaida_statistic`, `EquivalenceTest`, normalised momentum.
"""

from typing import Any

import optax

from sasa_optax import _checks, _stationarity
from sasa_optax._average import maybe_averaged
from sasa_optax._controller import Controller, as_transformation
from sasa_optax._momentum import with_momentum
from sasa_optax._moved_keywords import names_moved_keywords
from sasa_optax._stationarity import TestLike
from sasa_optax._statistics import (
    Statistic,
    StatisticLike,
    as_statistic,
    yaida_statistic,
)
from sasa_optax._transformation import Optimizer
from sasa_optax._types import AxisName, Numeric
from sasa_optax._window import Window


def make_controller(
    learning_rate: optax.ScalarOrSchedule,
    statistic: Statistic,
    test: TestLike | None,
    window: Window,
    steps_per_epoch: int | None,
    **options: Any,
) -> Controller:
    """A controller with the given test and window, or with their defaults."""
    _checks.instance("window", window, Window)
    return Controller(
        learning_rate=learning_rate,
        statistic=statistic,
        test=_stationarity.as_test(statistic.test if test is None else test),
        window=window.resolved(steps_per_epoch),
        **options,
    )


@names_moved_keywords
def scale_by_sasa_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    steps_per_epoch: int | None = None,
    factor: Numeric = 0.1,
    min_learning_rate: Numeric = 0.0,
    statistic: StatisticLike = "master",
    test: TestLike | None = None,
    window: Window = Window(),
    average: bool = False,
    axis_name: AxisName = None,
) -> Optimizer:
    r"""Applies a learning rate that drops when the dynamics are stationary.

    Put it last in a chain of directions, where `optax.scale_by_learning_rate` would be:
    it applies the rate and the minus sign. After ``optax.adam(lr)``, which has applied
    both, it goes up the gradient. At every step it records

    .. math::

      \Delta_k = \langle x_{k+1}, d_k\rangle + \tfrac{\alpha}{2}\|d_k\|^2
               = -\frac{\|x_{k+1}\|^2 - \|x_k\|^2}{2\alpha},

    whose mean is zero under any stationary dynamics, whatever made the direction
    :math:`d_k`. Now and then, as `Window` says, a test asks whether the mean is zero.
    If so, the rate is multiplied by ``factor`` and the window is emptied. This is
    SASA+ (`Zhang et al., 2020 <https://arxiv.org/abs/2002.10597>`_) without its
    momentum. Momentum in the chain continues through a drop; `sasa_plus` restarts it.

    Args:
      learning_rate: a positive number, a scalar array, or an optax schedule, such as a
        warm-up, which the drops then scale. After `scale_by_qhm` it is the rate of
        *normalised* momentum: 1.0 with ``momentum=0.9`` moves like
        ``optax.sgd(0.1, momentum=0.9)``.
      steps_per_epoch: the number of steps in an epoch. It sets what ``window`` does not
        give. Default None.
      factor: what a drop multiplies the rate by, in (0, 1). Default 0.1.
      min_learning_rate: the rate never drops below this, in [0, inf). At this rate the
        test continues, and fires without effect. Default 0.0.
      statistic: ``"master"`` (`master_statistic`), ``"centred"`` (`centred_statistic`,
        which does not depend on where the optimum lies, and takes a copy of the
        parameters), a `Statistic`, or a function from `Transition` to `Sample`. The
        names stand for a direction of momentum 0.9. Default "master".
      test: ``"zero_mean"`` (`ZeroMeanTest`), ``"equivalence"`` (`EquivalenceTest`),
        ``"slope"`` (`SlopeTest`), one of these objects, or a function from `Samples` to
        `TestResult`. Default None: the test that the statistic is meant for, which is
        ``ZeroMeanTest()`` for "master" and for functions.
      window: which samples the test sees, and how often it runs. Default ``Window()``.
      average: whether to add `average_iterates` over the newest 1/leak_ratio of all
        iterates, for `averaged_params`. The updates do not change. Default False.
      axis_name: the mesh axis, or a tuple of them, over which the parameters are
        sharded inside `jax.shard_map`. One all-reduce then sums the statistic. It is
        not needed under jit, nor for replicated parameters. Default None.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its state is a `ControllerState`, or
      with ``average=True`` the pair of that and an `AverageState`. Its ``update`` needs
      ``params``, takes the extra arguments ``grad`` and ``value`` for the statistic,
      and ignores all others. Given ``grad``, it also counts the steps that point up the
      gradient, ``num_ascents``, for one more pass over gradients and directions.
      Updates keep their dtypes; the statistics are float32, or float64 where a
      parameter is. A sample that is not finite is counted in ``num_nonfinite`` and not
      recorded.

    Raises:
      ValueError: if an argument is out of range, or ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax, sasa_optax
      >>> window = sasa_optax.Window(min_samples=100)
      >>> optimizer = optax.chain(
      ...     optax.scale_by_adam(), sasa_optax.scale_by_sasa_plus(1e-3, window=window)
      ... )
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.ones(3), state, params)
      >>> print(optax.tree.get(state, "learning_rate"))
      0.001
    """
    controller = make_controller(
        learning_rate,
        as_statistic(statistic),
        test,
        window,
        steps_per_epoch,
        factor=factor,
        min_learning_rate=min_learning_rate,
        axis_name=axis_name,
    )
    return maybe_averaged(as_transformation(controller), average, window.leak_ratio)


@names_moved_keywords
def sasa_plus(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Numeric = 0.9,
    nu: Numeric = 1.0,
    weight_decay: Numeric = 0.0,
    *,
    steps_per_epoch: int | None = None,
    factor: Numeric = 0.1,
    min_learning_rate: Numeric = 0.0,
    statistic: StatisticLike = "master",
    test: TestLike | None = None,
    window: Window = Window(),
    average: bool = False,
    axis_name: AxisName = None,
) -> Optimizer:
    r"""SASA+: momentum SGD that cuts its learning rate when progress has stopped.

    Quasi-hyperbolic momentum (`scale_by_qhm`) makes the direction. The rate drops by
    the test of `scale_by_sasa_plus`, and at a drop the momentum restarts. See `Zhang et
    al., 2020 <https://arxiv.org/abs/2002.10597>`_.

    **The rate** is that of normalised momentum: 1.0 with ``momentum=0.9`` moves like
    ``optax.sgd(0.1, momentum=0.9)``. Start from the largest rate that trains stably.

    Args:
      momentum, nu, weight_decay: see `qhm`. The named statistics take this momentum.
      learning_rate, steps_per_epoch, factor, min_learning_rate: see
        `scale_by_sasa_plus`.
      statistic, test, window, average, axis_name: see `scale_by_sasa_plus`.

    Returns:
      As `scale_by_sasa_plus`, with a `MomentumState` around the `ControllerState`.

    Raises:
      ValueError: if an argument is out of range, or ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax, sasa_optax
      >>> optimizer = sasa_optax.sasa_plus(1.0, weight_decay=5e-4, steps_per_epoch=390)
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.ones(3), state, params)
      >>> print(optax.tree.get(state, "learning_rate"))
      1.0
    """
    controller = make_controller(
        learning_rate,
        as_statistic(statistic, momentum, nu),
        test,
        window,
        steps_per_epoch,
        factor=factor,
        min_learning_rate=min_learning_rate,
        axis_name=axis_name,
    )
    optimizer = with_momentum(controller, momentum, nu, weight_decay)
    return maybe_averaged(optimizer, average, window.leak_ratio)


@names_moved_keywords
def sasa(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Numeric = 0.9,
    weight_decay: Numeric = 0.0,
    *,
    steps_per_epoch: int | None = None,
    factor: Numeric = 0.1,
    min_learning_rate: Numeric = 0.0,
    test: TestLike = "equivalence",
    window: Window = Window(leak_ratio=2),
    average: bool = False,
    axis_name: AxisName = None,
) -> Optimizer:
    r"""SASA: momentum SGD whose rate drops on positive evidence of stationarity.

    Normalised momentum makes the direction :math:`d_k`. At every step SASA records

    .. math::

      z_k = \langle x_k, g_k\rangle - v_k, \qquad
      v_k = \frac{\alpha}{2}\,\frac{1+\beta}{1-\beta}\,\|d_k\|^2,

    whose mean is zero at stationarity (`Yaida, 2019
    <https://arxiv.org/abs/1810.00004>`_). The rate drops when the confidence interval
    of the mean of :math:`z` lies within :math:`(-\delta\bar v, \delta\bar v)`. Unlike
    `sasa_plus`, it does not take a wide interval for a sign that progress has stopped,
    so it is slower to fire. See `Lang et al., 2019 <https://arxiv.org/abs/1909.09785>`_.

    Args:
      momentum, weight_decay: see `qhm`.
      test: see `scale_by_sasa_plus`. Default "equivalence": an `EquivalenceTest` with
        the authors' delta of 0.02 and significance of 0.2.
      window: see `scale_by_sasa_plus`. Default ``Window(leak_ratio=2)``: the newer half
        of the samples since the last drop, as the authors have it.
      learning_rate, steps_per_epoch, factor, min_learning_rate, average, axis_name: see
        `sasa_plus`.

    Returns:
      As `sasa_plus`.

    Raises:
      ValueError: if an argument is out of range, or ``params`` is missing.

    Example:
      >>> import sasa_optax
      >>> optimizer = sasa_optax.sasa(1.0, momentum=0.9, weight_decay=5e-4)
    """
    controller = make_controller(
        learning_rate,
        yaida_statistic(momentum, weight_decay),
        test,
        window,
        steps_per_epoch,
        factor=factor,
        min_learning_rate=min_learning_rate,
        axis_name=axis_name,
    )
    optimizer = with_momentum(controller, momentum, 1.0, weight_decay)
    return maybe_averaged(optimizer, average, window.leak_ratio)


@names_moved_keywords
def reduce_on_stationarity(
    *,
    steps_per_epoch: int | None = None,
    factor: Numeric = 0.1,
    min_scale: Numeric = 0.0,
    statistic: StatisticLike = "master",
    test: TestLike | None = None,
    window: Window = Window(),
    average: bool = False,
    axis_name: AxisName = None,
) -> Optimizer:
    """Scales another optimizer's updates down when its dynamics are stationary.

    Put it after any *complete* optimizer, as `optax.contrib.reduce_on_plateau`. After
    `optax.scale_by_adam`, which applies no minus sign, it goes up the gradient. It
    needs no loss: it judges by the statistic of `scale_by_sasa_plus`, with minus the
    updates as the direction and the scale as the rate. What made the updates does not
    matter: momentum, Adam, clipping, decoupled weight decay. A schedule in the other
    optimizer is fine while it warms up. One that decays to the end keeps the dynamics
    from ever being stationary, and leaves nothing to reduce.

    Args:
      factor: what a drop multiplies the scale by, in (0, 1). Default 0.1.
      min_scale: the scale never drops below this, in [0, 1]. Default 0.0.
      steps_per_epoch, statistic, test, window, average, axis_name: see
        `scale_by_sasa_plus`.

    Returns:
      As `scale_by_sasa_plus`. The state has a ``scale``, 1.0 at first, and no
      ``learning_rate``.

    Raises:
      ValueError: if an argument is out of range, or ``params`` is missing.

    Example:
      >>> import optax, sasa_optax
      >>> optimizer = optax.chain(
      ...     optax.adamw(3e-4), sasa_optax.reduce_on_stationarity()
      ... )
    """
    _checks.number("min_scale", min_scale, "[0, 1]")
    controller = make_controller(
        1.0,
        as_statistic(statistic),
        test,
        window,
        steps_per_epoch,
        factor=factor,
        min_learning_rate=min_scale,
        axis_name=axis_name,
    )
    optimizer = as_transformation(controller, scales_updates=True)
    return maybe_averaged(optimizer, average, window.leak_ratio)
