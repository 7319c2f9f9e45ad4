"""The tasks of the evidence suite: small problems of several kinds, all offline.

A task is a handful of pure functions over parameters, whatever else a model carries
(running averages, random state), and data, so that a whole run compiles to one loop.
"""

import dataclasses
import functools
import pathlib
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import char_lm
import digits
import elbo
import fashion_mnist

Batch = Any
Data = Any
Params = Any
Rest = Any


@dataclasses.dataclass(frozen=True)
class Task:
    """What is minimised, on which data, for how long.

    Attributes:
      name: as results have it.
      unit: of what is evaluated; the less the better.
      tolerance: how far from the best tuned baseline counts as equal: that much, if
        the unit is "% error", else that share of the best loss.
      data: arrays, on the device.
      init: from a seed to the parameters, and the rest of the model.
      draw: from a key and the data to the mini-batches of a record.
      loss: of a mini-batch, in training mode; with the rest of the model after it.
      value: the same loss as a deterministic function, for a line search.
      evaluate: on validation data, which chooses rates, and on test data, which is
        reported. Where the expected loss is known both are that.
      steps_per_epoch: None where there are no epochs.
      steps_per_record: between evaluations.
      budgets: of steps, the least first.
      weight_decay: of momentum SGD, coupled.
      decoupled_decay: of AdamW and its kin.
      has_running_averages: whether an averaged model needs its own.
    """

    name: str
    unit: str
    tolerance: float
    data: Data
    init: Callable[[int], tuple[Params, Rest]]
    draw: Callable[[jax.Array, Data], Batch]
    loss: Callable[[Params, Rest, Batch, Data], tuple[jax.Array, Rest]]
    value: Callable[[Params, Rest, Batch, Data], jax.Array]
    evaluate: Callable[[Params, Rest, Data], tuple[jax.Array, jax.Array]]
    steps_per_epoch: int | None
    steps_per_record: int
    budgets: tuple[int, ...]
    weight_decay: float = 0.0
    decoupled_decay: float = 0.0
    has_running_averages: bool = False

    @property
    def parts(self) -> tuple[int, int, int]:
        """A quarter, a half and all of the largest budget, in whole records."""
        whole = self.budgets[-1]
        records = whole // self.steps_per_record
        parts = (max(1, records // n) for n in (4, 2))
        quarter, half = (part * self.steps_per_record for part in parts)
        return quarter, half, whole


def model_functions(
    make: Callable[[nnx.Rngs], nnx.Module],
    loss_fn: Callable[[Any, Batch, Data], jax.Array],
) -> dict[str, Any]:
    """`init`, `loss` and `value` of a Flax model."""
    model = make(nnx.Rngs(0))
    model.train()
    training = nnx.split(model, nnx.Param, ...)[0]
    model.eval()
    inference = nnx.split(model, nnx.Param, ...)[0]

    def init(seed: int) -> tuple[Params, Rest]:
        model = make(nnx.Rngs(seed))
        model.train()
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return params, rest

    def loss(
        params: Params, rest: Rest, batch: Batch, data: Data
    ) -> tuple[jax.Array, Rest]:
        model = nnx.merge(training, params, rest, copy=True)
        loss = loss_fn(model, batch, data)
        return loss, nnx.split(model, nnx.Param, ...)[2]

    def value(params: Params, rest: Rest, batch: Batch, data: Data) -> jax.Array:
        return loss_fn(nnx.merge(inference, params, rest), batch, data)

    def predict(params: Params, rest: Rest, inputs: jax.Array) -> jax.Array:
        return nnx.merge(inference, params, rest)(inputs)

    return {"init": init, "loss": loss, "value": value, "predict": predict}


def shuffled_rows(
    key: jax.Array, num_rows: int, batch_size: int, epochs: int
) -> jax.Array:
    """Those of each mini-batch, shape (batches, batch_size), int32."""
    num_batches = num_rows // batch_size

    def epoch(key: jax.Array) -> jax.Array:
        order = jax.random.permutation(key, num_rows)
        return order[: num_batches * batch_size].reshape(num_batches, batch_size)

    keys = jax.random.split(key, epochs)
    return jax.vmap(epoch)(keys).reshape(epochs * num_batches, batch_size)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def classification(
    name: str,
    make: Callable[[nnx.Rngs], nnx.Module],
    splits: Any,
    *,
    batch_size: int,
    epochs: tuple[int, ...],
    epochs_per_record: int,
    shift: bool = False,
    **fields: Any,
) -> Task:
    """Of images, with data of the examples: `train`, `validation` and `test`."""
    data = {
        name: tuple(jnp.asarray(x) for x in getattr(splits, name))
        for name in ("train", "validation", "test")
    }
    num_rows = len(data["train"][1])

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        rows_key, shift_key = jax.random.split(key)
        rows = shuffled_rows(rows_key, num_rows, batch_size, epochs_per_record)
        return rows, jax.random.split(shift_key, len(rows))

    def loss_fn(model: Any, batch: Batch, data: Data) -> jax.Array:
        rows, key = batch
        images, labels = (array[rows] for array in data["train"])
        images = digits.shift(images, key) if shift else images
        return cross_entropy(model(images), labels)

    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        def error(images: jax.Array, labels: jax.Array) -> jax.Array:
            # In parts that stay in the cache.
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
    """As slices and a matrix product, with padding "SAME".

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
    """That of the example: two convolutions with batch norm, dropout, logits."""

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
        shift=True,
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


class Transformer(nnx.Module):
    """Two pre-norm blocks over the characters of a short context."""

    def __init__(
        self, vocabulary: int, width: int, heads: int, context: int, rngs: nnx.Rngs
    ) -> None:
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


class Block(nnx.Module):
    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads, width, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.wide = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
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
) -> Task:
    """A transformer on windows of a text, drawn at random."""
    # There are no epochs here; but to be told nothing, in so short a run, means to do
    # nothing. So ours are told the steps between two evaluations.
    held_out = texts["held_out"]
    starts = np.arange(0, len(held_out) - context - 1, context)
    windows = held_out[starts[:, None] + np.arange(context + 1)]
    others = np.delete(windows, slice(None, None, 4), axis=0)
    data = {
        "train": jnp.asarray(texts["train"]),
        # Every fourth to choose by, the others to report.
        "validation": jnp.asarray(windows[::4][: num_test // 4]),
        "test": jnp.asarray(others[:num_test]),
    }

    def draw(key: jax.Array, data: Data) -> Batch:
        shape = (steps_per_record, batch_size)
        return jax.random.randint(key, shape, 0, len(data["train"]) - context)

    def windows_loss(model: Any, tokens: jax.Array) -> jax.Array:
        tokens = tokens.astype(jnp.int32)
        return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])

    def loss_fn(model: Any, starts: jax.Array, data: Data) -> jax.Array:
        index = starts[:, None] + jnp.arange(context + 1)
        return windows_loss(model, data["train"][index])

    make = functools.partial(Transformer, vocabulary, width, heads, context)
    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        model = functools.partial(predict, params, rest)
        return (
            windows_loss(model, data["validation"]),
            windows_loss(model, data["test"]),
        )

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
    """On the modules of the example, of which it sees less than all."""
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

    Some 30 MB where the tests are installed. Every fiftieth file is held out.
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
    """On random windows of the standard library, of which it sees a quarter."""
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


def plain(
    name: str,
    init: Callable[[int], Params],
    loss: Callable[[Params, Batch, Data], jax.Array],
    expected: Callable[[Params, Data], jax.Array],
    data: Data,
    *,
    num_steps: int,
    unit: str,
) -> Task:
    """A loss of parameters, data and a key, whose expectation is known."""
    steps_per_record = num_steps // 20

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        return jax.random.split(key, steps_per_record)

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        del rest
        value = expected(params, data)
        return value, value

    return Task(
        name=name,
        unit=unit,
        tolerance=0.01,
        data=data,
        init=lambda seed: (init(seed), ()),
        draw=draw,
        loss=lambda params, rest, key, data: (loss(params, key, data), rest),
        value=lambda params, rest, key, data: loss(params, key, data),
        evaluate=evaluate,
        steps_per_epoch=None,
        steps_per_record=steps_per_record,
        budgets=(num_steps,),
    )


def negative_elbo() -> Task:
    """The example's: what is evaluated is minus the exact ELBO, per row."""
    problem = elbo.draw_problem(0)
    residual = problem.targets - problem.features @ problem.mean
    log_det = float(np.linalg.slogdet(problem.precision)[1])
    # log N(targets; 0, noise^2 I + features features^T), by the posterior.
    log_evidence = -0.5 * float(
        np.sum(residual**2) / elbo.NOISE**2
        + np.sum(problem.mean**2)
        + log_det
        + elbo.NUM_ROWS * np.log(2 * np.pi * elbo.NOISE**2)
    )

    def expected(params: Params, problem: Data) -> jax.Array:
        error = params["mean"] - problem.mean
        variance = jnp.exp(2 * params["log_std"])
        divergence = (
            jnp.sum(jnp.diag(problem.precision) * variance)
            + error @ problem.precision @ error
            - elbo.NUM_FEATURES
            - log_det
            - 2 * jnp.sum(params["log_std"])
        ) / 2
        return (divergence - log_evidence) / elbo.NUM_ROWS

    return plain(
        "negative-elbo",
        lambda seed: elbo.init_params(),
        lambda params, key, problem: elbo.loss_fn(params, problem, key),
        expected,
        problem,
        num_steps=20_000,
        unit="nats a row",
    )


def least_squares() -> Task:
    """Noisy linear regression on a stream of rows, condition number 100."""
    dimension, batch_size, noise = 50, 16, 0.5
    scales = np.geomspace(0.1, 1.0, dimension).astype(np.float32)
    weights = np.random.default_rng(0).normal(size=dimension).astype(np.float32)
    data = {"scales": jnp.asarray(scales), "weights": jnp.asarray(weights / scales)}

    def loss(params: Params, key: jax.Array, data: Data) -> jax.Array:
        row_key, noise_key = jax.random.split(key)
        rows = data["scales"] * jax.random.normal(row_key, (batch_size, dimension))
        targets = rows @ data["weights"]
        targets += noise * jax.random.normal(noise_key, (batch_size,))
        return jnp.mean((rows @ params - targets) ** 2) / 2

    def expected(params: Params, data: Data) -> jax.Array:
        excess = jnp.sum((data["scales"] * (params - data["weights"])) ** 2)
        return (excess + noise**2) / 2

    return plain(
        "least-squares",
        lambda seed: jnp.zeros(dimension),
        loss,
        expected,
        data,
        num_steps=20_000,
        unit="loss",
    )


def factorization() -> Task:
    """A matrix of rank 5 and noise, fitted with rank 5 from entries drawn at random.

    The smallest expected loss is known: it is what the other singular values leave.
    """
    rows, columns, rank, batch_size, noise = 100, 80, 5, 256, 0.1
    random = np.random.default_rng(0)
    left, right = (random.normal(size=(n, rank)) for n in (rows, columns))
    matrix = left @ right.T / rank**0.5 + noise * random.normal(size=(rows, columns))

    def init(seed: int) -> Params:
        left_key, right_key = jax.random.split(jax.random.key(seed))
        return {
            "left": 0.1 * jax.random.normal(left_key, (rows, rank)),
            "right": 0.1 * jax.random.normal(right_key, (columns, rank)),
        }

    def loss(params: Params, key: jax.Array, matrix: Data) -> jax.Array:
        at = jax.random.randint(key, (batch_size,), 0, rows * columns)
        i, j = at // columns, at % columns
        fitted = jnp.sum(params["left"][i] * params["right"][j], axis=1)
        # Times a constant, or the curvature along a row's factors were that of one row
        # in a hundred.
        return 20 * jnp.mean((fitted - matrix[i, j]) ** 2)

    def expected(params: Params, matrix: Data) -> jax.Array:
        return 20 * jnp.mean((params["left"] @ params["right"].T - matrix) ** 2)

    return plain(
        "factorization",
        init,
        loss,
        expected,
        jnp.asarray(matrix, jnp.float32),
        num_steps=20_000,
        unit="loss",
    )


TASKS: dict[str, Callable[[], Task]] = {
    "digits-logistic": digits_logistic,
    "digits-mlp": digits_mlp,
    "fashion-mlp": fashion_mlp,
    "fashion-cnn": fashion_cnn,
    "char-transformer": char_transformer,
    "byte-gpt": byte_gpt,
    "negative-elbo": negative_elbo,
    "least-squares": least_squares,
    "factorization": factorization,
}
