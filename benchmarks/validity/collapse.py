"""Does the rate collapse? SASA+ on noisy quadratics, with and without the guard.

SGD with momentum on a quadratic of 20 dimensions, eigenvalues 0.01 to 1, Gaussian noise
in the gradients. Each cut makes the dynamics 1/factor times slower, but the window that
a test asks for stays the same unless `scale_min_samples=True`.

    python benchmarks/collapse.py --seeds 5
"""

import argparse
import functools
import itertools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import sasa_optax

EIGENVALUES = jnp.geomspace(0.01, 1.0, 20)


@functools.partial(
    jax.jit, static_argnames=("num_steps", "scaled", "samples", "factor")
)
def train(
    key: jax.Array, num_steps: int, scaled: bool, samples: int, factor: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss averaged over the last tenth, the last rate, and the number of drops."""
    optimizer = sasa_optax.sasa_plus(
        5.0, min_samples=samples, factor=factor, scale_min_samples=scaled
    )
    start = jnp.ones(20)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = EIGENVALUES * params + jax.random.normal(key, (20,))
        updates, state = optimizer.update(grads, state, params)
        loss = jnp.sum(EIGENVALUES * params**2) / 2
        return (optax.apply_updates(params, updates), state), loss

    keys = jax.random.split(key, num_steps)
    (_, state), losses = jax.lax.scan(step, (start, optimizer.init(start)), keys)
    last = jnp.mean(losses[-num_steps // 10 :])
    rate, num_drops = (
        optax.tree.get(state, name) for name in ("learning_rate", "num_drops")
    )
    return last, rate, num_drops


def row(num_steps: int, factor: float, samples: int, scaled: bool, seeds: int) -> list:
    keys = [jax.random.key(seed) for seed in range(seeds)]
    runs = [train(key, num_steps, scaled, samples, factor) for key in keys]
    losses, rates, drops = (
        statistics.median(map(float, column)) for column in zip(*runs, strict=True)
    )
    settings = [f"{num_steps}", f"{factor}", f"{samples}", "yes" if scaled else "no"]
    return [*settings, f"{losses:.3g}", f"{rates:.1e}", f"{drops:g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[30_000, 300_000])
    args = parser.parse_args()
    table = Table("steps", "factor", "min_samples", "guard", "loss", "rate", "drops")
    table.title = "Medians over the seeds"
    for settings in itertools.product(
        args.steps, (0.1, 0.5), (100, 1000), (False, True)
    ):
        table.add_row(*row(*settings, args.seeds))
    Console().print(table)


if __name__ == "__main__":
    main()
