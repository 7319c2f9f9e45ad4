"""How often the interval of the zero-mean test holds zero at stationarity."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sasa_optax
from benchmarks.publishing import Row
from benchmarks.validity import drops, simulation
from benchmarks.validity.cells import CELLS, QUICK, Quadratic

WINDOWS = (1000, 4000, 16000)
STATISTICS: dict[str, Callable[[float], sasa_optax.Statistic]] = {
    "master": sasa_optax.master_statistic,
    "yaida": sasa_optax.yaida_statistic,
}
COVERED = tuple(
    cell
    for cell in (*CELLS, QUICK)
    if isinstance(cell, Quadratic)
    and cell.direction == "momentum"
    and not cell.is_large
    and cell.min_samples is None
)


def stationary_start(cell: Quadratic, runs: int) -> tuple[jax.Array, jax.Array]:
    """Parameters and momentum from the stationary law, which is that of Gaussians."""
    root = np.linalg.cholesky(cell.law.covariance + 1e-15 * np.eye(2))
    normals = np.random.default_rng(0).standard_normal((runs, cell.dimension, 2))
    both = np.einsum("dij,rdj->rdi", root, normals)
    params = jnp.asarray(cell.distance + both[..., 0], jnp.float32)
    return params, jnp.asarray(both[..., 1], jnp.float32)


def measure(cell: Quadratic, statistic: str, seeds: int) -> Row:
    """The share of runs whose 95 % interval holds zero, for windows of each size."""
    # The window is all there was, and the rate stays.
    window = sasa_optax.Window(
        leak_ratio=1, min_samples=WINDOWS[0] - 1, test_interval=WINDOWS[0]
    )
    optimizer = sasa_optax.sasa_plus(
        cell.rate,
        cell.momentum,
        statistic=STATISTICS[statistic](cell.momentum),
        test=sasa_optax.ZeroMeanTest(significance=0.05),
        window=window,
        min_learning_rate=cell.rate,
    )
    step = simulation.steps_of(cell, optimizer)

    def until(runs: Any, first: jax.Array) -> Any:
        runs = jax.lax.fori_loop(first, first + WINDOWS[0], step, runs)
        result = runs[1].controller.last_test
        return runs, (result.lower <= 0) & (result.upper >= 0)

    params, trace = stationary_start(cell, seeds)
    state: Any = jax.vmap(optimizer.init)(params)
    _, held = jax.jit(functools.partial(jax.lax.scan, until))(
        (params, state._replace(trace=trace)), jnp.arange(0, WINDOWS[-1], WINDOWS[0])
    )
    held = np.asarray(held)
    shares = {str(n): drops.share(held[n // WINDOWS[0] - 1]) for n in WINDOWS}
    return {"coverage": shares}
