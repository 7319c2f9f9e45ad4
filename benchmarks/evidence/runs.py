"""The runs of the evidence suite: each compiled to a loop, and each a line of JSON."""

import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import queue
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tasks
from contenders import Method, Setting, method_named
from rich.console import Console
from rich.progress import Progress
from tasks import Task

import sasa_optax

Row = dict[str, Any]

# The grid goes on to its sides, by factors of about three, but no further than this.
LEAST_RATE, MOST_RATE = 1e-5, 100.0
# A name of its own, so that its runs are never taken for those of the suite.
QUICK = "quick"


class Carry(NamedTuple):
    """What a step changes."""

    params: Any
    rest: Any
    opt_state: Any
    average: Any
    num_steps: jax.Array


def averaged(average: Any, params: Any, num_steps: jax.Array) -> Any:
    """With polynomial weights of power 8, as the authors of DoG recommend."""
    weight = 9.0 / (num_steps + 9.0)
    return jax.tree.map(lambda a, x: a + weight * (x - a), average, params)


def step_fn(task: Task, method: Method, optimizer: Any, data: Any) -> Callable:
    def step(carry: Carry, batch: Any) -> tuple[Carry, jax.Array]:
        params, rest, opt_state, average, num_steps = carry
        (loss, new_rest), grads = jax.value_and_grad(task.loss, has_aux=True)(
            params, rest, batch, data
        )
        # With dropout the loss is not the one that a line search evaluates.
        searches = optax.tree.get(opt_state, "line_search_active") is not None
        is_random = bool(jax.tree.leaves(rest))
        updates, opt_state = optimizer.update(
            grads,
            opt_state,
            params,
            grad=grads,
            value=None if searches and is_random else loss,
            value_fn=lambda params: task.value(params, rest, batch, data),
        )
        params = optax.apply_updates(params, updates)
        if method.evaluated_at == "average":
            average = averaged(average, params, num_steps)
        return Carry(params, new_rest, opt_state, average, num_steps + 1), loss

    return step


def evaluated(
    task: Task, method: Method, carry: Carry, batches: Any, data: Any
) -> tuple[jax.Array, jax.Array]:
    """On validation and test data, at the parameters that the method is judged by."""
    params, rest = carry.params, carry.rest
    if method.evaluated_at == "schedule_free":
        params = optax.contrib.schedule_free_eval_params(carry.opt_state, params)
    elif method.evaluated_at == "average":
        params = carry.average
    elif method.evaluated_at == "averaged_params":
        params = sasa_optax.averaged_params(carry.opt_state, params)
    if task.has_running_averages and method.evaluated_at != "last":
        # Those of the iterates are not those of their average.
        some = jax.tree.map(lambda x: x[:50], batches)
        rest, _ = jax.lax.scan(
            lambda rest, batch: (task.loss(params, rest, batch, data)[1], None),
            rest,
            some,
        )
    return task.evaluate(params, rest, data)


def rate_of(opt_state: Any, rate: jax.Array) -> jax.Array:
    """What a controller or a plateau has made of the rate; else the rate itself."""
    kinds = (
        sasa_optax.AdaptOnProgressState,
        sasa_optax.ControllerState,
        optax.contrib.ReduceLROnPlateauState,
    )
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    for node in nodes:
        if isinstance(node, kinds):
            now = getattr(node, "learning_rate", None)
            return rate * node.scale if now is None else now
    return rate


def run_fn(task: Task, method: Method, num_steps: int) -> Callable:
    """A whole run, from a rate, a key and initial parameters to its curves."""

    def run(rate: jax.Array, key: jax.Array, params: Any, rest: Any, data: Any) -> Any:
        optimizer = optax.with_extra_args_support(
            method.make(Setting(rate, num_steps, task))
        )
        step = step_fn(task, method, optimizer, data)

        def record(carry: Carry, key: jax.Array) -> Any:
            batches = task.draw(key, data)
            carry, losses = jax.lax.scan(step, carry, batches)
            validation, test = evaluated(task, method, carry, batches, data)
            names = "num_drops", "num_overshoots"
            counts = [optax.tree.get(carry.opt_state, name) for name in names]
            drops = next((x for x in counts if x is not None), jnp.int32(0))
            seen = {
                "train": losses.mean(),
                "validation": validation,
                "test": test,
                "rates": rate_of(carry.opt_state, rate),
                "drops": drops,
            }
            return carry, seen

        average = params if method.evaluated_at == "average" else None
        state = optimizer.init(params)
        carry = Carry(params, rest, state, average, jnp.zeros((), jnp.int32))
        keys = jax.random.split(key, num_steps // task.steps_per_record)
        return jax.lax.scan(record, carry, keys)[1]

    return run


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind
        if device.platform != "cpu"
        else platform.machine(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "sasa_optax": sasa_optax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def rounded(x: float) -> float | None:
    """Four digits; None where it is not finite, which JSON does not have."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


class Key(NamedTuple):
    """What tells a run from all others."""

    task: str
    method: str
    rate: float
    seed: int
    steps: int


def load(path: pathlib.Path) -> dict[Key, Row]:
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {Key(*(row[field] for field in Key._fields)): row for row in rows}


@dataclasses.dataclass
class Runs:
    """The runs of a method on a task: those that are there, and those that it makes."""

    task: Task
    name: str
    path: pathlib.Path
    rows: dict[Key, Row]

    def __post_init__(self) -> None:
        self.method = method_named(self.name)
        self.compiled: dict[int, Any] = {}

    def compile(self, num_steps: int, arguments: Any) -> Any:
        if num_steps not in self.compiled:
            run = run_fn(self.task, self.method, num_steps)
            self.compiled[num_steps] = jax.jit(run).lower(*arguments).compile()
        return self.compiled[num_steps]

    def __call__(self, rate: float, seed: int, num_steps: int) -> Row:
        key = Key(self.task.name, self.name, rate, seed, num_steps)
        if key not in self.rows:
            self.rows[key] = self.make(key)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]

    def make(self, key: Key) -> Row:
        params, rest = self.task.init(key.seed)
        arguments = (
            jnp.float32(key.rate),
            jax.random.key(key.seed),
            params,
            rest,
            self.task.data,
        )
        run = self.compile(key.steps, arguments)
        # Of the processor, on one core: what else the machine does is not counted.
        started = time.process_time()
        seen = jax.device_get(run(*arguments))
        seconds = time.process_time() - started
        curves = {name: [rounded(float(x)) for x in xs] for name, xs in seen.items()}
        return key._asdict() | curves | {"seconds": round(seconds, 2)} | machine()


def at(curve: list[float | None], steps: int, budget: int) -> float:
    """What a run of so many steps had reached at a smaller budget."""
    value = curve[len(curve) * budget // steps - 1]
    return math.inf if value is None else value


def neighbour(rates: Iterable[float], upwards: bool) -> float:
    """The next of 1, 3, 10, 30, ... beyond the given ones."""
    grid = [
        float(f"{digit}e{exponent}") for exponent in range(-8, 4) for digit in (1, 3)
    ]
    if upwards:
        return min(rate for rate in grid if rate > 1.01 * max(rates))
    return max(rate for rate in grid if rate < 0.99 * min(rates))


def tune(runs: Runs, seed: int, num_steps: int, budget: int) -> float:
    """The rate that is best on validation data after ``budget`` of the steps."""
    scores: dict[float, float] = {}
    # The inner ones first: most grids need not go on to their ends.
    pending = list(runs.method.rates[1:-1] or runs.method.rates)
    while pending:
        for rate in pending:
            row = runs(rate, seed, num_steps)
            scores[rate] = at(row["validation"], num_steps, budget)
        best = min(scores, key=lambda rate: scores[rate])
        pending = []
        if math.isfinite(scores[best]) and best in (min(scores), max(scores)):
            rate = neighbour(scores, upwards=best == max(scores))
            pending = [rate] if LEAST_RATE <= rate <= MOST_RATE else []
    return min(scores, key=lambda rate: scores[rate])


def train(runs: Runs, seeds: int, budgets: Iterable[int]) -> None:
    """All that the report asks for of a method on a task, within these steps."""
    method, task = runs.method, runs.task
    for budget in budgets:
        # What does not know the horizon has passed by the smaller budgets on its way.
        num_steps = budget if method.knows_horizon else task.budgets[-1]
        rate = method.rates[0]
        if method.is_tuned:
            rate = tune(runs, 0, num_steps, budget)
        for seed in range(seeds):
            runs(rate, seed, num_steps)


def train_sensitivity(runs: Runs, seeds: int) -> None:
    for rate, seed in itertools.product(runs.method.sensitivity_rates, range(seeds)):
        runs(rate, seed, runs.task.budgets[-1])


class Job(NamedTuple):
    """For a process of its own: a method on a task."""

    task: str
    method: str
    seeds: int
    path: pathlib.Path
    kind: Literal["budgets", "parts", "rates"] = "budgets"

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, {self.kind}"


@functools.lru_cache(maxsize=1)
def task_named(name: str) -> Task:
    if name == QUICK:
        task = tasks.digits_logistic()
        budgets = (2 * task.steps_per_record,)
        return dataclasses.replace(task, name=QUICK, budgets=budgets)
    return tasks.TASKS[name]()


def work(job: Job) -> Job:
    runs = Runs(task_named(job.task), job.method, job.path, load(job.path))
    if job.kind == "rates":
        train_sensitivity(runs, job.seeds)
    else:
        train(runs, job.seeds, getattr(runs.task, job.kind))
    return job


def take_a_core(cores: Any) -> None:
    """A core for each process: two on the same ones are slower than one on each."""
    try:
        os.sched_setaffinity(0, {cores.get(timeout=1)})
    except (AttributeError, queue.Empty):
        return


def run_all(jobs: list[Job], workers: int, console: Console) -> list[Job]:
    """Runs them, and returns those that failed: the others are not lost with them."""
    failed = []
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in range(workers):
        cores.put(core)
    with (
        Progress(console=console) as progress,
        concurrent.futures.ProcessPoolExecutor(
            workers, context, take_a_core, (cores,)
        ) as pool,
    ):
        bar = progress.add_task("running", total=len(jobs))
        futures = {pool.submit(work, job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            job = futures[future]
            progress.update(bar, advance=1, description=str(job))
            if error := future.exception():
                failed.append(job)
                console.print(f"{job}: {error!r}")
    return failed
