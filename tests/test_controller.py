"""When a test runs, what a drop does, and what the state holds."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import (
    ALL,
    OPTIMIZERS,
    PARAMS,
    PLAIN,
    SERVOS,
    SMALL,
    always_stationary,
    small,
    smaller,
    started,
)

import sasa_optax


def _states(
    optimizer: optax.GradientTransformation,
    num_steps: int,
    grad: float | Callable[[int], float] = 0.1,
) -> Iterator[Any]:
    params = jnp.ones(2)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(1, num_steps + 1):
        g = grad(step) if callable(grad) else grad
        updates, state = update(jnp.full(2, g), state, params)
        params = optax.apply_updates(params, updates)
        yield state


@jax.jit
def _num_drops(window: sasa_optax.Window) -> jax.Array:
    """The number of drops after each of 80 steps, where every test that runs fires."""
    optimizer = sasa_optax.scale_by_sasa_plus(
        0.5, test=always_stationary, window=window
    )

    def step(state: Any, _: Any) -> Any:
        _, state = optimizer.update(jnp.ones(2), state, jnp.ones(2))
        return state, optax.tree.get(state, "num_drops")

    start = optimizer.init(jnp.ones(2))
    return jax.lax.scan(step, start, None, length=80)[1]


@hypothesis.given(
    min_samples=st.integers(4, 12),
    test_interval=st.integers(1, 9),
    leak_ratio=st.integers(1, 4),
    warmup_steps=st.integers(0, 30),
)
def test_drops_come_exactly_when_the_rule_says(
    min_samples: int, test_interval: int, leak_ratio: int, warmup_steps: int
) -> None:
    window = sasa_optax.Window(
        min_samples=min_samples,
        test_interval=test_interval,
        leak_ratio=leak_ratio,
        warmup_steps=warmup_steps,
        max_window=16,
    )
    expected, since = [], 0
    for step in range(1, 81):
        since += 1
        kept = min(-(-since // leak_ratio), 16)
        due = kept > min_samples and step % test_interval == 0
        if due and step > warmup_steps:
            expected.append(step)
            since = 0
    drops = np.diff(np.asarray(_num_drops(window)), prepend=0)
    assert (np.flatnonzero(drops) + 1).tolist() == expected


def test_before_the_end_of_warmup_a_test_is_noted_but_not_acted_on() -> None:
    optimizer = sasa_optax.scale_by_sasa_plus(
        0.5, test=always_stationary, **smaller(warmup_steps=8)
    )
    *_, last = _states(optimizer, 8)
    assert bool(last.last_test.stationary)
    assert int(last.last_test.at_step) == 8
    assert int(last.num_drops) == 0
    assert float(last.learning_rate) == 0.5


def test_a_drop_cuts_the_rate_and_empties_the_window() -> None:
    optimizer = sasa_optax.scale_by_sasa_plus(
        0.5, test=always_stationary, factor=0.25, **SMALL
    )
    before, after, restarted = list(_states(optimizer, 6))[3:]
    assert float(before.learning_rate) == 0.5
    assert float(after.learning_rate) == 0.125
    assert int(after.window.total) == 0
    assert int(after.last_test.num_samples) == 5
    assert int(restarted.window.total) == 1


def test_the_new_rate_serves_the_next_step() -> None:
    optimizer = sasa_optax.scale_by_sasa_plus(1.0, test=always_stationary, **SMALL)
    params = grads = jnp.ones(2)
    (state, update), moves = started(optimizer, params), []
    for _ in range(6):
        updates, state = update(grads, state, params)
        moves.append(float(updates[0]))
    np.testing.assert_allclose(moves, [-1, -1, -1, -1, -1, -0.1], rtol=1e-6)


@pytest.mark.parametrize("name", ["sasa", "sasa_plus"])
def test_momentum_starts_afresh_after_a_drop(name: str) -> None:
    beta = 0.9
    optimizer = getattr(sasa_optax, name)(1.0, momentum=beta, **SMALL)
    grads = jnp.array([1.0, -2.0])
    state = optimizer.init(jnp.ones(2))
    for _ in range(3):
        _, state = optimizer.update(grads, state, jnp.ones(2))
    np.testing.assert_allclose(state.trace, (1 - beta**3) * grads, rtol=1e-6)
    dropped = optax.tree.set(state, last_drop=jnp.int32(3))
    _, state = optimizer.update(grads, dropped, jnp.ones(2))
    np.testing.assert_allclose(state.trace, (1 - beta) * grads, rtol=1e-6)


@pytest.mark.environment("7. Faults", "a rate at its floor", "scale_by_sasa_plus")
def test_at_the_floor_nothing_drops_any_more() -> None:
    optimizer = sasa_optax.scale_by_sasa_plus(
        0.5, test=always_stationary, min_learning_rate=0.02, **SMALL
    )
    states = list(_states(optimizer, 40))
    rates = [float(state.learning_rate) for state in states]
    assert sorted(set(rates)) == pytest.approx([0.02, 0.05, 0.5])
    assert min(rates) >= np.float32(0.02)
    assert int(states[-1].num_drops) == 2
    assert bool(states[-1].last_test.stationary)
    assert int(states[-1].last_test.at_step) == 40


@pytest.mark.environment("7. Faults", "a rate at its floor", "reduce_on_stationarity")
def test_min_scale_is_the_floor_of_the_scale() -> None:
    optimizer = sasa_optax.reduce_on_stationarity(
        test=always_stationary, min_scale=0.05, **SMALL
    )
    scales = [float(state.scale) for state in _states(optimizer, 20)]
    assert sorted(set(scales)) == pytest.approx([0.05, 0.1, 1.0])
    assert min(scales) >= np.float32(0.05)


def test_a_schedule_is_scaled_by_the_drops_and_may_go_below_the_floor() -> None:
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    optimizer = sasa_optax.scale_by_sasa_plus(
        schedule,
        test=always_stationary,
        min_learning_rate=0.3,
        factor=0.5,
        **smaller(warmup_steps=11),
    )
    states = list(_states(optimizer, 20))
    rates = [float(state.learning_rate) for state in states]
    # Each state holds the rate of the step to come.
    warmup = np.arange(1, 12).clip(max=10) / 10
    np.testing.assert_allclose(rates[:11], warmup, rtol=1e-6)
    np.testing.assert_allclose(rates[11:], [0.5] * 5 + [0.3] * 4, rtol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_scale_min_samples_keeps_the_rate_from_collapsing(scaled: bool) -> None:
    """Each cut makes the dynamics on a noisy quadratic ten times slower."""
    window = sasa_optax.Window(min_samples=100, scale_min_samples=scaled)
    optimizer = sasa_optax.sasa_plus(5.0, window=window)
    curvatures, start = jnp.geomspace(0.01, 1.0, 20), jnp.ones(20)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = curvatures * params + jax.random.normal(key, (20,))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 20_000)
    (_, state), _ = jax.jit(functools.partial(jax.lax.scan, step))(
        (start, optimizer.init(start)), keys
    )
    rate = float(optax.tree.get(state, "learning_rate"))
    assert rate > 1e-3 if scaled else rate < 1e-12


def test_the_rate_can_be_changed_by_hand_through_the_scale() -> None:
    optimizer = sasa_optax.sasa_plus(0.5)
    state = optimizer.init(PARAMS)
    state = optax.tree.set(state, scale=jnp.float32(0.1))
    _, state = optimizer.update(PARAMS, state, PARAMS)
    assert float(optax.tree.get(state, "learning_rate")) == pytest.approx(0.05)


def test_a_result_that_is_not_finite_never_fires() -> None:
    def broken(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
        return sasa_optax.TestResult(mean=jnp.nan, upper=jnp.inf, stationary=True)

    optimizer = sasa_optax.scale_by_sasa_plus(0.5, test=broken, **SMALL)
    *_, last = _states(optimizer, 10)
    assert int(last.last_test.at_step) == 10
    assert last.last_test.reason == sasa_optax.Reason.NOT_FINITE
    assert int(last.num_drops) == 0
    chex.assert_tree_all_finite(last)


def test_a_statistic_and_a_test_of_ones_own() -> None:
    def gradient_norm(t: sasa_optax.Transition) -> sasa_optax.Sample:
        return sasa_optax.Sample(jnp.sqrt(t.squared_norm(t.grad)))

    def small_on_average(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
        mean = sasa_optax.estimate_mean(samples).mean
        return sasa_optax.TestResult(mean=mean, stationary=mean < 1.0)

    optimizer = sasa_optax.sasa_plus(
        0.5, statistic=gradient_norm, test=small_on_average, **SMALL
    )
    shrinking = list(_states(optimizer, 30, lambda k: 3.0 / k))
    means = [float(optax.tree.get(state, "last_test").mean) for state in shrinking]
    drops = [int(optax.tree.get(state, "num_drops")) for state in shrinking]
    first = drops.index(1)
    norms = np.sqrt(2) * 3.0 / np.arange(1, 31)
    np.testing.assert_allclose(means[first], norms[: first + 1].mean(), rtol=1e-5)
    assert norms[: first + 1].mean() < 1.0 <= norms[:first].mean()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_slope_records_the_loss_with_its_weight_decay(dtype: Any) -> None:
    optimizer = sasa_optax.slope(0.5, momentum=0.0, weight_decay=0.1)
    params, grads = jnp.array([1.0, 2.0]), jnp.array([0.5, -0.5])
    state, update = started(optimizer, params)
    loss = jnp.asarray(-3.0, dtype)
    updates, state = update(grads, state, params, value=loss)
    after = np.asarray(params) * (1 - 0.5 * 0.1) - 0.5 * np.asarray(grads)
    recorded = state.controller.window.buffer[0, 0]
    np.testing.assert_allclose(recorded, -3.0 + 0.05 * np.sum(after**2), rtol=1e-6)
    np.testing.assert_allclose(params + updates, after, rtol=1e-6)


def test_slope_drops_on_a_loss_that_stopped_falling_not_on_one_that_falls() -> None:
    optimizer = sasa_optax.slope(1.0, **smaller(min_samples=20))
    noise = jax.random.normal(jax.random.key(0), (30,))
    update = jax.jit(optimizer.update)

    def num_drops(losses: jax.Array) -> int:
        params = jnp.ones(2)
        state = optimizer.init(params)
        for loss in losses:
            _, state = update(params, state, params, value=loss)
        return int(optax.tree.get(state, "num_drops"))

    # Losses may be negative, as those of an ELBO are.
    falling = -jnp.arange(30.0)
    assert num_drops(falling + noise) == 0
    assert num_drops(noise - 100) == 1


def test_slope_without_the_loss_says_what_to_call() -> None:
    optimizer = sasa_optax.slope(0.1)
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=r"update\(grads, state, params, value=loss\)"):
        optimizer.update(PARAMS, state, PARAMS)


def test_statistics_can_read_the_value_and_the_gradient() -> None:
    seen = []

    def statistic(t: sasa_optax.Transition) -> sasa_optax.Sample:
        seen.append((t.value, t.grad))
        assert t.value is not None
        return sasa_optax.Sample(t.value)

    optimizer = optax.chain(
        optax.scale_by_adam(),
        sasa_optax.scale_by_sasa_plus(0.1, statistic=statistic),
    )
    grads = jnp.ones(2)
    state = optimizer.init(grads)
    optimizer.update(grads, state, grads, value=jnp.float32(7.0), grad=grads)
    assert float(seen[0][0]) == 7.0
    assert seen[0][1] is grads


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestEveryOptimizer:
    def test_without_params_it_says_what_to_call(self, name: str) -> None:
        optimizer = OPTIMIZERS[name]()
        state = optimizer.init(PARAMS)
        with pytest.raises(
            ValueError, match=r"optimizer\.update\(grads, state, params"
        ):
            optimizer.update(PARAMS, state)

    def test_unknown_extra_arguments_are_ignored(self, name: str) -> None:
        optimizer = OPTIMIZERS[name](**SMALL)
        params = jnp.ones(2)
        state = optimizer.init(params)

        def program(is_given_more: bool) -> str:
            def update(grads: Any, state: Any, params: Any) -> Any:
                more: dict[str, Any] = {"value_fn": print, "other": "x", "value": 1.0}
                more = more if is_given_more else {}
                return optimizer.update(grads, state, params, grad=grads, **more)

            return jax.jit(update).lower(params, state, params).as_text()

        assert program(is_given_more=True) == program(is_given_more=False)

    def test_the_state_holds_what_the_contract_names(self, name: str) -> None:
        state = OPTIMIZERS[name]().init(PARAMS)
        assert int(optax.tree.get(state, "num_drops")) == 0
        assert int(optax.tree.get(state, "num_nonfinite")) == 0
        assert isinstance(optax.tree.get(state, "last_test"), sasa_optax.TestResult)
        rate = "scale" if name == "reduce_on_stationarity" else "learning_rate"
        assert float(optax.tree.get(state, rate)) == 1.0

    @pytest.mark.environment("4. optax", "`inject_hyperparams`")
    def test_it_survives_inject_hyperparams(self, name: str) -> None:
        make = OPTIMIZERS[name]
        factory, keywords = make, {}
        if isinstance(make, functools.partial):
            factory, keywords = make.func, make.keywords
        args = () if name in ("reduce_on_stationarity", "slope") else (1.0,)
        injected = optax.inject_hyperparams(factory)(*args, **keywords, **SMALL)
        plain, reference = small(name)
        params = jnp.ones(2)
        state, update = started(injected, params)
        expected = plain.init(params)
        for _ in range(8):
            updates, state = update(params, state, params)
            wanted, expected = reference(params, expected, params)
            chex.assert_trees_all_close(updates, wanted, rtol=1e-5)
        chex.assert_trees_all_close(state.inner_state, expected, rtol=1e-5)
        assert int(optax.tree.get(expected, "last_test").at_step) >= 5
        assert int(optax.tree.get(expected, "step")) == 8


@pytest.mark.parametrize("name", ALL)
def test_a_state_has_one_step_at_most(name: str) -> None:
    """`optax.tree.get` raises an error if there are several."""
    state = ALL[name](**SMALL).init(PARAMS)
    counts_steps = name not in (*PLAIN, *SERVOS)
    assert len(optax.tree.get_all_with_path(state, "step")) == counts_steps
    assert optax.tree.get(state, "step") == (0 if counts_steps else None)


def test_a_result_has_its_step_under_both_names() -> None:
    assert sasa_optax.TestResult(at_step=7).step == 7


# The annotations of chex do not say that this can be called.
_variants: Any = cast(Any, chex.variants)(
    with_jit=True, without_jit=True, with_device=True, without_device=True
)


class QhmVariants(chex.TestCase):
    @_variants
    def test_qhm_at_nu_one_is_sgd_with_momentum_a_tenth_the_rate(self) -> None:
        ours, theirs = sasa_optax.qhm(1.0, momentum=0.9), optax.sgd(0.1, momentum=0.9)
        params = jnp.arange(4.0)
        state, other = ours.init(params), theirs.init(params)
        variant: Any = cast(Any, self).variant
        update, reference = variant(ours.update), variant(theirs.update)
        for grads in jax.random.normal(jax.random.key(0), (5, 4)):
            updates, state = update(grads, state, params)
            expected, other = reference(grads, other, params)
            chex.assert_trees_all_close(updates, expected, rtol=1e-5)

    @_variants
    def test_qhm_at_nu_zero_is_sgd(self) -> None:
        ours = sasa_optax.qhm(0.1, momentum=0.9, nu=0.0)
        params = jnp.arange(4.0)
        variant: Any = cast(Any, self).variant
        updates, _ = variant(ours.update)(params, ours.init(params), params)
        chex.assert_trees_all_close(updates, -0.1 * params, rtol=1e-6)


def test_an_array_given_as_the_rate_is_copied_into_the_state() -> None:
    rate = jnp.array(0.5)
    leaves = jax.tree.leaves(sasa_optax.sasa_plus(rate).init(PARAMS))
    pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert rate.unsafe_buffer_pointer() not in pointers


def test_under_inject_hyperparams_the_rate_can_be_set_by_hand() -> None:
    optimizer = optax.inject_hyperparams(sasa_optax.scale_by_sasa_plus)(0.5)
    state, update = started(optimizer, PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    updates, _ = update(PARAMS, state, PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: -0.25 * x, PARAMS))


def _compilations(function: Callable[..., Any], *args: Any) -> list[str]:
    """What JAX says of the programs that it compiles for a call."""
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        records = []
        patch.setattr("logging.Logger.handle", lambda _, record: records.append(record))
        function(*args)
    messages = [record.getMessage() for record in records]
    return [message for message in messages if "ompil" in message]


def test_without_jit_the_second_step_compiles_nothing() -> None:
    optimizer = sasa_optax.sasa_plus(0.1, nu=0.7, weight_decay=0.1)
    state = optimizer.init(PARAMS)
    for _ in range(2):
        _, state = optimizer.update(PARAMS, state, PARAMS)
    assert _compilations(optimizer.update, PARAMS, state, PARAMS) == []


def test_init_compiles_the_step_of_the_first_test_as_a_whole() -> None:
    jax.clear_caches()
    compiled = _compilations(sasa_optax.sasa_plus(0.1).init, PARAMS)
    finished = [message for message in compiled if "Finished XLA" in message]
    assert sum("next_test" in message for message in finished) == 1
    # The others make zeros and copies, one for each shape and dtype.
    assert len(finished) <= 10


def test_momentum_sgd_with_the_controller_needs_no_temporary() -> None:
    params = {f"w{i}": jnp.ones((500, 500)) for i in range(4)}
    size = 4 * 500 * 500 * 4
    for optimizer in (sasa_optax.sasa_plus(0.1), sasa_optax.sasa(0.1)):

        def step(
            params: Any,
            state: Any,
            grads: Any,
            optimizer: optax.GradientTransformation = optimizer,
        ) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1))
        lowered = compiled.lower(params, optimizer.init(params), params)
        memory: Any = lowered.compile().memory_analysis()
        # The window is laid out in order for the test. Before JAX 0.10, XLA also
        # copies parameters, gradients and momentum.
        window = 16384 * 4
        older = 3 * size if jax.__version_info__ < (0, 10) else 0
        assert memory.temp_size_in_bytes < older + 8 * window < older + 0.5 * size
