"""The command line: measures, and publishes docs/performance.md and docs/peers.md."""

import argparse
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import performance, publishing
from benchmarks.performance import controller, models, optimizers, tables
from benchmarks.performance.statopt_client import bench_statopt
from benchmarks.publishing import DOCS, RESULTS, Row

SIZES = (10**5, 10**6, 10**7, 10**8)
# A small step on an accelerator is the time that the host takes to start it.
PICTURED = {"cpu": "1e+07"}


def place_of(row: Row) -> tuple[Any, ...]:
    """A newer row replaces an older one of the same place."""
    fields = "section", "tree", "form", "case", "baseline"
    return tuple(row.get(field) for field in fields)


def publish(new: list[Row]) -> None:
    """The new rows beside those of other runs: as JSON, as tables, as a picture."""
    backend = jax.default_backend()
    for page, command in tables.PAGES.items():
        path = RESULTS / f"{page}-{backend}.json"
        rows = publishing.load(path)
        for row in new:
            if tables.page_of(row) == page:
                rows = publishing.merged(rows, row, place_of)
        if rows:
            publishing.save(rows, path)
            content = tables.page_content(rows, command, path.name)
            publishing.write(DOCS / f"{page}.md", {backend: content})
        if rows and page == "performance":
            tree = PICTURED.get(backend, "1e+08")
            tables.draw(rows, DOCS / "images" / f"{page}-{backend}.png", tree)
    evidence = (DOCS / "evidence.md").read_text(encoding="utf-8")
    publishing.write(DOCS / "peers.md", tables.quoted(evidence))


def measured(args: argparse.Namespace) -> Iterator[Row]:
    if args.own:
        yield from models.bench_own(args.own, args.rounds)
        return
    if "optimizer" in args.sections:
        for size in args.sizes:
            tree, name = optimizers.flat(size), f"{size:.0e}"
            yield from optimizers.bench_optimizer(name, tree, args.rounds)
            if args.statopt_python:
                yield from bench_statopt(args.statopt_python, size, args.rounds)
        tree = optimizers.transformer_tree()
        name = "transformer, bfloat16"
        yield from optimizers.bench_optimizer(name, tree, args.rounds)
    if "controller" in args.sections:
        yield from controller.bench_controller(args.rounds)
    if "model" in args.sections:
        # The steps vary by several percent, and differ by one.
        yield from models.bench_models(3 * args.rounds)
    if "start" in args.sections:
        yield from optimizers.bench_start(3)
    if "leaves" in args.sections:
        yield from optimizers.bench_leaves(args.rounds)
    if "peers" in args.sections:
        yield from optimizers.bench_peers(args.rounds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=performance.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sections = list(tables.TITLES)
    parser.add_argument("--sections", nargs="*", choices=sections, default=sections)
    sizes = {"nargs": "+", "type": lambda s: int(float(s)), "default": SIZES}
    parser.add_argument("--sizes", **sizes)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--own", metavar="MODULE:FUNCTION")
    parser.add_argument(
        "--statopt-python", type=pathlib.Path, help="in an environment with statopt"
    )
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    args = parser.parse_args()
    if args.own and args.publish:
        parser.error("what --own measures is not for publishing")
    return args


def main() -> None:
    args = arguments()
    rows = []
    for row in measured(args):
        rows.append(row | {"made": publishing.provenance()})
        print(*tables.columns_of(row).values(), sep="  ", flush=True)
    print(tables.tables(rows))
    if args.publish:
        publish(rows)


if __name__ == "__main__":
    main()
