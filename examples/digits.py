"""Train a Flax NNX model on scikit-learn's handwritten digits, with no rate to tune.

AdamW with adapt_on_progress runs from three initial rates. It is compared with AdamW at
a constant rate, with AdamW under a cosine schedule whose peak was tuned on validation
images, and with the papers' methods SALSA and SASA+. Each model is evaluated twice: at
the last iterate, and at the average over the newest iterates. The picture shows what
adapt_on_progress did, and why.

    python examples/digits.py --epochs 400 --seeds 3 --out demo
"""

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import sasa_optax

ADAMW_RATE = 1e-3
ADAMW_DECAY = 0.1
COSINE_PEAKS = (1e-3, 3e-3, 1e-2, 3e-2)
INITIAL_RATES = (1e-3, 1e-5, 1e-2)
# Of normalised momentum: 1.0 moves like optax.sgd(0.1, momentum=0.9).
SASA_PLUS_RATE = 1.0
MOMENTUM_DECAY = 1e-3
RECORD_EVERY = 25

Array = jax.Array | np.ndarray
Event = sasa_optax.Cut | sasa_optax.Drop | sasa_optax.Switch


class Mlp(nnx.Module):
    """Two hidden layers on the 64 pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden1 = nnx.Linear(64, 128, rngs=rngs)
        self.hidden2 = nnx.Linear(128, 128, rngs=rngs)
        self.logits = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: Array) -> jax.Array:
        x = nnx.relu(self.hidden1(jnp.asarray(images)))
        return self.logits(nnx.relu(self.hidden2(x)))


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images as (n, 64) float32 in [0, 1], with their labels."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load() -> Digits:
    # Arrays, but where pandas is installed their types say that they may be frames.
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = (pixels / 16).astype(np.float32)
    rest, test = split(images, labels, 400)
    train, validation = split(*rest, 200)
    return Digits(train, validation, test)


def split(
    images: np.ndarray, labels: np.ndarray, num_held_out: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The images and labels that stay, then those held out; the same in every run."""
    parts = train_test_split(
        images, labels, test_size=num_held_out, random_state=0, stratify=labels
    )
    stay, out, stay_labels, out_labels = (np.asarray(part) for part in parts)
    return (stay, stay_labels), (out, out_labels)


def shift(images: Array, key: jax.Array) -> jax.Array:
    """Moves each image by up to a pixel in each direction."""
    padded = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    crop = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, at, (8, 8)))
    return crop(padded, corners).reshape(-1, 64)


def loss_fn(model: Mlp, images: Array, labels: Array) -> jax.Array:
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(
    model: Mlp,
    optimizer: nnx.Optimizer,
    rngs: nnx.Rngs,
    images: Array,
    labels: Array,
) -> jax.Array:
    shifted = shift(images, rngs.shift())
    loss, grads = nnx.value_and_grad(loss_fn)(model, shifted, labels)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def value_fn(params: nnx.State) -> jax.Array:
        return loss_fn(nnx.merge(graphdef, params, rest), shifted, labels)

    # adapt_on_progress needs the value, and a line search needs the function too. All
    # others ignore both.
    optimizer.update(model, grads, value=loss, value_fn=value_fn)
    return loss


@nnx.jit
def accuracy(model: Mlp, images: Array, labels: Array) -> jax.Array:
    """In percent."""
    return 100 * jnp.mean(jnp.argmax(model(images), axis=-1) == labels)


def averaged(model: Mlp, optimizer: nnx.Optimizer) -> Mlp:
    """The averaged model. The model that is trained stays as it is."""
    average = nnx.clone(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(average, sasa_optax.averaged_params(optimizer.opt_state, params))
    return average


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: its accuracies in percent, and its time."""

    validation: float
    test: float
    averaged: float
    seconds: float
    history: sasa_optax.History


def train(
    transformation: optax.GradientTransformation,
    digits: Digits,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    advance: Callable[[], None],
    report: Callable[[Event], None] | None = None,
) -> Run:
    """Trains from scratch. With ``report``, keeps and reports a history of events."""
    started = time.perf_counter()
    model = Mlp(nnx.Rngs(seed))
    transformation = optax.with_extra_args_support(transformation)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    step = nnx.cached_partial(train_step, model, optimizer, nnx.Rngs(shift=seed))
    history, losses = sasa_optax.History(), []
    shuffle = np.random.default_rng(seed)
    images, labels = digits.train
    for _ in range(epochs):
        order = shuffle.permutation(len(labels))
        for start in range(0, len(labels) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            losses.append(step(images[rows], labels[rows]))
            if report is not None and len(losses) == RECORD_EVERY:
                metrics = sasa_optax.metrics(optimizer.opt_state)
                event = history.record(metrics, loss=jnp.mean(jnp.stack(losses)))
                if event is not None:
                    report(event)
                losses.clear()
        advance()
    return Run(
        validation=float(accuracy(model, *digits.validation)),
        test=float(accuracy(model, *digits.test)),
        averaged=float(accuracy(averaged(model, optimizer), *digits.test)),
        seconds=time.perf_counter() - started,
        history=history,
    )


def final_rate(run: Run, rate: float) -> float:
    """The rate that a run which began at ``rate`` ended with."""
    if not run.history.rows:
        return rate
    last = run.history.rows[-1]
    return last.get("learning_rate", rate * last["scale"])


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def summary(name: str, runs: list[Run], rate: float) -> list[str]:
    """A row of the table: means and standard deviations over the seeds."""
    rates = sorted({f"{final_rate(run, rate):.1g}" for run in runs}, key=float)
    histories = [run.history for run in runs if run.history.rows]
    cuts = {len(history.drops) + len(history.cuts) for history in histories}
    return [
        name,
        mean_and_spread([run.test for run in runs]),
        mean_and_spread([run.averaged for run in runs]),
        rates[0] if len(rates) == 1 else f"{rates[0]}-{rates[-1]}",
        ", ".join(map(str, sorted(cuts))) or "-",
        f"{statistics.mean(run.seconds for run in runs):.1f}",
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=400, help="at least 2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    digits = load()
    steps_per_epoch = len(digits.train[1]) // args.batch_size
    num_steps = args.epochs * steps_per_epoch
    seeds = range(args.seed, args.seed + args.seeds)
    console.print(
        f"{len(digits.train[1])} training images, {steps_per_epoch} steps an epoch, "
        f"{num_steps} steps a run, {args.seeds} seeds."
    )

    with Progress(console=console) as progress:
        total = (len(COSINE_PEAKS) + len(INITIAL_RATES) + 3) * args.seeds * args.epochs
        task = progress.add_task("training", total=total)

        def runs(
            name: str,
            transformation: optax.GradientTransformation,
            *,
            has_history: bool = False,
        ) -> list[Run]:
            def report(event: Event) -> None:
                console.print(f"{name}, {event}")

            progress.update(task, description=name)
            return [
                train(
                    transformation,
                    digits,
                    epochs=args.epochs,
                    batch_size=args.batch_size,
                    seed=seed,
                    advance=lambda: progress.advance(task),
                    report=report if has_history else None,
                )
                for seed in seeds
            ]

        adaptive = {
            rate: runs(
                f"AdamW from {rate:g} + adapt_on_progress",
                optax.chain(adamw(rate), sasa_optax.adapt_on_progress()),
                has_history=True,
            )
            for rate in INITIAL_RATES
        }
        average = sasa_optax.average_iterates()
        constant = runs("AdamW", optax.chain(adamw(ADAMW_RATE), average))
        cosines = {}
        for peak in COSINE_PEAKS:
            schedule = optax.cosine_decay_schedule(peak, num_steps)
            chain = optax.chain(adamw(schedule), average)
            cosines[peak] = runs(f"AdamW, cosine from {peak:g}", chain)
        papers = {
            "weight_decay": MOMENTUM_DECAY,
            "steps_per_epoch": steps_per_epoch,
            "average": True,
        }
        salsa = runs("SALSA", sasa_optax.salsa(**papers), has_history=True)
        sasa_plus = runs(
            "SASA+", sasa_optax.sasa_plus(SASA_PLUS_RATE, **papers), has_history=True
        )

    def validation(peak: float) -> float:
        return statistics.mean(run.validation for run in cosines[peak])

    best = max(COSINE_PEAKS, key=validation)
    title = "Digits: test accuracy of the last iterate and of the averaged model"
    table = Table(title=title, pad_edge=False, box=SIMPLE, collapse_padding=True)
    table.add_column("optimizer", no_wrap=True)
    for column in ("last, %", "averaged, %", "final rate", "cuts", "s"):
        table.add_column(column, justify="right")
    for rate, each in adaptive.items():
        table.add_row(*summary(f"adapt_on_progress, from {rate:g}", each, rate))
    table.add_row(*summary(f"AdamW, constant {ADAMW_RATE:g}", constant, ADAMW_RATE))
    table.add_row(*summary(f"AdamW, tuned cosine {best:g}", cosines[best], 0.0))
    table.add_row(*summary("SALSA, nothing tuned", salsa, 1.0))
    rate = SASA_PLUS_RATE
    table.add_row(*summary(f"SASA+ from {rate:g}", sasa_plus, rate))
    console.print(table)

    args.out.mkdir(parents=True, exist_ok=True)
    history = adaptive[ADAMW_RATE][0].history
    history.plot(args.out / "digits.png")
    history.to_csv(args.out / "digits.csv")
    history.to_jsonl(args.out / "digits.jsonl")
    console.print(
        f"What adapt_on_progress did from {ADAMW_RATE:g}, and why: "
        f"{args.out / 'digits.png'} (seed {seeds[0]})"
    )


def adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=ADAMW_DECAY)


if __name__ == "__main__":
    main()
