"""Whole training steps: two small models, and any of the reader's own."""

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.evidence.texts import Block
from benchmarks.performance import cases
from benchmarks.performance.timing import Steps, beside
from benchmarks.publishing import Row

DTypeLike = jax.typing.DTypeLike
Batch = tuple[jax.Array, jax.Array]


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


class Transformer(nnx.Module):
    """Four blocks, bytes in and out; 0.9 million parameters at a width of 128.

    ``dtype`` is that of the activations. The parameters are float32.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        width: int = 128,
        num_heads: int = 4,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.embed = nnx.Embed(256, width, dtype=dtype, rngs=rngs)
        blocks = [Block(width, num_heads, dtype, rngs) for _ in range(4)]
        self.blocks = nnx.List(blocks)
        self.logits = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)


def cnn_batch() -> Batch:
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (64, 32, 32, 3))
    return images, jax.random.randint(keys[1], (64,), 0, 10)


def transformer_batch(texts: int = 16, length: int = 64) -> Batch:
    tokens = jax.random.randint(jax.random.key(0), (texts, length + 1), 0, 256)
    return tokens[:, :-1], tokens[:, 1:]


class Case(NamedTuple):
    """A model, its mini-batch, and the optimizers that are timed in its step."""

    make_model: Callable[[nnx.Rngs], nnx.Module]
    make_batch: Callable[[], Batch]
    optimizers: Sequence[cases.Case] = cases.MODEL_CASES


MODELS = {
    "CNN": Case(Cnn, cnn_batch),
    "transformer": Case(Transformer, transformer_batch),
}
# A step of it takes a minute on a CPU.
LARGE_MODELS = {
    "transformer, 114 million, bfloat16": Case(
        functools.partial(Transformer, width=1536, num_heads=12, dtype=jnp.bfloat16),
        functools.partial(transformer_batch, 8, 512),
        cases.LARGE_MODEL_CASES,
    )
}


def training_steps(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    batch: Batch,
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
    on_cpu = jax.default_backend() == "cpu"
    for name, model in (MODELS if on_cpu else MODELS | LARGE_MODELS).items():
        of_model = functools.partial(
            training_steps, model.make_model, model.make_batch()
        )
        bases = functools.cache(lambda name, of=of_model: of(cases.BASELINES[name]()))
        for case in model.optimizers:
            base, steps = bases(case.baseline), of_model(case.make(), case.prepare)
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
