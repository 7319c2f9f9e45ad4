"""The tables and the picture of docs/performance.md."""

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

import sasa_optax
from benchmarks import publishing
from benchmarks.publishing import Row

TITLES = {
    "optimizer": "The optimizer's step alone",
    "controller": "The controller alone, a thousand parameters",
    "model": "A whole training step",
    "start": "Before the first step",
    "leaves": "Many small leaves",
    "peers": "Beside AdamW",
}
# The page that shows a section, and the command that makes it.
PAGES = {
    "performance": "make bench",
    "peers": "python -m benchmarks.performance --sections peers --publish",
}  # The rows of docs/evidence.md that docs/peers.md quotes, by table.
QUOTED = {
    "gaps": (
        "best tuned",
        "adamw-cosine",
        "schedule-free-sgd",
        "schedule-free-adamw",
        "prodigy-linear",
        "dog-averaged",
        "mechanize-adamw-cosine",
        "dadapt-adamw-cosine",
        "adamw-plateau",
        "adamw-1e-3-averaged",
        "sgd-constant-averaged",
        "sasa-plus",
        "salsa",
        "adamw-stationarity",
        "prodigy-stationarity-averaged",
        "prodigy-progress",
        "adamw-progress",
    ),
    "anytime": ("within the target", "ahead of schedule-free-sgd"),
    "large-anytime": (
        "within the target",
        "ahead of schedule-free-adamw-calibrated",
        "ahead of prodigy-linear",
    ),
}

# The heads of the columns of text, which come first.
TEXTS = {"parameters", "form", "", "beside"}


def ratio_cell(row: Row) -> str:
    low, high = row["quartiles"]
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"


def columns_of(row: Row) -> dict[str, str]:
    """The cells of a row, by the heads of its section's table."""
    if row["section"] == "controller":
        return {
            "form": row["form"],
            "": row["case"],
            "`optax.sgd`, µs": f"{row['baseline_us']:.2f}",
            "added, µs": f"{row['added_us']:.2f}",
        }
    cells = {"": row["case"], "beside": row["baseline"]}
    if row["section"] == "start":
        compiling = row["compile_s"] - row["baseline_compile_s"]
        state = row["state_kb"] - row["baseline_state_kb"]
        return cells | {
            "compiling, s more": f"{compiling:.2f}",
            "state, KB more": f"{state:.0f}",
        }
    if row["section"] == "leaves":
        compiling, plain = row["compile_s"], row["baseline_compile_s"]
        return {"parameters": row["tree"], **cells} | {
            "compiling, s": f"{compiling:.1f}",
            "times the plain one's": f"{compiling / plain:.1f}",
            "a step, ms": f"{row['ms']:.3g}",
            "ratio": ratio_cell(row),
        }
    cells = {"parameters": row["tree"], **cells}
    if row["section"] == "peers":
        # The window and what else does not grow with the parameters is left out.
        cells["copies in the state"] = f"{row['copies']:.0f}"
    cells |= {"ms": f"{row['ms']:.3g}", "ratio": ratio_cell(row)}
    if row["section"] == "model":
        return cells | {"temporary memory, MB more": f"{row['temporary_mb']:.1f}"}
    if row["section"] == "peers":
        cells["temporary memory"] = f"{100 * row['temporary']:.0f} %"
    if row["section"] == "optimizer":
        known = "temporary" in row
        temporary = f"{100 * row['temporary']:.1f} %" if known else ""
        passes = f"{row['bytes']:.1f} : {row['baseline_bytes']:.1f}" if known else ""
        cells |= {"temporary memory": temporary, "passes, by XLA's account": passes}
    return cells


def tables(rows: Sequence[Row]) -> str:
    """The table of each section, in which the rows of a tree are together."""
    trees = list(dict.fromkeys(row.get("tree") for row in rows))
    ordered = sorted(rows, key=lambda row: trees.index(row.get("tree")))
    parts = []
    for section, title in TITLES.items():
        if lines := [columns_of(row) for row in ordered if row["section"] == section]:
            heads = list(lines[0])
            num_left = len(TEXTS & lines[0].keys())
            table = publishing.markdown(heads, map(dict.values, lines), num_left)
            parts.append(f"### {title}\n\n{table}")
    return "\n\n".join(parts)


def quoted(evidence: str) -> dict[str, str]:
    """The rows of `QUOTED`, below the heads of their tables."""
    parts = {}
    for part, names in QUOTED.items():
        table = evidence.partition(f"<!-- {part} -->")[2]
        head, rule, *lines = table.partition(f"<!-- /{part} -->")[0].split("\n")[2:-2]
        rows = {line.split("|")[1].strip(" *"): line for line in lines}
        parts[part] = "\n".join([head, rule, *(rows[name] for name in names)])
    return parts


def page_of(row: Row) -> str:
    return row["section"] if row["section"] in PAGES else "performance"


def page_content(rows: Sequence[Row], command: str, results: str) -> str:
    made = publishing.made_by(command, publishing.newest(rows))
    about = (
        f"Every number, and where it comes from, is in `benchmarks/results/{results}`."
    )
    return f"{tables(rows)}\n\n{made} {about}"


def draw(rows: Sequence[Row], path: pathlib.Path, tree: str) -> None:
    """The ratios of the optimizers' steps on a tree, ours in blue."""
    found = [r for r in rows if r["section"] == "optimizer" and r["tree"] == tree]
    found.sort(key=lambda row: (row["baseline"], -row["ratio"]))
    own = set(dir(sasa_optax))
    figure = Figure(figsize=(7, 0.35 * len(found) + 1), layout="tight")
    axes = figure.subplots()
    labels = [f"{row['case']}  (beside {row['baseline']})" for row in found]
    colors = ["C0" if r["case"].split(",")[0] in own else "0.7" for r in found]
    ratios = [row["ratio"] for row in found]
    bars = axes.barh(labels, ratios, color=colors)
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"time of a step, plain one = 1; {tree} parameters", loc="right")
    figure.savefig(path, dpi=150)
