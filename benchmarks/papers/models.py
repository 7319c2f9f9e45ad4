"""The networks of the papers, of any width: ResNet-18 in two forms, and an LSTM."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.evidence.images import Convolution

_STRIDES = (1, 2, 2, 2)
# The authors have PyTorch's default of 0.1, which is the weight of the new value.
_BATCH_NORM_MOMENTUM = 0.9

LstmState = tuple[tuple[jax.Array, jax.Array], ...]


class Recurrent(nnx.Variable):
    """The state that a window of the text hands on to the next."""


def convolution(
    inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs
) -> Callable[[jax.Array], jax.Array]:
    """A convolution without bias, in the form that is fast on the default device."""
    if jax.default_backend() == "cpu":
        return Convolution(inputs, outputs, size, stride, rngs)
    return nnx.Conv(
        inputs, outputs, (size, size), strides=stride, use_bias=False, rngs=rngs
    )


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=_BATCH_NORM_MOMENTUM, rngs=rngs)


class Block(nnx.Module):
    """Two convolutions, and a shortcut that is the identity where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv1 = convolution(inputs, outputs, 3, stride, rngs)
        self.norm1 = batch_norm(outputs, rngs)
        self.conv2 = convolution(outputs, outputs, 3, 1, rngs)
        self.norm2 = batch_norm(outputs, rngs)
        self.shortcut = nnx.data(None)
        if stride > 1 or inputs != outputs:
            projection = convolution(inputs, outputs, 1, stride, rngs)
            self.shortcut = nnx.Sequential(projection, batch_norm(outputs, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(x)) + shortcut)


class ResNet18(nnx.Module):
    """ResNet-18, whose four stages have 1, 2, 4 and 8 times ``width`` channels.

    Attributes:
      is_small: the form for small images has a first convolution of size 3 and stride
        1, and no pooling after it. The form for ImageNet has size 7 and stride 2, and
        a max pool of stride 2.
    """

    def __init__(
        self, channels: int, classes: int, width: int, is_small: bool, rngs: nnx.Rngs
    ) -> None:
        self.is_small = is_small
        size, stride = (3, 1) if is_small else (7, 2)
        self.stem = convolution(channels, width, size, stride, rngs)
        self.norm = batch_norm(width, rngs)
        blocks, inputs = [], width
        for stage, stride in enumerate(_STRIDES):
            outputs = width * 2**stage
            blocks += [
                Block(inputs, outputs, stride, rngs),
                Block(outputs, outputs, 1, rngs),
            ]
            inputs = outputs
        self.blocks = nnx.List(blocks)
        self.logits = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (n, height, width, channels) to logits (n, classes)."""
        x = nnx.relu(self.norm(self.stem(images)))
        if not self.is_small:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.logits(jnp.mean(x, axis=(1, 2)))


class Lstm(nnx.Module):
    """The word-level language model of PyTorch's examples, with tied embeddings.

    Attributes:
      state: where the window before has ended, for a batch of ``batch_size`` texts.
    """

    def __init__(
        self,
        words: int,
        width: int,
        layers: int,
        dropout: float,
        batch_size: int,
        rngs: nnx.Rngs,
    ) -> None:
        def uniform(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -0.1, 0.1)

        self.embedding = nnx.Embed(words, width, embedding_init=uniform, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(words))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        cells = [nnx.OptimizedLSTMCell(width, width, rngs=rngs) for _ in range(layers)]
        self.layers = nnx.List([nnx.RNN(cell, rngs=rngs) for cell in cells])
        self.state = Recurrent(self.zeros(batch_size))

    @property
    def is_training(self) -> bool:
        return not self.dropout.deterministic

    def zeros(self, batch_size: int) -> LstmState:
        shape = (batch_size, self.embedding.features)
        return tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in self.layers)

    def __call__(
        self, tokens: jax.Array, state: LstmState
    ) -> tuple[jax.Array, LstmState]:
        """Maps tokens (n, time) to logits (n, time, words), and to the next state."""
        x, after = self.dropout(self.embedding(tokens)), []
        for layer, carry in zip(self.layers, state, strict=True):
            carry, x = layer(x, initial_carry=carry, return_carry=True)
            x = self.dropout(x)
            after.append(carry)
        return self.embedding.attend(x) + self.bias[...], tuple(after)
