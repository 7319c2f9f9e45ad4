"""What is recorded at each step: one number whose mean is zero at stationarity.

A statistic is a function from a `Transition` to a `Sample`. Under jit it costs what it
reads: the trees that it leaves alone are never computed. It may have an attribute
``pairs``, a function from a `Transition` to the pairs of trees whose inner products it
takes, of which one is the direction: on a CPU the step is then arranged around these.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _checks, _tree


class Transition(NamedTuple):
    """One step of the optimizer, x_{k+1} = x_k - learning_rate * direction.

    Attributes:
      params: x_k, the parameters before the step. Reading them makes XLA copy every
        parameter before its update in place; prefer ``new_params``.
      new_params: x_{k+1}, the parameters after the step.
      direction: d_k, before the learning rate and the minus sign.
      grad: the gradient, without coupled weight decay; where the transformation is
        chained after others, the extra argument ``grad``, or ``direction`` if there is
        none.
      learning_rate: the rate of this step, shape (), in the dtype of statistics:
        float64 if a parameter is double precision, else float32.
      value: the extra argument ``value`` of ``update`` (the loss), or None.
      axis_name: of the mesh axes over which the trees are sharded, inside
        `jax.shard_map`; the methods here sum over them.
      centre: c_k, the average over about the newest half of the iterates up to x_k; of
        at least float32. None unless the statistic has an attribute ``uses_centre``
        that is true, as it takes a copy of the parameters.
      centre_weight: epsilon_k, with which x_{k+1} will enter it, c_{k+1} = c_k +
        epsilon_k (x_{k+1} - c_k); shape (), in the dtype of statistics.
    """

    params: optax.Params
    new_params: optax.Params
    direction: optax.Updates
    grad: optax.Updates
    learning_rate: jax.Array
    value: jax.typing.ArrayLike | None
    axis_name: str | tuple[str, ...] | None = None
    centre: optax.Params | None = None
    centre_weight: jax.Array | None = None

    def inner_products(
        self, *pairs: tuple[optax.Params, optax.Params]
    ) -> list[jax.Array]:
        """`inner_product` of each pair, by one collective where one is needed."""
        return _tree.inner_products(pairs, self.learning_rate.dtype, self.axis_name)

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
      scale: the yardstick of the equivalence test, shape (): the mean of ``value`` is
        negligible when it is small beside the mean of ``scale``.
    """

    value: jax.typing.ArrayLike
    scale: jax.typing.ArrayLike = 1.0


# No drop unless the lag is less than a third of the noise, whatever the test's delta:
# not before the horizon of c is three relaxation times.
_LAG_PENALTY = 3.0

Statistic = Callable[[Transition], Sample]
Pairs = list[tuple[optax.Params, optax.Params]]


def master_pairs(t: Transition) -> Pairs:
    return [(t.new_params, t.direction), (t.direction, t.direction)]


def master_statistic(transition: Transition) -> Sample:
    """The statistic of SASA+, mean zero under any stationary dynamics.

    Delta_k = <x_{k+1}, d_k> + (alpha/2) ||d_k||^2, which is
    -(||x_{k+1}||^2 - ||x_k||^2) / (2 alpha) whatever made the direction d_k. Its scale
    is v_k = (alpha/2) ||d_k||^2.
    """
    t = transition
    x_dot_d, d_dot_d = t.inner_products(*master_pairs(t))
    half_step = t.learning_rate / 2 * d_dot_d
    return Sample(x_dot_d + half_step, half_step)


@dataclasses.dataclass(frozen=True)
class _YaidaStatistic:
    momentum: jax.typing.ArrayLike
    weight_decay: jax.typing.ArrayLike

    def pairs(self, t: Transition) -> Pairs:
        pairs = [
            (t.direction, t.direction),
            (t.direction, t.grad),
            (t.new_params, t.grad),
        ]
        if not _checks.is_zero(self.weight_decay):
            pairs += [(t.new_params, t.direction), (t.new_params, t.new_params)]
        return pairs

    def __call__(self, transition: Transition) -> Sample:
        rate = transition.learning_rate
        products = transition.inner_products(*self.pairs(transition))
        d_dot_d, d_dot_g, new_x_dot_g, *more = products
        dissipation = (1 + self.momentum) / (1 - self.momentum)
        v = dissipation * rate / 2 * d_dot_d
        # With x_k = x_{k+1} + rate * d_k, as the step is about to overwrite x_k.
        x_dot_g = new_x_dot_g + rate * d_dot_g
        if more:
            new_x_dot_d, new_x_dot_new_x = more
            x_dot_x = new_x_dot_new_x + 2 * rate * new_x_dot_d + rate**2 * d_dot_d
            x_dot_g += jnp.asarray(self.weight_decay, rate.dtype) * x_dot_x
        return Sample(x_dot_g - v, v)


def yaida_statistic(
    momentum: jax.typing.ArrayLike = 0.9, weight_decay: jax.typing.ArrayLike = 0.0
) -> Statistic:
    """The statistic of SASA, mean zero at the stationarity of normalised momentum.

    z_k = <x_k, g_k> - v_k with v_k = (alpha/2) (1 + beta)/(1 - beta) ||d_k||^2, from
    Yaida's fluctuation-dissipation relation. Its scale is v_k. It holds for SGD whose
    direction is d_k = (1 - beta) g_k + beta d_{k-1}, and for no other. With coupled
    weight decay lambda, g_k includes lambda x_k.

    Args:
      momentum: beta, in [0, 1). Default 0.9.
      weight_decay: lambda, in [0, inf). Default 0.0.
    """
    _checks.number("momentum", momentum, "[0, 1)")
    _checks.number("weight_decay", weight_decay, "[0, inf)")
    return _YaidaStatistic(momentum, weight_decay)


@dataclasses.dataclass(frozen=True)
class _LossStatistic:
    weight_decay: jax.typing.ArrayLike

    def pairs(self, transition: Transition) -> Pairs:
        del transition
        return []

    def __call__(self, transition: Transition) -> Sample:
        t = transition
        if t.value is None:
            raise ValueError(
                "The loss is needed as the extra argument `value`: call "
                "`updates, state = optimizer.update(grads, state, params, value=loss)`."
            )
        loss = jnp.asarray(t.value).astype(t.learning_rate.dtype)
        if _checks.is_zero(self.weight_decay):
            return Sample(loss)
        decay = jnp.asarray(self.weight_decay, loss.dtype) / 2
        return Sample(loss + decay * t.squared_norm(t.new_params))


def loss_statistic(weight_decay: jax.typing.ArrayLike = 0.0) -> Statistic:
    """The statistic of SLOPE: the loss, from the extra argument ``value``.

    With coupled weight decay lambda it is what the gradients descend on, the loss plus
    (lambda/2) ||x_{k+1}||^2. Its mean is not zero; it is for `SlopeTest`.

    Args:
      weight_decay: lambda, in [0, inf). Default 0.0.
    """
    _checks.number("weight_decay", weight_decay, "[0, inf)")
    return _LossStatistic(weight_decay)


@dataclasses.dataclass(frozen=True)
class _CentredStatistic:
    momentum: jax.typing.ArrayLike
    nu: jax.typing.ArrayLike
    uses_centre = True

    def pairs(self, t: Transition) -> Pairs:
        assert t.centre is not None
        offset = _tree.subtract(t.new_params, t.centre)
        return [(offset, t.direction), (t.direction, t.direction), (offset, offset)]

    def __call__(self, transition: Transition) -> Sample:
        rate, weight = transition.learning_rate, transition.centre_weight
        assert weight is not None
        products = transition.inner_products(*self.pairs(transition))
        offset_dot_d, d_dot_d, offset_dot_offset = products
        half_step = rate / 2 * d_dot_d
        lag = weight * (2 - weight) / (2 * rate) * offset_dot_offset
        noise = dissipation(self.momentum, self.nu) * half_step
        return Sample(offset_dot_d + half_step + lag, noise - _LAG_PENALTY * lag)


def dissipation(
    momentum: jax.typing.ArrayLike, nu: jax.typing.ArrayLike
) -> jax.typing.ArrayLike:
    """How many times the variance of white gradients is that of QHM's direction."""
    b = momentum
    variance = (1 - nu) ** 2 + 2 * nu * (1 - nu) * (1 - b) + nu**2 * (1 - b) / (1 + b)
    return 1 / variance


def centred_statistic(
    momentum: jax.typing.ArrayLike = 0.9, nu: jax.typing.ArrayLike = 1.0
) -> Statistic:
    """The master statistic, measured from an average of the iterates.

    w_k = <x_{k+1} - c_k, d_k> + (alpha/2) ||d_k||^2 + l_k, with the lag

    l_k = (1 - (1 - epsilon_k)^2) / (2 alpha) ||x_{k+1} - c_k||^2,

    which is -(||x_{k+1} - c_{k+1}||^2 - ||x_k - c_k||^2) / (2 alpha): mean zero under
    any stationary dynamics, wherever the optimum lies. Under a steady drift c lags at a
    constant distance, so its mean is zero there as well; but then the lag is large. So
    it goes with the equivalence test, and is taken off its scale,

    v_k = (alpha/2) D ||d_k||^2 - 3 l_k,

    where D ||d_k||^2 estimates the noise in the gradient: D is (1 + beta)/(1 - beta)
    for normalised momentum. At stationarity the lag over the first term is the
    relaxation time over the horizon of c. See docs/statistics.md.

    Args:
      momentum: beta, in [0, 1), of the direction. Default 0.9, for Adam as well.
      nu: as in `scale_by_qhm`, in [0, 1]. Default 1.0.
    """
    _checks.number("momentum", momentum, "[0, 1)")
    _checks.number("nu", nu, "[0, 1]")
    return _CentredStatistic(momentum, nu)
