"""The controller: sample, window, every test_interval a test, maybe a drop.

Every optimizer of this library ends in one. They differ in the statistic, in the test,
and in what made the direction.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _average, _checks, _tree, _types, _window
from sasa_optax._conditional import cond
from sasa_optax._stationarity import Samples, StationarityTest, TestResult
from sasa_optax._statistics import (
    Sample,
    Statistic,
    Transition,
    master_pairs,
    master_statistic,
)

_DEFAULT_MIN_SAMPLES = 1000
_DEFAULT_TEST_INTERVAL = 100
# With steps_per_epoch both are one epoch, within these limits. Below the lower one a
# test has some ten batches to estimate a variance from, and says nothing.
_FEWEST_PER_EPOCH, _MOST_PER_EPOCH = 100, 1000
# A centre over less than the newest half follows the drift that it is to show.
_CENTRE_LEAK_RATIO = 2


class ControllerState(NamedTuple):
    """What a controller remembers: arrays only, of fixed shape and dtype.

    Attributes:
      step: steps taken, shape (), int32.
      learning_rate: the rate that the next step will use, shape (). It is a reading:
        to change the rate by hand, set ``scale``. None for `reduce_on_stationarity`,
        which does not know the rate that it scales.
      scale: what the drops have left of the given rate, shape ().
      num_drops: how often the rate was cut, shape (), int32.
      num_nonfinite: samples left out because they were not finite, shape (), int32.
      last_test: the newest `TestResult`; its step is 0 before the first.
      window: the samples since the last drop; None for `ssls`, which records nothing.
      line_search: the `LineSearchState` of `ssls` and `salsa`; None for all others.
      average: the `AverageState` that `averaged_params` returns; None without
        ``average=True``.
      centre: the `AverageState` that a centred statistic measures from, over the newest
        half of the iterates; None for all other statistics, and where ``average`` is
        over the newest half itself.

    Those without a dtype here are float32, or float64 where a parameter is.
    """

    step: jax.Array
    learning_rate: jax.Array | None
    scale: jax.Array
    num_drops: jax.Array
    num_nonfinite: jax.Array
    last_test: TestResult
    window: _window.Window | None
    line_search: Any = None
    average: _average.AverageState | None = None
    centre: _average.AverageState | None = None


def _defaults(steps_per_epoch: int | None) -> tuple[int, int]:
    """Of min_samples and test_interval."""
    if steps_per_epoch is None:
        return _DEFAULT_MIN_SAMPLES, _DEFAULT_TEST_INTERVAL
    steps = _checks.static_integer("steps_per_epoch", steps_per_epoch, 1)
    epoch = min(_MOST_PER_EPOCH, max(_FEWEST_PER_EPOCH, steps))
    return epoch, epoch


def _scalar(name: str, value: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    array = jnp.asarray(value)
    if array.shape:
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}.")
    return array.astype(dtype)


def no_test_yet(dtype: jax.typing.DTypeLike) -> TestResult:
    return TestResult(
        step=jnp.zeros((), jnp.int32),
        mean=jnp.zeros((), dtype),
        lower=jnp.zeros((), dtype),
        upper=jnp.zeros((), dtype),
        p_value=jnp.ones((), dtype),
        num_samples=jnp.zeros((), jnp.int32),
        stationary=jnp.zeros((), bool),
    )


def run_test(
    test: StationarityTest,
    window: _window.Window,
    num_samples: jax.Array,
    step: jax.Array,
    num_drops: jax.Array,
) -> TestResult:
    """What the test says of the newest ``num_samples``, as the state keeps it."""
    rows = _window.contents(window, num_samples)
    scales = rows[1] if len(rows) == 2 else None
    result = test(Samples(rows[0], scales, num_samples, step, num_drops))
    if not isinstance(result, TestResult):
        raise TypeError(f"test must return a TestResult, got {result!r} from {test!r}.")
    floats = {
        name: _scalar(f"TestResult.{name}", getattr(result, name), rows.dtype)
        for name in ("mean", "lower", "upper", "p_value")
    }
    # A result that is not finite says nothing, and is kept out of the state.
    is_finite = jnp.all(jnp.isfinite(jnp.stack(list(floats.values()))))
    stationary = _scalar("TestResult.stationary", result.stationary, bool)
    return TestResult(
        step=step,
        num_samples=num_samples,
        stationary=is_finite & stationary,
        **{name: jnp.nan_to_num(x) for name, x in floats.items()},
    )


def test_if(
    is_due: jax.Array,
    test: StationarityTest,
    last_test: TestResult,
    *arguments: Any,
) -> TestResult:
    """The newest test: `run_test` of these arguments if one is due, else the last."""
    return cond(
        is_due,
        lambda last_test, *arguments: run_test(test, *arguments),
        lambda last_test, *arguments: last_test,
        last_test,
        *arguments,
    )


@dataclasses.dataclass(kw_only=True, eq=False)
class Controller:
    """Turns a direction d into the update -learning_rate * d, and tends the rate.

    The arguments are those of `scale_by_sasa_plus`, where they are described. Without a
    test nothing is recorded, and the rate never drops.
    """

    learning_rate: optax.ScalarOrSchedule
    statistic: Statistic = master_statistic
    test: StationarityTest | None = None
    factor: jax.typing.ArrayLike = 0.1
    leak_ratio: jax.typing.ArrayLike = 8
    min_samples: jax.typing.ArrayLike | None = None
    test_interval: jax.typing.ArrayLike | None = None
    steps_per_epoch: int | None = None
    warmup_steps: jax.typing.ArrayLike = 0
    max_window: int = 16384
    min_learning_rate: jax.typing.ArrayLike = 0.0
    scale_min_samples: bool = False
    axis_name: str | tuple[str, ...] | None = None
    average: bool = False

    def __post_init__(self) -> None:
        _checks.learning_rate(self.learning_rate, allow_schedule=True)
        _checks.function("statistic", self.statistic, "from Transition to Sample")
        if self.test is not None:
            _checks.function("test", self.test, "from Samples to TestResult")
        _checks.number("factor", self.factor, "(0, 1)")
        _checks.integer("leak_ratio", self.leak_ratio, 1)
        _checks.integer("warmup_steps", self.warmup_steps, 0)
        _checks.integer("max_window", self.max_window, 5)
        _checks.number("min_learning_rate", self.min_learning_rate, "[0, inf)")
        _checks.boolean("scale_min_samples", self.scale_min_samples)
        _checks.axis_name("axis_name", self.axis_name)
        _checks.boolean("average", self.average)
        min_samples, test_interval = _defaults(self.steps_per_epoch)
        if self.min_samples is None:
            self.min_samples = min_samples
        if self.test_interval is None:
            self.test_interval = test_interval
        _checks.integer("min_samples", self.min_samples, 4)
        _checks.integer("test_interval", self.test_interval, 1)
        _checks.exceeds("max_window", self.max_window, "min_samples", self.min_samples)
        # Compiled here for those who do not compile their step: traced anew at every
        # step, the conditional in it would be compiled anew as well.
        self._compiled = jax.jit(self._advance)

    @property
    def _width(self) -> int:
        # A test that does not say what it uses is given all there is.
        return 2 if getattr(self.test, "uses_scale", True) else 1

    @property
    def _uses_centre(self) -> bool:
        return getattr(self.statistic, "uses_centre", False)

    @property
    def _has_centre(self) -> bool:
        """One of its own: an average over the newest half serves as well."""
        ratio = self.leak_ratio
        is_half = isinstance(ratio, int) and ratio == _CENTRE_LEAK_RATIO
        return self._uses_centre and not (self.average and is_half)

    def _base_rate(self, step: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        rate = self.learning_rate
        return _scalar("learning_rate", rate(step) if callable(rate) else rate, dtype)

    def _rate(self, base: jax.Array, scale: jax.Array) -> jax.Array:
        # A schedule may go below the floor by itself; the drops may not.
        floor = jnp.asarray(self.min_learning_rate, base.dtype)
        return jnp.maximum(base * scale, jnp.minimum(base, floor))

    def init(self, params: optax.Params) -> ControllerState:
        dtype = _tree.statistic_dtype(params)
        window = None
        if self.test is not None:
            capacity = _checks.static_integer("max_window", self.max_window, 5)
            window = _window.empty(self._width, capacity, dtype)
        return ControllerState(
            step=jnp.zeros((), jnp.int32),
            learning_rate=self._base_rate(jnp.zeros((), jnp.int32), dtype),
            scale=jnp.ones((), dtype),
            num_drops=jnp.zeros((), jnp.int32),
            num_nonfinite=jnp.zeros((), jnp.int32),
            last_test=no_test_yet(dtype),
            window=window,
            average=_average.start(params) if self.average else None,
            centre=_average.start(params) if self._has_centre else None,
        )

    def rates(self, state: ControllerState) -> tuple[jax.Array, jax.Array]:
        """The base rate of this step, and the rate: with its scale."""
        base = self._base_rate(state.step, state.scale.dtype)
        return base, self._rate(base, state.scale)

    def _row(self, transition: Transition) -> jax.Array:
        """The sample of a step, as the window stores it."""
        sample = self.statistic(transition)
        if not isinstance(sample, Sample):
            raise TypeError(
                f"statistic must return a Sample, got {sample!r} from "
                f"{self.statistic!r}."
            )
        dtype = transition.learning_rate.dtype
        named = {f"Sample.{name}": x for name, x in sample._asdict().items()}
        return jnp.stack([_scalar(name, x, dtype) for name, x in named.items()])

    def num_kept(self, window: _window.Window) -> jax.Array:
        return _window.num_kept(window, self.leak_ratio)

    def samples_needed(self, window: _window.Window, num_drops: jax.Array) -> jax.Array:
        """A test needs more than this; never what the window could not hold."""
        least = jnp.asarray(self.min_samples, jnp.int32)
        if not self.scale_min_samples:
            return least
        grown = least / jnp.asarray(self.factor, jnp.float32) ** num_drops
        most = jnp.float32(window.buffer.shape[1] - 1)
        return jnp.round(jnp.minimum(grown, most)).astype(jnp.int32)

    def _judge(
        self, state: ControllerState, is_good: jax.Array
    ) -> tuple[TestResult, jax.Array]:
        """The newest test, and whether it fired at this step."""
        assert self.test is not None
        assert state.window is not None
        window = state.window
        num_samples = self.num_kept(window)
        is_testing = state.step % jnp.asarray(self.test_interval, jnp.int32) == 0
        is_enough = num_samples > self.samples_needed(window, state.num_drops)
        is_due = is_good & is_testing & is_enough
        result = test_if(
            is_due,
            self.test,
            state.last_test,
            window,
            num_samples,
            state.step,
            state.num_drops,
        )
        return result, is_due & result.stationary & (state.step > self.warmup_steps)

    def _check_capacity(self, window: _window.Window) -> None:
        capacity = window.buffer.shape[1]
        # Traced by optax.inject_hyperparams, after its init had it as it is.
        is_traced = isinstance(self.max_window, jax.Array)
        if not is_traced and capacity != self.max_window:
            raise ValueError(
                f"The state holds a window of {capacity} samples, but max_window is "
                f"{self.max_window}: to go on with it, call "
                f"`state = sasa_optax.resize_window(state, {self.max_window})`."
            )

    def _check_averages(self, state: ControllerState) -> None:
        needed = {"average": self.average, "centre": self._has_centre}
        for name, is_needed in needed.items():
            if is_needed and getattr(state, name) is None:
                raise ValueError(
                    f"The state holds no {name}, which average={self.average} and "
                    f"statistic={self.statistic!r} ask for: to go on with it, give it "
                    "that of `optimizer.init(params)`, which starts afresh."
                )

    def _advance(
        self,
        state: ControllerState,
        row: jax.Array,
        is_good: jax.Array,
        base: jax.Array,
        rate: jax.Array,
    ) -> ControllerState:
        """Takes a sample to the window, the window to a test, and that to a drop."""
        row = jax.lax.stop_gradient(row)
        is_good &= jnp.all(jnp.isfinite(row))
        counted = optax.safe_increment(state.num_nonfinite)
        state = state._replace(
            step=optax.safe_increment(state.step),
            num_nonfinite=jnp.where(is_good, state.num_nonfinite, counted),
        )
        if state.window is not None:
            self._check_capacity(state.window)
            window = _window.push(state.window, row[: self._width], is_good)
            state = state._replace(window=window)
            last_test, fired = self._judge(state, is_good)
            state = self._maybe_cut(
                state._replace(last_test=last_test), fired, base, rate
            )
        return state._replace(learning_rate=self.rates(state)[1])

    def _maybe_cut(
        self,
        state: ControllerState,
        fired: jax.Array,
        base: jax.Array,
        rate: jax.Array,
    ) -> ControllerState:
        """Cuts the rate and empties the window where a test has fired."""
        assert state.window is not None
        dtype = state.scale.dtype
        floor = jnp.asarray(self.min_learning_rate, dtype)
        # At its floor the rate has nowhere to go, and emptying the window no purpose.
        drop = fired & (rate > floor)
        min_scale = floor / jnp.where(drop, base, 1)
        cut = jnp.maximum(jnp.asarray(self.factor, dtype) * state.scale, min_scale)
        return state._replace(
            scale=jnp.where(drop, cut, state.scale),
            num_drops=state.num_drops + drop.astype(jnp.int32),
            window=_window.clear(state.window, drop),
        )

    def _in_sequence(
        self,
        direction: optax.Updates,
        transition: Callable[[optax.Updates, dict[str, Any]], Transition],
        trees: dict[str, Any],
        rate: jax.Array,
        step: jax.Array,
    ) -> tuple[optax.Updates, jax.Array]:
        """The direction arranged around the sums that the statistic takes over it."""
        pairs = getattr(self.statistic, "pairs", master_pairs)
        given = {name: tree for name, tree in trees.items() if tree is not None}

        def sums(direction: list, *lists: list) -> list[jax.Array]:
            some = transition(direction, trees | dict(zip(given, lists, strict=True)))
            return some.inner_products(*pairs(some))

        return _tree.in_sequence(direction, list(given.values()), sums, rate, step)

    def _weights(self, state: ControllerState) -> dict[str, jax.Array]:
        """Of the next iterate, in each of the averages that there are."""
        self._check_averages(state)
        ratios = {"average": self.leak_ratio, "centre": _CENTRE_LEAK_RATIO}
        min_horizon, dtype = _average.DEFAULT_MIN_HORIZON, state.scale.dtype
        averages = {name: getattr(state, name) for name in ratios}
        return {
            name: _average.weight(average, ratios[name], min_horizon, dtype)
            for name, average in averages.items()
            if average is not None
        }

    def step(
        self,
        direction: optax.Updates,
        state: ControllerState,
        params: optax.Params,
        grad: optax.Updates | None,
        value: jax.typing.ArrayLike | None,
        is_good: jax.typing.ArrayLike = True,
    ) -> tuple[optax.Updates, optax.Updates, ControllerState]:
        """The update, its direction, and the state; a bad step goes unrecorded.

        The direction is that given, number by number, but the one to keep.
        """
        base, rate = self.rates(state)
        is_good, row = jnp.asarray(is_good), jnp.zeros((0,), state.scale.dtype)
        weights = self._weights(state)
        centre = "average" if state.centre is None else "centre"
        trees = {"params": params, "grad": grad, "centre": None}
        if self._uses_centre:
            trees["centre"] = getattr(state, centre).averaged

        def transition(direction: Any, trees: dict[str, Any]) -> Transition:
            updates = _tree.scale(-rate, direction)
            return Transition(
                params=trees["params"],
                # As the caller will compute them, so that XLA merges the two.
                new_params=optax.apply_updates(trees["params"], updates),
                direction=direction,
                grad=direction if trees["grad"] is None else trees["grad"],
                learning_rate=rate,
                value=value,
                axis_name=self.axis_name,
                centre=trees["centre"],
                centre_weight=weights.get(centre),
            )

        if self.test is not None:
            direction, always = self._in_sequence(
                direction, transition, trees, rate, state.step
            )
            is_good &= always
        updates = _tree.scale(-rate, direction)
        taken = transition(direction, trees)
        if self.test is not None:
            row = self._row(taken)
        averages = {
            name: _average.push(getattr(state, name), taken.new_params, weight)
            for name, weight in weights.items()
        }
        state = self._compiled(state, row, is_good, base, rate)
        return updates, direction, state._replace(**averages)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        def update(
            updates: optax.Updates,
            state: ControllerState,
            params: optax.Params | None = None,
            *,
            grad: optax.Updates | None = None,
            value: jax.typing.ArrayLike | None = None,
            with_direction: bool = False,
            **extra_args: Any,
        ) -> tuple[optax.Updates, ControllerState]:
            del extra_args
            params = _checks.params(params, "The test for stationarity")
            updates, direction, state = self.step(updates, state, params, grad, value)
            return (updates, direction) if with_direction else updates, state

        return _types.transformation(self.init, update)
