"""Metrics: the scalars in an optimizer's state, for any logger."""

from typing import Any

import jax
import jax.numpy as jnp

from sasa_optax._adapt import MIN_STEPS, AdaptOnProgressState, expected_progress
from sasa_optax._controller import ControllerState
from sasa_optax._line_search import LineSearchState
from sasa_optax._progress import ProgressState
from sasa_optax._stationarity import Reason, TestResult

_Reporting = ControllerState | LineSearchState | AdaptOnProgressState | ProgressState

_CONTROLLER = ("step", "learning_rate", "scale", "num_drops", "last_drop")
_CONTROLLER += ("num_nonfinite", "num_ascents", "next_test")
_SEARCH = ("line_search_active", "step_size", "num_evaluations")
_ADAPTING = ("scale", "target", "sees_loss", "num_overshoots", "num_brakes")
_ADAPTING += ("num_nonfinite", "last_cut", "ceiling")
_LOSSES = ("fast", "slow", "first", "best")


def _test_name(prefix: str, field: str) -> str:
    return f"{prefix}_{field.removeprefix('at_')}"


def _test_fields(prefix: str, test: TestResult | None) -> dict[str, Any]:
    fields = {} if test is None else test._asdict()
    return {_test_name(prefix, field): value for field, value in fields.items()}


def read_test(prefix: str, row: dict[str, Any]) -> TestResult:
    """The `TestResult` whose fields `metrics` gave under this prefix."""
    return TestResult(*(row[_test_name(prefix, field)] for field in TestResult._fields))


def next_test(row: dict[str, Any]) -> str:
    """When the next test can run, in words."""
    due = f"is due at step {row['next_test']} at the earliest."
    if row["test_step"] > row["last_drop"]:
        return f"The next test {due}"
    if row["last_drop"]:
        return f"No test since the drop. The next {due}"
    return f"No test yet. The first {due}"


def outlook(row: dict[str, Any]) -> list[str]:
    """What comes next, and why, each in a few words."""
    parts = []
    if "progress" in row:
        parts.append(f"progress {row['progress']:.2g}{_next_move(row)}")
    if row.get("line_search_active", False):
        parts.append("searching for the rate")
    if "next_test" in row:
        parts.append(f"next test at step {row['next_test']}")
    return parts


def _next_move(row: dict[str, Any]) -> str:
    """Where progress stands beside its target, if it has one, and what follows."""
    if "target" not in row:
        return ""
    if row["step"] < MIN_STEPS:
        move = "too early to judge"
    elif moves_on(row):
        move = "may rise" if row["sees_loss"] else "stays without a loss"
    else:
        has_risen = row["expected_progress"] <= row["target"] < row["progress"]
        move = "has risen enough, may fall" if has_risen else "may fall"
    return f" (target {row['target']:.2g}), {move}"


def moves_on(row: dict[str, Any]) -> bool:
    """Whether progress stays above its target, and the loss has not stalled."""
    is_walk = row["target"] < row["progress"] < 1
    has_stalled = is_walk and row["sees_loss"] and row["loss_fast"] > row["loss_slow"]
    return row["expected_progress"] > row["target"] and not has_stalled


def why_no_cut(test: TestResult) -> str:
    """Why a test made no cut, in words."""
    if test.stationary:
        return "the rate is in its warm-up, or at its floor"
    return Reason(test.reason).text


def _fields(state: _Reporting) -> dict[str, Any]:
    def own(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(state, name) for name in names}

    match state:
        case ControllerState():
            return own(_CONTROLLER) | _test_fields("test", state.last_test)
        case LineSearchState():
            losses = _test_fields("loss_test", state.loss_test)
            return _fields(state.controller) | own(_SEARCH) | losses
        case AdaptOnProgressState():
            losses = {f"loss_{name}": getattr(state.losses, name) for name in _LOSSES}
            expected = {"expected_progress": expected_progress(state)}
            return _fields(state.measured) | expected | own(_ADAPTING) | losses
        case ProgressState():
            return {"step": state.average.num_averaged, "progress": state.progress}


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """The scalars to log: a flat dict of arrays of shape (), usable inside jit.

    Args:
      opt_state: the state of an optimizer of this library, at any depth: in a chain,
        `optax.MultiSteps`, a Flax train state.

    Returns:
      A controller gives ``step``, ``learning_rate``, ``scale``, ``num_drops``,
      ``last_drop``, ``num_nonfinite``, ``num_ascents``, ``next_test``, and the newest
      `TestResult` as ``test_step``, ``test_mean``, ``test_lower``, ``test_upper``,
      ``test_p_value``, ``test_num_samples``, ``test_stationary``, ``test_reason`` (a
      `Reason`). `ssls` has no ``next_test``. `ssls` and `salsa` add
      ``line_search_active``, ``step_size``, ``num_evaluations``. `salsa` also adds the
      newest test of the losses, as ``loss_test_step`` and so on.

      `adapt_on_progress` gives ``step``, ``progress``, ``expected_progress`` (within a
      horizon, if the scale stays as it is), ``scale``, ``target``, ``sees_loss``,
      ``num_overshoots``, ``num_brakes``, ``num_nonfinite``, ``last_cut``, ``ceiling``
      (infinite before the first cut), and of the `LossState` ``loss_fast``,
      ``loss_slow``, ``loss_first``, ``loss_best``.

      `reduce_on_stationarity` and `adapt_on_progress` do not know the rate of the other
      optimizer. They give ``learning_rate``, that rate times the scale, if the other
      optimizer shows it, as ``optax.inject_hyperparams(optax.adamw)(1e-3)`` does.

      `measure_progress` gives ``step`` and ``progress``. Beside a controller it adds
      ``progress`` alone.

      If two states give the same metric, as under `optax.partition`, each key gets a
      prefix: the path to the state and a slash.

    Raises:
      ValueError: if ``opt_state`` has none of these states in it.

    Example:
      >>> import jax.numpy as jnp
      >>> import sasa_optax
      >>> state = sasa_optax.sasa_plus(0.5).init(jnp.zeros(3))
      >>> print(sasa_optax.metrics(state)["learning_rate"])
      0.5
    """

    def is_reporting(node: Any) -> bool:
        return isinstance(node, _Reporting)

    leaves = jax.tree.leaves_with_path(opt_state, is_leaf=is_reporting)
    found = {path: _fields(node) for path, node in leaves if is_reporting(node)}
    if not found:
        raise ValueError(
            "opt_state holds no controller and no progress of sasa_optax: pass the "
            "state that `optimizer.init` or `optimizer.update` returned, got "
            f"{type(opt_state)}."
        )
    names = [name for fields in found.values() for name in fields if name != "step"]
    result: dict[str, Any] = {}
    # A controller has more to say than `measure_progress`, and its step wins.
    for path, fields in sorted(found.items(), key=lambda item: len(item[1])):
        prefix = ""
        if len(names) > len(set(names)):
            prefix = jax.tree_util.keystr(path, simple=True, separator="/") + "/"
        result |= {prefix + name: x for name, x in fields.items()}
    result = {name: x for name, x in result.items() if x is not None}
    injected = [x for path, x in leaves if _is_injected_rate(path)]
    if "learning_rate" not in result and "scale" in result and len(injected) == 1:
        result["learning_rate"] = injected[0] * result["scale"]
    # Through asarray, since Flax NNX wraps each array of an optimizer's state.
    return {name: jnp.asarray(x) for name, x in result.items()}


def _is_injected_rate(path: tuple[Any, ...]) -> bool:
    """Whether the path is that of a rate which `optax.inject_hyperparams` shows."""
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path[-3:]]
    # Flax NNX wraps each array of an optimizer's state, which adds a key at the end.
    return ["hyperparams", "learning_rate"] in (names[-2:], names[:2])
