"""The tables of docs/validity.md."""

from collections.abc import Callable, Sequence

from benchmarks.publishing import MINUS, Row, made_by, markdown, newest
from benchmarks.validity.coverage import STATISTICS, WINDOWS

# A method is to be early in no more than this share of the runs.
TARGET = 0.1

# The rows of a section, by cell and method.
Cells = dict[tuple[str, str], Row]


def by_place(rows: Sequence[Row], section: str) -> Cells:
    chosen = [row for row in rows if row["section"] == section]
    return {(row["cell"]["name"], row["method"]): row for row in chosen}


def names_in(cells: Cells) -> tuple[list[str], list[str]]:
    """The cells and the methods, each once, in order."""
    names, methods = zip(*cells, strict=True)
    return list(dict.fromkeys(names)), list(dict.fromkeys(methods))


def first_drop_methods(cells: Cells) -> list[str]:
    """The methods whose first drop is not that of another method."""
    return [name for name in names_in(cells)[1] if not name.endswith(", scaled")]


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.0f}"


def number(x: float) -> str:
    return f"{x:.1f}".replace("-", MINUS)


def settings_table(cells: Cells) -> str:
    keys = "dimension", "condition", "relaxation", "distance", "noise", "momentum"

    def line(row: Row) -> list[str]:
        values = (row["cell"][key] for key in keys)
        texts = (f"{x:g}" if isinstance(x, float) else str(x) for x in values)
        return [row["cell"]["name"], *texts, number(row["settled"])]

    # One row for each cell; a series has no dimension.
    rows = {name: row for (name, _), row in cells.items() if "dimension" in row["cell"]}
    return markdown(["cell", *keys, "settled"], map(line, rows.values()))


def methods_table(
    cells: Cells, methods: Sequence[str], content: Callable[[Row], str]
) -> str:
    def line(name: str) -> list[str]:
        rows = (cells.get((name, method)) for method in methods)
        return [name, *("" if row is None else content(row) for row in rows)]

    heads = ["cell", *(f"`{method}`" for method in methods)]
    return markdown(heads, map(line, names_in(cells)[0]), num_left=len(heads))


def first_drop_text(row: Row) -> str:
    if row["never"] == 1:
        return "never"
    text = f"{percent(row['early'])} % · {number(row['delay'][1])}"
    if "excess" in row:
        text += f" · x{row['excess'][1]:.2g}"
    return text + (f" · never {percent(row['never'])} %" if row["never"] else "")


def last_text(row: Row) -> str:
    text = f"{row['drops'][1]:g} · {row['rate'][1]:.0e}"
    if row["collapsed"]:
        text += f" · collapsed {percent(row['collapsed'])} %"
    if row["second_early"]:
        text += f" · 2nd early {percent(row['second_early'])} %"
    return text


def target_line(cells: Cells, method: str) -> str:
    """Where a method misses the target, and by how much."""
    rows = [row for (_, name), row in cells.items() if name == method]
    missed = [row for row in rows if row["early"] > TARGET]
    line = f"- `{method}` meets it in {len(rows) - len(missed)} of {len(rows)} cells"
    distances = (
        f"{row['cell']['name']} {100 * (row['early'] - TARGET):.0f}" for row in missed
    )
    return line + (f"; points above: {', '.join(distances)}" if missed else "") + "."


def possible_line(cells: Cells) -> str:
    counts: dict[str, list[int]] = {}
    for (_, method), row in cells.items():
        if "possible" in row:
            counts.setdefault(method, []).append(row["possible"])
    texts = (f"`{name}` {min(n)} to {max(n)}" for name, n in counts.items())
    return "Drops of a run cut as soon as it has settled: " + ", ".join(texts) + "."


def columns_of(row: Row) -> list[str]:
    """A row as it is printed when it is measured."""
    names = [row["cell"]["name"], row["method"]]
    if row["section"] == "drops":
        return [*names, first_drop_text(row), last_text(row)]
    return [*names, *(f"n = {n}: {percent(x)} %" for n, x in row["coverage"].items())]


def coverage_table(cells: Cells) -> str:
    def line(name: str) -> list[str]:
        held = [cells[name, s]["coverage"] for s in STATISTICS if (name, s) in cells]
        return [name, *(percent(x) for row in held for x in row.values())]

    heads = [f"{s}, n = {n}" for s in STATISTICS for n in WINDOWS]
    return markdown(["cell", *heads], map(line, names_in(cells)[0]))


def made_line(rows: Sequence[Row], results: str) -> str:
    made = made_by("make validity", newest(rows))
    return f"{made} Every number is in `benchmarks/results/{results}`."


def drop_tables(cells: Cells) -> list[str]:
    firsts = first_drop_methods(cells)
    return [
        "**The cells**",
        settings_table(cells),
        "**The first drop: share of runs in which it is early · median delay · median "
        "excess loss**",
        methods_table(cells, firsts, first_drop_text),
        "Target: at most 10 % early in every cell.",
        "\n".join(target_line(cells, method) for method in firsts),
        "**The end of the run: drops · what is left of the rate**",
        methods_table(cells, names_in(cells)[1], last_text),
        possible_line(cells),
    ]


def page_content(rows: Sequence[Row]) -> str:
    parts = []
    if cells := by_place(rows, "drops"):
        parts += drop_tables(cells)
    if cells := by_place(rows, "coverage"):
        parts += ["**Windows whose interval holds zero, %**", coverage_table(cells)]
    return "\n\n".join([*parts, made_line(rows, "validity.json")])
