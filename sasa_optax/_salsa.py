"""SSLS and SALSA: no learning rate to choose.

Both are a line search in front of a controller:

  SSLS: the search alone. Nothing is tested, and it never ends.
  SALSA: the search until the loss stops falling, then SASA+.

See `Zhang et al., 2020 <https://arxiv.org/abs/2002.10597>`_.
"""

import jax

from sasa_optax._average import maybe_averaged
from sasa_optax._controller import Controller, as_transformation
from sasa_optax._line_search import LineSearch, searching
from sasa_optax._momentum import with_momentum
from sasa_optax._moved_keywords import names_moved_keywords
from sasa_optax._sasa import make_controller
from sasa_optax._stationarity import TestLike
from sasa_optax._statistics import StatisticLike, as_statistic
from sasa_optax._transformation import Optimizer
from sasa_optax._types import AxisName, Numeric
from sasa_optax._window import Window


@names_moved_keywords
def scale_by_ssls(
    learning_rate: float | jax.Array = 1e-3,
    *,
    steps_per_epoch: int | None = None,
    min_learning_rate: Numeric = 0.0,
    search: LineSearch = LineSearch(),
    axis_name: AxisName = None,
) -> Optimizer:
    r"""Applies a learning rate found by a smoothed stochastic line search.

    Put it last in a chain of directions, where `optax.scale_by_learning_rate` would be:
    it applies the rate and the minus sign. After ``optax.adam(lr)``, which has applied
    both, it goes up the gradient. At every step it looks for a step size that satisfies
    Armijo's condition on the mini-batch at hand, moves the rate a little way towards
    it, and makes the step with that rate. `LineSearch` has the equations.

    Args:
      learning_rate: where to start, a positive number or scalar array: small, as the
        rate then grows by up to ``gamma * (increase_factor - 1)``, 10 % a step. Default
        1e-3.
      steps_per_epoch: the number of steps in an epoch. It sets the smoothing, if
        ``search`` does not give it. Default None.
      min_learning_rate: the lower bound of the rate, in [0, inf). A smaller starting
        rate becomes the bound. Default 0.0.
      search: how to search. After `optax.scale_by_adam` and the like take
        ``LineSearch(direction="update")``. Default ``LineSearch()``.
      axis_name: as in `scale_by_sasa_plus`. The result of ``value_fn`` must then be the
        whole loss, the same on every device. Default None.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `LineSearchState`. Its
      ``update`` needs ``params`` and, as optax's line searches do,

      - ``value_fn``: a function from parameters to the loss of this mini-batch, a
        floating-point scalar. It receives the extra arguments of ``update`` that it
        takes by name. It must be deterministic: without dropout, and with batch norm in
        inference mode.
      - ``grad``: the gradient.
      - ``value``: f(x_k), which is evaluated if it is left out. Pass it only where the
        loss that was differentiated is exactly ``value_fn``, which is not so with
        dropout or batch norm.

      A trial whose loss is not finite fails. If f(x_k) is not finite, the rate is
      multiplied by ``decrease_factor``. If only the gradient is not, the rate stays.

    Raises:
      ValueError: if an argument is out of range, if ``params``, ``value_fn`` or
        ``grad`` is missing, or if a loss is not a floating-point scalar.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> loss = lambda x: jnp.sum(x**2)
      >>> search = sasa_optax.LineSearch(direction="update")
      >>> optimizer = optax.chain(
      ...     optax.scale_by_adam(), sasa_optax.scale_by_ssls(search=search)
      ... )
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> value, grads = jax.value_and_grad(loss)(params)
      >>> updates, state = optimizer.update(
      ...     grads, state, params, value=value, grad=grads, value_fn=loss
      ... )
      >>> print(optax.tree.get(state, "learning_rate").round(4))
      0.0011
    """
    controller = Controller(
        learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
        axis_name=axis_name,
    )
    return as_transformation(searching(controller, search, steps_per_epoch))


@names_moved_keywords
def ssls(
    learning_rate: float | jax.Array = 1e-3,
    momentum: Numeric = 0.9,
    nu: Numeric = 1.0,
    weight_decay: Numeric = 0.0,
    *,
    steps_per_epoch: int | None = None,
    min_learning_rate: Numeric = 0.0,
    search: LineSearch = LineSearch(),
    axis_name: AxisName = None,
) -> Optimizer:
    r"""SSLS: momentum SGD whose rate is found by a smoothed stochastic line search.

    Quasi-hyperbolic momentum (`scale_by_qhm`) makes the direction, `scale_by_ssls` the
    rate. The search continues to the end of the training, and the rate never settles.
    Use it to find a rate, and `salsa` to train.

    Args:
      weight_decay: coupled L2, :math:`\lambda` in [0, inf): this times the parameters
        is added to the gradients, and :math:`\tfrac{\lambda}{2}\|x\|^2` to the losses.
        Default 0.0.
      momentum, nu: see `qhm`.
      learning_rate, steps_per_epoch, min_learning_rate, search, axis_name: see
        `scale_by_ssls`. The rate is that of normalised momentum, as in `sasa_plus`.

    Returns:
      As `scale_by_ssls`, with a `MomentumState` around the `LineSearchState`. Its own
      updates serve as ``grad``.

    Raises:
      ValueError: as `scale_by_ssls`.

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
    """
    controller = Controller(
        learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
        axis_name=axis_name,
    )
    searched = searching(controller, search, steps_per_epoch)
    return with_momentum(searched, momentum, nu, weight_decay)


@names_moved_keywords
def scale_by_salsa(
    learning_rate: float | jax.Array = 1e-3,
    *,
    steps_per_epoch: int | None = None,
    factor: Numeric = 0.1,
    min_learning_rate: Numeric = 0.0,
    statistic: StatisticLike = "master",
    test: TestLike | None = None,
    window: Window = Window(),
    search: LineSearch = LineSearch(),
    average: bool = True,
    axis_name: AxisName = None,
) -> Optimizer:
    r"""Applies a learning rate that is first searched for, and then drops.

    Put it last in a chain of directions, where `optax.scale_by_learning_rate` would be.
    After ``optax.adam(lr)`` it goes up the gradient, as `scale_by_ssls` does. It starts
    as `scale_by_ssls`, and keeps the mini-batches' losses :math:`f(x_k)` in a
    window. Another window keeps the samples of `scale_by_sasa_plus`. The search ends
    for good when

    - the window keeps more than ``min_samples`` losses and a `SlopeTest`, run at every
      step, finds them no longer falling: the rate stays; or
    - the test of `scale_by_sasa_plus` fires: the rate drops.

    From then on it is `scale_by_sasa_plus`, and ``value_fn`` is not evaluated again.

    Args:
      steps_per_epoch: the number of steps in an epoch. It sets what ``window`` and
        ``search`` do not give. Default None.
      learning_rate, search: see `scale_by_ssls`.
      average: whether to keep an average of the iterates, as `average_iterates` over
        the newest 1/leak_ratio of them does, for `averaged_params`. Each iterate enters
        a step later than there, once its loss is known to be finite. Where the loss,
        the gradient or the sample is not finite, the parameters return to the average.
        All other updates do not change. Default True.
      factor, min_learning_rate, statistic, test, window, axis_name: see
        `scale_by_sasa_plus`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its state is the pair of a
      `LineSearchState` and an `AverageState`, or the first alone with
      ``average=False``. Its ``update`` takes what that of `scale_by_ssls` takes. Where
      the loss or the gradient is not finite, nothing is recorded. During the search the
      rate then moves as in `scale_by_ssls`; afterwards it stays.

      Gradients that are not finite spoil the state of most directions for good, and the
      parameters then stay at their average. Keep them out with
      ``optax.apply_if_finite(optax.scale_by_adam(), 100)``, and the training goes on.

    Raises:
      ValueError: as `scale_by_ssls`.

    Example:
      >>> import optax, sasa_optax
      >>> search = sasa_optax.LineSearch(direction="update")
      >>> optimizer = optax.chain(
      ...     optax.scale_by_adam(), sasa_optax.scale_by_salsa(search=search)
      ... )
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
    optimizer = as_transformation(searching(controller, search, steps_per_epoch))
    return maybe_averaged(
        optimizer, average, window.leak_ratio, lambda state: state.is_lost
    )


@names_moved_keywords
def salsa(
    learning_rate: float | jax.Array = 1e-3,
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
    search: LineSearch = LineSearch(),
    average: bool = True,
    axis_name: AxisName = None,
) -> Optimizer:
    r"""SALSA: momentum SGD with no learning rate to choose.

    Quasi-hyperbolic momentum (`scale_by_qhm`) makes the direction, `scale_by_salsa` the
    rate. From 1e-3 a line search finds it. Once the loss stops falling, the search
    ends. From then on the rate drops, and the momentum restarts, whenever a test finds
    that progress has stopped.

    Args:
      steps_per_epoch: see `scale_by_salsa`. It is the one argument worth giving.
      momentum, nu, weight_decay: see `ssls`. The named statistics take this momentum.
      learning_rate, factor, min_learning_rate, statistic, test: see `scale_by_salsa`.
        The rate is that of normalised momentum, as in `sasa_plus`.
      window, search, average, axis_name: see `scale_by_salsa`.

    Returns:
      As `scale_by_salsa`, with a `MomentumState` around the `LineSearchState`. Its own
      updates serve as ``grad``.

    Raises:
      ValueError: as `ssls`.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> def loss(x, target):
      ...     return jnp.sum((x - target) ** 2)
      >>> optimizer = sasa_optax.salsa(steps_per_epoch=100)
      >>> params, target = jnp.full(10, 5.0), jnp.zeros(10)
      >>> state = optimizer.init(params)
      >>> value, grads = jax.value_and_grad(loss)(params, target)
      >>> updates, state = optimizer.update(
      ...     grads, state, params, value=value, value_fn=loss, target=target
      ... )
      >>> bool(optax.tree.get(state, "line_search_active"))
      True
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
    searched = searching(controller, search, steps_per_epoch)
    optimizer = with_momentum(searched, momentum, nu, weight_decay)
    return maybe_averaged(
        optimizer, average, window.leak_ratio, lambda state: state.controller.is_lost
    )
