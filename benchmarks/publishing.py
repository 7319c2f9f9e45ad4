"""What all benchmarks share: results, provenance, tables and pages."""

import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

import sasa_optax

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
MINUS = "\N{MINUS SIGN}"

Row = dict[str, Any]


@functools.cache
def provenance() -> Row:
    """The machine, the versions and the commit behind a result."""
    names = "jax", "jaxlib", "optax", "flax", "numpy"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "sasa_optax": sasa_optax.__version__,
    }


def _version(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that is checked out, marked if files differ; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def made_by(command: str, made: Row) -> str:
    """A sentence on the command, the machine and the date behind a table."""
    device = made.get("device", "cpu").replace("cpu", "CPU")
    machine = f"{made['cores']}-core {made['architecture'].replace('_', '-')} {device}"
    return f"Made by `{command}` on a {machine}, JAX {made['jax']}, {made['date']}."


def newest(rows: Iterable[Row]) -> Row:
    """The provenance of the row that was measured last."""
    return max((row["made"] for row in rows), key=lambda made: made["date"])


def load(path: pathlib.Path) -> list[Row]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def save(rows: list[Row], path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def merged(rows: Iterable[Row], row: Row, place: Callable[[Row], Any]) -> list[Row]:
    """The rows, in which this one replaces the older one of the same place."""
    return list({place(each): each for each in [*rows, row]}.values())


def markdown(
    heads: Sequence[Any], rows: Iterable[Iterable[Any]], num_left: int = 1
) -> str:
    """A table, whose columns after the first ``num_left`` are right-aligned."""
    rule = ["---"] * num_left + ["--:"] * (len(heads) - num_left)
    lines = [heads, rule, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(page: pathlib.Path, parts: dict[str, str]) -> None:
    """Renews each named part of a page: `<!-- name -->` ... `<!-- /name -->`."""
    text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"{page} lacks the markers {start} and {end}.")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n\n{content}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")
