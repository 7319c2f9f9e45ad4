"""An average over the newest iterates: a good model at every moment."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sasa_optax import _checks, _tree, _types
from sasa_optax._transformation import Optimizer, transformation
from sasa_optax._types import DType, Numeric

_MIN_HORIZON = 32


class AverageState(NamedTuple):
    """An average of iterates, as `average_iterates` keeps it.

    Attributes:
      num_averaged: steps taken, shape (), int32.
      averaged: c, with the structure and the shapes of the parameters, in float32
        unless another dtype was asked for, and in float64 where the parameters are.
        Integers and booleans are not averaged. They are those of the newest step.
    """

    num_averaged: jax.Array
    averaged: optax.Params


def start(params: optax.Params, dtype: jnp.dtype | None = None) -> AverageState:
    """An average that begins at the parameters, in buffers of its own."""

    def copied(x: Numeric) -> jax.Array:
        x = jnp.asarray(x)
        kept, wide = x.dtype, jnp.float32 if dtype is None else dtype
        if jnp.issubdtype(kept, jnp.inexact):
            # The average of a leaf is never narrower than the leaf. JAX promotes no
            # float8, but what takes two bytes or one is narrower anyway.
            is_narrow = kept.itemsize < 4
            kept = wide if is_narrow else jnp.promote_types(kept, wide)
        return jnp.array(x, kept, copy=True)

    return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(copied, params))


def weight(
    state: AverageState,
    leak_ratio: Numeric,
    min_horizon: Numeric = _MIN_HORIZON,
    *,
    dtype: DType,
) -> jax.Array:
    """The weight of the next iterate, 1 / max(min_horizon, steps / leak_ratio)."""
    steps = jnp.asarray(optax.safe_increment(state.num_averaged)).astype(dtype)
    horizon = steps / jnp.asarray(leak_ratio, dtype)
    return 1 / jnp.maximum(jnp.asarray(min_horizon, dtype), horizon)


def push(
    state: AverageState, new_params: optax.Params, weight: jax.Array
) -> AverageState:
    """Moves the average towards the new iterate, where that is finite."""

    def moved(c: jax.Array, x: Numeric) -> jax.Array:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        real = jnp.finfo(c.dtype).dtype
        new = c + weight.astype(real) * (x.astype(c.dtype) - c)
        return jax.lax.select(jnp.isfinite(new), new, c)

    averaged = jax.tree.map(moved, state.averaged, jax.lax.stop_gradient(new_params))
    num_averaged = jnp.asarray(optax.safe_increment(state.num_averaged))
    return AverageState(num_averaged, averaged)


def offset(params: optax.Params, averaged: optax.Params) -> optax.Params:
    """x - c, in the dtypes of the average; 0.0 where a leaf is not averaged."""

    def from_average(x: Numeric, c: jax.Array) -> jax.Array:
        if not jnp.issubdtype(c.dtype, jnp.inexact):
            return jnp.zeros_like(c, jnp.float32)
        return jnp.asarray(x).astype(c.dtype) - c

    return jax.tree.map(from_average, params, averaged)


def returned(
    returns: jax.Array,
    updates: optax.Updates,
    params: optax.Params,
    averaged: optax.Params,
) -> optax.Updates:
    """The updates, or the way to the average where ``returns`` is true."""

    def choose(u: jax.Array, from_average: jax.Array) -> jax.Array:
        return jax.lax.select(returns, (-from_average).astype(u.dtype), u)

    return jax.tree.map(choose, updates, offset(params, averaged))


def checked_dtype(dtype: DType | None) -> jnp.dtype | None:
    if dtype is None:
        return None
    wide = jnp.dtype(dtype)
    if not jnp.issubdtype(wide, jnp.floating) or wide.itemsize < 4:
        # An average over n iterates moves by 1/n of its distance from them. From
        # n = 256 on, 8 bits of mantissa round that to nothing.
        raise ValueError(
            f"dtype must be float32 or float64, or None, got {wide.name!r}: a narrower "
            "average would stand still."
        )
    if jax.dtypes.canonicalize_dtype(wide) != wide:
        raise ValueError(
            f"dtype must be float32 or None, got {wide.name!r}, unless "
            "`jax_enable_x64` is set."
        )
    return wide


def average_iterates(
    leak_ratio: Numeric = 8,
    min_horizon: Numeric = _MIN_HORIZON,
    dtype: DType | None = None,
) -> Optimizer:
    r"""Averages the newest part of the iterates, and leaves the updates alone.

    Put it last in any chain. After step k it moves

    .. math::

      c \leftarrow c + \frac{x_{k+1} - c}{\max(h, k / r)}, \qquad c_0 = x_0,

    with r = ``leak_ratio`` and h = ``min_horizon``. So c is an average over about the
    newest 1/r of all iterates at every moment. At a constant rate it is the better
    model (`Polyak and Juditsky, 1992 <https://doi.org/10.1137/0330046>`_), and needs no
    horizon: `averaged_params` returns it. The training itself does not change. The
    running statistics of batch norm belong to the iterates and not to their average;
    docs/averaging.md shows how to renew them.

    Args:
      leak_ratio: r, an integer of at least 1. Default 8.
      min_horizon: h, the least number of steps to average over, in [1, inf). Default
        32.
      dtype: the dtype of the average, float32 or float64. Default None: float32, or
        float64 for parameters that are. It is never narrower than a parameter.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `AverageState`. Its
      ``update`` needs ``params``, and ignores extra arguments. A coordinate that is not
      finite after a step leaves its average unchanged.

    Raises:
      ValueError: if an argument is out of range, or ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax, sasa_optax
      >>> optimizer = optax.chain(optax.sgd(0.5), sasa_optax.average_iterates())
      >>> params = jnp.ones(3)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.ones(3), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, sasa_optax.averaged_params(state, params))
      [0.5 0.5 0.5] [0.984375 0.984375 0.984375]
    """
    _checks.integer("leak_ratio", leak_ratio, 1)
    _checks.number("min_horizon", min_horizon, "[1, inf)")
    wide = checked_dtype(dtype)

    def init(params: optax.Params) -> AverageState:
        return start(params, wide)

    def update(
        updates: optax.Updates, state: AverageState, params: optax.Params, **_: Any
    ) -> tuple[optax.Updates, AverageState]:
        # XLA merges this with the caller's own computation of the same.
        new_params = optax.apply_updates(params, updates)
        dtype = _tree.statistic_dtype(params)
        of_new = weight(state, leak_ratio, min_horizon, dtype=dtype)
        return updates, push(state, new_params, of_new)

    return transformation(init, update, AverageState)


def maybe_averaged(
    optimizer: Optimizer,
    average: bool,
    leak_ratio: Numeric,
    is_lost: Callable[[Any], jax.Array] | None = None,
) -> Optimizer:
    """The optimizer, with `average_iterates` after it if ``average`` is true.

    With ``is_lost``, a function of the optimizer's state, the parameters return to
    their average at a lost step.
    """
    _checks.boolean("average", average)
    if not average:
        return optimizer
    if is_lost is None:
        return optax.chain(optimizer, average_iterates(leak_ratio))
    return _returning(optimizer, leak_ratio, is_lost)


def _returning(
    optimizer: Optimizer,
    leak_ratio: Numeric,
    is_lost: Callable[[Any], jax.Array],
) -> Optimizer:
    """An optimizer with an average, to which the parameters return at a lost step.

    An iterate enters the average a step later than in `average_iterates`, when it is
    known not to be lost. Otherwise a leap out of the domain of the loss would spoil the
    average that it is to return to.
    """

    def init(params: optax.Params) -> tuple[Any, AverageState]:
        return optimizer.init(params), start(params)

    def update(
        updates: optax.Updates,
        state: tuple[Any, AverageState],
        params: optax.Params,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[Any, AverageState]]:
        _checks.state(state[-1], AverageState)
        inner, average = state
        updates, inner = optimizer.update(updates, inner, params, **extra_args)
        returns = is_lost(inner)
        of_this = weight(average, leak_ratio, dtype=_tree.statistic_dtype(params))
        average = push(average, params, jnp.where(returns, 0, of_this))
        updates = returned(returns, updates, params, average.averaged)
        return updates, (inner, average)

    return transformation(init, update, tuple)


def _averages(opt_state: Any) -> list[optax.Params]:
    """All averages in a state, except those that a statistic measures from."""

    def is_average(node: Any) -> bool:
        return isinstance(node, AverageState)

    def is_of_statistic(path: tuple[Any, ...]) -> bool:
        return any(getattr(key, "name", None) == "statistic" for key in path)

    nodes = jax.tree.leaves_with_path(opt_state, is_leaf=is_average)
    nodes = [x for path, x in nodes if is_average(x) and not is_of_statistic(path)]
    return [node.averaged for node in nodes]


def averaged_params(opt_state: Any, params: optax.Params | None = None) -> optax.Params:
    """The averaged model, to evaluate, to keep and to deploy.

    Args:
      opt_state: the state of an optimizer with `adapt_on_progress`, `measure_progress`,
        `average_iterates` or ``average=True`` in it, at any depth: a chain,
        `optax.masked`, `optax.partition`, `optax.MultiSteps`, a Flax train state.
      params: the current parameters, or a model that contains them. They give the
        result its structure and dtypes, and stand in for what is not averaged, such as
        integers and booleans. They are needed where the dtypes differ (bfloat16), with
        Flax NNX (``nnx.state(model, nnx.Param)``), and under `optax.masked` or
        `optax.partition`. Default None: the average as it is kept, which for parameters
        of float32 or float64 is the same.

    Returns:
      The average, in buffers of its own: the state may be donated afterwards. Before
      the first step it is the initial parameters.

    Raises:
      ValueError: if there is no average in ``opt_state``, or more than one of the same
        parameter; if ``params`` is needed to fill in what is not averaged; or if it
        is not of the structure that the average is.

    Example:
      >>> import jax.numpy as jnp
      >>> import sasa_optax
      >>> optimizer = sasa_optax.sasa_plus(1.0, average=True)
      >>> state = optimizer.init(jnp.ones(3))
      >>> print(sasa_optax.averaged_params(state))
      [1. 1. 1.]
    """
    averages = _averages(opt_state)
    if not averages:
        raise ValueError(
            "opt_state must hold an average: chain `sasa_optax.adapt_on_progress()` or "
            "`sasa_optax.average_iterates()` last, or pass average=True. Got "
            f"{type(opt_state)}."
        )
    if params is None:
        return _whole(averages)
    # By their paths: Flax NNX keeps them in other classes than the parameters.
    found: dict[Any, jax.Array] = {}
    for path, leaf in itertools.chain(*map(jax.tree.leaves_with_path, averages)):
        if path in found:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"opt_state averages the parameter {name} twice.")
        found[path] = leaf

    def of_leaf(path: Any, x: Any) -> Any:
        if path not in found:
            # Also what is no number, such as the functions in an Equinox model.
            return jnp.array(x) if isinstance(x, jax.Array | np.ndarray) else x
        leaf = found.pop(path)
        if jnp.shape(leaf) != jnp.shape(x):
            raise ValueError(
                f"params must have the shapes of those that are averaged, got "
                f"{jnp.shape(x)} for {jnp.shape(leaf)} at {jax.tree_util.keystr(path)}."
            )
        newest = jnp.asarray(x)
        is_averaged = jnp.issubdtype(newest.dtype, jnp.inexact)
        return jnp.array(leaf if is_averaged else newest, newest.dtype, copy=True)

    result = jax.tree.map_with_path(of_leaf, params)
    if found:
        raise ValueError(
            "params must have the structure of those that are averaged, got no "
            f"{', '.join(map(jax.tree_util.keystr, found))}."
        )
    return result


def _whole(averages: list[optax.Params]) -> optax.Params:
    """A copy of the one average there is, if it has all of the parameters."""
    nodes = jax.tree.leaves(averages, is_leaf=_types.is_masked)
    if len(averages) > 1 or any(map(_types.is_masked, nodes)):
        raise ValueError(
            "params is needed, as opt_state averages parts of the parameters: call "
            "`sasa_optax.averaged_params(opt_state, params)`."
        )
    return jax.tree.map(jnp.copy, averages[0])
