"""SSLS and SALSA against NumPy and SciPy: every search, and how searching ends."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats

import sasa_optax

x64 = pytest.mark.usefixtures("x64")
for_given_or_not = pytest.mark.parametrize("with_value", [True, False])
get = optax.tree.get


# SSLS, as DESIGN.md has it.


class Search(NamedTuple):
    """The arguments of a search, with their defaults."""

    smoothing: float = 0.1
    sufficient_decrease: float = 0.05
    increase_factor: float = 2.0
    decrease_factor: float = 0.5
    max_trials: int = 2
    interval: int = 1

    def find(
        self,
        loss: Callable[[np.ndarray], float],
        x: np.ndarray,
        grad: np.ndarray,
        descent: np.ndarray,
        rate: float,
        expect: Callable[[bool], Any] = assume,
    ) -> tuple[float, int]:
        """The step size found, and the number of trials."""
        slope = grad @ descent
        if slope <= 0:
            return self.decrease_factor * rate, 0
        eta = self.increase_factor * rate
        for trial in range(1, self.max_trials + 1):
            reached = loss(x - eta * descent)
            bound = loss(x) - self.sufficient_decrease * eta * slope
            # What hinges on rounding says nothing.
            expect(abs(reached - bound) > 1e-9 * (abs(reached) + abs(bound)))
            if reached <= bound:
                return eta, trial
            eta *= self.decrease_factor
        return eta, self.max_trials

    def smoothed(self, rate: float, eta: float) -> float:
        """The rate after the steps that this search stands for."""
        for _ in range(self.interval):
            rate = (1 - self.smoothing) * rate + self.smoothing * eta
        return rate


def quadratic(x: Any, target: Any = 0.0, curvature: Any = 1.0) -> Any:
    """For NumPy and JAX alike."""
    return (curvature * (x - target) ** 2).sum() / 2


def reference_ssls(
    search: Search,
    x: np.ndarray,
    targets: np.ndarray,
    curvature: np.ndarray,
    *,
    learning_rate: float,
    momentum: float,
    nu: float,
    weight_decay: float,
    along: str,
    with_value: bool,
) -> Iterator[tuple[np.ndarray, float, float, int]]:
    """Parameters, rate, step size and evaluations after each step of ssls."""
    rate, eta, trace, evaluations = learning_rate, 0.0, np.zeros_like(x), 0
    for step, target in enumerate(targets):

        def loss(x: np.ndarray, target: np.ndarray = target) -> float:
            return quadratic(x, target, curvature) + weight_decay / 2 * x @ x

        grad = curvature * (x - target) + weight_decay * x
        trace = (1 - momentum) * grad + momentum * trace
        direction = (1 - nu) * grad + nu * trace
        if step % search.interval == 0:
            descent = grad if along == "gradient" else direction
            eta, trials = search.find(loss, x, grad, descent, rate)
            evaluations += trials + (0 if with_value else 1)
            rate = search.smoothed(rate, eta)
        x = x - rate * direction
        yield x, rate, eta, evaluations


def history(
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
    params: Any,
    batches: Any = None,
    *,
    num_steps: int | None = None,
    with_value: bool = True,
) -> Any:
    """Parameters and states after every step; ``batches`` are a dict of extra args."""
    update = optax.with_extra_args_support(optimizer).update

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        batch = batch or {}
        value, grads = jax.value_and_grad(loss)(params, **batch)
        extra = {"value": value} if with_value else {}
        updates, state = update(
            grads, state, params, grad=grads, value_fn=loss, **extra, **batch
        )
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    def scan(params: Any, state: Any, batches: Any) -> Any:
        return jax.lax.scan(step, (params, state), batches, length=num_steps)[1]

    return jax.jit(scan)(params, optimizer.init(params), batches)


def one_step(
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
    params: Any,
    **kwargs: Any,
) -> Any:
    """The state after the first step."""
    _, states = history(optimizer, loss, params, num_steps=1, **kwargs)
    return jax.tree.map(lambda x: x[0], states)


def search_of(state: Any) -> sasa_optax.LineSearchState:
    """The state of the search, however nested."""

    def is_search(node: Any) -> bool:
        return isinstance(node, sasa_optax.LineSearchState)

    (found,) = filter(is_search, jax.tree.leaves(state, is_leaf=is_search))
    return found


NUM_STEPS = 12


@functools.partial(jax.jit, static_argnames=("along", "with_value"))
def ssls_history(
    search: Search,
    arguments: dict[str, Any],
    params: jax.Array,
    batches: Any,
    *,
    along: Any,
    with_value: bool,
) -> Any:
    """Compiled once for all arguments, which are traced."""
    options = sasa_optax.LineSearch(direction=along, **search._asdict())
    optimizer = sasa_optax.ssls(search=options, **arguments)
    return history(optimizer, quadratic, params, batches, with_value=with_value)


@x64
@for_given_or_not
@pytest.mark.parametrize("along", ["gradient", "update"])
@given(
    search=st.builds(
        Search,
        smoothing=st.floats(0.01, 1),
        sufficient_decrease=st.floats(0.01, 0.99),
        increase_factor=st.floats(1, 4),
        decrease_factor=st.floats(0.1, 0.9),
        max_trials=st.integers(1, 5),
        interval=st.integers(1, 3),
    ),
    arguments=st.fixed_dictionaries(
        {
            "learning_rate": st.floats(-3, 1.5).map(lambda x: 10**x),
            "momentum": st.floats(0, 0.95),
            "nu": st.floats(0, 1),
            "weight_decay": st.floats(0, 1),
        }
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=15)
def test_ssls_decides_as_its_equations_do(
    along: str,
    with_value: bool,
    search: Search,
    arguments: dict[str, float],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x, targets = rng.normal(size=3), rng.normal(size=(NUM_STEPS, 3))
    curvature = 10 ** rng.uniform(-1, 1, size=3)
    batches = {"target": targets, "curvature": np.tile(curvature, (NUM_STEPS, 1))}
    static = {"along": along, "with_value": with_value}
    expected = reference_ssls(search, x, targets, curvature, **arguments, **static)
    expected = [np.stack(column) for column in zip(*expected, strict=True)]

    params, states = ssls_history(search, arguments, x, batches, **static)
    found = search_of(states)
    actual = (
        params,
        get(states, "learning_rate"),
        found.step_size,
        found.num_evaluations,
    )
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("rate", "along", "kwargs", "step_size"),
    [
        # Long enough up to 2 * (1 - sufficient_decrease): up to 1.9, or to 1.1.
        (0.56, "gradient", {}, 1.12),
        (0.54, "update", {}, 1.08),
        (0.56, "update", {}, 0.56),
        (0.56, "update", {"sufficient_decrease": 0.05}, 1.12),
    ],
)
def test_along_an_update_more_decrease_is_asked_for(
    rate: float, along: Any, kwargs: dict[str, float], step_size: float
) -> None:
    search = sasa_optax.LineSearch(direction=along, **kwargs)
    optimizer = sasa_optax.scale_by_ssls(rate, search=search)
    state = one_step(optimizer, quadratic, jnp.array([2.0]), with_value=True)
    np.testing.assert_allclose(search_of(state).step_size, step_size, rtol=1e-6)


@functools.partial(jax.jit, static_argnames="with_value")
def search_parabola(search: Search, rate: float, with_value: bool) -> Any:
    options = sasa_optax.LineSearch(**search._asdict())
    optimizer = sasa_optax.scale_by_ssls(rate, search=options)
    return one_step(optimizer, quadratic, jnp.array([2.0]), with_value=with_value)


@pytest.mark.parametrize(
    ("rate", "kwargs", "step_size", "num_trials"),
    [
        # On x^2/2 a step is long enough up to 2 * (1 - sufficient_decrease).
        (0.6, {}, 1.2, 1),
        (0.94, {}, 1.88, 1),
        (0.96, {}, 0.96, 2),
        (1.5, {}, 1.5, 2),
        (5.0, {}, 2.5, 2),
        (5.0, {"max_trials": 1}, 5.0, 1),
        (5.0, {"max_trials": 9}, 1.25, 4),
        (5.0, {"max_trials": 9, "increase_factor": 1.0}, 1.25, 3),
        (5.0, {"decrease_factor": 0.1}, 1.0, 2),
        (0.49, {"sufficient_decrease": 0.5}, 0.98, 1),
        (0.51, {"sufficient_decrease": 0.5}, 0.51, 2),
    ],
)
@for_given_or_not
def test_what_one_search_finds_on_a_parabola(
    rate: float,
    kwargs: dict[str, Any],
    step_size: float,
    num_trials: int,
    with_value: bool,
) -> None:
    search = Search(smoothing=0.25)._replace(**kwargs)
    state = search_parabola(search, rate, with_value)
    found = search_of(state)
    assert float(found.step_size) == pytest.approx(step_size, rel=1e-6)
    assert int(found.num_evaluations) == num_trials + (0 if with_value else 1)
    smoothed = 0.75 * rate + 0.25 * step_size
    assert float(get(state, "learning_rate")) == pytest.approx(smoothed, rel=1e-6)


def test_the_step_is_made_with_the_new_rate_along_the_direction() -> None:
    optimizer = sasa_optax.ssls(0.5, momentum=0.75)
    x = jnp.array([1.0, -2.0])
    params, states = history(optimizer, quadratic, x, num_steps=1)
    rate = 0.5 * 0.9 + 1.0 * 0.1
    np.testing.assert_allclose(get(states, "learning_rate"), [rate], rtol=1e-6)
    np.testing.assert_allclose(params[0], (1 - rate * 0.25) * x, rtol=1e-6)


@x64
def test_whether_the_value_is_given_changes_no_decision() -> None:
    rng = np.random.default_rng(0)
    shape = (NUM_STEPS, 3)
    batches = {"target": rng.normal(size=shape), "curvature": np.ones(shape)}
    arguments = {
        "learning_rate": 0.6,
        "momentum": 0.5,
        "nu": 1.0,
        "weight_decay": 0.1,
    }
    (ours, given_), (theirs, left_out) = (
        ssls_history(
            Search(),
            arguments,
            jnp.ones(3),
            batches,
            along="gradient",
            with_value=with_value,
        )
        for with_value in (True, False)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12)
    chex.assert_trees_all_close(
        get(given_, "learning_rate"), get(left_out, "learning_rate"), rtol=1e-12
    )
    trials = search_of(given_).num_evaluations
    with_start = search_of(left_out).num_evaluations
    assert (with_start - trials).tolist() == list(range(1, NUM_STEPS + 1))
    assert set(np.diff(trials).tolist()) == {1, 2}


@for_given_or_not
def test_ssls_counts_its_evaluations(with_value: bool) -> None:
    calls: list[None] = []

    def counted(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(None))
        return quadratic(x)

    optimizer = sasa_optax.scale_by_ssls(
        0.4, search=sasa_optax.LineSearch(smoothing=0.5, max_trials=3)
    )

    @jax.jit
    def step(x: jax.Array, state: Any) -> Any:
        extra = {"value": quadratic(x)} if with_value else {}
        return optimizer.update(x, state, x, grad=x, value_fn=counted, **extra)

    x = jnp.array([1.0, -1.0])
    state = optimizer.init(x)
    seen = []
    for _ in range(8):
        before = len(calls)
        updates, state = step(x, state)
        x = x + updates
        jax.effects_barrier()
        assert len(calls) == int(search_of(state).num_evaluations)
        seen.append(len(calls) - before)
    # Searches that succeed at once, and others.
    assert len(set(seen)) > 1


def test_the_count_of_evaluations_stays_at_its_end() -> None:
    optimizer = sasa_optax.scale_by_ssls()
    x = jnp.ones(2)
    most = np.iinfo(np.int32).max
    state = optax.tree.set(optimizer.init(x), num_evaluations=jnp.int32(most))
    _, state = optimizer.update(x, state, x, grad=x, value_fn=quadratic)
    assert int(search_of(state).num_evaluations) == most


# SALSA: compiled twice for most of the tests below, as its arguments are traced.

MAX_WINDOW = 16
CALLS: list[None] = []


def linear(x: Any, offset: Any) -> Any:
    """A loss that the offset leads; its gradient is 0.01 everywhere."""
    return offset + 0.01 * x.sum()


def counted_linear(x: jax.Array, offset: jax.Array) -> jax.Array:
    jax.debug.callback(lambda: CALLS.append(None))
    return linear(x, offset)


class Options(NamedTuple):
    """The arguments of SALSA in the tests below, all traced."""

    learning_rate: float = 1e-3
    factor: float = 0.25
    min_samples: int = 4
    test_interval: int = 1
    leak_ratio: int = 1
    warmup_steps: int = 0
    interval: int = 1
    significance: float = 0.05


def make_salsa(
    options: Options, fires: bool | None
) -> optax.GradientTransformationExtraArgs:
    """With a test that fires where ``fires`` says so; with its own if that is None."""

    def test(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
        return sasa_optax.TestResult(mean=samples.values[0], stationary=fires)

    significance = options.significance
    own = sasa_optax.ZeroMeanTest(significance=significance)
    return sasa_optax.scale_by_salsa(
        options.learning_rate,
        factor=options.factor,
        test=own if fires is None else test,
        window=sasa_optax.Window(
            leak_ratio=options.leak_ratio,
            min_samples=options.min_samples,
            test_interval=options.test_interval,
            warmup_steps=options.warmup_steps,
            max_window=MAX_WINDOW,
        ),
        search=sasa_optax.LineSearch(
            interval=options.interval,
            loss_test=sasa_optax.SlopeTest(significance=significance),
        ),
    )


@functools.partial(jax.jit, static_argnames="with_value")
def salsa_step(
    options: Options,
    fires: Any,
    state: Any,
    params: jax.Array,
    offset: Any,
    grads: Any,
    with_value: bool,
) -> Any:
    extra = {"value": linear(params, offset)} if with_value else {}
    updates, state = make_salsa(options, fires).update(
        grads,
        state,
        params,
        grad=grads,
        value_fn=counted_linear,
        offset=offset,
        **extra,
    )
    return params + updates, state


class Salsa:
    """A run of SALSA, a step at a time."""

    def __init__(
        self, with_value: bool = True, fires: bool | None = None, **options: Any
    ) -> None:
        # Its own test does not come, unless it is asked for.
        interval = 1 if fires is not None else 10**6
        self.options = Options(test_interval=interval)._replace(**options)
        self.fires, self.with_value = fires, with_value
        self.params = jnp.array([1.0, -2.0])
        self.state = make_salsa(self.options, fires).init(self.params)
        self.losses: list[float] = []

    def step(self, offset: float, grad: float = 0.01) -> Any:
        self.losses.append(float(linear(np.asarray(self.params), offset)))
        self.params, self.state = salsa_step(
            self.options,
            self.fires,
            self.state,
            self.params,
            offset,
            np.full(2, grad),
            with_value=self.with_value,
        )
        return self.state

    def run(self, offsets: Any) -> list[Any]:
        return [jax.device_get(self.step(float(offset))) for offset in offsets]


def active(states: list[Any]) -> list[bool]:
    return [bool(search_of(state).line_search_active) for state in states]


def rates(states: list[Any]) -> list[float]:
    return [float(get(state, "learning_rate")) for state in states]


@x64
@for_given_or_not
@given(
    seed=st.integers(0, 2**32 - 1),
    trend=st.floats(-1.0, 0.2),
    interval=st.integers(1, 3),
    more_samples=st.integers(0, 3),
    leak_ratio=st.integers(1, 3),
    significance=st.floats(0.01, 0.5),
)
@example(0, 0.0, 1, 0, 1, 0.05)
@example(0, -0.3, 2, 0, 1, 0.5)
@settings(max_examples=10)
def test_the_search_ends_when_the_losses_stop_falling(
    with_value: bool,
    seed: int,
    trend: float,
    interval: int,
    more_samples: int,
    leak_ratio: int,
    significance: float,
) -> None:
    num_steps, min_samples = 40, 4 * interval + more_samples
    run = Salsa(
        with_value,
        interval=interval,
        min_samples=min_samples,
        leak_ratio=leak_ratio,
        significance=significance,
    )
    noise = np.random.default_rng(seed).normal(size=num_steps)
    states = run.run(noise + trend * np.arange(num_steps))

    rate, ended, total = 1e-3, None, 0
    recorded: list[float] = []
    fit: Any = None
    for step, loss in enumerate(run.losses):
        searches = step % interval == 0 and ended is None
        # A line accepts every step that goes down; gamma is 0.1, the factor 2.
        rate *= 1 + (1 - 0.9**interval) if searches else 1
        assert rates([states[step]]) == pytest.approx([rate], rel=1e-9)
        if ended is None and (with_value or searches):
            recorded.append(loss)
            total += 1
            kept = min(-(-total // leak_ratio), MAX_WINDOW)
            if kept * (1 if with_value else interval) > min_samples:
                fit = stats.linregress(
                    np.arange(kept), recorded[-kept:], alternative="less"
                )
                assume(abs(fit.pvalue - significance) > 1e-6)
                ended = step if fit.pvalue >= significance else None
        assert active([states[step]]) == [ended is None]
        assert int(search_of(states[step]).losses.total) == total
        assert int(get(states[step], "num_drops")) == 0
        newest = search_of(states[step]).loss_test
        assert bool(newest.stationary) == (ended is not None)
        if fit is not None:
            assert float(newest.p_value) == pytest.approx(fit.pvalue, abs=1e-7)
            assert float(newest.mean) == pytest.approx(fit.slope, rel=1e-6)
            assert int(newest.num_samples) == kept
    if ended is not None:
        assert int(search_of(states[-1]).loss_test.step) == ended + 1


@x64
@for_given_or_not
def test_after_its_end_the_search_evaluates_nothing(with_value: bool) -> None:
    run = Salsa(with_value)
    jax.effects_barrier()
    start, seen = len(CALLS), []
    states = []
    # The losses rise, then fall for long.
    for offset in [*range(8), *range(0, -20, -1)]:
        states += run.run([offset])
        jax.effects_barrier()
        seen.append(len(CALLS) - start)
    counts = [int(search_of(state).num_evaluations) for state in states]
    assert seen == counts
    last = active(states).index(False)
    per_step = 1 if with_value else 2
    expected = [per_step * min(step, last + 1) for step in range(1, 29)]
    assert counts == expected
    assert not any(active(states)[last:])
    assert len(set(rates(states)[last:])) == 1
    assert search_of(states[-1]).losses.total == last + 1


@x64
def test_the_test_of_sasa_plus_ends_the_search_by_a_drop() -> None:
    run = Salsa(fires=True)
    states = run.run(-np.arange(20.0))
    assert active(states) == [True] * 4 + [False] * 16
    grown = [1e-3 * 1.1**k for k in range(1, 5)]
    # The fifth step was made with the rate that its search found.
    dropped = [1e-3 * 1.1**5 * 0.25**k for k in range(1, 5)]
    expected = grown + dropped[:1] * 5 + dropped[1:2] * 5 + dropped[2:3] * 5
    np.testing.assert_allclose(rates(states), [*expected, dropped[3]][:20], rtol=1e-9)
    assert [int(get(state, "num_drops")) for state in states] == [
        *[0] * 4,
        *[1] * 5,
        *[2] * 5,
        *[3] * 5,
        4,
    ]
    assert int(search_of(states[-1]).num_evaluations) == 5
    assert not bool(search_of(states[-1]).loss_test.stationary)


@x64
def test_during_warmup_a_test_that_fires_ends_nothing() -> None:
    states = Salsa(fires=True, warmup_steps=9).run(-np.arange(12.0))
    assert bool(get(states[8], "last_test").stationary)
    assert active(states) == [True] * 9 + [False] * 3
    assert [int(get(state, "num_drops")) for state in states] == [0] * 9 + [1] * 3


@x64
def test_a_search_that_no_test_ends_goes_on() -> None:
    states = Salsa(fires=False).run(-np.arange(30.0))
    assert all(active(states))
    assert len(set(rates(states))) == 30


@x64
@for_given_or_not
@pytest.mark.parametrize("interval", [3, 5, 100])
def test_no_slope_is_taken_of_fewer_than_four_losses(
    interval: int, with_value: bool
) -> None:
    run = Salsa(with_value, interval=interval)
    for _ in range(2):
        # Positive and falling, so that zeros for missing ones would stand out.
        states = run.run(100.0 - np.arange(len(run.losses), len(run.losses) + 20))
        assert all(active(states))
        tested = search_of(states[-1]).loss_test
        assert int(tested.num_samples) == 0 or int(tested.num_samples) >= 4


@x64
@for_given_or_not
def test_between_searches_losses_are_recorded_if_they_are_given(
    with_value: bool,
) -> None:
    run = Salsa(with_value, interval=3, min_samples=15)
    states = run.run(-np.arange(10.0))
    totals = [int(search_of(state).losses.total) for state in states]
    searches = [1 + step // 3 for step in range(10)]
    assert totals == (list(range(1, 11)) if with_value else searches)
    buffer = np.asarray(search_of(states[-1]).losses.buffer)[0, : totals[-1]]
    np.testing.assert_allclose(
        buffer, run.losses if with_value else run.losses[::3], rtol=1e-12
    )
    counts = [int(search_of(state).num_evaluations) for state in states]
    assert counts == [n * (1 if with_value else 2) for n in searches]


@jax.jit
def search_downhill(search: Search) -> Any:
    options = sasa_optax.LineSearch(**search._asdict())
    optimizer = sasa_optax.scale_by_ssls(0.01, search=options)
    return history(optimizer, jnp.sum, -jnp.ones(2), num_steps=11)[1]


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_smoothing_is_compounded_over_the_steps_between_searches(
    interval: int, gamma: float
) -> None:
    search = Search(smoothing=gamma, increase_factor=3.0, interval=interval)
    states = search_downhill(search)
    kept = (1 - gamma) ** interval
    growth = kept + (1 - kept) * 3.0
    searches = 1 + np.arange(11) // interval
    np.testing.assert_allclose(
        get(states, "learning_rate"), 0.01 * growth**searches, rtol=1e-5
    )
    step_sizes = 0.03 * growth ** (searches - 1)
    np.testing.assert_allclose(search_of(states).step_size, step_sizes, rtol=1e-5)
    assert search_of(states).num_evaluations.tolist() == searches.tolist()


@pytest.mark.parametrize(("steps_per_epoch", "gamma"), [(1, 1.0), (25, 0.2)])
def test_steps_per_epoch_sets_the_smoothing(steps_per_epoch: int, gamma: float) -> None:
    for given_, smoothing in [(None, gamma), (0.5, 0.5)]:
        optimizer = sasa_optax.ssls(
            0.01,
            steps_per_epoch=steps_per_epoch,
            search=sasa_optax.LineSearch(smoothing=given_),
        )
        state = one_step(optimizer, jnp.sum, jnp.ones(2))
        rate = get(state, "learning_rate")
        assert float(rate) == pytest.approx(0.01 * (1 + smoothing))


# What is not finite.


@functools.partial(jax.jit, static_argnames="with_value")
def step_off_a_cliff(beyond: jax.Array, with_value: bool) -> Any:
    """With a loss of 1 at ones, and of ``beyond`` elsewhere."""
    optimizer, x = sasa_optax.scale_by_ssls(0.1), jnp.ones(2)

    def cliff(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(x == 1), 1.0, beyond)

    extra = {"value": jnp.float32(1.0)} if with_value else {}
    state = optimizer.init(x)
    return optimizer.update(x, state, x, grad=x, value_fn=cliff, **extra)


@pytest.mark.parametrize("debug_nans", [False, True])
@pytest.mark.parametrize("beyond", [np.nan, np.inf, -np.inf])
@for_given_or_not
def test_a_trial_that_is_not_finite_fails(
    beyond: float, with_value: bool, debug_nans: bool
) -> None:
    with jax.debug_nans(debug_nans):
        updates, state = step_off_a_cliff(beyond, with_value)
    found = search_of(state)
    assert float(found.step_size) == pytest.approx(0.05)
    assert float(get(state, "learning_rate")) == pytest.approx(0.095)
    assert int(found.num_evaluations) == (2 if with_value else 3)
    assert int(get(state, "num_nonfinite")) == 0
    chex.assert_tree_all_finite((updates, state))


def assert_untouched(before: Any, after: Any, num_evaluations: int) -> None:
    """Nothing but the counters has moved."""
    chex.assert_tree_all_finite(after)
    # The step itself was made, so an average has moved.
    old, new = search_of(before), search_of(after)
    step, num_nonfinite = new.controller.step, new.controller.num_nonfinite
    assert int(step) == int(old.controller.step) + 1
    assert int(num_nonfinite) == int(old.controller.num_nonfinite) + 1
    unmoved = old._replace(
        num_evaluations=old.num_evaluations + num_evaluations,
        controller=old.controller._replace(step=step, num_nonfinite=num_nonfinite),
    )
    # The slot that is written next may hold anything that is finite.
    chex.assert_trees_all_equal(new, unmoved)


@x64
@pytest.mark.parametrize(
    ("offset", "grad"),
    [(np.nan, 0.01), (np.inf, 0.01), (-np.inf, 0.01), (0.0, np.nan), (0.0, -np.inf)],
)
@for_given_or_not
def test_a_step_that_is_not_finite_says_nothing_to_salsa(
    offset: float, grad: float, with_value: bool
) -> None:
    run = Salsa(with_value)
    before = run.run(-np.arange(3.0))[-1]
    after = run.step(offset, grad)
    assert_untouched(before, after, num_evaluations=0 if with_value else 1)


@x64
@pytest.mark.parametrize(("offset", "grad"), [(np.nan, 0.01), (-9.0, np.nan)])
def test_neither_does_one_between_searches(offset: float, grad: float) -> None:
    run = Salsa(interval=5)
    before = run.run(-np.arange(3.0))[-1]
    assert_untouched(before, run.step(offset, grad), num_evaluations=0)


@pytest.mark.parametrize(
    ("offset", "slope"), [(np.nan, 1.0), (-np.inf, 1.0), (0.0, np.nan), (0.0, np.inf)]
)
@pytest.mark.parametrize("interval", [1, 2])
def test_a_step_that_is_not_finite_says_nothing_to_ssls(
    offset: float, slope: float, interval: int
) -> None:
    """With an interval of two, it comes between two searches."""
    optimizer = sasa_optax.scale_by_ssls(
        0.1, search=sasa_optax.LineSearch(interval=interval)
    )
    x = jnp.ones(2)

    @jax.jit
    def states(offset: Any, slope: Any) -> Any:
        state = optimizer.init(x)
        for is_second in (0, 1):
            grads = x * jnp.where(is_second, slope, 1.0)
            value = jnp.sum(x) + jnp.where(is_second, offset, 0.0)
            before = state
            _, state = optimizer.update(
                grads, state, x, grad=grads, value=value, value_fn=jnp.sum
            )
        return before, state

    before, after = states(offset, slope)
    assert_untouched(before, after, num_evaluations=0)


@x64
def test_salsa_still_counts_what_is_not_finite_after_the_search() -> None:
    run = Salsa()
    before = run.run(np.arange(8.0))[-1]
    assert active([before]) == [False]
    assert_untouched(before, run.step(0.0, np.nan), num_evaluations=0)


# Directions, losses and types of all kinds.


@pytest.mark.parametrize("sign", [0.0, -1.0])
@for_given_or_not
def test_without_descent_the_rate_falls_and_nothing_is_tried(
    sign: float, with_value: bool
) -> None:
    search = sasa_optax.LineSearch(
        direction="update", smoothing=0.25, decrease_factor=0.2
    )
    optimizer = sasa_optax.scale_by_ssls(0.1, search=search)
    chain = optax.chain(optax.scale(sign), optimizer)
    state = one_step(chain, quadratic, jnp.ones(2), with_value=with_value)
    found = search_of(state)
    assert float(found.step_size) == pytest.approx(0.02)
    rate = 0.75 * 0.1 + 0.25 * 0.02
    assert float(get(state, "learning_rate")) == pytest.approx(rate)
    assert int(found.num_evaluations) == (0 if with_value else 1)


@for_given_or_not
def test_a_gradient_of_zero_makes_the_rate_fall(with_value: bool) -> None:
    optimizer = sasa_optax.ssls(0.1)
    state = one_step(optimizer, quadratic, jnp.zeros(2), with_value=with_value)
    assert float(get(state, "learning_rate")) == pytest.approx(0.095)
    assert int(search_of(state).num_evaluations) == (0 if with_value else 1)


@x64
@for_given_or_not
def test_losses_may_be_negative(with_value: bool) -> None:
    rng = np.random.default_rng(1)
    batches = {"target": rng.normal(size=(40, 3))}

    def negative(x: jax.Array, target: jax.Array) -> jax.Array:
        return quadratic(x, target) - 1000.0

    optimizer = sasa_optax.ssls(0.1, weight_decay=0.01)
    losses = (quadratic, negative)
    ours, theirs = (
        history(optimizer, loss, jnp.ones(3), batches, with_value=with_value)
        for loss in losses
    )
    chex.assert_trees_all_equal(ours, theirs)
    # There was something to decide.
    step_sizes = search_of(ours[1]).step_size / get(ours[1], "learning_rate")
    assert len(np.unique(np.round(step_sizes, 1))) > 1


def test_salsa_records_the_loss_with_its_weight_decay() -> None:
    optimizer = sasa_optax.salsa(
        0.1,
        weight_decay=0.5,
        window=sasa_optax.Window(min_samples=4, max_window=8),
    )
    x = jnp.array([1.0, -2.0])
    value = jnp.float32(7.0)
    update = functools.partial(optimizer.update, value_fn=jnp.sum, value=value)
    _, state = jax.jit(update)(x, optimizer.init(x), x)
    recorded = get(state, "losses").buffer[0, 0]
    assert float(recorded) == pytest.approx(7.0 + 0.5 / 2 * 5.0)


@x64
@for_given_or_not
def test_after_adam_it_searches_along_the_update(with_value: bool) -> None:
    rng = np.random.default_rng(2)
    targets = rng.normal(size=(25, 3))
    search = Search(smoothing=0.5, sufficient_decrease=0.45)
    options = sasa_optax.LineSearch(smoothing=0.5, direction="update")
    optimizer = optax.chain(
        optax.scale_by_adam(), sasa_optax.scale_by_ssls(0.05, search=options)
    )
    x = np.array([1.0, -1.0, 0.5])
    params, states = history(
        optimizer, quadratic, jnp.asarray(x), {"target": targets}, with_value=with_value
    )
    adam = optax.scale_by_adam()
    memory, direct = adam.init(jnp.asarray(x)), jax.jit(adam.update)
    rate, evaluations, found = 0.05, 0, search_of(states)
    for step, target in enumerate(targets):
        grad = x - target
        direction, memory = direct(jnp.asarray(grad), memory)
        direction = np.asarray(direction)
        loss = functools.partial(quadratic, target=target)
        eta, trials = search.find(loss, x, grad, direction, rate, np.testing.assert_)
        rate = search.smoothed(rate, eta)
        evaluations += trials + (0 if with_value else 1)
        x = x - rate * direction
        np.testing.assert_allclose(found.step_size[step], eta, rtol=1e-9)
        np.testing.assert_allclose(get(states, "learning_rate")[step], rate, rtol=1e-9)
        assert int(found.num_evaluations[step]) == evaluations
        np.testing.assert_allclose(params[step], x, rtol=1e-9)


@for_given_or_not
def test_rounding_of_a_bfloat16_loss_is_no_failure(with_value: bool) -> None:
    def loss(x: jax.Array) -> jax.Array:
        return quadratic(x).astype(jnp.bfloat16)

    optimizer = sasa_optax.scale_by_ssls(1e-3)
    x = jnp.full(1, np.sqrt(4.6), jnp.float32)

    # Where it stands still, each search sees the same parabola, of height 2.3.
    def step(state: Any, _: None) -> Any:
        extra = {"value": loss(x)} if with_value else {}
        _, state = optimizer.update(x, state, x, grad=x, value_fn=loss, **extra)
        return state, get(state, "learning_rate")

    scan = jax.jit(lambda state: jax.lax.scan(step, state, None, length=150)[1])
    found = np.asarray(scan(optimizer.init(x)))
    np.testing.assert_allclose(found[:30], 1e-3 * 1.1 ** np.arange(1, 31), rtol=1e-5)
    # Twice the rate then is too much, which is beyond 1.9; the rate itself is not.
    assert 0.93 < found[-1] < 1.05
    assert found[-1] == found[-20]


@pytest.mark.parametrize("name", ["ssls", "salsa", "scale_by_ssls", "scale_by_salsa"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@for_given_or_not
def test_types_never_change(name: str, dtype: str, with_value: bool) -> None:
    optimizer = getattr(sasa_optax, name)()
    params = {"a": jnp.ones(2, dtype), "b": jnp.ones((2, 2), dtype)}

    def loss(params: Any) -> jax.Array:
        return quadratic(params["a"]) + quadratic(params["b"])

    state = optimizer.init(params)
    extra = {"value": loss(params)} if with_value else {}
    update = functools.partial(optimizer.update, grad=params, value_fn=loss, **extra)
    with jax.numpy_dtype_promotion("strict"):
        updates, after = jax.eval_shape(update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(after))
    assert not any(leaf.aval.weak_type for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_parameters_are_optimized(dtype: str) -> None:
    with jax.numpy_dtype_promotion("strict"):
        optimizer = sasa_optax.ssls(0.1, momentum=0.5)
        params, states = history(
            optimizer,
            lambda x: quadratic(x, jnp.ones((), dtype), jnp.ones((), dtype)),
            jnp.full(3, 3.0, dtype),
            num_steps=40,
        )
    assert params.dtype == dtype
    assert get(states, "learning_rate").dtype == jnp.float32
    np.testing.assert_allclose(params[-1].astype(np.float32), 1.0, atol=0.05)


# Bounds of the rate.


def test_the_rate_stays_within_its_bounds() -> None:
    def loss(x: jax.Array, slope: jax.Array) -> jax.Array:
        return slope * jnp.sum(x)

    search = sasa_optax.LineSearch(max_learning_rate=0.015)
    optimizer = sasa_optax.scale_by_ssls(0.011, min_learning_rate=0.01, search=search)
    slopes = jnp.repeat(jnp.array([1.0, 0.0, 1.0]), 10)
    _, states = history(optimizer, loss, jnp.ones(2), {"slope": slopes})
    rate, expected = 0.011, []
    for slope in np.asarray(slopes):
        rate = rate * 1.1 if slope else rate * 0.95
        rate = min(max(rate, 0.01), 0.015)
        expected.append(rate)
    found = get(states, "learning_rate")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.max() <= np.float32(0.015)
    assert found.min() >= np.float32(0.01)
    assert float(found[19]) == pytest.approx(0.01)


def test_a_rate_that_starts_below_the_least_stays_where_it_is() -> None:
    optimizer = sasa_optax.scale_by_ssls(0.01, min_learning_rate=0.1)
    _, states = history(optimizer, quadratic, jnp.zeros(2), num_steps=3)
    np.testing.assert_allclose(get(states, "learning_rate"), 0.01, rtol=1e-6)


@pytest.mark.parametrize("steepness", [1.0, 1e10])
@for_given_or_not
def test_a_loss_without_a_minimum_leaves_a_finite_state(
    steepness: float, with_value: bool
) -> None:
    optimizer = sasa_optax.ssls(
        search=sasa_optax.LineSearch(increase_factor=10.0, smoothing=1.0)
    )
    _, states = history(
        optimizer,
        lambda x: -steepness * jnp.sum(x),
        jnp.ones(2),
        num_steps=300,
        with_value=with_value,
    )
    chex.assert_tree_all_finite(states)
    found = get(states, "learning_rate")
    assert float(found[-1]) > 1e15
    assert np.isfinite(np.float32(found[-1]) ** 2)


def test_salsa_on_a_loss_without_a_minimum_stays_finite() -> None:
    optimizer = sasa_optax.salsa(
        window=sasa_optax.Window(min_samples=200, max_window=300, leak_ratio=1)
    )
    _, states = history(optimizer, lambda x: -jnp.sum(x), jnp.ones(2), num_steps=600)
    chex.assert_tree_all_finite(states)
    assert float(get(states, "learning_rate")[-1]) > 1e15


def test_a_rate_that_only_falls_never_vanishes() -> None:
    def loss(x: jax.Array, slope: jax.Array) -> jax.Array:
        return slope * jnp.sum(x)

    search = sasa_optax.LineSearch(smoothing=1.0, decrease_factor=0.01)
    optimizer = sasa_optax.scale_by_ssls(search=search)
    slopes = jnp.concatenate([jnp.zeros(300), jnp.ones(200)])
    _, states = history(optimizer, loss, jnp.ones(2), {"slope": slopes})
    found = get(states, "learning_rate")
    assert 0 < float(found[299]) < 1e-15
    # So it can come back.
    assert float(found[-1]) > 1.0


# What value_fn may be.


class CallableObject:
    def __call__(self, params: jax.Array, batch: jax.Array, scale: float = 1.0) -> Any:
        return scale * quadratic(params, batch)


def plain(params: jax.Array, batch: jax.Array, scale: float = 1.0) -> Any:
    return scale * quadratic(params, batch)


def with_kwargs(params: jax.Array, **kwargs: Any) -> Any:
    assert kwargs.pop("unknown", 0.0) is not None
    return plain(params, **kwargs)


def keyword_only(params: jax.Array, *, batch: jax.Array, scale: float = 1.0) -> Any:
    return plain(params, batch, scale)


VALUE_FNS: dict[str, Any] = {
    "plain": plain,
    "jitted": jax.jit(plain),
    "object": CallableObject(),
    "method": CallableObject().__call__,
    "kwargs": with_kwargs,
    "keyword_only": keyword_only,
    "partial": functools.partial(plain, scale=5.0),
    "checkpointed": jax.checkpoint(plain),
}


@pytest.mark.parametrize("name", VALUE_FNS)
def test_value_fn_gets_the_extra_arguments_that_it_takes(name: str) -> None:
    optimizer = sasa_optax.ssls(0.5, search=sasa_optax.LineSearch(max_trials=1))
    x, batch = jnp.ones(2), jnp.full(2, 3.0)
    state = optimizer.init(x)

    @functools.partial(jax.jit, static_argnames="unknown")
    def step_size(batch: jax.Array, scale: Any, unknown: str) -> Any:
        grads = scale * (x - batch)
        _, after = optimizer.update(
            grads,
            state,
            x,
            grad=grads,
            value_fn=VALUE_FNS[name],
            batch=batch,
            scale=scale,
            unknown=unknown,
        )
        return search_of(after).step_size

    # With a curvature of `scale`, 1.9 / scale is the longest step to be accepted.
    for scale, expected in [(1.8, 1.0), (2.0, 0.5)]:
        assert float(step_size(batch, scale, "x")) == expected
    # At its minimum no step is accepted, and none is tried.
    assert float(step_size(x, 1.0, "x")) == 0.25


def test_value_fn_keeps_its_defaults_and_what_is_bound() -> None:
    x = jnp.ones(2)
    optimizer = sasa_optax.scale_by_ssls(
        0.5, search=sasa_optax.LineSearch(max_trials=1)
    )

    def step_size(value_fn: Any, grad: jax.Array, **kwargs: Any) -> float:
        state = optimizer.init(x)
        _, state = optimizer.update(
            grad, state, x, grad=grad, value_fn=value_fn, **kwargs
        )
        return float(search_of(state).step_size)

    batch = jnp.zeros(2)
    assert step_size(plain, x, batch=batch) == 1.0
    steep = functools.partial(plain, scale=5.0)
    assert step_size(steep, 5 * x, batch=batch) == 0.5
    bound = functools.partial(plain, batch=batch, scale=5.0)
    assert step_size(bound, 5 * x, scal=1.0) == 0.5


def positional_only(x: jax.Array, /) -> Any:
    return quadratic(x)


def with_args(params: jax.Array, *args: Any) -> Any:
    assert not args
    return quadratic(params)


@pytest.mark.parametrize(
    ("value_fn", "name"), [(positional_only, "x"), (with_args, "args")]
)
def test_value_fn_does_not_get_by_name_what_it_takes_by_place(
    value_fn: Any, name: str
) -> None:
    optimizer = sasa_optax.scale_by_ssls()
    x = jnp.ones(2)
    _, state = optimizer.update(
        x, optimizer.init(x), x, grad=x, value_fn=value_fn, **{name: x}
    )
    assert float(get(state, "learning_rate")) == pytest.approx(1.1e-3)


# What is refused.

SCALE_BY = [sasa_optax.scale_by_ssls, sasa_optax.scale_by_salsa]
ALL = [sasa_optax.ssls, sasa_optax.salsa, *SCALE_BY]
for_all = pytest.mark.parametrize("make", ALL)


@for_all
def test_missing_arguments_are_named(make: Any) -> None:
    optimizer, x = make(), jnp.ones(2)
    state = optimizer.init(x)
    with pytest.raises(ValueError, match=r"needs the current parameters.*params\)"):
        optimizer.update(x, state, grad=x, value_fn=quadratic)
    with pytest.raises(ValueError, match=r"needs `value_fn`.*value_fn=value_fn"):
        optimizer.update(x, state, x, grad=x)
    if make in SCALE_BY:
        with pytest.raises(ValueError, match=r"needs `grad`.*grad=grads"):
            optimizer.update(x, state, x, value_fn=quadratic)


@pytest.mark.parametrize("make", [sasa_optax.ssls, sasa_optax.salsa])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: (jnp.sum(x), x), "got a tuple: .*auxiliary"),
        (lambda x: [jnp.sum(x)], "got a list: .*auxiliary"),
        (lambda x: {"loss": jnp.sum(x)}, "got a dict: .*auxiliary"),
        (lambda x: x[:1], r"shape \(1,\) and dtype float32"),
        (lambda x: jnp.int32(1), r"shape \(\) and dtype int32"),
        (lambda x: jnp.sum(x) > 0, r"shape \(\) and dtype bool"),
        (lambda x: jnp.sum(x) * 1j, r"shape \(\) and dtype complex64"),
    ],
)
def test_losses_that_are_no_scalars_are_refused(
    make: Any, result: Callable[..., Any], message: str
) -> None:
    optimizer, x = make(), jnp.ones(2)
    state = optimizer.init(x)
    with pytest.raises(ValueError, match=f"^value_fn's result must be .*{message}"):
        optimizer.update(x, state, x, value_fn=result)
    with pytest.raises(ValueError, match=f"^value must be .*{message}"):
        optimizer.update(x, state, x, value_fn=jnp.sum, value=result(x))


@pytest.mark.parametrize("value", [2.0, np.float64(2.0), np.float32(2.0)])
def test_the_value_may_be_a_number(value: Any) -> None:
    optimizer, x = sasa_optax.scale_by_ssls(0.1), jnp.ones(2)
    _, state = optimizer.update(
        x, optimizer.init(x), x, grad=x, value_fn=jnp.sum, value=value
    )
    assert float(get(state, "learning_rate")) == pytest.approx(0.11)
    assert get(state, "learning_rate").dtype == jnp.float32


NUMBER_0_1 = "a number in (0, 1)"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("smoothing", x, "a number in (0, 1]") for x in (0, 1.1, np.nan, "0.1")),
        *(("sufficient_decrease", x, NUMBER_0_1) for x in (0, 1, "0.5")),
        *(("increase_factor", x, "a number in [1, inf)") for x in (0.5, np.inf)),
        *(("decrease_factor", x, NUMBER_0_1) for x in (0, 1, np.nan)),
        *(("max_trials", x, "an integer of at least 1") for x in (0, 1.5, True)),
        ("direction", "grad", "'gradient' or 'update'"),
        *(("interval", x, "an integer of at least 1") for x in (0, 2.0)),
        *(("max_learning_rate", x, "a number in (0, inf)") for x in (0, np.inf)),
        ("loss_test", "slope", "a sasa_optax.SlopeTest"),
    ],
)
def test_the_options_of_a_search_are_checked(
    name: str, value: Any, allowed: str
) -> None:
    message = f"{name} must be {allowed}, got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sasa_optax.LineSearch(**{name: value})


@for_all
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("learning_rate", x, "a number in (0, inf)") for x in (0, None)),
        *(("min_learning_rate", x, "a number in [0, inf)") for x in (-1, np.nan)),
        ("steps_per_epoch", 0, "an integer of at least 1"),
        ("search", {"smoothing": 0.1}, "a sasa_optax.LineSearch"),
    ],
)
def test_arguments_are_checked(
    make: Any, name: str, value: object, allowed: str
) -> None:
    message = f"{name} must be {allowed}, got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**{name: value})


@for_all
def test_a_schedule_is_refused_as_the_rate(make: Any) -> None:
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    with pytest.raises(ValueError, match=r"learning_rate must be .*got the schedule"):
        make(schedule)


@for_all
@pytest.mark.parametrize("most", [0.05, 0.1])
def test_the_largest_rate_exceeds_the_others(make: Any, most: float) -> None:
    search = sasa_optax.LineSearch(max_learning_rate=most)
    for name in ("learning_rate", "min_learning_rate"):
        with pytest.raises(
            ValueError,
            match=f"^max_learning_rate must be greater than {name}, "
            f"got max_learning_rate={most} and {name}=0.1",
        ):
            make(**{"learning_rate": 0.01, name: 0.1, "search": search})


# In company.


def test_multi_steps_gives_it_the_mean_gradient_at_every_other_step() -> None:
    salsa = sasa_optax.salsa(
        0.01,
        momentum=0.75,
        weight_decay=0.5,
        window=sasa_optax.Window(max_window=8, min_samples=4),
    )
    optimizer = optax.MultiSteps(salsa, every_k_schedule=2)
    x = jnp.array([1.0, -2.0])
    state = optimizer.init(x)
    step = jax.jit(lambda g, s: optimizer.update(g, s, x, value_fn=jnp.sum))
    counts, moves = [], []
    for k in range(4):
        # With the decay, means of 1 and 3 for the second parameter.
        updates, state = step(jnp.full(2, 1.5 + k), state)
        counts.append(int(search_of(state).num_evaluations))
        moves.append(float(updates[1]))
    assert counts == [0, 2, 2, 4]
    expected = [0, -0.011 * 1 / 4, 0, -0.0121 * (3 / 4 + 3 / 16)]
    np.testing.assert_allclose(moves, expected, rtol=1e-5)
    losses = get(state, "losses").buffer[0, :2]
    np.testing.assert_allclose(losses, -1 + 0.5 / 2 * 5, rtol=1e-6)


def test_inject_hyperparams_leaves_every_number_open_to_change() -> None:
    def make(
        learning_rate: Any, smoothing: Any, max_learning_rate: Any, max_trials: Any
    ) -> optax.GradientTransformation:
        search = sasa_optax.LineSearch(
            smoothing=smoothing,
            max_learning_rate=max_learning_rate,
            max_trials=max_trials,
        )
        return sasa_optax.ssls(learning_rate, momentum=0.0, search=search)

    optimizer = optax.inject_hyperparams(make)(
        0.01, smoothing=0.25, max_learning_rate=1.0, max_trials=3
    )
    x = jnp.ones(2)
    state = optimizer.init(x)
    step = jax.jit(
        lambda state: optimizer.update(jnp.ones(2), state, x, value_fn=jnp.sum)
    )
    updates, state = step(state)
    rate = 0.01 * 1.25
    np.testing.assert_allclose(updates, -rate, rtol=1e-6)
    # The search has found a multiple of the rate given, and keeps it.
    state.hyperparams["learning_rate"] = jnp.float32(0.02)
    updates, state = step(state)
    rate = 2 * rate * 1.25
    np.testing.assert_allclose(updates, -rate, rtol=1e-6)
    state.hyperparams["smoothing"] = jnp.float32(0.5)
    updates, state = step(state)
    rate *= 1.5
    np.testing.assert_allclose(updates, -rate, rtol=1e-6)
    state.hyperparams["max_learning_rate"] = jnp.float32(0.04)
    updates, state = step(state)
    np.testing.assert_allclose(updates, -0.04, rtol=1e-6)
    assert step._cache_size() == 1


def test_inject_hyperparams_takes_steps_per_epoch_as_static() -> None:
    optimizer = optax.inject_hyperparams(
        sasa_optax.ssls, static_args="steps_per_epoch"
    )(0.01, steps_per_epoch=25)
    x = jnp.ones(2)
    _, state = jax.jit(functools.partial(optimizer.update, value_fn=jnp.sum))(
        x, optimizer.init(x), x
    )
    rate = get(state.inner_state, "learning_rate")
    assert float(rate) == pytest.approx(0.012)


def test_under_a_mask_value_fn_gets_the_masked_parameters() -> None:
    params = {"w": jnp.array([2.0]), "frozen": jnp.array([1.0])}
    mask = {"w": True, "frozen": False}
    optimizer = optax.chain(
        optax.masked(sasa_optax.ssls(0.6, momentum=0.0), mask),
        optax.masked(optax.set_to_zero(), {"w": False, "frozen": True}),
    )

    def value_fn(masked: Any) -> jax.Array:
        assert jax.tree.leaves(masked["frozen"]) == []
        return quadratic(masked["w"]) + quadratic(params["frozen"])

    state = optimizer.init(params)
    updates, state = jax.jit(functools.partial(optimizer.update, value_fn=value_fn))(
        params, state, params
    )
    rate = 0.9 * 0.6 + 0.1 * 1.2
    np.testing.assert_allclose(updates["w"], -rate * params["w"], rtol=1e-6)
    np.testing.assert_array_equal(updates["frozen"], 0.0)
    np.testing.assert_allclose(get(state, "learning_rate"), rate, rtol=1e-6)


def test_behind_a_clip_it_searches_along_the_clipped_gradient() -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), sasa_optax.ssls(5.0))
    state = one_step(optimizer, quadratic, jnp.array([3.0, 4.0]))
    # (5 - eta)^2 / 2 <= 25/2 - 0.05 eta up to 9.9: ten is too much, five is not.
    assert float(search_of(state).step_size) == pytest.approx(5.0)
    # Along the gradient itself it would have been too much, as 1.9 is the limit.
    state = one_step(sasa_optax.ssls(5.0), quadratic, jnp.array([3.0, 4.0]))
    assert float(search_of(state).step_size) == pytest.approx(2.5)


def test_inside_apply_if_finite() -> None:
    optimizer = optax.apply_if_finite(sasa_optax.ssls(0.1, momentum=0.0), 5)
    x = jnp.ones(2)

    @jax.jit
    def step(grads: jax.Array, state: Any) -> Any:
        return optimizer.update(grads, state, x, value_fn=quadratic)

    state = optimizer.init(x)
    updates, after = step(x * jnp.nan, state)
    np.testing.assert_array_equal(updates, 0.0)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    updates, after = step(x, after)
    np.testing.assert_allclose(updates, -0.11, rtol=1e-6)


def test_under_vmap_every_member_searches_for_itself() -> None:
    optimizer = sasa_optax.ssls(
        0.5,
        momentum=0.5,
        search=sasa_optax.LineSearch(smoothing=0.5, max_trials=4),
    )

    def run(x: jax.Array, curvature: jax.Array) -> Any:
        batches = {"curvature": jnp.broadcast_to(curvature, (10,))}
        return history(
            optimizer,
            lambda x, curvature: quadratic(x, 0.0, curvature),
            x,
            batches,
            with_value=False,
        )

    xs = jnp.array([[1.0, 2.0], [3.0, 0.0], [-1.0, 5.0]])
    curvatures = jnp.array([0.1, 3.0, 40.0])
    together = jax.vmap(run)(xs, curvatures)
    alone = jax.jit(run)
    for k in range(3):
        member = jax.tree.map(lambda leaf, k=k: leaf[k], together)
        chex.assert_trees_all_close(
            member, alone(xs[k], curvatures[k]), rtol=1e-5, atol=1e-6
        )
    counts = search_of(together[1]).num_evaluations[:, -1]
    assert len(set(counts.tolist())) > 1


@x64
@for_given_or_not
def test_gradients_pass_through_the_steps_but_not_the_search(with_value: bool) -> None:
    optimizer = sasa_optax.ssls(0.3, momentum=0.0)
    curvature = jnp.array([1.0, 2.0])

    def loss(x: jax.Array, target: Any = 0.0) -> jax.Array:
        return quadratic(x, target, curvature)

    def unrolled(x: jax.Array, target: Any = 0.0) -> Any:
        params, states = history(
            optimizer,
            functools.partial(loss, target=target),
            x,
            num_steps=3,
            with_value=with_value,
        )
        return params[-1].sum(), get(states, "learning_rate")

    x = jnp.array([1.0, -2.0])
    (_, found), grads = jax.jit(jax.value_and_grad(unrolled, has_aux=True))(x)
    # With the rates for constants, each step multiplies by 1 - rate * curvature.
    steps = 1 - np.asarray(found)[:, None] * np.asarray(curvature)
    np.testing.assert_allclose(grads, steps.prod(axis=0), rtol=1e-12)
    _, tangent = jax.jvp(lambda x: unrolled(x)[0], (x,), (jnp.ones(2),))
    np.testing.assert_allclose(tangent, steps.prod(axis=0).sum(), rtol=1e-12)
    # value_fn may be a function of what is differentiated.
    of_target = jax.grad(lambda target: unrolled(x, target)[0])(0.0)
    np.testing.assert_allclose(of_target, (1 - steps.prod(axis=0)).sum(), rtol=1e-12)


def test_one_compilation_and_buffers_that_are_donated() -> None:
    optimizer = sasa_optax.ssls(0.1, weight_decay=0.01)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        value, grads = jax.value_and_grad(plain)(params, batch)
        updates, state = optimizer.update(
            grads, state, params, value=value, value_fn=plain, batch=batch
        )
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(2)
    state = optimizer.init(params)
    for k in range(5):
        # What passes through as it is, such as the unused last test, stays.
        controller = state.controller.controller
        old = params, state.trace, controller.step, controller.scale
        params, state = step(params, state, jnp.full(2, float(k)))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert step._cache_size() == 1
    chex.assert_tree_all_finite((params, state))
    assert int(get(state, "step")) == 5


@x64
def test_salsa_compiles_once_for_its_whole_life() -> None:
    run = Salsa()
    run.step(0.0)
    num_compiled = salsa_step._cache_size()
    states = run.run(np.arange(12.0))
    assert active(states)[0]
    assert not active(states)[-1]
    assert salsa_step._cache_size() == num_compiled
