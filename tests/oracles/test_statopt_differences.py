"""The differences that docs/from-statopt.md lists are real.

What is said here of statopt 0.2 was read in its source, and counted in runs of it.
"""

import dataclasses
import functools
import json
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from statopt_guide import PROSE, ROOT, always_stationary, make, paths, run_guide

import sasa_optax

_GOLDEN = ROOT / "tests" / "golden"
# Small enough that a test comes within a few steps.
_SMALL = sasa_optax.Window(min_samples=4, test_interval=1, leak_ratio=1, max_window=64)


def _warming_up(warmup_steps: Any) -> sasa_optax.Window:
    return dataclasses.replace(_SMALL, warmup_steps=warmup_steps)


# Against what statopt recorded.


class _Test(NamedTuple):
    """A test that statopt made, with the samples that it judged."""

    values: np.ndarray
    num_drops: int
    half_width: float
    stationary: bool


def _recorded(name: str) -> tuple[str | None, list[_Test]]:
    """The variance mode of a trace, and its tests."""
    with np.load(_GOLDEN / f"{name}.npz") as arrays:
        trace = dict(arrays)
    meta = json.loads(str(trace["meta"]))
    tests, last_drop, num_drops = [], 0, 0
    for step, _, lower, upper, stationary in trace["tests"]:
        kept = -(-(int(step) - last_drop) // meta["statopt_kwargs"]["leak_ratio"])
        values = trace["statistic"][int(step) - kept : int(step)]
        tests.append(_Test(values, num_drops, (upper - lower) / 2, bool(stationary)))
        if stationary:
            last_drop, num_drops = int(step), num_drops + 1
    return meta["var_mode"], tests


@functools.partial(jax.jit, static_argnums=0)
def _judge(
    variance: str, values: jax.Array, num_samples: jax.Array, num_drops: jax.Array
) -> sasa_optax.TestResult:
    step, scales = jnp.zeros((), jnp.int32), jnp.ones_like(values)
    samples = sasa_optax.Samples(values, scales, num_samples, step, num_drops)
    return sasa_optax.ZeroMeanTest(variance=variance)(samples)


def _ours(tests: list[_Test], variance: str) -> tuple[np.ndarray, list[bool]]:
    """The half-widths and decisions of our test, on the samples of statopt's."""
    results = []
    for test in tests:
        num_samples = len(test.values)
        padded = np.pad(test.values, (0, 1400 - num_samples))
        counts = np.int32(num_samples), np.int32(test.num_drops)
        results.append(jax.device_get(_judge(variance, padded, *counts)))
    widths = [result.upper - result.lower for result in results]
    return np.array(widths) / 2, [bool(result.stationary) for result in results]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sasa_plus_iid", "salsa_iid"])
def test_mb_is_the_variance_of_independent_samples(name: str) -> None:
    var_mode, tests = _recorded(name)
    # No mode was given, so it was the default, which is "mb".
    assert var_mode is None
    recorded = np.array([test.half_width for test in tests])
    iid, decisions = _ours(tests, "iid")
    np.testing.assert_allclose(iid, recorded, rtol=1e-8)
    assert decisions == [test.stationary for test in tests]
    # These are correlated samples, whose mean is less certain.
    batch_means, _ = _ours(tests, "batch_means")
    assert np.median(batch_means / recorded) > 1.5


def _dof(num_samples: int) -> tuple[int, int]:
    """Degrees of freedom of batch means, in statopt and by the number of batches."""
    length = math.isqrt(num_samples)
    return length - 1, num_samples // length - 1


def _quantile(dof: int | np.ndarray) -> Any:
    return scipy.stats.t.ppf(0.975, dof)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sasa_plus_batch_means", "salsa_batch_means"])
def test_batch_means_have_as_many_degrees_of_freedom_as_batches_less_one(
    name: str,
) -> None:
    var_mode, tests = _recorded(name)
    assert var_mode == "bm"
    widths, decisions = _ours(tests, "batch_means")
    theirs, right = np.array([_dof(len(test.values)) for test in tests]).T
    errors = []
    for values, *_ in tests:
        length = math.isqrt(len(values))
        batches = values[: len(values) // length * length].reshape(-1, length)
        squares = np.sum((batches.mean(axis=1) - values.mean()) ** 2)
        variance = length / (len(batches) - 1) * squares
        errors.append(math.sqrt(variance / len(values)))
    recorded = np.array([test.half_width for test in tests])
    np.testing.assert_allclose(recorded, errors * _quantile(theirs), rtol=1e-8)
    np.testing.assert_allclose(widths, errors * _quantile(right), rtol=1e-6)
    # Now and then the two agree.
    assert np.mean(theirs != right) > 0.5
    assert 0.01 < np.abs(widths / recorded - 1).max() < 0.0165
    assert decisions == [test.stationary for test in tests]


def test_the_largest_error_of_statopts_degrees_of_freedom() -> None:
    # statopt tests no fewer, and our default window holds no more.
    sizes = range(101, 16385)
    theirs, right = np.array([_dof(size) for size in sizes]).T
    errors = np.abs(_quantile(theirs) / _quantile(right) - 1)
    worst = errors.argmax()
    figure = f"{100 * errors[worst]:.1f} % at most ({sizes[worst]} samples)"
    assert f"up to 1.6 % in the golden traces and {figure}" in PROSE


# What the runs are like.


def _on_losses(optimizer: Any, losses: jax.Array) -> dict[str, jax.Array]:
    """The metrics of a run on these losses, every trial of which is accepted."""
    update = optax.with_extra_args_support(optimizer).update
    params = jnp.ones(2)

    def step(state: Any, loss: jax.Array) -> Any:
        _, state = update(
            params, state, params, value=loss, value_fn=lambda params: loss - 100
        )
        return state, sasa_optax.metrics(state)

    return jax.lax.scan(step, optimizer.init(params), losses)[1]


def test_the_rate_can_have_a_floor() -> None:
    with np.load(_GOLDEN / "sasa_plus_batch_means.npz") as trace:
        assert f"to {trace['lr'][-1]:.0e} in `sasa_plus_batch_means`" in PROSE

    @jax.jit
    def rate_at_the_end(floor: float) -> jax.Array:
        optimizer = sasa_optax.sasa_plus(
            0.5, test=always_stationary, min_learning_rate=floor, window=_SMALL
        )
        return _on_losses(optimizer, jnp.zeros(100))["learning_rate"][-1]

    # No floor is the default.
    assert paths("sasa_plus")["min_learning_rate"] == 0.0
    assert rate_at_the_end(0.0) < 1e-15
    assert rate_at_the_end(0.02) == np.float32(0.02)


def _statopt_slots(num_steps: int, leak_ratio: int) -> int:
    """The slots of its buffer, by the rule in the guide, so long after a drop."""
    slots, end = 1000, 0
    for step in range(1, num_steps + 1):
        if end == slots:
            slots *= 2
        end += 1
        kept = -(-step // leak_ratio)
        if end - kept >= kept:
            end = kept
    return slots


def test_the_memory_of_samples_is_fixed_and_statopts_grows() -> None:
    optimizer = sasa_optax.sasa_plus(
        0.1, test=always_stationary, window=_warming_up(10**6)
    )

    def num_bytes(state: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def step(state: Any, grads: jax.Array) -> Any:
        return optimizer.update(grads, state, jnp.ones(2))[1], None

    start, grads = optimizer.init(jnp.ones(2)), jnp.ones((3000, 2))
    state, _ = jax.jit(lambda start: jax.lax.scan(step, start, grads))(start)
    assert int(optax.tree.get(state, "window").total) == 3000
    assert num_bytes(state) == num_bytes(start)
    assert _statopt_slots(3000, leak_ratio=1) == 4000

    eight, all_of_them = _statopt_slots(10**6, 8), _statopt_slots(10**6, 1)
    assert f"need {eight} slots for {10**6 // 8} samples" in PROSE
    assert f"with `leak_ratio=1` {all_of_them} for all" in PROSE
    window = sasa_optax.Window()
    full = window.leak_ratio * window.max_window
    assert f"`leak_ratio * max_window` = {full} steps" in PROSE


def _batches(guide: dict[str, Any], num_steps: int) -> list[tuple[Any, Any]]:
    """The mini-batches of the guide's loop, on the device."""
    images, labels = guide["images"], guide["labels"]
    starts = [32 * (step % 20) for step in range(1, num_steps + 1)]
    return [(images[i : i + 32], labels[i : i + 32]) for i in starts]


def test_steps_run_without_a_transfer() -> None:
    guide = run_guide()
    train_step, optimizer = guide["train_step"], guide["optimizer"]
    params = jax.tree.map(jnp.zeros_like, guide["params"])
    state, batches = optimizer.init(params), _batches(guide, 1200)
    # On a CPU, whose memory is the host's, the guard sees one direction only. For the
    # other, a compiled step could wait for the host only in a callback.
    program = train_step.lower(params, state, *batches[0]).as_text()
    assert not re.search("callback|infeed|outfeed", program)
    with jax.transfer_guard("disallow"):
        for batch in batches:
            params, state, _ = train_step(params, state, *batch)
        with pytest.raises(Exception, match="host-to-device"):
            train_step(params, state, *map(np.asarray, batches[0]))
    metrics = sasa_optax.metrics(state)
    assert not bool(metrics["line_search_active"])
    assert int(metrics["num_drops"]) == 1


def test_nothing_is_printed(capfd: Any) -> None:
    guide = run_guide()
    params = jax.tree.map(jnp.zeros_like, guide["params"])
    state = guide["optimizer"].init(params)
    for batch in _batches(guide, 1200):
        params, state, _ = guide["train_step"](params, state, *batch)
    jax.effects_barrier()
    metrics = jax.device_get(sasa_optax.metrics(state))
    assert not metrics["line_search_active"]
    assert metrics["num_drops"] == 1
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("average", [True, False])
def test_the_state_of_salsa_holds_momentum_and_average_and_no_other_copy(
    average: bool,
) -> None:
    def num_bytes(size: int) -> int:
        state = sasa_optax.salsa(average=average).init(jnp.zeros(size))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    assert num_bytes(20_000) - num_bytes(10_000) == (1 + average) * 4 * 10_000


@functools.partial(jax.jit, static_argnames="give_value")
def _search_once(
    trial_loss: Any, loss: Any, grad: float = 1.0, *, give_value: bool = True
) -> dict[str, jax.Array]:
    """The metrics after a step of SSLS from rate 1, where every trial has one loss."""
    optimizer, params = sasa_optax.ssls(1.0, momentum=0.0), jnp.zeros(1)

    def value_fn(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(x == params), loss, trial_loss).astype(loss.dtype)

    _, state = optimizer.update(
        jnp.full(1, grad),
        optimizer.init(params),
        params,
        value=loss if give_value else None,
        value_fn=value_fn,
    )
    return sasa_optax.metrics(state)


# The rate after a step, by statopt's rule, if the first trial is accepted; and if two
# trials fail, or there is no descent.
_UP, _DOWN = 0.9 + 0.1 * 2.0, 0.9 + 0.1 * 0.5


def test_a_search_evaluates_the_loss_once_for_each_trial() -> None:
    loss = jnp.float32(5.0)
    for trial_loss, trials, rate in ((0.0, 1, _UP), (9.0, 2, _DOWN)):
        for give_value in (True, False):
            metrics = _search_once(trial_loss, loss, give_value=give_value)
            assert metrics["num_evaluations"] == trials + (not give_value)
            assert float(metrics["learning_rate"]) == pytest.approx(rate)


def test_a_nan_trial_fails() -> None:
    metrics = _search_once(jnp.nan, jnp.float32(5.0))
    assert float(metrics["learning_rate"]) == pytest.approx(_DOWN)
    # How statopt asks whether a trial has failed.
    assert not math.nan > 5.0


def test_a_gradient_of_zero_is_no_descent() -> None:
    metrics = _search_once(5.0, jnp.float32(5.0), grad=0.0)
    assert float(metrics["learning_rate"]) == pytest.approx(_DOWN)
    assert metrics["num_evaluations"] == 0


@pytest.mark.parametrize(("rise", "rate"), [(0.0, _UP), (4.0, _DOWN)])
def test_a_rise_within_rounding_is_no_failure(rise: float, rate: float) -> None:
    loss = jnp.asarray(256.0, jnp.bfloat16)
    # The required decrease of 0.05 * 2 is less than half of what bfloat16 resolves
    # there, so statopt's condition fails at once.
    assert loss - jnp.bfloat16(0.1) == loss
    assert 256.0 > 256.0 - 0.05 * 2.0
    metrics = _search_once(256.0 + rise, loss)
    assert float(metrics["learning_rate"]) == pytest.approx(rate)


@jax.jit
def _salsa_on_losses(losses: jax.Array, warmup_steps: Any) -> dict[str, jax.Array]:
    """SALSA whose statistic's test fires from step 5 on, and acts after the warm-up."""
    optimizer = sasa_optax.salsa(
        1e-6, test=always_stationary, window=_warming_up(warmup_steps)
    )
    return _on_losses(optimizer, losses)


@jax.jit
def _slope_on_losses(losses: jax.Array) -> dict[str, jax.Array]:
    return _on_losses(sasa_optax.slope(1e-6, window=_SMALL), losses)


_FALLING = -np.arange(40, dtype=np.float32)


def test_a_test_that_fires_during_warmup_does_not_end_the_search() -> None:
    metrics = _salsa_on_losses(_FALLING, 20)
    assert metrics["test_stationary"].tolist() == [False] * 4 + [True] * 36
    assert metrics["line_search_active"].tolist() == [True] * 20 + [False] * 20
    without = _salsa_on_losses(_FALLING, 0)
    assert without["line_search_active"].tolist() == [True] * 4 + [False] * 36


def test_a_nan_sample_is_left_out() -> None:
    # First the samples of SASA+. The result holds their sum.
    optimizer = sasa_optax.sasa_plus(
        1.0, momentum=0.0, test=always_stationary, window=_warming_up(100)
    )
    params = jnp.ones(2)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for gradient in (0.1, 0.2, np.nan, 0.3, 0.4, 0.5):
        # The momentum would stay NaN, as with any optimizer.
        state = optax.tree.set(state, trace=jnp.zeros(2))
        _, state = update(jnp.full(2, gradient), state, params)
    metrics = sasa_optax.metrics(state)
    assert int(metrics["num_nonfinite"]) == 1
    assert int(metrics["test_num_samples"]) == 5
    gradients = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    samples = 2 * (gradients - gradients**2 / 2)
    np.testing.assert_allclose(metrics["test_mean"], samples.sum(), rtol=1e-5)

    # Then the losses of SLOPE and SALSA.
    losses = _FALLING.copy()
    losses[20] = np.nan
    slope = _slope_on_losses(losses)
    assert int(slope["num_drops"][-1]) == 0
    assert int(slope["num_nonfinite"][-1]) == 1
    assert _salsa_on_losses(losses, 100)["line_search_active"].all()
    # How statopt asks whether the losses still fall, and how long a sample stays.
    fit: Any = scipy.stats.linregress(np.arange(40), losses)
    assert not fit.pvalue < 0.05
    for ratio, sample in ((8, 700), (2, 700), (4, 301)):
        steps = np.arange(sample, 4 * sample)
        oldest = steps + steps // -ratio + 1
        assert steps[oldest > sample][0] == math.ceil(sample * ratio / (ratio - 1))


def test_losses_that_do_not_vary_drop_nothing() -> None:
    losses = np.full(40, 0.7, np.float32)
    assert not _slope_on_losses(losses)["num_drops"].any()
    assert _salsa_on_losses(losses, 100)["line_search_active"].all()
    # Losses that rise do.
    assert _slope_on_losses(-_FALLING)["num_drops"][-1] > 0
    # Where there is no variation, statopt takes zero for the correlation.
    assert scipy.stats.t.cdf(0.0, 38) >= 0.05


def test_statistics_of_bfloat16_parameters_are_float32() -> None:
    params = jnp.ones(2, jnp.bfloat16)
    for function in ("sasa_plus", "slope", "salsa"):
        state = make(function).init(params)
        assert optax.tree.get(state, "window").buffer.dtype == jnp.float32
    losses = optax.tree.get(sasa_optax.salsa().init(params), "losses")
    assert losses.buffer.dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_log_steps_count_from_the_start_of_the_training() -> None:
    rng = np.random.default_rng(0)
    losses = np.arange(60.0) + rng.normal(size=60)
    optimizer = sasa_optax.slope(
        jnp.float64(1.0),
        test=sasa_optax.SlopeTest(log_steps=True),
        window=sasa_optax.Window(
            min_samples=10, test_interval=30, leak_ratio=2, max_window=64
        ),
    )
    metrics = jax.jit(functools.partial(_on_losses, optimizer))(losses)
    assert np.flatnonzero(np.diff(metrics["num_drops"], prepend=0)).tolist() == [29, 59]
    for step in (30, 60):
        steps = np.arange(step - 14, step + 1)
        line: Any = scipy.stats.linregress(np.log(steps), losses[steps - 1])
        assert metrics["test_mean"][step - 1] == pytest.approx(line.slope, rel=1e-5)
    # In statopt the second test sees steps 15 to 29 again, counted from the drop.
    since: Any = scipy.stats.linregress(np.log(np.arange(15, 30)), losses[45:])
    assert metrics["test_mean"][-1] > 1.5 * since.slope


def test_what_statopt_lets_pass_is_refused() -> None:
    for path, value in (("search.smoothing", 5.0), ("momentum", 1.0), ("nu", 7.0)):
        with pytest.raises(ValueError, match=f"{path.split('.')[-1]} must be"):
            make("salsa", {path: value})
    # What statopt refuses is allowed.
    make("sasa_plus", {"window.min_samples": 4})
    with pytest.raises(ValueError, match="min_samples must be"):
        make("sasa_plus", {"window.min_samples": 3})


def test_after_the_switch_nothing_is_evaluated() -> None:
    guide = run_guide()
    rows = guide["history"].rows
    evaluations = np.array([row["num_evaluations"] for row in rows])
    end = int(np.argmin([row["line_search_active"] for row in rows]))
    assert 0 < end < len(rows) - 5
    # A row is written every 50 steps.
    assert np.all(np.diff(evaluations[:end]) >= 50)
    assert np.all(evaluations[end:] == evaluations[end])


def test_the_search_of_ssls_never_ends() -> None:
    # The search of SALSA ends on the same losses.
    run = jax.jit(functools.partial(_on_losses, sasa_optax.ssls(1e-6)))
    assert run(-_FALLING)["line_search_active"].all()
    assert not _salsa_on_losses(-_FALLING, 100)["line_search_active"][-1]
