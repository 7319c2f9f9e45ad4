"""The command line: measures what is missing, and publishes docs/validity.md."""

import argparse
import pathlib
from collections.abc import Sequence

from benchmarks import publishing, validity
from benchmarks.publishing import DOCS, RESULTS, Row
from benchmarks.validity import picture, tables
from benchmarks.validity.cells import CELLS
from benchmarks.validity.methods import METHODS
from benchmarks.validity.rows import is_row_of, place_of, run_all, tasks_of

PART = "table"


def publish(rows: list[Row], page: pathlib.Path) -> None:
    publishing.write(page, {PART: tables.page_content(rows)})
    picture.draw(rows, page.parent / "images" / "validity.png")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=validity.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sections", nargs="+", default=["drops", "coverage"])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--fresh", action="store_true", help="compute rows anew")
    parser.add_argument("--quick", action="store_true", help="one tiny cell instead")
    parser.add_argument("--out", type=pathlib.Path, help="the results, a JSON file")
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    parser.add_argument("--page", type=pathlib.Path, default=DOCS / "validity.md")
    args = parser.parse_args(argv)
    if args.quick and args.publish:
        parser.error("what --quick measures is not for publishing")
    if args.out is None and not args.quick:
        args.out = RESULTS / "validity.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    rows = publishing.load(args.out) if args.out else []
    todo = [
        task
        for task in tasks_of(args)
        if args.fresh or not any(is_row_of(task, row) for row in rows)
    ]
    for done, row in enumerate(run_all(todo, args.jobs), 1):
        rows = sorted(publishing.merged(rows, row, place_of), key=place_of)
        print(f"{done}/{len(todo)}:", *tables.columns_of(row), sep="  ", flush=True)
        if args.out:
            publishing.save(rows, args.out)
    print(tables.page_content(rows))
    if args.publish:
        publish(rows, args.page)


if __name__ == "__main__":
    main()
