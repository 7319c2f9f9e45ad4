"""The picture of docs/validity.md."""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from benchmarks.publishing import MINUS, Row
from benchmarks.validity.tables import (
    Cells,
    by_place,
    first_drop_methods,
    names_in,
    number,
    percent,
)

Value = Callable[[Row], tuple[float, str] | None]


def early(row: Row) -> tuple[float, str] | None:
    return None if row["never"] == 1 else (row["early"], percent(row["early"]))


def delay(row: Row) -> tuple[float, str] | None:
    return row["delay"] and (row["delay"][1], number(row["delay"][1]))


def rate(row: Row) -> tuple[float, str] | None:
    exponent = float(np.log10(max(row["rate"][1], 1e-38)))
    return exponent, f"{exponent:.0f}".replace("-", MINUS)


# What each panel shows, with its title, limits and palette.
PANELS: tuple[tuple[Value, str, tuple[float, float], str], ...] = (
    (early, "first drop early, % of runs", (0, 0.5), "RdYlGn_r"),
    (delay, "median delay, relaxation times", (-10, 10), "PuOr_r"),
    (rate, "log10 of the rate left", (-8, 0), "RdYlGn"),
)


def draw_panel(
    axis: Any,
    cells: Cells,
    methods: Sequence[str],
    value: Value,
    limits: tuple[float, float],
    palette: str,
) -> None:
    """A table of colours: a value within the limits, and its text, for each row."""
    names = names_in(cells)[0]
    grid = np.full((len(names), len(methods)), np.nan)
    for i, j in itertools.product(range(len(names)), range(len(methods))):
        row = cells.get((names[i], methods[j]))
        found = None if row is None else value(row)
        text = ("" if row is None else "never") if found is None else found[1]
        if found is not None:
            grid[i, j] = np.clip(found[0], *limits)
        axis.text(j, i, text, ha="center", va="center", fontsize=8)
    axis.set_facecolor("0.9")
    axis.imshow(
        grid, cmap=palette, vmin=limits[0], vmax=limits[1], aspect="auto", alpha=0.6
    )
    axis.set_xticks(range(len(methods)), methods, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    cells = by_place(rows, "drops")
    firsts, methods = first_drop_methods(cells), names_in(cells)[1]
    shown = firsts, firsts, methods
    figure = matplotlib.figure.Figure((12, 6), layout="constrained")
    widths = {"width_ratios": [len(each) for each in shown]}
    axes = figure.subplots(1, 3, sharey=True, gridspec_kw=widths)
    for axis, each, (value, title, *style) in zip(axes, shown, PANELS, strict=True):
        draw_panel(axis, cells, each, value, *style)
        axis.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
