"""What does `adapt_on_progress` make of other optimizers and batch sizes?

    python -m benchmarks.evidence.stress --publish

An MLP with 64 hidden units learns scikit-learn's digits for 8000 steps, on one seed.
The table in docs/progress.md has the test accuracy of the averaged model at the end.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

import sasa_optax
from benchmarks import publishing
from benchmarks.publishing import DOCS
from examples import digits

BATCH_SIZES = (1, 8, 64, None)
NUM_STEPS, NUM_HIDDEN = 8000, 64
# A name, the optimizer and its momentum.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], float]] = {
    "AdamW": (lambda: optax.adamw(1e-3), 0.9),
    "Adam": (lambda: optax.adam(1e-3), 0.9),
    "Lion (0.97)": (lambda: optax.lion(1e-4), 0.97),
    "Muon (0.95)": (lambda: optax.contrib.muon(1e-3), 0.95),
    "SGD with momentum": (lambda: optax.sgd(1e-2, momentum=0.9), 0.9),
    "Prodigy": (optax.contrib.prodigy, 0.9),
    "Adafactor (0)": (lambda: optax.adafactor(1e-3), 0.0),
    "RMSprop (0)": (lambda: optax.rmsprop(1e-3), 0.0),
    "`schedule_free_adamw`": (lambda: optax.contrib.schedule_free_adamw(1e-3), 0.9),
}
Params = dict[str, jax.Array]


def init(key: jax.Array) -> Params:
    he = jax.nn.initializers.he_normal()
    first, second = jax.random.split(key)
    return {
        "hidden": he(first, (64, NUM_HIDDEN)),
        "hidden_bias": jnp.zeros(NUM_HIDDEN),
        "logits": he(second, (NUM_HIDDEN, 10)),
        "logits_bias": jnp.zeros(10),
    }


def predict(params: Params, images: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(images @ params["hidden"] + params["hidden_bias"])
    return hidden @ params["logits"] + params["logits_bias"]


def accuracy(optimizer: Any, batch_size: int | None, data: digits.Digits) -> float:
    """In percent, of the averaged model on the test data."""
    images, labels = map(jnp.asarray, data.train)

    def loss_fn(params: Params, rows: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            predict(params, images[rows]), labels[rows]
        ).mean()

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        rows = jnp.arange(len(images))
        if batch_size is not None:
            rows = jax.random.randint(key, (batch_size,), 0, len(images))
        loss, grads = jax.value_and_grad(loss_fn)(params, rows)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    params = init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), NUM_STEPS)
    start = params, optimizer.init(params)
    params, state = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])(start)
    averaged: Any = sasa_optax.averaged_params(state, params)
    test_images, test_labels = data.test
    found = jnp.argmax(predict(averaged, jnp.asarray(test_images)), axis=-1)
    return 100 * float(jnp.mean(found == test_labels))


def table() -> str:
    data, rows = digits.load(), []
    for name, (make, momentum) in track(OPTIMIZERS.items(), "running"):
        optimizer = optax.chain(make(), sasa_optax.adapt_on_progress(momentum))
        found = [accuracy(optimizer, size, data) for size in BATCH_SIZES]
        rows.append([name, *(f"{x:.1f}" for x in found)])
    heads = ["optimizer", *(size or "full" for size in BATCH_SIZES)]
    return publishing.markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    args = parser.parse_args()
    found = table()
    print(found)
    if args.publish:
        command = "python -m benchmarks.evidence.stress --publish"
        made = publishing.made_by(command, publishing.provenance())
        publishing.write(DOCS / "progress.md", {"stress": f"{found}\n\n{made}"})


if __name__ == "__main__":
    main()
