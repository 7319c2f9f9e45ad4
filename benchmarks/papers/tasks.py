"""The tasks of the papers' experiments, as pure functions for one compiled epoch."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.evidence.images import shuffled_rows
from benchmarks.evidence.task import (
    Batch,
    Data,
    Params,
    Rest,
    Task,
    cross_entropy,
    model_functions,
)
from benchmarks.papers import data as sources
from benchmarks.papers.models import Lstm, ResNet18
from benchmarks.papers.protocols import Protocol, Scale

# The texts side by side in an evaluation, as in the authors' code.
_EVALUATION_BATCH = 10
# ImageNet's usual crops: 224 of 256 pixels in the test; 8 to 100 % in training.
_CROP, _LEAST_AREA, _MOST_OBLONG = 224 / 256, 0.08, 4 / 3


def crop_and_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Crops at random within a black margin of an eighth, and flips half of them."""
    size = images.shape[1]
    margin = size // 8
    padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        corner_key, flip_key = jax.random.split(key)
        row, column = jax.random.randint(corner_key, (2,), 0, 2 * margin + 1)
        shape = (size, size, image.shape[-1])
        image = jax.lax.dynamic_slice(image, (row, column, 0), shape)
        return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)

    return jax.vmap(one)(padded, jax.random.split(key, len(images)))


def resized_crop_and_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Parts of 8 to 100 % of the area, of sides 3:4 to 4:3, resized; half are flipped.

    Returns float images that are 7/8 as large, as the central crop of the test is.
    """
    old = images.shape[1]
    size = round(_CROP * old)

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        area_key, ratio_key, corner_key, flip_key = jax.random.split(key, 4)
        area = jax.random.uniform(area_key, minval=_LEAST_AREA, maxval=1.0)
        limit = jnp.log(_MOST_OBLONG)
        ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-limit, maxval=limit))
        sides = jnp.minimum(jnp.sqrt(area * jnp.stack([ratio, 1 / ratio])), 1.0)
        corner = (1 - sides) * jax.random.uniform(corner_key, (2,))
        scale = size / (old * sides)
        image = jax.image.scale_and_translate(
            image.astype(jnp.float32),
            (size, size, image.shape[-1]),
            (0, 1),
            scale,
            -corner * old * scale,
            method="linear",
        )
        return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)

    return jax.vmap(one)(images, jax.random.split(key, len(images)))


def central_crop(images: jax.Array) -> jax.Array:
    old = images.shape[1]
    size = round(_CROP * old)
    start = (old - size) // 2
    return images[:, start : start + size, start : start + size]


def image_task(protocol: Protocol, scale: Scale, images: sources.Images) -> Task:
    """Classification. As in the papers, there is no validation data beside the test."""
    is_small = protocol.model == "resnet18-small"
    # Five thousand images are enough for the mean and the deviation of a channel.
    some = images.train[0][:: max(1, len(images.train[1]) // 5000)] / 255.0
    mean, deviation = some.mean(axis=(0, 1, 2)), some.std(axis=(0, 1, 2))
    num_rows = len(images.train[1])
    channels = images.train[0].shape[-1]

    def normalised(images: jax.Array) -> jax.Array:
        return (images / 255.0 - jnp.float32(mean)) / jnp.float32(deviation)

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        rows_key, augment_key = jax.random.split(key)
        rows = shuffled_rows(rows_key, num_rows, protocol.batch_size, epochs=1)
        return rows, jax.random.split(augment_key, len(rows))

    def loss_fn(model: Any, batch: Batch, data: Data) -> jax.Array:
        rows, key = batch
        images, labels = (array[rows] for array in data["train"])
        augment = crop_and_flip if is_small else resized_crop_and_flip
        return cross_entropy(model(normalised(augment(images, key))), labels)

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return ResNet18(channels, images.num_classes, scale.width, is_small, rngs)

    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        def logits(image: jax.Array) -> jax.Array:
            image = image[None] if is_small else central_crop(image[None])
            return predict(params, rest, normalised(image))[0]

        images, labels = data["test"]
        # One part after the other, so that the activations fit in memory.
        guesses = jnp.argmax(jax.lax.map(logits, images, batch_size=200), axis=-1)
        error = 100 * jnp.mean(guesses != labels)
        return error, error

    steps = num_rows // protocol.batch_size
    return Task(
        name=protocol.name,
        unit=protocol.unit,
        tolerance=0.3,
        data={"train": device(images.train), "test": device(images.test)},
        draw=draw,
        evaluate=evaluate,
        steps_per_epoch=steps,
        steps_per_record=steps,
        budgets=(scale.epochs * steps,),
        weight_decay=protocol.weight_decay,
        decoupled_decay=protocol.decoupled_decay,
        has_running_averages=True,
        **functions,
    )


def device(arrays: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.asarray, arrays))


def columns(tokens: np.ndarray, batch_size: int) -> jax.Array:
    """The text cut into texts to be read side by side, shape (batch_size, time)."""
    time = len(tokens) // batch_size
    return jnp.asarray(tokens[: time * batch_size].reshape(batch_size, time))


def text_task(
    protocol: Protocol, scale: Scale, text: sources.Text, is_shuffled: bool
) -> Task:
    """Language modelling by windows of ``bptt`` tokens.

    A window hands its final state on to the next. If ``is_shuffled``, the windows are
    drawn with replacement instead, and each starts from a state of zeros.
    """
    bptt, batch_size = protocol.bptt, protocol.batch_size
    data = {
        "train": columns(text.train, batch_size),
        "validation": columns(text.validation, _EVALUATION_BATCH),
        "test": columns(text.test, _EVALUATION_BATCH),
    }
    steps = (data["train"].shape[1] - 1) // bptt

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        if is_shuffled:
            return jax.random.randint(key, (steps,), 0, steps)
        return jnp.arange(steps)

    def window(tokens: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = jax.lax.dynamic_slice_in_dim(tokens, index * bptt, bptt + 1, axis=1)
        return part[:, :-1], part[:, 1:]

    def loss_fn(model: Lstm, index: jax.Array, data: Data) -> jax.Array:
        inputs, targets = window(data["train"], index)
        goes_on = jnp.logical_and(index > 0, not is_shuffled)
        before = model.state.get_value()
        state = jax.tree.map(lambda x: jnp.where(goes_on, x, 0), before)
        logits, state = model(inputs, state)
        if model.is_training:
            model.state.set_value(state)
        return cross_entropy(logits, targets)

    def make(rngs: nnx.Rngs) -> Lstm:
        return Lstm(text.num_words, scale.width, 2, scale.dropout, batch_size, rngs)

    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        def loss(tokens: jax.Array) -> jax.Array:
            def step(state: Any, index: jax.Array) -> tuple[Any, jax.Array]:
                inputs, targets = window(tokens, index)
                logits, state = predict(params, rest, inputs, state)
                return state, cross_entropy(logits, targets)

            count = (tokens.shape[1] - 1) // bptt
            zeros = make(nnx.Rngs(0)).zeros(_EVALUATION_BATCH)
            return jax.lax.scan(step, zeros, jnp.arange(count))[1].mean()

        return loss(data["validation"]), loss(data["test"])

    return Task(
        name=protocol.name,
        unit="nats",
        tolerance=0.01,
        data=data,
        draw=draw,
        evaluate=evaluate,
        steps_per_epoch=steps,
        steps_per_record=steps,
        budgets=(scale.epochs * steps,),
        **functions,
    )


_FROM_FOLDER = {
    "cifar10": sources.cifar10,
    "imagenet": sources.imagenet,
    "wikitext2": sources.wikitext2,
}
_STAND_INS = {
    "fashion-mnist": sources.small_fashion_mnist,
    "linux-doc": sources.linux_doc,
}


@functools.cache
def data_of(protocol: Protocol, scale: Scale, folder: pathlib.Path | None) -> Any:
    if folder is None:
        return _STAND_INS[protocol.stand_in](scale)
    if not folder.is_dir():
        raise SystemExit(f"--data must be a folder, got {str(folder)!r}.")
    return _FROM_FOLDER[protocol.name](folder)


def task_of(protocol: Protocol, scale: Scale, data: Any, is_shuffled: bool) -> Task:
    if protocol.model == "lstm":
        return text_task(protocol, scale, data, is_shuffled)
    return image_task(protocol, scale, data)
