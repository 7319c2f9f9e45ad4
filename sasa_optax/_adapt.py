"""A rate that follows progress: up while the run goes somewhere, down as it settles."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _average, _checks, _loss_gate, _progress, _tree
from sasa_optax._transformation import Optimizer, transformation
from sasa_optax._types import AxisName, DType, Numeric

# Over a horizon, the logarithm of the scale changes by this times the error, which is
# that of the logarithm of progress, within these limits. A horizon is an eighth of all
# steps, so in the end the scale falls no faster than k^-0.8. Averaged, such rates are
# those of Polyak and Ruppert, whose exponents lie between 1/2 and 1.
_UP, _MOST_UP = 2.0, 1.0
_DOWN, _MOST_DOWN = 0.1, 0.1
# The first descent raises progress. So at step k the scale rises only if progress
# exceeds its target by a factor of 1 + (128 / k)^2.
_SETTLING = 128
# A rise may still have gone too far. So soon after the newest rise, at step j, a fall
# is faster by up to 1 + 8 (j / k)^2.
_CORRECTION = 8.0
# Progress between its target and one may be that of a free walk, which never settles.
# So over a horizon the scale falls by up to this where the loss has stalled meanwhile:
# the surer it is that the loss rises, the faster.
_STALLED = 1.0
# On a straight line progress starts near zero, so it says nothing before this step.
MIN_STEPS = 64
# Overshoots and brakes divide the scale by this. The ceiling that they leave behind
# rises by a factor of exp(1/16) over a horizon.
_CUT, _CEILING_RISE = 4.0, 1 / 16


class AdaptOnProgressState(NamedTuple):
    """What `adapt_on_progress` remembers: arrays only, of fixed shape and dtype.

    Attributes:
      scale: what multiplies the updates of the next step, shape ().
      past_scale: the geometric mean of the scale over about a horizon, shape (). A cut
        makes it the new scale.
      target: what progress is compared with, shape (). It is a reading.
      ceiling: the bound of the scale since the newest cut, shape (); infinite before
        the first.
      sees_loss: whether the newest step was given ``value``, shape (), bool. Without it
        the scale never rises.
      num_overshoots: how often the scale was cut because it had risen too far, shape
        (), int32.
      num_brakes: how often the scale was cut and the parameters returned to their
        average, because half of what was gained was lost; shape (), int32.
      num_nonfinite: losses that were not finite, shape (), int32.
      last_cut: the step of the newest overshoot or brake, 0 before the first; shape (),
        int32.
      last_rise: the newest step after which the scale rose, 0 if none did since the
        newest cut; shape (), int32.
      losses: the `LossState` of the gate.
      measured: the `ProgressState`, with the average that `averaged_params` returns.

    Those without a dtype here are float32, or float64 where a parameter is.
    """

    scale: jax.Array
    past_scale: jax.Array
    target: jax.Array
    ceiling: jax.Array
    sees_loss: jax.Array
    num_overshoots: jax.Array
    num_brakes: jax.Array
    num_nonfinite: jax.Array
    last_cut: jax.Array
    last_rise: jax.Array
    losses: _loss_gate.LossState
    measured: _progress.ProgressState


def _cut(
    state: AdaptOnProgressState,
    verdict: _loss_gate.Verdict,
    steps: jax.Array,
    horizon: jax.Array,
) -> tuple[AdaptOnProgressState, jax.Array]:
    """Divides the scale where the losses say that it is too high."""

    def is_recent(step: jax.Array) -> jax.Array:
        return (step > 0) & ((steps - step).astype(horizon.dtype) <= horizon)

    has_risen = is_recent(state.last_rise) & ~is_recent(state.last_cut)
    is_overshoot = verdict.is_above & has_risen & ~verdict.is_lost
    is_cut = is_overshoot | verdict.is_lost
    scale = jnp.where(is_cut, state.scale / _CUT, state.scale)
    missed = optax.safe_increment(state.num_nonfinite)
    losses = _loss_gate.renewed(state.losses, horizon)
    best = jnp.where(is_cut, losses.best, state.losses.best)
    num_losses = jnp.where(verdict.is_lost, 0, state.losses.num_losses)
    state = state._replace(
        scale=scale,
        ceiling=jnp.where(is_cut, scale, state.ceiling),
        num_overshoots=state.num_overshoots + is_overshoot.astype(jnp.int32),
        num_brakes=state.num_brakes + verdict.is_lost.astype(jnp.int32),
        num_nonfinite=jnp.where(verdict.is_missing, missed, state.num_nonfinite),
        last_cut=jnp.where(is_cut, steps, state.last_cut),
        last_rise=jnp.where(is_cut, 0, state.last_rise),
        losses=state.losses._replace(num_losses=num_losses, best=best),
    )
    return state, is_cut


def _log(x: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


def _followed(past: jax.Array, scale: jax.Array, horizon: jax.Array) -> jax.Array:
    """The geometric mean of the scale over about a horizon, one step later."""
    return jnp.exp(_log(past) + (_log(scale) - _log(past)) / horizon)


def expected_progress(state: AdaptOnProgressState) -> jax.Array:
    """What progress will be within a horizon if the scale stays as it is.

    Around an optimum progress is about inversely proportional to the scale, and shows
    that of the horizon behind it.
    """
    change = _log(state.scale) - _log(state.past_scale)
    return jnp.exp(_log(state.measured.progress) - change)


def _change(
    state: AdaptOnProgressState, verdict: _loss_gate.Verdict, steps: jax.Array
) -> jax.Array:
    """The change of the logarithm of the scale over a horizon."""
    dtype = state.scale.dtype
    count = steps.astype(dtype)
    progress = state.measured.progress
    error = jnp.log(expected_progress(state) / state.target)
    up = jnp.clip(_UP * (error - jnp.log1p((_SETTLING / count) ** 2)), 0, _MOST_UP)
    newest_rise = jnp.maximum(state.last_rise, _SETTLING).astype(dtype)
    nearness = jnp.minimum(1, newest_rise / count) ** 2
    down = jnp.clip(_DOWN * error, -_MOST_DOWN, 0) * (1 + _CORRECTION * nearness)
    is_walk = (progress > state.target) & (progress < 1)
    down -= jnp.where(is_walk, _STALLED * verdict.stalled, 0)
    has_begun = state.measured.num_walked >= MIN_STEPS
    return jnp.where(verdict.may_rise, up, 0) + jnp.where(has_begun, down, 0)


@dataclasses.dataclass(eq=False)
class _Adapter:
    """The transformation; its fields are the arguments of `adapt_on_progress`."""

    momentum: Numeric
    target: Numeric
    min_scale: Numeric
    max_scale: Numeric | None
    axis_name: AxisName
    dtype: jnp.dtype | None

    def init(self, params: optax.Params) -> AdaptOnProgressState:
        number = _tree.statistic_dtype(params)
        count = jnp.zeros((), jnp.int32)
        return AdaptOnProgressState(
            scale=self._clipped(jnp.ones((), number)),
            past_scale=self._clipped(jnp.ones((), number)),
            target=jnp.asarray(self.target, number),
            ceiling=jnp.full((), jnp.inf, number),
            sees_loss=jnp.zeros((), bool),
            num_overshoots=count,
            num_brakes=jnp.copy(count),
            num_nonfinite=jnp.copy(count),
            last_cut=jnp.copy(count),
            last_rise=jnp.copy(count),
            losses=_loss_gate.start(number),
            measured=_progress.start(params, self.dtype),
        )

    def _clipped(self, scale: jax.Array) -> jax.Array:
        # A scale of 1 at the start may lie outside the bounds.
        lowest, highest = (
            None if bound is None else jnp.asarray(bound, scale.dtype)
            for bound in (self.min_scale, self.max_scale)
        )
        return jnp.clip(scale, lowest, highest)

    def update(
        self,
        updates: optax.Updates,
        state: AdaptOnProgressState,
        params: optax.Params,
        *,
        value: Numeric | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, AdaptOnProgressState]:
        # The number of this step, the first being one, and the horizon of its average.
        steps = jnp.asarray(optax.safe_increment(state.measured.average.num_averaged))
        horizon = 1 / _progress.weight(state.measured)
        verdict, losses = _loss_gate.unseen(state.scale.dtype), state.losses
        if value is not None:
            loss = _checks.loss("value", value).astype(state.scale.dtype)
            losses, verdict = _loss_gate.watch(losses, loss, horizon)
        state = state._replace(losses=losses, sees_loss=jnp.asarray(value is not None))
        state, is_cut = _cut(state, verdict, steps, horizon)
        scale = self._clipped(state.scale)
        updates, measured = _progress.step(
            updates,
            state.measured,
            params,
            self.momentum,
            self.axis_name,
            scale=scale,
            # A loss that is not finite has no gradient worth following either.
            returns=verdict.is_lost | verdict.is_missing,
        )
        past_scale = jnp.where(
            is_cut, scale, _followed(state.past_scale, scale, horizon)
        )
        state = state._replace(scale=scale, past_scale=past_scale, measured=measured)
        change = jnp.where(is_cut, 0, _change(state, verdict, steps))
        # The scale stays below the ceiling, which rises slowly.
        wanted = jnp.minimum(scale * jnp.exp(change / horizon), state.ceiling)
        state = state._replace(
            scale=self._clipped(wanted),
            ceiling=state.ceiling * jnp.exp(_CEILING_RISE / horizon),
        )
        last_rise = jnp.where(state.scale > scale, steps, state.last_rise)
        return updates, state._replace(last_rise=last_rise)


def adapt_on_progress(
    momentum: Numeric = 0.9,
    *,
    target: Numeric = 0.4,
    min_scale: Numeric = 0.0,
    max_scale: Numeric | None = None,
    axis_name: AxisName = None,
    dtype: DType | None = None,
) -> Optimizer:
    r"""Scales the updates of any optimizer so that progress stays near its target.

    Put it after a complete optimizer, give it the loss, and evaluate
    `averaged_params`. It needs no schedule, no horizon and no epochs. After each step
    it takes **progress** R, the squared distance of the parameters from their average
    over that of a random walk (`measure_progress`). It compares what R will be at the
    present scale s of the updates with a target R*, and moves the scale:

    .. math::

      \log s \leftarrow \log s + \tfrac1h \, \mathrm{clip}\Bigl(
      a \log \frac{R \bar s}{R^* s}, -0.1, 1\Bigr), \qquad h = \max(32, k/8),

    with a = 2 where it rises and 0.1 where it falls. The geometric mean of s over a
    horizon h is s̄, as R shows the steps of a horizon. Progress above the target says
    that the run still goes somewhere, so that larger steps would get there faster.
    Below the target the parameters move around in place, and smaller steps come closer.
    In the first steps a rise takes more progress, and soon after a rise a fall is
    faster; see docs/progress.md.

    **The loss** keeps a rise from going too far. The scale rises only while the loss
    falls noticeably, or has not begun to. *Stall*: progress is between its target and
    one, as that of a walk which never settles, and the loss rises. The logarithm of
    the scale falls by up to 1/h, the faster the surer it is that the loss rises.
    *Overshoot*: after a rise of the scale, a tenth of what the loss has gained is lost
    again. The scale is cut to a quarter, and then rises slowly at most. *Brake*: half
    of it is lost. The scale is cut, and the parameters return to their average. They
    also return where the loss is not finite; a second such loss in a row is a brake. A
    loss may be negative. **Without** ``value`` the scale only falls, and ``sees_loss``
    in `metrics` is False.

    Args:
      momentum: beta of the optimizer before it, as in `measure_progress`. Default 0.9.
      target: R*, in (0, 1). The higher, the lower the rate. Default 0.4.
      min_scale: the lower bound of the scale, in [0, inf). Default 0.0.
      max_scale: the upper bound of the scale, at least ``min_scale``. Default None:
        there is no bound.
      axis_name, dtype: see `measure_progress`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an
      `AdaptOnProgressState`. Its ``update`` needs ``params``, takes the extra argument
      ``value``, the loss of the mini-batch, and ignores all others. Where each device
      has its own loss and gradients (`jax.pmap`, `jax.shard_map`), average both first:
      ``jax.lax.pmean((loss, grads), axis)``. Updates keep their dtypes.

      Gradients that are not finite spoil the state of most optimizers for good. Keep
      them out of it with ``optax.apply_if_finite(inner, 100)`` as the other optimizer.
      They never enter the average.

    Raises:
      ValueError: if an argument is out of range, ``params`` is missing, or ``value`` is
        not a floating-point scalar.

    Example:
      >>> import jax, optax, sasa_optax
      >>> import jax.numpy as jnp
      >>> def loss(x, key):
      ...     return jnp.sum((x - jax.random.normal(key, x.shape)) ** 2)
      >>> optimizer = optax.chain(optax.adamw(1e-3), sasa_optax.adapt_on_progress())
      >>> @jax.jit
      ... def step(params, state, key):
      ...     value, grads = jax.value_and_grad(loss)(params, key)
      ...     updates, state = optimizer.update(grads, state, params, value=value)
      ...     return optax.apply_updates(params, updates), state
      >>> params = jnp.full(10, 5.0)
      >>> state = optimizer.init(params)
      >>> for key in jax.random.split(jax.random.key(0), 2000):
      ...     params, state = step(params, state, key)
      >>> bool(jnp.all(jnp.abs(sasa_optax.averaged_params(state)) < 0.5))
      True

    References:
      Polyak and Juditsky, `Acceleration of stochastic approximation by averaging
      <https://doi.org/10.1137/0330046>`_, 1992, for rates that fall as a power of k,
      averaged. Hansen and Ostermeier, `Completely derandomized self-adaptation in
      evolution strategies <https://doi.org/10.1162/106365601750190398>`_, 2001, who
      adapt a step size by the length of a path beside that of a random walk.
    """
    _checks.number("momentum", momentum, "[0, 1)")
    _checks.number("target", target, "(0, 1)")
    _checks.number("min_scale", min_scale, "[0, inf)")
    if max_scale is not None:
        _checks.number("max_scale", max_scale, "(0, inf)")
        _checks.exceeds("max_scale", max_scale, "min_scale", min_scale, True)
    _checks.axis_name(axis_name)
    wide = _average.checked_dtype(dtype)
    adapter = _Adapter(momentum, target, min_scale, max_scale, axis_name, wide)
    return transformation(adapter.init, adapter.update, AdaptOnProgressState)
