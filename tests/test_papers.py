"""The papers' experiments: their data, models, schedules, methods and tables."""

import dataclasses
import json
import pathlib
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.evidence.contenders import Setting
from benchmarks.evidence.task import Task
from benchmarks.papers import __main__, data, runs, tables, tasks
from benchmarks.papers.methods import methods_of
from benchmarks.papers.models import Lstm, ResNet18
from benchmarks.papers.protocols import PROTOCOLS, Scale, protocol_named

_CIFAR10, _WIKITEXT2 = PROTOCOLS["cifar10"], PROTOCOLS["wikitext2"]
_SMALL = Scale(epochs=3, epochs_per_drop=1, width=4)


def _num_params(make: Any) -> int:
    params = nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_models_are_as_large_as_those_of_the_authors() -> None:
    # Those of pytorch-cifar, torchvision, and PyTorch's examples without the second
    # bias of each layer.
    assert _num_params(lambda r: ResNet18(3, 10, 64, True, r)) == 11_173_962
    assert _num_params(lambda r: ResNet18(3, 1000, 64, False, r)) == 11_689_512
    words, width = 33_278, 1500
    expected = words * (width + 1) + 2 * 4 * (2 * width**2 + width)
    assert _num_params(lambda r: Lstm(words, width, 2, 0.65, 20, r)) == expected


def _images(count: int, size: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (count, size, size, 3), np.uint8)


def _rows(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def _check_images(got: data.Images, images: np.ndarray, labels: np.ndarray) -> None:
    for mine, theirs in zip(got.train, (images[:-2], labels[:-2]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(got.test[0], images[-2:])


@pytest.mark.parametrize("is_binary", [False, True])
def test_cifar10_is_read_in_both_versions(
    tmp_path: pathlib.Path, is_binary: bool
) -> None:
    images, labels = _images(12, 32), np.arange(12) % 10
    rows = _rows(images)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    folder = tmp_path / "cifar-10"
    folder.mkdir()
    for i, name in enumerate(names):
        part = slice(2 * i, 2 * i + 2)
        if is_binary:
            content = np.column_stack([labels[part].astype(np.uint8), rows[part]])
            (folder / f"{name}.bin").write_bytes(content.tobytes())
        else:
            batch = {b"data": rows[part], b"labels": labels[part].tolist()}
            (folder / name).write_bytes(pickle.dumps(batch))
    _check_images(data.cifar10(tmp_path), images, labels)


def test_what_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match="lacks data_batch_1, "):
        data.cifar10(tmp_path)
    with pytest.raises(SystemExit, match=r"lacks train\*.npz"):
        data.imagenet(tmp_path)
    with pytest.raises(SystemExit, match=r"lacks train.txt, valid.txt, test.txt"):
        data.wikitext2(tmp_path)
    with pytest.raises(SystemExit, match="--data must be a folder"):
        tasks.data_of(_CIFAR10, _SMALL, tmp_path / "none")
    with pytest.raises(SystemExit, match="experiment must be one of cifar10, "):
        protocol_named("mnist")


@pytest.mark.parametrize("is_flat", [False, True])
def test_imagenet_is_read_from_its_parts(tmp_path: pathlib.Path, is_flat: bool) -> None:
    images, labels = _images(6, 8), np.arange(6)
    for name, part in {
        "train_data_batch_1": slice(0, 2),
        "train_data_batch_2": slice(2, 4),
        "val_data": slice(4, 6),
    }.items():
        content = _rows(images[part]) if is_flat else images[part]
        np.savez(tmp_path / f"{name}.npz", data=content, labels=labels[part] + 1)
    _check_images(data.imagenet(tmp_path), images, labels)


@pytest.mark.parametrize("name", ["wiki.{}.tokens", "{}.txt"])
def test_words_are_numbered_in_the_order_of_the_text(
    tmp_path: pathlib.Path, name: str
) -> None:
    for part, text in {
        "train": " = A = \n\n a b <unk>\n",
        "valid": "b a\n",
        "test": "c\n",
    }.items():
        (tmp_path / name.format(part)).write_text(text)
    text = data.wikitext2(tmp_path)
    assert text.train.tolist() == [0, 1, 0, 2, 2, 3, 4, 5, 2]
    assert text.validation.tolist() == [4, 3, 2]
    assert text.test.tolist() == [6, 2]
    assert text.num_words == 7


def test_rare_words_are_unknown() -> None:
    words: dict[str, Any] = dict.fromkeys([data.UNKNOWN, "a"])
    text = data.numbered(["a", "b"], ["a"], ["c"], words)
    assert [x.tolist() for x in text[:3]] == [[1, 0], [1], [0]]


def test_small_images_are_means() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) * 2
    means = [[5, 9], [21, 25]]
    assert data.averaged_to(image, 2)[0, ..., 0].tolist() == means
    with pytest.raises(ValueError, match="size must divide 4, got 3"):
        data.averaged_to(image, 3)


def test_a_crop_is_a_part_of_the_padded_image() -> None:
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    images = jnp.tile(image, (200, 1, 1, 1))
    crops = jax.jit(tasks.crop_and_flip)(images, jax.random.key(0))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    parts = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    allowed = {x.tobytes() for part in parts for x in (part, part[:, ::-1].copy())}
    assert {crop.tobytes() for crop in np.asarray(crops)} == allowed


def test_a_resized_crop_lies_within_the_image() -> None:
    ramp = np.tile(np.arange(32, dtype=np.uint8)[:, None, None], (1, 32, 1))
    both = jnp.asarray(np.concatenate([np.full_like(ramp, 7), ramp], axis=-1))
    images = jnp.tile(both[None], (100, 1, 1, 1))
    crops = np.asarray(jax.jit(tasks.resized_crop_and_flip)(images, jax.random.key(0)))
    assert crops.shape == (100, 28, 28, 2)
    # Outside of the image there would be zeros.
    np.testing.assert_allclose(crops[..., 0], 7, rtol=1e-5)
    heights = crops[:, :, 0, 1]
    assert np.all(np.diff(heights, axis=1) > -1e-4)
    spans = heights[:, -1] - heights[:, 0]
    assert spans.min() > 31 * (0.08 * 3 / 4) ** 0.5 - 2
    assert spans.max() > 25
    assert tasks.central_crop(images[:1]).shape == (1, 28, 28, 2)


@pytest.mark.parametrize("is_small", [True, False])
def test_both_forms_of_the_network_have_logits(is_small: bool) -> None:
    def logits() -> jax.Array:
        model = ResNet18(3, 7, 2, is_small, nnx.Rngs(0))
        return model(jnp.zeros((5, 28, 28, 3)))

    assert nnx.eval_shape(logits).shape == (5, 7)


class _Brightness(nnx.Module):
    """Takes bright images for the last class."""

    def __init__(self, channels: int, classes: int, *_: Any) -> None:
        self.logits = nnx.Param(jnp.linspace(-1.0, 1.0, classes))

    def __call__(self, images: jax.Array) -> jax.Array:
        return images.mean(axis=(1, 2, 3))[:, None] * self.logits[...]


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_images_are_normalised_and_judged(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "ResNet18", _Brightness)
    labels = np.arange(300) % 2
    images = np.where(labels, 200, 50).astype(np.uint8)[:, None, None, None]
    images = np.tile(images, (1, 16, 16, 1))
    split = data.Images((images, labels), (images[:8], np.array([0, 1] * 3 + [1, 1])))
    protocol = PROTOCOLS[name]
    task = tasks.image_task(protocol, _SMALL, split)
    assert task.steps_per_epoch == 300 // protocol.batch_size
    params, rest = task.init(0)
    # One of eight labels is wrong.
    assert float(task.evaluate(params, rest, task.data)[1]) == 12.5
    rows, keys = task.draw(jax.random.key(0), task.data)
    assert rows.shape == (task.steps_per_epoch, protocol.batch_size)
    loss = task.value(params, rest, (rows[0], keys[0]), task.data)
    # Dark is -1, bright is 1, and so the logits of the right class are 1 and -1.
    if name == "imagenet":
        np.testing.assert_allclose(loss, np.log1p(np.exp(-2)), rtol=1e-3)
    else:
        assert np.log1p(np.exp(-2)) < float(loss) < np.log(2)


def _text(num_words: int = 11) -> data.Text:
    random = np.random.default_rng(0)
    train, test = (random.integers(0, num_words, n, np.int32) for n in (2000, 800))
    return data.Text(train, test, test, num_words)


def test_a_window_of_text_goes_on_where_the_one_before_has_ended() -> None:
    read, drawn = (
        tasks.text_task(_WIKITEXT2, _SMALL, _text(), is_shuffled)
        for is_shuffled in (False, True)
    )
    assert read.draw(jax.random.key(0), read.data).tolist() == [0, 1]
    params, rest = read.init(0)
    loss = jax.jit(read.loss)
    first, after = loss(params, rest, jnp.int32(0), read.data)
    second, _ = loss(params, after, jnp.int32(1), read.data)
    # The value, for a line search, has the state of before the step.
    value = read.value(params, after, jnp.int32(1), read.data)
    np.testing.assert_allclose(value, second, rtol=1e-5)

    model = Lstm(11, 4, 2, 0.0, 20, nnx.Rngs(0))
    tokens = read.data["train"]
    logits, _ = model(tokens[:, :70], model.zeros(20))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:71])
    np.testing.assert_allclose(first, losses[:, :35].mean(), rtol=1e-5)
    np.testing.assert_allclose(second, losses[:, 35:].mean(), rtol=1e-5)

    logits, _ = model(tokens[:, 35:70], model.zeros(20))
    alone = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 36:71])
    got = drawn.value(params, after, jnp.int32(1), read.data)
    np.testing.assert_allclose(got, alone.mean(), rtol=1e-5)


def _line() -> Task:
    """A straight line through noise, in two steps an epoch."""
    inputs = jax.random.normal(jax.random.key(0), (8, 3))

    def value(params: Any, rest: Any, batch: Any, data: Any) -> jax.Array:
        rows = data[batch]
        return jnp.mean((rows @ params["slope"] - rows.sum(axis=1)) ** 2)

    def evaluate(params: Any, rest: Any, data: Any) -> tuple[jax.Array, jax.Array]:
        loss = value(params, rest, jnp.arange(8), data)
        return loss, loss

    return Task(
        name="line",
        unit="nats",
        tolerance=0.01,
        data=inputs,
        init=lambda seed: ({"slope": jnp.full(3, float(seed))}, ()),
        draw=lambda key, data: jax.random.permutation(key, 8).reshape(2, 4),
        loss=lambda *arguments: (value(*arguments), ()),
        value=value,
        evaluate=evaluate,
        steps_per_epoch=2,
        steps_per_record=2,
        budgets=(2,),
    )


@pytest.mark.parametrize("name", methods_of(_CIFAR10))
def test_each_method_makes_two_steps(name: str) -> None:
    method, task = methods_of(_CIFAR10)[name], _line()
    curves = runs.train(_CIFAR10, _SMALL.lasting(1), task, method, 0)
    assert set(curves) == {"train", "validation", "test", "rates", "drops"}
    assert all(len(curve) == 1 and None not in curve for curve in curves.values())
    assert curves["test"] != [float(task.evaluate(*task.init(0), task.data)[0])]


def test_gradients_are_clipped_for_text() -> None:
    setting = Setting(jnp.float32(20), 10, _line())
    optimizer = methods_of(_WIKITEXT2)["hand-tuned-shuffled"].make(setting)
    params: Any = jnp.ones(2)
    grads: Any = jnp.array([3.0, 4.0])
    updates: Any = optimizer.update(grads, optimizer.init(params), params)[0]
    np.testing.assert_allclose(updates, -20 * 0.25 * grads / 5, rtol=1e-6)


def test_a_window_asks_for_as_many_epochs_as_in_the_published_run() -> None:
    def window(name: str, steps: int) -> Any:
        task = dataclasses.replace(_line(), steps_per_epoch=steps)
        optimizer = methods_of(_CIFAR10)[name].make(Setting(jnp.float32(1), 9000, task))
        return optimizer.init(jnp.ones(3))

    assert _CIFAR10.samples_in(400, 390) == 400
    assert _CIFAR10.samples_in(1000, 50) == 128
    assert _CIFAR10.samples_in(400, 50) == 100
    assert PROTOCOLS["imagenet"].samples_in(1000, 100_000) == 1000
    # A run of 9000 steps without a drop keeps a quarter, and tests after 1600.
    state = window("sasa-plus", 390)
    assert optax.tree.get(state, "buffer").shape == (2, 2250)
    assert int(optax.tree.get(state, "next_test")) == 1950
    # That is SASA's 400 in all, of which 200 are kept.
    assert int(optax.tree.get(window("sasa", 390), "next_test")) == 780


def test_the_hand_tuned_rate_drops_by_the_epoch_or_by_the_validation_loss() -> None:
    scale = _CIFAR10.published
    rates = [_CIFAR10.hand_tuned_rate(scale, [0.0] * n) for n in (0, 49, 50, 299)]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 1e-5])
    assert scale.lasting(60).epochs_per_drop == 10
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        scale.lasting(0)

    losses = [5.0, 4.0, 4.5, 4.0, 3.0]
    rates = [
        _WIKITEXT2.hand_tuned_rate(_WIKITEXT2.published, losses[:n]) for n in range(6)
    ]
    assert rates == [20, 20, 20, 5, 1.25, 1.25]


def test_the_schedule_sets_the_rate_of_each_epoch() -> None:
    method = methods_of(_CIFAR10)["hand-tuned"]
    curves = runs.train(_CIFAR10, _SMALL, _line(), method, 0)
    np.testing.assert_allclose(np.array(curves["rates"], float), [1, 0.1, 0.01])


def _row(method: str, seed: int = 0, **curves: Any) -> dict[str, Any]:
    key = runs.Key("cifar10", "fashion-mnist", method, seed, 3)
    made = {"date": "2026-11-26", "cores": 2, "architecture": "x86_64", "jax": "0.10.2"}
    seen = {"train": [1.0, 0.5, 0.25], "test": [30.0, 9.0, 10.0], "rates": [1.0] * 3}
    seen |= {"drops": [0, 0, 0]} | curves
    return key._asdict() | seen | {"seconds": 12.3, "made": made}


def test_the_table_says_when_the_rate_dropped() -> None:
    rows = [
        _row("hand-tuned", rates=[1.0, 0.1, 0.01]),
        _row("hand-tuned", seed=1, test=[30.0, 11.0, 12.0]),
        _row("sasa", drops=[0, 1, 2], rates=[1.0, 0.1, 0.01]),
        _row("sasa-plus", train=[1.0, 0.5, None]),
    ]
    text = tables.published(
        {runs.Key(*(row[x] for x in runs.Key._fields)): row for row in rows},
        _CIFAR10,
        "fashion-mnist",
    )
    _, _, *lines = text.splitlines()
    # The schedule drops after an epoch, which shows in the next one.
    cells = lines[0].strip("| ").split(" | ")
    assert cells[:3] == ["`hand-tuned`", "11.00 ± 1.41", "10.00 ± 1.41"]
    assert cells[3:] == ["0.250 ± 0.000", "1", "0.01", "1, 2", "12"]
    assert lines[1].endswith("| 1 | 0.01 | 2, 3 | 12 |")
    assert "| diverged |" in lines[2]
    assert "never" in lines[2]
    assert text.endswith("2-core x86-64 CPU, JAX 0.10.2, 2026-11-26.")
    assert tables.published({}, _CIFAR10, "fashion-mnist").startswith("Not run yet")


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert tables.curve([0.0, None], _WIKITEXT2) == [1.0, np.inf]
    assert tables.curve([2.0], _CIFAR10) == [2.0]


def test_what_was_run_is_not_run_again(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "papers.jsonl"
    row = _row("sasa") | {"epochs": 60}
    path.write_text(json.dumps(row) + "\n")
    args = __main__.parse_args(["cifar10", "--results", str(path)])
    names = [job.key.method for job in __main__.jobs_of(args, _CIFAR10)]
    assert names == [name for name in methods_of(_CIFAR10) if name != "sasa"]
    args = __main__.parse_args(["cifar10", "--methods", "adam"])
    with pytest.raises(SystemExit, match="--methods must be of hand-tuned, "):
        __main__.jobs_of(args, _CIFAR10)
