"""SASA and SASA+: the optimizers, and the forms to put into a chain.

Each is a controller given two parts, and driven by a third:

  SASA+: `master_statistic`, `ZeroMeanTest`, quasi-hyperbolic momentum.
  SASA: `yaida_statistic`, `EquivalenceTest`, normalised momentum.
"""

from typing import Any

import optax

from sasa_optax import _checks, _tree, _types
from sasa_optax._average import maybe_averaged
from sasa_optax._controller import (
    Controller,
    ControllerState,
    ExtraArgs,
    as_transformation,
)
from sasa_optax._momentum import with_momentum
from sasa_optax._moved_keywords import names_moved_keywords
from sasa_optax._stationarity import (
    EquivalenceTest,
    StationarityTest,
    TestName,
    as_test,
)
from sasa_optax._statistics import (
    Statistic,
    StatisticLike,
    as_statistic,
    yaida_statistic,
)
from sasa_optax._types import AxisName, Numeric
from sasa_optax._window import Window


def make_controller(
    learning_rate: optax.ScalarOrSchedule,
    statistic: Statistic,
    test: TestName | StationarityTest | None,
    window: Window,
    steps_per_epoch: int | None,
    **options: Any,
) -> Controller:
    """A controller whose test and window are as they were given, or the defaults."""
    _checks.instance("window", window, Window)
    return Controller(
        learning_rate=learning_rate,
        statistic=statistic,
        test=as_test(statistic.test if test is None else test),
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
    test: TestName | StationarityTest | None = None,
    window: Window = Window(),
    average: bool = False,
    axis_name: AxisName = None,
) -> _types.Optimizer:
    r"""Applies a learning rate that drops when the dynamics are stationary.

    Put it last in a chain of directions, where `optax.scale_by_learning_rate` would be:
    it applies the rate and the minus sign. At every step it records

    .. math::

      \Delta_k = \langle x_{k+1}, d_k\rangle + \tfrac{\alpha}{2}\|d_k\|^2
               = -\frac{\|x_{k+1}\|^2 - \|x_k\|^2}{2\alpha},

    whose mean is zero under any stationary dynamics, whatever made the direction
    :math:`d_k`. Every ``test_interval`` steps, once the `Window` keeps more than
    ``min_samples`` samples, a test asks whether their mean is zero. If so, the rate is
    multiplied by ``factor`` and the window is emptied.

    Momentum inside the chain continues through a drop; `sasa_plus` restarts its own.

    Args:
      learning_rate: a positive number, a scalar array, or an optax schedule, such as a
        warm-up, which the drops then scale. It means what it means to the directions
        that it multiplies: after `scale_by_qhm` it is the rate of *normalised*
        momentum, where 1.0 with ``momentum=0.9`` moves like
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
        "equivalence" for "centred" and "zero_mean" for "master" and functions.
      window: which samples the test sees, and how often it runs. Default ``Window()``.
      average: whether to add `average_iterates` over the newest 1/leak_ratio of all
        iterates, for `averaged_params`. The updates do not change. Default False.
      axis_name: the mesh axis, or a tuple of them, over which the parameters are
        sharded inside `jax.shard_map`. The statistic is then summed over it, by one
        all-reduce. Not needed under jit, nor where parameters are replicated. Default
        None.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `ControllerState`.
      With ``average=True`` it is the pair of that and an `AverageState`. Its ``update``
      needs ``params``, takes the extra arguments ``grad`` and ``value`` for the
      statistic, and ignores all others. Updates keep their dtypes; the statistics are
      float32, or float64 where a parameter is. A sample that is not finite is counted
      in ``num_nonfinite``, not recorded, and triggers nothing.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` is missing.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> window = sasa_optax.Window(min_samples=100)
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     optax.scale_by_adam(),
      ...     sasa_optax.scale_by_sasa_plus(1e-3, window=window),
      ... )
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.ones(3), state, params)
      >>> print(optax.tree.get(state, "learning_rate"))
      0.001

    References:
      Zhang, Lang, Liu and Xiao, `Statistical adaptive stochastic gradient methods
      <https://arxiv.org/abs/2002.10597>`_, 2020.
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
    optimizer = as_transformation(controller)
    return maybe_averaged(optimizer, average, window.leak_ratio)


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
    test: TestName | StationarityTest | None = None,
    window: Window = Window(),
    average: bool = False,
    axis_name: AxisName = None,
) -> _types.Optimizer:
    r"""SASA+: momentum SGD that cuts its learning rate when progress has stopped.

    Quasi-hyperbolic momentum (`scale_by_qhm`) makes the direction. The rate drops by
    the test of `scale_by_sasa_plus`, and at a drop the momentum restarts.

    **The rate** is that of normalised momentum: 1.0 with ``momentum=0.9`` moves like
    ``optax.sgd(0.1, momentum=0.9)``. Start from the largest rate that trains stably.

    Args:
      learning_rate: a positive number, a scalar array, or an optax schedule, such as a
        warm-up, which the drops then scale.
      momentum: beta, in [0, 1). Default 0.9.
      nu: the weight of the average, in [0, 1]; 1 is normalised momentum, 0 plain SGD,
        ``momentum`` Nesterov's. Default 1.0.
      weight_decay: coupled L2: this times the parameters is added to the gradients, in
        [0, inf). Default 0.0.
      steps_per_epoch, factor, min_learning_rate, statistic, test, window, average,
        axis_name: see `scale_by_sasa_plus`. The named statistics take this momentum.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `MomentumState`. With
      ``average=True`` it is the pair of that and an `AverageState`. Its ``update``
      needs ``params``.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` is missing.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> def loss(x, key):
      ...     return jnp.sum((x - jax.random.normal(key, x.shape)) ** 2)
      >>> window = sasa_optax.Window(leak_ratio=4, min_samples=50)
      >>> optimizer = sasa_optax.sasa_plus(0.5, window=window)
      >>> @jax.jit
      ... def step(params, state, key):
      ...     grads = jax.grad(loss)(params, key)
      ...     updates, state = optimizer.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.full(10, 5.0)
      >>> state = optimizer.init(params)
      >>> for key in jax.random.split(jax.random.key(0), 1000):
      ...     params, state = step(params, state, key)
      >>> bool(optax.tree.get(state, "num_drops") > 0)
      True

    References:
      Zhang, Lang, Liu and Xiao, `Statistical adaptive stochastic gradient methods
      <https://arxiv.org/abs/2002.10597>`_, 2020.
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
    test: TestName | StationarityTest = EquivalenceTest(),
    window: Window = Window(leak_ratio=2),
    average: bool = False,
    axis_name: AxisName = None,
) -> _types.Optimizer:
    r"""SASA: momentum SGD whose rate drops on positive evidence of stationarity.

    Normalised momentum makes the direction :math:`d_k`. At every step SASA records

    .. math::

      z_k = \langle x_k, g_k\rangle - v_k, \qquad
      v_k = \frac{\alpha}{2}\,\frac{1+\beta}{1-\beta}\,\|d_k\|^2,

    whose mean is zero at stationarity (Yaida's relation). The rate drops when the
    confidence interval of the mean of :math:`z` lies within
    :math:`(-\delta\bar v, \delta\bar v)`. Unlike the test of `sasa_plus`, it does not
    take a wide interval for a sign that progress has stopped, and so is slower to fire.

    **The rate** is that of normalised momentum: 1.0 with ``momentum=0.9`` moves like
    ``optax.sgd(0.1, momentum=0.9)``.

    Args:
      learning_rate, momentum, weight_decay: see `sasa_plus`.
      steps_per_epoch, factor, min_learning_rate, average, axis_name: see
        `scale_by_sasa_plus`.
      test: see `scale_by_sasa_plus`. Default ``EquivalenceTest()``, which has the
        authors' delta of 0.02 and significance of 0.2.
      window: see `scale_by_sasa_plus`. Default ``Window(leak_ratio=2)``: the newer half
        of the samples since the last drop, as the authors have it.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `MomentumState`. With
      ``average=True`` it is the pair of that and an `AverageState`. Its ``update``
      needs ``params``.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax, sasa_optax
      >>> optimizer = sasa_optax.sasa(1.0, momentum=0.9, weight_decay=5e-4)
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.ones(3), state, params)
      >>> print(optax.tree.get(state, "learning_rate"))
      1.0

    References:
      Lang, Zhang and Xiao, `Using statistics to automate stochastic optimization
      <https://arxiv.org/abs/1909.09785>`_, NeurIPS 2019.

      Yaida, `Fluctuation-dissipation relations for stochastic gradient descent
      <https://arxiv.org/abs/1810.00004>`_, ICLR 2019.
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
    test: TestName | StationarityTest | None = None,
    window: Window = Window(),
    average: bool = False,
    axis_name: AxisName = None,
) -> _types.Optimizer:
    """Scales another optimizer's updates down when its dynamics are stationary.

    Put it after any *complete* optimizer, as `optax.contrib.reduce_on_plateau`. It
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
      An `optax.GradientTransformationExtraArgs` whose state is a `ControllerState` with
      ``scale``, from 1.0 on, and no ``learning_rate``. With ``average=True`` it is the
      pair of that and an `AverageState`. Its ``update`` needs ``params``.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax, sasa_optax
      >>> optimizer = optax.chain(
      ...     optax.adamw(3e-4), sasa_optax.reduce_on_stationarity()
      ... )
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.ones(3), state, params)
      >>> print(optax.tree.get(state, "scale"))
      1.0

    References:
      Zhang, Lang, Liu and Xiao, `Statistical adaptive stochastic gradient methods
      <https://arxiv.org/abs/2002.10597>`_, 2020.
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

    def init(params: optax.Params) -> ControllerState:
        return controller.init(params)._replace(learning_rate=None)

    def update(
        updates: optax.Updates,
        state: ControllerState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        value: Numeric | None = None,
        **others: Any,
    ) -> tuple[optax.Updates, ControllerState]:
        direction = _tree.scale(-1.0, updates)
        extra = ExtraArgs(grad, value, 0.0, others)
        _, updates, state = controller.step(
            direction, state, _checks.params(params), extra
        )
        return updates, state._replace(learning_rate=None)

    optimizer = _types.transformation(init, update)
    return maybe_averaged(optimizer, average, window.leak_ratio)
