"""The table of an experiment: each method beside the hand-tuned schedule."""

import itertools
import math
import statistics
from collections.abc import Iterable

from benchmarks.papers.methods import methods_of
from benchmarks.papers.protocols import Protocol
from benchmarks.papers.runs import Key
from benchmarks.publishing import Row, made_by, markdown, newest

_NO_DROPS = "ssls", "adamw-progress", "sgd-progress"


def rows_of(rows: dict[Key, Row], protocol: Protocol, data: str) -> list[Row]:
    """The longest runs of an experiment on these data."""
    mine = [key for key in rows if key[:2] == (protocol.name, data)]
    most = max((key.epochs for key in mine), default=0)
    return [rows[key] for key in mine if key.epochs == most]


def table(rows: list[Row], protocol: Protocol) -> str:
    names = [name for name in methods_of(protocol) if of(rows, name)]
    heads = [
        "method",
        f"test {protocol.unit.replace('% error', 'error, %')}",
        "the best of all epochs",
        "training loss",
        "first rate",
        "last rate",
        "drops, by epoch",
        "CPU, s",
    ]
    body = [[f"`{name}`", *cells(of(rows, name), protocol, name)] for name in names]
    return markdown(heads, body)


def of(rows: Iterable[Row], name: str) -> list[Row]:
    return sorted((x for x in rows if x["method"] == name), key=lambda row: row["seed"])


def cells(runs: list[Row], protocol: Protocol, name: str) -> list[str]:
    first = runs[0]
    ends = [curve(row["test"], protocol) for row in runs]
    method = methods_of(protocol)[name]
    return [
        spread([each[-1] for each in ends]),
        spread([min(each) for each in ends]),
        spread([curve(row["train"])[-1] for row in runs], digits=3),
        f"{method.rates[0]:g}",
        f"{curve(first['rates'])[-1]:.2g}",
        "-" if name in _NO_DROPS else drops(first, method.is_scheduled),
        f"{statistics.mean(row['seconds'] for row in runs):.0f}",
    ]


def curve(values: list[float | None], protocol: Protocol | None = None) -> list[float]:
    """A curve of a run; of losses, as perplexities if the protocol asks for them."""
    numbers = [math.inf if x is None else x for x in values]
    if protocol is not None and protocol.unit == "perplexity":
        return [math.exp(x) for x in numbers]
    return numbers


def spread(values: list[float], digits: int = 2) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def drops(row: Row, is_scheduled: bool) -> str:
    """The epochs after which, or in which, the rate of a run dropped."""
    if is_scheduled:
        pairs = enumerate(itertools.pairwise(row["rates"]), start=1)
        epochs = [i for i, (old, new) in pairs if new < old]
    else:
        pairs = enumerate(itertools.pairwise([0, *row["drops"]]), start=1)
        epochs = [i for i, (old, new) in pairs if new > old]
    return ", ".join(map(str, epochs)) or "never"


def published(rows: dict[Key, Row], protocol: Protocol, data: str) -> str:
    """The table with its command, or the command alone where nothing was run."""
    command = f"python -m benchmarks.papers {protocol.name}"
    mine = rows_of(rows, protocol, data)
    if not mine:
        return f"Not run yet: `{command} --publish`."
    seeds = len({row["seed"] for row in mine})
    note = f"{mine[0]['epochs']} epochs, {seeds} {'seed' if seeds == 1 else 'seeds'}."
    return f"{table(mine, protocol)}\n\n{note} {made_by(command, newest(mine))}"
