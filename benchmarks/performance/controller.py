"""The controller alone: a thousand parameters, so that nothing else costs much."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sasa_optax
from benchmarks.performance.cases import BASELINES
from benchmarks.performance.timing import Steps, beside
from benchmarks.publishing import Row


def small_steps(optimizer: optax.GradientTransformation, form: str) -> Steps:
    """One step, a thousand in `jax.lax.scan`, or a thousand of 64 members by vmap."""
    grads = jnp.full(1000, 1e-3)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        # The sine stands for noise, and costs less.
        updates, state = optimizer.update(grads * jnp.sin(params), state, params)
        return optax.apply_updates(params, updates), state

    def scanned(carry: Any, grads: Any) -> Any:
        return jax.lax.scan(
            lambda carry, _: (step(carry, grads), None), carry, length=1000
        )[0]

    params = jnp.linspace(-1, 1, 1000)
    carry = (params, optimizer.init(params))
    if form == "vmap":
        carry = jax.tree.map(lambda x: jnp.stack([x] * 64), carry)
        return Steps(jax.vmap(scanned, in_axes=(0, None)), carry, grads)
    return Steps(scanned if form == "scan" else step, carry, grads)


def bench_controller(rounds: int) -> Iterator[Row]:
    """Microseconds that a step of a member takes beyond one of `optax.sgd`."""
    kinds = {
        "no test": sasa_optax.Window(test_interval=10**6),
        "a test at each step": sasa_optax.Window(test_interval=1, min_samples=4),
    }
    for form, steps in (("jit", 1), ("scan", 1000), ("vmap", 64_000)):
        for kind, window in kinds.items():
            base = small_steps(BASELINES["sgd"](), form)
            case = small_steps(sasa_optax.sasa_plus(1e-3, window=window), form)
            timed = beside(base.seconds, case.seconds, rounds)
            yield {
                "section": "controller",
                "form": form,
                "case": kind,
                "added_us": 1e3 * (timed["ms"] - timed["baseline_ms"]) / steps,
                "baseline_us": 1e3 * timed["baseline_ms"] / steps,
            }
