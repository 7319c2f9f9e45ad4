"""A residual network with batch norm and augmentation on all of Fashion-MNIST."""

import functools
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.evidence.images import Convolution, classification
from benchmarks.evidence.task import Task
from examples import fashion_mnist

PAD = 2


def crop_and_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image by up to two pixels in each direction, and mirrors a half."""
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * PAD + 1)
    shape = images.shape[1:]
    crop = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, at, shape))
    cropped = crop(padded, corners)
    is_flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1))
    return jnp.where(is_flipped, cropped[..., ::-1], cropped)


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, rngs=rngs)


class Block(nnx.Module):
    """A pre-activation block that halves the image and doubles the features."""

    def __init__(self, inputs: int, rngs: nnx.Rngs) -> None:
        outputs = 2 * inputs
        self.norm1 = batch_norm(inputs, rngs)
        self.conv1 = Convolution(inputs, outputs, size=3, stride=2, rngs=rngs)
        self.norm2 = batch_norm(outputs, rngs)
        self.conv2 = Convolution(outputs, outputs, size=3, stride=1, rngs=rngs)
        self.shortcut = Convolution(inputs, outputs, size=1, stride=2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        active = nnx.relu(self.norm1(x))
        x = self.conv2(nnx.relu(self.norm2(self.conv1(active))))
        return x + self.shortcut(active)


class ResNet(nnx.Module):
    """A convolution to 14x14, and blocks to 7x7, 4x4 and 2x2.

    A block at 14x14 would cost more than all these together.
    """

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.stem = Convolution(1, width, size=4, stride=2, rngs=rngs)
        widths = [width, 2 * width, 4 * width]
        self.blocks = nnx.List([Block(inputs, rngs) for inputs in widths])
        self.norm = batch_norm(8 * width, rngs)
        self.logits = nnx.Linear(8 * width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.stem(images[..., None] / 255.0)
        for block in self.blocks:
            x = block(x)
        return self.logits(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


def resnet(
    folder: pathlib.Path | None = None,
    *,
    name: str = "resnet",
    width: int = 8,
    epochs: int = 16,
) -> Task:
    """All training images but the 5000 of validation. ``folder`` has the files."""
    return classification(
        name,
        functools.partial(ResNet, width),
        fashion_mnist.load(fashion_mnist.find_data(folder), 55000),
        batch_size=125,
        epochs=(epochs,),
        epochs_per_record=1,
        augment=crop_and_flip,
        weight_decay=5e-4,
        decoupled_decay=0.1,
        has_running_averages=True,
    )


def resnet_full() -> Task:
    """The same with four times as many features, 1.2 million parameters."""
    return resnet(name="resnet-full", width=32)
