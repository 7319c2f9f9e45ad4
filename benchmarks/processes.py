"""Runs jobs side by side, each process on a core of its own."""

import concurrent.futures
import functools
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import rich.progress

Job = TypeVar("Job")
Future = concurrent.futures.Future[Any]


def _take_a_core(cores: Any) -> None:
    """Two processes on the same two cores are slower than one on each."""
    try:
        os.sched_setaffinity(0, {cores.get(timeout=1)})
    except (AttributeError, OSError, queue.Empty):
        return


def run_all(
    work: Callable[[Job], Any], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[Job, Future]]:
    """Yields each job with its future, in the order in which they finish."""
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in range(workers):
        cores.put(core)
    # A single process may go wherever there is room.
    take_a_core = functools.partial(_take_a_core, cores) if workers > 1 else None
    with concurrent.futures.ProcessPoolExecutor(workers, context, take_a_core) as pool:
        futures = {pool.submit(work, job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future


def run_with_progress(
    work: Callable[[Job], Any], jobs: Iterable[Job], workers: int
) -> list[Job]:
    """Does the jobs, and returns those that failed, which harm no other."""
    jobs, failed = list(jobs), []
    with rich.progress.Progress() as progress:
        bar = progress.add_task("running", total=len(jobs))
        for job, future in run_all(work, jobs, workers):
            progress.update(bar, advance=1, description=str(job))
            if error := future.exception():
                failed.append(job)
                progress.console.print(f"{job}: {error!r}")
    return failed
