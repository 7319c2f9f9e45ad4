"""metrics and History of adapt_on_progress and measure_progress."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from states import part_of

import sasa_optax
from sasa_optax._history import Cut

matplotlib.use("agg")

_PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(2)}
# Each number occurs once, so that no two fields can be confused.
_EXPECTED = {
    "step": 11,
    "progress": 0.25,
    "expected_progress": 0.1875,
    "scale": 2.0,
    "target": 0.375,
    "sees_loss": True,
    "num_overshoots": 3,
    "num_brakes": 4,
    "num_nonfinite": 5,
    "last_cut": 9,
    "ceiling": 8.0,
    "loss_fast": 0.5,
    "loss_slow": 0.625,
    "loss_first": 0.75,
    "loss_best": 0.125,
}


def _measured(step: int, progress: float) -> sasa_optax.ProgressState:
    initial = sasa_optax.measure_progress().init(_PARAMS)
    state = part_of(initial, sasa_optax.ProgressState)
    average = state.average._replace(num_averaged=jnp.asarray(step, jnp.int32))
    return state._replace(progress=jnp.asarray(progress), average=average)


def _initial() -> sasa_optax.AdaptOnProgressState:
    state = sasa_optax.adapt_on_progress().init(_PARAMS)
    return part_of(state, sasa_optax.AdaptOnProgressState)


def _adapting() -> sasa_optax.AdaptOnProgressState:
    """A state with the values of ``_EXPECTED``."""
    state = _initial()
    return state._replace(
        scale=jnp.asarray(2.0),
        past_scale=jnp.asarray(1.5),
        target=jnp.asarray(0.375),
        sees_loss=jnp.asarray(True),
        num_overshoots=jnp.asarray(3),
        num_brakes=jnp.asarray(4),
        num_nonfinite=jnp.asarray(5),
        last_cut=jnp.asarray(9),
        last_rise=jnp.asarray(7),
        ceiling=jnp.asarray(8.0),
        losses=state.losses._replace(
            fast=jnp.asarray(0.5),
            slow=jnp.asarray(0.625),
            first=jnp.asarray(0.75),
            best=jnp.asarray(0.125),
        ),
        measured=_measured(11, 0.25),
    )


def _row(step: int, **changes: Any) -> dict[str, Any]:
    """The metrics of a run without a cut, with some changes."""
    past_scale = jnp.asarray(0.9)
    state = _initial()._replace(measured=_measured(step, 0.5), past_scale=past_scale)
    return {**sasa_optax.metrics(state), **changes}


def _history() -> sasa_optax.History:
    """A record with an overshoot at step 14 and a brake at step 30."""
    history = sasa_optax.History()
    braked = {"num_overshoots": 1, "num_brakes": 1, "last_cut": 30, "sees_loss": True}
    loss = {"loss_first": 5.0, "loss_best": 1.0, "loss_fast": 1.5}
    history.record(_row(0), loss=4.0)
    history.record(_row(10, scale=3.0, sees_loss=True), loss=2.0)
    history.record(
        _row(20, scale=0.75, num_overshoots=1, last_cut=14, sees_loss=True, **loss),
        loss=3.0,
    )
    history.record(_row(30, scale=0.1875, **braked, **loss), loss=9.0)
    history.record(_row(40, scale=0.25, **braked, **loss), loss=1.0)
    return history


_CUTS = [Cut(14, False, 3.0, 0.75), Cut(30, True, 0.75, 0.1875)]


def _values(metrics: dict[str, jax.Array]) -> dict[str, bool | int | float]:
    assert {value.shape for value in metrics.values()} == {()}
    return {name: value.item() for name, value in metrics.items()}


def test_metrics_say_what_adapt_on_progress_does_inside_jit_and_out() -> None:
    assert _values(sasa_optax.metrics(_adapting())) == _EXPECTED
    chain = (optax.EmptyState(), {"deep": [_adapting()]})
    assert _values(jax.jit(sasa_optax.metrics)(chain)) == _EXPECTED


def test_metrics_find_adapt_on_progress_where_optax_wraps_it() -> None:
    adaptive = optax.chain(optax.adam(1e-3), sasa_optax.adapt_on_progress(target=0.3))
    optimizer = optax.MultiSteps(
        optax.masked(adaptive, {"w": True, "b": False}), every_k_schedule=2
    )
    metrics = sasa_optax.metrics(optimizer.init(_PARAMS))
    assert set(metrics) == set(_EXPECTED)
    assert float(metrics["target"]) == pytest.approx(0.3)


@pytest.mark.parametrize("num_steps", [0, 1, 40])
def test_all_metrics_but_the_ceiling_are_finite_before_a_cut(num_steps: int) -> None:
    optimizer = sasa_optax.adapt_on_progress()
    state = optimizer.init(_PARAMS)
    update = jax.jit(optimizer.update)
    for step in range(num_steps):
        value = jnp.asarray(1.0 + 0.1 * (-1) ** step)
        _, state = update(_PARAMS, state, _PARAMS, value=value)
    metrics = _values(sasa_optax.metrics(state))
    assert metrics["step"] == num_steps
    assert [k for k, v in metrics.items() if not math.isfinite(v)] == ["ceiling"]


def test_metrics_of_measured_progress() -> None:
    metrics = sasa_optax.metrics((optax.EmptyState(), _measured(11, 0.25)))
    assert _values(metrics) == {"step": 11, "progress": 0.25}


@pytest.mark.parametrize("is_first", [False, True])
def test_a_controller_beside_measured_progress_keeps_its_step(is_first: bool) -> None:
    state: Any = sasa_optax.sasa_plus(0.5).init(_PARAMS)
    state = state._replace(controller=state.controller._replace(step=jnp.asarray(7)))
    both = (_measured(11, 0.25), state) if is_first else (state, _measured(11, 0.25))
    metrics = _values(sasa_optax.metrics(both))
    assert metrics == _values(sasa_optax.metrics(state)) | {"progress": 0.25}
    assert metrics["step"] == 7


def _partition(fast: Any, slow: Any) -> Any:
    optimizer = optax.partition(
        {"fast": fast, "slow": slow}, {"w": "fast", "b": "slow"}
    )
    return optimizer.init(_PARAMS)


def test_several_of_a_kind_are_told_apart() -> None:
    adapt = sasa_optax.adapt_on_progress
    metrics = sasa_optax.metrics(_partition(adapt(target=0.25), adapt(target=0.5)))
    assert len(metrics) == 2 * len(_EXPECTED)
    targets = {k: float(v) for k, v in metrics.items() if k.endswith("/target")}
    assert len(targets) == 2
    assert all(v == (0.25 if "fast" in k else 0.5) for k, v in targets.items())
    measured = sasa_optax.measure_progress
    metrics = sasa_optax.metrics(_partition(measured(), measured()))
    assert sorted(k.rsplit("/")[-1] for k in metrics) == ["progress"] * 2 + ["step"] * 2
    with pytest.raises(ValueError, match="metrics must be those of one optimizer"):
        sasa_optax.History().record(metrics)


def test_a_controller_and_an_adapted_scale_are_told_apart() -> None:
    optimizer = optax.chain(sasa_optax.sasa_plus(0.5), sasa_optax.adapt_on_progress())
    metrics = sasa_optax.metrics(optimizer.init(_PARAMS))
    assert sum(name.endswith("/scale") for name in metrics) == 2
    assert not set(metrics) & set(_EXPECTED)


def test_no_state_of_this_library_is_an_error() -> None:
    with pytest.raises(ValueError, match="no controller and no progress"):
        sasa_optax.metrics(optax.adam(1e-3).init(_PARAMS))


@pytest.mark.parametrize("missing", ["step", "progress"])
def test_what_is_not_of_one_optimizer_is_refused(missing: str) -> None:
    row = _row(1)
    del row[missing]
    with pytest.raises(ValueError, match=r"those of one optimizer.*'step'"):
        sasa_optax.History().record(row)


def test_record_returns_each_cut_once_and_keeps_it() -> None:
    history = sasa_optax.History()
    assert history.record(_row(10, scale=4.0)) is None
    cut = history.record(_row(20, scale=1.0, num_overshoots=1, last_cut=13))
    assert cut == Cut(13, is_brake=False, old_scale=4.0, new_scale=1.0)
    assert history.record(_row(30, scale=1.0, num_overshoots=1, last_cut=13)) is None
    assert history.cuts == [cut]
    assert history.drops == []


def test_the_step_of_several_cuts_is_that_of_the_record() -> None:
    history = sasa_optax.History()
    history.record(_row(10, scale=4.0))
    both = {"num_overshoots": 1, "num_brakes": 1, "last_cut": 57}
    cut = history.record(_row(60, scale=0.25, **both))
    assert cut == Cut(60, True, 4.0, 0.25, num_cuts=2)
    assert str(cut).startswith(
        "by step 60: 2 cuts, with a brake among them; scale 4 ->"
    )
    cut = history.record(_row(90, **(both | {"num_overshoots": 4, "last_cut": 80})))
    assert str(cut).startswith("by step 90: 3 cuts, all overshoots; scale 0.25 -> 1.")


def test_cuts_of_before_the_first_record_are_not_made_up() -> None:
    history = sasa_optax.History()
    assert history.record(_row(50, num_brakes=2, last_cut=40)) is None
    assert history.cuts == []


def test_a_cut_says_what_happened_and_why() -> None:
    assert str(Cut(1240, False, 3.1, 0.775)) == (
        "step 1240: overshoot. The loss gave back more than a tenth of its gain after "
        "the rate rose; scale 3.1 -> 0.775."
    )
    assert str(Cut(1300, True, 3.1, 0.775)) == (
        "step 1300: brake. The loss gave back more than half of its gain, or rose "
        "above its start; the parameters went back to their average, scale 3.1 -> "
        "0.775."
    )
    assert str(Cut(1300, True, 3.1, 0.775, num_nonfinite=2)) == (
        "step 1300: brake. The loss was not finite; the parameters went back to their "
        "average, scale 3.1 -> 0.775."
    )


def test_two_losses_that_are_not_finite_are_told_as_a_brake() -> None:
    optimizer = optax.chain(optax.sgd(0.01), sasa_optax.adapt_on_progress())
    state, history = optimizer.init(_PARAMS), sasa_optax.History()
    update = jax.jit(optimizer.update)
    for step in range(1, 31):
        is_missing = step in (14, 22, 23)
        loss = jnp.asarray(jnp.nan if is_missing else 1.0 + 0.1 * (-1) ** step)
        _, state = update(_PARAMS, state, _PARAMS, value=loss)
        if step % 5 == 0:
            history.record(sasa_optax.metrics(state))
    (cut,) = history.cuts
    assert (cut.step, cut.is_brake, cut.num_nonfinite) == (23, True, 2)
    assert cut.new_scale < cut.old_scale / 2
    assert history.rows[-1]["num_nonfinite"] == 3


def test_explain_tells_all_cuts_by_step() -> None:
    lines = _history().explain().splitlines()
    scale = "The scale is 0.25 at step 40. Its highest was 3, at step 10."
    assert lines == [*map(str, _CUTS), scale]
    history = sasa_optax.History()
    history.record(_row(1))
    first, *_ = history.explain().splitlines()
    assert first == "The rate has not been cut."


@pytest.mark.parametrize("sees_loss", [False, True])
def test_explain_says_that_no_loss_arrives(sees_loss: bool) -> None:
    optimizer = sasa_optax.adapt_on_progress()
    state, history = optimizer.init(_PARAMS), sasa_optax.History()
    for _ in range(2):
        history.record(sasa_optax.metrics(state))
        # Before the first step nothing is known.
        if len(history.rows) == 1:
            assert "value=loss" not in history.explain()
        given = {"value": jnp.float32(1)} if sees_loss else {}
        _, state = optimizer.update(_PARAMS, state, _PARAMS, **given)
    assert ("value=loss" in history.explain()) == (not sees_loss)


def test_explain_sorts_drops_and_cuts() -> None:
    history = _history()
    drop = sasa_optax.Drop(20, "scale", 1.0, 0.1, test=None)
    history.drops.append(drop)
    lines = history.explain().splitlines()
    assert lines[:3] == [str(_CUTS[0]), str(drop), str(_CUTS[1])]


@pytest.mark.parametrize(("step", "num_kept"), [(14, 0), (20, 0), (25, 1), (31, 2)])
def test_a_restored_run_forgets_its_cuts(step: int, num_kept: int) -> None:
    history = _history()
    assert history.cuts == _CUTS
    num_rows = sum(row["step"] < step for row in history.rows)
    counts = {
        k: history.rows[num_rows - 1][k] for k in ("num_overshoots", "num_brakes")
    }
    assert history.record(_row(step, **counts)) is None
    assert history.cuts == _CUTS[:num_kept]
    assert len(history.rows) == num_rows + 1


def test_jsonl_comes_back_with_its_cuts(tmp_path: Any) -> None:
    history = _history()
    history.to_jsonl(tmp_path / "run.jsonl")
    rows = list(map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines()))
    assert {row["ceiling"] for row in rows} == {None}
    assert {row["sees_loss"] for row in rows[1:]} == {True}
    restored = sasa_optax.History.from_jsonl(tmp_path / "run.jsonl")
    assert restored.cuts == _CUTS
    assert [row["loss"] for row in restored.rows] == [4.0, 2.0, 3.0, 9.0, 1.0]


def _panels(history: sasa_optax.History, path: Any = None) -> list[Any]:
    return [*history.plot(path).axes]


def _labels(ax: Any) -> list[str]:
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def _dotted(ax: Any) -> list[tuple[float, str]]:
    lines = [
        line for line in ax.lines if line.get_ls() == ":" and len(line.get_xdata())
    ]
    return sorted((line.get_xdata()[0], line.get_color()) for line in lines)


def test_the_picture_shows_loss_scale_and_progress(tmp_path: Any) -> None:
    panels = _panels(_history(), tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    loss, scale, progress = panels
    labels = [ax.get_ylabel() for ax in panels]
    assert labels == ["loss", "scale of the updates", "progress"]
    assert scale.get_yscale() == progress.get_yscale() == "log"
    for ax in (loss, scale, progress):
        assert _dotted(ax) == [(14, "tab:orange"), (30, "tab:red")]
    assert _labels(scale) == ["overshoot", "brake"]
    lines = {line.get_label(): line for line in progress.lines}
    assert lines["target"].get_ls() == "--"
    np.testing.assert_allclose(lines["target"].get_ydata(), [0.4] * 5, rtol=1e-6)
    expected = [row["expected_progress"] for row in _history().rows]
    assert lines["expected at this scale"].get_ydata().tolist() == expected
    assert set(lines["random walk"].get_ydata()) == {1}
    assert 0 < lines["random walk"].get_alpha() < 0.5
    assert "moves on: the scale may rise" in _labels(progress)


def test_the_scale_is_drawn_down_at_the_step_of_a_cut() -> None:
    scale = _panels(_history())[1]
    steps, scales = scale.lines[0].get_data()
    drawn = list(zip(steps, scales, strict=True))
    at = drawn.index((14, 3.0))
    assert drawn[at - 1 : at + 2] == [(10, 3.0), (14, 3.0), (14, 0.75)]
    assert [text.get_text() for text in scale.texts] == ["0.75", "0.19"]


def test_the_loss_has_the_limits_above_which_the_scale_is_cut() -> None:
    loss = _panels(_history())[0]
    lines = {line.get_label(): line for line in loss.lines}
    # From 5 to 1 the gain is 4. The limits are at a tenth and at half of it.
    for start, color, limit in [("over", "orange", 1.4), ("brake", "red", 3.0)]:
        (line,) = [line for name, line in lines.items() if name.startswith(start)]
        assert line.get_color() == f"tab:{color}"
        np.testing.assert_array_equal(line.get_xdata(), [20, 30, 40])
        np.testing.assert_allclose(line.get_ydata(), [limit] * 3, rtol=1e-6)
    np.testing.assert_array_equal(lines["average loss"].get_ydata(), [1.5] * 3)


def test_the_picture_of_a_run_without_cuts_or_losses() -> None:
    history = sasa_optax.History()
    for step in (10, 20):
        history.record(_row(step))
    scale, progress = _panels(history)
    assert _labels(scale) == []
    assert _dotted(scale) == []
    assert "moves on: without a loss it stays" in _labels(progress)


def test_the_picture_of_measured_progress_alone() -> None:
    history = sasa_optax.History()
    for step in (10, 20):
        history.record(sasa_optax.metrics(_measured(step, 0.5)))
    (progress,) = _panels(history)
    assert _labels(progress) == ["random walk"]
    np.testing.assert_array_equal(progress.lines[1].get_ydata(), [0.5, 0.5])
    assert history.explain() == "The rate has not dropped."


def _eager(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
    return sasa_optax.TestResult(mean=0.5, lower=-1.0, upper=2.0, stationary=True)


def test_a_controller_beside_measured_progress_has_both_pictures() -> None:
    window = sasa_optax.Window(
        min_samples=10, leak_ratio=2, test_interval=5, max_window=16
    )
    controller = sasa_optax.sasa_plus(1.0, test=_eager, window=window)
    optimizer = optax.chain(controller, sasa_optax.measure_progress())
    state, history = optimizer.init(_PARAMS), sasa_optax.History()
    update = jax.jit(optimizer.update)
    for step in range(1, 31):
        _, state = update(_PARAMS, state, _PARAMS)
        if step % 5 == 0:
            history.record(sasa_optax.metrics(state), loss=1.0)
    # test_history.py has the same run without measured progress.
    assert [drop.step for drop in history.drops] == [25]
    labels = [ax.get_ylabel() for ax in _panels(history)]
    assert labels == ["loss", "learning rate", "progress", "test: mean, interval"]
