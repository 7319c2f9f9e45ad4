"""What a process of the evidence suite does: all runs of a method on a task."""

import argparse
import pathlib
from typing import Literal, NamedTuple

from benchmarks.evidence.contenders import ANYTIME, method_named
from benchmarks.evidence.runs import Runs, load
from benchmarks.evidence.tasks import task_named
from benchmarks.evidence.tuning import train, train_sensitivity

SENSITIVITY_TASKS = "digits-mlp", "fashion-mlp"


class Job(NamedTuple):
    """A method on a task.

    Attributes:
      task: the name of the task.
      method: the name of the method.
      seeds: the number of seeds.
      path: the file of results.
      kind: "budgets" for all budgets of the task, "parts" for a quarter and a half of
        the largest one, "rates" for the method's sensitivity rates.
    """

    task: str
    method: str
    seeds: int
    path: pathlib.Path
    kind: Literal["budgets", "parts", "rates"] = "budgets"

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, {self.kind}"


def work(job: Job) -> Job:
    runs = Runs(task_named(job.task), job.method, job.path, load(job.path))
    if job.kind == "rates":
        train_sensitivity(runs, job.seeds)
    else:
        train(runs, job.seeds, getattr(runs.task, job.kind))
    return job


def jobs_of(args: argparse.Namespace) -> list[Job]:
    # The longest come first, so that no process is left with them at the end.
    order = {"fashion-mlp": 0, "fashion-cnn": 1, "char-transformer": 2}
    tasks = sorted(args.tasks, key=lambda name: order.get(name, 3))

    def is_wanted(kind: str, task: str, name: str) -> bool:
        method = method_named(name)
        if method.tasks and task not in method.tasks:
            return False
        if kind == "rates":
            has_rates = bool(method.sensitivity_rates)
            return args.sensitivity and task in SENSITIVITY_TASKS and has_rates
        if args.tier != "small":
            # The last part is the whole.
            return kind == "parts"
        return kind == "budgets" or (args.anytime and name in ANYTIME)

    return [
        Job(task, method, args.seeds, args.results, kind)
        for kind in ("budgets", "rates", "parts")
        for task in tasks
        for method in args.methods
        if is_wanted(kind, task, method)
    ]
