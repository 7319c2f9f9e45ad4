"""What automatic scheduling adds to a training step, beside its peers.

Every number is a ratio to the plain optimizer, timed beside it in alternating rounds of
one process, the parameters and the state donated; given are the median over the rounds
and the quartiles.

    make bench                                           # all of it, into docs/
    python benchmarks/performance.py --sections model    # one part, printed only

On a model of your own: name a function that takes `wrap`, a function from optimizer to
optimizer that it must apply to its own, and returns `step, carry, batch`, such that
`carry = step(carry, batch)` is a training step.

    python benchmarks/performance.py --own my_training:make_step
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import sasa_optax

HERE = pathlib.Path(__file__).parent
DOCS = HERE.parent / "docs"
SIZES = (10**5, 10**6, 10**7, 10**8)
NUM_LEAVES = 20
# Each round of a side lasts about this long.
ROUND_SECONDS = 0.1
# What docs/salsa.md recommends.
SEARCH_INTERVAL = 10
Row = dict[str, Any]


def reduced(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optimizer, sasa_optax.reduce_on_stationarity())


def plateau(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optimizer, optax.contrib.reduce_on_plateau())


def averaged(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optimizer, sasa_optax.average_iterates())


def adapted(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optimizer, sasa_optax.adapt_on_progress())


def measured(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optimizer, sasa_optax.measure_progress())


def switched(state: Any) -> Any:
    """The state of SALSA, its search ended."""
    search = state.controller.line_search
    ended = search._replace(line_search_active=jnp.zeros((), bool))
    return state._replace(controller=state.controller._replace(line_search=ended))


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer, and the plain one that it is measured against."""

    name: str
    baseline: str
    make: Callable[[], optax.GradientTransformation]
    prepare: Callable[[Any], Any] = lambda state: state


BASELINES = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
}

SASA_PLUS = Case("sasa_plus", "sgd", lambda: sasa_optax.sasa_plus(1.0))
SASA = Case("sasa", "sgd", lambda: sasa_optax.sasa(1.0))
SWITCHED = Case("salsa, after its switch", "sgd", lambda: sasa_optax.salsa(), switched)
# As the paper has it.
WITHOUT_AVERAGE = Case(
    "salsa, after its switch, average=False",
    "sgd",
    lambda: sasa_optax.salsa(average=False),
    switched,
)
AVERAGED_SGD = Case(
    "average_iterates", "sgd", lambda: averaged(optax.sgd(0.1, momentum=0.9))
)
AVERAGED_ADAMW = Case("average_iterates", "adamw", lambda: averaged(optax.adamw(1e-3)))
CENTRED = Case(
    "sasa_plus, centred", "sgd", lambda: sasa_optax.sasa_plus(1.0, statistic="centred")
)
SEARCHING = Case(
    "salsa, searching",
    "sgd",
    lambda: sasa_optax.salsa(search_interval=SEARCH_INTERVAL),
)
ADAPTED = Case("adapt_on_progress", "adamw", lambda: adapted(optax.adamw(1e-3)))
MEASURED = Case("measure_progress", "adamw", lambda: measured(optax.adamw(1e-3)))
REDUCED = Case("reduce_on_stationarity", "adamw", lambda: reduced(optax.adamw(1e-3)))

CASES = [
    SASA_PLUS,
    SASA,
    SWITCHED,
    WITHOUT_AVERAGE,
    AVERAGED_SGD,
    CENTRED,
    Case("slope", "sgd", lambda: sasa_optax.slope(1.0)),
    Case("dog", "sgd", lambda: optax.contrib.dog()),
    Case("schedule_free_sgd", "sgd", lambda: optax.contrib.schedule_free_sgd(0.1)),
    ADAPTED,
    MEASURED,
    REDUCED,
    AVERAGED_ADAMW,
    Case("reduce_on_plateau", "adamw", lambda: plateau(optax.adamw(1e-3))),
    Case("prodigy", "adamw", lambda: optax.contrib.prodigy()),
    Case(
        "schedule_free_adamw", "adamw", lambda: optax.contrib.schedule_free_adamw(1e-3)
    ),
]


# Timing.


class Steps:
    """A training step, compiled, with the carry that it goes through."""

    def __init__(self, step: Callable[..., Any], carry: Any, *inputs: Any) -> None:
        # Called as a user calls it: what is compiled ahead of time is slower to call.
        self.step = jax.jit(step, donate_argnums=0)
        # Some optimizers' states alias the parameters, which cannot be donated twice.
        self.carry = jax.tree.map(jnp.copy, carry)
        self.inputs = inputs
        start = time.perf_counter()
        self.compiled = self.step.lower(self.carry, *inputs).compile()
        self.compile_seconds = time.perf_counter() - start
        self.seconds(1)

    def seconds(self, count: int) -> float:
        """Of one step, the mean of ``count`` in a row."""
        start = time.perf_counter()
        for _ in range(count):
            self.carry = self.step(self.carry, *self.inputs)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / count

    def temporary_bytes(self) -> int:
        memory: Any = self.compiled.memory_analysis()
        return memory.temp_size_in_bytes

    def bytes_accessed(self) -> float:
        cost: Any = self.compiled.cost_analysis()
        return cost["bytes accessed"]


Timer = Callable[[int], float]


def beside(base: Timer, case: Timer, rounds: int, multiple_of: int = 1) -> Row:
    """Milliseconds of both, and their ratio, in alternating rounds."""
    count = max(1, round(ROUND_SECONDS / base(multiple_of) / multiple_of)) * multiple_of
    pairs = [(base(count), case(count)) for _ in range(rounds)]
    ratios = sorted(later / first for first, later in pairs)
    low, ratio, high = statistics.quantiles(ratios, n=4)
    base_ms, case_ms = (1e3 * statistics.median(s) for s in zip(*pairs, strict=True))
    return {
        "baseline_ms": base_ms,
        "ms": case_ms,
        "ratio": ratio,
        "quartiles": [low, high],
    }


# The optimizer alone.


def flat(size: int) -> dict[str, jax.Array]:
    leaf = jnp.full(size // NUM_LEAVES, 0.1)
    return {f"w{i:02}": jnp.copy(leaf) for i in range(NUM_LEAVES)}


def transformer_tree() -> dict[str, Any]:
    """24 blocks of width 256, 290 leaves, 21 million parameters in bfloat16."""
    width = 256
    shapes = {
        "qkv": (width, 3 * width),
        "qkv_bias": (3 * width,),
        "out": (width, width),
        "out_bias": (width,),
        "up": (width, 4 * width),
        "up_bias": (4 * width,),
        "down": (4 * width, width),
        "down_bias": (width,),
        "norm1": (width,),
        "norm1_bias": (width,),
        "norm2": (width,),
        "norm2_bias": (width,),
    }
    blocks = [
        {name: jnp.full(shape, 0.1, jnp.bfloat16) for name, shape in shapes.items()}
        for _ in range(24)
    ]
    embeddings = {
        name: jnp.full((4096, width), 0.1, jnp.bfloat16) for name in ("in", "out")
    }
    return {"blocks": blocks, "embeddings": embeddings}


def in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def sum_of_squares(params: Any) -> jax.Array:
    leaves = jax.tree.leaves(in_float32(params))
    return jnp.stack([jnp.sum(x**2) for x in leaves]).sum()


def optimizer_steps(case: Case | str, params: Any) -> Steps:
    """The update alone; moments in float32, whatever the parameters are."""
    if isinstance(case, str):
        case = Case(case, case, BASELINES[case])
    optimizer = optax.with_extra_args_support(case.make())

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        extra = {"value": jnp.float32(1), "grad": grads, "value_fn": sum_of_squares}
        updates, state = optimizer.update(in_float32(grads), state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = case.prepare(optimizer.init(in_float32(params)))
    grads = jax.tree.map(lambda x: x * 0.01, params)
    return Steps(step, (params, state), grads)


def tree_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def bench_optimizer(name: str, params: Any, rounds: int) -> Iterator[Row]:
    size = tree_bytes(params)
    for case in CASES:
        base = optimizer_steps(case.baseline, params)
        steps = optimizer_steps(case, params)
        yield {
            "section": "optimizer",
            "tree": name,
            "case": case.name,
            "baseline": case.baseline,
            **beside(base.seconds, steps.seconds, rounds),
            "temporary": steps.temporary_bytes() / size,
            "bytes": steps.bytes_accessed() / size,
            "baseline_bytes": base.bytes_accessed() / size,
        }


@contextlib.contextmanager
def statopt_server(python: pathlib.Path, size: int) -> Iterator[subprocess.Popen[str]]:
    command = [python, HERE / "statopt_server.py"]
    arguments = ["--size", str(size), "--leaves", str(NUM_LEAVES)]
    with subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        yield server
        assert server.stdin is not None
        server.stdin.close()


def bench_statopt(python: pathlib.Path, size: int, rounds: int) -> Iterator[Row]:
    with statopt_server(python, size) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        versions = server.stdout.readline().split()

        def seconds(name: str, count: int) -> float:
            assert server.stdin is not None
            assert server.stdout is not None
            print(name, count, file=server.stdin, flush=True)
            return float(server.stdout.readline())

        base = optimizer_steps("sgd", flat(size))
        for name in ("torch.optim.SGD", "statopt.SASA"):
            yield {
                "section": "optimizer",
                "tree": f"{size:.0e}",
                "case": name,
                "baseline": "sgd",
                **beside(base.seconds, functools.partial(seconds, name), rounds),
                "versions": dict(zip(("torch", "statopt"), versions, strict=True)),
            }


# The controller alone: a thousand parameters, so that nothing else costs much.


def small_steps(optimizer: optax.GradientTransformation, form: str) -> Steps:
    """One step, a thousand inside `lax.scan`, or those for 64 members by `vmap`."""
    grads = jnp.full(1000, 1e-3)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        # Noise of a kind, without the cost of noise.
        updates, state = optimizer.update(grads * jnp.sin(params), state, params)
        return optax.apply_updates(params, updates), state

    def scanned(carry: Any, grads: Any) -> Any:
        return jax.lax.scan(
            lambda carry, _: (step(carry, grads), None), carry, length=1000
        )[0]

    params = jnp.linspace(-1, 1, 1000)
    carry = (params, optimizer.init(params))
    if form == "vmap":
        carry = jax.tree.map(lambda x: jnp.stack([x] * 64), carry)
        return Steps(jax.vmap(scanned, in_axes=(0, None)), carry, grads)
    return Steps(scanned if form == "scan" else step, carry, grads)


def bench_controller(rounds: int) -> Iterator[Row]:
    """Microseconds of a step, and member, beyond optax.sgd's."""
    rare: Row = {"test_interval": 10**6}
    every: Row = {"test_interval": 1, "min_samples": 4}
    kinds = {"no test": rare, "a test at each step": every}
    for form, steps in (("jit", 1), ("scan", 1000), ("vmap", 64_000)):
        for kind, arguments in kinds.items():
            base = small_steps(BASELINES["sgd"](), form)
            case = small_steps(sasa_optax.sasa_plus(1e-3, **arguments), form)
            timed = beside(base.seconds, case.seconds, rounds)
            yield {
                "section": "controller",
                "form": form,
                "case": kind,
                "added_us": 1e3 * (timed["ms"] - timed["baseline_ms"]) / steps,
                "baseline_us": 1e3 * timed["baseline_ms"] / steps,
            }


# Whole training steps.


class Cnn(nnx.Module):
    """A small residual network for 32 by 32 images, a million parameters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        widths = (3, 32, 64, 128)
        pairs = list(itertools.pairwise(widths))
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.downs = nnx.List([conv(a, b, strides=2) for a, b in pairs])
        self.convs = nnx.List([conv(b, b) for _, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(b, rngs=rngs) for _, b in pairs])
        self.hidden = nnx.Linear(2048, 384, rngs=rngs)
        self.logits = nnx.Linear(384, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for down, conv, norm in zip(self.downs, self.convs, self.norms, strict=True):
            x = nnx.relu(norm(down(x)))
            x += nnx.relu(conv(x))
        x = x.reshape(len(x), -1)
        return self.logits(nnx.relu(self.hidden(x)))


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Four blocks of width 128, bytes in and out; 0.9 million parameters."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(256, 128, rngs=rngs)
        self.blocks = nnx.List([Block(128, rngs) for _ in range(4)])
        self.logits = nnx.Linear(128, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)


def cnn_batch() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (64, 32, 32, 3))
    return images, jax.random.randint(keys[1], (64,), 0, 10)


def transformer_batch() -> tuple[jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(0), (16, 65), 0, 256)
    return tokens[:, :-1], tokens[:, 1:]


MODELS = {
    "CNN": (Cnn, cnn_batch, "sgd"),
    "transformer": (Transformer, transformer_batch, "adamw"),
}


def training_steps(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    batch: tuple[jax.Array, jax.Array],
    optimizer: optax.GradientTransformation,
    prepare: Callable[[Any], Any] = lambda state: state,
) -> Steps:
    """Forward, backward, update."""
    graphdef, params, rest = nnx.split(make_model(nnx.Rngs(0)), nnx.Param, ...)
    transformation = optax.with_extra_args_support(optimizer)

    def loss(params: Any, rest: Any, inputs: Any, targets: Any, is_training: bool):
        model: Any = nnx.merge(graphdef, params, rest, copy=True)
        (model.train if is_training else model.eval)()
        losses = optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets)
        return jnp.mean(losses), nnx.state(model, nnx.Not(nnx.Param))

    def step(carry: Any, inputs: Any, targets: Any) -> Any:
        params, rest, state = carry
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, new_rest), grads = value_and_grad(params, rest, inputs, targets, True)
        # With dropout it is not the loss that a line search evaluates.
        searches = optax.tree.get(state, "line_search_active") is not None
        updates, state = transformation.update(
            grads,
            state,
            params,
            grad=grads,
            value=None if searches else value,
            value_fn=lambda params: loss(params, rest, inputs, targets, False)[0],
        )
        return optax.apply_updates(params, updates), new_rest, state

    return Steps(step, (params, rest, prepare(transformation.init(params))), *batch)


MODEL_CASES = [
    ADAPTED,
    SASA_PLUS,
    SASA,
    SEARCHING,
    SWITCHED,
    REDUCED,
    AVERAGED_SGD,
]


def megabytes_more(base: Steps, steps: Steps) -> float:
    return (steps.temporary_bytes() - base.temporary_bytes()) / 1e6


def bench_models(rounds: int) -> Iterator[Row]:
    for name, (make_model, make_batch, _) in MODELS.items():
        batch = make_batch()
        for case in MODEL_CASES:
            base = training_steps(make_model, batch, BASELINES[case.baseline]())
            steps = training_steps(make_model, batch, case.make(), case.prepare)
            # As many searches in each round.
            timed = beside(base.seconds, steps.seconds, rounds, SEARCH_INTERVAL)
            yield {
                "section": "model",
                "tree": name,
                "case": case.name,
                "baseline": case.baseline,
                **timed,
                "temporary_mb": megabytes_more(base, steps),
            }


def bench_own(where: str, rounds: int) -> Iterator[Row]:
    sys.path.insert(0, str(pathlib.Path.cwd()))
    module, _, function = where.partition(":")
    make_step = getattr(importlib.import_module(module), function)
    base, steps = (Steps(*make_step(wrap)) for wrap in (lambda o: o, reduced))
    yield {
        "section": "model",
        "tree": where,
        "case": "reduce_on_stationarity",
        "baseline": "yours",
        **beside(base.seconds, steps.seconds, rounds),
        "temporary_mb": megabytes_more(base, steps),
    }


# Compiling, and the state.


def bench_start(rounds: int) -> Iterator[Row]:
    params = flat(1000)
    for case in CASES:
        runs = []
        for each in [case.baseline, case] * rounds:
            jax.clear_caches()
            runs.append(optimizer_steps(each, params))
        base, steps = runs[::2], runs[1::2]
        compile_s, baseline_compile_s = (
            statistics.median(run.compile_seconds for run in runs)
            for runs in (steps, base)
        )
        yield {
            "section": "start",
            "case": case.name,
            "baseline": case.baseline,
            "compile_s": compile_s,
            "baseline_compile_s": baseline_compile_s,
            "state_kb": tree_bytes(steps[0].carry[1]) / 1000,
            "baseline_state_kb": tree_bytes(base[0].carry[1]) / 1000,
        }


# The report.


def machine() -> Row:
    names = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "sasa_optax": sasa_optax.__version__,
    }


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
    cells = {"parameters": row["tree"], **cells}
    cells |= {"ms": f"{row['ms']:.3g}", "ratio": ratio_cell(row)}
    if row["section"] == "model":
        return cells | {"temporary memory, MB more": f"{row['temporary_mb']:.1f}"}
    if row["section"] == "optimizer":
        known = "temporary" in row
        temporary = f"{100 * row['temporary']:.1f} %" if known else ""
        passes = f"{row['bytes']:.1f} : {row['baseline_bytes']:.1f}" if known else ""
        cells |= {"temporary memory": temporary, "passes, by XLA's account": passes}
    return cells


TITLES = {
    "optimizer": "The optimizer's step alone",
    "controller": "The controller alone, a thousand parameters",
    "model": "A whole training step",
    "start": "Before the first step",
}


def markdown(rows: list[Row]) -> str:
    lines = []
    for section, title in TITLES.items():
        cells = [columns_of(row) for row in rows if row["section"] == section]
        if not cells:
            continue
        lines += [f"### {title}", "", "| " + " | ".join(cells[0]) + " |"]
        lines += ["| --- " * len(cells[0]) + "|"]
        lines += ["| " + " | ".join(row.values()) + " |" for row in cells]
        lines += [""]
    return "\n".join(lines)


def print_tables(rows: list[Row]) -> None:
    for section, title in TITLES.items():
        cells = [columns_of(row) for row in rows if row["section"] == section]
        if cells:
            table = Table(*cells[0], title=title)
            for row in cells:
                table.add_row(*row.values())
            Console().print(table)


def draw(rows: list[Row], path: pathlib.Path, tree: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [r for r in rows if r["section"] == "optimizer" and r["tree"] == tree]
    found.sort(key=lambda row: (row["baseline"], -row["ratio"]))
    own = set(dir(sasa_optax))
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(found) + 1), layout="tight")
    labels = [f"{row['case']}  (beside {row['baseline']})" for row in found]
    colors = ["C0" if r["case"].split(",")[0] in own else "0.7" for r in found]
    ratios = [row["ratio"] for row in found]
    bars = axes.barh(labels, ratios, color=colors)
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"time of a step, plain optimizer = 1; {tree} parameters")
    figure.savefig(path, dpi=150)


def publish(rows: list[Row]) -> None:
    """The results as JSON, the page with its tables, and the picture."""
    platform_name = jax.default_backend()
    results = {"machine": machine(), "rows": rows}
    path = HERE / "results" / f"performance-{platform_name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    page = DOCS / "performance.md"
    start, end = (f"<!-- {platform_name}: {word} -->" for word in ("start", "end"))
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    content = f"{start}\n\n{markdown(rows)}\nMade by `make bench`: {about}.\n\n{end}"
    page.write_text(before + content + after, encoding="utf-8")
    draw(rows, DOCS / "images" / f"performance-{platform_name}.png", "1e+07")


def run(args: argparse.Namespace) -> Iterator[Row]:
    if args.own:
        yield from bench_own(args.own, args.rounds)
        return
    if "optimizer" in args.sections:
        for size in args.sizes:
            yield from bench_optimizer(f"{size:.0e}", flat(size), args.rounds)
            if args.statopt_python:
                yield from bench_statopt(args.statopt_python, size, args.rounds)
        tree = transformer_tree()
        yield from bench_optimizer("transformer, bfloat16", tree, args.rounds)
    if "controller" in args.sections:
        yield from bench_controller(args.rounds)
    if "model" in args.sections:
        # What is looked for is a hundredth, of steps whose time varies by several.
        yield from bench_models(3 * args.rounds)
    if "start" in args.sections:
        yield from bench_start(3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--sizes", nargs="+", type=lambda s: int(float(s)))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--own", metavar="MODULE:FUNCTION")
    parser.add_argument(
        "--statopt-python", type=pathlib.Path, help="of an environment with statopt"
    )
    parser.add_argument("--publish", action="store_true", help="write into docs/")
    args = parser.parse_args()
    args.sizes = args.sizes or SIZES
    rows = []
    for row in run(args):
        rows.append(row)
        print(*columns_of(row).values(), sep="  ", flush=True)
    print_tables(rows)
    if args.publish:
        publish(rows)


if __name__ == "__main__":
    main()
