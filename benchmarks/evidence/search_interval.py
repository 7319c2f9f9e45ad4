"""Does SALSA find the same rate if it searches at every fifth or tenth step only?

Trains the models of the examples for each search interval and seed, and prints the
rates found, when the search ended, what it cost, and the result. The table of
docs/salsa.md:

    python benchmarks/search_interval.py --seeds 3
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sasa_optax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import digits
import fashion_mnist

# A task trains with an interval and a seed, and returns the history and the accuracy.
Task = Callable[[int, int], tuple[sasa_optax.History, float]]


def digits_task(epochs: int) -> Task:
    data, batch_size = digits.load(), 64
    steps_per_epoch = len(data.train[1]) // batch_size

    def train(interval: int, seed: int) -> tuple[sasa_optax.History, float]:
        run = digits.train(
            sasa_optax.salsa(
                steps_per_epoch=steps_per_epoch,
                weight_decay=digits.MOMENTUM_DECAY,
                search_interval=interval,
            ),
            data,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            advance=lambda: None,
            report=lambda event: None,
        )
        return run.history, run.test

    return train


def fashion_task(epochs: int) -> Task:
    data, batch_size = fashion_mnist.load(fashion_mnist.find_data(None), 55000), 128
    num_rows = len(data.train[1])

    def train(interval: int, seed: int) -> tuple[sasa_optax.History, float]:
        run = fashion_mnist.train(
            fashion_mnist.salsa(num_rows // batch_size, interval),
            data,
            fashion_mnist.shuffled_rows(num_rows, batch_size, epochs, seed),
            batch_size=batch_size,
            seed=seed,
            advance=lambda steps: None,
            report=lambda event: None,
        )
        return run.history, run.test

    return train


def measure(task: Task, interval: int, seed: int) -> dict[str, float]:
    history, accuracy = task(interval, seed)
    switch, last = history.switch, history.rows[-1]
    steps = switch.step if switch else last["step"]
    return {
        "interval": interval,
        "seed": seed,
        "rate found": switch.learning_rate if switch else last["learning_rate"],
        "search ended": steps,
        "evaluations a step": last["num_evaluations"] / steps,
        "drops": len(history.drops),
        "test accuracy, %": accuracy,
    }


def spread(values: list[float]) -> str:
    """Lowest to highest, or the one value."""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def show(name: str, results: list[dict[str, float]], console: Console) -> None:
    columns = [c for c in results[0] if c != "seed"]
    table = Table(*columns, title=f"{name}: SALSA's search interval")
    for interval in sorted({r["interval"] for r in results}):
        rows = [r for r in results if r["interval"] == interval]
        cells = [spread([r[c] for r in rows]) for c in columns[1:-1]]
        accuracy = statistics.mean(r[columns[-1]] for r in rows)
        table.add_row(str(interval), *cells, f"{accuracy:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--intervals", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--digits-epochs", type=int, default=400)
    parser.add_argument("--fashion-epochs", type=int, default=24)
    parser.add_argument("--out", type=pathlib.Path, help="also write the rows as JSON")
    args = parser.parse_args()
    tasks = {
        "digits": digits_task(args.digits_epochs),
        "Fashion-MNIST": fashion_task(args.fashion_epochs),
    }
    console, results = Console(), {name: [] for name in tasks}
    with Progress(console=console) as progress:
        total = len(tasks) * len(args.intervals) * args.seeds
        bar = progress.add_task("training", total=total)
        for name, task in tasks.items():
            for interval in args.intervals:
                for seed in range(args.seeds):
                    results[name].append(measure(task, interval, seed))
                    progress.advance(bar)
    for name, rows in results.items():
        show(name, rows, console)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
