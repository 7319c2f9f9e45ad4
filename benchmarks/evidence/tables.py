"""The tables and pictures of docs/evidence.md, from the runs of the evidence suite."""

import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from contenders import ANYTIME, COSINES, METHODS, Method, method_named
from evidence_runs import Key, Row, at
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tasks import Task

Rows = dict[Key, Row]

# What the pictures of whole runs show, beside the best tuned baseline.
SHOWN = ("adamw-progress", "salsa", "schedule-free-adamw", "prodigy-linear")


class Outcome(NamedTuple):
    """What a method did on a task within a budget, a number for each seed."""

    method: str
    rate: float
    test: list[float]
    train: list[float]
    area: list[float]
    seconds: list[float]
    drops: list[float]
    rows: list[Row]

    @property
    def mean(self) -> float:
        return statistics.mean(self.test)

    @property
    def spread(self) -> float:
        if len(self.test) < 2 or not all(map(math.isfinite, self.test)):
            return 0.0
        return statistics.stdev(self.test)


def outcome(rows: Rows, task: Task, name: str, budget: int) -> Outcome | None:
    """None as long as the runs are not there."""
    method = method_named(name)
    steps = budget if method.knows_horizon else task.budgets[-1]
    mine = [
        row
        for key, row in rows.items()
        if (key.task, key.method, key.steps) == (task.name, name, steps)
    ]
    rate = chosen_rate(method, mine, steps, budget)
    runs = [row for row in mine if row["rate"] == rate]
    if not runs:
        return None
    count = len(runs[0]["test"]) * budget // steps
    # Those without a horizon have gone on beyond the budget.
    share = budget / steps
    return Outcome(
        name,
        rate,
        [at(row["test"], steps, budget) for row in runs],
        [at(row["train"], steps, budget) for row in runs],
        [mean_of(row["test"][:count]) for row in runs],
        [share * row["seconds"] for row in runs],
        [row["drops"][count - 1] for row in runs],
        runs,
    )


def chosen_rate(method: Method, rows: list[Row], steps: int, budget: int) -> float:
    """By the validation data of the first seed, as `evidence.tune` chooses."""
    first = [row for row in rows if row["seed"] == 0]
    if not method.is_tuned or not first:
        return method.rates[0]
    best = min(first, key=lambda row: at(row["validation"], steps, budget))
    return best["rate"]


def mean_of(curve: list[float | None]) -> float:
    return statistics.mean(math.inf if x is None else x for x in curve)


def outcomes(
    rows: Rows, task: Task, budget: int, names: Iterable[str] = tuple(METHODS)
) -> dict[str, Outcome]:
    found = {name: outcome(rows, task, name, budget) for name in names}
    return {name: each for name, each in found.items() if each is not None}


def best_tuned(found: dict[str, Outcome]) -> Outcome:
    """By the test data itself, which flatters it."""
    tuned = [each for name, each in found.items() if is_baseline(name)]
    return min(tuned, key=lambda each: each.mean)


def is_baseline(name: str) -> bool:
    return METHODS[name].is_tuned and not METHODS[name].is_ours


def gap(task: Task, mine: Outcome, best: Outcome) -> float:
    """In points, or in percent of the best loss; the tolerance is in the same."""
    difference = mine.mean - best.mean
    return difference if is_error(task) else 100 * difference / abs(best.mean)


def tolerance(task: Task) -> float:
    return task.tolerance if is_error(task) else 100 * task.tolerance


def is_error(task: Task) -> bool:
    return task.unit == "% error"


def markdown(heads: list[str], body: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in body])


def short(x: float) -> str:
    return f"{x:.3g}" if math.isfinite(x) else "diverged"


def name_of(name: str) -> str:
    return f"**{name}**" if METHODS[name].is_ours else name


def gap_cell(task: Task, each: Outcome, best: Outcome) -> str:
    size = gap(task, each, best)
    if not math.isfinite(size) or size > 1000:
        return "diverged"
    text = f"{size:+.2f}" if abs(size) < 10 else f"{size:+.0f}"
    return f"**{text}**" if size <= tolerance(task) else text


def ranks(found: dict[str, Outcome]) -> dict[str, float]:
    """Of those without tuning, the best being 1; equals share their mean rank."""
    means = {name: x.mean for name, x in found.items() if not METHODS[name].is_tuned}
    return {
        name: 1
        + sum(other < mean for other in means.values())
        + (sum(other == mean for other in means.values()) - 1) / 2
        for name, mean in means.items()
    }


def gaps_table(rows: Rows, tasks: list[Task]) -> str:
    """Every method's distance from the best tuned baseline, and its mean rank."""
    found = {task.name: outcomes(rows, task, task.budgets[-1]) for task in tasks}
    # A rank among a few is not one among all.
    most = max(map(len, found.values()))
    ranked = {
        name: ranks(each) if len(each) == most else {} for name, each in found.items()
    }

    def line(name: str) -> list[str]:
        cells, mine, close = [], [], []
        for task in tasks:
            each = found[task.name].get(name)
            best = best_tuned(found[task.name])
            cells.append("-" if each is None else gap_cell(task, each, best))
            if each is not None:
                close.append(gap(task, each, best) <= tolerance(task))
            if name in ranked[task.name]:
                mine.append(ranked[task.name][name])
        rank = f"{statistics.mean(mine):.1f}" if mine else ""
        return [name_of(name), *cells, count(close), rank]

    best = [best_tuned(found[task.name]) for task in tasks]
    head = ["best tuned"] + [f"{short(each.mean)} ({each.method})" for each in best]
    names = [task.name for task in tasks]
    return markdown(
        ["", *names, "within the target", "mean rank"],
        [[*head, "", ""], *[line(name) for name in METHODS]],
    )


def variants_table(rows: Rows, tasks: list[Task]) -> str:
    """The gaps of methods with arguments of their own, below those without."""
    bases = {key.method.partition("(")[0] for key in rows if "(" in key.method}
    names = [
        name
        for base in METHODS
        if base in bases
        for name in sorted({key.method for key in rows if is_of(key.method, base)})
    ]

    def cell(task: Task, name: str) -> str:
        each = outcome(rows, task, name, task.budgets[-1])
        best = best_tuned(outcomes(rows, task, task.budgets[-1]))
        return "" if each is None else gap_cell(task, each, best)

    return markdown(
        ["", *[task.name for task in tasks]],
        [[f"`{name}`", *[cell(task, name) for task in tasks]] for name in names],
    )


def is_of(method: str, base: str) -> bool:
    return method == base or method.startswith(f"{base}(")


def budgets_table(rows: Rows, task: Task) -> str:
    found = {budget: outcomes(rows, task, budget) for budget in task.budgets}

    def line(name: str) -> list[str]:
        each = [found[budget].get(name) for budget in task.budgets]
        cells = ["-" if x is None else f"{x.mean:.2f} ± {x.spread:.2f}" for x in each]
        return [name_of(name), *cells]

    return markdown(
        ["", *[f"{budget} steps" for budget in task.budgets]],
        [line(name) for name in METHODS],
    )


def best_cosine(rows: Rows, task: Task, budget: int) -> Outcome:
    """Tuned for this budget; the better of momentum SGD's and AdamW's."""
    found = outcomes(rows, task, budget, COSINES)
    return min(found.values(), key=lambda each: each.mean)


# What is counted against those that need neither a rate nor a horizon of ours.
RIVALS = "schedule-free-sgd", "schedule-free-adamw", "prodigy-linear"


def anytime_table(rows: Rows, tasks: list[Task]) -> str:
    """The gaps from the best cosine of a quarter, a half and all of the steps."""
    names = [name for name in ANYTIME if name not in COSINES]
    close: dict[str, list[bool]] = {name: [] for name in names}
    ahead: dict[str, dict[str, list[bool]]] = {
        rival: {name: [] for name in names} for rival in RIVALS
    }
    body = []
    for task, budget in [(each, part) for each in tasks for part in each.parts]:
        best = best_cosine(rows, task, budget)
        found = outcomes(rows, task, budget, names)
        for name, each in found.items():
            close[name].append(gap(task, each, best) <= tolerance(task))
            for rival in found.keys() & set(RIVALS):
                ahead[rival][name].append(each.mean < found[rival].mean)
        cells = [
            gap_cell(task, found[name], best) if name in found else "-"
            for name in names
        ]
        head = f"{short(best.mean)} ({best.method})"
        body.append([f"{task.name}, {budget}", head, *cells])
    counts = [["within the target", "", *[count(close[name]) for name in names]]]
    counts += [
        [f"ahead of {rival}", "", *[count(ahead[rival][name]) for name in names]]
        for rival in RIVALS
    ]
    heads = ["task, steps", "best cosine", *map(name_of, names)]
    return markdown(heads, body + counts)


def count(cases: list[bool]) -> str:
    return f"{sum(cases)} of {len(cases)}" if cases else "-"


def has_anytime(rows: Rows, task: Task) -> bool:
    """Whether one of the cosines, and what is drawn beside it, was run."""

    def is_there(names: Iterable[str], budget: int) -> bool:
        return bool(outcomes(rows, task, budget, names))

    return all(
        is_there(COSINES, budget) and is_there([LEADING], budget)
        for budget in task.parts
    )


LEADING = "adamw-progress"
_SHOWN_ANYTIME = {
    LEADING: ("C0-", "AdamW 1e-3 and adapt_on_progress: one run"),
    "adamw-progress(learning_rate=1e-05)": ("C0:", "the same from 1e-5"),
    "adamw-progress(learning_rate=0.01)": ("C0--", "the same from 1e-2"),
    "schedule-free-adamw": ("C1-", "schedule_free_adamw"),
    "prodigy-linear": ("C2-", "Prodigy, falling linearly"),
}


def anytime(rows: Rows, tasks: list[Task]) -> Figure:
    """One run without a schedule, against a cosine tuned for each of three budgets."""

    def draw(ax: Axes, task: Task) -> None:
        ends = []
        for budget in task.parts:
            best = best_cosine(rows, task, budget)
            curve = mean_curve([row["test"] for row in best.rows])
            label = "the best cosine, tuned for each of three budgets"
            ax.plot(steps_of(best.rows[0]), curve, "k--", lw=1, label=label)
            ends.append((budget, best.mean))
        ax.plot(*zip(*ends, strict=True), "ko", ms=4)
        found = outcomes(rows, task, task.parts[-1], _SHOWN_ANYTIME)
        for name, each in found.items():
            style, label = _SHOWN_ANYTIME[name]
            curve = mean_curve([row["test"] for row in each.rows])
            ax.plot(steps_of(each.rows[0]), curve, style, lw=1.3, label=label)
        ax.set(ylabel=f"test, {task.unit}", xlabel="step")
        least, height = min(end for _, end in ends), abs(ends[-1][1])
        ax.set_ylim(least - 0.05 * height, least + 0.6 * height)

    return grid(tasks, draw)


def task_table(rows: Rows, task: Task) -> str:
    """Everything about a task at its largest budget, the best first."""
    found = outcomes(rows, task, task.budgets[-1])
    best = best_tuned(found)

    def line(each: Outcome) -> list[str]:
        return [
            name_of(each.method),
            f"{each.rate:g}",
            f"{short(each.mean)} ± {short(each.spread)}",
            gap_cell(task, each, best),
            short(statistics.mean(each.train)),
            short(statistics.mean(each.area)),
            f"{statistics.mean(each.seconds):.1f}",
            ", ".join(f"{drops:g}" for drops in sorted(set(each.drops))),
            short(statistics.median(row["rates"][-1] for row in each.rows)),
        ]

    heads = ["method", "rate", f"test, {task.unit}", "gap", "train loss", "area"]
    return markdown(
        [*heads, "CPU s", "drops", "last rate"],
        [line(each) for each in sorted(found.values(), key=lambda each: each.mean)],
    )


def page_tables(rows: Rows, tasks: list[Task]) -> dict[str, str]:
    """By the names of their markers in the page."""
    tables = {"gaps": gaps_table(rows, tasks), "variants": variants_table(rows, tasks)}
    complete = [task for task in tasks if has_anytime(rows, task)]
    tables["anytime"] = anytime_table(rows, complete)
    several = [task for task in tasks if len(task.budgets) > 1]
    tables["budgets"] = "\n\n".join(budgets_table(rows, task) for task in several)
    tables["tasks"] = "\n\n".join(
        f"### {task.name}\n\n{task_table(rows, task)}" for task in tasks
    )
    return tables


def grid(tasks: list[Task], draw: Callable[[Axes, Task], None]) -> Figure:
    columns = min(4, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    width = max(3.2 * columns, 9.6)  # the legend's
    figure = Figure(figsize=(width, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for ax, task in zip(axes, tasks, strict=False):
        draw(ax, task)
        ax.set_title(task.name, fontsize="medium")
        ax.grid(alpha=0.3)
    for ax in list(axes)[len(tasks) :]:
        ax.set_visible(False)
    handles = {
        label: handle
        for ax in figure.axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def steps_of(row: Row) -> list[int]:
    count = len(row["test"])
    return [row["steps"] * (i + 1) // count for i in range(count)]


def curves(rows: Rows, tasks: list[Task]) -> Figure:
    """Test metric against step, the mean over the seeds."""

    def draw(ax: Axes, task: Task) -> None:
        found = outcomes(rows, task, task.budgets[-1])
        best = best_tuned(found)
        shown = {"best tuned baseline": best}
        shown |= {name: found[name] for name in SHOWN if name in found}
        for color, (label, each) in enumerate(shown.items()):
            style = "k--" if each is best else f"C{color}-"
            curve = mean_curve([row["test"] for row in each.rows])
            ax.plot(steps_of(each.rows[0]), curve, style, lw=1.2, label=label)
        ax.set(ylabel=f"test, {task.unit}", xlabel="step")
        height = abs(best.mean)
        ax.set_ylim(best.mean - 0.1 * height, best.mean + height)

    return grid(tasks, draw)


def mean_curve(curves: list[list[float | None]]) -> list[float]:
    return [statistics.mean(each) for each in zip(*map(finite, curves), strict=True)]


def finite(curve: list[float | None]) -> list[float]:
    return [math.nan if x is None else x for x in curve]


def rates(rows: Rows, tasks: list[Task]) -> Figure:
    """The rate that SALSA chose, and the best tuned cosine of the same optimizer."""

    def draw(ax: Axes, task: Task) -> None:
        found = outcomes(rows, task, task.budgets[-1], ("sgd-cosine", "salsa"))
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
            points = list(by_rate(rows, task, name))
            if points:
                style = "o-" if METHODS[name].is_ours else "s--"
                xs, ys = zip(*points, strict=True)
                ax.plot(xs, ys, style, color=f"C{color}", label=name, ms=3, lw=1.2)
        ax.set(xscale="log", yscale="log", xlabel="initial rate")
        ax.set_ylabel(f"test, {task.unit}")

    return grid(tasks, draw)


def has_sensitivity(rows: Rows, task: Task) -> bool:
    names = [name for name, each in METHODS.items() if each.sensitivity_rates]
    return all(len(list(by_rate(rows, task, name))) > 5 for name in names)


def by_rate(rows: Rows, task: Task, name: str) -> Iterator[tuple[float, float]]:
    """Rates, and the mean over the seeds of what they end with."""
    steps = task.budgets[-1]
    for rate in METHODS[name].sensitivity_rates:
        ends = [
            at(row["test"], steps, steps)
            for key, row in rows.items()
            if key[:3] == (task.name, name, rate) and key.steps == steps
        ]
        if ends:
            yield rate, statistics.mean(ends)


def publish(
    rows: Rows, tasks: list[Task], page: pathlib.Path, images: pathlib.Path
) -> None:
    """Renews the tables between the markers of the page, and its pictures."""
    text = page.read_text(encoding="utf-8")
    for name, table in page_tables(rows, tasks).items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"{page} lacks the markers {start} and {end}")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")
    curves(rows, tasks).savefig(images / "evidence-curves.png", dpi=120)
    rates(rows, tasks).savefig(images / "evidence-rates.png", dpi=120)
    complete = [task for task in tasks if has_anytime(rows, task)]
    if complete:
        picture = anytime(rows, complete)
        picture.savefig(images / "evidence-anytime.png", dpi=120)
    chosen = [task for task in tasks if has_sensitivity(rows, task)]
    if chosen:
        picture = sensitivity(rows, chosen)
        picture.savefig(images / "evidence-sensitivity.png", dpi=120)
