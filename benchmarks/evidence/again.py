"""Makes stored runs again, after a change of the library that they depend on.

    python -m benchmarks.evidence.again progress    # of methods with this in their name

New runs are kept in a file beside the old ones, so an interrupted command continues
when it is repeated. They take the place of the old ones when all are there. The pages
stay as they are until they are published.
"""

import argparse
import json
import os
import pathlib
from typing import NamedTuple

from benchmarks import processes
from benchmarks.evidence.outcomes import Rows
from benchmarks.evidence.runs import Key, Runs, load
from benchmarks.evidence.tasks import task_named
from benchmarks.publishing import RESULTS


class Job(NamedTuple):
    """Runs of a method on a task, to be made again, and the file that they go into."""

    task: str
    method: str
    keys: list[Key]
    path: pathlib.Path

    def __str__(self) -> str:
        return f"{self.task}, {self.method}"


def work(job: Job) -> None:
    runs = Runs(task_named(job.task), job.method, job.path, load(job.path))
    for key in job.keys:
        runs(key.rate, key.seed, key.steps)


def beside(results: pathlib.Path) -> pathlib.Path:
    """Where new runs are kept until all are there."""
    return results.with_name(f"{results.stem}-again.jsonl")


def jobs_of(rows: Rows, part: str, path: pathlib.Path) -> list[Job]:
    """The runs of the methods with ``part`` in their names; the longest come first."""
    keys: dict[tuple[str, str], list[Key]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for key, row in rows.items():
        if part in key.method:
            place = key.task, key.method
            keys.setdefault(place, []).append(key)
            seconds[place] = seconds.get(place, 0) + row["seconds"]
    places = sorted(keys, key=lambda place: -seconds[place])
    return [Job(*place, keys[place], path) for place in places]


def replace(results: pathlib.Path) -> None:
    """Puts the new runs, if there are any, in the places of the old ones."""
    rows = load(results) | load(beside(results))
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    results.write_text("".join(lines), encoding="utf-8")
    beside(results).unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.again",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", help="a part of the names of the methods")
    every = [RESULTS / f"{name}.jsonl" for name in ("evidence", "evidence-large")]
    parser.add_argument("--results", type=pathlib.Path, nargs="+", default=every)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    jobs = [
        job
        for results in args.results
        for job in jobs_of(load(results), args.part, beside(results))
    ]
    if not jobs:
        raise SystemExit(f"part must be in the name of a method, got {args.part!r}.")
    if failed := processes.run_with_progress(work, jobs, args.workers):
        raise SystemExit(f"failed: {', '.join(map(str, failed))}")
    for results in args.results:
        replace(results)


if __name__ == "__main__":
    main()
