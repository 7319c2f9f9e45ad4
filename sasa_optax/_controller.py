"""The controller: a sample a step, a window, a test now and then, maybe a drop.

Every optimizer that tests for stationarity ends in one. They differ in the statistic,
in the test, and in what made the direction.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from sasa_optax import (
    _checks,
    _cpu_schedule,
    _products,
    _stationarity,
    _tree,
    _types,
    _window,
)
from sasa_optax._statistics import Sample, Statistic, Transition
from sasa_optax._transformation import Optimizer, transformation
from sasa_optax._types import AxisName, DType, Numeric


class ControllerState(NamedTuple):
    """What a controller remembers: arrays only, of fixed shape and dtype.

    Attributes:
      step: steps taken, shape (), int32.
      learning_rate: the rate that the next step will use, shape (). It is a reading: to
        change the rate by hand, set ``scale``. None for `reduce_on_stationarity`, which
        does not know the rate that it scales.
      scale: what the drops have left of the given rate, shape ().
      num_drops: how often the rate was cut, shape (), int32.
      last_drop: the step of the newest drop, 0 before the first; shape (), int32.
      num_nonfinite: samples left out because they were not finite, shape (), int32.
      num_ascents: steps whose direction d pointed up the gradient g, so that
        <d, g> < 0; shape (), int32. They are counted behind other transformations,
        where ``update`` is given ``grad``; under a line search until that has ended.
        Noise makes ascents of some steps, a chain in the wrong order of nearly all.
      last_test: the newest `TestResult`. Its ``at_step`` is 0 before the first.
      next_test: the step of the next test, at the earliest: a sample that is left out
        delays it. Shape (), int32; None for `ssls`, which has no test.
      window: the `WindowState` of the samples since the last drop; None for `ssls`,
        which records nothing.
      statistic: the statistic's own state; ``()`` where it has none.

    Those without a dtype here are float32, or float64 where a parameter is.
    """

    step: jax.Array
    learning_rate: jax.Array | None
    scale: jax.Array
    num_drops: jax.Array
    last_drop: jax.Array
    num_nonfinite: jax.Array
    num_ascents: jax.Array
    last_test: _stationarity.TestResult
    next_test: jax.Array | None
    window: _window.WindowState | None
    statistic: Any


class ExtraArgs(NamedTuple):
    """What ``update`` was given beside the direction, its state and the parameters.

    Attributes:
      grad: the gradient without coupled weight decay, or None.
      value: the loss of the mini-batch, or None.
      weight_decay: the coupled decay that the direction contains.
      others: all other extra arguments.
      counts_ascents: whether the direction may be a wrong one, to be compared with
        ``grad``.
    """

    grad: optax.Updates | None
    value: Numeric | None
    weight_decay: Numeric
    others: dict[str, Any]
    counts_ascents: bool = False


Step = tuple[optax.Updates, optax.Updates, Any]


def count_if(happened: jax.Array, count: jax.Array) -> jax.Array:
    """The count, one higher if it happened; it stays at the end of int32."""
    return jnp.where(happened, optax.safe_increment(count), count)


class RateController(Protocol):
    """What turns directions into updates: a `Controller`, or a search before one."""

    state_type: ClassVar[type]

    def init(self, params: optax.Params) -> Any: ...

    def step(
        self, direction: Any, state: Any, params: optax.Params, extra: ExtraArgs
    ) -> Step:
        """The direction, the updates and the next state.

        The returned direction equals the argument. Keep the returned one, or XLA
        computes it twice.
        """
        ...

    def restarts_momentum(self, state: Any) -> jax.Array:
        """Whether momentum begins anew after the newest step, shape (), bool."""
        ...


def as_transformation(
    controller: RateController, scales_updates: bool = False
) -> Optimizer:
    """The controller behind other transformations, whose updates are its direction.

    With ``scales_updates`` they are complete: the direction is minus the updates, and
    what the controller calls the rate is their scale.
    """

    def shown(state: Any) -> Any:
        return state._replace(learning_rate=None) if scales_updates else state

    def init(params: optax.Params) -> Any:
        return shown(controller.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params,
        *,
        grad: optax.Updates | None = None,
        value: Numeric | None = None,
        **others: Any,
    ) -> tuple[optax.Updates, Any]:
        direction = _tree.scale(-1.0, updates) if scales_updates else updates
        grad = _masked_as(updates, grad)
        extra = ExtraArgs(grad, value, 0.0, others, counts_ascents=grad is not None)
        _, updates, state = controller.step(direction, state, params, extra)
        return updates, shown(state)

    return transformation(init, update, controller.state_type)


def _masked_as(
    updates: optax.Updates, grad: optax.Updates | None
) -> optax.Updates | None:
    """The gradient of what is updated. `optax.masked` hides the rest of the updates."""
    if grad is None:
        return None

    def seen(u: Any, g: Any) -> Any:
        return u if _types.is_masked(u) else g

    return jax.tree.map(seen, updates, grad, is_leaf=_types.is_masked)


@dataclasses.dataclass(kw_only=True, eq=False)
class Controller:
    """Turns a direction d into the update -learning_rate * d, and cuts the rate.

    Attributes:
      learning_rate: a number or a schedule.
      min_learning_rate: the drops do not take the rate below it.
      factor: what a drop multiplies the rate by.
      statistic: what is recorded at each step.
      test: what judges the samples; None to record nothing and never drop.
      window: which samples the test sees.
      axis_name: the mesh axes over which the trees are sharded.
    """

    learning_rate: optax.ScalarOrSchedule
    min_learning_rate: Numeric = 0.0
    factor: Numeric = 0.1
    statistic: Statistic | None = None
    test: _stationarity.StationarityTest | None = None
    window: _window.Window = _window.Window()
    axis_name: AxisName = None
    state_type: ClassVar[type] = ControllerState

    def __post_init__(self) -> None:
        _checks.learning_rate(self.learning_rate, allow_schedule=True)
        _checks.fields(self, min_learning_rate="[0, inf)", factor="(0, 1)")
        _checks.axis_name(self.axis_name)
        # For callers who do not compile their step: without this, the conditional in it
        # would be traced and compiled at every step.
        self._compiled = jax.jit(self._advance)

    def _base_rate(self, step: jax.Array, dtype: DType) -> jax.Array:
        rate = self.learning_rate
        value = rate(step) if callable(rate) else rate
        return _checks.scalar("learning_rate", value, dtype)

    def _rate(self, base: jax.Array, scale: jax.Array) -> jax.Array:
        # A schedule may go below the floor by itself; the drops may not.
        floor = jnp.asarray(self.min_learning_rate, base.dtype)
        return jnp.maximum(base * scale, jnp.minimum(base, floor))

    def rates(self, state: ControllerState) -> tuple[jax.Array, jax.Array]:
        """The rate of the next step, without and with the scale."""
        base = self._base_rate(state.step, state.scale.dtype)
        return base, self._rate(base, state.scale)

    def init(self, params: optax.Params) -> ControllerState:
        dtype, zero = _tree.statistic_dtype(params), jnp.zeros((), jnp.int32)
        window, next_test, statistic = None, None, ()
        if self.statistic is not None and self.test is not None:
            window = _window.empty(2, self.window.max_window, dtype)
            next_test = self.window.next_test(zero, zero, zero, self.factor)
            statistic = self.statistic.init(params)
        return ControllerState(
            step=zero,
            learning_rate=self._base_rate(zero, dtype),
            scale=jnp.ones((), dtype),
            num_drops=jnp.copy(zero),
            last_drop=jnp.copy(zero),
            num_nonfinite=jnp.copy(zero),
            num_ascents=jnp.copy(zero),
            last_test=_stationarity.no_result(dtype),
            next_test=next_test,
            window=window,
            statistic=statistic,
        )

    def restarts_momentum(self, state: ControllerState) -> jax.Array:
        return (state.last_drop == state.step) & (state.step > 0)

    def step(
        self,
        direction: optax.Updates,
        state: ControllerState,
        params: optax.Params,
        extra: ExtraArgs,
        is_good: Numeric = True,
    ) -> Step:
        """See `RateController`. Nothing is recorded of a step that is not good."""
        base, rate = self.rates(state)
        row = jnp.zeros((0,), state.scale.dtype)
        if self.test is not None:
            direction, row, state = self._sample(direction, state, params, extra, rate)
        updates = _tree.scale(-rate, direction)
        return direction, updates, self._compiled(state, row, is_good, base, rate)

    def _sample(
        self,
        direction: optax.Updates,
        state: ControllerState,
        params: optax.Params,
        extra: ExtraArgs,
        rate: jax.Array,
    ) -> tuple[optax.Updates, jax.Array, ControllerState]:
        """The direction to keep, the sample as a row, and what is remembered of it."""
        recorded, dtype = self.statistic, rate.dtype
        assert recorded is not None
        expected = jax.tree.leaves(jax.eval_shape(recorded.init, params))
        if len(expected) != len(jax.tree.leaves(state.statistic)):
            raise ValueError(
                f"The state is not that of the statistic {recorded!r}: begin with "
                "`state = optimizer.init(params)`."
            )

        def transition(direction: Any, params: Any, grad: Any) -> Transition:
            updates = _tree.scale(-rate, direction)
            return Transition(
                params=params,
                # XLA merges this with the caller's own computation of the same.
                new_params=optax.apply_updates(params, updates),
                direction=direction,
                grad=direction if grad is None else grad,
                learning_rate=rate,
                value=extra.value,
                axis_name=self.axis_name,
            )

        def products(direction: Any, others: Any) -> _cpu_schedule.Rows:
            params, grad, own = others
            pairs = list(recorded.pairs(transition(direction, params, grad), own))
            if extra.counts_ascents:
                pairs.append((direction, grad))
            return _products.leaf_products(pairs, dtype, self.axis_name)

        others = params, extra.grad, state.statistic
        direction, rows = _cpu_schedule.in_groups(
            direction, others, products, state.step, dtype
        )
        found = list(map(_products.total, rows))
        if extra.counts_ascents:
            num_ascents = count_if(found.pop() < 0, state.num_ascents)
            state = state._replace(num_ascents=num_ascents)
        whole = transition(direction, params, extra.grad)
        sample, statistic = recorded.sample(found, whole, state.statistic)
        if not isinstance(sample, Sample):
            raise TypeError(
                f"statistic must return a Sample, got {sample!r} from {recorded!r}."
            )
        value = _checks.scalar("Sample.value", sample.value, dtype)
        scale = _checks.scalar("Sample.scale", sample.scale, dtype)
        row = jnp.stack([value, scale])
        return direction, row, state._replace(statistic=statistic)

    def _advance(
        self,
        state: ControllerState,
        row: jax.Array,
        is_good: jax.Array,
        base: jax.Array,
        rate: jax.Array,
    ) -> ControllerState:
        """Puts a sample into the window; a test and a drop may follow."""
        row = jax.lax.stop_gradient(row)
        is_good &= jnp.all(jnp.isfinite(row))
        state = state._replace(
            step=optax.safe_increment(state.step),
            num_nonfinite=count_if(~is_good, state.num_nonfinite),
        )
        if state.window is not None:
            self.window.check(state.window)
            window = _window.push(state.window, row, is_good)
            state, has_fired = self._judge(state._replace(window=window), is_good)
            state = self._maybe_cut(state, has_fired, base, rate)
            assert state.window is not None
            next_test = self.window.next_test(
                state.step, state.window.total, state.num_drops, self.factor
            )
            state = state._replace(next_test=next_test)
        return state._replace(learning_rate=self.rates(state)[1])

    def _judge(
        self, state: ControllerState, is_good: jax.Array
    ) -> tuple[ControllerState, jax.Array]:
        """The state with the newest test, and whether that fired at this step."""
        window, options = state.window, self.window
        assert self.test is not None
        assert window is not None
        num_samples = options.num_kept(window)
        interval = jnp.asarray(options.test_interval, jnp.int32)
        is_testing = jax.lax.rem(state.step, interval) == 0
        needed = options.samples_needed(state.num_drops, self.factor)
        is_due = is_good & is_testing & (num_samples > needed)
        result = _stationarity.judge_if(
            is_due,
            state.last_test,
            *(self.test, window, num_samples, state.step, state.num_drops),
        )
        is_warm = state.step > jnp.asarray(options.warmup_steps, jnp.int32)
        return state._replace(last_test=result), is_due & result.stationary & is_warm

    def _maybe_cut(
        self,
        state: ControllerState,
        has_fired: jax.Array,
        base: jax.Array,
        rate: jax.Array,
    ) -> ControllerState:
        """Cuts the rate and empties the window where a test has fired."""
        assert state.window is not None
        dtype = state.scale.dtype
        floor = jnp.asarray(self.min_learning_rate, dtype)
        # At its floor the rate cannot drop, and there is no reason to empty the window.
        drop = has_fired & (rate > floor)
        min_scale = floor / jnp.where(drop, base, 1)
        cut = jnp.maximum(jnp.asarray(self.factor, dtype) * state.scale, min_scale)
        return state._replace(
            scale=jnp.where(drop, cut, state.scale),
            num_drops=state.num_drops + drop.astype(jnp.int32),
            last_drop=jnp.where(drop, state.step, state.last_drop),
            window=_window.clear(state.window, drop),
        )
