"""The evidence suite: its tasks against closed forms, its search, its tables."""

import json
import math
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.evidence import (
    __main__,
    again,
    bf16_average,
    contenders,
    outcomes,
    streams,
    stress,
    tables,
    training,
    tuning,
)
from benchmarks.evidence import __main__ as command_line
from benchmarks.evidence.images import Convolution, shuffled_rows
from benchmarks.evidence.runs import Key, load
from benchmarks.evidence.tasks import QUICK, task_named
from benchmarks.publishing import RESULTS
from examples import elbo

pytestmark = pytest.mark.optimized

_ROOT = pathlib.Path(__file__).parent.parent


def test_the_expected_elbo_is_the_evidence_less_the_gap() -> None:
    task = streams.negative_elbo()
    problem = elbo.draw_problem(0)
    rows, noise = problem.features.astype(np.float64), elbo.NOISE
    covariance = noise**2 * np.eye(len(rows)) + rows @ rows.T
    # Of the targets, without the posterior.
    quadratic = problem.targets @ np.linalg.solve(covariance, problem.targets)
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    log_evidence = -(quadratic + log_det) / 2
    params = {"mean": jnp.asarray(problem.mean) + 0.01, "log_std": jnp.full(20, -4.0)}
    expected = (problem.gap(params) - log_evidence) / len(rows)
    got = task.evaluate(params, (), task.data)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("make", [streams.least_squares, streams.factorization])
def test_the_expected_loss_is_the_mean_of_those_of_mini_batches(make: Any) -> None:
    task = make()
    params, rest = task.init(0)
    keys = jax.random.split(jax.random.key(1), 4000)
    losses = jax.vmap(lambda key: task.value(params, rest, key, task.data))(keys)
    error = 4 * float(jnp.std(losses)) / math.sqrt(len(losses))
    expected = float(task.evaluate(params, rest, task.data)[0])
    assert abs(float(losses.mean()) - expected) < error


def test_factorization_is_best_with_the_largest_singular_values() -> None:
    task = streams.factorization()
    left, values, right = np.linalg.svd(np.asarray(task.data, np.float64))
    params = {"left": left[:, :5] * values[:5], "right": right[:5].T}
    best = 20 * np.sum(values[5:] ** 2) / task.data.size
    got = task.evaluate(params, (), task.data)[0]
    np.testing.assert_allclose(got, best, rtol=1e-4)
    # And that is a point where the expected gradient vanishes.
    gradient = jax.grad(lambda params: task.evaluate(params, (), task.data)[0])(params)
    assert float(optax.tree.norm(gradient)) < 1e-4


@pytest.mark.parametrize(
    ("size", "inputs", "outputs", "kernel", "stride"),
    [(28, 1, 16, 4, 4), (7, 16, 32, 3, 2)],
)
def test_a_convolution_is_one(
    size: int, inputs: int, outputs: int, kernel: int, stride: int
) -> None:
    convolution = Convolution(inputs, outputs, kernel, stride, nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, size, size, inputs))
    weights = convolution.kernel.kernel[...].reshape(kernel, kernel, inputs, outputs)
    expected = jax.lax.conv_general_dilated(
        images,
        weights,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(convolution(images), expected, atol=1e-5)


def test_an_epoch_is_each_row_once() -> None:
    rows = shuffled_rows(jax.random.key(0), 23, 5, 3)
    assert rows.shape == (12, 5)
    for epoch in np.asarray(rows).reshape(3, 20):
        assert len(set(epoch)) == 20
        assert set(epoch) < set(range(23))


def test_the_average_of_dog_has_polynomial_weights() -> None:
    iterates = np.random.default_rng(0).normal(size=6)
    average = jnp.float32(7.0)
    for k, x in enumerate(iterates):
        average = training.averaged(average, x, jnp.int32(k))
    weights = [math.comb(k + 8, 8) for k in range(6)]
    np.testing.assert_allclose(average, np.average(iterates, weights=weights), 1e-5)


class _Runs:
    """Of a method whose loss is known: the distance of the rate from the best one."""

    def __init__(self, best: float, rates: tuple[float, ...]) -> None:
        self.best, self.made = best, []
        self.method = SimpleNamespace(rates=rates)

    def __call__(self, rate: float, seed: int, num_steps: int) -> Any:
        self.made.append(rate)
        return {"validation": [abs(math.log(rate / self.best)), None][: num_steps // 2]}


@pytest.mark.parametrize(
    ("best", "made"),
    [
        (0.1, [0.1, 0.3, 0.03]),
        (3.0, [0.1, 0.3, 1.0, 3.0, 10.0]),
        (0.01, [0.1, 0.3, 0.03, 0.01, 0.003]),
    ],
)
def test_the_grid_goes_on_while_its_best_is_at_an_end(
    best: float, made: list[float]
) -> None:
    runs: Any = _Runs(best, (0.03, 0.1, 0.3))
    assert tuning.tune(runs, 0, 4, 2) == best
    assert runs.made == made


def test_the_grid_goes_on_to_its_limit_and_not_at_all_where_everything_diverged() -> (
    None
):
    runs: Any = _Runs(1e9, (0.1, 0.3))
    assert tuning.tune(runs, 0, 2, 2) == 100.0
    runs = _Runs(1.0, (0.1, 0.3))
    assert tuning.tune(runs, 0, 4, 4) == 0.1
    assert runs.made == [0.1, 0.3]


def test_a_method_may_have_arguments_of_its_own() -> None:
    task = task_named(QUICK)
    setting = contenders.Setting(jnp.float32(1.0), 100, task)
    name = "sasa-plus(window=Window(leak_ratio=4), learning_rate=0.3)"
    method = contenders.method_named(name)
    assert method.rates == (0.3,)
    method.make(setting)
    with pytest.raises(ValueError, match="factor"):
        contenders.method_named("sasa-plus(factor=2)").make(setting)
    with pytest.raises(SystemExit, match="'sasaplus'"):
        contenders.method_named("sasaplus(factor=2)")


def test_every_stored_run_is_of_a_method_that_can_be_made() -> None:
    setting = contenders.Setting(jnp.float32(1.0), 100, task_named(QUICK))
    for name in {key.method for key in load(RESULTS / "evidence.jsonl")}:
        contenders.method_named(name).make(setting)


@pytest.mark.parametrize("name", list(contenders.METHODS))
def test_every_method_makes_an_optimizer_that_steps(name: str) -> None:
    task = task_named(QUICK)
    params, rest = task.init(0)
    method = contenders.METHODS[name]

    def shapes() -> Any:
        make = training.run_fn(task, method, 360)
        arguments = (jnp.float32(0.1), jax.random.key(0), params, rest, task.data)
        return jax.eval_shape(make, *arguments)

    assert {x.shape for x in shapes().values()} == {(2,)}


def _row(method: str, rate: float, seed: int, test: list[Any], **more: Any) -> Any:
    curve = dict.fromkeys(("train", "validation", "test", "rates"), test)
    row = {"task": "quick", "method": method, "rate": rate, "seed": seed, "steps": 360}
    return row | curve | {"seconds": 1.0, "drops": [0, 1]} | more


def _rows(*rows: Any) -> Any:
    return {Key(*(row[field] for field in Key._fields)): row for row in rows}


def test_gaps_are_from_the_best_tuned_baseline_at_the_rate_that_was_chosen() -> None:
    task = task_named(QUICK)
    rows = _rows(
        # Chosen by the validation data, though 1.0 is better on the test's.
        _row("sgd-cosine", 0.3, 0, [9.0, 4.0], validation=[9.0, 3.0]),
        _row("sgd-cosine", 0.3, 1, [9.0, 5.0]),
        _row("sgd-cosine", 1.0, 0, [9.0, 3.5]),
        _row("adamw-cosine", 1e-3, 0, [9.0, 6.0]),
        _row("salsa", 1e-3, 0, [9.0, 4.75]),
        _row("salsa", 0.1, 0, [9.0, 1.0]),
        _row("sasa", 1.0, 0, [9.0, 8.0]),
        _row("slope", 1.0, 0, [9.0, None]),
    )
    lines = tables.gaps_table(rows, [task]).splitlines()
    cells = {line.split(" | ")[0].strip("|* "): line.split(" | ") for line in lines}
    assert cells["best tuned"][1] == "4.5 (sgd-cosine)"
    assert cells["salsa"][1:] == ["**+0.25**", "1 of 1", "1.0 |"]
    assert cells["sasa"][1:] == ["+3.50", "0 of 1", "2.0 |"]
    assert cells["slope"][1:] == ["diverged", "0 of 1", "3.0 |"]
    assert cells["adamw-cosine"][1:] == ["+1.50", "0 of 1", " |"]
    assert "dog-averaged" not in cells


def _anytime_rows() -> Any:
    """At one record, and at two; those with a horizon run anew for each."""
    ends = {
        "sgd-cosine": (5.0, 4.0),
        "adamw-cosine": (6.0, 3.5),
        "schedule-free-sgd": (5.1, 3.0),
        "adamw-progress": (5.2, 4.5),
        "salsa-averaged": (5.05, 3.6),
    }
    rows = []
    for name in contenders.ANYTIME:
        half, whole = ends.get(name, (7.0, 7.0))
        method = contenders.METHODS[name]
        is_anew = method.knows_horizon
        rate = method.rates[0]
        rows.append(_row(name, rate, 0, [9.0 if is_anew else half, whole]))
        if is_anew:
            rows.append(_row(name, rate, 0, [half], steps=180))
    return _rows(*rows)


def test_a_moment_is_compared_with_the_cosine_tuned_for_it() -> None:
    task = task_named(QUICK)
    assert task.parts == (180, 180, 360)
    table = tables.anytime_table(_anytime_rows(), [task])
    heads, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    column = {head.strip("*"): i for i, head in enumerate(heads)}
    by_name = {line[0]: line for line in lines}
    half, whole = by_name["quick, 180"], by_name["quick, 360"]
    assert (half[1], whole[1]) == ("5 (sgd-cosine)", "3.5 (adamw-cosine)")
    assert half[column["salsa-averaged"]] == "**+0.05**"
    assert whole[column["salsa-averaged"]] == "**+0.10**"
    assert whole[column["adamw-progress"]] == "+1.00"
    assert by_name["within the target"][column["salsa-averaged"]] == "3 of 3"
    assert by_name["within the target"][column["adamw-progress"]] == "2 of 3"
    assert by_name["ahead of schedule-free-sgd"][column["salsa-averaged"]] == "2 of 3"
    assert by_name["ahead of prodigy-linear"][column["salsa-averaged"]] == "3 of 3"


def test_a_method_that_was_not_run_is_counted_nowhere() -> None:
    task = task_named(QUICK)
    rows = {
        key: row
        for key, row in _anytime_rows().items()
        if key.method in (*contenders.COSINES, "adamw-progress")
    }
    assert outcomes.has_anytime(rows, task)
    lines = tables.anytime_table(rows, [task]).splitlines()
    within = next(line for line in lines if line.startswith("| within"))
    assert within.split(" | ")[2:5] == ["2 of 3", "-", "-"]


def test_variants_stand_below_what_they_are_variants_of() -> None:
    task = task_named(QUICK)
    rows = _rows(
        _row("sgd-cosine", 1.0, 0, [9.0, 4.0]),
        _row("salsa(window=Window(leak_ratio=4))", 1e-3, 0, [9.0, 5.0]),
        _row("salsa", 1e-3, 0, [9.0, 4.0]),
        _row("salsa-equivalence", 1e-3, 0, [9.0, 6.0]),
    )
    lines = tables.variants_table(rows, [task]).splitlines()[2:]
    assert lines == [
        "| `salsa` | **+0.00** |",
        "| `salsa(window=Window(leak_ratio=4))` | +1.00 |",
    ]


def test_equals_share_their_rank() -> None:
    found: Any = {
        name: SimpleNamespace(mean=mean)
        for name, mean in [("salsa", 1.0), ("sasa", 2.0), ("slope", 2.0)]
    }
    ranks = outcomes.ranks(found | {"sgd-steps": SimpleNamespace(mean=0.0)})
    assert ranks == {"salsa": 1, "sasa": 2.5, "slope": 2.5}


def test_publishing_renews_the_tables_and_leaves_the_text(tmp_path: Any) -> None:
    task = task_named(QUICK)
    rows = _anytime_rows()
    page = tmp_path / "evidence.md"
    names = ("gaps", "budgets", "variants", "tasks", "anytime")
    text = "".join(f"{name}:\n<!-- {name} -->old<!-- /{name} -->\n" for name in names)
    page.write_text(text + "the end\n")
    (tmp_path / "images").mkdir()
    for _ in range(2):
        __main__.publish(rows, [task], page)
    published = page.read_text()
    assert "old" not in published
    assert published.endswith("the end\n")
    assert published.count("| best tuned | 3.5 (adamw-cosine)") == 1
    assert len(list(tmp_path.glob("images/*.png"))) == 3


def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    x = jnp.array([1.0, -1.001, 3.14159, 1e-20, -2.5e7, 0.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(bf16_average.round_stochastically, (0, None))(keys, x)
    found = np.asarray(drawn, np.float64)
    exact = np.asarray(x, np.float64)
    # The two around x have the upper half of its bits, and the next one.
    down = np.asarray(x).view(np.uint32) >> 16
    ends = [((down + i) << 16).view(np.float32).astype(float) for i in (0, 1)]
    assert np.all((found == ends[0]) | (found == ends[1]))
    error = np.abs(ends[1] - ends[0]) / 2 / math.sqrt(len(keys))
    assert np.all(np.abs(found.mean(0) - exact) <= 5 * error)
    assert np.all(found[:, [0, 5]] == exact[[0, 5]])


def test_an_average_that_is_rounded_to_the_nearest_stands_still() -> None:
    """By weights of 8/k, for k from 8000 to 9000, it should go 61 % of the way."""
    start, target = jnp.full(1000, 1.0), jnp.full(1000, 1.25)

    def step(averages: bf16_average.Averages, k: jax.Array) -> Any:
        return bf16_average.moved(averages, target, k), None

    steps = jnp.arange(8000, 9000)
    averages, _ = jax.lax.scan(step, bf16_average.start(start), steps)
    kept = np.prod(1 - 8 / np.arange(8000, 9000))
    expected = 1.25 - 0.25 * kept
    means = [float(jnp.mean(x.astype(jnp.float32))) for x in averages]
    assert means[0] == pytest.approx(expected, abs=2e-3)
    assert means[1] == 1
    assert means[2] == pytest.approx(expected, abs=2e-3)


def test_the_stress_table_has_an_accuracy_for_each_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stress, "NUM_STEPS", 400)
    monkeypatch.setattr(stress, "BATCH_SIZES", (8, None))
    monkeypatch.setattr(stress, "OPTIMIZERS", {"AdamW": stress.OPTIMIZERS["AdamW"]})
    head, _, row = stress.table().splitlines()
    assert head == "| optimizer | 8 | full |"
    name, *numbers = row.strip("| ").split(" | ")
    assert name == "AdamW"
    assert all(85 < float(number) < 100 for number in numbers)


@pytest.mark.example
def test_the_quick_run_is_resumed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "evidence.jsonl"
    arguments = ["-m", "benchmarks.evidence", "--quick", "--results", str(results)]

    def stored() -> list[Any]:
        return [json.loads(line) for line in results.read_text().splitlines()]

    subprocess.run([sys.executable, *arguments], check=True, timeout=500, cwd=_ROOT)
    rows = stored()
    assert {row["method"] for row in rows} == {"sgd-cosine", "salsa"}
    assert all(row["test"][-1] < 20 for row in rows if row["rate"] >= 1)
    # What was cut off in its middle is made again, and nothing else.
    results.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    # In this process, which has already imported all that it needs.
    monkeypatch.setattr(sys, "argv", arguments[1:])
    command_line.main()
    resumed = stored()
    assert resumed[:-1] == rows[:-1]
    assert resumed[-1]["test"] == rows[-1]["test"]
    # What stands there of salsa is replaced by new runs, and nothing else.
    stale = [row | {"test": [99.0]} for row in rows]
    results.write_text("".join(json.dumps(row) + "\n" for row in stale))
    again.main(["salsa", "--results", str(results), "--workers", "1"])
    for row, old in zip(load(results).values(), rows, strict=True):
        is_salsa = row["method"] == "salsa"
        assert row["test"] == (old["test"] if is_salsa else [99.0])
    assert list(tmp_path.iterdir()) == [results]
    with pytest.raises(SystemExit, match="got 'tango'"):
        again.main(["tango", "--results", str(results)])
