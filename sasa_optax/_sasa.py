"""SASA and SASA+: the optimizers, and the forms to put into a chain.

Each is a controller given two parts, and driven by a third:

  SASA+: `master_statistic`, `ZeroMeanTest`, quasi-hyperbolic momentum.
  SASA: `yaida_statistic`, `EquivalenceTest`, normalised momentum.
"""

from typing import Any, Literal

import jax
import optax

from sasa_optax import _checks, _tree, _types
from sasa_optax._controller import Controller, ControllerState
from sasa_optax._momentum import with_momentum
from sasa_optax._stationarity import (
    EquivalenceTest,
    StationarityTest,
    ZeroMeanTest,
)
from sasa_optax._statistics import (
    Statistic,
    centred_statistic,
    master_statistic,
    yaida_statistic,
)

# Of the equivalence test. For momentum 0.9 the first is about as strict as SASA's 0.02
# is on its own statistic; the second is chosen by docs/validity.md.
_DELTA, _DELTA_OF_CENTRED = 0.3, 0.35


def statistic_named(
    statistic: Literal["master", "centred"] | Statistic,
    momentum: jax.typing.ArrayLike = 0.9,
    nu: jax.typing.ArrayLike = 1.0,
) -> Statistic:
    if callable(statistic):
        return statistic
    names = "'master', 'centred'"
    if statistic not in ("master", "centred"):
        raise ValueError(
            f"statistic must be {names}, or a function from Transition to Sample, got "
            f"{statistic!r}."
        )
    if statistic == "centred":
        return centred_statistic(momentum, nu)
    return master_statistic


def test_named(
    test: Literal["zero_mean", "equivalence"] | StationarityTest | None,
    statistic: Statistic,
    significance: jax.typing.ArrayLike | None,
    delta: jax.typing.ArrayLike | None,
    variance: str,
) -> StationarityTest:
    if callable(test):
        for name, value in (("significance", significance), ("delta", delta)):
            if value is not None:
                raise ValueError(
                    f"{name} is for a test chosen by name, got {value!r} together with "
                    f"{test!r}: give it to that test."
                )
        return test
    is_centred = getattr(statistic, "uses_centre", False)
    if test is None:
        test = "equivalence" if is_centred else "zero_mean"
    _checks.choice("test", test, ("zero_mean", "equivalence"))
    if test == "equivalence":
        default = _DELTA_OF_CENTRED if is_centred else _DELTA
        return EquivalenceTest(
            delta=default if delta is None else delta,
            significance=0.2 if significance is None else significance,
            variance=variance,
        )
    return ZeroMeanTest(
        significance=0.05 if significance is None else significance,
        variance=variance,
        delta=delta,
    )


def scale_by_sasa_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    steps_per_epoch: int | None = None,
    factor: jax.typing.ArrayLike = 0.1,
    test: Literal["zero_mean", "equivalence"] | StationarityTest | None = None,
    statistic: Literal["master", "centred"] | Statistic = "master",
    significance: jax.typing.ArrayLike | None = None,
    delta: jax.typing.ArrayLike | None = None,
    variance: str = "batch_means",
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
    r"""Applies a learning rate that drops when the dynamics are stationary.

    Last in a chain of directions, where `optax.scale_by_learning_rate` would be: it
    applies the rate and the minus sign. At every step it records

    .. math::

      \Delta_k = \langle x_{k+1}, d_k\rangle + \tfrac{\alpha}{2}\|d_k\|^2
               = -\frac{\|x_{k+1}\|^2 - \|x_k\|^2}{2\alpha},

    whose mean is zero under any stationary dynamics, whatever made the direction
    :math:`d_k`. It keeps the newest ``ceil(total / leak_ratio)`` of the ``total``
    samples since the last drop; every ``test_interval`` steps, once more than
    ``min_samples`` are kept, a test asks whether their mean is zero. If so, the rate is
    multiplied by ``factor`` and the window emptied.

    Momentum inside the chain lives on through a drop; `sasa_plus` restarts its own.

    Args:
      learning_rate: a positive number, a scalar array, or an optax schedule, such as a
        warm-up, which the drops then scale. Its meaning is that of the directions it
        multiplies: after `scale_by_qhm`, that of *normalised* momentum, where 1.0 with
        ``momentum=0.9`` moves like ``optax.sgd(0.1, momentum=0.9)``.
      steps_per_epoch: sets ``min_samples`` and ``test_interval``, where they are not
        given, to one epoch, but at least 100 (fewer samples say nothing) and at most
        1000.
      factor: what a drop multiplies the rate by, in (0, 1). Default 0.1.
      test: ``"zero_mean"`` (`ZeroMeanTest`, the default), ``"equivalence"``
        (`EquivalenceTest`, the default for ``"centred"``), or a function from `Samples`
        to `TestResult`.
      statistic: ``"master"`` (`master_statistic`, the default), ``"centred"``
        (`centred_statistic`, which does not care where the optimum lies, for a copy of
        the parameters), or a function from `Transition` to `Sample`.
      significance: of the test, in (0, 1). Default 0.05 for ``"zero_mean"``, 0.2 for
        ``"equivalence"``.
      delta: in (0, inf). For ``"equivalence"`` its tolerance, by default 0.3, which for
        momentum 0.9 is about as strict as SASA's 0.02 on its own statistic, and 0.35
        with ``statistic="centred"``. For ``"zero_mean"`` how wide an interval may be,
        by default None, for any width; with 5 a window too short to see the dynamics
        makes no drop (see docs/validity.md, and what it costs).
      variance: ``"iid"``, ``"batch_means"`` (default) or
        ``"overlapping_batch_means"``; see `estimate_mean`. Not used by a test of yours.
      leak_ratio: the window keeps the newest 1/leak_ratio of the samples since the last
        drop, an integer of at least 1. Default 8.
      min_samples: no test before more than this many samples are kept, at least 4.
        Default 1000, or by ``steps_per_epoch``.
      test_interval: steps between tests, at least 1. Default 100, or by
        ``steps_per_epoch``.
      warmup_steps: no drop in this many first steps. Default 0.
      max_window: the capacity of the window, more than ``min_samples``, at 4 bytes a
        sample, 8 for the equivalence test. Default 16384.
      min_learning_rate: the rate never drops below this, in [0, inf). At it, the test
        goes on, and fires without effect. Default 0.0.
      scale_min_samples: after each drop ``min_samples`` grows by 1/factor, up to what
        ``max_window`` can hold: at a rate ten times smaller the dynamics need ten times
        the steps to become stationary. It keeps the rate of a long run from going to
        nothing. Default False, as in the papers.
      axis_name: inside `jax.shard_map`, the mesh axis, or a tuple of them, over which
        the parameters are sharded: the statistic is then summed over it, by one
        all-reduce. Not needed under jit, nor where parameters are replicated. Default
        None.
      average: keep an average over the newest 1/leak_ratio of all iterates, as
        `average_iterates` does and through all drops, for `averaged_params`. The
        updates do not change. Default False.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `ControllerState`. Its
      ``update`` needs ``params``; it takes the extra arguments ``grad`` and ``value``
      for the statistic, and ignores all others. Updates keep their dtypes; the
      statistics are float32, or float64 where a parameter is. A sample that is not
      finite is counted in ``num_nonfinite``, not recorded, and triggers nothing.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` is missing.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     optax.scale_by_adam(),
      ...     sasa_optax.scale_by_sasa_plus(1e-3, min_samples=100),
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
    statistic = statistic_named(statistic)
    controller = Controller(
        learning_rate=learning_rate,
        statistic=statistic,
        test=test_named(test, statistic, significance, delta, variance),
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
    return controller.transformation()


def sasa_plus(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    nu: jax.typing.ArrayLike = 1.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    steps_per_epoch: int | None = None,
    factor: jax.typing.ArrayLike = 0.1,
    test: Literal["zero_mean", "equivalence"] | StationarityTest | None = None,
    statistic: Literal["master", "centred"] | Statistic = "master",
    significance: jax.typing.ArrayLike | None = None,
    delta: jax.typing.ArrayLike | None = None,
    variance: str = "batch_means",
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
    r"""SASA+: momentum SGD that cuts its learning rate when progress has stopped.

    Quasi-hyperbolic momentum (`scale_by_qhm`) makes the direction; the rate drops by
    the test of `scale_by_sasa_plus`, and at a drop the momentum starts afresh.

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
      steps_per_epoch: see `scale_by_sasa_plus`, as for all that follow.
      factor: default 0.1.
      test: default ``"zero_mean"``, and ``"equivalence"`` for ``"centred"``.
      statistic: default ``"master"``.
      significance: default 0.05; 0.2 for ``"equivalence"``.
      delta: default 0.3 for ``"equivalence"``, 0.35 with ``"centred"``, None for
        ``"zero_mean"``.
      variance: default ``"batch_means"``.
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
      ``update`` needs ``params``.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` is missing.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> def loss(x, key):
      ...     return jnp.sum((x - jax.random.normal(key, x.shape)) ** 2)
      >>> optimizer = sasa_optax.sasa_plus(0.5, min_samples=50, leak_ratio=4)
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
    controller = scale_by_sasa_plus(
        learning_rate,
        steps_per_epoch=steps_per_epoch,
        factor=factor,
        test=test,
        statistic=statistic_named(statistic, momentum, nu),
        significance=significance,
        delta=delta,
        variance=variance,
        leak_ratio=leak_ratio,
        min_samples=min_samples,
        test_interval=test_interval,
        warmup_steps=warmup_steps,
        max_window=max_window,
        min_learning_rate=min_learning_rate,
        scale_min_samples=scale_min_samples,
        axis_name=axis_name,
        average=average,
    )
    return with_momentum(controller, momentum, nu, weight_decay)


def sasa(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    steps_per_epoch: int | None = None,
    factor: jax.typing.ArrayLike = 0.1,
    significance: jax.typing.ArrayLike = 0.2,
    delta: jax.typing.ArrayLike = 0.02,
    variance: str = "batch_means",
    leak_ratio: jax.typing.ArrayLike = 2,
    min_samples: jax.typing.ArrayLike | None = None,
    test_interval: jax.typing.ArrayLike | None = None,
    warmup_steps: jax.typing.ArrayLike = 0,
    max_window: int = 16384,
    min_learning_rate: jax.typing.ArrayLike = 0.0,
    scale_min_samples: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    average: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""SASA: momentum SGD whose rate drops on positive evidence of stationarity.

    Normalised momentum makes the direction :math:`d_k`; at every step it records

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
      learning_rate: a positive number, a scalar array, or an optax schedule, such as a
        warm-up, which the drops then scale.
      momentum: beta, in [0, 1). Default 0.9.
      weight_decay: coupled L2: this times the parameters is added to the gradients, in
        [0, inf). Default 0.0.
      significance: of the test, in (0, 1). Default 0.2.
      delta: its tolerance, in (0, inf). Default 0.02.
      leak_ratio: default 2: the newer half of the samples since the last drop.
      max_window: default 16384, at 8 bytes a sample.
      steps_per_epoch: see `scale_by_sasa_plus`, as for all that follow.
      factor: default 0.1.
      variance: default ``"batch_means"``.
      min_samples: default 1000.
      test_interval: default 100.
      warmup_steps: default 0.
      min_learning_rate: default 0.0.
      scale_min_samples: default False.
      axis_name: default None.
      average: default False.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `SasaState`; its
      ``update`` needs ``params``.

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
    controller = Controller(
        learning_rate=learning_rate,
        statistic=yaida_statistic(momentum, weight_decay),
        test=EquivalenceTest(delta, significance, variance),
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
    return with_momentum(controller.transformation(), momentum, 1.0, weight_decay)


def reduce_on_stationarity(
    *,
    steps_per_epoch: int | None = None,
    factor: jax.typing.ArrayLike = 0.1,
    test: Literal["zero_mean", "equivalence"] | StationarityTest | None = None,
    statistic: Literal["master", "centred"] | Statistic = "master",
    significance: jax.typing.ArrayLike | None = None,
    delta: jax.typing.ArrayLike | None = None,
    variance: str = "batch_means",
    leak_ratio: jax.typing.ArrayLike = 8,
    min_samples: jax.typing.ArrayLike | None = None,
    test_interval: jax.typing.ArrayLike | None = None,
    warmup_steps: jax.typing.ArrayLike = 0,
    max_window: int = 16384,
    min_scale: jax.typing.ArrayLike = 0.0,
    scale_min_samples: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    average: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scales another optimizer's updates down when its dynamics are stationary.

    Placed after any *complete* optimizer, as `optax.contrib.reduce_on_plateau` is, but
    needing no loss: it judges by the statistic of `scale_by_sasa_plus`, with minus the
    updates as the direction and the scale as the rate. It does not matter what made the
    updates: momentum, Adam, clipping, decoupled weight decay. A schedule in the other
    optimizer is fine while it warms up; one that decays to the end keeps the dynamics
    from ever being stationary, and leaves nothing to reduce.

    Args:
      steps_per_epoch: see `scale_by_sasa_plus`, as for all that follow.
      factor: what a drop multiplies the scale by, in (0, 1). Default 0.1.
      test: default ``"zero_mean"``, and ``"equivalence"`` for ``"centred"``.
      statistic: default ``"master"``.
      significance: default 0.05; 0.2 for ``"equivalence"``.
      delta: default 0.3 for ``"equivalence"``, 0.35 with ``"centred"``, None for
        ``"zero_mean"``.
      variance: default ``"batch_means"``.
      leak_ratio: default 8.
      min_samples: default 1000.
      test_interval: default 100.
      warmup_steps: default 0.
      max_window: default 16384.
      min_scale: the scale never drops below this, in [0, 1]. Default 0.0.
      scale_min_samples: default False.
      axis_name: default None.
      average: default False.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `ControllerState` with
      ``scale``, from 1.0 on, and no ``learning_rate``. Its ``update`` needs ``params``.

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
    controller: Any = scale_by_sasa_plus(
        1.0,
        steps_per_epoch=steps_per_epoch,
        factor=factor,
        test=test,
        statistic=statistic,
        significance=significance,
        delta=delta,
        variance=variance,
        leak_ratio=leak_ratio,
        min_samples=min_samples,
        test_interval=test_interval,
        warmup_steps=warmup_steps,
        max_window=max_window,
        min_learning_rate=min_scale,
        scale_min_samples=scale_min_samples,
        axis_name=axis_name,
        average=average,
    )

    def init(params: optax.Params) -> ControllerState:
        return controller.init(params)._replace(learning_rate=None)

    def update(
        updates: optax.Updates,
        state: ControllerState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ControllerState]:
        direction = _tree.scale(-1.0, updates)
        updates, state = controller.update(direction, state, params, **extra_args)
        return updates, state._replace(learning_rate=None)

    return _types.transformation(init, update)
