"""The code of CONTRIBUTING.md and docs/statistics.md runs, and does what is said."""

import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import sasa_optax

_ROOT = pathlib.Path(__file__).parent.parent


def _names_of(page: str) -> dict[str, Any]:
    """What the code of a page leaves behind."""
    names: dict[str, Any] = {}
    text = (_ROOT / page).read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def guide() -> dict[str, Any]:
    return _names_of("CONTRIBUTING.md")


def _run(optimizer: Any, params: jax.Array, grads: jax.Array) -> tuple[Any, jax.Array]:
    """The state after all steps, and the parameters after each."""

    def step(carry: Any, grad: jax.Array) -> Any:
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), path = jax.lax.scan(step, (params, optimizer.init(params)), grads)
    return state, path


def _alignments(grads: np.ndarray) -> np.ndarray:
    """<g_k, h_{k-1}>, from the recursion of normalised momentum."""
    average, found = np.zeros(grads.shape[1]), []
    for grad in grads.astype(np.float64):
        found.append(grad @ average)
        average = 0.1 * grad + 0.9 * average
    return np.array(found)


def test_the_statistic_is_the_agreement_with_the_gradients_before(
    guide: dict[str, Any],
) -> None:
    grads = np.asarray(0.5 + jax.random.normal(jax.random.key(0), (40, 7)))
    statistic = guide["alignment_statistic"](0.9)
    window = sasa_optax.Window(max_window=1024)
    optimizer = sasa_optax.sasa_plus(0.1, statistic=statistic, window=window)
    state, _ = _run(optimizer, jnp.ones(7), jnp.asarray(grads))
    recorded = state.controller.window.buffer[0, :40]
    np.testing.assert_allclose(recorded, _alignments(grads), rtol=1e-4, atol=1e-5)


def _t_test_of_batches(values: np.ndarray) -> Any:
    """SciPy's t-test of the means of 20 batches, of 20 samples each."""
    means = values.reshape(20, 20).mean(axis=1)
    return scipy.stats.ttest_1samp(means, 0, alternative="greater")


def _samples(values: np.ndarray, count: jax.Array) -> sasa_optax.Samples:
    values = values.astype(np.float32)
    scales = jnp.ones(values.size)
    return sasa_optax.Samples(jnp.asarray(values), scales, count, count, jnp.int32(0))


@pytest.mark.parametrize("mean", [-0.3, 0.1, 0.3, 0.6])
def test_the_test_is_a_one_sided_t_test_of_batch_means(
    guide: dict[str, Any], mean: float
) -> None:
    values = mean + np.random.default_rng(3).normal(size=400)
    padded = np.pad(values, (0, 100))
    count = jnp.int32(400)
    samples = _samples(padded, count)
    result = guide["NotPositiveTest"](significance=0.01)(samples)
    expected = _t_test_of_batches(values)
    interval = expected.confidence_interval(0.99)
    np.testing.assert_allclose(result.p_value, expected.pvalue, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(result.lower, interval.low, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(result.upper + result.lower, 2 * result.mean, rtol=1e-5)
    assert bool(result.stationary) == (expected.pvalue > 0.01)


def test_the_significance_of_the_test_can_be_mapped_over(guide: dict[str, Any]) -> None:
    values = 0.12 + np.random.default_rng(3).normal(size=400)
    count = jnp.int32(400)
    samples = _samples(values, count)
    levels = jnp.array([0.5, 2.0]) * _t_test_of_batches(values).pvalue

    def judge(test: Any) -> jax.Array:
        return test(samples).stationary

    decisions = jax.vmap(judge)(guide["NotPositiveTest"](levels))
    assert decisions.tolist() == [True, False]


def test_the_optimizer_drops_once_the_gradients_no_longer_agree(
    guide: dict[str, Any],
) -> None:
    window = sasa_optax.Window(min_samples=50, leak_ratio=2, test_interval=10)
    optimizer = guide["alignment_sgd"](0.5, window=window)
    noise = jax.random.normal(jax.random.key(1), (400, 50))
    state, _ = _run(optimizer, jnp.zeros(50), noise + 1.0)
    assert int(state.controller.num_drops) == 0
    state, path = _run(optimizer, jnp.zeros(50), noise)
    assert int(state.controller.num_drops) >= 1
    # Until the first drop it is normalised momentum, at the rate given.
    first = 50
    trace, params = np.zeros(50), np.zeros(50)
    for grad in np.asarray(noise[:first], np.float64):
        trace = 0.1 * grad + 0.9 * trace
        params = params - 0.5 * trace
    np.testing.assert_allclose(path[first - 1], params, rtol=1e-4, atol=1e-5)


def test_the_parts_take_about_ten_lines() -> None:
    text = (_ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        lines = [line for line in block.splitlines() if line and "import" not in line]
        assert len(lines) <= 12


def test_every_module_is_in_the_table() -> None:
    text = (_ROOT / "CONTRIBUTING.md").read_text()
    modules = {path.name for path in (_ROOT / "sasa_optax").glob("_[a-z]*.py")}
    assert set(re.findall(r"`(_[a-z]\w+\.py)`", text)) == modules


def test_the_page_of_the_interface_lists_every_public_name_once() -> None:
    listed = re.findall(r":: sasa_optax\.(\w+)", (_ROOT / "docs/api.rst").read_text())
    public = {name for name in vars(sasa_optax) if not name.startswith("_")}
    assert sorted(listed) == sorted(public)


# The statistic with a state, in docs/statistics.md.


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return _names_of("docs/statistics.md")


def test_the_statistic_of_the_page_remembers_the_gradient_before(
    page: dict[str, Any],
) -> None:
    grads = np.array(0.5 + jax.random.normal(jax.random.key(0), (40, 7)))
    grads[20] = np.nan
    window = sasa_optax.Window(max_window=1024)
    optimizer = sasa_optax.sasa_plus(
        0.1, momentum=0.0, statistic=page["agreement_statistic"](), window=window
    )
    state, _ = _run(optimizer, jnp.ones(7), jnp.asarray(grads))
    seen = np.delete(grads, 20, axis=0).astype(np.float64)
    before = np.vstack([np.zeros(7), seen[:-1]])
    recorded = state.controller.window.buffer[:, :39]
    np.testing.assert_allclose(
        recorded[0], np.sum(seen * before, axis=1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(recorded[1], np.sum(seen**2, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(state.controller.statistic, grads[-1])
    assert int(state.controller.num_nonfinite) == 1


def test_the_mean_at_stationarity_is_what_the_page_says(page: dict[str, Any]) -> None:
    rate, curvature = 0.4, 0.5
    window = sasa_optax.Window(leak_ratio=2, max_window=8192)
    optimizer: Any = sasa_optax.sasa_plus(
        rate, momentum=0.0, statistic=page["agreement_statistic"](), window=window
    )

    def step(carry: Any, noise: jax.Array) -> Any:
        params, state = carry
        grad = curvature * params + noise
        updates, state = optimizer.update(grad, state, params)
        return (params + updates, state), None

    params = jnp.zeros(300)
    noise = jax.random.normal(jax.random.key(0), (2000, 300))
    (_, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), noise)
    values, scales = state.controller.window.buffer[:, 1000:2000]
    expected = -rate * curvature / 2
    error = math.sqrt(1 / (300 * 1000))
    assert abs(values.mean() / scales.mean() - expected) < 5 * error


def test_the_loop_of_the_page_drops_once_the_gradients_disagree(
    page: dict[str, Any],
) -> None:
    metrics = sasa_optax.metrics(page["state"])
    assert int(metrics["num_drops"]) >= 1
    # Far from the start, 5, the standard deviation is sqrt(0.1 / 1.9) before the drop.
    assert float(jnp.sqrt(jnp.mean(page["params"] ** 2))) < 0.3
