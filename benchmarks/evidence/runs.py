"""The runs of the evidence suite: each is a line of JSON, and is made only once."""

import dataclasses
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.evidence.contenders import method_named
from benchmarks.evidence.task import Task
from benchmarks.evidence.training import run_fn
from benchmarks.publishing import Row, provenance


def rounded(x: float) -> float | None:
    """Four digits; None where it is not finite, which JSON does not have."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def at(curve: list[float | None], steps: int, budget: int) -> float:
    """What a run of ``steps`` steps had reached after ``budget`` of them."""
    value = curve[len(curve) * budget // steps - 1]
    return math.inf if value is None else value


class Key(NamedTuple):
    """What identifies a run."""

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
    """The runs of a method on a task. A run that is not there is made when called."""

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
        # Processor time on one core, which does not count what else the machine does.
        started = time.process_time()
        seen = jax.device_get(run(*arguments))
        seconds = time.process_time() - started
        curves = {name: [rounded(float(x)) for x in xs] for name, xs in seen.items()}
        return key._asdict() | curves | {"seconds": round(seconds, 2)} | provenance()
