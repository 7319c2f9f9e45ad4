"""The data of the papers, from a folder, and their stand-ins from Debian's packages."""

import collections
import gzip
import pathlib
import pickle
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.evidence.large.corpus import LINUX
from benchmarks.papers.protocols import Scale
from examples import fashion_mnist

LINUX_DOC = LINUX / "process"
STAND_IN_WORDS = 2000
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"

_WORD = re.compile(r"\w+|[^\w\s]")


class Images(NamedTuple):
    """Images, shape (n, height, width, channels), uint8, and labels, (n,), int32."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    @property
    def num_classes(self) -> int:
        return int(self.train[1].max()) + 1


class Text(NamedTuple):
    """Tokens, each (n,), int32, below ``num_words``."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    num_words: int


def found(folder: pathlib.Path, names: Iterable[str], what: str) -> list[pathlib.Path]:
    """The files of these names, in the folder or in folders below it."""
    names = list(names)
    paths = [min(folder.rglob(name), default=None) for name in names]
    if missing := [n for n, path in zip(names, paths, strict=True) if path is None]:
        raise SystemExit(
            f"{what} in {folder} lacks {', '.join(missing)}. See docs/papers.md for "
            "the files that are read."
        )
    return [path for path in paths if path is not None]


def channels_last(rows: np.ndarray) -> np.ndarray:
    """Images of three channels from rows of their bytes, channel after channel."""
    size = round((rows.shape[1] / 3) ** 0.5)
    return rows.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)


def cifar10(folder: pathlib.Path) -> Images:
    """The python or the binary version, as its authors distribute them."""
    parts = range(1, 6)
    if next(folder.rglob("data_batch_1.bin"), None) is None:
        names = [*(f"data_batch_{i}" for i in parts), "test_batch"]
        batches = [_pickled(path) for path in found(folder, names, "CIFAR-10")]
    else:
        names = [*(f"data_batch_{i}.bin" for i in parts), "test_batch.bin"]
        batches = [_binary(path) for path in found(folder, names, "CIFAR-10")]
    *train, test = batches
    return Images(_joined(train), test)


def _pickled(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    content = pickle.loads(path.read_bytes(), encoding="bytes")
    return channels_last(content[b"data"]), np.array(content[b"labels"], np.int32)


def _binary(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return channels_last(rows[:, 1:]), rows[:, 0].astype(np.int32)


def _joined(
    parts: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def imagenet(folder: pathlib.Path) -> Images:
    """Downsampled ImageNet: ``train*.npz`` and ``val*.npz``, which fit in memory.

    Each file has ``data``, uint8, shape (n, 3 * size * size), channel after channel, or
    (n, size, size, 3), and ``labels`` from 1, as the distribution of 32 and 64 pixels
    has them.
    """

    def split(pattern: str) -> tuple[np.ndarray, np.ndarray]:
        paths = sorted(folder.rglob(pattern))
        if not paths:
            raise SystemExit(f"Downsampled ImageNet in {folder} lacks {pattern}.")
        return _joined([_npz(path) for path in paths])

    return Images(split("train*.npz"), split("val*.npz"))


def _npz(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as content:
        data, labels = content["data"], content["labels"]
    images = channels_last(data) if data.ndim == 2 else data
    return images, labels.astype(np.int32) - 1


def small_fashion_mnist(scale: Scale) -> Images:
    splits = fashion_mnist.load(
        fashion_mnist.find_data(None), scale.num_train or 60_000
    )

    def part(split: Any) -> tuple[np.ndarray, np.ndarray]:
        images, labels = map(np.asarray, split)
        images = images[..., None]
        if scale.image_size is not None:
            images = averaged_to(images, scale.image_size)
        return images, labels.astype(np.int32)

    images, labels = part(splits.test)
    test = images[: scale.num_test], labels[: scale.num_test]
    return Images(part(splits.train), test)


def averaged_to(images: np.ndarray, size: int) -> np.ndarray:
    """Images (n, size, size, channels), whose pixels are the means of old ones."""
    n, old, _, channels = images.shape
    if old % size:
        raise ValueError(f"size must divide {old}, got {size}.")
    blocks = images.reshape(n, size, old // size, size, old // size, channels)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


def wikitext2(folder: pathlib.Path) -> Text:
    """``wiki.train.tokens`` and its like, or ``train.txt`` as in PyTorch's examples."""
    is_original = next(folder.rglob("wiki.train.tokens"), None) is not None
    parts = "train", "valid", "test"
    names = [f"wiki.{part}.tokens" if is_original else f"{part}.txt" for part in parts]
    paths = found(folder, names, "WikiText-2")
    texts = [words_of_lines(path.read_text(encoding="utf-8")) for path in paths]
    return numbered(
        *texts, words=dict.fromkeys(word for text in texts for word in text)
    )


def words_of_lines(text: str) -> list[str]:
    return [word for line in text.splitlines() for word in [*line.split(), END_OF_LINE]]


def linux_doc(scale: Scale) -> Text:
    """Prose on the development of Linux, from Debian's package linux-doc.

    Of the files in alphabetical order every tenth is for validation, and the one after
    it for the test.
    """
    paths = sorted(LINUX_DOC.glob("*.rst.gz"))
    if not paths:
        raise SystemExit(
            f"{LINUX_DOC} lacks texts. `apt install linux-doc` brings them; or give a "
            "folder with WikiText-2 by --data."
        )

    def text(paths: list[pathlib.Path]) -> list[str]:
        pages = [gzip.decompress(path.read_bytes()).decode() for path in paths]
        lines = (line.lower() for page in pages for line in page.splitlines())
        return words_of_lines("\n".join(" ".join(_WORD.findall(x)) for x in lines))

    train = text([path for i, path in enumerate(paths) if i % 10 > 1])
    train = train[: scale.num_train]
    most = collections.Counter(train).most_common(STAND_IN_WORDS - 1)
    words = dict.fromkeys([UNKNOWN, *(word for word, _ in most)])
    return numbered(train, text(paths[::10]), text(paths[1::10]), words=words)


def numbered(
    train: list[str], validation: list[str], test: list[str], words: dict[str, Any]
) -> Text:
    """The texts as numbers of words. What is not among them is `UNKNOWN`."""
    numbers = {word: i for i, word in enumerate(words)}
    unknown = numbers.get(UNKNOWN, 0)

    def tokens(text: list[str]) -> np.ndarray:
        return np.array([numbers.get(word, unknown) for word in text], np.int32)

    return Text(tokens(train), tokens(validation), tokens(test), len(numbers))
