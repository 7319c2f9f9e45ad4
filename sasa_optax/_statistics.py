"""Statistics: what is recorded at each step, with mean zero at stationarity.

A `Statistic` is a triple of functions, which may keep a state of its own. A plain
function from `Transition` to `Sample` is a statistic as well.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _average, _checks, _decay, _products
from sasa_optax._stationarity import EquivalenceTest
from sasa_optax._types import AxisName, Numeric

# A centre over less than the newest half of the iterates would follow the drift that it
# is meant to show.
_CENTRE_LEAK_RATIO = 2
# With 3, nothing counts as stationary until the lag is below a third of the noise, when
# the horizon of the centre is three relaxation times.
_LAG_PENALTY = 3.0


class Transition(NamedTuple):
    """One step of the optimizer, x_{k+1} = x_k - learning_rate * direction.

    Attributes:
      params: x_k, the parameters before the step. Reading them makes XLA copy every
        parameter before its update in place; prefer ``new_params``.
      new_params: x_{k+1}, the parameters after the step.
      direction: d_k, before the learning rate and the minus sign.
      grad: the gradient without coupled weight decay. Where the transformation is
        chained after others, it is the extra argument ``grad``, or ``direction`` if
        there is none.
      learning_rate: the rate of this step, shape (), in the dtype of statistics:
        float64 if a parameter is double precision, else float32.
      value: the extra argument ``value`` of ``update`` (the loss), or None.
      axis_name: the mesh axes over which the trees are sharded inside `jax.shard_map`.
        The methods here sum over them.
    """

    params: optax.Params
    new_params: optax.Params
    direction: optax.Updates
    grad: optax.Updates
    learning_rate: jax.Array
    value: Numeric | None
    axis_name: AxisName = None

    def inner_products(self, *pairs: _products.Pair) -> list[jax.Array]:
        """`inner_product` of each pair, in one collective where one is needed."""
        return _products.inner_products(pairs, self.learning_rate.dtype, self.axis_name)

    def inner_product(self, x: optax.Params, y: optax.Params) -> jax.Array:
        """The real part of <x, y>, summed over all leaves in the statistic's dtype."""
        return self.inner_products((x, y))[0]

    def squared_norm(self, x: optax.Params) -> jax.Array:
        """||x||^2, summed over all leaves in the statistic's dtype."""
        return self.inner_product(x, x)


class Sample(NamedTuple):
    """What a statistic records of one step.

    Attributes:
      value: the number that a test judges, shape ().
      scale: the yardstick, shape (). The mean of ``value`` is negligible when it is
        small beside the mean of ``scale``. In this library the yardstick estimates the
        gradient's noise, v_k = (alpha/2) D ||d_k||^2. The dissipation D is
        (1 + beta)/(1 - beta) for normalised momentum, and 1 for none. Default 1.0.
    """

    value: Numeric
    scale: Numeric = 1.0


class Statistic(NamedTuple):
    """A statistic with a state, as three functions.

    Attributes:
      init: maps the parameters to the initial state, a tree of arrays, each a buffer of
        its own; ``()`` where there is none.
      pairs: maps a `Transition` and the state to the pairs of trees whose inner
        products are wanted. Leaves of each pair must correspond. On a CPU it is called
        with a few leaves at a time: other leaves are None there, in the transition and
        in each part of the state with the structure of the parameters.
      sample: maps these products (scalars in the statistic's dtype), a `Transition` and
        the state to a `Sample` and the next state. It must keep numbers that are not
        finite out of the state.
      test: the test that the statistic is meant for: a name, an object or a function.
        Default "zero_mean".

    Example:
      The squared length of the step, which needs one product and no state.

      >>> import sasa_optax
      >>> squared_length = sasa_optax.Statistic(
      ...     init=lambda params: (),
      ...     pairs=lambda t, state: [(t.direction, t.direction)],
      ...     sample=lambda products, t, state: (
      ...         sasa_optax.Sample(t.learning_rate**2 * products[0]), state
      ...     ),
      ...     test=sasa_optax.SlopeTest(),
      ... )
      >>> optimizer = sasa_optax.sasa_plus(1.0, statistic=squared_length)
    """

    init: Callable[[optax.Params], Any]
    pairs: Callable[[Transition, Any], _products.Pairs]
    sample: Callable[[list[jax.Array], Transition, Any], tuple[Sample, Any]]
    test: Any = "zero_mean"


StatisticLike = (
    Literal["master", "centred"] | Statistic | Callable[[Transition], Sample]
)


def as_statistic(
    statistic: StatisticLike, momentum: Numeric = 0.9, nu: Numeric = 1.0
) -> Statistic:
    """The statistic that was named or given, for a direction of this momentum."""
    if isinstance(statistic, Statistic):
        return statistic
    if callable(statistic):
        return _stateless(lambda t: [], lambda products, t: statistic(t))
    makers = {"master": master_statistic, "centred": centred_statistic}
    others = (
        "a Statistic or a function from Transition (named in static_args under "
        "optax.inject_hyperparams)"
    )
    _checks.choice("statistic", statistic, makers, others)
    return makers[statistic](momentum, nu)


def _stateless(
    pairs: Callable[[Transition], _products.Pairs],
    sample: Callable[[list[jax.Array], Transition], Sample],
    test: str = "zero_mean",
) -> Statistic:
    return Statistic(
        init=lambda params: (),
        pairs=lambda t, state: pairs(t),
        sample=lambda products, t, state: (sample(products, t), state),
        test=test,
    )


def dissipation(momentum: Numeric, nu: Numeric) -> Numeric:
    """D, the variance of white gradients over that of QHM's direction."""
    b = momentum
    variance = (1 - nu) ** 2 + 2 * nu * (1 - nu) * (1 - b) + nu**2 * (1 - b) / (1 + b)
    return 1 / variance


def _noise(
    momentum: Numeric, nu: Numeric, t: Transition, d_dot_d: jax.Array
) -> jax.Array:
    """The yardstick v_k = (alpha/2) D ||d_k||^2."""
    factor = jnp.asarray(dissipation(momentum, nu), d_dot_d.dtype)
    return factor * (t.learning_rate / 2 * d_dot_d)


def master_statistic(momentum: Numeric = 0.9, nu: Numeric = 1.0) -> Statistic:
    """The statistic of SASA+, whose mean is zero under any stationary dynamics.

    Delta_k = <x_{k+1}, d_k> + (alpha/2) ||d_k||^2, which is
    -(||x_{k+1}||^2 - ||x_k||^2) / (2 alpha) whatever made the direction d_k. Its scale
    is v_k = (alpha/2) D ||d_k||^2; see `Sample`. Only the scale depends on the
    arguments.

    Args:
      momentum: beta of the direction, in [0, 1). Default 0.9, for Adam as well.
      nu: as in `scale_by_qhm`, in [0, 1]. Default 1.0.

    Raises:
      ValueError: if an argument is out of range.
    """
    _checks.momentum(momentum, nu)

    def pairs(t: Transition) -> _products.Pairs:
        return [(t.new_params, t.direction), (t.direction, t.direction)]

    def sample(products: list[jax.Array], t: Transition) -> Sample:
        x_dot_d, d_dot_d = products
        value = x_dot_d + t.learning_rate / 2 * d_dot_d
        return Sample(value, _noise(momentum, nu, t, d_dot_d))

    return _stateless(pairs, sample)


def yaida_statistic(momentum: Numeric = 0.9, weight_decay: Numeric = 0.0) -> Statistic:
    """The statistic of SASA, mean zero at the stationarity of normalised momentum.

    z_k = <x_k, g_k> - v_k with v_k = (alpha/2) (1 + beta)/(1 - beta) ||d_k||^2, from
    Yaida's fluctuation-dissipation relation. Its scale is v_k. It holds for SGD whose
    direction is d_k = (1 - beta) g_k + beta d_{k-1}, and for no other. With coupled
    weight decay lambda, g_k includes lambda x_k.

    Args:
      momentum: beta, in [0, 1). Default 0.9.
      weight_decay: lambda, in [0, inf). Default 0.0.

    Raises:
      ValueError: if an argument is out of range.
    """
    _checks.momentum(momentum, weight_decay=weight_decay)

    def pairs(t: Transition) -> _products.Pairs:
        d, g, new_x = t.direction, t.grad, t.new_params
        x = _decay.decaying(new_x)
        decayed = [] if _decay.is_zero(weight_decay) else [(x, d), (x, x)]
        return [(d, d), (d, g), (new_x, g), *decayed]

    def sample(products: list[jax.Array], t: Transition) -> Sample:
        d_dot_d, d_dot_g, new_x_dot_g, *decayed = products
        rate, v = t.learning_rate, _noise(momentum, 1.0, t, d_dot_d)
        # Uses x_k = x_{k+1} + rate * d_k, as the step is about to overwrite x_k.
        x_dot_g = new_x_dot_g + rate * d_dot_g
        if decayed:
            new_x_dot_d, new_x_dot_new_x = decayed
            x_dot_x = new_x_dot_new_x + 2 * rate * new_x_dot_d + rate**2 * d_dot_d
            x_dot_g += jnp.asarray(weight_decay, rate.dtype) * x_dot_x
        return Sample(x_dot_g - v, v)

    return _stateless(pairs, sample, test="equivalence")


def loss_statistic(weight_decay: Numeric = 0.0) -> Statistic:
    """The statistic of SLOPE: the loss, from the extra argument ``value``.

    With coupled weight decay lambda it is what the gradients descend on, the loss plus
    (lambda/2) ||x_{k+1}||^2. Its mean is not zero; it is meant for `SlopeTest`.

    Args:
      weight_decay: lambda, in [0, inf). Default 0.0.

    Raises:
      ValueError: if ``weight_decay`` is out of range.
    """
    _checks.momentum(weight_decay=weight_decay)

    def pairs(t: Transition) -> _products.Pairs:
        x = _decay.decaying(t.new_params)
        return [] if _decay.is_zero(weight_decay) else [(x, x)]

    def sample(products: list[jax.Array], t: Transition) -> Sample:
        if t.value is None:
            raise ValueError(
                "The loss is needed as the extra argument `value`: call "
                "`updates, state = optimizer.update(grads, state, params, value=loss)`."
            )
        loss = jnp.asarray(t.value).astype(t.learning_rate.dtype)
        for x_dot_x in products:
            loss += jnp.asarray(weight_decay, loss.dtype) / 2 * x_dot_x
        return Sample(loss)

    return _stateless(pairs, sample, test="slope")


def centred_statistic(momentum: Numeric = 0.9, nu: Numeric = 1.0) -> Statistic:
    """The master statistic, measured from an average of the iterates.

    w_k = <x_{k+1} - c_k, d_k> + (alpha/2) ||d_k||^2 + l_k, with the lag

    l_k = (1 - (1 - epsilon_k)^2) / (2 alpha) ||x_{k+1} - c_k||^2,

    which is -(||x_{k+1} - c_{k+1}||^2 - ||x_k - c_k||^2) / (2 alpha). Here c is an
    average over the newest half of the iterates, which takes a copy of the parameters,
    and epsilon_k is the weight with which x_{k+1} enters it. The mean is zero under any
    stationary dynamics, wherever the optimum lies. Under a steady drift c lags at a
    constant distance, so the mean is zero there as well; but then the lag is large.
    The scale takes it into account:

    v_k = (alpha/2) D ||d_k||^2 - 3 l_k.

    At stationarity, the lag over the first term is the relaxation time over the horizon
    of c. At a rate of zero the lag counts as zero. The statistic is meant for
    ``EquivalenceTest(delta=0.35)``. The lag decides, so the tolerance only has to be
    wider than the interval; with the default of 0.02 this takes many more samples. See
    docs/statistics.md.

    Args:
      momentum: beta of the direction, in [0, 1). Default 0.9, for Adam as well.
      nu: as in `scale_by_qhm`, in [0, 1]. Default 1.0.

    Raises:
      ValueError: if an argument is out of range.
    """
    _checks.momentum(momentum, nu)

    def pairs(t: Transition, centre: _average.AverageState) -> _products.Pairs:
        offset = _average.offset(t.new_params, centre.averaged)
        return [(offset, t.direction), (t.direction, t.direction), (offset, offset)]

    def sample(
        products: list[jax.Array], t: Transition, centre: _average.AverageState
    ) -> tuple[Sample, _average.AverageState]:
        offset_dot_d, d_dot_d, offset_dot_offset = products
        rate = t.learning_rate
        weight = _average.weight(centre, _CENTRE_LEAK_RATIO, dtype=rate.dtype)
        stretch = weight * (2 - weight) * offset_dot_offset
        has_moved = rate > 0
        lag = jnp.where(has_moved, stretch / jnp.where(has_moved, 2 * rate, 1), 0)
        value = offset_dot_d + rate / 2 * d_dot_d + lag
        scale = _noise(momentum, nu, t, d_dot_d) - _LAG_PENALTY * lag
        return Sample(value, scale), _average.push(centre, t.new_params, weight)

    test = EquivalenceTest(delta=0.35)
    return Statistic(_average.start, pairs, sample, test)
