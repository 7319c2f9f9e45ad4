"""Text: transformers on the sources of Python's standard library."""

import functools
import pathlib
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from examples import char_lm

Dtype = jax.typing.DTypeLike


class Transformer(nnx.Module):
    """Pre-norm blocks over the characters of a short context.

    ``dtype`` is that of the activations. The parameters are float32.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        heads: int,
        depth: int,
        context: int,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        made: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.embedding = nnx.Embed(vocabulary, width, **made)
        self.position = nnx.Embed(context, width, **made)
        blocks = [Block(width, heads, dtype, rngs) for _ in range(depth)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(width, **made)
        self.logits = nnx.Linear(width, vocabulary, **made)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.logits(self.norm(x))


class Block(nnx.Module):
    def __init__(
        self, width: int, num_heads: int, dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        made: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm1 = nnx.LayerNorm(width, **made)
        self.attention = nnx.MultiHeadAttention(num_heads, width, decode=False, **made)
        self.norm2 = nnx.LayerNorm(width, **made)
        self.wide = nnx.Linear(width, 4 * width, **made)
        self.narrow = nnx.Linear(4 * width, width, **made)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x += self.attention(self.norm1(x), mask=mask)
        return x + self.narrow(nnx.gelu(self.wide(self.norm2(x))))


def language_model(
    name: str,
    texts: dict[str, np.ndarray],
    *,
    vocabulary: int,
    width: int,
    heads: int,
    context: int,
    batch_size: int,
    steps_per_record: int,
    num_test: int,
    budgets: tuple[int, ...],
    depth: int = 2,
    held_out_stride: int | None = None,
    dtype: Dtype = jnp.float32,
) -> Task:
    """A transformer on windows of a text, drawn at random.

    Held-out windows start every ``held_out_stride`` tokens, by default one after the
    other.
    """
    # There are no epochs here. But a method of this library that is told nothing does
    # nothing in so short a run, so it is told the steps between two evaluations.
    held_out = texts["held_out"]
    starts = np.arange(0, len(held_out) - context - 1, held_out_stride or context)
    windows = held_out[starts[:, None] + np.arange(context + 1)]
    others = np.delete(windows, slice(None, None, 4), axis=0)
    data = {
        "train": jnp.asarray(texts["train"]),
        # Every fourth window chooses the rates, the others are reported.
        "validation": jnp.asarray(windows[::4][: num_test // 4]),
        "test": jnp.asarray(others[:num_test]),
    }

    def draw(key: jax.Array, data: Data) -> Batch:
        shape = (steps_per_record, batch_size)
        return jax.random.randint(key, shape, 0, len(data["train"]) - context)

    def windows_loss(model: Any, tokens: jax.Array) -> jax.Array:
        tokens = tokens.astype(jnp.int32)
        logits = model(tokens[:, :-1]).astype(jnp.float32)
        return cross_entropy(logits, tokens[:, 1:])

    def loss_fn(model: Any, starts: jax.Array, data: Data) -> jax.Array:
        index = starts[:, None] + jnp.arange(context + 1)
        return windows_loss(model, data["train"][index])

    make = functools.partial(
        Transformer, vocabulary, width, heads, depth, context, dtype
    )
    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        model = functools.partial(predict, params, rest)

        def mean_loss(windows: jax.Array) -> jax.Array:
            # Some after the others, so that they stay in the cache.
            losses = jax.lax.map(
                lambda window: windows_loss(model, window[None]),
                windows,
                batch_size=batch_size,
            )
            return losses.mean()

        return mean_loss(data["validation"]), mean_loss(data["test"])

    return Task(
        name=name,
        unit="nats",
        tolerance=0.01,
        data=data,
        draw=draw,
        evaluate=evaluate,
        steps_per_epoch=steps_per_record,
        steps_per_record=steps_per_record,
        budgets=budgets,
        decoupled_decay=0.1,
        **functions,
    )


def char_transformer() -> Task:
    """A task on the modules of the example, of which it sees a part."""
    return language_model(
        "char-transformer",
        {
            "train": char_lm.tokens_of(char_lm.TRAINING),
            "held_out": char_lm.tokens_of(char_lm.HELD_OUT),
        },
        vocabulary=char_lm.VOCABULARY_SIZE,
        width=32,
        heads=4,
        context=32,
        batch_size=16,
        steps_per_record=200,
        num_test=1024,
        budgets=(4000,),
    )


def standard_library() -> dict[str, np.ndarray]:
    """Every module of Python's standard library, its tests included, as bytes.

    It has some 30 MB where the tests are installed. Every fiftieth file is held out.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if "site-packages" not in path.parts
    )

    def text(paths: list[pathlib.Path]) -> np.ndarray:
        return np.frombuffer(b"".join(map(pathlib.Path.read_bytes, paths)), np.uint8)

    train = [path for i, path in enumerate(files) if i % 50]
    return {"train": text(train), "held_out": text(files[::50])}


def byte_gpt() -> Task:
    """A task on windows of the standard library, of which it sees a quarter."""
    return language_model(
        "byte-gpt",
        standard_library(),
        vocabulary=256,
        width=64,
        heads=4,
        context=64,
        batch_size=40,
        steps_per_record=150,
        num_test=512,
        budgets=(750, 1500, 3000),
    )
