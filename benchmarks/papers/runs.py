"""The runs of the papers' experiments: each is a line of JSON, and made only once."""

import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.evidence.contenders import Setting
from benchmarks.evidence.runs import rounded
from benchmarks.evidence.task import Task
from benchmarks.evidence.training import Carry, record_fn, start
from benchmarks.papers.methods import PaperMethod, methods_of
from benchmarks.papers.protocols import Protocol, Scale, protocol_named
from benchmarks.papers.tasks import data_of, task_of
from benchmarks.publishing import Row, provenance


class Key(NamedTuple):
    """What identifies a run.

    Attributes:
      experiment: the name of the protocol.
      data: "folder", or the name of the stand-in.
      method: the name of the method.
      seed: of the initial parameters, the mini-batches and dropout.
      epochs: the number of epochs.
    """

    experiment: str
    data: str
    method: str
    seed: int
    epochs: int


class Job(NamedTuple):
    """A run to make, from a folder of data or None, into a file of results."""

    key: Key
    folder: pathlib.Path | None
    path: pathlib.Path

    def __str__(self) -> str:
        return f"{self.key.experiment}, {self.key.method}, seed {self.key.seed}"


def load(path: pathlib.Path) -> dict[Key, Row]:
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {Key(*(row[field] for field in Key._fields)): row for row in rows}


def scale_of(protocol: Protocol, key: Key) -> Scale:
    scale = protocol.published if key.data == "folder" else protocol.reduced
    return scale.lasting(key.epochs)


def work(job: Job) -> Row:
    protocol = protocol_named(job.key.experiment)
    scale = scale_of(protocol, job.key)
    data = data_of(protocol, scale, job.folder)
    method = methods_of(protocol)[job.key.method]
    task = task_of(protocol, scale, data, method.is_shuffled)
    started = time.process_time()
    curves = train(protocol, scale, task, method, job.key.seed)
    seconds = round(time.process_time() - started, 1)
    row = job.key._asdict() | curves | {"seconds": seconds, "made": provenance()}
    with job.path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def train(
    protocol: Protocol, scale: Scale, task: Task, method: PaperMethod, seed: int
) -> dict[str, list[float | None]]:
    """The curves of a run, a number an epoch."""
    epoch = epoch_fn(task, method, scale.epochs)
    params, rest = task.init(seed)
    rate = method.rates[0]
    carry = begin(task, method, scale.epochs, rate, params, rest)
    seen: list[Any] = []
    for key in jax.random.split(jax.random.key(seed), scale.epochs):
        if method.is_scheduled:
            validation = [float(each["validation"]) for each in seen]
            rate = protocol.hand_tuned_rate(scale, validation)
        carry, last = epoch(jnp.float32(rate), carry, key, task.data)
        seen.append(jax.device_get(last))
        if not math.isfinite(seen[-1]["train"]):
            break
    return {name: [rounded(float(each[name])) for each in seen] for name in seen[0]}


def begin(
    task: Task, method: PaperMethod, epochs: int, rate: float, params: Any, rest: Any
) -> Carry:
    optimizer = made(task, method, epochs, jnp.float32(rate))
    # Each leaf has to be a buffer of its own, since the first epoch takes them over.
    return jax.tree.map(jnp.copy, start(params, rest, optimizer, method))


def made(task: Task, method: PaperMethod, epochs: int, rate: jax.Array) -> Any:
    num_steps = epochs * task.steps_per_record
    optimizer = method.make(Setting(rate, num_steps, task))
    return optax.with_extra_args_support(optimizer)


def epoch_fn(task: Task, method: PaperMethod, epochs: int) -> Any:
    """One epoch and its evaluation, compiled. The rate is that of a schedule."""

    def epoch(
        rate: jax.Array, carry: Carry, key: jax.Array, data: Any
    ) -> tuple[Carry, dict[str, jax.Array]]:
        optimizer = made(task, method, epochs, rate)
        return record_fn(task, method, optimizer, rate, data)(carry, key)

    return jax.jit(epoch, donate_argnums=1)
