"""Does the rate collapse? SASA+ on noisy quadratics, with and without the guard.

SGD with momentum on a quadratic of 20 dimensions, eigenvalues 0.01 to 1, Gaussian noise
in the gradients. Each cut makes the dynamics 1/factor times slower, but a test asks for
as many samples as before, unless ``Window(scale_min_samples=True)``.

    python -m benchmarks.validity.collapse --publish       # into docs/collapse.md
    python -m benchmarks.validity.collapse --seeds 1 --steps 30000
"""

import argparse
import functools
import itertools
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sasa_optax
from benchmarks import publishing

EIGENVALUES = jnp.geomspace(0.01, 1.0, 20)
STEPS, FACTORS, SAMPLES = (30_000, 300_000), (0.1, 0.5), (100, 1000)
RESULTS = "loss", "rate", "drops"
PART = "table"


@functools.partial(
    jax.jit, static_argnames=("num_steps", "scaled", "samples", "factor")
)
def train(
    key: jax.Array, num_steps: int, factor: float, samples: int, scaled: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss averaged over the last tenth, the last rate, and the number of drops."""
    window = sasa_optax.Window(min_samples=samples, scale_min_samples=scaled)
    optimizer = sasa_optax.sasa_plus(5.0, factor=factor, window=window)
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


def medians(seeds: int, *settings: Any) -> list[str]:
    """The results of a setting, as the table has them."""
    runs = [train(jax.random.key(seed), *settings) for seed in range(seeds)]
    columns = zip(*runs, strict=True)
    loss, rate, drops = (statistics.median(map(float, column)) for column in columns)
    return [f"{loss:.3g}", f"{rate:.2g}", f"{drops:g}"]


def table(seeds: int, all_steps: list[int]) -> str:
    """Each line has the results without the guard, then those with it."""
    guarded = [f"with the guard: {name}" for name in RESULTS]
    heads = ["steps", "factor", "min_samples", *RESULTS, *guarded]
    lines = [
        [
            *(f"{steps:,}", factor, samples),
            *medians(seeds, steps, factor, samples, False),
            *medians(seeds, steps, factor, samples, True),
        ]
        for steps, factor, samples in itertools.product(all_steps, FACTORS, SAMPLES)
    ]
    return publishing.markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    page = publishing.DOCS / "collapse.md"
    parser.add_argument("--page", type=pathlib.Path, default=page)
    args = parser.parse_args()
    content = table(args.seeds, args.steps)
    print(content)
    if args.publish:
        command = "python -m benchmarks.validity.collapse --publish"
        made = publishing.made_by(command, publishing.provenance())
        publishing.write(args.page, {PART: f"{content}\n\n{made}"})


if __name__ == "__main__":
    main()
