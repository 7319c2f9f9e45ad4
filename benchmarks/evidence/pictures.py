"""The pictures of docs/evidence.md."""

import math
import statistics
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence import outcomes
from benchmarks.evidence.contenders import METHODS
from benchmarks.evidence.outcomes import LEADING, Outcome, Rows
from benchmarks.evidence.task import Task
from benchmarks.publishing import Row

# The curves of whole runs, beside the best tuned baseline.
SHOWN = LEADING, "salsa", "schedule-free-adamw", "prodigy-linear"
SHOWN_ANYTIME = {
    LEADING: ("C0-", "AdamW 1e-3 and adapt_on_progress: one run"),
    "adamw-progress(learning_rate=1e-05)": ("C0:", "the same from 1e-5"),
    "adamw-progress(learning_rate=0.01)": ("C0--", "the same from 1e-2"),
    "schedule-free-adamw": ("C1-", "schedule_free_adamw"),
    "prodigy-linear": ("C2-", "Prodigy, falling linearly"),
}


def steps_of(row: Row) -> list[int]:
    count = len(row["test"])
    return [row["steps"] * (i + 1) // count for i in range(count)]


def finite(curve: list[float | None]) -> list[float]:
    return [math.nan if x is None else x for x in curve]


def draw_test(ax: Axes, each: Outcome, style: str, label: str) -> None:
    """The test metric against the step, as the mean over the seeds."""
    curves = [finite(row["test"]) for row in each.rows]
    means = [statistics.mean(values) for values in zip(*curves, strict=True)]
    ax.plot(steps_of(each.rows[0]), means, style, lw=1.2, label=label)


def grid(tasks: list[Task], draw: Callable[[Axes, Task], None]) -> Figure:
    columns = min(4, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    width = max(3.2 * columns, 9.6)  # the legend's
    figure = Figure(figsize=(width, 2.9 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax, task in zip(axes, tasks, strict=False):
        draw(ax, task)
        ax.set_title(task.name, fontsize="medium")
        ax.grid(alpha=0.3)
    for ax in axes[len(tasks) :]:
        ax.set_visible(False)
    handles = {
        label: handle
        for ax in figure.axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def curves(rows: Rows, tasks: list[Task]) -> Figure:
    """The test metric against the step."""

    def draw(ax: Axes, task: Task) -> None:
        found = outcomes.outcomes(rows, task, task.budgets[-1])
        best = outcomes.best_tuned(found)
        draw_test(ax, best, "k--", "best tuned baseline")
        for color, name in enumerate(SHOWN, 1):
            if name in found:
                draw_test(ax, found[name], f"C{color}-", name)
        ax.set(ylabel=f"test, {task.unit}", xlabel="step")
        # A best of zero has no height.
        height = max(abs(best.mean), task.tolerance)
        ax.set_ylim(best.mean - 0.1 * height, best.mean + height)

    return grid(tasks, draw)


def anytime(rows: Rows, tasks: list[Task]) -> Figure:
    """One run without a schedule, against a cosine tuned for each of three budgets."""

    def draw(ax: Axes, task: Task) -> None:
        ends = []
        for budget in task.parts:
            best = outcomes.best_schedule(rows, task, budget)
            label = "the best cosine, tuned for each of three budgets"
            draw_test(ax, best, "k--", label)
            ends.append((budget, best.mean))
        ax.plot(*zip(*ends, strict=True), "ko", ms=4)
        found = outcomes.outcomes(rows, task, task.parts[-1], SHOWN_ANYTIME)
        for name, each in found.items():
            draw_test(ax, each, *SHOWN_ANYTIME[name])
        ax.set(ylabel=f"test, {task.unit}", xlabel="step")
        least = min(end for _, end in ends)
        height = max(abs(ends[-1][1]), task.tolerance)
        ax.set_ylim(least - 0.05 * height, least + 0.6 * height)

    return grid(tasks, draw)


def rates(rows: Rows, tasks: list[Task]) -> Figure:
    """The rate that SALSA chose, and the best tuned cosine of the same optimizer."""

    def draw(ax: Axes, task: Task) -> None:
        found = outcomes.outcomes(rows, task, task.budgets[-1], ("sgd-cosine", "salsa"))
        if "salsa" in found:
            for row in found["salsa"].rows:
                label = "SALSA, each seed"
                ax.plot(steps_of(row), finite(row["rates"]), "C0", lw=1, label=label)
        if "sgd-cosine" in found:
            peak, steps = found["sgd-cosine"].rate, task.budgets[-1]
            at_steps = [steps * i // 100 for i in range(100)]
            cosine = [peak * (1 + math.cos(math.pi * i / steps)) / 2 for i in at_steps]
            label = "the best tuned cosine of momentum SGD"
            ax.plot(at_steps, cosine, "k--", lw=1, label=label)
        ax.set(yscale="log", xlabel="step", ylabel="learning rate")

    return grid(tasks, draw)


def sensitivity(rows: Rows, tasks: list[Task]) -> Figure:
    """The final test metric against the initial rate."""

    def draw(ax: Axes, task: Task) -> None:
        names = [name for name, each in METHODS.items() if each.sensitivity_rates]
        for color, name in enumerate(names):
            points = outcomes.by_rate(rows, task, name)
            if points:
                style = "o-" if METHODS[name].is_ours else "s--"
                xs, ys = zip(*points, strict=True)
                ax.plot(xs, ys, style, color=f"C{color}", label=name, ms=3, lw=1.2)
        ax.set(xscale="log", yscale="log", xlabel="initial rate")
        ax.set_ylabel(f"test, {task.unit}")

    return grid(tasks, draw)


def figures(rows: Rows, tasks: list[Task]) -> dict[str, Figure]:
    """The pictures for which there are runs, by the names of their files."""
    found = {
        "evidence-curves": curves(rows, tasks),
        "evidence-rates": rates(rows, tasks),
    }
    if complete := [task for task in tasks if outcomes.has_anytime(rows, task)]:
        found["evidence-anytime"] = anytime(rows, complete)
    if complete := [task for task in tasks if outcomes.has_sensitivity(rows, task)]:
        found["evidence-sensitivity"] = sensitivity(rows, complete)
    return found
