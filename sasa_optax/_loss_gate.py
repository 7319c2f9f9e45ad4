"""What the mini-batch losses allow: may the rate rise, has it risen too far?

The gate keeps a fast and a slow average of the losses, and judges both against what the
run has gained so far. Nothing depends on where the loss has its zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax._types import DType

# The horizon of the fast average: a share of the slow one's, and at least so many.
_MIN_FAST, _FAST_SHARE = 16, 1 / 8
# A gain counts as real when it exceeds so many standard deviations of the fast average.
_REAL = 5.0
# The rate may rise while the loss falls by this share of the gain within a horizon.
_FALLING = 0.02
# So much of a real gain is lost when a rise went too far, and when the model is lost.
OVERSHOOT, BRAKE = 0.1, 0.5
_NUM_DEVIATIONS = 3.0


class LossState(NamedTuple):
    """What the gate remembers of the losses; all of shape ().

    Attributes:
      num_losses: finite losses since the last brake, int32.
      num_missed: losses in a row that were not finite, int32.
      fast: their average over about the newest eighth of a horizon.
      slow: their average over about a horizon.
      variance: of a single loss around the fast average.
      first: the fast average after the first 16 losses.
      error_of_first: the standard deviation of ``first``, as it was seen then.
      has_gained: whether a fall since then was real, bool.
      best: the least that the fast average has been since, plus three of its standard
        deviations.
    """

    num_losses: jax.Array
    num_missed: jax.Array
    fast: jax.Array
    slow: jax.Array
    variance: jax.Array
    first: jax.Array
    error_of_first: jax.Array
    has_gained: jax.Array
    best: jax.Array


class Verdict(NamedTuple):
    """What the losses say at a step; all of shape (), and bool except ``stalled``.

    Attributes:
      may_rise: the loss still falls noticeably, or has not fallen noticeably yet.
      stalled: how sure it is that a loss which had fallen noticeably rises. From 0
        where the fast average does not exceed the slow one, to 1 where it does so by
        three of its standard deviations; of the state's dtype.
      is_above: a tenth of what was gained is lost again.
      is_lost: half of what was gained is lost, or the loss is not finite twice in a
        row.
      is_missing: the loss is not finite.
    """

    may_rise: jax.Array
    stalled: jax.Array
    is_above: jax.Array
    is_lost: jax.Array
    is_missing: jax.Array


def start(dtype: DType) -> LossState:
    dtypes = dict.fromkeys(LossState._fields, dtype)
    dtypes |= {"num_losses": jnp.int32, "num_missed": jnp.int32, "has_gained": bool}
    return LossState(**{name: jnp.zeros((), each) for name, each in dtypes.items()})


def unseen(dtype: DType) -> Verdict:
    """Without losses the rate may not rise, and nothing is known to be wrong."""
    nothing = Verdict(*(jnp.zeros((), bool) for _ in Verdict._fields))
    return nothing._replace(stalled=jnp.zeros((), dtype))


# Compiled by itself, so that JAX traces it once for all optimizers.
@jax.jit
def watch(
    state: LossState, value: jax.Array, horizon: jax.Array
) -> tuple[LossState, Verdict]:
    """Takes the loss of a step, of the state's dtype, and judges it."""
    value = jax.lax.stop_gradient(value)
    # Its square must not overflow either: the variance would never forget it.
    is_missing = ~jnp.isfinite((value - state.fast) ** 2)
    value = jnp.where(is_missing, state.fast, value)
    seen = _averaged(state, value, horizon)
    error, error_of_16 = _errors(seen, horizon)
    is_judged = seen.num_losses > _MIN_FAST
    is_fresh = seen.num_losses == _MIN_FAST
    # The least of many averages lies below their mean: hence the deviations.
    bound = seen.fast + _NUM_DEVIATIONS * error
    first = jnp.where(is_fresh, seen.fast, state.first)
    error_of_first = jnp.where(is_fresh, error_of_16, state.error_of_first)
    best = jnp.where(is_judged, jnp.minimum(state.best, bound), bound)
    gained = first - best
    # Once real it stays so: a loss that explodes is noisy, too, and must not hide it.
    is_real = gained > _REAL * jnp.maximum(error, error_of_16)
    has_gained = is_judged & (state.has_gained | is_real)
    above = seen.fast - _NUM_DEVIATIONS * error
    above_best, above_first = above - best, above - first - _REAL * error_of_first
    is_falling = seen.slow - seen.fast >= _FALLING * gained
    is_above = has_gained & (above_best > OVERSHOOT * gained)
    is_open = is_falling | ~has_gained
    lost = jnp.where(has_gained, above_best > BRAKE * gained, above_first > 0)
    # A loss that never varied has no error to divide by.
    deviations = _NUM_DEVIATIONS * jnp.maximum(error, jnp.finfo(error.dtype).tiny)
    stalled = jnp.clip((seen.fast - seen.slow) / deviations, 0, 1)
    num_missed = jnp.where(is_missing, optax.safe_increment(state.num_missed), 0)
    verdict = Verdict(
        # A loss that never varies says nothing.
        may_rise=~is_missing & ~is_above & is_open & (seen.variance > 0),
        stalled=jnp.where(~is_missing & has_gained, stalled, 0),
        is_above=~is_missing & is_above,
        # A single loss that is not finite may be the fault of its mini-batch. After the
        # second the cut has been made, so the third must not make another.
        is_lost=(~is_missing & is_judged & lost) | (num_missed == 2),
        is_missing=is_missing,
    )
    seen = seen._replace(
        first=first, error_of_first=error_of_first, has_gained=has_gained, best=best
    )
    kept = jax.tree.map(lambda old, new: jnp.where(is_missing, old, new), state, seen)
    return kept._replace(num_missed=num_missed), verdict


def renewed(state: LossState, horizon: jax.Array) -> LossState:
    """The state after a cut: its best is the loss of now.

    The least of very noisy losses may lie below what can be reached, and would then
    call for one cut after the other.
    """
    return state._replace(
        best=state.fast + _NUM_DEVIATIONS * _errors(state, horizon)[0]
    )


def _averaged(state: LossState, value: jax.Array, horizon: jax.Array) -> LossState:
    num_losses = jnp.asarray(optax.safe_increment(state.num_losses))
    is_first = num_losses == 1
    fast_weight = _weight(num_losses, _fast_horizon(horizon))
    slow_weight = _weight(num_losses, horizon)
    deviation = jnp.where(is_first, 0, value - state.fast)
    variance = (1 - fast_weight) * (state.variance + fast_weight * deviation**2)
    slow = state.slow + slow_weight * (value - state.slow)
    return state._replace(
        num_losses=num_losses,
        fast=jnp.where(is_first, value, state.fast + fast_weight * deviation),
        slow=jnp.where(is_first, value, slow),
        variance=jnp.where(is_first, 0, variance),
    )


def _fast_horizon(horizon: jax.Array) -> jax.Array:
    return jnp.maximum(_MIN_FAST, _FAST_SHARE * horizon)


def _weight(num_losses: jax.Array, horizon: jax.Array) -> jax.Array:
    # Before the first loss the count is zero.
    return 1 / jnp.clip(num_losses.astype(horizon.dtype), 1, horizon)


def _errors(state: LossState, horizon: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The standard deviations of the fast average, and of one over 16 losses."""
    weight = _weight(state.num_losses, _fast_horizon(horizon))
    of_fast = jnp.sqrt(state.variance * weight / (2 - weight))
    return of_fast, jnp.sqrt(state.variance / _MIN_FAST)
