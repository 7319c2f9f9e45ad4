"""A `History` at a glance: a line for a terminal, and HTML for a notebook."""

import base64
import html
import io
from typing import TYPE_CHECKING

from sasa_optax._metrics import outlook
from sasa_optax._records import Row

if TYPE_CHECKING:
    from sasa_optax._history import History

_EMPTY = "nothing recorded yet"
# The rest of a record belongs to the tests and averages, which the picture shows.
_SHOWN = ("step", "loss", "learning_rate", "scale", "progress", "target")
_SHOWN += ("num_drops", "num_overshoots", "num_brakes", "num_nonfinite")
_MOST_LINES = 8


def status(history: "History") -> str:
    if not history.rows:
        return _EMPTY
    row = history.rows[-1]
    parts = [f"step {row['step']}"]
    parts += [f"loss {row['loss']:.3g}"] if "loss" in row else []
    rates = [name for name in ("learning_rate", "scale") if name in row]
    parts += [f"{_words(name)} {row[name]:.3g}" for name in rates[:1]]
    return "  ".join([*parts, *outlook(row)])


def as_html(history: "History") -> str:
    if not history.rows:
        return f"<p>History: {_EMPTY}.</p>"
    explained = history.explain().splitlines()
    left_out = len(explained) - _MOST_LINES
    if left_out > 0:
        explained = [f"({left_out} more before these)", *explained[-_MOST_LINES:]]
    lines = "<br>".join(map(html.escape, [status(history), *explained]))
    return f"{_table(history.rows[-1])}<p>{lines}</p>{_picture(history)}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _table(row: Row) -> str:
    names = [name for name in _SHOWN if name in row]
    heads = "".join(f"<th>{_words(name)}</th>" for name in names)
    cells = "".join(f"<td>{_number(row[name])}</td>" for name in names)
    return f"<table><tr>{heads}</tr><tr>{cells}</tr></table>"


def _number(x: float) -> str:
    return str(x) if isinstance(x, int) else f"{x:.4g}"


def _picture(history: "History") -> str:
    try:
        figure = history.plot()
    except ImportError:
        return ""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="the plot of the History" src="data:image/png;base64,{data}">'
