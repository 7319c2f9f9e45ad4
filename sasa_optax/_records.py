"""The files of a `History`: written so that a kill at any moment loses no record."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import IO

Row = dict[str, bool | int | float]
Path = str | os.PathLike[str]


def _line(row: Row) -> str:
    finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
    return json.dumps(finite) + "\n"


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[IO[str]]:
    """A new file that takes the place of ``path`` once it is complete."""
    beside = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(beside, "w", newline="") as file:
            yield file
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(beside)
        raise


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with _replaced(path) as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    with _replaced(path) as file:
        file.writelines(map(_line, rows))


def append(path: Path, row: Row) -> None:
    with open(path, "a", newline="") as file:
        file.write(_line(row))


def mend(path: Path) -> None:
    """Ends the last line, or cuts it off if it is incomplete: a line may follow."""
    with open(path, "rb+") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        if _is_whole(content[start:]):
            file.write(b"\n")
        else:
            file.truncate(start)


def read(path: Path) -> Iterator[Row]:
    """The rows of a file of JSON lines, except a last line that was cut off."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and not _is_whole(line):
                return
            if line.strip():
                yield _parsed(line, f"{os.fspath(path)}, line {number}")


def _is_whole(line: bytes) -> bool:
    # A record is an object, so it is complete at its closing brace and not before.
    return line.rstrip().endswith(b"}")


def _parsed(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}.") from error
    if not isinstance(row, dict) or "step" not in row:
        raise ValueError(f"{place} is no record of a History, got {line!r}.")
    return {k: math.nan if v is None else v for k, v in row.items()}
