"""The picture of docs/validity.md."""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from benchmarks.publishing import MINUS, Row
from benchmarks.validity import tables


def early(row: Row) -> tuple[float, str] | None:
    return None if row["never"] == 1 else (row["early"], tables.percent(row["early"]))


def delay(row: Row) -> tuple[float, str] | None:
    return row["delay"] and (row["delay"][1], tables.number(row["delay"][1]))


def rate(row: Row) -> tuple[float, str] | None:
    exponent = float(np.log10(max(row["rate"][1], 1e-38)))
    return exponent, f"{exponent:.0f}".replace("-", MINUS)


class Panel(NamedTuple):
    """A value of a row and its text, or None; and how it is shown."""

    value: Callable[[Row], tuple[float, str] | None]
    title: str
    limits: tuple[float, float]
    palette: str


PANELS = (
    Panel(early, "first drop early, % of runs", (0, 0.5), "RdYlGn_r"),
    Panel(delay, "median delay, relaxation times", (-10, 10), "PuOr_r"),
    Panel(rate, "log10 of the rate left", (-8, 0), "RdYlGn"),
)


def draw_panel(
    axis: Any, cells: tables.Cells, methods: Sequence[str], panel: Panel
) -> None:
    """A table of colours and texts."""
    names = tables.names_in(cells)[0]
    grid = np.full((len(names), len(methods)), np.nan)
    for i, j in itertools.product(range(len(names)), range(len(methods))):
        row = cells.get((names[i], methods[j]))
        found = None if row is None else panel.value(row)
        text = ("" if row is None else "never") if found is None else found[1]
        if found is not None:
            grid[i, j] = np.clip(found[0], *panel.limits)
        axis.text(j, i, text, ha="center", va="center", fontsize=8)
    axis.set_facecolor("0.9")
    low, high = panel.limits
    axis.imshow(grid, cmap=panel.palette, vmin=low, vmax=high, aspect="auto", alpha=0.6)
    axis.set_xticks(range(len(methods)), methods, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title(panel.title, fontsize=10)


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    cells = tables.by_place(rows, "drops")
    firsts, methods = tables.first_drop_methods(cells), tables.names_in(cells)[1]
    shown = firsts, firsts, methods
    figure = matplotlib.figure.Figure((12, 6), layout="constrained")
    widths = {"width_ratios": [len(each) for each in shown]}
    axes = figure.subplots(1, 3, sharey=True, gridspec_kw=widths)
    for axis, each, panel in zip(axes, shown, PANELS, strict=True):
        draw_panel(axis, cells, each, panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
