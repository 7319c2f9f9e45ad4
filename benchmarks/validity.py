"""Do the tests fire when they should? On dynamics whose law is known in closed form.

Momentum SGD on a quadratic with independent coordinates: the mean and the covariance of
parameters and momentum follow a linear recursion, so the expected excess loss at any
step, and its stationary value, are computed, not estimated. A drop is early if the
expected excess loss is then above 1.1 times its stationary value.

    make validity                                          # all of it, into docs/
    python benchmarks/validity.py --cells base far         # a part
    python benchmarks/validity.py --publish                # goes on where it stopped

A row that the results hold already, with the same settings, is not computed again
unless `--fresh` is given.

To try a test, a statistic or settings of your own, name a function without arguments
that returns keyword arguments of `sasa_optax.sasa_plus`, and the results' own file:

    python benchmarks/validity.py --methods zero_mean my_module:candidate --out my.json
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import sasa_optax

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "validity.json"
PAGE = HERE.parent / "docs" / "validity.md"
MARKERS = "<!-- table -->", "<!-- /table -->"
EARLY = 1.1
TARGET = 0.1
# No run is shorter: a window of 1000 samples takes 8000 steps to fill.
SHORTEST = 60_000
# Every coordinate starts so many stationary standard deviations from its optimum.
START = 10.0
# Of each run the steps of so many first drops are recorded.
RECORDED = 3
# Of the rate that is left to a run that is cut as soon as it has settled.
COLLAPSED = 0.01
WINDOWS = (1000, 4000, 16000)
SHARES = "early", "never", "second_early", "collapsed"
MEDIANS = "delay", "drops", "rate"
MINUS = "\N{MINUS SIGN}"
# Runs at a constant rate, and the steps over which their loss is averaged, where no
# closed form exists.
ENSEMBLE, BLOCK = 512, 250
Row = dict[str, Any]
Optimizer = optax.GradientTransformationExtraArgs


@dataclasses.dataclass(frozen=True)
class Method:
    """A test that the library offers.

    Attributes:
      make: of a rate and `momentum`, the complete optimizer.
      controller: the same as keyword arguments of `scale_by_sasa_plus`.
      any_direction: whether it holds for directions other than momentum.
    """

    make: Callable[..., Optimizer]
    controller: dict[str, Any]
    any_direction: bool = True

    @property
    def factor(self) -> float:
        return self.controller.get("factor", 0.1)


def of_sasa_plus(**settings: Any) -> Method:
    return Method(functools.partial(sasa_optax.sasa_plus, **settings), settings)


METHODS = {
    "zero_mean": of_sasa_plus(test="zero_mean"),
    "equivalence": of_sasa_plus(test="equivalence"),
    "centred": of_sasa_plus(statistic="centred", test="equivalence"),
    "zero_mean, delta=5": of_sasa_plus(test="zero_mean", delta=5.0),
    "sasa": Method(
        sasa_optax.sasa,
        {"test": sasa_optax.EquivalenceTest(), "leak_ratio": 2},
        any_direction=False,
    ),
    "slope": Method(
        sasa_optax.slope,
        {
            "statistic": sasa_optax.loss_statistic(),
            "test": sasa_optax.SlopeTest(),
            "factor": 0.5,
        },
    ),
    "zero_mean, scaled": of_sasa_plus(test="zero_mean", scale_min_samples=True),
    "equivalence, scaled": of_sasa_plus(test="equivalence", scale_min_samples=True),
}
STATISTICS: dict[str, Callable[[float], sasa_optax.Statistic]] = {
    "master": lambda momentum: sasa_optax.master_statistic,
    "yaida": sasa_optax.yaida_statistic,
}


def method_named(name: str) -> Method:
    """One of `METHODS`, or one made of what `module:function` returns."""
    if name in METHODS:
        return METHODS[name]
    module, _, function = name.partition(":")
    return of_sasa_plus(**getattr(importlib.import_module(module), function)())


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """A quadratic and a rate.

    Attributes:
      name: of the cell.
      dimension: of the parameters.
      condition: eigenvalues from 1/condition to 1, geometrically.
      relaxation: of the slowest mode, in steps; it sets the rate.
      distance: of each coordinate of the optimum from zero; the noise in the gradient
        has variance 1.
      noise: "gaussian", or "heavy": Student's t with 3 degrees of freedom, scaled.
      momentum: of the direction.
      direction: "momentum" or "adam".
      length: of a run, in relaxation times at its first rate.
      min_samples: of the test, where not the library's default.
    """

    name: str
    dimension: int = 20
    condition: float = 100.0
    relaxation: float = 5000.0
    distance: float = 0.0
    noise: str = "gaussian"
    momentum: float = 0.9
    direction: str = "momentum"
    length: float = 60.0
    min_samples: int | None = None

    @property
    def eigenvalues(self) -> np.ndarray:
        return np.geomspace(1 / self.condition, 1, self.dimension)

    @property
    def rate(self) -> float:
        # Normalised momentum moves a slow mode by rate * eigenvalue a step. So does
        # Adam once the gradients are mostly noise, of variance 1.
        return self.condition / self.relaxation

    @property
    def steps(self) -> int:
        return max(SHORTEST, int(self.length * self.relaxation))

    @functools.cached_property
    def law(self) -> "Law":
        return Law(self.eigenvalues, self.rate, self.momentum)

    @property
    def start(self) -> np.ndarray:
        """Of parameters less optimum."""
        return START * np.sqrt(self.law.covariance[:, 0, 0])

    def optimizer(self, method: Method) -> Optimizer:
        if self.direction == "adam":
            reduce = sasa_optax.reduce_on_stationarity(**method.controller)
            return optax.chain(optax.adam(self.rate), reduce)
        more = {} if self.min_samples is None else {"min_samples": self.min_samples}
        return method.make(self.rate, momentum=self.momentum, **more)


@dataclasses.dataclass(frozen=True)
class Series:
    """An AR(1) stream of variance 1 around a mean that falls linearly to zero.

    Attributes:
      name: of the cell.
      phi: the correlation of neighbours.
      mean: of the stream at its start.
      trend: the steps until its mean is zero.
      relaxation: the unit of time.
      steps: of a run.
    """

    name: str
    phi: float = 0.9
    mean: float = 0.0
    trend: int = 0
    relaxation: float = 5000.0
    steps: int = 120_000


Cell = Quadratic | Series

CELLS: tuple[Cell, ...] = (
    Quadratic("base"),
    Quadratic("relaxation 200", relaxation=200.0),
    Quadratic("relaxation 2,000", relaxation=2000.0),
    Quadratic("relaxation 20,000", relaxation=20000.0, length=30.0),
    Quadratic("condition 10", condition=10.0),
    Quadratic("condition 1,000", condition=1000.0),
    Quadratic("dimension 1,000", dimension=1000),
    Quadratic("far", distance=10.0),
    Quadratic("heavy", noise="heavy"),
    Quadratic("plain SGD", momentum=0.0),
    Quadratic("200, far", relaxation=200.0, distance=10.0),
    Quadratic("20,000, far", relaxation=20000.0, distance=10.0, length=30.0),
    Quadratic("200, 1,000, far", dimension=1000, relaxation=200.0, distance=10.0),
    Quadratic("200, window 100", relaxation=200.0, min_samples=100),
    Quadratic("2,000, window 100", relaxation=2000.0, min_samples=100),
    Quadratic("Adam", direction="adam"),
    Quadratic("Adam, far", direction="adam", distance=10.0),
    Series("stationary series"),
    Series("trend", mean=5.0, trend=60_000),
)
QUICK = Quadratic("quick", dimension=3, relaxation=150.0, condition=10.0)
COVERED = tuple(
    cell
    for cell in (*CELLS, QUICK)
    if isinstance(cell, Quadratic)
    and cell.direction == "momentum"
    and cell.dimension < 100
    and cell.min_samples is None
)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of (parameters less optimum, momentum), by coordinate."""

    mean: np.ndarray
    covariance: np.ndarray

    def without_momentum(self) -> "Moments":
        keep = np.array([1.0, 0.0])
        return Moments(self.mean * keep, self.covariance * np.outer(keep, keep))


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """Normalised momentum on a quadratic, noise of variance 1: a linear recursion."""

    eigenvalues: np.ndarray
    rate: float
    momentum: float

    @functools.cached_property
    def recursion(self) -> np.ndarray:
        """Of (parameters less optimum, momentum); shape (dimension, 2, 2)."""
        a, b, e = self.rate, self.momentum, self.eigenvalues
        rows = [[1 - a * (1 - b) * e, -a * b + 0 * e], [(1 - b) * e, b + 0 * e]]
        return np.moveaxis(np.array(rows), -1, 0)

    @functools.cached_property
    def covariance(self) -> np.ndarray:
        """The stationary one: S = M S M' + D; shape (dimension, 2, 2)."""
        drive = (1 - self.momentum) * np.array([-self.rate, 1.0])
        m = self.recursion
        kronecker = np.einsum("dij,dkl->dikjl", m, m).reshape(-1, 4, 4)
        # With all axes written out: NumPy 1 and 2 differ in what they add.
        noise = np.broadcast_to(np.outer(drive, drive).reshape(4, 1), (len(m), 4, 1))
        return np.linalg.solve(np.eye(4) - kronecker, noise).reshape(-1, 2, 2)

    @property
    def is_stable(self) -> bool:
        return bool(np.all(np.abs(np.linalg.eigvals(self.recursion)) < 1))

    def after(self, moments: Moments, steps: int) -> Moments:
        power = np.linalg.matrix_power(self.recursion, steps)
        deviation = moments.covariance - self.covariance
        return Moments(
            mean=np.einsum("dij,dj->di", power, moments.mean),
            covariance=self.covariance + power @ deviation @ np.swapaxes(power, 1, 2),
        )

    def excess(self, moments: Moments) -> float:
        """The expected excess loss, in units of the stationary one."""
        squares = moments.mean[:, 0] ** 2 + moments.covariance[:, 0, 0]
        stationary = np.sum(self.eigenvalues * self.covariance[:, 0, 0])
        return float(np.sum(self.eigenvalues * squares) / stationary)

    def steps_to_settle(self, moments: Moments) -> int:
        """Until the expected excess loss is no more than `EARLY`.

        By bisection: the slow modes that are last to settle do not oscillate.
        """

        def is_unsettled(steps: int) -> bool:
            return self.excess(self.after(moments, steps)) > EARLY

        low, high = 0, 1
        while is_unsettled(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_unsettled(middle) else (low, middle)
        return high

    def cut(self, factor: float) -> "Law":
        return dataclasses.replace(self, rate=factor * self.rate)


def start_moments(offset: np.ndarray) -> Moments:
    """Parameters so far from the optimum, for certain; no momentum."""
    mean = np.stack([offset, np.zeros_like(offset)], axis=-1)
    return Moments(mean, np.zeros((offset.size, 2, 2)))


@dataclasses.dataclass(frozen=True)
class Exact:
    """What is known in closed form of a cell's runs."""

    cell: Quadratic

    @functools.cached_property
    def settled(self) -> int:
        return self.cell.law.steps_to_settle(start_moments(self.cell.start))

    def excess_at(self, drops: Sequence[int], factor: float) -> list[float]:
        """Of a run that is cut at these steps, just before each cut."""
        law, moments = self.cell.law, start_moments(self.cell.start)
        excess = []
        for begin, end in itertools.pairwise([0, *drops]):
            moments = law.after(moments, end - begin)
            excess.append(law.excess(moments))
            law, moments = law.cut(factor), moments.without_momentum()
        return excess

    def possible_drops(self, factor: float) -> int:
        """Of a run that is cut as soon as it has settled, at each rate."""
        law, moments = self.cell.law, start_moments(self.cell.start)
        step = 0
        for drops in itertools.count():
            wait = law.steps_to_settle(moments)
            step += wait
            if step > self.cell.steps:
                return drops
            moments = law.after(moments, wait).without_momentum()
            law = law.cut(factor)
        raise AssertionError("unreachable")


@dataclasses.dataclass(frozen=True)
class Estimated:
    """The same for a cell without closed form, from runs at the first rate."""

    cell: Quadratic

    @functools.cached_property
    def curve(self) -> np.ndarray:
        """The excess loss by block, in units of that of the second half."""
        losses = constant_rate_losses(self.cell, int(16 * self.cell.relaxation))
        return losses / np.mean(losses[losses.size // 2 :])

    @functools.cached_property
    def settled(self) -> int:
        return int(BLOCK * (1 + np.argmax(self.curve <= EARLY)))

    def excess_at(self, drops: Sequence[int], factor: float) -> list[float]:
        """Just before the first cut alone."""
        del factor
        last = self.curve.size - 1
        return [float(self.curve[min(step // BLOCK, last)]) for step in drops[:1]]

    def possible_drops(self, factor: float) -> int:
        """Those of momentum: near stationarity the two are about as fast."""
        return Exact(self.cell).possible_drops(factor)


@functools.lru_cache
def truth_of(cell: Quadratic) -> Exact | Estimated:
    return Estimated(cell) if cell.direction == "adam" else Exact(cell)


def draw(kind: str, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise of variance 1."""
    if kind == "gaussian":
        return jax.random.normal(key, shape)
    # Much cheaper than jax.random.t; the variance of t with 3 degrees is 3.
    normals = jax.random.normal(key, (4, *shape))
    return normals[0] / jnp.sqrt(jnp.sum(normals[1:] ** 2, axis=0))


def steps_of(
    cell: Quadratic, optimizer: optax.GradientTransformation
) -> Callable[[int | jax.Array, Any], Any]:
    """One step of all runs, of (params, state), each with a leading axis of runs."""
    eigenvalues = jnp.asarray(cell.eigenvalues, jnp.float32)
    optimum = jnp.float32(cell.distance)
    update = optax.with_extra_args_support(optimizer).update

    def one(params: jax.Array, state: Any, noise: jax.Array) -> Any:
        offset = params - optimum
        grads = eigenvalues * offset + noise
        # The loss of a mini-batch, whose gradient is that of the mini-batch.
        loss = jnp.sum(offset * (eigenvalues * offset / 2 + noise))
        updates, state = update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    def step(k: int | jax.Array, carry: Any) -> Any:
        params, state = carry
        noise = draw(cell.noise, jax.random.fold_in(jax.random.key(0), k), params.shape)
        return jax.vmap(one)(params, state, noise)

    return step


def first_params(cell: Quadratic, runs: int) -> jax.Array:
    params = jnp.asarray(cell.distance + cell.start, jnp.float32)
    return jnp.broadcast_to(params, (runs, cell.dimension))


def constant_rate_losses(cell: Quadratic, steps: int) -> np.ndarray:
    """The excess loss, averaged over `ENSEMBLE` runs and blocks of `BLOCK` steps."""
    optimizer = optax.adam(cell.rate)
    step = steps_of(cell, optimizer)
    eigenvalues = jnp.asarray(cell.eigenvalues, jnp.float32)

    def add(k: jax.Array, carry: Any) -> Any:
        total, runs = carry
        params, state = step(k, runs)
        squares = jnp.mean((params - cell.distance) ** 2, axis=0)
        return total + jnp.sum(eigenvalues * squares) / 2, (params, state)

    def block(runs: Any, first: jax.Array) -> Any:
        total, runs = jax.lax.fori_loop(first, first + BLOCK, add, (0.0, runs))
        return runs, total / BLOCK

    params = first_params(cell, ENSEMBLE)
    carry = params, jax.vmap(optimizer.init)(params)
    _, losses = jax.jit(functools.partial(jax.lax.scan, block))(
        carry, jnp.arange(0, steps, BLOCK)
    )
    return np.asarray(losses)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Of each run: the steps of its first drops (-1: none), all drops, what is left."""

    steps: np.ndarray
    drops: np.ndarray
    scale: np.ndarray


def watched(step: Callable[[jax.Array, Any], Any]) -> Callable[[jax.Array, Any], Any]:
    """The same step, which also keeps the steps of the first drops."""

    def watch(k: jax.Array, carry: Any) -> Any:
        steps, runs = carry
        runs = step(k, runs)
        drops = optax.tree.get(runs[1], "num_drops")[:, None]
        is_new = (steps < 0) & (drops > jnp.arange(RECORDED))
        return jnp.where(is_new, k + 1, steps), runs

    return watch


def simulate(
    step: Callable[[jax.Array, Any], Any], params: jax.Array, state: Any, length: int
) -> Runs:
    seeds = params.shape[0]
    carry = jnp.full((seeds, RECORDED), -1, jnp.int32), (params, state)

    def run(length: jax.Array, carry: Any) -> Any:
        return jax.lax.fori_loop(0, length, watched(step), carry)

    steps, (_, state) = jax.jit(run)(jnp.int32(length), carry)
    drops, scale = (optax.tree.get(state, name) for name in ("num_drops", "scale"))
    return Runs(np.asarray(steps), np.asarray(drops), np.asarray(scale))


def run_quadratic(cell: Quadratic, method: Method, seeds: int) -> Runs:
    optimizer = cell.optimizer(method)
    params = first_params(cell, seeds)
    state = jax.vmap(optimizer.init)(params)
    return simulate(steps_of(cell, optimizer), params, state, cell.steps)


def recorded(transition: sasa_optax.Transition) -> sasa_optax.Sample:
    """The extra argument ``value``; its standard deviation, 1, is the scale."""
    assert transition.value is not None
    return sasa_optax.Sample(transition.value)


def run_series(cell: Series, method: Method, seeds: int) -> Runs:
    settings: dict[str, Any] = method.controller | {"statistic": recorded}
    optimizer = sasa_optax.scale_by_sasa_plus(1.0, **settings)
    # A scalar that does not move; the streams are what moves.
    still = jnp.zeros(())

    def one(value: jax.Array, mean: jax.Array, state: Any, noise: jax.Array) -> Any:
        value = cell.phi * value + (1 - cell.phi**2) ** 0.5 * noise
        _, state = optimizer.update(still, state, still, value=mean + value)
        return value, state

    def step(k: jax.Array, carry: Any) -> Any:
        values, state = carry
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), k), (seeds,))
        mean = cell.mean * jnp.maximum(0, 1 - k / max(1, cell.trend))
        return jax.vmap(one, in_axes=(0, None, 0, 0))(values, mean, state, noise)

    values = jax.random.normal(jax.random.key(1), (seeds,))
    state = jax.vmap(lambda _: optimizer.init(still))(values)
    return simulate(step, values, state, cell.steps)


def share(mask: Sequence[bool] | np.ndarray) -> float | None:
    return float(np.mean(mask)) if len(mask) else None


def quartiles(values: np.ndarray) -> list[float] | None:
    return np.quantile(values, [0.25, 0.5, 0.75]).tolist() if len(values) else None


def summary(runs: Runs, early: list[list[bool]], settled: int, unit: float) -> Row:
    """``early`` has, of each run, a verdict on each drop that could be judged."""
    first = runs.steps[:, 0]
    fired = first[first >= 0]
    return {
        "early": share([bool(e) and e[0] for e in early]),
        "never": share(first < 0),
        "delay": quartiles((fired - settled) / unit),
        "second": share(runs.drops >= 2),
        "second_early": share([e[1] for e in early if len(e) > 1]),
        "drops": quartiles(runs.drops),
        "rate": quartiles(runs.scale),
        "settled": settled / unit,
    }


def measure_drops(cell: Cell, method: str, seeds: int) -> Row:
    made = method_named(method)
    if isinstance(cell, Series):
        runs = run_series(cell, made, seeds)
        early = [[bool(s < cell.trend)] if s >= 0 else [] for s in runs.steps[:, 0]]
        # The stream does not feel the rate, so it falls for ever, as it should.
        return summary(runs, early, cell.trend, cell.relaxation) | {"collapsed": None}
    runs = run_quadratic(cell, made, seeds)
    truth = truth_of(cell)
    excess = [truth.excess_at(s[s >= 0].tolist(), made.factor) for s in runs.steps]
    early = [[x > EARLY for x in row] for row in excess]
    firsts = np.array([row[0] for row in excess if row])
    possible = truth.possible_drops(made.factor)
    return summary(runs, early, truth.settled, cell.relaxation) | {
        "excess": quartiles(firsts),
        "possible": possible,
        "collapsed": share(runs.scale < COLLAPSED * made.factor**possible),
    }


def stationary_start(cell: Quadratic, runs: int) -> tuple[jax.Array, jax.Array]:
    """Parameters and momentum, of the stationary law (for Gaussian noise)."""
    root = np.linalg.cholesky(cell.law.covariance + 1e-15 * np.eye(2))
    normals = np.random.default_rng(0).standard_normal((runs, cell.dimension, 2))
    both = np.einsum("dij,rdj->rdi", root, normals)
    params = jnp.asarray(cell.distance + both[..., 0], jnp.float32)
    return params, jnp.asarray(both[..., 1], jnp.float32)


def measure_coverage(cell: Quadratic, statistic: str, seeds: int) -> Row:
    """How often the 95 % interval of the newest n holds zero, from stationarity on."""
    optimizer = sasa_optax.sasa_plus(
        cell.rate,
        cell.momentum,
        statistic=STATISTICS[statistic](cell.momentum),
        # The window is all there was, and the rate stays.
        leak_ratio=1,
        min_learning_rate=cell.rate,
        min_samples=WINDOWS[0] - 1,
        test_interval=WINDOWS[0],
    )
    step = steps_of(cell, optimizer)

    def until(runs: Any, first: jax.Array) -> Any:
        runs = jax.lax.fori_loop(first, first + WINDOWS[0], step, runs)
        result = runs[1].controller.last_test
        return runs, (result.lower <= 0) & (result.upper >= 0)

    params, trace = stationary_start(cell, seeds)
    state = jax.vmap(optimizer.init)(params)
    state = state._replace(trace=trace)  # pyright: ignore[reportAttributeAccessIssue]
    _, held = jax.jit(functools.partial(jax.lax.scan, until))(
        (params, state), jnp.arange(0, WINDOWS[-1], WINDOWS[0])
    )
    held = np.asarray(held)
    return {"coverage": {str(n): share(held[n // WINDOWS[0] - 1]) for n in WINDOWS}}


@dataclasses.dataclass(frozen=True)
class Task:
    """A row to be: a method, or a statistic, in a cell."""

    section: str
    cell: Cell
    name: str
    seeds: int

    @property
    def settings(self) -> Row:
        fixed = {"start": START, "early_above": EARLY}
        cell = {**dataclasses.asdict(self.cell), "steps": self.cell.steps}
        own = {"section": self.section, "method": self.name, "seeds": self.seeds}
        return {**own, "cell": cell, **fixed}

    def run(self) -> Row:
        if self.section == "drops":
            measured = measure_drops(self.cell, self.name, self.seeds)
        else:
            assert isinstance(self.cell, Quadratic)
            measured = measure_coverage(self.cell, self.name, self.seeds)
        return {**self.settings, **measured, "made": provenance()}


def provenance() -> Row:
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "sasa_optax": sasa_optax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def applies(method: str, cell: Cell) -> bool:
    is_momentum = isinstance(cell, Series) or cell.direction == "momentum"
    return is_momentum or method_named(method).any_direction


def tasks_of(args: argparse.Namespace) -> Iterator[Task]:
    cells: list[Cell] = [QUICK] if args.quick else list(CELLS)
    if args.cells is not None:
        cells = [cell for cell in cells if cell.name in args.cells]
    for cell in cells:
        for method in args.methods:
            if "drops" in args.sections and applies(method, cell):
                # A thousand dimensions are as many times as dear.
                is_large = isinstance(cell, Quadratic) and cell.dimension > 100
                seeds = args.seeds // 2 if is_large else args.seeds
                yield Task("drops", cell, method, seeds)
    for cell in cells:
        for statistic in STATISTICS:
            if "coverage" in args.sections and cell in COVERED:
                # An interval is cheap beside a run.
                yield Task("coverage", cell, statistic, 8 * args.seeds)


def load(path: pathlib.Path) -> list[Row]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def save(rows: list[Row], path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def is_row_of(task: Task, row: Row) -> bool:
    return task.settings.items() <= row.items()


def place_of(row: Row) -> tuple[Any, ...]:
    """What a newer row replaces an older one for, in the order of the tables."""

    def rank(name: str, names: Sequence[str]) -> tuple[int, str]:
        return (names.index(name) if name in names else len(names)), name

    names = [*METHODS, *STATISTICS]
    cell = rank(row["cell"]["name"], [cell.name for cell in CELLS])
    return row["section"] != "drops", cell, rank(row["method"], names)


def merged(rows: list[Row], row: Row) -> list[Row]:
    others = [other for other in rows if place_of(other) != place_of(row)]
    return sorted([*others, row], key=place_of)


def run_all(tasks: list[Task], jobs: int) -> Iterator[Row]:
    """The rows, as they come."""
    if jobs == 1:
        yield from map(Task.run, tasks)
        return
    # Read when a child's JAX starts: one thread each.
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_PLATFORMS"] = "cpu"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        futures = [pool.submit(task.run) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.0f}"


def median(x: list[float] | None) -> str:
    return "" if x is None else f"{x[1]:.2g}"


def columns_of(row: Row) -> list[str]:
    names = [row["cell"]["name"], row["method"]]
    if row["section"] == "coverage":
        held = (f"{n}: {percent(x)} %" for n, x in row["coverage"].items())
        return [*names, ", ".join(held)]
    shares = (percent(row[x]) for x in SHARES)
    return [*names, *shares, *(median(row[x]) for x in MEDIANS)]


def print_tables(rows: list[Row]) -> None:
    heads = {
        "drops": [*(f"{x} %" for x in SHARES), *MEDIANS],
        "coverage": ["coverage of 95 %, by window"],
    }
    for section, columns in heads.items():
        table = Table("cell", "method", *columns, title=section)
        for row in rows:
            if row["section"] == section:
                table.add_row(*columns_of(row))
        if table.row_count:
            Console().print(table)


Cells = dict[tuple[str, str], Row]


def by_place(rows: list[Row], section: str) -> Cells:
    chosen = [row for row in rows if row["section"] == section]
    return {(row["cell"]["name"], row["method"]): row for row in chosen}


def names_in(cells: Cells) -> tuple[list[str], list[str]]:
    """Of the cells and of the methods, each once, in order."""
    names, methods = zip(*cells, strict=True)
    return list(dict.fromkeys(names)), list(dict.fromkeys(methods))


def has_own_start(method: str) -> bool:
    """Whether its first drop is not that of another method."""
    return not method.endswith(", scaled")


def markdown(
    cells: Cells, columns: list[str], content: Callable[[Row], str]
) -> list[str]:
    lines = [line_of(["cell", *(f"`{name}`" for name in columns)])]
    lines.append("|---" * (1 + len(columns)) + "|")
    for name in names_in(cells)[0]:
        rows = (cells.get((name, column)) for column in columns)
        texts = ("" if row is None else content(row) for row in rows)
        lines.append(line_of([name, *texts]))
    return lines


def first_drop_text(row: Row) -> str:
    if row["never"] == 1:
        return "never"
    text = f"{percent(row['early'])} % · {number(row['delay'][1])}"
    if "excess" in row:
        text += f" · x{row['excess'][1]:.2g}"
    return text + (f" · never {percent(row['never'])} %" if row["never"] else "")


def number(x: float) -> str:
    return f"{x:.1f}".replace("-", MINUS)


def last_text(row: Row) -> str:
    text = f"{row['drops'][1]:g} · {row['rate'][1]:.0e}"
    if row["collapsed"]:
        text += f" · collapsed {percent(row['collapsed'])} %"
    if row["second_early"]:
        text += f" · 2nd early {percent(row['second_early'])} %"
    return text


def target_line(cells: Cells, method: str) -> str:
    """By how much a method misses the target, and where."""
    rows = [row for (_, name), row in cells.items() if name == method]
    missed = [row for row in rows if row["early"] > TARGET]
    line = f"`{method}` meets it in {len(rows) - len(missed)} of {len(rows)} cells"
    distances = (
        f"{row['cell']['name']} {100 * (row['early'] - TARGET):.0f}" for row in missed
    )
    return line + (f"; points above: {', '.join(distances)}" if missed else "") + "."


def line_of(texts: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, texts)) + " |"


def settings_table(rows: list[Row]) -> list[str]:
    keys = "dimension", "condition", "relaxation", "distance", "noise", "momentum"
    lines = [line_of(["cell", *keys, "settled"]), "|---" * (len(keys) + 2) + "|"]
    for (name, _), row in by_place(rows, "drops").items():
        cell = row["cell"]
        if row["method"] == "zero_mean" and "dimension" in cell:
            texts = (
                f"{x:g}" if isinstance(x, float) else x for x in map(cell.get, keys)
            )
            lines.append(line_of([name, *texts, number(row["settled"])]))
    return lines


def possible_line(cells: Cells) -> str:
    counts: dict[str, set[int]] = {}
    for (_, method), row in cells.items():
        if "possible" in row:
            counts.setdefault(method, set()).add(row["possible"])
    texts = (f"`{m}` {min(c)} to {max(c)}" for m, c in counts.items())
    return "Drops of a run cut as soon as it has settled: " + ", ".join(texts) + "."


def coverage_table(rows: list[Row]) -> list[str]:
    cells = by_place(rows, "coverage")
    if not cells:
        return []
    heads = [f"{s}, n = {n}" for s in STATISTICS for n in WINDOWS]
    lines = [line_of(["cell", *heads]), "|---" + "|--:" * len(heads) + "|"]
    for name in names_in(cells)[0]:
        held = [cells[name, s]["coverage"] for s in STATISTICS if (name, s) in cells]
        texts = (percent(x) for row in held for x in row.values())
        lines.append(line_of([name, *texts]))
    return ["**The interval holds zero, %**", "", *lines, ""]


def made_line(rows: list[Row], results: str = RESULTS.name) -> str:
    made = max((row["made"] for row in rows), key=lambda made: made["date"])
    machine = f"{made['cores']}-core {made['architecture'].replace('_', '-')} CPU"
    return (
        f"Made by `make validity` on a {machine}, JAX {made['jax']}, {made['date']}; "
        f"every number is in `benchmarks/results/{results}`."
    )


def page_content(rows: list[Row]) -> str:
    cells = by_place(rows, "drops")
    methods = names_in(cells)[1]
    firsts = list(filter(has_own_start, methods))
    lines = ["**The cells**", "", *settings_table(rows), ""]
    heading = "early in so many runs · median delay · median excess loss"
    lines += [f"**The first drop: {heading}**", ""]
    lines += [*markdown(cells, firsts, first_drop_text), ""]
    lines += ["Target: at most 10 % early in every cell.", ""]
    lines += [*(f"- {target_line(cells, method)}" for method in firsts), ""]
    lines += ["**At the end of the run: drops · what is left of the rate**", ""]
    lines += [*markdown(cells, methods, last_text), "", possible_line(cells), ""]
    return "\n".join([*lines, *coverage_table(rows), made_line(rows)])


def replace_table(page: str, content: str, markers: tuple[str, str]) -> str:
    start, end = markers
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n\n{content}\n\n{end}{after}"


def panel(
    axis: Any,
    title: str,
    value: Callable[[Row], tuple[float, str] | None],
    limits: tuple[float, float],
    palette: str,
    cells: Cells,
    methods: list[str],
) -> None:
    """A table of colours: a value of `limits`, and its text, for each row."""
    names = names_in(cells)[0]
    grid = np.full((len(names), len(methods)), np.nan)
    for (i, name), (j, method) in itertools.product(
        enumerate(names), enumerate(methods)
    ):
        row = cells.get((name, method))
        found = None if row is None else value(row)
        text = ("" if row is None else "never") if found is None else found[1]
        if found is not None:
            grid[i, j] = np.clip(found[0], *limits)
        axis.text(j, i, text, ha="center", va="center", fontsize=8)
    axis.set_facecolor("0.9")
    axis.imshow(
        grid, cmap=palette, vmin=limits[0], vmax=limits[1], aspect="auto", alpha=0.6
    )
    axis.set_xticks(range(len(methods)), methods, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title(title, fontsize=10)


def early_value(row: Row) -> tuple[float, str] | None:
    return None if row["never"] == 1 else (row["early"], percent(row["early"]))


def delay_value(row: Row) -> tuple[float, str] | None:
    return row["delay"] and (row["delay"][1], number(row["delay"][1]))


def rate_value(row: Row) -> tuple[float, str] | None:
    exponent = float(np.log10(max(row["rate"][1], 1e-38)))
    return exponent, f"{exponent:.0f}".replace("-", MINUS)


def draw_picture(rows: list[Row], path: pathlib.Path) -> None:
    import matplotlib.figure

    cells = by_place(rows, "drops")
    methods = names_in(cells)[1]
    firsts = list(filter(has_own_start, methods))
    ratios = [len(firsts), len(firsts), len(methods)]
    figure = matplotlib.figure.Figure((12, 6), layout="constrained")
    axes = figure.subplots(
        1, 3, sharey=True, gridspec_kw={"width_ratios": ratios}, squeeze=True
    )
    early, delay, rate = axes
    title = "first drop early, % of runs"
    panel(early, title, early_value, (0, 0.5), "RdYlGn_r", cells, firsts)
    title = "median delay, relaxation times"
    panel(delay, title, delay_value, (-10, 10), "PuOr_r", cells, firsts)
    title = "log10 of the rate left"
    panel(rate, title, rate_value, (-8, 0), "RdYlGn", cells, methods)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def write_table(
    page: pathlib.Path, content: str, markers: tuple[str, str] = MARKERS
) -> None:
    old = page.read_text(encoding="utf-8")
    if any(old.count(marker) != 1 for marker in markers):
        raise SystemExit(f"{page} lacks the markers {' and '.join(markers)}.")
    page.write_text(replace_table(old, content, markers), encoding="utf-8")


def publish(rows: list[Row], page: pathlib.Path) -> None:
    write_table(page, page_content(rows))
    draw_picture(rows, page.parent / "images" / "validity.png")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sections", nargs="+", default=["drops", "coverage"])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--fresh", action="store_true", help="compute rows anew")
    parser.add_argument("--quick", action="store_true", help="one tiny cell instead")
    parser.add_argument("--out", type=pathlib.Path, help="of the results, JSON")
    parser.add_argument("--publish", action="store_true", help="into docs/")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    args = parser.parse_args(argv)
    if args.quick and args.publish:
        parser.error("what --quick measures is not for publishing")
    if args.out is None and not args.quick:
        args.out = RESULTS
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    tasks = list(tasks_of(args))
    rows = load(args.out) if args.out else []
    todo = [
        task
        for task in tasks
        if args.fresh or not any(is_row_of(task, row) for row in rows)
    ]
    for done, row in enumerate(run_all(todo, args.jobs), 1):
        rows = merged(rows, row)
        print(f"{done}/{len(todo)}:", *columns_of(row), sep="  ", flush=True)
        if args.out:
            save(rows, args.out)
    print_tables(rows)
    if args.publish:
        publish(rows, args.page)


if __name__ == "__main__":
    main()
