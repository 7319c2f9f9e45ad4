"""Train a small language model on the sources of Python's own standard library.

The model is a GRU (Flax NNX) that predicts the next character. The rate of Adam is set
in different ways: by adapt_on_progress from a rate that nobody tuned; constant;
constant, and cut by reduce_on_stationarity; by a cosine schedule whose peak was tuned;
and by SALSA, whose line search sees the batch of the step or the next one. Modules left
out of the training serve for validation, at the last iterate and at the average over
the newest iterates. One picture shows all validation losses, the other what
adapt_on_progress did, and why.

    python examples/char_lm.py --steps 1400 --seeds 1 --out demo
"""

import argparse
import dataclasses
import pathlib
import statistics
import sysconfig
import time
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sasa_optax

# Each module is a single file in Python 3.11 to 3.14.
TRAINING = (
    *("argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser"),
    *("contextlib", "copy", "csv", "dataclasses", "difflib", "dis", "doctest", "enum"),
    *("fractions", "ftplib", "functools", "gzip", "inspect", "ipaddress", "locale"),
    *("mailbox", "ntpath", "optparse", "os", "pdb", "pickle", "pickletools"),
    *("platform", "plistlib", "pydoc", "shutil", "socket", "statistics", "subprocess"),
    *("tarfile", "threading", "trace", "traceback", "typing", "uuid"),
)
HELD_OUT = ("gettext", "heapq", "pstats", "random", "smtplib", "tempfile", "textwrap")
CONTEXT = 64
VOCABULARY_SIZE = 97  # printable ASCII, newline, and one token for all other bytes
EMBEDDING_SIZE, HIDDEN_SIZE = 64, 128

USUAL_RATE = 1e-3  # AdamW's usual rate where nobody tunes it
LEARNING_RATE = 1e-2  # trains fast, and is too high in the end
COSINE_PEAK = 1e-2  # of 3e-3, 5e-3, 1e-2 and 2e-2 the last two were equally good
WEIGHT_DECAY = 0.1
# A window keeps the newest eighth of its samples, so the first test runs after 800
# steps.
WINDOW = sasa_optax.Window(min_samples=100, test_interval=50)
SEARCH_INTERVAL = 5
RECORD_EVERY = 25
VALIDATE_EVERY = 100

Array = jax.Array | np.ndarray
Event = sasa_optax.Cut | sasa_optax.Drop | sasa_optax.Switch


def tokens_of(modules: tuple[str, ...]) -> np.ndarray:
    """The concatenated sources, as (n,) uint8."""
    stdlib = pathlib.Path(sysconfig.get_path("stdlib"))
    text = b"".join((stdlib / f"{module}.py").read_bytes() for module in modules)
    table = np.full(256, VOCABULARY_SIZE - 1, np.uint8)
    table[ord(" ") : ord("~") + 1] = np.arange(95)
    table[ord("\n")] = 95
    return table[np.frombuffer(text, np.uint8)]


def windows(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """A context from each start, with the character after it."""
    return tokens[starts[:, None] + np.arange(CONTEXT + 1)]


def random_windows(
    tokens: np.ndarray, num_windows: int, random: np.random.Generator
) -> np.ndarray:
    return windows(tokens, random.integers(len(tokens) - CONTEXT, size=num_windows))


def validation_windows(num_windows: int = 256) -> np.ndarray:
    """Windows spread over the held-out modules; the same in every run."""
    tokens = tokens_of(HELD_OUT)
    starts = np.linspace(0, len(tokens) - CONTEXT - 1, num_windows)
    return windows(tokens, starts.astype(int))


class LanguageModel(nnx.Module):
    """A GRU, and the logits of each next character.

    It has no dropout, so the loss depends on the parameters and the batch alone.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCABULARY_SIZE, EMBEDDING_SIZE, rngs=rngs)
        cell = nnx.GRUCell(EMBEDDING_SIZE, HIDDEN_SIZE, rngs=rngs)
        self.gru = nnx.RNN(cell, rngs=rngs)
        self.logits = nnx.Linear(HIDDEN_SIZE, VOCABULARY_SIZE, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # The type of nnx.RNN allows for a carry, which this one does not return.
        hidden = cast(jax.Array, self.gru(self.embedding(tokens)))
        return self.logits(hidden)


def loss_fn(model: LanguageModel, batch: Array) -> jax.Array:
    """In nats a character."""
    tokens = jnp.asarray(batch, jnp.int32)
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


@nnx.jit
def train_step(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    batch: Array,
    search_batch: Array | None,
) -> jax.Array:
    """A step on ``batch``. A line search sees ``search_batch``, if there is one."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def value_fn(params: nnx.State) -> jax.Array:
        # nnx.RNN counts the random keys that it draws. Inside a line search only a copy
        # may change.
        copied = nnx.merge(graphdef, params, rest, copy=True)
        return loss_fn(copied, batch if search_batch is None else search_batch)

    # The line search needs value_fn, and its value if that is known. On another batch
    # the loss is another function, whose value is not known.
    optimizer.update(
        model,
        grads,
        grad=grads,
        value=loss if search_batch is None else None,
        value_fn=value_fn,
    )
    return loss


validation_loss = nnx.jit(loss_fn)


def averaged(model: LanguageModel, optimizer: nnx.Optimizer) -> LanguageModel:
    """The averaged model. The model that is trained stays as it is."""
    average = nnx.clone(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(average, sasa_optax.averaged_params(optimizer.opt_state, params))
    return average


class Method(NamedTuple):
    """A row of the table."""

    name: str
    transformation: optax.GradientTransformation
    rate: float  # the final rate, unless it is found; before the scale of a controller
    has_history: bool = False
    searches_next_batch: bool = False


def adam_with_salsa(
    sufficient_decrease: float | None = None,
) -> optax.GradientTransformation:
    """AdamW without a rate, which SALSA finds.

    SALSA searches along Adam's update, since the gradient has another scale.
    """
    search = sasa_optax.LineSearch(
        direction="update",
        interval=SEARCH_INTERVAL,
        sufficient_decrease=sufficient_decrease,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(WEIGHT_DECAY),
        sasa_optax.scale_by_salsa(window=WINDOW, search=search),
    )


def methods(num_steps: int) -> list[Method]:
    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    reduced = sasa_optax.reduce_on_stationarity(window=WINDOW, average=True)
    average = sasa_optax.average_iterates()
    cosine = optax.cosine_decay_schedule(COSINE_PEAK, num_steps)
    # On the mini-batch that made them, Adam's updates look better than they are. So the
    # default asks for a larger decrease than the paper does.
    salsa, salsa_next = adam_with_salsa(), adam_with_salsa(sufficient_decrease=0.05)
    return [
        Method(
            f"AdamW {USUAL_RATE:g}, adapt_on_progress",
            optax.chain(
                optax.adamw(USUAL_RATE, weight_decay=WEIGHT_DECAY),
                sasa_optax.adapt_on_progress(),
            ),
            USUAL_RATE,
            has_history=True,
        ),
        Method(
            f"AdamW, constant {LEARNING_RATE:g}",
            optax.chain(adamw, average),
            LEARNING_RATE,
        ),
        Method(
            "  + reduce_on_stationarity",
            optax.chain(adamw, reduced),
            LEARNING_RATE,
            has_history=True,
        ),
        Method(
            f"AdamW, tuned cosine ({COSINE_PEAK:g})",
            optax.chain(optax.adamw(cosine, weight_decay=WEIGHT_DECAY), average),
            0.0,
        ),
        Method("Adam + SALSA, nothing tuned", salsa, 0.0, has_history=True),
        Method(
            "  search on the next batch",
            salsa_next,
            0.0,
            has_history=True,
            searches_next_batch=True,
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: validation losses by step, and its time."""

    validation: dict[int, float]
    averaged: dict[int, float]
    seconds: float
    history: sasa_optax.History


def train(
    method: Method,
    text: np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    advance: Callable[[], None],
    report: Callable[[Event], None],
) -> Run:
    """Trains from scratch, and keeps a history if the method has one."""
    started = time.perf_counter()
    model = LanguageModel(nnx.Rngs(seed))
    transformation = optax.with_extra_args_support(method.transformation)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    step_fn = nnx.cached_partial(train_step, model, optimizer)
    random, held_out = np.random.default_rng(seed), validation_windows()
    history, losses = sasa_optax.History(), []
    validation, of_average = {}, {}
    batch = random_windows(text, batch_size, random)
    for step in range(1, num_steps + 1):
        next_batch = random_windows(text, batch_size, random)
        search_batch = next_batch if method.searches_next_batch else None
        losses.append(step_fn(batch, search_batch))
        batch = next_batch
        if step % VALIDATE_EVERY == 0 or step == num_steps:
            validation[step] = validation_loss(model, held_out)
            of_average[step] = validation_loss(averaged(model, optimizer), held_out)
        if step % RECORD_EVERY == 0 or step == num_steps:
            if method.has_history:
                metrics = sasa_optax.metrics(optimizer.opt_state)
                event = history.record(metrics, loss=jnp.mean(jnp.stack(losses)))
                if event is not None:
                    report(event)
            losses.clear()
        advance()
    validation, of_average = jax.tree.map(float, (validation, of_average))
    return Run(validation, of_average, time.perf_counter() - started, history)


def final_rate(run: Run, rate: float) -> float:
    """The final rate of a run that would have ended at ``rate`` without drops."""
    if not run.history.rows:
        return rate
    last = run.history.rows[-1]
    return last.get("learning_rate", rate * last["scale"])


def evaluations_a_step(run: Run) -> str:
    """Evaluations of the loss in a step, while the line search went on."""
    if not run.history.rows or "num_evaluations" not in run.history.rows[-1]:
        return "-"
    last, switch = run.history.rows[-1], run.history.switch
    num_steps = last["step"] if switch is None else switch.step
    return f"{last['num_evaluations'] / num_steps:.2f}"


def joined(values: set[str]) -> str:
    return ", ".join(sorted(values))


def final(losses: dict[int, float]) -> float:
    return list(losses.values())[-1]


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def summary(method: Method, runs: list[Run]) -> list[str]:
    """A row of the table: means and standard deviations over the seeds."""
    histories = [run.history for run in runs if run.history.rows]
    cuts = {str(len(history.drops) + len(history.cuts)) for history in histories}
    return [
        method.name,
        mean_and_spread([final(run.validation) for run in runs]),
        mean_and_spread([final(run.averaged) for run in runs]),
        joined({f"{final_rate(run, method.rate):.2g}" for run in runs}),
        joined(cuts) or "-",
        joined({evaluations_a_step(run) for run in runs}),
        f"{statistics.mean(run.seconds for run in runs):.0f}",
    ]


def plot_validation(runs: dict[str, Run], path: pathlib.Path) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    # A diverged run must not hide the differences between the others.
    best = min(final(run.averaged) for run in runs.values())
    bottom, top = 0.95 * best, 1.45 * best
    for color, (name, run) in enumerate(runs.items()):
        is_outside = min(run.averaged.values()) > top
        note = f" (above {top:.1f} throughout)" if is_outside else ""
        ax.plot(*zip(*run.validation.items(), strict=True), f"C{color}-", alpha=0.3)
        averaged = zip(*run.averaged.items(), strict=True)
        ax.plot(*averaged, f"C{color}.-", label=name + note)
    ax.set(ylim=(bottom, top))
    ax.set(xlabel="step", ylabel="validation loss, nats a character")
    ax.set_title("averaged (pale: the last iterate)", fontsize="medium")
    ax.legend()
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=16, help="of contexts")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    text = tokens_of(TRAINING)
    console.print(
        f"{len(text)} characters to train on, {args.batch_size * CONTEXT} a step, "
        f"{args.steps} steps a run, {args.seeds} seeds."
    )
    seeds = range(args.seed, args.seed + args.seeds)
    table = Table(
        title="Standard library: validation loss, nats a character",
        pad_edge=False,
        box=SIMPLE,
        collapse_padding=True,
    )
    table.add_column("optimizer", no_wrap=True)
    # "evals a step" counts evaluations of the loss by the line search.
    headings = "last", "averaged", "rate", "cuts", "evals\na step", "s"
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    first: dict[str, Run] = {}
    with Progress(console=console) as progress:
        total = len(methods(args.steps)) * args.seeds * args.steps
        task = progress.add_task("training", total=total)
        for method in methods(args.steps):
            name = method.name.strip(" +")
            progress.update(task, description=name)
            runs = [
                train(
                    method,
                    text,
                    num_steps=args.steps,
                    batch_size=args.batch_size,
                    seed=seed,
                    advance=lambda: progress.advance(task),
                    report=lambda event, name=name: console.print(f"{name}, {event}"),
                )
                for seed in seeds
            ]
            first[method.name] = runs[0]
            table.add_row(*summary(method, runs))
    console.print(table)

    args.out.mkdir(parents=True, exist_ok=True)
    plot_validation(first, args.out / "char_lm.png")
    adaptive, *_ = first.values()
    adaptive.history.plot(args.out / "char_lm_progress.png")
    console.print(
        f"All validation losses: {args.out / 'char_lm.png'}; what adapt_on_progress "
        f"did, and why: {args.out / 'char_lm_progress.png'} (seed {seeds[0]})"
    )


if __name__ == "__main__":
    main()
