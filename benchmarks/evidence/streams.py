"""Streams of random mini-batches whose expected loss is known."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evidence.task import Batch, Data, Params, Rest, Task
from examples import elbo


def plain(
    name: str,
    init: Callable[[int], Params],
    loss: Callable[[Params, Batch, Data], jax.Array],
    expected: Callable[[Params, Data], jax.Array],
    data: Data,
    *,
    num_steps: int,
    unit: str,
) -> Task:
    """A task whose loss depends on parameters, data and a key."""
    steps_per_record = num_steps // 20

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        return jax.random.split(key, steps_per_record)

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        del rest
        value = expected(params, data)
        return value, value

    return Task(
        name=name,
        unit=unit,
        tolerance=0.01,
        data=data,
        init=lambda seed: (init(seed), ()),
        draw=draw,
        loss=lambda params, rest, key, data: (loss(params, key, data), rest),
        value=lambda params, rest, key, data: loss(params, key, data),
        evaluate=evaluate,
        steps_per_epoch=None,
        steps_per_record=steps_per_record,
        budgets=(num_steps,),
    )


def negative_elbo() -> Task:
    """The fit of the example, evaluated by the exact negative ELBO per row."""
    problem = elbo.draw_problem(0)
    residual = problem.targets - problem.features @ problem.mean
    log_det = float(np.linalg.slogdet(problem.precision)[1])
    # log N(targets; 0, noise^2 I + features features^T), from the posterior.
    log_evidence = -0.5 * float(
        np.sum(residual**2) / elbo.NOISE**2
        + np.sum(problem.mean**2)
        + log_det
        + elbo.NUM_ROWS * np.log(2 * np.pi * elbo.NOISE**2)
    )

    def expected(params: Params, problem: Data) -> jax.Array:
        error = params["mean"] - problem.mean
        variance = jnp.exp(2 * params["log_std"])
        divergence = (
            jnp.sum(jnp.diag(problem.precision) * variance)
            + error @ problem.precision @ error
            - elbo.NUM_FEATURES
            - log_det
            - 2 * jnp.sum(params["log_std"])
        ) / 2
        return (divergence - log_evidence) / elbo.NUM_ROWS

    return plain(
        "negative-elbo",
        lambda seed: elbo.init_params(),
        lambda params, key, problem: elbo.loss_fn(params, problem, key),
        expected,
        problem,
        num_steps=20_000,
        unit="nats a row",
    )


def least_squares() -> Task:
    """Noisy linear regression on a stream of rows, condition number 100."""
    dimension, batch_size, noise = 50, 16, 0.5
    scales = np.geomspace(0.1, 1.0, dimension).astype(np.float32)
    weights = np.random.default_rng(0).normal(size=dimension).astype(np.float32)
    data = {"scales": jnp.asarray(scales), "weights": jnp.asarray(weights / scales)}

    def loss(params: Params, key: jax.Array, data: Data) -> jax.Array:
        row_key, noise_key = jax.random.split(key)
        rows = data["scales"] * jax.random.normal(row_key, (batch_size, dimension))
        targets = rows @ data["weights"]
        targets += noise * jax.random.normal(noise_key, (batch_size,))
        return jnp.mean((rows @ params - targets) ** 2) / 2

    def expected(params: Params, data: Data) -> jax.Array:
        excess = jnp.sum((data["scales"] * (params - data["weights"])) ** 2)
        return (excess + noise**2) / 2

    return plain(
        "least-squares",
        lambda seed: jnp.zeros(dimension),
        loss,
        expected,
        data,
        num_steps=20_000,
        unit="loss",
    )


def factorization() -> Task:
    """A matrix of rank 5 plus noise, fitted with rank 5 from random entries.

    The smallest expected loss is known from the singular values that are left out.
    """
    rows, columns, rank, batch_size, noise = 100, 80, 5, 256, 0.1
    random = np.random.default_rng(0)
    left, right = (random.normal(size=(n, rank)) for n in (rows, columns))
    matrix = left @ right.T / rank**0.5 + noise * random.normal(size=(rows, columns))

    def init(seed: int) -> Params:
        left_key, right_key = jax.random.split(jax.random.key(seed))
        return {
            "left": 0.1 * jax.random.normal(left_key, (rows, rank)),
            "right": 0.1 * jax.random.normal(right_key, (columns, rank)),
        }

    def loss(params: Params, key: jax.Array, matrix: Data) -> jax.Array:
        at = jax.random.randint(key, (batch_size,), 0, rows * columns)
        i, j = at // columns, at % columns
        fitted = jnp.sum(params["left"][i] * params["right"][j], axis=1)
        # Without the factor, the curvature would be small: a mini-batch has few entries
        # of each row.
        return 20 * jnp.mean((fitted - matrix[i, j]) ** 2)

    def expected(params: Params, matrix: Data) -> jax.Array:
        return 20 * jnp.mean((params["left"] @ params["right"].T - matrix) ** 2)

    return plain(
        "factorization",
        init,
        loss,
        expected,
        jnp.asarray(matrix, jnp.float32),
        num_steps=20_000,
        unit="loss",
    )
