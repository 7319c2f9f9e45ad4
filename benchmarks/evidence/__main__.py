"""Does it replace tuning? Every method on every task, baselines tuned, ours not.

The tasks are those of `tasks.py`. A baseline with a rate to tune has it chosen from a
grid by the validation data of the first seed, and the grid goes on as long as its best
is at an end; all others run as their authors recommend. Each run is a line of
benchmarks/results/evidence.jsonl, and what is there is not run again.

    make evidence                                    # docs/evidence.md; an hour or two
    python benchmarks/evidence.py --tasks digits-mlp --methods salsa sgd-cosine
    python benchmarks/evidence.py --methods "salsa(factor=0.5, leak_ratio=4)"
    python benchmarks/evidence.py --anytime          # also a quarter and a half of it
    python benchmarks/evidence.py --quick            # seconds: does it still run?

A method may be given arguments of its own, as in the third line: for comparing what
might become a default with what is one.
"""

import argparse
import itertools
import os
import pathlib
import sys

from rich.console import Console

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import evidence_report
from contenders import ANYTIME, METHODS, method_named
from evidence_runs import QUICK, Job, load, run_all, task_named
from tasks import TASKS

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "evidence.jsonl"
DOCS = HERE.parent / "docs"
SENSITIVITY_TASKS = ("digits-mlp", "fashion-mlp")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--sensitivity", action="store_true", help="also over four decades of rates"
    )
    parser.add_argument(
        "--anytime", action="store_true", help="also at a quarter and a half of it"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument(
        "--publish", action="store_true", help="write docs/evidence.md and its pictures"
    )
    parser.add_argument("--quick", action="store_true", help="one tiny task, one seed")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.seeds, args.workers = [QUICK], 1, 1
        args.methods = ["sgd-cosine", "salsa"]
    return args


def jobs_of(args: argparse.Namespace) -> list[Job]:
    # The longest first, so that no process is left with them at the end.
    order = {"fashion-mlp": 0, "fashion-cnn": 1, "char-transformer": 2}
    names = sorted(args.tasks, key=lambda name: order.get(name, 3))
    pairs = itertools.product(names, args.methods)
    jobs = [Job(task, method, args.seeds, args.results) for task, method in pairs]
    if args.sensitivity:
        jobs += [
            Job(task, name, args.seeds, args.results, "rates")
            for task in names
            if task in SENSITIVITY_TASKS
            for name in args.methods
            if method_named(name).sensitivity_rates
        ]
    if args.anytime:
        jobs += [
            Job(task, name, args.seeds, args.results, "parts")
            for task in names
            for name in args.methods
            if name in ANYTIME
        ]
    return jobs


def main() -> None:
    args = parse_args()
    if failed := run_all(jobs_of(args), args.workers, Console()):
        raise SystemExit(f"failed: {', '.join(map(str, failed))}")
    if args.publish:
        rows = load(args.results)
        every = [task_named(name) for name in TASKS]
        evidence_report.publish(rows, every, DOCS / "evidence.md", DOCS / "images")


if __name__ == "__main__":
    main()
