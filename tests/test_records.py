"""The files of a History: what a job that is killed at any moment still has."""

import csv
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import sasa_optax


def _metrics(step: int) -> dict[str, Any]:
    state = sasa_optax.sasa_plus(0.5).init(jnp.zeros(3))
    return sasa_optax.metrics(state) | {"step": step}


def _steps(history: sasa_optax.History) -> list[float]:
    return [row["step"] for row in history.rows]


def _written(path: pathlib.Path, num_rows: int = 5) -> sasa_optax.History:
    history = sasa_optax.History(path)
    for step in range(num_rows):
        history.record(_metrics(step), loss=1.0 / (1 + step))
    return history


# What is refused.


@pytest.mark.parametrize(
    "value", [None, "high", 1j, 10**400, object(), np.complex64(1), b"x", {}]
)
def test_what_cannot_be_written_is_refused_by_name(value: Any) -> None:
    history = sasa_optax.History()
    with pytest.raises(ValueError, match=r"^note must be a real number"):
        history.record(_metrics(0), note=value)
    assert history.rows == []


@pytest.mark.parametrize("value", [[1.0], np.ones((2, 2)), jnp.ones(3)])
def test_an_array_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^note must be a scalar, got shape"):
        sasa_optax.History().record(_metrics(0), note=value)


@pytest.mark.parametrize("value", [True, 3, 0.5, np.float16(2), jnp.bfloat16(1.5)])
def test_real_numbers_of_any_kind_are_kept(value: Any) -> None:
    history = sasa_optax.History()
    history.record(_metrics(0), note=value)
    assert history.rows[0]["note"] == value
    assert type(history.rows[0]["note"]) in (bool, int, float)


def test_a_state_in_place_of_its_metrics_says_what_to_call() -> None:
    state: Any = sasa_optax.sasa_plus(0.5).init(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"sasa_optax\.metrics\(opt_state\)"):
        sasa_optax.History().record(state)


# Files that are replaced.


@pytest.mark.parametrize("name", ["to_csv", "to_jsonl"])
def test_a_write_that_fails_leaves_the_old_file(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, history = tmp_path / "run", _written(tmp_path / "log")
    getattr(history, name)(path)
    before = path.read_bytes()
    history.record(_metrics(9))

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dumps", fail)
    monkeypatch.setattr(csv.DictWriter, "writerows", fail)
    with pytest.raises(OSError, match="no space"):
        getattr(history, name)(path)
    assert path.read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["log", "run"]


# A file that grows.


def test_each_record_is_on_disk_at_once(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    history = sasa_optax.History(path)
    for step in range(3):
        history.record(_metrics(step), loss=float(step))
        lines = path.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(step + 1))


def test_a_run_that_starts_again_goes_on_in_the_same_file(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "run.jsonl"
    _written(path)
    again = sasa_optax.History(path)
    assert _steps(again) == [0, 1, 2, 3, 4]
    # It was restored from a checkpoint of step 2.
    again.record(_metrics(3), loss=7.0)
    again.record(_metrics(4))
    for history in (again, sasa_optax.History.from_jsonl(path)):
        assert _steps(history) == [0, 1, 2, 3, 4]
        assert history.rows[3]["loss"] == 7.0
        assert "loss" not in history.rows[4]


def test_a_file_cut_at_any_byte_has_all_whole_records(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    rows = _written(path).rows
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    newest = _metrics(99)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        # A record is there once its closing brace is, which precedes the line break.
        num_whole = sum(end <= size for end in ends)
        assert sasa_optax.History.from_jsonl(path).rows == rows[:num_whole]
        history = sasa_optax.History(path)
        history.record(newest, loss=0.0)
        assert history.rows[:-1] == rows[:num_whole]
        assert sasa_optax.History.from_jsonl(path).rows == history.rows


# Forked, as a new process would spend its time on imports. A writer holds plain
# numbers, so that no child touches a device. It writes byte by byte, since a line that
# is written at once is hardly ever cut.
_KILLER = """
import os, random, signal, sys, time
import sasa_optax
from sasa_optax import _records

def append(path, row):
    with open(path, "a") as file:
        for character in _records._line(row):
            file.write(character)
            file.flush()

_records.append = append
path, num_kills = sys.argv[1], int(sys.argv[2])
random.seed(0)
for _ in range(num_kills):
    num_rows = len(sasa_optax.History(path).rows)
    # Only a file as it was left says what a restart finds.
    told, tells = os.pipe()
    writer = os.fork()
    if not writer:
        history = sasa_optax.History(path)
        step = len(history.rows)
        os.write(tells, b"x")
        while True:
            step += 1
            history.record({"step": step, "progress": 0.5, "scale": 1 / step})
    os.read(told, 1)
    os.close(told), os.close(tells)
    time.sleep(random.uniform(0, 0.004))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    rows = sasa_optax.History.from_jsonl(path).rows
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= num_rows
print(len(rows))
"""


def test_a_writer_that_is_killed_a_hundred_times_loses_no_record(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "run.jsonl"
    path.touch()
    command = [sys.executable, "-W", "ignore", "-c", _KILLER, str(path), "100"]
    killer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killer.returncode == 0, killer.stderr
    assert int(killer.stdout) > 100


@pytest.mark.parametrize("line", ["{]", "nonsense", "[1, 2]", '{"loss": 1}', "\xff"])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    _written(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:], ""]), encoding="latin-1")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 3 is no"):
        sasa_optax.History.from_jsonl(path)


def test_blank_lines_are_skipped(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.jsonl"
    rows = _written(path).rows
    path.write_text("\n" + path.read_text().replace("\n", "\n  \n"))
    assert sasa_optax.History.from_jsonl(path).rows == rows


def test_a_record_does_not_look_at_all_before_it() -> None:
    class Rows(list):
        """Rows that may be looked at from their end, and not iterated over."""

        def __iter__(self) -> Any:
            raise AssertionError("a record looks at every row before it")

    history = sasa_optax.History()
    history.record(_metrics(0))
    history.rows = Rows(history.rows)
    for step in (1, 2, 3, 2, 4):
        history.record(_metrics(step))
    history.rows = list.copy(history.rows)
    assert _steps(history) == [0, 1, 2, 4]
