"""Does SALSA find the same rate if it searches only at every fifth or tenth step?

Trains the models of the examples for each interval and seed, and prints the rate
found, when the search ended, its cost, and the accuracy. The table in docs/salsa.md:

    python -m benchmarks.evidence.search_interval --seeds 3
"""

import argparse
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

from rich.progress import track

import sasa_optax
from benchmarks import publishing
from benchmarks.publishing import Row
from examples import digits, fashion_mnist

# A task maps an interval and a seed to the history of a run and its accuracy.
Task = Callable[[int, int], tuple[sasa_optax.History, float]]


def digits_task(epochs: int) -> Task:
    data, batch_size = digits.load(), 64
    steps_per_epoch = len(data.train[1]) // batch_size

    def train(interval: int, seed: int) -> tuple[sasa_optax.History, float]:
        run = digits.train(
            sasa_optax.salsa(
                steps_per_epoch=steps_per_epoch,
                weight_decay=digits.MOMENTUM_DECAY,
                search=sasa_optax.LineSearch(interval=interval),
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


def measure(task: Task, interval: int, seed: int) -> Row:
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
    """The lowest and the highest value, or the one that there is."""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def table(results: list[Row]) -> str:
    columns = [c for c in results[0] if c != "seed"]
    lines = []
    for interval in sorted({r["interval"] for r in results}):
        rows = [r for r in results if r["interval"] == interval]
        cells = [spread([r[c] for r in rows]) for c in columns[1:-1]]
        accuracy = statistics.mean(r[columns[-1]] for r in rows)
        lines.append([str(interval), *cells, f"{accuracy:.2f}"])
    return publishing.markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    results: dict[str, list[Row]] = {name: [] for name in tasks}
    runs: list[Any] = list(itertools.product(tasks, args.intervals, range(args.seeds)))
    for name, *arguments in track(runs, description="training"):
        results[name].append(measure(tasks[name], *arguments))
    for name, rows in results.items():
        print(f"\n{name}\n\n{table(rows)}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
