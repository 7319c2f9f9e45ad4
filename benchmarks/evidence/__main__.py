"""The command line: makes the runs that are missing, and publishes docs/evidence.md."""

import argparse
import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks import evidence, processes, publishing
from benchmarks.evidence import pictures, tables
from benchmarks.evidence.contenders import LARGE_METHODS, SMALL_METHODS
from benchmarks.evidence.jobs import jobs_of, work
from benchmarks.evidence.outcomes import Rows
from benchmarks.evidence.runs import load
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import FULL, LARGE, QUICK, TASKS, task_named
from benchmarks.publishing import DOCS, RESULTS


class Tier(NamedTuple):
    """What is run where nothing else is asked for."""

    tasks: Iterable[str]
    methods: Iterable[str]
    seeds: int
    results: pathlib.Path


TIERS = {
    "small": Tier(TASKS, SMALL_METHODS, 3, RESULTS / "evidence.jsonl"),
    "large": Tier(LARGE, LARGE_METHODS, 1, RESULTS / "evidence-large.jsonl"),
    "full": Tier(FULL, LARGE_METHODS, 1, RESULTS / "evidence-full.jsonl"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=evidence.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tier", choices=TIERS, default="small")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", type=int)
    parser.add_argument(
        "--sensitivity", action="store_true", help="also over four decades of rates"
    )
    parser.add_argument(
        "--anytime", action="store_true", help="also at a quarter and a half of it"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=pathlib.Path)
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    parser.add_argument("--quick", action="store_true", help="one tiny task, one seed")
    args = parser.parse_args()
    for name, value in TIERS[args.tier]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.quick:
        args.tasks, args.seeds, args.workers = [QUICK], 1, 1
        args.methods = ["sgd-cosine", "salsa"]
    return args


def publish(rows: Rows, tasks: list[Task], page: pathlib.Path) -> None:
    publishing.write(page, tables.page_tables(rows, tasks))
    for name, figure in pictures.figures(rows, tasks).items():
        figure.savefig(page.parent / "images" / f"{name}.png", dpi=120)


def publish_tier(tier: str, rows: Rows, page: pathlib.Path) -> None:
    """Writes its tables; the data of tasks without runs need not be there."""
    run = {key.task for key in rows}
    tasks = [task_named(name) for name in TIERS[tier].tasks if name in run]
    publishing.write(page, tables.tier_tables(tier, rows, tasks))


def main() -> None:
    args = parse_args()
    if failed := processes.run_with_progress(work, jobs_of(args), args.workers):
        raise SystemExit(f"failed: {', '.join(map(str, failed))}")
    if args.publish and args.tier != "small":
        publish_tier(args.tier, load(args.results), DOCS / "evidence.md")
    elif args.publish:
        tasks = [task_named(name) for name in TASKS]
        publish(load(args.results), tasks, DOCS / "evidence.md")


if __name__ == "__main__":
    main()
