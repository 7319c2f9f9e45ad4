"""An LSTM on the words of a dictionary, in the fashion of the papers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.evidence.large import corpus
from benchmarks.evidence.task import (
    Batch,
    Data,
    Params,
    Rest,
    Task,
    cross_entropy,
    model_functions,
)


class Carried(nnx.Variable):
    """The state of the cells after a mini-batch, where the next one begins."""


class Lstm(nnx.Module):
    """Two layers, dropout around each, and one embedding for inputs and outputs."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        dropout: float,
        batch_size: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(vocabulary))
        cells = [nnx.OptimizedLSTMCell(width, width, rngs=rngs) for _ in range(2)]
        self.layers = nnx.List([nnx.RNN(cell, return_carry=True) for cell in cells])
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.carried = Carried(self.start(batch_size))
        self.deterministic = False

    def start(self, batch_size: int) -> jax.Array:
        """The cells and outputs of each layer, (layers, 2, batch_size, width)."""
        return jnp.zeros((len(self.layers), 2, batch_size, self.embedding.features))

    def __call__(
        self, tokens: jax.Array, carry: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The logits of the tokens after these, and the state after the last."""
        carry = self.start(len(tokens)) if carry is None else carry
        x = self.dropout(self.embedding(tokens))
        after = []
        for layer, initial in zip(self.layers, carry, strict=True):
            last, x = layer(x, initial_carry=tuple(initial))
            after.append(jnp.stack(last))
            x = self.dropout(x)
        return self.embedding.attend(x) + self.bias[...], jnp.stack(after)

    def read(self, tokens: jax.Array, is_first: jax.Array) -> jax.Array:
        """The logits of a mini-batch, which goes on from the one before."""
        logits, after = self(tokens, jnp.where(is_first, 0.0, self.carried[...]))
        if not self.deterministic:
            self.carried[...] = jax.lax.stop_gradient(after)
        return logits


def lanes(tokens: np.ndarray, number: int, length: int) -> jax.Array:
    """As many parts of a text, evenly spaced, shape (number, length + 1)."""
    starts = np.linspace(0, len(tokens) - length - 1, number).astype(int)
    return jnp.asarray(tokens[starts[:, None] + np.arange(length + 1)])


def lstm(
    load: Callable[[int], dict[str, np.ndarray]] = corpus.dictionary,
    *,
    vocabulary: int = 4096,
    width: int = 256,
    dropout: float = 0.2,
    batch_size: int = 16,
    length: int = 35,
    batches_per_passage: int = 30,
    steps_per_record: int = 120,
    held_out_length: int = 1024,
    budget: int = 2400,
) -> Task:
    """A task on 5 million words, of which it sees a quarter.

    In a passage a mini-batch goes on where the one before ended, with the state of the
    cells, and gradients do not flow from one to the other. A passage begins anew. It
    is as long as those that are held out.
    """
    passages = steps_per_record // batches_per_passage
    text = load(vocabulary)
    # A part of four chooses the rates, the others are reported.
    held_out = lanes(text["held_out"], 12, held_out_length)
    data = {
        "train": jnp.asarray(text["train"]),
        "validation": held_out[::4],
        "test": jnp.delete(held_out, slice(None, None, 4), axis=0),
    }

    def draw(key: jax.Array, data: Data) -> Batch:
        last = len(data["train"]) - batches_per_passage * length - 1
        starts = jax.random.randint(key, (passages, 1, batch_size), 0, last)
        number = jnp.tile(jnp.arange(batches_per_passage), (passages, 1))
        rows = starts + length * number[..., None]
        return rows.reshape(-1, batch_size), number.reshape(-1) == 0

    def loss_fn(model: Any, batch: Batch, data: Data) -> jax.Array:
        starts, is_first = batch
        tokens = data["train"][starts[:, None] + jnp.arange(length + 1)]
        return cross_entropy(model.read(tokens[:, :-1], is_first), tokens[:, 1:])

    make = functools.partial(Lstm, vocabulary, width, dropout, batch_size)
    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        def mean_loss(tokens: jax.Array) -> jax.Array:
            logits, _ = predict(params, rest, tokens[:, :-1])
            return cross_entropy(logits, tokens[:, 1:])

        return mean_loss(data["validation"]), mean_loss(data["test"])

    return Task(
        name="lstm",
        unit="nats",
        tolerance=0.01,
        data=data,
        draw=draw,
        evaluate=evaluate,
        # There are no epochs: the steps between two evaluations take their place.
        steps_per_epoch=steps_per_record,
        steps_per_record=steps_per_record,
        budgets=(budget,),
        decoupled_decay=0.01,
        clip_norm=0.25,
        **functions,
    )
