"""The second tier of the evidence suite: its framework, and its tasks on text."""

import dataclasses
import gzip
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.evidence import __main__, contenders, jobs, tables, texts, training
from benchmarks.evidence.large import corpus
from benchmarks.evidence.large.gpt import gpt
from benchmarks.evidence.large.lstm import lstm
from benchmarks.evidence.runs import Key
from benchmarks.evidence.task import Task
from benchmarks.evidence.tasks import QUICK, task_named


def _text(vocabulary: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).integers
    return {"train": draw(vocabulary, size=500), "held_out": draw(vocabulary, size=400)}


def _compiled(task: Task, method: contenders.Method, steps: int) -> Any:
    """A run as a function of its rate."""
    params, rest = task.init(0)
    run = jax.jit(training.run_fn(task, method, steps))
    return lambda rate: run(
        jnp.float32(rate), jax.random.key(0), params, rest, task.data
    )


def _mean_loss(logits: jax.Array, labels: np.ndarray) -> float:
    scores = np.asarray(logits, np.float64)
    log_sums = np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))
    picked = np.take_along_axis(scores - log_sums, labels[..., None], axis=-1)
    return -float(picked.mean())


def _small_gpt() -> Task:
    return gpt(
        lambda: _text(256),
        width=32,
        depth=1,
        context=8,
        batch_size=2,
        steps_per_record=2,
        num_test=4,
        held_out_stride=50,
        budget=2,
    )


def test_the_gpt_is_evaluated_on_held_out_windows() -> None:
    task = _small_gpt()
    run = _compiled(task, contenders.METHODS["muon-progress"], 2)
    # At a rate of 0 the model is that of the start.
    seen = run(0.0)
    model = texts.Transformer(256, 32, 1, 1, 8, jnp.float32, nnx.Rngs(0))
    for name, starts in {"validation": [0], "test": [50, 100, 150, 250]}.items():
        windows = _text(256)["held_out"][np.array(starts)[:, None] + np.arange(9)]
        expected = _mean_loss(model(jnp.asarray(windows[:, :-1])), windows[:, 1:])
        np.testing.assert_allclose(seen[name], [expected], rtol=1e-4)
    moved = run(0.02)["test"]
    assert np.isfinite(moved).all()
    assert moved != seen["test"]


def test_muon_is_for_hidden_matrices() -> None:
    params, _ = _small_gpt().init(0)
    axes = nnx.to_pure_dict(contenders.muon_axes(params))
    (block,) = axes["blocks"].values()
    attention = block["attention"]
    assert attention["query"]["kernel"] == ((0,), (1, 2))
    assert attention["out"]["kernel"] == ((0, 1), (2,))
    assert attention["query"]["bias"] is None
    assert block["wide"]["kernel"] == ((0,), (1,))
    assert axes["embedding"]["embedding"] is axes["logits"]["kernel"] is None


def test_the_lstm_goes_on_where_the_last_mini_batch_ended() -> None:
    task = lstm(
        _text,
        vocabulary=20,
        width=8,
        dropout=0.0,
        batch_size=3,
        length=5,
        batches_per_passage=2,
        steps_per_record=4,
        held_out_length=10,
        budget=4,
    )
    run = _compiled(task, contenders.METHODS["adamw-1e-3"], 4)
    seen = run(0.0)
    # Two mini-batches are together one of twice the length, from a state of zero.
    params, rest = task.init(0)
    (key,) = jax.random.split(jax.random.key(0), 1)
    starts = np.asarray(task.draw(key, task.data)[0][::2])
    windows = _text(20)["train"][starts.reshape(6, 1) + np.arange(11)]
    data = {"validation": jnp.asarray(windows), "test": task.data["test"]}
    expected, _ = task.evaluate(params, rest, data)
    np.testing.assert_allclose(seen["train"], [expected], rtol=1e-5)
    moved = run(0.1)["test"]
    assert np.isfinite(moved).all()
    assert (moved != seen["test"]).all()
    assert task.data["validation"].shape == (3, 11)
    assert task.data["test"].shape == (9, 11)


@pytest.mark.parametrize("name", ["sgd-constant", "schedule-free-adamw"])
def test_clipping_comes_before_any_optimizer(name: str) -> None:
    task = dataclasses.replace(
        task_named(QUICK), weight_decay=0.0, decoupled_decay=0.0, clip_norm=0.0
    )
    seen = _compiled(task, contenders.METHODS[name], 360)(1.0)
    assert seen["test"][0] == seen["test"][1] > 50


@pytest.mark.parametrize("gives_value", [True, False])
def test_a_task_may_keep_its_loss_to_itself(gives_value: bool) -> None:
    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        is_given = extra_args["value"] is not None
        return updates, {"num_drops": state["num_drops"] + is_given}

    optimizer = optax.GradientTransformationExtraArgs(
        lambda params: {"num_drops": jnp.int32(0)}, update
    )
    task = dataclasses.replace(task_named(QUICK), gives_value=gives_value)
    seen = _compiled(task, contenders.Method(lambda s: optimizer), 180)(1.0)
    assert seen["drops"][-1] == (180 if gives_value else 0)


def test_wsd_warms_up_stays_and_decays() -> None:
    setting = contenders.Setting(jnp.float32(0.1), 1000, task_named(QUICK))
    schedule: Any = contenders.wsd(setting)
    rates = [schedule(step) for step in (0, 10, 20, 800, 900, 1000)]
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.1, 0.1, 0.05, 0.0], atol=1e-8)


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode("latin-1")))


def test_whole_files_of_the_documentation_are_held_out(tmp_path: pathlib.Path) -> None:
    for i in range(52):
        _write(tmp_path / f"{i:02}" / "a.rst.gz", f"{i:02},")
    _write(tmp_path / "translations" / "a.rst.gz", "no")
    _write(tmp_path / "00" / "a.txt.gz", "no")
    text = corpus.linux_documentation(tmp_path)
    assert text["held_out"].tobytes() == b"00,50,"
    assert text["train"].tobytes()[:6] == b"01,02,"
    assert len(text["train"]) == 50 * 3


def test_whole_entries_of_the_dictionary_are_held_out(tmp_path: pathlib.Path) -> None:
    entry = 'Word \\W["o]rd\\, n. [1913 Webster]\n\n   A word; a\n   sign.\n'
    path = tmp_path / "gcide.dict.dz"
    _write(path, "".join([*["Head\n"] * 50, entry, entry]))
    text = corpus.dictionary(4, path)
    # Of 49 times "head", the end of 50 entries and those of the 51st:
    end, head = 1, 2
    np.testing.assert_array_equal(text["train"][:4], [head, end] * 2)
    assert len(text["train"]) == 49 * 2 + 11
    # "head", and "word , n . a word ; a sign ." with three words known.
    assert len(text["held_out"]) == 2 + 11
    assert text["held_out"][0] == head
    assert text["held_out"][-1] == end


def test_a_missing_data_set_says_how_to_install_it(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "nothing"
    with pytest.raises(SystemExit, match=r"nothing is needed: .* linux-doc"):
        corpus.linux_documentation(missing)
    with pytest.raises(SystemExit, match=r"nothing is needed: .* dict-gcide"):
        corpus.dictionary(4, missing)
    with pytest.raises(SystemExit, match="'gtp'"):
        task_named("gtp")


def test_the_large_tier_has_jobs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evidence", "--tier", "large"])
    args = __main__.parse_args()
    made = jobs.jobs_of(args)
    assert args.results.name == "evidence-large.jsonl"
    assert {(job.kind, job.seeds) for job in made} == {("parts", 1)}
    assert [job.task for job in made if job.method == "muon-progress"] == ["gpt"]
    assert len({job.method for job in made if job.task == "lstm"}) == 8
    monkeypatch.setattr(sys, "argv", ["evidence"])
    assert not {"adamw-wsd", "muon-progress"} & set(__main__.parse_args().methods)


def _rows(task: Task, ends: dict[str, dict[int, list[float]]]) -> Any:
    rows = {}
    for name, runs in ends.items():
        rate = contenders.METHODS[name].rates[0]
        for steps, test in runs.items():
            curve = dict.fromkeys(("train", "validation", "test", "rates"), test)
            row: Any = curve | {
                "rate": rate,
                "seed": 0,
                "seconds": 1.0,
                "drops": [0, 0],
            }
            rows[Key(task.name, name, rate, 0, steps)] = row
    return rows


def test_the_large_tier_is_published_with_what_there_is(tmp_path: pathlib.Path) -> None:
    task = task_named(QUICK)
    assert set(tables.tier_tables("large", {}, [task]).values()) == {""}
    ours = {"adamw-progress": {360: [5.0, 4.0]}}
    made = tables.tier_tables("large", _rows(task, ours), [task])
    assert made["large-anytime"] == ""
    assert "| **adamw-progress** | 0.001 | 4 ± 0 | - |" in made["large-tasks"]
    schedules = {
        "adamw-cosine": {180: [5.5], 360: [9.0, 3.5]},
        "adamw-wsd": {180: [4.75], 360: [9.0, 4.5]},
    }
    made = tables.tier_tables("large", _rows(task, ours | schedules), [task])
    lines = made["large-anytime"].splitlines()
    assert lines[0].startswith("| task, steps | best schedule | schedule-free-adamw |")
    assert lines[3].startswith(
        "| quick, 180 | 4.75 (adamw-wsd) | - | - | - | **+0.25**"
    )
    assert lines[4].startswith("| quick, 360 | 3.5 (adamw-cosine) | - | - | - | +0.50")
    page = tmp_path / "evidence.md"
    page.write_text(
        "<!-- large-anytime --><!-- /large-anytime -->\n"
        "<!-- large-tasks --><!-- /large-tasks -->\n"
    )
    __main__.publish_tier("large", {}, page)
