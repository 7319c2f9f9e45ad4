"""Step by step, the traces of statopt, which is the package of the authors."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

import sasa_optax

_VARIANCE = {
    None: "iid",
    "bm": "batch_means",
    "olbm": "overlapping_batch_means",
}
# Beyond five drops the rate is rounding noise.
_DROPS_COMPARED = 5


def _load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    path = pathlib.Path(__file__).parent.parent / "golden" / f"{name}.npz"
    with np.load(path) as arrays:
        trace = dict(arrays)
    return trace, json.loads(str(trace.pop("meta")))


# Our names for the arguments of statopt, by the object that has them as a field.
_OF_OPTIMIZER = {
    "lr": "learning_rate",
    "momentum": "momentum",
    "qhm_nu": "nu",
    "weight_decay": "weight_decay",
}
_OF_WINDOW = {
    "minN_stats": "min_samples",
    "testfreq": "test_interval",
    "warmup": "warmup_steps",
    "leak_ratio": "leak_ratio",
}
_OF_SEARCH = {
    "gamma": "smoothing",
    "ls_sdc": "sufficient_decrease",
    "ls_max": "max_trials",
}


def _arguments(meta: dict[str, Any]) -> dict[str, Any]:
    """The arguments of our optimizer that correspond to statopt's."""
    given = meta["statopt_kwargs"]

    def named(names: dict[str, str]) -> dict[str, Any]:
        return {ours: given[name] for name, ours in names.items() if name in given}

    arguments = named(_OF_OPTIMIZER)
    window, search = named(_OF_WINDOW), named(_OF_SEARCH)
    assert len(arguments) + len(window) + len(search) == len(given)
    if window:
        arguments["window"] = sasa_optax.Window(**window, max_window=2048)
    if search:
        arguments["search"] = sasa_optax.LineSearch(**search)
    return arguments


def _zero_mean(meta: dict[str, Any]) -> sasa_optax.ZeroMeanTest:
    return sasa_optax.ZeroMeanTest(variance=_VARIANCE[meta["var_mode"]])


def _run(
    optimizer: optax.GradientTransformation,
    trace: dict[str, np.ndarray],
    meta: dict[str, Any],
    see: Callable[[Any], Any] = lambda state: None,
) -> tuple[np.ndarray, Any]:
    """The parameters after every step, and what ``see`` makes of the state."""
    features, targets = jnp.asarray(trace["X"]), jnp.asarray(trace["y"])

    def loss(w: jax.Array, rows: jax.Array) -> jax.Array:
        outputs = features[rows] @ w
        if meta["problem"] == "lsq":
            return jnp.mean((outputs - targets[rows]) ** 2) / 2
        return optax.softmax_cross_entropy_with_integer_labels(
            outputs, targets[rows]
        ).mean()

    def step(carry: Any, rows: jax.Array) -> Any:
        w, state = carry
        value, grads = jax.value_and_grad(loss)(w, rows)
        updates, state = optax.with_extra_args_support(optimizer).update(
            grads, state, w, value=value, value_fn=loss, rows=rows
        )
        w = optax.apply_updates(w, updates)
        return (w, state), (w, see(state))

    w0, order = jnp.asarray(trace["w0"]), jnp.asarray(trace["order"])
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, order)[1])
    weights, seen = scan((w0, optimizer.init(w0)))
    return np.asarray(weights), seen


def _assert_drops(
    metrics: dict[str, jax.Array], trace: dict[str, np.ndarray], meta: dict[str, Any]
) -> int:
    """Checks the drops, and the rate up to the last one compared; returns its step."""
    dropped = np.diff(np.asarray(metrics["num_drops"]), prepend=0)
    assert (np.flatnonzero(dropped) + 1).tolist() == meta["drop_steps"]
    compared = meta["drop_steps"][:_DROPS_COMPARED][-1]
    np.testing.assert_allclose(
        metrics["learning_rate"][:compared], trace["lr"][:compared], rtol=1e-6
    )
    return compared


@pytest.mark.usefixtures("x64")
def test_qhm() -> None:
    trace, meta = _load("qhm_nu07")
    optimizer = sasa_optax.qhm(**_arguments(meta))
    weights, _ = _run(optimizer, trace, meta)
    np.testing.assert_allclose(weights[499::500], trace["params_every_500"], atol=1e-12)


def _see(state: Any) -> Any:
    return sasa_optax.metrics(state), optax.tree.get(state, "window").buffer


def _assert_samples_and_tests(
    seen: Any, trace: dict[str, np.ndarray], meta: dict[str, Any], compared: int
) -> None:
    metrics, buffers = seen
    newest = np.asarray(buffers)[:, 0]
    samples = newest[np.arange(compared), np.arange(compared) % newest.shape[1]]
    np.testing.assert_allclose(samples, trace["statistic"][:compared], atol=1e-10)

    # Only a test leaves its step in the state.
    steps = trace["tests"][:, 0].astype(int)
    assert np.unique(metrics["test_step"])[1:].tolist() == steps.tolist()
    judged = trace["tests"][steps <= compared]
    at = steps[steps <= compared] - 1
    means = np.asarray(metrics["test_mean"])[at]
    np.testing.assert_allclose(means, judged[:, 1], atol=1e-10)
    stationary = np.asarray(metrics["test_stationary"])[steps - 1]
    assert stationary.tolist() == trace["tests"][:, 4].astype(bool).tolist()
    # statopt counts the degrees of freedom of batch means from the batches' length
    # instead of their number, which moves the width by up to 1.6 %.
    width_tolerance = 0.016 if meta["var_mode"] == "bm" else 1e-8
    widths = np.asarray(metrics["test_upper"] - metrics["test_lower"])[at]
    np.testing.assert_allclose(
        widths, judged[:, 3] - judged[:, 2], rtol=width_tolerance
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", ["sasa_plus_iid", "sasa_plus_batch_means", "sasa_plus_overlapping"]
)
def test_sasa_plus(name: str) -> None:
    trace, meta = _load(name)
    optimizer = sasa_optax.sasa_plus(**_arguments(meta), test=_zero_mean(meta))
    weights, seen = _run(optimizer, trace, meta, _see)
    compared = _assert_drops(seen[0], trace, meta)
    _assert_samples_and_tests(seen, trace, meta, compared)
    np.testing.assert_allclose(weights[499::500], trace["params_every_500"], atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_ssls() -> None:
    trace, meta = _load("ssls")
    optimizer = sasa_optax.ssls(**_arguments(meta))
    weights, metrics = _run(optimizer, trace, meta, sasa_optax.metrics)
    np.testing.assert_allclose(metrics["learning_rate"], trace["lr"], rtol=1e-12)
    np.testing.assert_allclose(weights[499::500], trace["params_every_500"], atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["salsa_iid", "salsa_batch_means"])
def test_salsa(name: str) -> None:
    trace, meta = _load(name)
    optimizer = sasa_optax.salsa(**_arguments(meta), test=_zero_mean(meta))
    weights, seen = _run(optimizer, trace, meta, _see)
    compared = _assert_drops(seen[0], trace, meta)
    _assert_samples_and_tests(seen, trace, meta, compared)
    np.testing.assert_allclose(weights[499::500], trace["params_every_500"], atol=1e-10)
    active = np.asarray(seen[0]["line_search_active"])
    ended = int(np.argmin(active)) + 1
    assert ended == _first_step_without_decrease(weights, trace, meta)
    assert not active[ended - 1 :].any()
    # The rate of statopt shows its last search, but not when the search ended.
    changed = set((np.flatnonzero(np.diff(trace["lr"])) + 2).tolist())
    assert max(changed - set(meta["drop_steps"])) <= ended < meta["drop_steps"][0]


def _first_step_without_decrease(
    weights: np.ndarray, trace: dict[str, np.ndarray], meta: dict[str, Any]
) -> int:
    """The first step at which SciPy's regression sees no decrease of the losses."""
    given = meta["statopt_kwargs"]
    losses: list[float] = []
    before = np.concatenate([trace["w0"][None], weights])
    for w, rows in zip(before, trace["order"], strict=False):
        outputs = trace["X"][rows] @ w
        if meta["problem"] == "lsq":
            loss = np.mean((outputs - trace["y"][rows]) ** 2) / 2
        else:
            log_probs = scipy.special.log_softmax(outputs, axis=1)
            loss = -np.mean(log_probs[np.arange(len(rows)), trace["y"][rows]])
        losses.append(loss + given["weight_decay"] / 2 * np.sum(w**2))
        kept = -(-len(losses) // given["leak_ratio"])
        if kept > given["minN_stats"]:
            # The stubs do not know the fields of what SciPy returns.
            line: Any = scipy.stats.linregress(
                np.arange(kept), losses[-kept:], alternative="less"
            )
            if line.pvalue >= 0.05:
                return len(losses)
    raise AssertionError("the losses fall to the end")


@pytest.mark.usefixtures("x64")
def test_slope() -> None:
    trace, meta = _load("slope_linear")
    optimizer = sasa_optax.slope(**_arguments(meta))
    weights, metrics = _run(optimizer, trace, meta, sasa_optax.metrics)
    _assert_drops(metrics, trace, meta)
    np.testing.assert_allclose(weights[499::500], trace["params_every_500"], atol=1e-10)
    steps, slopes, p_values, _, stationary = trace["tests"].T
    at = steps.astype(int) - 1
    assert np.unique(metrics["test_step"])[1:].tolist() == steps.tolist()
    np.testing.assert_allclose(metrics["test_mean"][at], slopes, atol=1e-12)
    np.testing.assert_allclose(metrics["test_p_value"][at], p_values, atol=1e-6)
    assert metrics["test_stationary"][at].tolist() == stationary.astype(bool).tolist()
