"""Compiled steps, and their times side by side."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.publishing import Row

# Each side takes about this long in each round.
ROUND_SECONDS = 0.1


class Steps:
    """A compiled training step, and the carry that it changes."""

    def __init__(self, step: Callable[..., Any], carry: Any, *inputs: Any) -> None:
        # It is called as a user calls it. What is compiled ahead of time is slower.
        self.step = jax.jit(step, donate_argnums=0)
        # Some optimizers' states alias the parameters, which cannot be donated twice.
        self.carry = jax.tree.map(jnp.copy, carry)
        self.inputs = inputs
        start = time.perf_counter()
        self.compiled = self.step.lower(self.carry, *inputs).compile()
        self.compile_seconds = time.perf_counter() - start
        # The first steps on a GPU take longer, and not only the very first.
        self.seconds(10)

    def seconds(self, count: int) -> float:
        """The time of a step, as the mean over ``count`` in a row."""
        start = time.perf_counter()
        for _ in range(count):
            self.carry = self.step(self.carry, *self.inputs)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / count

    def temporary_bytes(self) -> int:
        memory: Any = self.compiled.memory_analysis()
        return memory.temp_size_in_bytes

    def bytes_accessed(self) -> float:
        cost: Any = self.compiled.cost_analysis()
        return cost["bytes accessed"]


Timer = Callable[[int], float]


def beside(base: Timer, case: Timer, rounds: int, multiple_of: int = 1) -> Row:
    """The times of both in alternating rounds, and their ratio."""
    count = max(1, round(ROUND_SECONDS / base(multiple_of) / multiple_of)) * multiple_of
    pairs = [(base(count), case(count)) for _ in range(rounds)]
    ratios = sorted(later / first for first, later in pairs)
    low, ratio, high = statistics.quantiles(ratios, n=4)
    base_ms, case_ms = (1e3 * statistics.median(s) for s in zip(*pairs, strict=True))
    return {
        "baseline_ms": base_ms,
        "ms": case_ms,
        "ratio": ratio,
        "quartiles": [low, high],
    }
