"""Images: logistic regression, MLPs and a CNN on digits and Fashion-MNIST."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.evidence.task import (
    Batch,
    Data,
    Params,
    Rest,
    Task,
    cross_entropy,
    model_functions,
)
from examples import digits, fashion_mnist


def shuffled_rows(
    key: jax.Array, num_rows: int, batch_size: int, epochs: int
) -> jax.Array:
    """The rows of each mini-batch, shape (batches, batch_size), int32."""
    num_batches = num_rows // batch_size

    def epoch(key: jax.Array) -> jax.Array:
        order = jax.random.permutation(key, num_rows)
        return order[: num_batches * batch_size].reshape(num_batches, batch_size)

    keys = jax.random.split(key, epochs)
    return jax.vmap(epoch)(keys).reshape(epochs * num_batches, batch_size)


def classification(
    name: str,
    make: Callable[[nnx.Rngs], nnx.Module],
    splits: Any,
    *,
    batch_size: int,
    epochs: tuple[int, ...],
    epochs_per_record: int,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    **fields: Any,
) -> Task:
    """A task on images; ``splits`` has `train`, `validation` and `test`.

    ``augment`` maps the images of a mini-batch and a key to those that are trained on.
    """
    data = {
        name: tuple(jnp.asarray(x) for x in getattr(splits, name))
        for name in ("train", "validation", "test")
    }
    num_rows = len(data["train"][1])

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        rows_key, augment_key = jax.random.split(key)
        rows = shuffled_rows(rows_key, num_rows, batch_size, epochs_per_record)
        return rows, jax.random.split(augment_key, len(rows))

    def loss_fn(model: Any, batch: Batch, data: Data) -> jax.Array:
        rows, key = batch
        images, labels = (array[rows] for array in data["train"])
        images = images if augment is None else augment(images, key)
        return cross_entropy(model(images), labels)

    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        def error(images: jax.Array, labels: jax.Array) -> jax.Array:
            # One part after the other, each small enough to stay in the cache.
            logits = jax.lax.map(
                lambda image: predict(params, rest, image[None])[0],
                images,
                batch_size=200,
            )
            return 100 * jnp.mean(jnp.argmax(logits, axis=-1) != labels)

        return error(*data["validation"]), error(*data["test"])

    steps_per_epoch = num_rows // batch_size
    return Task(
        name=name,
        unit="% error",
        tolerance=0.3,
        has_absolute_tolerance=True,
        data=data,
        draw=draw,
        evaluate=evaluate,
        steps_per_epoch=steps_per_epoch,
        steps_per_record=epochs_per_record * steps_per_epoch,
        budgets=tuple(steps_per_epoch * each for each in epochs),
        **functions,
        **fields,
    )


class Logistic(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.logits(images)


class Mlp(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(784, 128, rngs=rngs)
        self.logits = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1) / 255.0
        return self.logits(nnx.relu(self.hidden(x)))


class Convolution(nnx.Module):
    """A convolution with padding "SAME", as slices and a matrix product.

    XLA's own is ten times slower inside a loop on a CPU.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs
    ) -> None:
        self.size, self.stride = size, stride
        features = size * size * inputs
        self.kernel = nnx.Linear(features, outputs, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        outputs = -(-images.shape[1] // self.stride)
        last = (outputs - 1) * self.stride + 1
        pad = max(0, last + self.size - 1 - images.shape[1])
        pads = (pad // 2, pad - pad // 2)
        images = jnp.pad(images, ((0, 0), pads, pads, (0, 0)))
        slices = [
            images[:, i : i + last : self.stride, j : j + last : self.stride]
            for i in range(self.size)
            for j in range(self.size)
        ]
        return self.kernel(jnp.concatenate(slices, axis=-1))


class Cnn(nnx.Module):
    """The network of the example: two convolutions with batch norm, dropout, logits."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = Convolution(1, 16, size=4, stride=4, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = Convolution(16, 32, size=3, stride=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.logits = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., None] / 255.0
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.logits(self.dropout(x.reshape(len(x), -1)))


def digits_logistic() -> Task:
    return classification(
        "digits-logistic",
        Logistic,
        digits.load(),
        batch_size=64,
        epochs=(200,),
        epochs_per_record=10,
        weight_decay=1e-3,
        decoupled_decay=0.1,
    )


def digits_mlp() -> Task:
    return classification(
        "digits-mlp",
        digits.Mlp,
        digits.load(),
        batch_size=64,
        epochs=(400,),
        epochs_per_record=20,
        augment=digits.shift,
        weight_decay=1e-3,
        decoupled_decay=0.1,
    )


def fashion_mlp() -> Task:
    return classification(
        "fashion-mlp",
        Mlp,
        fashion_mnist.load(fashion_mnist.find_data(None), 25600),
        batch_size=128,
        epochs=(10, 20, 40),
        epochs_per_record=2,
        weight_decay=5e-4,
        decoupled_decay=0.1,
    )


def fashion_cnn() -> Task:
    return classification(
        "fashion-cnn",
        Cnn,
        fashion_mnist.load(fashion_mnist.find_data(None), 20000),
        batch_size=100,
        epochs=(40,),
        epochs_per_record=2,
        weight_decay=5e-4,
        decoupled_decay=0.1,
        has_running_averages=True,
    )
