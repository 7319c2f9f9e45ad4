"""SSLS and SALSA: no learning rate to choose.

Both are a line search in front of a controller:

  SSLS: the search alone. Nothing is tested, and it never ends.
  SALSA: the search until the loss stops falling, then SASA+.
"""

from typing import Literal

import jax
import optax

from sasa_optax._controller import Controller
from sasa_optax._line_search import LineSearch
from sasa_optax._momentum import with_momentum
from sasa_optax._sasa import statistic_named, test_named
from sasa_optax._stationarity import SlopeTest, StationarityTest
from sasa_optax._statistics import Statistic


def scale_by_ssls(
    learning_rate: float | jax.Array = 1e-3,
    *,
    steps_per_epoch: int | None = None,
    smoothing: jax.typing.ArrayLike | None = None,
    sufficient_decrease: jax.typing.ArrayLike | None = None,
    increase_factor: jax.typing.ArrayLike = 2.0,
    decrease_factor: jax.typing.ArrayLike = 0.5,
    max_trials: jax.typing.ArrayLike = 2,
    search_direction: Literal["gradient", "update"] = "gradient",
    search_interval: jax.typing.ArrayLike = 1,
    max_learning_rate: jax.typing.ArrayLike | None = None,
    min_learning_rate: jax.typing.ArrayLike = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies a learning rate found by a smoothed stochastic line search.

    Last in a chain of directions, where `optax.scale_by_learning_rate` would be: it
    applies the rate and the minus sign. At every step, on the mini-batch at hand with
    loss f, it looks along a descent vector p for a step size :math:`\eta` that
    satisfies Armijo's condition,

    .. math::

      f(x_k - \eta p) \le f(x_k) - c\,\eta\,\langle g_k, p\rangle,

    from ``increase_factor`` times the rate down, by ``decrease_factor`` after each of
    at most ``max_trials`` failures. Where p is no direction of descent it takes
    ``decrease_factor`` times the rate. The rate moves a little way towards it,

    .. math::

      \alpha \leftarrow (1 - \gamma)\,\alpha + \gamma\,\eta,

    and the step is made with that: many mini-batches vote on it, and none decides.

    Args:
      learning_rate: where to start, a positive number or scalar array: small, as the
        rate then grows by up to ``gamma * (increase_factor - 1)``, 10 % a step. Default
        1e-3.
      steps_per_epoch: S sets ``smoothing``, where it is not given, to
        :math:`1/\sqrt{S}`.
      smoothing: gamma, in (0, 1]. Default 0.1, or by ``steps_per_epoch``.
      sufficient_decrease: c, in (0, 1); towards 0.5 the rates found are smaller.
        Default 0.05 along the gradient, as in the paper, and 0.45 along an update:
        Adam's fits the mini-batch so well that with 0.05 the rate runs away.
      increase_factor: in [1, inf). Default 2.0.
      decrease_factor: in (0, 1). Default 0.5.
      max_trials: evaluations of a trial point in a search, at least 1. Default 2.
      search_direction: p, ``"gradient"`` (default, as in the paper) or ``"update"``:
        the direction that arrives from the chain. After `optax.scale_by_adam` and the
        like take the latter, since the scale of the gradient says nothing about the
        update's.
      search_interval: steps between searches, at least 1; gamma is compounded to
        :math:`1 - (1 - \gamma)^m`. Default 1.
      max_learning_rate: the search goes no higher. Default None: without a bound.
      min_learning_rate: nor lower than this, in [0, inf), unless it started there.
        Default 0.0.
      axis_name: as in `scale_by_sasa_plus`; the result of ``value_fn`` must be the
        whole loss there, the same on every device. Default None.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `ControllerState` with
      a `LineSearchState` in it. Its ``update`` needs ``params`` and, as optax's line
      searches do,

      - ``value_fn``: a function from parameters to the loss of this mini-batch, a
        floating-point scalar. Extra arguments of ``update`` that it takes by name are
        passed on to it. It must be deterministic, so without dropout, and with batch
        norm in inference mode.
      - ``grad``: the gradient.
      - ``value``: f(x_k), which is evaluated if it is left out. Pass it where the loss
        that was differentiated is exactly ``value_fn``; with dropout or batch norm it
        is not.

      A trial whose loss is not finite fails. If f(x_k) or the gradient is not finite,
      the rate stays.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params``, ``value_fn`` or ``grad`` is missing, or a loss is not a
        floating-point scalar.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> loss = lambda x: jnp.sum((x - 3.0) ** 2)
      >>> optimizer = optax.chain(
      ...     optax.scale_by_adam(),
      ...     sasa_optax.scale_by_ssls(search_direction="update"),
      ... )
      >>> @jax.jit
      ... def step(params, state):
      ...     value, grads = jax.value_and_grad(loss)(params)
      ...     updates, state = optimizer.update(
      ...         grads, state, params, value=value, grad=grads, value_fn=loss
      ...     )
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.zeros(2)
      >>> state = optimizer.init(params)
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> print(params.round(2))
      [3. 3.]

    References:
      Zhang, Lang, Liu and Xiao, `Statistical adaptive stochastic gradient methods
      <https://arxiv.org/abs/2002.10597>`_, 2020.
    """
    controller = Controller(
        learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
        axis_name=axis_name,
    )
    return LineSearch(
        controller=controller,
        loss_test=None,
        steps_per_epoch=steps_per_epoch,
        smoothing=smoothing,
        sufficient_decrease=sufficient_decrease,
        increase_factor=increase_factor,
        decrease_factor=decrease_factor,
        max_trials=max_trials,
        search_direction=search_direction,
        search_interval=search_interval,
        max_learning_rate=max_learning_rate,
    ).transformation()


def ssls(
    learning_rate: float | jax.Array = 1e-3,
    momentum: jax.typing.ArrayLike = 0.9,
    nu: jax.typing.ArrayLike = 1.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    *,
    steps_per_epoch: int | None = None,
    smoothing: jax.typing.ArrayLike | None = None,
    sufficient_decrease: jax.typing.ArrayLike | None = None,
    increase_factor: jax.typing.ArrayLike = 2.0,
    decrease_factor: jax.typing.ArrayLike = 0.5,
    max_trials: jax.typing.ArrayLike = 2,
    search_direction: Literal["gradient", "update"] = "gradient",
    search_interval: jax.typing.ArrayLike = 1,
    max_learning_rate: jax.typing.ArrayLike | None = None,
    min_learning_rate: jax.typing.ArrayLike = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SSLS: momentum SGD whose rate is found by a smoothed stochastic line search.

    Quasi-hyperbolic momentum (`scale_by_qhm`) makes the direction, `scale_by_ssls` the
    rate. The search goes on to the end of the training and the rate never settles; use
    it to find a rate, and `salsa` to train.

    **The rate** is that of normalised momentum: 1.0 with ``momentum=0.9`` moves like
    ``optax.sgd(0.1, momentum=0.9)``.

    Args:
      learning_rate: where to start, a positive number or scalar array. Default 1e-3.
      momentum: beta, in [0, 1). Default 0.9.
      nu: the weight of the average, in [0, 1]; 1 is normalised momentum, 0 plain SGD,
        ``momentum`` Nesterov's. Default 1.0.
      weight_decay: coupled L2, :math:`\lambda` in [0, inf): this times the parameters
        is added to the gradients, and :math:`\tfrac{\lambda}{2}\|x\|^2` to the losses.
        Default 0.0.
      steps_per_epoch: see `scale_by_ssls`, as for all that follow.
      smoothing: default 0.1, or by ``steps_per_epoch``.
      sufficient_decrease: default 0.05, and 0.45 for ``"update"``.
      increase_factor: default 2.0.
      decrease_factor: default 0.5.
      max_trials: default 2.
      search_direction: default ``"gradient"``, with coupled weight decay; after
        clipping, the clipped one.
      search_interval: default 1.
      max_learning_rate: default None, without a bound.
      min_learning_rate: default 0.0.
      axis_name: default None.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `SasaState`. Its
      ``update`` needs ``params`` and ``value_fn``, and takes ``value``: see
      `scale_by_ssls`. It takes its own updates for the gradient.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` or ``value_fn`` is missing, or a loss is not a floating-point scalar.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> def loss(x, target):
      ...     return jnp.sum((x - target) ** 2)
      >>> optimizer = sasa_optax.ssls()
      >>> @jax.jit
      ... def step(params, state, key):
      ...     target = 3.0 + 0.1 * jax.random.normal(key, (2,))
      ...     value, grads = jax.value_and_grad(loss)(params, target)
      ...     updates, state = optimizer.update(
      ...         grads, state, params, value=value, value_fn=loss, target=target
      ...     )
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.zeros(2)
      >>> state = optimizer.init(params)
      >>> for key in jax.random.split(jax.random.key(0), 200):
      ...     params, state = step(params, state, key)
      >>> bool(0.1 < optax.tree.get(state, "learning_rate") < 1.0)
      True

    References:
      Zhang, Lang, Liu and Xiao, `Statistical adaptive stochastic gradient methods
      <https://arxiv.org/abs/2002.10597>`_, 2020.
    """
    search = scale_by_ssls(
        learning_rate,
        steps_per_epoch=steps_per_epoch,
        smoothing=smoothing,
        sufficient_decrease=sufficient_decrease,
        increase_factor=increase_factor,
        decrease_factor=decrease_factor,
        max_trials=max_trials,
        search_direction=search_direction,
        search_interval=search_interval,
        max_learning_rate=max_learning_rate,
        min_learning_rate=min_learning_rate,
        axis_name=axis_name,
    )
    return with_momentum(search, momentum, nu, weight_decay)


def scale_by_salsa(
    learning_rate: float | jax.Array = 1e-3,
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
    average: bool = True,
    smoothing: jax.typing.ArrayLike | None = None,
    sufficient_decrease: jax.typing.ArrayLike | None = None,
    increase_factor: jax.typing.ArrayLike = 2.0,
    decrease_factor: jax.typing.ArrayLike = 0.5,
    max_trials: jax.typing.ArrayLike = 2,
    search_direction: Literal["gradient", "update"] = "gradient",
    search_interval: jax.typing.ArrayLike = 1,
    max_learning_rate: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies a learning rate that is first searched for, and then drops.

    Last in a chain of directions, where `optax.scale_by_learning_rate` would be. It
    starts as `scale_by_ssls`, and keeps the losses :math:`f(x_k)` of the mini-batches
    in a window, while the samples of `scale_by_sasa_plus` go to another. The search
    ends for good when

    - more than ``min_samples`` losses are kept and `SlopeTest`, run at every step,
      finds them no longer falling: the rate stays; or
    - the test of `scale_by_sasa_plus` fires: the rate drops.

    From then on it is `scale_by_sasa_plus`, and ``value_fn`` is not evaluated any more.

    Args:
      learning_rate: where to start, a positive number or scalar array. Default 1e-3.
      steps_per_epoch: sets ``min_samples``, ``test_interval`` and ``smoothing``, where
        they are not given; see `scale_by_sasa_plus` and `scale_by_ssls`.
      factor: see `scale_by_sasa_plus`, as for all that follow. Default 0.1.
      test: default ``"zero_mean"``, and ``"equivalence"`` for ``"centred"``.
      statistic: default ``"master"``.
      significance: also of the slope test. Default 0.05; 0.2 for ``"equivalence"``.
      delta: default 0.3 for ``"equivalence"``, 0.35 with ``"centred"``, None for
        ``"zero_mean"``.
      variance: default ``"batch_means"``.
      leak_ratio: default 8.
      min_samples: default 1000.
      test_interval: default 100.
      warmup_steps: default 0.
      max_window: default 16384.
      min_learning_rate: default 0.0.
      smoothing: see `scale_by_ssls`, as for all that follow. Default 0.1, or by
        ``steps_per_epoch``.
      sufficient_decrease: default 0.05, and 0.45 for ``"update"``.
      increase_factor: default 2.0.
      decrease_factor: default 0.5.
      max_trials: default 2.
      search_direction: default ``"gradient"``.
      search_interval: default 1. Between searches a loss is recorded if ``value`` is
        given; if not, each loss recorded counts for this many.
      max_learning_rate: default None, without a bound.
      scale_min_samples: default False.
      axis_name: default None.
      average: default True.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `ControllerState` with
      a `LineSearchState` in it. Its ``update`` needs ``params``, ``value_fn`` and
      ``grad``, and takes ``value``: see `scale_by_ssls`. Where the loss or the gradient
      is not finite nothing is recorded, and the rate stays.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params``, ``value_fn`` or ``grad`` is missing, or a loss is not a
        floating-point scalar.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> optimizer = optax.chain(
      ...     optax.scale_by_adam(),
      ...     sasa_optax.scale_by_salsa(search_direction="update"),
      ... )
      >>> loss = lambda x: jnp.sum(x**2)
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> value, grads = jax.value_and_grad(loss)(params)
      >>> updates, state = optimizer.update(
      ...     grads, state, params, value=value, grad=grads, value_fn=loss
      ... )
      >>> print(optax.tree.get(state, "learning_rate").round(4))
      0.0011

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
    return LineSearch(
        controller=controller,
        loss_test=SlopeTest(0.05 if significance is None else significance),
        steps_per_epoch=steps_per_epoch,
        smoothing=smoothing,
        sufficient_decrease=sufficient_decrease,
        increase_factor=increase_factor,
        decrease_factor=decrease_factor,
        max_trials=max_trials,
        search_direction=search_direction,
        search_interval=search_interval,
        max_learning_rate=max_learning_rate,
    ).transformation()


def salsa(
    learning_rate: float | jax.Array = 1e-3,
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
    average: bool = True,
    smoothing: jax.typing.ArrayLike | None = None,
    sufficient_decrease: jax.typing.ArrayLike | None = None,
    increase_factor: jax.typing.ArrayLike = 2.0,
    decrease_factor: jax.typing.ArrayLike = 0.5,
    max_trials: jax.typing.ArrayLike = 2,
    search_direction: Literal["gradient", "update"] = "gradient",
    search_interval: jax.typing.ArrayLike = 1,
    max_learning_rate: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SALSA: momentum SGD with no learning rate to choose.

    Quasi-hyperbolic momentum (`scale_by_qhm`) makes the direction, `scale_by_salsa` the
    rate: from 1e-3 a line search finds it; once the loss stops falling the search ends,
    and from then on the rate drops, and the momentum starts afresh, whenever a test
    finds that progress has stopped.

    **The rate** is that of normalised momentum: 1.0 with ``momentum=0.9`` moves like
    ``optax.sgd(0.1, momentum=0.9)``.

    Args:
      learning_rate: where to start, a positive number or scalar array. Default 1e-3.
      momentum: beta, in [0, 1). Default 0.9.
      nu: the weight of the average, in [0, 1]; 1 is normalised momentum, 0 plain SGD,
        ``momentum`` Nesterov's. Default 1.0.
      weight_decay: coupled L2, :math:`\lambda` in [0, inf): this times the parameters
        is added to the gradients, and :math:`\tfrac{\lambda}{2}\|x\|^2` to the losses.
        Default 0.0.
      steps_per_epoch: see `scale_by_salsa`, as for all that follow. The one argument
        worth giving.
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
      smoothing: default 0.1, or by ``steps_per_epoch``.
      sufficient_decrease: default 0.05, and 0.45 for ``"update"``.
      increase_factor: default 2.0.
      decrease_factor: default 0.5.
      max_trials: default 2.
      search_direction: default ``"gradient"``, with coupled weight decay; after
        clipping, the clipped one.
      search_interval: default 1.
      max_learning_rate: default None, without a bound.
      scale_min_samples: default False.
      axis_name: default None.
      average: default True.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `SasaState`. Its
      ``update`` needs ``params`` and ``value_fn``, and takes ``value``: see
      `scale_by_ssls`. It takes its own updates for the gradient.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` or ``value_fn`` is missing, or a loss is not a floating-point scalar.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> def loss(x, target):
      ...     return jnp.sum((x - target) ** 2)
      >>> optimizer = sasa_optax.salsa(steps_per_epoch=100, leak_ratio=4)
      >>> @jax.jit
      ... def step(params, state, key):
      ...     target = jax.random.normal(key, params.shape)
      ...     value, grads = jax.value_and_grad(loss)(params, target)
      ...     updates, state = optimizer.update(
      ...         grads, state, params, value=value, value_fn=loss, target=target
      ...     )
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.full(10, 5.0)
      >>> state = optimizer.init(params)
      >>> for key in jax.random.split(jax.random.key(0), 1000):
      ...     params, state = step(params, state, key)
      >>> bool(optax.tree.get(state, "line_search_active"))
      False

    References:
      Zhang, Lang, Liu and Xiao, `Statistical adaptive stochastic gradient methods
      <https://arxiv.org/abs/2002.10597>`_, 2020.
    """
    search = scale_by_salsa(
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
        smoothing=smoothing,
        sufficient_decrease=sufficient_decrease,
        increase_factor=increase_factor,
        decrease_factor=decrease_factor,
        max_trials=max_trials,
        search_direction=search_direction,
        search_interval=search_interval,
        max_learning_rate=max_learning_rate,
    )
    return with_momentum(search, momentum, nu, weight_decay)
