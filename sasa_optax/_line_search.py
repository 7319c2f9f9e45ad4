"""SSLS: the rate found by a smoothed line search on the mini-batch's loss.

It stands in front of a controller: it changes the scale that the controller applies,
and ends for good when the loss stops falling or the controller cuts the rate.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _checks, _tree, _types, _window
from sasa_optax._controller import Controller, ControllerState, no_test_yet, test_if
from sasa_optax._qhm import add_coupled_decay, coupled_decay_loss
from sasa_optax._stationarity import SlopeTest, TestResult

_DEFAULT_SMOOTHING = 0.1
_DEFAULT_SUFFICIENT_DECREASE = {"gradient": 0.05, "update": 0.45}

_BY_NAME = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)

_CALL = (
    "`updates, state = optimizer.update(grads, state, params, grad=grads, "
    "value_fn=value_fn)`, where `value_fn(params)` is the loss of this mini-batch."
)


class LineSearchState(NamedTuple):
    """What a line search adds to a `ControllerState`.

    Attributes:
      line_search_active: whether it still goes on, shape (), bool.
      step_size: eta, what the newest search found on its mini-batch, before smoothing;
        shape (), float32, or float64 where a parameter is.
      num_evaluations: of ``value_fn``, since the start; shape (), int32.
      losses: of the mini-batches since the start; None for `ssls`, which never ends.
      loss_test: the newest `TestResult` of the slope of the losses; None for `ssls`.
    """

    line_search_active: jax.Array
    step_size: jax.Array
    num_evaluations: jax.Array
    losses: _window.Window | None
    loss_test: TestResult | None


class _Found(NamedTuple):
    """What was seen of a mini-batch; scalars.

    Attributes:
      is_good: False if f(x_k) or the slope is not finite: such a step says nothing.
      is_search: whether a step size was searched for, and found.
      ratio: of that step size to the rate.
      has_loss: whether f(x_k) is known, and the step a good one.
      loss: f(x_k), or zero.
      num_evaluations: of the loss.
    """

    is_good: jax.Array
    is_search: jax.Array
    ratio: jax.Array
    has_loss: jax.Array
    loss: jax.Array
    num_evaluations: jax.Array


class _Batch(NamedTuple):
    """The mini-batch at hand, as ``update`` was given it.

    Attributes:
      params: x_k.
      grad: the gradient, without coupled weight decay.
      direction: d, what the chain made of it; None where the search does not need it.
      value_fn: the loss as a function of the parameters alone.
      value: f(x_k), shape (), or None where it has to be evaluated.
      axis_name: of the mesh axes over which the trees are sharded.
      coupled_decay: lambda; the gradient then gets lambda * x_k, and the losses
        (lambda/2) ||x||^2.
    """

    params: optax.Params
    grad: optax.Updates
    direction: optax.Updates | None
    value_fn: Callable[[optax.Params], Any]
    value: jax.Array | None
    coupled_decay: jax.typing.ArrayLike
    axis_name: _tree.AxisName

    def decayed_grad(self) -> optax.Updates:
        return add_coupled_decay(self.grad, self.coupled_decay, self.params)

    def descent(self) -> optax.Updates:
        """What the step size multiplies."""
        return self.decayed_grad() if self.direction is None else self.direction

    def slope(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Of the loss against the descent, a decrease being positive; shape ()."""
        return _tree.inner_product(
            self.decayed_grad(), self.descent(), dtype, self.axis_name
        )

    def decay_loss(
        self, params: optax.Params, dtype: jax.typing.DTypeLike
    ) -> jax.typing.ArrayLike:
        return coupled_decay_loss(self.coupled_decay, params, dtype, self.axis_name)


def _loss(name: str, value: Any) -> jax.Array:
    """``value``, which must be a real scalar."""
    if isinstance(value, tuple | list | dict):
        raise ValueError(
            f"{name} must be a scalar, got a {type(value).__name__}: if the loss comes "
            "with auxiliary output, give the loss alone."
        )
    loss = jnp.asarray(value)
    if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be a floating-point scalar, got shape {loss.shape} and dtype "
            f"{loss.dtype}."
        )
    return loss


def _own_arguments(
    value_fn: Callable[..., Any], extra_args: dict[str, Any]
) -> dict[str, Any]:
    """Those of the extra arguments that ``value_fn`` takes by name."""
    parameters = list(inspect.signature(value_fn).parameters.values())
    # The first is for the parameters, whatever its name.
    by_name = [p for p in parameters[1:] if p.kind in _BY_NAME]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        by_place = {p.name for p in parameters} - {p.name for p in by_name}
        names = extra_args.keys() - by_place
    else:
        names = extra_args.keys() & {p.name for p in by_name}
    return {name: extra_args[name] for name in names}


def _default_smoothing(steps_per_epoch: int | None) -> float:
    if steps_per_epoch is None:
        return _DEFAULT_SMOOTHING
    return _checks.static_integer("steps_per_epoch", steps_per_epoch, 1) ** -0.5


@dataclasses.dataclass(kw_only=True, eq=False)
class LineSearch:
    """Finds the rate that a controller then tends.

    With a test of the losses' slope the search ends when that finds no decrease, or
    when the controller cuts the rate; without one it never does. The arguments are
    those of `scale_by_ssls`, where they are described.
    """

    controller: Controller
    loss_test: SlopeTest | None
    steps_per_epoch: int | None
    smoothing: jax.typing.ArrayLike | None
    sufficient_decrease: jax.typing.ArrayLike | None
    increase_factor: jax.typing.ArrayLike
    decrease_factor: jax.typing.ArrayLike
    max_trials: jax.typing.ArrayLike
    search_direction: str
    search_interval: jax.typing.ArrayLike
    max_learning_rate: jax.typing.ArrayLike | None

    def __post_init__(self) -> None:
        _checks.learning_rate(self.controller.learning_rate, allow_schedule=False)
        if self.smoothing is None:
            self.smoothing = _default_smoothing(self.steps_per_epoch)
        _checks.number("smoothing", self.smoothing, "(0, 1]")
        directions = tuple(_DEFAULT_SUFFICIENT_DECREASE)
        _checks.choice("search_direction", self.search_direction, directions)
        if self.sufficient_decrease is None:
            default = _DEFAULT_SUFFICIENT_DECREASE[self.search_direction]
            self.sufficient_decrease = default
        _checks.number("sufficient_decrease", self.sufficient_decrease, "(0, 1)")
        _checks.number("increase_factor", self.increase_factor, "[1, inf)")
        _checks.number("decrease_factor", self.decrease_factor, "(0, 1)")
        _checks.integer("max_trials", self.max_trials, 1)
        _checks.integer("search_interval", self.search_interval, 1)
        if self.max_learning_rate is not None:
            most = self.max_learning_rate
            _checks.number("max_learning_rate", most, "(0, inf)")
            for name in ("learning_rate", "min_learning_rate"):
                least = getattr(self.controller, name)
                _checks.exceeds("max_learning_rate", most, name, least)

    def init(self, params: optax.Params) -> ControllerState:
        state = self.controller.init(params)
        dtype = state.scale.dtype
        ends = self.loss_test is not None
        capacity = self.controller.max_window
        line_search = LineSearchState(
            line_search_active=jnp.ones((), bool),
            step_size=jnp.zeros((), dtype),
            num_evaluations=jnp.zeros((), jnp.int32),
            losses=_window.empty(1, capacity, dtype) if ends else None,
            loss_test=no_test_yet(dtype) if ends else None,
        )
        return state._replace(line_search=line_search)

    def _find(
        self, batch: _Batch, rate: jax.Array, known: jax.Array | None, slope: jax.Array
    ) -> _Found:
        """Tries step sizes from increase_factor * rate down, until one is accepted.

        One loop, so that the loss is compiled once: its pass 0 evaluates f(x_k), and is
        left out where that is known; pass n is the n-th trial.
        """
        dtype = rate.dtype
        descent = batch.descent()
        increase = jnp.asarray(self.increase_factor, dtype)
        decrease = jnp.asarray(self.decrease_factor, dtype)
        assert self.sufficient_decrease is not None
        required = jnp.asarray(self.sufficient_decrease, dtype)

        def ratio(trial: jax.Array) -> jax.Array:
            return increase * decrease ** (trial - 1).astype(dtype)

        def evaluate(step_size: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The loss and its error of rounding."""
            step = _tree.scale(-step_size, descent)
            params = optax.apply_updates(batch.params, step)
            loss = _loss("value_fn's result", batch.value_fn(params))
            eps = float(jnp.finfo(loss.dtype).eps)
            loss = jax.lax.stop_gradient(loss).astype(dtype)
            return loss + batch.decay_loss(params, dtype), eps * jnp.abs(loss)

        def go_on(carry: tuple[jax.Array, ...]) -> jax.Array:
            trial, _, is_good, accepted = carry
            may_try = is_good & (slope > 0) & (trial <= self.max_trials) & ~accepted
            return (trial == 0) | may_try

        def one_pass(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            trial, start, is_good, _ = carry
            is_start = trial == 0
            step_size = jnp.where(is_start, 0, ratio(trial) * rate)
            loss, rounding = evaluate(step_size)
            is_finite = jnp.isfinite(loss)
            # A rise that the loss's own type cannot tell from none is none.
            bound = start - required * step_size * slope + rounding
            accepted = ~is_start & is_finite & (loss <= bound)
            start = jnp.where(is_start & is_finite, loss, start)
            return trial + 1, start, is_good & (is_finite | ~is_start), accepted

        loss = jnp.zeros((), dtype) if known is None else known
        is_good = jnp.isfinite(slope) & jnp.isfinite(loss)
        first = jnp.asarray(0 if known is None else 1, jnp.int32)
        start = jnp.where(is_good, loss, 0)
        trial, start, is_good, accepted = jax.lax.while_loop(
            go_on, one_pass, (first, start, is_good, jnp.zeros((), bool))
        )
        # The next one to try, or that before it if it was accepted.
        found = ratio(jnp.where(accepted, trial - 1, trial))
        found = jnp.where(slope > 0, found, decrease)
        return _Found(
            is_good=is_good,
            is_search=is_good,
            ratio=jnp.where(is_good, found, 1),
            has_loss=is_good,
            loss=start,
            num_evaluations=trial - first,
        )

    def _rest(
        self,
        rate: jax.Array,
        known: jax.Array | None = None,
        slope: jax.typing.ArrayLike = 0.0,
    ) -> _Found:
        """In place of `_find`: between two searches, and when they have ended."""
        loss = jnp.zeros_like(rate) if known is None else known
        is_good = jnp.isfinite(slope) & jnp.isfinite(loss)
        return _Found(
            is_good=is_good,
            is_search=jnp.zeros((), bool),
            ratio=jnp.ones_like(rate),
            has_loss=is_good & (known is not None),
            loss=jnp.where(is_good, loss, 0),
            num_evaluations=jnp.zeros((), jnp.int32),
        )

    def _look(self, batch: _Batch, state: ControllerState) -> _Found:
        """Searches, if one is due at this step."""
        _, rate = self.controller.rates(state)
        known = None
        if batch.value is not None:
            known = batch.value.astype(rate.dtype)
            known += batch.decay_loss(batch.params, rate.dtype)
        slope = batch.slope(rate.dtype)
        is_due = state.step % jnp.asarray(self.search_interval, jnp.int32) == 0
        return jax.lax.cond(
            is_due,
            lambda: self._find(batch, rate, known, slope),
            lambda: self._rest(rate, known, slope),
        )

    def _smoothed(self, rate: jax.Array, ratio: jax.Array) -> jax.Array:
        """The next rate, (1 - gamma) * rate + gamma * ratio * rate, within its bounds.

        gamma is compounded: a search stands for the steps until the next.
        """
        dtype = rate.dtype
        interval = jnp.asarray(self.search_interval, dtype)
        kept = (1 - jnp.asarray(self.smoothing, dtype)) ** interval
        # Neither the rate nor its square may overflow or vanish.
        largest = float(jnp.finfo(dtype).max) ** 0.5
        most = largest if self.max_learning_rate is None else self.max_learning_rate
        smoothed = kept * rate + (1 - kept) * ratio * rate
        return jnp.clip(
            smoothed, jnp.asarray(1 / largest, dtype), jnp.asarray(most, dtype)
        )

    def _learn(
        self, state: ControllerState, found: _Found, steps_per_loss: jax.Array
    ) -> ControllerState:
        """Moves the rate towards the step size found, and judges the losses."""
        base, rate = self.controller.rates(state)
        search: LineSearchState = state.line_search
        count = search.num_evaluations + found.num_evaluations
        step_size = found.ratio * rate
        scale = self._smoothed(rate, found.ratio) / base
        search = search._replace(
            step_size=jnp.where(found.is_search, step_size, search.step_size),
            # The counter stays at its end rather than start again below zero.
            num_evaluations=jnp.where(count < 0, search.num_evaluations, count),
        )
        return state._replace(
            scale=jnp.where(found.is_search, scale, state.scale),
            line_search=self._judge_losses(search, state, found, steps_per_loss),
        )

    def _judge_losses(
        self,
        search: LineSearchState,
        state: ControllerState,
        found: _Found,
        steps_per_loss: jax.Array,
    ) -> LineSearchState:
        """Ends the search where the losses no longer fall."""
        if self.loss_test is None or search.losses is None:
            return search
        is_new = search.line_search_active & found.has_loss
        losses = _window.push(search.losses, found.loss[None], is_new)
        num_losses = self.controller.num_kept(losses)
        min_samples = self.controller.samples_needed(losses, state.num_drops)
        is_enough = (num_losses * steps_per_loss > min_samples) & (num_losses >= 4)
        is_due = is_new & is_enough
        step = jnp.asarray(optax.safe_increment(state.step))
        assert search.loss_test is not None
        result = test_if(
            is_due,
            self.loss_test,
            search.loss_test,
            losses,
            num_losses,
            step,
            state.num_drops,
        )
        ended = is_due & result.stationary
        return search._replace(
            line_search_active=search.line_search_active & ~ended,
            losses=losses,
            loss_test=result,
        )

    def _batch(
        self,
        updates: optax.Updates,
        params: optax.Params,
        grad: optax.Updates | None,
        value: jax.typing.ArrayLike | None,
        value_fn: Callable[..., Any] | None,
        coupled_decay: jax.typing.ArrayLike,
        extra_args: dict[str, Any],
    ) -> _Batch:
        if value_fn is None:
            raise ValueError(f"The line search needs `value_fn`: call {_CALL}")
        if grad is None:
            raise ValueError(f"The line search needs `grad`: call {_CALL}")
        along = updates if self.search_direction == "update" else None
        known = None if value is None else _loss("value", value)
        # The search is no part of what is differentiated; nor could a loop be.
        params, grad, along, known = jax.lax.stop_gradient((params, grad, along, known))
        own_arguments = _own_arguments(value_fn, extra_args)
        value_of = functools.partial(value_fn, **own_arguments)
        axis_name = self.controller.axis_name
        return _Batch(params, grad, along, value_of, known, coupled_decay, axis_name)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        # As the controller compiles itself: so that only what holds the user's own
        # function is compiled anew at every step that is not compiled.
        learn = jax.jit(self._learn)

        def update(
            updates: optax.Updates,
            state: ControllerState,
            params: optax.Params | None = None,
            *,
            grad: optax.Updates | None = None,
            value: jax.typing.ArrayLike | None = None,
            value_fn: Callable[..., Any] | None = None,
            coupled_decay: jax.typing.ArrayLike = 0.0,
            with_direction: bool = False,
            **extra_args: Any,
        ) -> tuple[optax.Updates, ControllerState]:
            params = _checks.params(params, "The line search")
            batch = self._batch(
                updates, params, grad, value, value_fn, coupled_decay, extra_args
            )
            rate = self.controller.rates(state)[1]
            found = jax.lax.cond(
                state.line_search.line_search_active,
                lambda: self._look(batch, state),
                lambda: self._rest(rate),
            )
            # Where losses come with searches only, each stands for the steps between.
            steps_per_loss = self.search_interval if value is None else 1
            state = learn(state, found, jnp.asarray(steps_per_loss, jnp.int32))
            num_drops = state.num_drops
            updates, direction, state = self.controller.step(
                updates, state, params, grad, value, found.is_good
            )
            # A drop ends the search.
            search: LineSearchState = state.line_search
            is_active = search.line_search_active & (state.num_drops == num_drops)
            search = search._replace(line_search_active=is_active)
            state = state._replace(line_search=search)
            return (updates, direction) if with_direction else updates, state

        return _types.transformation(self.init, update)
