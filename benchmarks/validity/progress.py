"""Does `adapt_on_progress` find a rate as good as the best that hindsight finds?

It is put behind the optimizer of each quadratic cell, starting from the cell's rate and
from a hundredth of it. Its rivals are the same optimizer at constant rates, and at
rates that fall as a power of the step. All see the same noise, and are judged by the
excess loss of their average over the newest eighth of the steps.

    make validity                                          # this too, into docs/
    python -m benchmarks.validity.progress --publish       # this alone
    python -m benchmarks.validity.progress --cells base    # a part
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from benchmarks import publishing
from benchmarks.publishing import DOCS, MINUS, RESULTS, Row
from benchmarks.validity import cells
from benchmarks.validity.cells import Quadratic
from benchmarks.validity.race import KINDS, MOMENTS, measure
from benchmarks.validity.tables import made_line

PART = "progress table"
# With more steps, or more runs in a thousand dimensions, a cell would take above 20
# seconds.
MOST_STEPS, MOST_STEPS_LARGE = 300_000, 60_000
MOST_RUNS_LARGE = 4
# Cells that differ in the window of a test are left out, as the servo has none.
CELLS = tuple(
    cell
    for cell in cells.CELLS
    if isinstance(cell, Quadratic) and cell.min_samples is None
)
HEADS = (
    "cell",
    "steps",
    *(f"{moment}, / {kind}" for moment in MOMENTS for kind in KINDS),
    "best constant",
    "best power",
    "first rate",
    "rate at the end",
    "highest rate",
    "cuts · brakes",
)


def sizes_of(cell: Quadratic, runs: int) -> tuple[int, int]:
    """The number of steps and of runs."""
    if cell.is_large:
        return min(cell.steps, MOST_STEPS_LARGE), min(runs, MOST_RUNS_LARGE)
    return min(cell.steps, MOST_STEPS), runs


def joined(texts: Sequence[str]) -> str:
    """The texts of both starts, or the one text that they share."""
    return texts[0] if len(set(texts)) == 1 else " · ".join(texts)


def best_text(row: Row, kind: str) -> str:
    """The schedule that is best at the end."""
    own = row["best"]["end"][kind]
    fall = f", k^{MINUS}{own['gamma']:g}" if own["gamma"] else ""
    return f"{own['rate']:.2g}{fall}"


def range_text(servo: Row) -> str:
    low, high = (f"{rate:.2g}" for rate in servo["rate"])
    return low if low == high else f"{low} to {high}"


def cuts_text(row: Row) -> str:
    """The cuts in all runs from both starts."""
    cuts, brakes = (
        [count for servo in row["servos"] for count in servo[kind]]
        for kind in ("overshoots", "brakes")
    )
    num_runs = np.count_nonzero(np.add(cuts, brakes))
    runs = f" in {num_runs} of {len(cuts)} runs" if num_runs else ""
    return f"{sum(cuts)} · {sum(brakes)}{runs}"


def columns_of(row: Row) -> list[str]:
    servos = row["servos"]
    ratios = [
        joined([f"{servo['ratio'][moment][kind][0]:.2f}" for servo in servos])
        for moment in MOMENTS
        for kind in KINDS
    ]
    return [
        row["cell"]["name"],
        f"{row['steps']:,}",
        *ratios,
        *(best_text(row, kind) for kind in KINDS),
        f"{row['cell']['rate']:g}",
        joined([range_text(servo) for servo in servos]),
        joined([f"{servo['highest']:.2g}" for servo in servos]),
        cuts_text(row),
    ]


def page_content(rows: Sequence[Row]) -> str:
    table = publishing.markdown(HEADS, map(columns_of, rows))
    minutes = sum(row["seconds"] for row in rows) / 60
    made = made_line(rows, "validity_progress.json")
    return f"{table}\n\n{made} It took {minutes:.0f} minutes on one core."


def place_of(row: Row) -> int:
    return [cell.name for cell in CELLS].index(row["cell"]["name"])


def is_row_of(cell: Quadratic, sizes: tuple[int, int], row: Row) -> bool:
    own = {**dataclasses.asdict(cell), "rate": cell.rate}
    return (row["cell"], row["steps"], row["runs"]) == (own, *sizes)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS])
    parser.add_argument("--runs", type=int, default=16)
    out = RESULTS / "validity_progress.json"
    parser.add_argument("--out", type=pathlib.Path, default=out)
    parser.add_argument("--fresh", action="store_true", help="compute rows anew")
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    parser.add_argument("--page", type=pathlib.Path, default=DOCS / "validity.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    rows = publishing.load(args.out)
    for cell in CELLS:
        sizes = sizes_of(cell, args.runs)
        is_known = any(is_row_of(cell, sizes, row) for row in rows) and not args.fresh
        if is_known or cell.name not in (args.cells or [cell.name]):
            continue
        row = measure(cell, *sizes)
        rows = sorted(publishing.merged(rows, row, place_of), key=place_of)
        print(*columns_of(row), f"{row['seconds']:.0f} s", sep="  ", flush=True)
        publishing.save(rows, args.out)
    if args.publish:
        publishing.write(args.page, {PART: page_content(rows)})


if __name__ == "__main__":
    main()
