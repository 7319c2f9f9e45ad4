"""The closed form of `benchmarks.validity` against simulation, and its bookkeeping."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import sasa_optax
from benchmarks import publishing
from benchmarks.validity import (
    __main__,
    cells,
    coverage,
    drops,
    methods,
    progress,
    race,
    simulation,
    truth,
)
from benchmarks.validity.law import EARLY, start_moments
from benchmarks.validity.rows import Task
from sasa_optax import Window

pytestmark = pytest.mark.optimized


def small(momentum: float) -> Any:
    return cells.Quadratic(
        "small", dimension=3, condition=4.0, relaxation=15.0, momentum=momentum
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_stationary_covariance_solves_its_equation(momentum: float) -> None:
    law = small(momentum).law
    drive = (1 - momentum) * np.array([-law.rate, 1.0])
    for matrix, covariance in zip(law.recursion, law.covariance, strict=True):
        noise = np.outer(drive, drive)
        expected = scipy.linalg.solve_discrete_lyapunov(matrix, noise)
        np.testing.assert_allclose(covariance, expected, rtol=1e-9)
        powers = [np.linalg.matrix_power(matrix, k) for k in range(2000)]
        series = sum(power @ noise @ power.T for power in powers)
        np.testing.assert_allclose(covariance, series, rtol=1e-9)


def monte_carlo_losses(
    cell: Any, cuts: list[int], factor: float, runs: int
) -> list[np.ndarray]:
    """The excess loss of each run of momentum SGD just before each cut."""
    random, rate = np.random.default_rng(0), cell.rate
    x = np.tile(cell.start, (runs, 1))
    h, losses = np.zeros_like(x), []
    for step in range(1, cuts[-1] + 1):
        gradient = cell.eigenvalues * x + random.standard_normal(x.shape)
        h = cell.momentum * h + (1 - cell.momentum) * gradient
        x = x - rate * h
        if step in cuts:
            losses.append(np.sum(cell.eigenvalues * x**2, axis=1))
            rate, h = factor * rate, np.zeros_like(h)
    return losses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_expected_excess_is_that_of_many_runs(momentum: float) -> None:
    cell, runs = small(momentum), 20_000
    cuts, factor = [10, 45, 145], 0.5
    expected = truth.Exact(cell).excess_at(cuts, factor)
    law = cell.law
    for losses, excess in zip(
        monte_carlo_losses(cell, cuts, factor, runs), expected, strict=True
    ):
        unit = np.sum(law.eigenvalues * law.covariance[:, 0, 0])
        error = np.std(losses) / unit / runs**0.5
        assert abs(np.mean(losses) / unit - excess) < 4 * error
        law = law.cut(factor)


def test_what_is_simulated_is_what_is_computed() -> None:
    cell = dataclasses.replace(small(0.9), distance=3.0)
    optimizer = sasa_optax.qhm(cell.rate, momentum=cell.momentum)
    step = simulation.steps_of(cell, optimizer)
    params = simulation.first_params(cell, 4000)
    runs = params, jax.vmap(optimizer.init)(params)
    params, _ = jax.jit(lambda runs: jax.lax.fori_loop(0, 30, step, runs))(runs)
    moments = start_moments(cell.start)
    moments = cell.law.after(moments, 30)
    mean, deviation = moments.mean[:, 0], moments.covariance[:, 0, 0] ** 0.5
    offsets = np.asarray(params) - 3
    np.testing.assert_allclose(np.mean(offsets, 0), mean, atol=4 * deviation[0] / 63)
    np.testing.assert_allclose(np.std(offsets, 0), deviation, rtol=0.05)


def test_heavy_noise_is_heavy_and_of_variance_one() -> None:
    draws = np.asarray(simulation.draw("heavy", jax.random.key(0), (400_000,)))
    # P(|t| > 6 sqrt(3)) for t with 3 degrees of freedom is 1.9e-3.
    assert 0.0015 < np.mean(np.abs(draws) > 6) < 0.0023
    quartile = 0.7648923 / 3**0.5
    np.testing.assert_allclose(np.quantile(draws, 0.75), quartile, rtol=0.02)


@pytest.mark.parametrize("relaxation", [150.0, 160.0, 170.0, 180.0, 190.0])
def test_settled_is_the_first_step_that_is_near_stationary(relaxation: float) -> None:
    cell = dataclasses.replace(small(0.9), relaxation=relaxation)
    moments = start_moments(cell.start)
    after = (cell.law.excess(cell.law.after(moments, k)) for k in range(1000))
    first = next(k for k, excess in enumerate(after) if excess <= EARLY)
    assert truth.Exact(cell).settled == first


def test_possible_drops_are_those_of_brute_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cells, "SHORTEST", 0)
    cell = small(0.9)
    law, moments = cell.law, start_moments(cell.start)
    cuts = []
    for step in range(1, cell.steps + 1):
        moments = law.after(moments, 1)
        if law.excess(moments) <= EARLY:
            cuts.append(step)
            law, moments = law.cut(0.1), moments.without_momentum()
    assert len(cuts) == 2
    for cut, (before, at) in zip(cuts, [(0, 1), (1, 2)], strict=True):
        for steps, possible in ((cut - 1, before), (cut, at)):
            short = dataclasses.replace(cell, length=(steps + 0.5) / cell.relaxation)
            assert truth.Exact(short).possible_drops(0.1) == possible


def test_the_stationary_start_is_stationary() -> None:
    cell = dataclasses.replace(small(0.9), distance=3.0)
    params, trace = coverage.stationary_start(cell, 20_000)
    both = np.stack([params - 3, trace], axis=-1)
    got = np.einsum("rdi,rdj->dij", both, both) / 20_000
    scale = np.sqrt(np.einsum("dii->di", cell.law.covariance))
    scale = scale[:, :, None] * scale[:, None, :]
    np.testing.assert_allclose(got / scale, cell.law.covariance / scale, atol=0.05)


def test_intervals_hold_zero_at_stationarity_and_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stationary_start = coverage.stationary_start

    def half_of_them(cell: Any, runs: int) -> Any:
        params, trace = stationary_start(cell, runs)
        return params.at[: runs // 2].add(100.0), trace

    monkeypatch.setattr(coverage, "stationary_start", half_of_them)
    monkeypatch.setattr(coverage, "WINDOWS", (100, 200))
    cell = dataclasses.replace(small(0.0), relaxation=2000.0)
    row = coverage.measure(cell, "yaida", 200)
    assert list(row["coverage"]) == ["100", "200"]
    # The true share is 0.93 of the half that is stationary.
    assert all(0.4 < held <= 0.5 for held in row["coverage"].values())


def test_early_drops_and_collapse_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs which drop at once and collapse, and one that never drops."""
    steps = np.array([[100, 200, 300], [100, 200, 300], [-1, -1, -1]])
    runs = simulation.Runs(steps, np.array([9, 9, 0]), np.array([9e-5, 9e-5, 1.0]))
    monkeypatch.setattr(simulation, "run_quadratic", lambda *_: runs)
    cell = cells.Quadratic("small", dimension=3, relaxation=1000.0)
    settled = truth.Exact(cell).settled
    row = drops.measure(cell, "zero_mean", 3)
    assert row["possible"] == 2
    assert row["early"] == row["collapsed"] == row["second"] == pytest.approx(2 / 3)
    assert row["never"] == pytest.approx(1 / 3)
    assert row["second_early"] == 1
    assert row["delay"] == pytest.approx(3 * [0.1 - settled / 1000])
    late = steps + np.where(steps > 0, settled, 0)
    monkeypatch.setattr(simulation, "run_quadratic", lambda *_: runs_at(runs, late))
    row = drops.measure(cell, "zero_mean", 3)
    assert row["early"] == 0
    assert row["second_early"] == 1


def runs_at(runs: Any, steps: np.ndarray) -> Any:
    return dataclasses.replace(runs, steps=steps)


@pytest.mark.parametrize(("name", "is_early"), [("zero_mean", 1), ("centred", 0)])
def test_from_an_average_no_first_drop_is_early(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    is_early: int,
) -> None:
    """By a window of a twentieth of a relaxation time, with the optimum far away."""
    monkeypatch.setattr(cells, "SHORTEST", 20_000)
    cell = cells.Quadratic(
        "far", relaxation=2000.0, distance=10.0, min_samples=100, length=10
    )
    row = drops.measure(cell, name, 8)
    assert row["early"] == is_early
    assert row["never"] == 0
    if not is_early:
        assert 0 < row["delay"][1] < 3


def test_a_series_falls_to_zero_when_it_says() -> None:
    cell = cells.Series("short", mean=50.0, trend=9000, steps=20_000)
    window = Window(min_samples=20, test_interval=50)
    seen = methods.Method(sasa_optax.sasa_plus, {"window": window})
    runs = simulation.run_series(cell, seen, 8)
    assert np.all(runs.steps[:, 0] >= 9000)
    assert np.all(runs.drops >= 1)


@pytest.mark.parametrize("name", ["sasa", "slope"])
def test_each_method_is_the_library_s(name: str) -> None:
    """The settings for a chain make the same drops as the complete optimizer."""
    # At so large a rate the samples of SASA vary little beside their scale.
    cell = cells.Quadratic("fast", relaxation=20.0)
    method = methods.METHODS[name]
    window = dataclasses.replace(method.window, min_samples=20)
    whole = method.make(cell.rate, momentum=0.9, window=window)
    options: Any = {"statistic": sasa_optax.yaida_statistic(0.9)}
    options |= method.options | {"window": window}
    parts = sasa_optax.sasa_plus(cell.rate, momentum=0.9, **options)
    params, dropped = simulation.first_params(cell, 1), []
    for optimizer in (whole, parts):
        step, state = simulation.steps_of(cell, optimizer), jax.vmap(optimizer.init)
        runs = simulation.simulate(step, params, state(params), 4000)
        dropped.append([*runs.steps[0], *runs.scale])
    assert dropped[0][0] > 0
    assert dropped[0] == dropped[1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("validity") / "results" / "rows.json"
    argv = ["--quick", "--jobs", "1", "--seeds", "3", "--out", str(out)]
    argv += ["--methods", "zero_mean", "--sections", "drops"]
    __main__.main(argv)
    return argv


def test_quick_gives_a_row(quick: list[str]) -> None:
    rows = json.loads(Path(quick[6]).read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["zero_mean"]
    row = rows[0]
    # A window of 1000 needs 8000 steps, 53 relaxation times.
    assert row["early"] == row["never"] == 0
    assert row["delay"][0] > 50
    # Tests run at every hundredth step.
    first = 150 * (row["delay"][1] + row["settled"])
    assert first == pytest.approx(100 * round(first / 100))
    assert row["drops"][0] >= 1
    assert row["possible"] == 3
    assert row["collapsed"] == 1
    assert row["made"]["jax"] == jax.__version__
    assert row["cell"]["dimension"] == 3


def test_a_row_is_not_computed_twice(
    quick: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed = []

    def run(task: Any) -> dict[str, Any]:
        computed.append(task.name)
        row = json.loads(Path(quick[6]).read_text(encoding="utf-8"))["rows"][0]
        return row | task.settings

    monkeypatch.setattr(Task, "run", run)
    copy = tmp_path / "rows.json"
    copy.write_bytes(Path(quick[6]).read_bytes())
    argv = [*quick, "--out", str(copy)]
    __main__.main(argv)
    assert computed == []
    __main__.main([*argv, "--fresh"])
    assert computed == ["zero_mean"]
    __main__.main([*argv, "--seeds", "4", "--methods", "zero_mean", "sasa"])
    assert computed == ["zero_mean", "zero_mean", "sasa"]
    rows = publishing.load(copy)
    assert [row["method"] for row in rows] == ["zero_mean", "sasa"]
    assert [row["seeds"] for row in rows] == [4, 4]


def test_publishing_replaces_the_table_only(quick: list[str], tmp_path: Path) -> None:
    start, end = "<!-- table -->", "<!-- /table -->"
    page = tmp_path / "docs" / "validity.md"
    page.parent.mkdir()
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n", encoding="utf-8")
    rows = publishing.load(Path(quick[6]))
    __main__.publish(rows, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{start}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "| quick |" in text
    __main__.publish(rows, page)
    assert page.read_text(encoding="utf-8") == text
    assert (tmp_path / "docs" / "images" / "validity.png").stat().st_size > 1000
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks the markers"):
        __main__.publish(rows, page)


def test_a_candidate_is_found_by_module_and_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import sasa_optax

def halve():
    return {"factor": 0.5, "window": sasa_optax.Window(min_samples=10)}
"""
    (tmp_path / "my_candidates.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    method = methods.method_named("my_candidates:halve")
    assert method.factor == 0.5
    assert method.window.min_samples == 10
    params = jnp.ones(3)
    state = method.make(0.1, momentum=0.9).init(params)
    assert optax.tree.get(state, "num_drops") == 0


def exact_excess_of_average(
    rates: np.ndarray, eigenvalue: float, start: float
) -> float:
    """Of SGD in one dimension with noise of variance 1, at these rates in turn.

    The iterate and the average are linear in the start and in the noise of each step,
    so their coefficients are followed.
    """
    iterate = np.zeros(1 + len(rates))
    iterate[0] = start
    average = iterate.copy()
    for k, rate in enumerate(rates, 1):
        iterate *= 1 - rate * eigenvalue
        iterate[k] -= rate
        average += (iterate - average) / max(32, k / 8)
    return eigenvalue * float(np.sum(average**2)) / 2


def test_schedules_have_the_excess_that_is_known() -> None:
    """At a third and at the end, at a constant rate and as it falls."""
    cell = cells.Quadratic(
        "line", dimension=1, condition=1.0, relaxation=20.0, momentum=0.0, distance=3.0
    )
    schedules, steps, runs = [(0.05, 0.0), (0.2, 0.75)], 600, 2000
    result = race.race(cell, steps, runs, schedules)
    assert result.schedules.shape == (2, 2, runs)
    for excess, length in zip(result.schedules, [200, 600], strict=True):
        for seen, (rate, gamma) in zip(excess, schedules, strict=True):
            rates = rate * (1 + np.arange(length) / race.HOLD) ** -gamma
            expected = exact_excess_of_average(rates, 1.0, cell.start[0])
            assert abs(np.mean(seen) - expected) < 4 * np.std(seen) / runs**0.5
    assert result.servos.shape == (2, len(race.STARTS), runs)
    assert np.all(np.isfinite(result.servos))


def test_the_servo_is_beside_the_best(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cells, "SHORTEST", 0)
    monkeypatch.setattr(progress, "CELLS", (dataclasses.replace(cells.QUICK),))
    page = tmp_path / "validity.md"
    start, end = "<!-- progress table -->", "<!-- /progress table -->"
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n", encoding="utf-8")
    out = tmp_path / "rows.json"
    argv = ["--runs", "4", "--out", str(out), "--page", str(page), "--publish"]
    progress.main(argv)
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["steps"] == 9000
    for servo in row["servos"]:
        for moment in race.MOMENTS:
            for kind, (ratio, error) in servo["ratio"][moment].items():
                best = row["best"][moment][kind]["excess"]
                assert ratio == pytest.approx(servo["excess"][moment] / best)
                assert 0 < ratio < 20
                assert np.isfinite(error)
        assert 0 < servo["rate"][0] <= servo["rate"][1] <= servo["highest"] < 30
        assert len(servo["overshoots"]) == len(servo["brakes"]) == 4
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert "| quick | 9,000 |" in text
    assert text.startswith(f"before\n{start}\n")
    assert text.endswith(f"{end}\nafter\n")


def test_a_ratio_of_means_has_the_error_of_its_pairs() -> None:
    random = np.random.default_rng(0)
    common, own = random.exponential(size=(2, 2000, 50))
    servo, other = 2 * common + own, common + 1
    ratios, errors = zip(*map(race.compared, servo, other), strict=True)
    assert np.mean(ratios) == pytest.approx(1.5, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)
