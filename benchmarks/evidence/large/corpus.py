"""English text that Debian ships, split into training and held-out documents."""

import collections
import gzip
import pathlib
import re

import numpy as np

from benchmarks.evidence.large.data import needed

LINUX = pathlib.Path("/usr/share/doc/linux-doc/Documentation")
DICTIONARY = pathlib.Path("/usr/share/dictd/gcide.dict.dz")

# One document in so many is held out.
HELD_OUT_EVERY = 50

_SOURCE = re.compile(r"\[[^\]]*(?:webster|wordnet|pjc)[^\]]*\]|\\[^\\]*\\")
_WORD = re.compile(r"[a-z]+|[.,;:]")
END, UNKNOWN = "<end>", "<unknown>"


def linux_documentation(folder: pathlib.Path = LINUX) -> dict[str, np.ndarray]:
    """The documentation of Linux in English as bytes, whole files held out.

    It has 21 MB in 3000 files. Returns `train` and `held_out`, each (n,) uint8.
    """
    root = needed(folder, "apt-get install linux-doc")
    files = sorted(
        path for path in root.rglob("*.rst.gz") if "translations" not in path.parts
    )

    def text(paths: list[pathlib.Path]) -> np.ndarray:
        return np.frombuffer(b"".join(map(_unzipped, paths)), np.uint8)

    train = [path for i, path in enumerate(files) if i % HELD_OUT_EVERY]
    return {"train": text(train), "held_out": text(files[::HELD_OUT_EVERY])}


def dictionary(
    vocabulary: int, path: pathlib.Path = DICTIONARY
) -> dict[str, np.ndarray]:
    """The words of an English dictionary, whole entries held out.

    It has 40 MB. Letters are lower-case; sources and pronunciations are left out. The
    tokens are the most frequent words and marks, `END` after each entry, and `UNKNOWN`
    for all other words. Returns `train` and `held_out`, each (n,) int32.
    """
    text = _unzipped(needed(path, "apt-get install dict-gcide")).decode("latin-1")
    # The lines of an entry after its first are indented.
    entries = re.split(r"\n(?=\S)", _SOURCE.sub("", text.lower()))
    words = [[*_WORD.findall(entry), END] for entry in entries]
    train = [
        word for i, each in enumerate(words) if i % HELD_OUT_EVERY for word in each
    ]
    held_out = [word for each in words[::HELD_OUT_EVERY] for word in each]
    kept = collections.Counter(train).most_common(vocabulary - 1)
    tokens = {word: i for i, (word, _) in enumerate([(UNKNOWN, 0), *kept])}

    def numbered(words: list[str]) -> np.ndarray:
        return np.array([tokens.get(word, 0) for word in words], np.int32)

    return {"train": numbered(train), "held_out": numbered(held_out)}


def _unzipped(path: pathlib.Path) -> bytes:
    return gzip.decompress(path.read_bytes())
