"""The picture of a `History`: the loss, the rate, and why the rate moved."""

from typing import TYPE_CHECKING, Any

import numpy as np

from sasa_optax import _loss_gate
from sasa_optax._metrics import moves_on, next_test, read_test, why_no_cut
from sasa_optax._stationarity import TestResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sasa_optax._history import History

# Of an overshoot, and of a brake.
_COLORS = ("tab:orange", "tab:red")
_FIRED = "fired: rate cut"
# The first is that of tests that fired. The others tell why tests did not.
_TEST_COLORS = ("tab:red", "tab:gray", "tab:brown", "tab:blue", "tab:olive", "tab:pink")


def draw(history: "History") -> "Figure":
    """A figure with a panel for each kind of metric that was recorded."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "History.plot needs matplotlib: pip install 'sasa-optax[plot]'"
        ) from error
    if not history.rows:
        raise ValueError("History.plot needs rows: call History.record first.")
    panels = {
        "loss": _draw_loss,
        "scale": _draw_rate,
        "progress": _draw_progress,
        "next_test": _draw_tests,
    }
    panels = [draw for name, draw in panels.items() if _has(history, name)]
    figure = Figure(figsize=(8, 2.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for draw_panel, ax in zip(panels, axes, strict=True):
        draw_panel(history, ax)
        ax.grid(alpha=0.3)
        _mark(history, ax)
    axes[-1].set_xlabel("step")
    return figure


def _has(history: "History", name: str) -> bool:
    return any(name in row for row in history.rows)


def _column(history: "History", name: str) -> tuple[list[float], list[float]]:
    pairs = [(row["step"], row[name]) for row in history.rows if name in row]
    return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]


def _end_of_search(history: "History") -> float:
    """The step up to which the rate was searched for; 0 without a search."""
    if history.switch is not None:
        return history.switch.step
    last = history.rows[-1]
    return last["step"] if last.get("line_search_active", False) else 0


def _mark(history: "History", ax: "Axes") -> None:
    """Lines where something happened, and a shade over the line search."""
    marks = [(drop.step, "tab:red") for drop in history.drops]
    marks += [(cut.step, _COLORS[cut.is_brake]) for cut in history.cuts]
    for step, color in marks:
        ax.axvline(step, color=color, linestyle=":", linewidth=1)
    if end := _end_of_search(history):
        ax.axvspan(0, end, color="tab:blue", alpha=0.08, linewidth=0)


def _legend_above(ax: "Axes", num_columns: int = 4) -> None:
    """A legend outside the panel, whose lines leave no corner free."""
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    style = {"frameon": False, "borderpad": 0, "columnspacing": 1.5}
    ax.legend(ncols=num_columns, fontsize="small", **place, **style)


def _draw_loss(history: "History", ax: "Axes") -> None:
    steps, loss = _column(history, "loss")
    ax.plot(steps, loss, color="tab:blue", linewidth=1)
    ax.set_ylabel("loss")
    if _has(history, "loss_fast"):
        _draw_limits(history, ax)
    # A loss that is not finite must not decide the axis.
    if all(x > 0 for x in loss if np.isfinite(x)):
        ax.set_yscale("log")


def _draw_limits(history: "History", ax: "Axes") -> None:
    """The average that `adapt_on_progress` judges, and where it would cut."""
    # The first is zero until there are enough losses to judge.
    rows = [row for row in history.rows if row["sees_loss"] and row["loss_first"]]
    steps = [row["step"] for row in rows]
    best = np.asarray([row["loss_best"] for row in rows], float)
    gained = np.asarray([row["loss_first"] for row in rows], float) - best
    gained[gained <= 0] = np.nan
    fast = [row["loss_fast"] for row in rows]
    ax.plot(steps, fast, color="black", linewidth=1, label="average loss")
    shares = (_loss_gate.OVERSHOOT, _loss_gate.BRAKE)
    labels = ("overshoot, if surely above after a rise", "brake, if surely above")
    for share, label, color in zip(shares, labels, _COLORS, strict=True):
        limit = best + share * gained
        ax.plot(steps, limit, "--", color=color, linewidth=0.8, label=label)
    _legend_above(ax)


def _draw_rate(history: "History", ax: "Axes") -> None:
    jumps = [(drop.step, drop.old_rate, drop.new_rate) for drop in history.drops]
    jumps += [(cut.step, cut.old_scale, cut.new_scale) for cut in history.cuts]
    # A step down at each of them, not a slope between two records.
    points = [(float(step), rate) for step, *rates in jumps for rate in rates]
    points += zip(*_column(history, history.rate_name), strict=True)
    points.sort(key=lambda point: point[0])
    ax.plot(*zip(*points, strict=True), color="tab:green")
    offset: Any = {"textcoords": "offset points", "xytext": (4, 4)}
    for step, _, rate in jumps:
        ax.annotate(f"{rate:.2g}", (step, rate), **offset)
    ax.set_yscale("log")
    name = history.rate_name.replace("_", " ")
    ax.set_ylabel("scale of the updates" if _has(history, "target") else name)
    if _end_of_search(history):
        found = history.switch and f", {history.switch.learning_rate:.2g} found"
        label = f"line search{found or ''}"
        ax.fill_between([], [], color="tab:blue", alpha=0.15, label=label)
        ax.legend(loc="best", fontsize="small")
    for is_brake in sorted({cut.is_brake for cut in history.cuts}):
        label = "brake" if is_brake else "overshoot"
        ax.plot([], [], ":", color=_COLORS[is_brake], label=label)
    if history.cuts:
        _legend_above(ax)


def _draw_progress(history: "History", ax: "Axes") -> None:
    steps, progress = _column(history, "progress")
    ax.axhline(1, color="black", linewidth=0.8, alpha=0.4, label="random walk")
    ax.plot(steps, progress, color="tab:purple")
    if _has(history, "target"):
        target = _column(history, "target")[1]
        ax.plot(steps, target, "--", color="tab:gray", label="target")
        sees_loss = history.rows[-1]["sees_loss"]
        rise = "the scale may rise" if sees_loss else "without a loss it stays"
        expected = _column(history, "expected_progress")[1]
        label = "expected at this scale"
        ax.plot(steps, expected, color="tab:purple", alpha=0.4, label=label)
        rows = [row for row in history.rows if "progress" in row]
        above = np.array([*map(moves_on, rows)])
        style: Any = {"interpolate": True, "alpha": 0.2, "linewidth": 0}
        for where, color, label in (
            (above, "tab:green", f"moves on: {rise}"),
            (~above, "tab:brown", "moves in place, or has stalled: it falls"),
        ):
            where = where.tolist()
            ax.fill_between(
                steps, expected, target, where, color=color, label=label, **style
            )
    ax.set_yscale("log")
    ax.set_ylabel("progress")
    _legend_above(ax, num_columns=3)


def _draw_tests(history: "History", ax: "Axes") -> None:
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_ylabel("test: mean, interval")
    when: Any = {"s": next_test(history.rows[-1]), "transform": ax.transAxes}
    rows = {row["test_step"]: row for row in history.rows if row["test_step"] > 0}
    if not rows:
        ax.text(0.5, 0.5, ha="center", **when)
        return
    ax.text(1, -0.26, ha="right", va="top", fontsize="small", **when)
    by_label: dict[str, list[TestResult]] = {_FIRED: []}
    for step, row in rows.items():
        test = read_test("test", row)
        has_fired = step == row["last_drop"]
        label = _FIRED if has_fired else f"no cut: {why_no_cut(test)}"
        by_label.setdefault(label, []).append(test)
    for (label, tests), color in zip(by_label.items(), _TEST_COLORS, strict=False):
        if not tests:
            continue
        steps, mean, lower, upper, *_ = np.asarray(tests, float).T
        around = [(mean - lower).tolist(), (upper - mean).tolist()]
        style: Any = {"marker": "v" if label == _FIRED else ".", "linestyle": ""}
        ax.errorbar(steps, mean, around, color=color, label=label, **style)
    # Each drop shrinks the statistic, so a linear axis would show the first alone;
    # around zero it is linear as far as the narrowest interval that mattered.
    shown = by_label[_FIRED] or [test for tests in by_label.values() for test in tests]
    widths = [float(test.upper) - float(test.lower) for test in shown]
    linear = min((width for width in widths if width > 0), default=1.0)
    ax.set_yscale("symlog", linthresh=linear)
    _legend_above(ax, num_columns=2)
