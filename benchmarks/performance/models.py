"""Whole training steps: two small models, and any of the reader's own."""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.performance import cases
from benchmarks.performance.timing import Steps, beside
from benchmarks.publishing import Row


class Cnn(nnx.Module):
    """A small residual network for 32 by 32 images, a million parameters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        widths = (3, 32, 64, 128)
        pairs = list(itertools.pairwise(widths))
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.downs = nnx.List([conv(a, b, strides=2) for a, b in pairs])
        self.convs = nnx.List([conv(b, b) for _, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(b, rngs=rngs) for _, b in pairs])
        self.hidden = nnx.Linear(2048, 384, rngs=rngs)
        self.logits = nnx.Linear(384, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for down, conv, norm in zip(self.downs, self.convs, self.norms, strict=True):
            x = nnx.relu(norm(down(x)))
            x += nnx.relu(conv(x))
        x = x.reshape(len(x), -1)
        return self.logits(nnx.relu(self.hidden(x)))


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Four blocks of width 128, bytes in and out; 0.9 million parameters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(256, 128, rngs=rngs)
        self.blocks = nnx.List([Block(128, rngs) for _ in range(4)])
        self.logits = nnx.Linear(128, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)


def cnn_batch() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (64, 32, 32, 3))
    return images, jax.random.randint(keys[1], (64,), 0, 10)


def transformer_batch() -> tuple[jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(0), (16, 65), 0, 256)
    return tokens[:, :-1], tokens[:, 1:]


MODELS = {
    "CNN": (Cnn, cnn_batch),
    "transformer": (Transformer, transformer_batch),
}


def training_steps(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    batch: tuple[jax.Array, jax.Array],
    optimizer: optax.GradientTransformation,
    prepare: Callable[[Any], Any] = lambda state: state,
) -> Steps:
    """The forward pass, the backward pass and the update."""
    graphdef, params, rest = nnx.split(make_model(nnx.Rngs(0)), nnx.Param, ...)
    transformation = optax.with_extra_args_support(optimizer)

    def loss(params: Any, rest: Any, inputs: Any, targets: Any, is_training: bool):
        model: Any = nnx.merge(graphdef, params, rest, copy=True)
        (model.train if is_training else model.eval)()
        losses = optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets)
        return jnp.mean(losses), nnx.state(model, nnx.Not(nnx.Param))

    def step(carry: Any, inputs: Any, targets: Any) -> Any:
        params, rest, state = carry
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, new_rest), grads = value_and_grad(params, rest, inputs, targets, True)
        # With dropout, this value is not the loss that a line search evaluates.
        searches = optax.tree.get(state, "line_search_active") is not None
        updates, state = transformation.update(
            grads,
            state,
            params,
            grad=grads,
            value=None if searches else value,
            value_fn=lambda params: loss(params, rest, inputs, targets, False)[0],
        )
        return optax.apply_updates(params, updates), new_rest, state

    return Steps(step, (params, rest, prepare(transformation.init(params))), *batch)


def megabytes_more(base: Steps, steps: Steps) -> float:
    return (steps.temporary_bytes() - base.temporary_bytes()) / 1e6


def bench_models(rounds: int) -> Iterator[Row]:
    """The time and the temporaries of the training steps of `MODELS`."""
    for name, (make_model, make_batch) in MODELS.items():
        batch = make_batch()
        for case in cases.MODEL_CASES:
            base = training_steps(make_model, batch, cases.BASELINES[case.baseline]())
            steps = training_steps(make_model, batch, case.make(), case.prepare)
            # Each round has as many searches.
            timed = beside(base.seconds, steps.seconds, rounds, cases.SEARCH_INTERVAL)
            yield {
                "section": "model",
                "tree": name,
                "case": case.name,
                "baseline": case.baseline,
                **timed,
                "temporary_mb": megabytes_more(base, steps),
            }


def bench_own(where: str, rounds: int) -> Iterator[Row]:
    """The same for the step that the function ``where``, "module:name", makes."""
    module, _, function = where.partition(":")
    make_step = getattr(importlib.import_module(module), function)
    base, steps = (Steps(*make_step(wrap)) for wrap in (lambda o: o, cases.reduced))
    yield {
        "section": "model",
        "tree": where,
        "case": "reduce_on_stationarity",
        "baseline": "yours",
        **beside(base.seconds, steps.seconds, rounds),
        "temporary_mb": megabytes_more(base, steps),
    }
