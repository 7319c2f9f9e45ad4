"""A graph network: of which kind is a noun of WordNet, by its name and neighbours?"""

import functools
import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.evidence.images import shuffled_rows
from benchmarks.evidence.large.data import needed
from benchmarks.evidence.task import (
    Batch,
    Data,
    Params,
    Rest,
    Task,
    cross_entropy,
    model_functions,
)

NOUNS = pathlib.Path("/usr/share/wordnet/data.noun")
FIRST_CLASS, NUM_CLASSES = 3, 26  # noun.Tops to noun.time; lexnames(5) lists them
HYPERNYMS = "@", "@i"
TABLE_SIZE = 2**14
NUM_GRAMS = 32
PADDING = 0
SAMPLE = 4


class Graph(NamedTuple):
    """Synsets and their hypernyms, in both directions.

    Attributes:
      grams: the rows of the table for each synset, (n, `NUM_GRAMS`) int32.
      labels: the lexicographer file of each, (n,) int32.
      starts: where the neighbours of each begin, (n + 1,) int32.
      neighbours: those of one synset after those of another, (2 * pointers,) int32.
    """

    grams: Any
    labels: Any
    starts: Any
    neighbours: Any


def grams(names: list[str]) -> list[int]:
    """The rows of words and their trigrams, padded; row 0 is that of the padding."""
    words = [f"<{word}>" for name in names for word in name.lower().split("_")]
    parts = words + [word[i : i + 3] for word in words for i in range(len(word) - 2)]
    parts = list(dict.fromkeys(parts))[:NUM_GRAMS]
    rows = [1 + zlib.crc32(part.encode()) % (TABLE_SIZE - 1) for part in parts]
    return rows + [PADDING] * (NUM_GRAMS - len(rows))


def load(path: pathlib.Path) -> Graph:
    """The graph of a file in the format of wndb(5)."""
    hint = "on Debian and Ubuntu, `apt install wordnet-base` brings it"
    rows, labels, offsets, pointers = [], [], [], []
    for line in needed(path, hint).read_text(encoding="ascii").splitlines():
        if line.startswith(" "):  # the licence
            continue
        offset, lexicographer, _, num_words, *fields = line.partition(" | ")[0].split()
        end = 2 * int(num_words, 16)
        offsets.append(int(offset))
        rows.append(grams(fields[:end:2]))
        labels.append(int(lexicographer) - FIRST_CLASS)
        symbols, targets = fields[end + 1 :: 4], fields[end + 2 :: 4]
        pointers += [
            (int(offset), int(target))
            for symbol, target in zip(symbols, targets, strict=False)
            if symbol in HYPERNYMS
        ]
    down = np.searchsorted(offsets, np.array(pointers))
    edges = np.unique(np.concatenate([down, down[:, ::-1]]), axis=0)
    starts = np.searchsorted(edges[:, 0], np.arange(len(offsets) + 1))
    arrays = rows, labels, starts, edges[:, 1]
    return Graph(*(np.array(array, np.int32) for array in arrays))


def sampled(key: jax.Array, nodes: jax.Array, graph: Graph) -> jax.Array:
    """Neighbours of each node, drawn with replacement: one more axis, of `SAMPLE`."""
    first, last = graph.starts[nodes], graph.starts[nodes + 1]
    drawn = jax.random.uniform(key, (*nodes.shape, SAMPLE))
    places = first[..., None] + jnp.int32(drawn * (last - first)[..., None])
    return graph.neighbours[places]


def mean_of_neighbours(x: jax.Array, graph: Graph) -> jax.Array:
    degrees = jnp.diff(graph.starts)
    length = len(graph.neighbours)
    owners = jnp.repeat(jnp.arange(len(x)), degrees, total_repeat_length=length)
    sums = jax.ops.segment_sum(
        x[graph.neighbours], owners, len(x), indices_are_sorted=True
    )
    return sums / degrees[:, None]


class GraphSage(nnx.Module):
    """Two layers of GraphSAGE with mean aggregation, over bags of n-grams."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(TABLE_SIZE, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.hidden = nnx.Linear(2 * width, hidden, rngs=rngs)
        self.logits = nnx.Linear(2 * hidden, NUM_CLASSES, rngs=rngs)

    def features(self, grams: jax.Array) -> jax.Array:
        is_gram = (grams != PADDING)[..., None]
        return self.dropout(jnp.mean(self.embedding(grams), axis=-2, where=is_gram))

    def layer(
        self, linear: nnx.Linear, own: jax.Array, neighbours: jax.Array
    ) -> jax.Array:
        return linear(jnp.concatenate([own, neighbours], axis=-1))

    def on_samples(self, key: jax.Array, nodes: jax.Array, graph: Graph) -> jax.Array:
        """The logits of some nodes, from neighbours and theirs drawn at random."""
        keys = jax.random.split(key)
        near = sampled(keys[0], nodes, graph)
        far = sampled(keys[1], near, graph)
        x = [self.features(graph.grams[rows]) for rows in (nodes, near, far)]
        own = nnx.relu(self.layer(self.hidden, x[0], x[1].mean(axis=-2)))
        around = nnx.relu(self.layer(self.hidden, x[1], x[2].mean(axis=-2)))
        return self.layer(self.logits, own, around.mean(axis=-2))

    def __call__(self, graph: Graph) -> jax.Array:
        """The logits of all nodes, from all their neighbours."""
        # One part after the other, each small enough to stay in the cache.
        x = jax.lax.map(self.features, graph.grams, batch_size=500)
        x = nnx.relu(self.layer(self.hidden, x, mean_of_neighbours(x, graph)))
        return self.layer(self.logits, x, mean_of_neighbours(x, graph))


def wordnet(
    path: pathlib.Path = NOUNS,
    *,
    width: int = 32,
    hidden: int = 64,
    batch_size: int = 64,
    records: int = 16,
) -> Task:
    """A task on the synsets of nouns, of which a half is held out.

    All names are in the graph, but only the labels of the other half are trained on.
    """
    graph = load(path)
    order = np.random.default_rng(0).permutation(len(graph.labels))
    validation, test, train = np.split(order, [len(order) // 10, len(order) // 2])
    nodes = {"train": train, "validation": validation, "test": test}
    data = jax.tree.map(jnp.asarray, {"graph": graph, **nodes})
    steps_per_epoch = len(train) // batch_size

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        rows_key, samples_key = jax.random.split(key)
        rows = shuffled_rows(rows_key, len(train), batch_size, 1)
        return rows, jax.random.split(samples_key, len(rows))

    def loss_fn(model: Any, batch: Batch, data: Data) -> jax.Array:
        rows, key = batch
        nodes, graph = data["train"][rows], data["graph"]
        return cross_entropy(model.on_samples(key, nodes, graph), graph.labels[nodes])

    make = functools.partial(GraphSage, width, hidden)
    functions = model_functions(make, loss_fn)
    predict = functions.pop("predict")

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        graph = data["graph"]
        is_wrong = jnp.argmax(predict(params, rest, graph), axis=-1) != graph.labels
        validation, test = (
            100 * is_wrong[data[part]].mean() for part in ("validation", "test")
        )
        return validation, test

    return Task(
        name="wordnet",
        unit="% error",
        has_absolute_tolerance=True,
        tolerance=0.3,
        data=data,
        draw=draw,
        evaluate=evaluate,
        steps_per_epoch=steps_per_epoch,
        steps_per_record=steps_per_epoch,
        budgets=(records * steps_per_epoch,),
        weight_decay=5e-4,
        decoupled_decay=0.1,
        **functions,
    )
