"""A diffusion model of Fashion-MNIST: a transformer on patches predicts the noise."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.evidence.task import Batch, Data, Params, Rest, Task, model_functions
from examples import fashion_mnist

SIZE, PATCH = 28, 4
SIDE = SIZE // PATCH
FREQUENCIES = 16


def patches(images: jax.Array) -> jax.Array:
    """Images (n, 28, 28) as uint8 to rows of patches in [-1, 1], (n, 49, 16)."""
    cut = images.reshape(-1, SIDE, PATCH, SIDE, PATCH).swapaxes(2, 3)
    return cut.reshape(-1, SIDE * SIDE, PATCH * PATCH) / 127.5 - 1


def noisy(clean: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
    """Between the image, at time 0, and the noise, at 1: the cosine schedule."""
    angles = times[:, None, None] * jnp.pi / 2
    return jnp.cos(angles) * clean + jnp.sin(angles) * noise


class Block(nnx.Module):
    """A transformer's, whose scales, shifts and gates depend on the time (adaLN)."""

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs) -> None:
        norm = functools.partial(
            nnx.LayerNorm, width, use_scale=False, use_bias=False, rngs=rngs
        )
        self.norm1, self.norm2 = norm(), norm()
        self.attention = nnx.MultiHeadAttention(
            num_heads, width, decode=False, rngs=rngs
        )
        self.wide = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)
        # A block is the identity at first.
        zeros = nnx.initializers.zeros
        self.modulation = nnx.Linear(width, 6 * width, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        parts = jnp.split(self.modulation(nnx.silu(time))[:, None], 6, axis=-1)
        scale1, shift1, gate1, scale2, shift2, gate2 = parts
        x += gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.narrow(nnx.gelu(self.wide(y)))


class Denoiser(nnx.Module):
    """The noise in patches, (n, 49, 16), of images at times (n,)."""

    def __init__(self, width: int, depth: int, num_heads: int, rngs: nnx.Rngs) -> None:
        pixels = PATCH * PATCH
        self.embedding = nnx.Linear(pixels, width, rngs=rngs)
        self.position = nnx.Embed(SIDE * SIDE, width, rngs=rngs)
        self.time = nnx.Linear(2 * FREQUENCIES, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, num_heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.noise = nnx.Linear(width, pixels, rngs=rngs)

    def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, times = inputs
        angles = times[:, None] * jnp.geomspace(1.0, 1000.0, FREQUENCIES)
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        time = self.time(waves)
        x = self.embedding(x) + self.position(jnp.arange(SIDE * SIDE))
        for block in self.blocks:
            x = block(x, time)
        return self.noise(self.norm(x))


def drawn(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Noise for patches of this shape, and times, one in each of n equal intervals."""
    noise_key, time_key = jax.random.split(key)
    times = (jnp.arange(shape[0]) + jax.random.uniform(time_key, shape[:1])) / shape[0]
    return jax.random.normal(noise_key, shape), times


def diffusion(
    folder: pathlib.Path | None = None,
    *,
    width: int = 48,
    depth: int = 3,
    num_heads: int = 4,
    batch_size: int = 64,
    steps_per_record: int = 125,
    budget: int = 2000,
) -> Task:
    """All training images but the 5000 of validation. ``folder`` has the files.

    The metric is of fixed noise at fixed times, so that it depends on the model alone.
    """
    images = fashion_mnist.load(fashion_mnist.find_data(folder), 55000)
    data: dict[str, Any] = {"train": images.train[0]}
    for seed, (name, count) in enumerate([("validation", 512), ("test", 1024)]):
        clean = patches(getattr(images, name)[0][:count])
        data[name] = clean, *drawn(jax.random.key(seed), clean.shape)

    def draw(key: jax.Array, data: Data) -> Batch:
        rows_key, noise_key = jax.random.split(key)
        shape = (steps_per_record, batch_size)
        rows = jax.random.randint(rows_key, shape, 0, len(data["train"]))
        return rows, jax.random.split(noise_key, steps_per_record)

    def squared_error(
        model: Any, clean: jax.Array, noise: jax.Array, times: jax.Array
    ) -> jax.Array:
        predicted = model((noisy(clean, noise, times), times))
        return jnp.mean((predicted - noise) ** 2)

    def loss_fn(model: Any, batch: Batch, data: Data) -> jax.Array:
        rows, key = batch
        clean = patches(data["train"][rows])
        return squared_error(model, clean, *drawn(key, clean.shape))

    make = functools.partial(Denoiser, width, depth, num_heads)
    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        model = functools.partial(predict, params, rest)
        return (
            squared_error(model, *data["validation"]),
            squared_error(model, *data["test"]),
        )

    return Task(
        name="diffusion",
        unit="mean squared error",
        tolerance=0.01,
        data=data,
        draw=draw,
        evaluate=evaluate,
        steps_per_epoch=steps_per_record,
        steps_per_record=steps_per_record,
        budgets=(budget,),
        decoupled_decay=0.01,
        **functions,
    )
