"""A smoothed line search on the mini-batch's loss, in front of a controller.

The search changes the scale that the controller applies. It ends for good when the loss
stops falling, or when the controller cuts the rate.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import (
    _checks,
    _decay,
    _epochs,
    _products,
    _stationarity,
    _tree,
    _types,
    _window,
)
from sasa_optax._controller import (
    Controller,
    ControllerState,
    ExtraArgs,
    Step,
    count_if,
)
from sasa_optax._types import AxisName, DType, Numeric

_SUFFICIENT_DECREASE = {"gradient": 0.05, "update": 0.45}
# Where the loss falls without end, as on separable data, every trial is accepted. The
# direction of Adam shrinks meanwhile, and the rate makes up for it. When the direction
# has its usual size again, the step would be enormous.
_MOST_ALONG_UPDATE = 100

_CALL = (
    "`updates, state = optimizer.update(grads, state, params, grad=grads, "
    "value_fn=value_fn)`, where `value_fn(params)` is the loss of this mini-batch. "
    "Flax's `TrainState.apply_gradients` and NumPyro's `SVI` do not pass `value_fn` on."
)

_MASKED = (
    "value_fn has failed on masked parameters: `optax.masked` and `optax.partition` "
    "put an `optax.MaskedNode` in place of those that they hide. Let value_fn fill "
    "these in, as docs/everywhere.md shows, or make the line search the outermost."
)


@_types.options("direction", "batch_axis_name")
class LineSearch:
    r"""How `ssls` and `salsa` search for the rate.

    A search looks along a descent vector p for a step size :math:`\eta` that satisfies
    Armijo's condition on the mini-batch at hand, with loss f and gradient g,

    .. math::

      f(x_k - \eta p) \le f(x_k) - c\,\eta\,\langle g, p\rangle.

    It starts at ``increase_factor`` times the rate, and multiplies by
    ``decrease_factor`` after each of at most ``max_trials`` failures. Where p is no
    descent direction, it takes ``decrease_factor`` times the rate. The rate then moves
    towards the result, :math:`\alpha \leftarrow (1 - \gamma)\,\alpha + \gamma\,\eta`,
    so many mini-batches vote on it and none decides. Where :math:`f(x_k)` is not
    finite, the rate is multiplied by ``decrease_factor`` at once.

    Attributes:
      smoothing: gamma, in (0, 1]. Default None: 0.1, or :math:`1/\sqrt{S}` for S
        ``steps_per_epoch``.
      sufficient_decrease: c, in (0, 1). Towards 0.5 the rates found are smaller.
        Default None: 0.05 along the gradient, as in the paper, and 0.45 along an
        update. Adam's update fits the mini-batch so well that with 0.05 the rate runs
        away.
      increase_factor: in [1, inf). Default 2.0.
      decrease_factor: in (0, 1). Default 0.5.
      max_trials: evaluations of a trial point in a search, at least 1. Default 2.
      direction: p. ``"gradient"`` is the gradient with coupled weight decay, or after
        clipping the clipped one, as in the paper. ``"update"`` is the direction that
        arrives from the chain. Take it after `optax.scale_by_adam` and the like, since
        the scale of the gradient says nothing about that of the update. Default
        "gradient".
      interval: steps between searches, at least 1; gamma is compounded to
        :math:`1 - (1 - \gamma)^m`. Between searches `salsa` records a loss if ``value``
        is given; if not, each recorded loss counts for this many. Default 1.
      max_learning_rate: the highest rate, in (0, inf). Default None: there is no bound
        along the gradient. Along an update it is 100 times the rate to start from. From
        1e-3 that is 0.1, which is high for Adam, whose directions have entries of about
        one. Directions of another scale, such as those of momentum or of L-BFGS, may
        need more.
      batch_axis_name: the axis of `jax.pmap` or `jax.shard_map`, or a tuple of them,
        over which the examples of a mini-batch are spread, so that each device has a
        loss of its own. The search averages the losses over it, and all devices find
        the same rate. Average the gradients over it yourself. Default None: every
        device has the loss of all examples.
      loss_test: the `SlopeTest` of the losses, which ends the search of `salsa` when
        they no longer fall. The search of `ssls` never ends. Default ``SlopeTest()``.

    Raises:
      ValueError: at construction, if a field is out of range.

    Example:
      >>> import sasa_optax
      >>> search = sasa_optax.LineSearch(max_trials=4, max_learning_rate=10.0)
      >>> optimizer = sasa_optax.salsa(search=search)
    """

    smoothing: Numeric | None = None
    sufficient_decrease: Numeric | None = None
    increase_factor: Numeric = 2.0
    decrease_factor: Numeric = 0.5
    max_trials: Numeric = 2
    direction: Literal["gradient", "update"] = "gradient"
    interval: Numeric = 1
    max_learning_rate: Numeric | None = None
    batch_axis_name: AxisName = None
    loss_test: _stationarity.SlopeTest = _stationarity.SlopeTest()

    def __post_init__(self) -> None:
        _checks.choice("direction", self.direction, _SUFFICIENT_DECREASE)
        _checks.axis_name(self.batch_axis_name, "batch_axis_name")
        _checks.instance("loss_test", self.loss_test, _stationarity.SlopeTest)
        _checks.fields(
            self,
            smoothing="(0, 1]",
            sufficient_decrease="(0, 1)",
            increase_factor="[1, inf)",
            decrease_factor="(0, 1)",
            max_trials=1,
            interval=1,
            max_learning_rate="(0, inf)",
        )

    def resolved(
        self, steps_per_epoch: int | None, learning_rate: Numeric
    ) -> "LineSearch":
        """The search from this rate, with its defaults filled in."""
        is_along_update = self.direction == "update"
        most = _MOST_ALONG_UPDATE * learning_rate if is_along_update else None
        return _types.with_defaults(
            self,
            smoothing=_epochs.defaults(steps_per_epoch).smoothing,
            sufficient_decrease=_SUFFICIENT_DECREASE[self.direction],
            max_learning_rate=most,
        )

    def smoothed(self, rate: jax.Array, ratio: jax.Array) -> jax.Array:
        """(1 - gamma) * rate + gamma * ratio * rate, within the bounds of the rate."""
        dtype = rate.dtype
        interval = jnp.asarray(self.interval, dtype)
        # gamma is compounded, as a search stands for the steps until the next.
        kept = (1 - jnp.asarray(self.smoothing, dtype)) ** interval
        return self.bounded(kept * rate + (1 - kept) * ratio * rate)

    def bounded(self, rate: jax.Array) -> jax.Array:
        # Neither the rate nor its square may overflow or vanish.
        largest = float(jnp.finfo(rate.dtype).max) ** 0.5
        most = largest if self.max_learning_rate is None else self.max_learning_rate
        least, most = (jnp.asarray(x, rate.dtype) for x in (1 / largest, most))
        return jnp.clip(rate, least, most)


class LineSearchState(NamedTuple):
    """What a line search remembers, with the state of its controller.

    Attributes:
      line_search_active: whether the search goes on, shape (), bool.
      is_lost: whether the loss, the gradient or the sample of the newest step was not
        finite; shape (), bool.
      step_size: eta, what the newest search found on its mini-batch, before smoothing;
        shape (), float32, or float64 where a parameter is.
      num_evaluations: evaluations of ``value_fn`` since the start; shape (), int32.
      losses: the `WindowState` of the mini-batches' losses since the start; None for
        `ssls`, which never ends.
      loss_test: the newest `TestResult` of the slope of the losses; None for `ssls`.
      controller: the `ControllerState`.
    """

    line_search_active: jax.Array
    is_lost: jax.Array
    step_size: jax.Array
    num_evaluations: jax.Array
    losses: _window.WindowState | None
    loss_test: _stationarity.TestResult | None
    controller: ControllerState


class _Found(NamedTuple):
    """What a step learnt from its mini-batch; scalars.

    Attributes:
      is_good: False if f(x_k) or the slope is not finite: such a step says nothing.
      is_ascent: whether the direction pointed up the gradient.
      is_lost: whether f(x_k) is known, and not finite.
      is_search: whether a step size was searched for, and found.
      ratio: that step size over the rate.
      has_loss: whether f(x_k) is known, and the step a good one.
      loss: f(x_k), or zero.
      num_evaluations: evaluations of the loss.
    """

    is_good: jax.Array
    is_ascent: jax.Array
    is_lost: jax.Array
    is_search: jax.Array
    ratio: jax.Array
    has_loss: jax.Array
    loss: jax.Array
    num_evaluations: jax.Array

    @classmethod
    def nothing(cls, rate: jax.Array) -> "_Found":
        no, zero = jnp.zeros((), bool), jnp.zeros_like(rate)
        return cls(~no, no, no, no, zero + 1, no, zero, jnp.zeros((), jnp.int32))


class _Objective(NamedTuple):
    """The loss of the mini-batch along a line, with coupled weight decay.

    Attributes:
      at: f(x_k - eta p) and its rounding error, as a function of the step size eta.
      slope: <g, p>, which is positive where the loss decreases; shape ().
      is_ascent: whether <g, d> is negative for the direction d; shape (), bool.
      value: f(x_k), shape (), or None where it has to be evaluated.
    """

    at: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    slope: jax.Array
    is_ascent: jax.Array
    value: jax.Array | None


def _own_arguments(
    value_fn: Callable[..., Any], extra_args: dict[str, Any]
) -> dict[str, Any]:
    """The extra arguments that ``value_fn`` takes by name."""
    kinds = inspect.Parameter
    parameters = list(inspect.signature(value_fn).parameters.values())
    by_name = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    # The first parameter takes x, whatever its name.
    named = {p.name for p in parameters[1:] if p.kind in by_name}
    names = extra_args.keys() & named
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        names = extra_args.keys() - ({p.name for p in parameters} - named)
    return {name: extra_args[name] for name in names}


def _evaluated(
    value_fn: Callable[..., Any], params: optax.Params, arguments: dict[str, Any]
) -> jax.Array:
    try:
        loss = value_fn(params, **arguments)
    except Exception as error:
        nodes = jax.tree.leaves(params, is_leaf=_types.is_masked)
        if any(map(_types.is_masked, nodes)):
            raise ValueError(_MASKED) from error
        raise
    return _checks.loss("value_fn's result", loss)


@dataclasses.dataclass(eq=False)
class SearchingController:
    """Finds the rate that a `Controller` then cuts.

    If the controller has a test, the search ends when the losses no longer fall, or
    when the controller cuts the rate.
    """

    search: LineSearch
    controller: Controller
    state_type: ClassVar[type] = LineSearchState

    def __post_init__(self) -> None:
        if (most := self.search.max_learning_rate) is not None:
            for name in ("learning_rate", "min_learning_rate"):
                least = getattr(self.controller, name)
                _checks.exceeds("max_learning_rate", most, name, least)
        # As in the controller. If callers do not compile their step, only the part with
        # their own function is compiled at every step.
        self._compiled = jax.jit(self._learn)

    def init(self, params: optax.Params) -> LineSearchState:
        controller = self.controller.init(params)
        dtype, ends = controller.scale.dtype, self.controller.test is not None
        losses = _window.empty(1, self.controller.window.max_window, dtype)
        return LineSearchState(
            line_search_active=jnp.ones((), bool),
            is_lost=jnp.zeros((), bool),
            step_size=jnp.zeros((), dtype),
            num_evaluations=jnp.zeros((), jnp.int32),
            losses=losses if ends else None,
            loss_test=_stationarity.no_result(dtype) if ends else None,
            controller=controller,
        )

    def restarts_momentum(self, state: LineSearchState) -> jax.Array:
        return state.is_lost | self.controller.restarts_momentum(state.controller)

    def step(
        self,
        direction: optax.Updates,
        state: LineSearchState,
        params: optax.Params,
        extra: ExtraArgs,
    ) -> Step:
        """See `RateController`."""
        extra = self._checked(extra)
        base, rate = self.controller.rates(state.controller)
        found = jax.lax.cond(
            state.line_search_active,
            lambda: self._look(direction, state, params, extra, rate),
            lambda: _Found.nothing(rate),
        )
        # Where losses come with searches only, each stands for the steps between.
        steps_per_loss = self.search.interval if extra.value is None else 1
        state = self._compiled(state, found, base, rate, steps_per_loss)
        before = state.controller
        direction, updates, after = self.controller.step(
            direction,
            before,
            params,
            extra._replace(counts_ascents=False),
            found.is_good,
        )
        goes_on = state.line_search_active & (after.num_drops == before.num_drops)
        state = state._replace(
            line_search_active=goes_on,
            is_lost=after.num_nonfinite > before.num_nonfinite,
            controller=after,
        )
        return direction, updates, state

    def _checked(self, extra: ExtraArgs) -> ExtraArgs:
        value_fn = extra.others.get("value_fn")
        if value_fn is None:
            functions = [name for name, x in extra.others.items() if callable(x)]
            hint = f" Did you mean {functions[0]!r}?" if functions else ""
            raise ValueError(f"The line search needs `value_fn`: call {_CALL}{hint}")
        if not callable(value_fn):
            raise ValueError(
                "value_fn must be a function from parameters to the loss, got "
                f"{value_fn!r}."
            )
        if extra.grad is None:
            raise ValueError(f"The line search needs `grad`: call {_CALL}")
        if extra.value is None:
            return extra
        return extra._replace(value=_checks.loss("value", extra.value))

    def _objective(
        self,
        direction: optax.Updates,
        params: optax.Params,
        extra: ExtraArgs,
        dtype: DType,
    ) -> _Objective:
        # The search is no part of what is differentiated, nor can its loop be.
        given: Any = (direction, params, extra.grad, extra.value)
        direction, params, grad, value = jax.lax.stop_gradient(given)
        decay, axis_name = extra.weight_decay, self.controller.axis_name
        others = dict(extra.others)
        value_fn = others.pop("value_fn")
        own_arguments = _own_arguments(value_fn, others)

        def regularized(loss: jax.Array, params: optax.Params) -> jax.Array:
            if self.search.batch_axis_name is not None:
                loss = jax.lax.pmean(loss, self.search.batch_axis_name)
            penalty = _decay.regularizer(decay, params, dtype, axis_name)
            # A traced decay must not make the loop a part of what is differentiated.
            return jax.lax.stop_gradient(loss.astype(dtype) + penalty)

        def at(step_size: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Zero times what is not finite would hide f(x_k).
            moves = step_size > 0
            along = jax.tree.map(lambda p: jnp.where(moves, p, 0), descent)
            new = optax.apply_updates(params, _tree.scale(-step_size, along))
            loss = _evaluated(value_fn, new, own_arguments)
            rounding = float(jnp.finfo(loss.dtype).eps) * jnp.abs(loss)
            return regularized(loss, new), rounding.astype(dtype)

        grad = _decay.decayed_grads(grad, decay, params)
        descent = direction if self.search.direction == "update" else grad
        pairs = [(grad, descent)]
        if extra.counts_ascents:
            pairs.append((grad, direction))
        slopes = _products.inner_products(pairs, dtype, axis_name)
        return _Objective(
            at=at,
            slope=slopes[0],
            is_ascent=slopes[-1] < 0,
            value=None if value is None else regularized(value, params),
        )

    def _look(
        self,
        direction: optax.Updates,
        state: LineSearchState,
        params: optax.Params,
        extra: ExtraArgs,
        rate: jax.Array,
    ) -> _Found:
        """Searches, if a search is due at this step."""
        objective = self._objective(direction, params, extra, rate.dtype)
        interval = jnp.asarray(self.search.interval, jnp.int32)
        is_due = jax.lax.rem(state.controller.step, interval) == 0
        return self._find(objective, rate, is_due)

    def _find(
        self, objective: _Objective, rate: jax.Array, is_due: jax.Array
    ) -> _Found:
        """Tries step sizes from increase_factor * rate down, until one is accepted.

        There is one loop, so that the loss is compiled once. Its pass 0 evaluates
        f(x_k), and is left out where that is known. Pass n is the n-th trial. If no
        search is due, the loop makes no pass.
        """
        dtype, slope, known = rate.dtype, objective.slope, objective.value
        increase = jnp.asarray(self.search.increase_factor, dtype)
        decrease = jnp.asarray(self.search.decrease_factor, dtype)
        required = jnp.asarray(self.search.sufficient_decrease, dtype)
        is_descent = jnp.isfinite(slope) & (slope > 0)

        def ratio(trial: jax.Array) -> jax.Array:
            return increase * decrease ** (trial - 1).astype(dtype)

        def goes_on(carry: tuple[jax.Array, ...]) -> jax.Array:
            trial, _, is_known, accepted = carry
            is_left = trial <= jnp.asarray(self.search.max_trials, jnp.int32)
            return is_due & (
                (trial == 0) | (is_known & is_descent & is_left & ~accepted)
            )

        def one_pass(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            trial, start, is_known, _ = carry
            is_start = trial == 0
            step_size = jnp.where(is_start, 0, ratio(trial) * rate)
            loss, rounding = objective.at(step_size)
            is_finite = jnp.isfinite(loss)
            # A rise within the rounding error of the loss is none.
            bound = start - required * step_size * slope + rounding
            accepted = ~is_start & is_finite & (loss <= bound)
            start = jnp.where(is_start & is_finite, loss, start)
            return trial + 1, start, is_known & (is_finite | ~is_start), accepted

        loss = jnp.zeros((), dtype) if known is None else known
        first = jnp.asarray(0 if known is None else 1, jnp.int32)
        is_known = jnp.isfinite(loss)
        start = jnp.where(is_known, loss, 0)
        trial, start, is_known, accepted = jax.lax.while_loop(
            goes_on, one_pass, (first, start, is_known, jnp.zeros((), bool))
        )
        is_good = is_known & jnp.isfinite(slope)
        # An accepted trial was the pass before. Otherwise the next is taken untried.
        found = ratio(jnp.where(accepted, trial - 1, trial))
        found = jnp.where(is_descent, found, decrease)
        return _Found(
            is_good=is_good,
            is_ascent=objective.is_ascent,
            is_lost=~is_known,
            is_search=is_due & is_good,
            ratio=jnp.where(is_due & is_good, found, 1),
            has_loss=is_good & (is_due | (known is not None)),
            loss=start,
            num_evaluations=trial - first,
        )

    def _learn(
        self,
        state: LineSearchState,
        found: _Found,
        base: jax.Array,
        rate: jax.Array,
        steps_per_loss: jax.Array,
    ) -> LineSearchState:
        """Moves the rate towards the step size found, and judges the losses."""
        count = state.num_evaluations + found.num_evaluations
        moved = self.search.smoothed(rate, found.ratio) / base
        scale = jnp.where(found.is_search, moved, state.controller.scale)
        decrease = jnp.asarray(self.search.decrease_factor, rate.dtype)
        fallen = self.search.bounded(decrease * rate) / base
        controller = state.controller._replace(
            scale=jnp.where(found.is_lost, fallen, scale),
            num_ascents=count_if(found.is_ascent, state.controller.num_ascents),
        )
        step_size = jnp.where(found.is_search, found.ratio * rate, state.step_size)
        state = state._replace(
            step_size=step_size,
            # The counter stays at its end instead of restarting below zero.
            num_evaluations=jnp.where(count < 0, state.num_evaluations, count),
            controller=controller,
        )
        if state.losses is None:
            return state
        return self._judge_losses(state, found, steps_per_loss)

    def _judge_losses(
        self, state: LineSearchState, found: _Found, steps_per_loss: jax.Array
    ) -> LineSearchState:
        """Ends the search where the losses no longer fall."""
        assert state.losses is not None
        window, controller = self.controller.window, state.controller
        window.check(state.losses)
        is_new = state.line_search_active & found.has_loss
        losses = _window.push(state.losses, found.loss[None], is_new)
        num_losses, num_drops = window.num_kept(losses), controller.num_drops
        needed = window.samples_needed(num_drops, self.controller.factor)
        is_enough = (num_losses * steps_per_loss > needed) & (num_losses >= 4)
        step = jnp.asarray(optax.safe_increment(controller.step))
        assert state.loss_test is not None
        result = _stationarity.judge_if(
            is_new & is_enough,
            state.loss_test,
            *(self.search.loss_test, losses, num_losses, step, num_drops),
        )
        has_ended = is_new & is_enough & result.stationary
        return state._replace(
            line_search_active=state.line_search_active & ~has_ended,
            losses=losses,
            loss_test=result,
        )


def searching(
    controller: Controller, search: LineSearch, steps_per_epoch: int | None
) -> SearchingController:
    _checks.instance("search", search, LineSearch)
    start: Any = controller.learning_rate
    _checks.learning_rate(start, allow_schedule=False)
    return SearchingController(search.resolved(steps_per_epoch, start), controller)
