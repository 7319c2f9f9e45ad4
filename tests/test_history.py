"""metrics and History: what is logged, exported and drawn."""

import csv
import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest

import sasa_optax

matplotlib.use("agg")

_KEYS = {
    "step",
    "learning_rate",
    "scale",
    "num_drops",
    "last_drop",
    "num_nonfinite",
    "num_ascents",
    "next_test",
    "test_step",
    "test_mean",
    "test_lower",
    "test_upper",
    "test_p_value",
    "test_num_samples",
    "test_stationary",
    "test_reason",
}
_PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(2)}


def _eager(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
    """Fires whenever it is asked."""
    return sasa_optax.TestResult(mean=0.5, lower=-1.0, upper=2.0, stationary=True)


_NUM_STEPS = 60


@functools.cache
def _metrics_of_training() -> list[dict[str, jax.Array]]:
    """The metrics after each step of a run of SASA+."""
    window = sasa_optax.Window(
        min_samples=10, leak_ratio=2, test_interval=5, max_window=16
    )
    optimizer = sasa_optax.sasa_plus(1.0, test=_eager, window=window)
    state, metrics = optimizer.init(_PARAMS), []
    update = jax.jit(optimizer.update)
    for _ in range(_NUM_STEPS):
        _, state = update(_PARAMS, state, _PARAMS)
        metrics.append(sasa_optax.metrics(state))
    return metrics


def _train(record_every: int, num_steps: int = _NUM_STEPS) -> sasa_optax.History:
    """The record of the first steps of that run, with losses."""
    history = sasa_optax.History()
    for step, metrics in enumerate(_metrics_of_training()[:num_steps], 1):
        if step % record_every == 0:
            history.record(metrics, loss=1.0 / step)
    return history


def test_metrics_are_scalars_with_the_documented_names_inside_jit() -> None:
    optimizer = optax.chain(optax.clip(1.0), sasa_optax.sasa_plus(0.5))
    metrics = jax.jit(sasa_optax.metrics)(optimizer.init(_PARAMS))
    assert set(metrics) == _KEYS
    assert {value.shape for value in metrics.values()} == {()}
    assert float(metrics["learning_rate"]) == 0.5
    assert not bool(metrics["test_stationary"])


def test_metrics_of_a_scale_have_no_learning_rate() -> None:
    optimizer = optax.chain(optax.adam(1e-3), sasa_optax.reduce_on_stationarity())
    assert set(sasa_optax.metrics(optimizer.init(_PARAMS))) == _KEYS - {"learning_rate"}


@pytest.mark.parametrize(
    "last", [sasa_optax.reduce_on_stationarity(), sasa_optax.adapt_on_progress()]
)
def test_a_rate_that_the_other_optimizer_shows_is_multiplied_by_the_scale(
    last: Any,
) -> None:
    adamw = optax.inject_hyperparams(optax.adamw)(learning_rate=0.25)
    optimizer = optax.chain(optax.clip(1.0), adamw, last)
    state = optax.tree.set(optimizer.init(_PARAMS), scale=jnp.float32(0.125))
    for read in (sasa_optax.metrics, jax.jit(sasa_optax.metrics)):
        assert float(read(state)["learning_rate"]) == 0.25 * 0.125


def test_an_injected_rate_of_its_own_is_not_counted_twice() -> None:
    make = optax.inject_hyperparams(sasa_optax.sasa_plus)
    metrics = sasa_optax.metrics(make(learning_rate=0.5).init(_PARAMS))
    assert float(metrics["learning_rate"]) == 0.5


def test_two_injected_rates_are_no_rate() -> None:
    adamw = optax.inject_hyperparams(optax.adamw)
    optimizer = optax.chain(
        adamw(0.1), adamw(learning_rate=0.2), sasa_optax.reduce_on_stationarity()
    )
    assert "learning_rate" not in sasa_optax.metrics(optimizer.init(_PARAMS))


_SEARCH_KEYS = {"line_search_active", "step_size", "num_evaluations"}


def test_metrics_of_a_line_search_say_what_it_does() -> None:
    ssls = sasa_optax.metrics(sasa_optax.ssls().init(_PARAMS))
    assert set(ssls) == (_KEYS - {"next_test"}) | _SEARCH_KEYS
    salsa = sasa_optax.metrics(sasa_optax.salsa().init(_PARAMS))
    assert set(salsa) == _KEYS | _SEARCH_KEYS | {
        f"loss_{key}" for key in _KEYS if key.startswith("test_")
    }


def test_metrics_find_the_controller_at_any_depth() -> None:
    optimizer = optax.MultiSteps(
        optax.masked(sasa_optax.sasa(0.5), {"w": True, "b": False}), every_k_schedule=2
    )
    state = optimizer.init(_PARAMS)
    assert float(sasa_optax.metrics(state)["learning_rate"]) == 0.5


def test_metrics_of_several_controllers_are_told_apart() -> None:
    optimizer = optax.partition(
        {"fast": sasa_optax.sasa_plus(1.0), "slow": sasa_optax.sasa_plus(0.1)},
        {"w": "fast", "b": "slow"},
    )
    metrics = sasa_optax.metrics(optimizer.init(_PARAMS))
    rates = {k: float(v) for k, v in metrics.items() if k.endswith("/learning_rate")}
    assert len(metrics) == 2 * len(_KEYS)
    assert sorted("fast" in name for name in rates) == [False, True]
    assert all(
        rate == pytest.approx(1.0 if "fast" in k else 0.1) for k, rate in rates.items()
    )
    with pytest.raises(ValueError, match="one optimizer"):
        sasa_optax.History().record(metrics)


def test_metrics_without_a_controller_say_so() -> None:
    with pytest.raises(ValueError, match="opt_state holds no controller"):
        sasa_optax.metrics(optax.adam(1e-3).init(_PARAMS))


@pytest.mark.parametrize("record_every", [1, 3, 10])
def test_every_drop_is_caught_with_the_test_that_made_it(record_every: int) -> None:
    history = _train(record_every)
    # A test needs more than 10 kept samples, 21 since the last drop, and runs at each
    # multiple of 5.
    assert [drop.step for drop in history.drops] == [25, 50]
    assert history.rows[-1]["last_drop"] == 50
    for drop, old_rate in zip(history.drops, (1.0, 0.1), strict=True):
        assert drop.test == sasa_optax.TestResult(
            drop.step, 0.5, -1.0, 2.0, 1.0, 13, True, sasa_optax.Reason.NONE
        )
        assert drop.old_rate == pytest.approx(old_rate)
        assert drop.new_rate == pytest.approx(old_rate / 10)


def test_a_drop_explains_itself() -> None:
    history = _train(10)
    first, second, last = history.explain().splitlines()
    for part in ("step 25", "newest 13", "0.5", "[-1, 2]", "1 -> 0.1"):
        assert part in first
    assert "0.1 -> 0.01" in second
    # The 21 samples are complete at step 71.
    assert last == "No test since the drop. The next is due at step 75 at the earliest."
    assert sasa_optax.History().explain() == "The rate has not dropped."


def test_record_returns_the_drop_once() -> None:
    window = sasa_optax.Window(
        min_samples=4, leak_ratio=1, test_interval=1, max_window=5
    )
    optimizer = sasa_optax.scale_by_sasa_plus(1.0, test=_eager, window=window)
    state, history, returned = optimizer.init(_PARAMS), sasa_optax.History(), []
    for _ in range(6):
        _, state = optimizer.update(_PARAMS, state, _PARAMS)
        returned.append(history.record(sasa_optax.metrics(state)))
    assert [drop is not None for drop in returned] == [False] * 4 + [True, False]


def test_a_test_that_was_missed_is_not_made_up() -> None:
    history, whole = sasa_optax.History(), _train(1)
    history.record(whole.rows[0])
    drop = history.record(whole.rows[54])
    assert isinstance(drop, sasa_optax.Drop)
    assert drop.test is None
    assert str(drop).startswith("by step 55: learning rate 1 -> 0.01. The")


def test_a_restored_run_goes_on_where_it_was_saved() -> None:
    history, whole = _train(10), _train(10)
    history.record(whole.rows[2])
    assert [row["step"] for row in history.rows] == [10, 20, 30]
    assert [drop.step for drop in history.drops] == [25]
    for row in whole.rows[3:]:
        history.record(row)
    assert history.rows == whole.rows
    assert history.drops == whole.drops


def test_values_are_checked() -> None:
    metrics = sasa_optax.metrics(sasa_optax.sasa(0.1).init(_PARAMS))
    history = sasa_optax.History()
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(2,\)"):
        history.record(metrics, loss=jnp.ones(2))
    with pytest.raises(ValueError, match=r"must not be named .* got \['scale'\]"):
        history.record(metrics, scale=1.0)
    assert history.rows == []


def test_csv(tmp_path: Any) -> None:
    history = _train(10)
    history.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == _KEYS | {"loss"}
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50, 60]
    rates = [float(row["learning_rate"]) for row in rows]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)


def test_jsonl_comes_back_with_its_drops(tmp_path: Any) -> None:
    history = _train(10)
    history.record(history.rows[-1] | {"step": 70, "loss": math.nan})
    history.to_jsonl(tmp_path / "run.jsonl")
    last = (tmp_path / "run.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["loss"] is None
    restored = sasa_optax.History.from_jsonl(tmp_path / "run.jsonl")
    assert restored.drops == history.drops
    assert restored.rows[:-1] == history.rows[:-1]
    assert math.isnan(restored.rows[-1]["loss"])


def _panels(history: sasa_optax.History, path: Any = None) -> list[Any]:
    return [*history.plot(path).axes]


def test_the_picture_shows_loss_rate_and_tests(tmp_path: Any) -> None:
    history = _train(5)
    loss, rate, tests = _panels(history, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert rate.get_yscale() == "log"
    # The rate as drawn is vertical at each drop, and flat between them.
    steps, rates = rate.lines[0].get_data()
    drawn = dict.fromkeys(zip(steps, np.round(rates, 6), strict=True))
    assert {(25, 1.0), (25, 0.1), (50, 0.1), (50, 0.01)} <= set(drawn)
    assert np.all((np.diff(steps) == 0) | (np.diff(rates) == 0))
    for ax in (loss, rate, tests):
        vertical = {line.get_xdata()[0] for line in ax.lines if line.get_ls() == ":"}
        assert vertical == {25, 50}
    (fired,) = tests.containers
    assert fired.get_label() == "fired: rate cut"
    np.testing.assert_array_equal(fired.lines[0].get_xdata(), [25, 50])


def test_before_the_first_test_the_record_says_when_it_is_due() -> None:
    history = _train(5, num_steps=20)
    due = "No test yet. The first is due at step 25 at the earliest."
    assert history.explain() == f"The rate has not dropped.\n{due}"
    *_, tests = _panels(history)
    assert [text.get_text() for text in tests.texts] == [due]
    assert not tests.containers


def test_the_record_says_why_a_test_made_no_drop() -> None:
    row = sasa_optax.metrics(sasa_optax.sasa_plus(0.5).init(_PARAMS))
    row |= {"test_lower": -1.0, "test_upper": 2.0, "next_test": 400}
    outside, sign = sasa_optax.Reason.MEAN, sasa_optax.Reason.SIGN
    history = sasa_optax.History()
    for at, reason in [(100, outside), (200, sign), (250, sign)]:
        history.record(row | {"step": at, "test_step": at, "test_reason": reason})
    why = "the means of the two halves have different signs"
    assert history.explain().splitlines()[1] == (
        f"step 250: no drop, since {why}; mean 0, interval [-1, 2] (p = 1). The next "
        "test is due at step 400 at the earliest."
    )
    # It fires, and the rate is at its floor.
    history.record(row | {"step": 300, "test_step": 300, "test_stationary": True})
    assert "since the rate is in its warm-up, or at its floor;" in history.explain()
    *_, tests = _panels(history)
    drawn = {x.get_label(): x.lines[0].get_xdata().tolist() for x in tests.containers}
    assert drawn == {
        "no cut: zero is outside the interval": [100],
        f"no cut: {why}": [200, 250],
        "no cut: the rate is in its warm-up, or at its floor": [300],
    }
    assert tests.texts[0].get_text().startswith("The next test is due at step 400")


def test_without_a_test_none_is_due() -> None:
    history = sasa_optax.History()
    history.record(sasa_optax.metrics(sasa_optax.ssls().init(_PARAMS)), loss=1.0)
    assert history.explain() == "The rate has not dropped."
    assert [ax.get_ylabel() for ax in _panels(history)] == ["loss", "learning rate"]


def test_a_reason_of_ones_own_is_no_error() -> None:
    assert sasa_optax.Reason(99) is sasa_optax.Reason.NONE


def test_the_picture_needs_rows_and_matplotlib(monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"History\.record"):
        sasa_optax.History().plot()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"sasa-optax\[plot\]"):
        _train(5, num_steps=5).plot()


_SALSA = sasa_optax.salsa(
    test=_eager,
    window=sasa_optax.Window(
        min_samples=5, leak_ratio=1, test_interval=40, max_window=64
    ),
)


@jax.jit
def _salsa_step(state: Any, loss: jax.Array) -> Any:
    """The state after a step with this loss. Every trial is accepted."""
    return _SALSA.update(
        _PARAMS, state, _PARAMS, value=loss, value_fn=lambda params: loss - 1.0
    )[1]


def _salsa_run(falls: Callable[[int], bool], record_every: int) -> sasa_optax.History:
    """A run whose losses fall where ``falls`` says so. Its test fires at step 40."""
    history = sasa_optax.History()
    state, loss = _SALSA.init(_PARAMS), 1.0
    for step in range(1, _NUM_STEPS + 1):
        loss = loss - 0.01 if falls(step) else loss + 0.1
        state = _salsa_step(state, jnp.asarray(loss + 0.001 * (-1) ** step))
        if step % record_every == 0:
            history.record(sasa_optax.metrics(state), loss=loss)
    return history


def test_history_tells_that_the_losses_ended_the_search() -> None:
    history = _salsa_run(lambda step: step < 20, record_every=1)
    switch = history.switch
    assert switch is not None
    assert switch.test is not None
    # The row of that step is the first without a search.
    rows = [row for row in history.rows if not row["line_search_active"]]
    assert switch.step == rows[0]["step"] == switch.test.step
    assert 20 < switch.step < 40
    assert switch.learning_rate == rows[0]["learning_rate"]
    assert switch.test.num_samples == switch.step
    assert "the newest" in str(switch)
    assert "losses fall no more" in str(switch)
    # Then the test fires, at step 40.
    assert [drop.step for drop in history.drops] == [40]
    due = "No test since the drop. The next is due at step 80 at the earliest."
    assert history.explain() == f"{switch}\n{history.drops[0]}\n{due}"


def test_history_tells_that_a_drop_ended_the_search() -> None:
    history = _salsa_run(lambda step: True, record_every=4)
    drop, switch = history.drops[0], history.switch
    assert switch is not None
    assert (switch.step, switch.test, drop.step) == (40, None, 40)
    assert switch.learning_rate == drop.old_rate
    assert "by a drop" in str(switch)


def test_history_returns_what_happened() -> None:
    optimizer = sasa_optax.salsa()
    metrics = sasa_optax.metrics(optimizer.init(_PARAMS))
    ended = {
        **metrics,
        "step": 10,
        "line_search_active": False,
        "loss_test_step": 8,
        "loss_test_stationary": True,
    }
    history = sasa_optax.History()
    assert history.record({**metrics, "step": 1}) is None
    assert history.record(ended) is history.switch
    assert history.switch is not None
    assert history.switch.step == 8
    # A restored run continues from an earlier step.
    assert history.record({**metrics, "step": 5}) is None
    assert history.switch is None


@pytest.mark.parametrize("record_every", [1, 8])
def test_a_search_is_shaded_up_to_its_end(record_every: int, tmp_path: Any) -> None:
    history = _salsa_run(lambda step: step < 20, record_every)
    assert history.switch is not None
    for ax in _panels(history, tmp_path / "salsa.png"):
        spans = [p for p in ax.patches if p.get_alpha() == 0.08]
        assert [span.get_x() + span.get_width() for span in spans] == [
            history.switch.step
        ]
    restored = sasa_optax.History()
    for row in history.rows:
        restored.record(row)
    assert restored.switch == history.switch
