"""Train a convolutional network on Fashion-MNIST, with no rate to tune.

AdamW at its usual 1e-3 with adapt_on_progress, and SALSA, are compared with momentum
SGD at a constant rate, with momentum SGD under a cosine schedule whose peak was tuned
on validation images, and with AdamW under a cosine schedule. Each model is evaluated at
the last iterate, and at the average over the newest iterates. The network has batch
norm and dropout. `train_step` shows what the line search of SALSA then needs, and
`with_running_averages` what an averaged model needs. The picture shows what
adapt_on_progress did, and why. On all the images:

    python examples/fashion_mnist.py --train-size 55000 --epochs 30 --out demo
"""

import argparse
import dataclasses
import gzip
import itertools
import json
import pathlib
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sasa_optax

# Of normalised momentum: 1.0 moves like optax.sgd(0.1, momentum=0.9).
LEARNING_RATE = 1.0
COSINE_PEAKS = (0.1, 0.3, 1.0, 3.0)
WEIGHT_DECAY = 5e-4
USUAL_RATE = 1e-3
ADAMW_PEAK = 1e-2
ADAMW_DECAY = 0.1
BATCH_NORM_MOMENTUM = 0.9
NUM_RENEWALS = 66  # after which a thousandth of the old running averages is left
DROPOUT_RATE = 0.2
NUM_VALIDATION = 5000
RECORD_EVERY = 25

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
CACHE = pathlib.Path("~/.cache/fashion-mnist").expanduser()
MIRRORS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

Event = sasa_optax.Cut | sasa_optax.Drop | sasa_optax.Switch
Split = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class FashionMnist:
    """Images as (n, 28, 28) uint8, with their labels; all on the device."""

    train: Split
    validation: Split
    test: Split


def find_data(folder: pathlib.Path | None) -> pathlib.Path:
    """A folder with the files: the given one, or else Debian's or the cache."""
    places = [DEBIAN, CACHE] if folder is None else [folder]
    for place in places:
        if all((place / name).is_file() for name in FILES):
            return place
    tried = [f"{place}: no such files" for place in places]
    for mirror in MIRRORS:
        try:
            download(mirror, places[-1])
            return places[-1]
        except Exception as error:  # Another mirror may work, whatever the error.
            tried.append(f"{mirror}: {error}")
    raise SystemExit(
        "\n  ".join(["Fashion-MNIST is needed. Tried:", *tried])
        + "\nOn Debian and Ubuntu, `apt install dataset-fashion-mnist` brings it."
        + f"\nOr download into {places[-1]}, from {MIRRORS[0]}:\n  "
        + "\n  ".join(FILES)
    )


def download(mirror: str, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with urllib.request.urlopen(f"{mirror}/{name}", timeout=30) as response:
            content = response.read()
        gzip.decompress(content)  # This verifies the checksum.
        # Under its final name only when complete, in case the download is interrupted.
        part = folder / f"{name}.part"
        part.write_bytes(content)
        part.rename(folder / name)


def read_idx(path: pathlib.Path) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    num_dimensions = content[3]
    shape = np.frombuffer(content, ">i4", num_dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def load(folder: pathlib.Path, train_size: int) -> FashionMnist:
    arrays = [jnp.asarray(read_idx(folder / name)) for name in FILES]
    images, labels, test_images, test_labels = arrays
    rest = len(labels) - NUM_VALIDATION
    kept = min(train_size, rest)
    return FashionMnist(
        train=(images[:kept], labels[:kept]),
        validation=(images[rest:], labels[rest:]),
        test=(test_images, test_labels),
    )


class Cnn(nnx.Module):
    """Two convolutions with batch norm, dropout, and a linear layer.

    It has large strides instead of pooling, since convolutions take most of the time
    on a CPU.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, (4, 4), strides=4, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=BATCH_NORM_MOMENTUM, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=BATCH_NORM_MOMENTUM, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT_RATE, rngs=rngs)
        self.logits = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., None] / 255.0
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.logits(self.dropout(x.reshape(len(x), -1)))


def loss_fn(model: Cnn, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(
    model: Cnn, optimizer: nnx.Optimizer, data: Split, rows: np.ndarray
) -> jax.Array:
    images, labels = (array[rows] for array in data)
    model.train()
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def value_fn(params: nnx.State) -> jax.Array:
        # The running averages and the random state are those of the model itself. In
        # inference mode neither changes.
        frozen = nnx.merge(graphdef, params, rest)
        frozen.eval()
        return loss_fn(frozen, images, labels)

    # adapt_on_progress needs the loss of the step. SALSA compares losses, so dropout
    # must not make them random. That is why value_fn is in inference mode, and why
    # SALSA gets no `value`: the loss above is another function. All others ignore both.
    searches = optax.tree.get(optimizer.opt_state, "line_search_active") is not None
    optimizer.update(model, grads, value=None if searches else loss, value_fn=value_fn)
    return loss


@nnx.jit
def accuracy(model: Cnn, images: jax.Array, labels: jax.Array) -> jax.Array:
    """In percent."""
    model.eval()
    return 100 * jnp.mean(jnp.argmax(model(images), axis=-1) == labels)


def averaged(model: Cnn, optimizer: nnx.Optimizer) -> Cnn:
    """The averaged model, whose batch norm still has the iterate's statistics."""
    average = nnx.clone(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(average, sasa_optax.averaged_params(optimizer.opt_state, params))
    return average


@nnx.jit
def renew_batch_norm(model: Cnn, images: jax.Array) -> None:
    """Moves the running averages towards those of a mini-batch. Nothing else moves."""
    model.train()
    model(images)


def with_running_averages(model: Cnn, data: Split, batch_size: int) -> Cnn:
    """The model with running averages of its own, from the first mini-batches."""
    for i in range(NUM_RENEWALS):
        rows = np.arange(i * batch_size, (i + 1) * batch_size) % len(data[1])
        renew_batch_norm(model, data[0][rows])
    return model


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to set the rate.

    Attributes:
      name: its name in the table.
      transformation: the optimizer, which is given the loss, or the loss as a function
        if it searches along a line.
      rate: the final rate, before the scale of a controller; None if it is found.
      has_history: whether there is something to record.
    """

    name: str
    transformation: optax.GradientTransformation
    rate: float | None = None
    has_history: bool = False


def adaptive() -> Contender:
    adamw = optax.adamw(USUAL_RATE, weight_decay=ADAMW_DECAY)
    optimizer = optax.chain(adamw, sasa_optax.adapt_on_progress())
    return Contender("AdamW, adapt_on_progress", optimizer, USUAL_RATE, True)


def salsa(steps_per_epoch: int, search_interval: int) -> Contender:
    optimizer = sasa_optax.salsa(
        steps_per_epoch=steps_per_epoch,
        weight_decay=WEIGHT_DECAY,
        search=sasa_optax.LineSearch(interval=search_interval),
    )
    return Contender("SALSA, nothing tuned", optimizer, has_history=True)


def with_average(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    return optax.chain(optimizer, sasa_optax.average_iterates())


def cosine(peak: float, num_steps: int) -> Contender:
    schedule = optax.cosine_decay_schedule(peak, num_steps)
    optimizer = with_average(sasa_optax.qhm(schedule, weight_decay=WEIGHT_DECAY))
    return Contender(f"momentum, cosine {peak:g}", optimizer, 0.0)


def constant(rate: float) -> Contender:
    optimizer = with_average(sasa_optax.qhm(rate, weight_decay=WEIGHT_DECAY))
    return Contender(f"momentum, constant {rate:g}", optimizer, rate)


def adamw_cosine(peak: float, num_steps: int) -> Contender:
    schedule = optax.cosine_decay_schedule(peak, num_steps)
    optimizer = with_average(optax.adamw(schedule, weight_decay=ADAMW_DECAY))
    return Contender(f"AdamW, cosine {peak:g}", optimizer, 0.0)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: its accuracies in percent, and its time."""

    seed: int
    validation: float
    test: float
    averaged: float
    seconds: float
    final_rate: float
    history: sasa_optax.History

    @property
    def evaluations_per_step(self) -> float:
        """Evaluations of the loss in a step, while SALSA searched for the rate."""
        last, switch = self.history.rows[-1], self.history.switch
        return last.get("num_evaluations", 0) / (
            switch.step if switch else last["step"]
        )

    @property
    def num_cuts(self) -> int:
        return len(self.history.drops) + len(self.history.cuts)

    def to_json(self) -> dict[str, object]:
        fields = {name: x for name, x in vars(self).items() if name != "history"}
        if self.history.rows:
            fields["num_cuts"] = self.num_cuts
            fields["evaluations_per_step"] = self.evaluations_per_step
            fields["events"] = self.history.explain().splitlines()
        return fields


def shuffled_rows(
    num_rows: int, batch_size: int, epochs: int, seed: int
) -> Iterator[np.ndarray]:
    """The rows of each mini-batch. An incomplete mini-batch is left out."""
    shuffle = np.random.default_rng(seed)
    for _ in range(epochs):
        order = shuffle.permutation(num_rows)
        for start in range(0, num_rows - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def train(
    contender: Contender,
    data: FashionMnist,
    batches: Iterator[np.ndarray],
    *,
    batch_size: int,
    seed: int,
    advance: Callable[[int], None],
    report: Callable[[Event], None],
) -> Run:
    """Trains from scratch, and reports the events of a controller."""
    started = time.perf_counter()
    model = Cnn(nnx.Rngs(seed))
    transformation = optax.with_extra_args_support(contender.transformation)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    step = nnx.cached_partial(train_step, model, optimizer)
    history = sasa_optax.History()
    while rows := list(itertools.islice(batches, RECORD_EVERY)):
        losses = jnp.stack([step(data.train, each) for each in rows])
        if contender.has_history:
            metrics = sasa_optax.metrics(optimizer.opt_state)
            if event := history.record(metrics, loss=losses.mean()):
                report(event)
        advance(len(rows))
    average = averaged(model, optimizer)
    average = with_running_averages(average, data.train, batch_size)
    return Run(
        seed=seed,
        validation=float(accuracy(model, *data.validation)),
        test=float(accuracy(model, *data.test)),
        averaged=float(accuracy(average, *data.test)),
        seconds=time.perf_counter() - started,
        final_rate=final_rate(contender, history),
        history=history,
    )


def final_rate(contender: Contender, history: sasa_optax.History) -> float:
    if contender.rate is None:
        return history.rows[-1]["learning_rate"]
    return contender.rate * (history.rows[-1]["scale"] if history.rows else 1)


def train_all(
    contenders: list[Contender],
    data: FashionMnist,
    args: argparse.Namespace,
    console: Console,
) -> dict[str, list[Run]]:
    """The runs of each contender, one for each seed, by the contender's name."""
    num_rows = len(data.train[1])
    num_steps = args.epochs * (num_rows // args.batch_size)
    results: dict[str, list[Run]] = {}
    with Progress(console=console) as progress:
        total = len(contenders) * args.seeds * num_steps
        task = progress.add_task("training", total=total)
        for contender in contenders:
            progress.update(task, description=contender.name)
            results[contender.name] = [
                train(
                    contender,
                    data,
                    shuffled_rows(num_rows, args.batch_size, args.epochs, seed),
                    batch_size=args.batch_size,
                    seed=seed,
                    advance=lambda steps: progress.advance(task, steps),
                    report=lambda event, name=contender.name: console.print(
                        f"{name}, {event}"
                    ),
                )
                for seed in range(args.seed, args.seed + args.seeds)
            ]
    return results


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def summary(name: str, runs: list[Run]) -> list[str]:
    """A row of the table: means and standard deviations over the seeds."""
    recorded = [run for run in runs if run.history.rows]
    rates = sorted({run.final_rate for run in runs})
    cuts = sorted({run.num_cuts for run in recorded})
    evaluations = [x for run in recorded if (x := run.evaluations_per_step)]
    return [
        name,
        mean_and_spread([run.test for run in runs]),
        mean_and_spread([run.averaged for run in runs]),
        ", ".join(f"{rate:.2g}" for rate in rates),
        ", ".join(map(str, cuts)) or "-",
        f"{statistics.mean(evaluations):.2f}" if evaluations else "-",
        f"{statistics.mean(run.seconds for run in runs):.1f}",
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--epochs", type=int, default=20, help="SALSA searches for about eight")
    add("--batch-size", type=int, default=128)
    add("--train-size", type=int, default=30000, help="at most 55000")
    add("--seeds", type=int, default=1, help="runs of each kind")
    add("--seed", type=int, default=0, help="the first of the seeds")
    add("--peaks", type=float, nargs="+", default=COSINE_PEAKS, help="of the cosine")
    add("--search-interval", type=int, default=1, help="steps between SALSA's searches")
    add("--data", type=pathlib.Path, help=f"default: {DEBIAN}, else {CACHE}")
    add("--out", type=pathlib.Path, default=pathlib.Path("demo"))
    args = parser.parse_args()
    if min(args.epochs, args.seeds, args.batch_size) < 1:
        parser.error("--epochs, --seeds and --batch-size must be at least 1")
    if args.train_size < args.batch_size:
        parser.error("--train-size must be at least --batch-size")
    return args


def print_table(console: Console, rows: list[list[str]]) -> None:
    table = Table(title="Fashion-MNIST: ways to set the learning rate")
    table.add_column("\noptimizer", no_wrap=True)
    for column in (
        "last,\ntest %",
        "averaged,\ntest %",
        "final\nrate",
        "\ncuts",
        "evals\na step",
        "s a\nrun",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def save(
    args: argparse.Namespace, results: dict[str, list[Run]], history: sasa_optax.History
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    history.plot(args.out / "fashion_mnist.png")
    runs = {name: [run.to_json() for run in runs] for name, runs in results.items()}
    text = json.dumps({"args": vars(args), "runs": runs}, indent=2, default=str)
    (args.out / "fashion_mnist.json").write_text(text + "\n")


def main() -> None:
    args = parse_args()
    console = Console()
    data = load(find_data(args.data), args.train_size)
    steps_per_epoch = len(data.train[1]) // args.batch_size
    num_steps = args.epochs * steps_per_epoch
    console.print(
        f"{len(data.train[1])} training images, {steps_per_epoch} steps an epoch, "
        f"{num_steps} steps a run, {args.seeds} of each kind."
    )
    untuned = [adaptive(), salsa(steps_per_epoch, args.search_interval)]
    cosines = [cosine(peak, num_steps) for peak in args.peaks]
    others = [constant(LEARNING_RATE), adamw_cosine(ADAMW_PEAK, num_steps)]
    results = train_all([*untuned, *cosines, *others], data, args, console)

    def validation(contender: Contender) -> float:
        return statistics.mean(run.validation for run in results[contender.name])

    for each in cosines:
        console.print(f"{each.name}: {validation(each):.2f} % of validation images")
    shown = [*untuned, max(cosines, key=validation), *others]
    print_table(console, [summary(each.name, results[each.name]) for each in shown])
    history = results[untuned[0].name][0].history
    save(args, results, history)
    picture = args.out / "fashion_mnist.png"
    console.print(f"What adapt_on_progress did, and why: {picture}")


if __name__ == "__main__":
    main()
