"""Sequence to sequence: from a word to its stem, character by character."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.evidence.large.data import needed
from benchmarks.evidence.task import Batch, Data, Params, Rest, Task, model_functions

DEBIAN = pathlib.Path("/usr/share/snowball/data")
LANGUAGES = "english", "french", "german", "spanish"
MOST_LETTERS = 16  # longer words are left out
PADDING, STOP = 0, 1
Pairs = tuple[np.ndarray, np.ndarray]


class Words(NamedTuple):
    """Pairs of words and stems, as tokens of shape (n, `MOST_LETTERS` + 1), int32.

    A word has its language before its letters, and padding before that. A stem has
    `STOP` after its letters, and padding after that.
    """

    num_tokens: int
    train: Pairs
    validation: Pairs
    test: Pairs


def load(folder: pathlib.Path) -> Words:
    """The words of all languages; a held-out word has a stem of which none is trained.

    A tenth of the stems is held out, half of it for validation.
    """
    hint = "on Debian and Ubuntu, `apt install snowball-data` brings it"

    def lines(language: str, name: str) -> list[str]:
        path = needed(folder / language / f"{name}.txt", hint)
        return path.read_text(encoding="utf-8").splitlines()

    pairs = [
        (language, word, stem)
        for language in LANGUAGES
        for word, stem in zip(
            lines(language, "voc"), lines(language, "output"), strict=True
        )
        if len(word) <= MOST_LETTERS and len(stem) <= MOST_LETTERS
    ]
    letters = sorted({letter for pair in pairs for letter in pair[1] + pair[2]})
    tokens = {token: i for i, token in enumerate([*LANGUAGES, *letters], STOP + 1)}
    words = np.full((len(pairs), MOST_LETTERS + 1), PADDING, np.int32)
    stems = words.copy()
    for i, (language, word, stem) in enumerate(pairs):
        words[i, MOST_LETTERS - len(word) :] = [tokens[x] for x in (language, *word)]
        stems[i, : len(stem) + 1] = [*(tokens[x] for x in stem), STOP]
    _, family = np.unique([f"{x[0]} {x[2]}" for x in pairs], return_inverse=True)
    part = np.random.default_rng(0).permutation(family.max() + 1)[family] % 20
    is_in = {"train": part > 1, "validation": part == 0, "test": part == 1}
    splits = {name: (words[rows], stems[rows]) for name, rows in is_in.items()}
    return Words(STOP + 1 + len(tokens), **splits)


class Stemmer(nnx.Module):
    """A recurrent encoder and decoder, with attention after the decoder."""

    def __init__(
        self, num_tokens: int, width: int, hidden: int, rngs: nnx.Rngs
    ) -> None:
        self.embedding = nnx.Embed(num_tokens, width, rngs=rngs)
        self.encoder = nnx.GRUCell(width, hidden, rngs=rngs)
        self.decoder = nnx.GRUCell(width, hidden, rngs=rngs)
        self.query = nnx.Linear(hidden, hidden, use_bias=False, rngs=rngs)
        self.joint = nnx.Linear(2 * hidden, hidden, rngs=rngs)
        self.logits = nnx.Linear(hidden, num_tokens, rngs=rngs)

    def encode(self, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The last state, (n, hidden), and all of them, (length, n, hidden)."""
        start = jnp.zeros((len(words), self.encoder.hidden_features))
        return jax.lax.scan(
            lambda state, x: self.encoder(state, x), start, self.embedding(words.T)
        )

    def attend(
        self, states: jax.Array, memory: jax.Array, words: jax.Array
    ) -> jax.Array:
        """The logits after the decoder's states, (length, n, hidden)."""
        scores = jnp.einsum("tnh,snh->tns", self.query(states), memory)
        shares = jax.nn.softmax(scores, where=words != PADDING)
        context = jnp.einsum("tns,snh->tnh", shares, memory)
        joint = jnp.concatenate([states, context], axis=-1)
        return self.logits(nnx.tanh(self.joint(joint)))

    def teacher_forced(self, words: jax.Array, stems: jax.Array) -> jax.Array:
        """The logits of each letter of the stems, given those before it."""
        before = jnp.pad(stems[:, :-1], ((0, 0), (1, 0)), constant_values=STOP)
        state, memory = self.encode(words)
        _, states = jax.lax.scan(
            lambda state, x: self.decoder(state, x), state, self.embedding(before.T)
        )
        return self.attend(states, memory, words).swapaxes(0, 1)

    def __call__(self, words: jax.Array) -> jax.Array:
        """The stems by greedy decoding; what follows `STOP` says nothing."""
        state, memory = self.encode(words)

        def step(carry: Any, _: None) -> Any:
            state, token = carry
            state = self.decoder(state, self.embedding(token))[0]
            token = jnp.argmax(self.attend(state[None], memory, words)[0], axis=-1)
            return (state, token), token

        start = state, jnp.full(len(words), STOP)
        return jax.lax.scan(step, start, None, words.shape[1])[1].T


def stems(
    folder: pathlib.Path = DEBIAN,
    *,
    width: int = 32,
    hidden: int = 128,
    batch_size: int = 32,
    num_test: int = 4096,
    steps_per_record: int = 400,
    records: int = 20,
) -> Task:
    """A task on the word lists of the Snowball stemmers, of four languages."""
    loaded = load(folder)
    rng = np.random.default_rng(1)
    data = {"train": tuple(map(jnp.asarray, loaded.train))}
    for part, size in (("validation", num_test // 2), ("test", num_test)):
        pairs = getattr(loaded, part)
        rows = rng.permutation(len(pairs[0]))[:size]
        data[part] = tuple(jnp.asarray(array[rows]) for array in pairs)
    num_rows = len(loaded.train[0])

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        shape = steps_per_record, batch_size
        return jax.random.choice(key, num_rows, shape, replace=False)

    def loss_fn(model: Any, rows: jax.Array, data: Data) -> jax.Array:
        words, stems = (array[rows] for array in data["train"])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model.teacher_forced(words, stems), stems
        )
        return losses.mean(where=stems != PADDING)

    make = functools.partial(Stemmer, loaded.num_tokens, width, hidden)
    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        def error(words: jax.Array, stems: jax.Array) -> jax.Array:
            is_right = (predict(params, rest, words) == stems) | (stems == PADDING)
            return 100 * (1 - is_right.all(axis=1).mean())

        return error(*data["validation"]), error(*data["test"])

    return Task(
        name="stems",
        unit="% error",
        has_absolute_tolerance=True,
        tolerance=0.3,
        data=data,
        draw=draw,
        evaluate=evaluate,
        steps_per_epoch=num_rows // batch_size,
        steps_per_record=steps_per_record,
        budgets=(records * steps_per_record,),
        decoupled_decay=0.01,
        **functions,
    )
