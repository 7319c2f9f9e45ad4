"""Runs of a cell, all at once: each step is made for every run."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sasa_optax
from benchmarks.validity.cells import Quadratic, Series
from benchmarks.validity.methods import Method, Optimizer

# The steps of so many first drops are recorded.
RECORDED = 3
# Where no closed form exists, the loss is averaged over so many runs at a constant
# rate, and over blocks of so many steps.
ENSEMBLE, BLOCK = 512, 250

Step = Callable[[int | jax.Array, Any], Any]


def draw(kind: str, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise of variance 1."""
    if kind == "gaussian":
        return jax.random.normal(key, shape)
    # This is much cheaper than jax.random.t. The variance of t with 3 degrees of
    # freedom is 3.
    normals = jax.random.normal(key, (4, *shape))
    return normals[0] / jnp.sqrt(jnp.sum(normals[1:] ** 2, axis=0))


def noise_of_step(
    k: int | jax.Array, shape: tuple[int, ...], kind: str = "gaussian"
) -> jax.Array:
    """The noise of step k, the same whatever the optimizer."""
    return draw(kind, jax.random.fold_in(jax.random.key(0), k), shape)


def optimizer_of(cell: Quadratic, method: Method) -> Optimizer:
    if cell.direction == "adam":
        reduce = sasa_optax.reduce_on_stationarity(**method.options)
        return optax.chain(optax.adam(cell.rate), reduce)
    window = method.window
    if cell.min_samples is not None:
        window = dataclasses.replace(window, min_samples=cell.min_samples)
    return method.make(cell.rate, momentum=cell.momentum, window=window)


def steps_of(cell: Quadratic, optimizer: optax.GradientTransformation) -> Step:
    """One step of all runs: maps (params, state), each with a leading axis of runs."""
    eigenvalues = jnp.asarray(cell.eigenvalues, jnp.float32)
    optimum = jnp.float32(cell.distance)
    update = optax.with_extra_args_support(optimizer).update

    def one(params: jax.Array, state: Any, noise: jax.Array) -> Any:
        offset = params - optimum
        grads = eigenvalues * offset + noise
        # The loss of a mini-batch, whose gradient is that of the mini-batch.
        loss = jnp.sum(offset * (eigenvalues * offset / 2 + noise))
        updates, state = update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    def step(k: int | jax.Array, carry: Any) -> Any:
        params, state = carry
        noise = noise_of_step(k, params.shape, cell.noise)
        return jax.vmap(one)(params, state, noise)

    return step


def first_params(cell: Quadratic, runs: int) -> jax.Array:
    params = jnp.asarray(cell.distance + cell.start, jnp.float32)
    return jnp.broadcast_to(params, (runs, cell.dimension))


def constant_rate_losses(cell: Quadratic, steps: int) -> np.ndarray:
    """The excess loss under Adam, averaged over `ENSEMBLE` runs and each block."""
    optimizer = optax.adam(cell.rate)
    step = steps_of(cell, optimizer)
    eigenvalues = jnp.asarray(cell.eigenvalues, jnp.float32)

    def add(k: jax.Array, carry: Any) -> Any:
        total, runs = carry
        params, state = step(k, runs)
        squares = jnp.mean((params - cell.distance) ** 2, axis=0)
        return total + jnp.sum(eigenvalues * squares) / 2, (params, state)

    def block(runs: Any, first: jax.Array) -> Any:
        total, runs = jax.lax.fori_loop(first, first + BLOCK, add, (0.0, runs))
        return runs, total / BLOCK

    params = first_params(cell, ENSEMBLE)
    carry = params, jax.vmap(optimizer.init)(params)
    _, losses = jax.jit(functools.partial(jax.lax.scan, block))(
        carry, jnp.arange(0, steps, BLOCK)
    )
    return np.asarray(losses)


@dataclasses.dataclass(frozen=True)
class Runs:
    """What became of each run.

    Attributes:
      steps: the steps of its first drops, -1 for none; shape (runs, RECORDED).
      drops: the number of all its drops; shape (runs,).
      scale: what is left of the rate; shape (runs,).
    """

    steps: np.ndarray
    drops: np.ndarray
    scale: np.ndarray


def watched(step: Step) -> Step:
    """The same step, which also keeps the steps of the first drops."""

    def watch(k: int | jax.Array, carry: Any) -> Any:
        steps, runs = carry
        runs = step(k, runs)
        drops = optax.tree.get(runs[1], "num_drops")[:, None]
        is_new = (steps < 0) & (drops > jnp.arange(RECORDED))
        return jnp.where(is_new, k + 1, steps), runs

    return watch


def simulate(step: Step, params: jax.Array, state: Any, length: int) -> Runs:
    steps = jnp.full((params.shape[0], RECORDED), -1, jnp.int32)

    @jax.jit
    def run(length: jax.Array, carry: Any) -> Any:
        return jax.lax.fori_loop(0, length, watched(step), carry)

    steps, (_, state) = run(jnp.int32(length), (steps, (params, state)))
    drops, scale = (optax.tree.get(state, name) for name in ("num_drops", "scale"))
    return Runs(np.asarray(steps), np.asarray(drops), np.asarray(scale))


def run_quadratic(cell: Quadratic, method: Method, seeds: int) -> Runs:
    optimizer = optimizer_of(cell, method)
    params = first_params(cell, seeds)
    state = jax.vmap(optimizer.init)(params)
    return simulate(steps_of(cell, optimizer), params, state, cell.steps)


def recorded(transition: sasa_optax.Transition) -> sasa_optax.Sample:
    """The extra argument ``value``; its standard deviation, 1, is the scale."""
    assert transition.value is not None
    return sasa_optax.Sample(transition.value)


def run_series(cell: Series, method: Method, seeds: int) -> Runs:
    options: dict[str, Any] = method.series_options | {"statistic": recorded}
    optimizer = sasa_optax.scale_by_sasa_plus(1.0, **options)
    # The parameter is a scalar that does not move. What moves is the stream.
    still = jnp.zeros(())

    def one(value: jax.Array, mean: jax.Array, state: Any, noise: jax.Array) -> Any:
        value = cell.phi * value + (1 - cell.phi**2) ** 0.5 * noise
        _, state = optimizer.update(still, state, still, value=mean + value)
        return value, state

    def step(k: int | jax.Array, carry: Any) -> Any:
        values, state = carry
        mean = cell.mean * jnp.maximum(0, 1 - k / max(1, cell.trend))
        noise = noise_of_step(k, (seeds,))
        return jax.vmap(one, in_axes=(0, None, 0, 0))(values, mean, state, noise)

    values = jax.random.normal(jax.random.key(1), (seeds,))
    state = jax.vmap(lambda _: optimizer.init(still))(values)
    return simulate(step, values, state, cell.steps)
