"""The tables of docs/evidence.md."""

import math
import statistics
from collections.abc import Sequence

from benchmarks.evidence import outcomes
from benchmarks.evidence.contenders import (
    ANYTIME,
    COSINES,
    LARGE_METHODS,
    LARGE_SCHEDULES,
    METHODS,
)
from benchmarks.evidence.outcomes import Outcome, Rows
from benchmarks.evidence.task import Task
from benchmarks.publishing import markdown

# The methods with which all others are compared at each moment.
RIVALS = "schedule-free-sgd", "schedule-free-adamw", "prodigy-linear"
LARGE_RIVALS = "schedule-free-adamw-calibrated", "prodigy-linear"


def short(x: float) -> str:
    return f"{x:.3g}" if math.isfinite(x) else "diverged"


def name_of(name: str) -> str:
    return f"**{name}**" if METHODS[name].is_ours else name


def gap_cell(task: Task, each: Outcome, best: Outcome) -> str:
    size = outcomes.gap(task, each, best)
    if not math.isfinite(size) or size > 1000:
        return "diverged"
    text = f"{size:+.2f}" if abs(size) < 10 else f"{size:+.0f}"
    return f"**{text}**" if size <= outcomes.tolerance(task) else text


def gaps_table(rows: Rows, tasks: list[Task]) -> str:
    """The gap of every method to the best tuned baseline, and its mean rank."""
    found = {
        task.name: outcomes.outcomes(rows, task, task.budgets[-1]) for task in tasks
    }
    # A rank among a few methods does not count as one among all.
    most = max(map(len, found.values()))
    ranked = {
        name: outcomes.ranks(each) if len(each) == most else {}
        for name, each in found.items()
    }

    def line(name: str) -> list[str]:
        cells, mine, close = [], [], []
        for task in tasks:
            each = found[task.name].get(name)
            best = outcomes.best_tuned(found[task.name])
            cells.append("-" if each is None else gap_cell(task, each, best))
            if each is not None:
                close.append(outcomes.gap(task, each, best) <= outcomes.tolerance(task))
            if name in ranked[task.name]:
                mine.append(ranked[task.name][name])
        rank = f"{statistics.mean(mine):.1f}" if mine else ""
        return [name_of(name), *cells, count(close), rank]

    best = [outcomes.best_tuned(found[task.name]) for task in tasks]
    head = ["best tuned"] + [f"{short(each.mean)} ({each.method})" for each in best]
    names = [task.name for task in tasks]
    run = [name for name in METHODS if any(name in each for each in found.values())]
    return markdown(
        ["", *names, "within the target", "mean rank"],
        [[*head, "", ""], *map(line, run)],
    )


def variants_table(rows: Rows, tasks: list[Task]) -> str:
    """The gaps of methods with arguments, each group below the method without."""
    bases = {key.method.partition("(")[0] for key in rows if "(" in key.method}
    names = [
        name
        for base in METHODS
        if base in bases
        for name in sorted({key.method for key in rows if is_of(key.method, base)})
    ]

    def cell(task: Task, name: str) -> str:
        each = outcomes.outcome(rows, task, name, task.budgets[-1])
        best = outcomes.best_tuned(outcomes.outcomes(rows, task, task.budgets[-1]))
        return "" if each is None else gap_cell(task, each, best)

    return markdown(
        ["", *[task.name for task in tasks]],
        [[f"`{name}`", *[cell(task, name) for task in tasks]] for name in names],
    )


def is_of(method: str, base: str) -> bool:
    return method == base or method.startswith(f"{base}(")


def budgets_table(rows: Rows, task: Task) -> str:
    """The test metric of every method at each budget."""
    found = {budget: outcomes.outcomes(rows, task, budget) for budget in task.budgets}

    def line(name: str) -> list[str]:
        each = [found[budget].get(name) for budget in task.budgets]
        cells = ["-" if x is None else f"{x.mean:.2f} ± {x.spread:.2f}" for x in each]
        return [name_of(name), *cells]

    heads = [f"{task.name}, {task.unit}", *(f"{x} steps" for x in task.budgets)]
    names = [name for name in METHODS if any(name in each for each in found.values())]
    return markdown(heads, map(line, names))


def anytime_table(
    rows: Rows,
    tasks: list[Task],
    methods: Sequence[str] = ANYTIME,
    schedules: Sequence[str] = COSINES,
    rivals: Sequence[str] = RIVALS,
    kind: str = "cosine",
) -> str:
    """The gaps to the best schedule of a quarter, a half and all of the steps."""
    names = [name for name in methods if name not in schedules]
    close: dict[str, list[bool]] = {name: [] for name in names}
    ahead: dict[str, dict[str, list[bool]]] = {
        rival: {name: [] for name in names} for rival in rivals
    }
    body = []
    for task, budget in [(each, part) for each in tasks for part in each.parts]:
        best = outcomes.best_schedule(rows, task, budget, schedules)
        found = outcomes.outcomes(rows, task, budget, names)
        for name, each in found.items():
            close[name].append(
                outcomes.gap(task, each, best) <= outcomes.tolerance(task)
            )
            for rival in found.keys() & set(rivals):
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
        for rival in rivals
    ]
    heads = ["task, steps", f"best {kind}", *map(name_of, names)]
    return markdown(heads, body + counts)


def count(cases: list[bool]) -> str:
    return f"{sum(cases)} of {len(cases)}" if cases else "-"


def task_table(rows: Rows, task: Task) -> str:
    """Every method on a task at its largest budget, the best first."""
    found = outcomes.outcomes(rows, task, task.budgets[-1])
    best = outcomes.best_tuned(found) if outcomes.has_baseline(found) else None

    def line(each: Outcome) -> list[str]:
        return [
            name_of(each.method),
            f"{each.rate:g}",
            f"{short(each.mean)} ± {short(each.spread)}",
            "-" if best is None else gap_cell(task, each, best),
            short(statistics.mean(each.train)),
            short(statistics.mean(each.area)),
            seconds_cell(each),
            ", ".join(f"{drops:g}" for drops in sorted(set(each.drops))),
            short(statistics.median(row["rates"][-1] for row in each.rows)),
        ]

    heads = ["method", "rate", f"test, {task.unit}", "gap", "train loss", "area"]
    return markdown(
        [*heads, "CPU s", "drops", "last rate"],
        [line(each) for each in sorted(found.values(), key=lambda each: each.mean)],
    )


def seconds_cell(each: Outcome) -> str:
    """Those of a core; on an accelerator they are not what a run takes."""
    is_timed = all(row.get("device", "cpu") == "cpu" for row in each.rows)
    return f"{statistics.mean(each.seconds):.1f}" if is_timed else "-"


def page_tables(rows: Rows, tasks: list[Task]) -> dict[str, str]:
    """The tables, by the names of their parts of the page."""
    tables = {"gaps": gaps_table(rows, tasks), "variants": variants_table(rows, tasks)}
    complete = [task for task in tasks if outcomes.has_anytime(rows, task)]
    tables["anytime"] = anytime_table(rows, complete)
    several = [task for task in tasks if len(task.budgets) > 1]
    tables["budgets"] = "\n\n".join(budgets_table(rows, task) for task in several)
    tables["tasks"] = task_tables(rows, tasks)
    return tables


def task_tables(rows: Rows, tasks: list[Task]) -> str:
    return "\n\n".join(f"### {task.name}\n\n{task_table(rows, task)}" for task in tasks)


def tier_tables(tier: str, rows: Rows, tasks: list[Task]) -> dict[str, str]:
    """The tables of a tier beyond the first; they leave out tasks without runs."""
    run = [task for task in tasks if outcomes.outcomes(rows, task, task.budgets[-1])]
    complete = [
        task for task in run if outcomes.has_anytime(rows, task, LARGE_SCHEDULES)
    ]
    anytime = anytime_table(
        rows, complete, LARGE_METHODS, LARGE_SCHEDULES, LARGE_RIVALS, "schedule"
    )
    return {
        f"{tier}-anytime": anytime if complete else "",
        f"{tier}-tasks": task_tables(rows, run),
    }
