"""Progress: how far the iterates have come, compared with a random walk."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _average, _checks, _cpu_schedule, _products, _tree
from sasa_optax._statistics import dissipation
from sasa_optax._transformation import Optimizer, transformation
from sasa_optax._types import AxisName, DType, Numeric

_LEAK_RATIO = 8


class ProgressState(NamedTuple):
    """An average of the iterates, and how far the newest is from it.

    Attributes:
      progress: R, shape (), float32, or float64 where a parameter is. It is one until
        something has moved.
      walks: B of each leaf that is averaged, the squared distance from the average that
        a random walk of the same updates would have; shape (leaves,), in the dtype of
        ``progress``.
      num_walked: steps since the walks began, shape (), int32.
      average: the `AverageState` that `averaged_params` returns.
    """

    progress: jax.Array
    walks: jax.Array
    num_walked: jax.Array
    average: _average.AverageState


def start(params: optax.Params, dtype: jnp.dtype | None) -> ProgressState:
    number = _tree.statistic_dtype(params)
    num_leaves = len(_averaged(params, params))
    return ProgressState(
        progress=jnp.ones((), number),
        walks=jnp.zeros((num_leaves,), number),
        num_walked=jnp.zeros((), jnp.int32),
        average=_average.start(params, dtype),
    )


def weight(state: ProgressState) -> jax.Array:
    """The weight of the next iterate in the average, one over the horizon."""
    return _average.weight(state.average, _LEAK_RATIO, dtype=state.progress.dtype)


def step(
    updates: optax.Updates,
    state: ProgressState,
    params: optax.Params,
    momentum: Numeric,
    axis_name: AxisName,
    scale: jax.Array | None = None,
    returns: jax.Array | None = None,
) -> tuple[optax.Updates, ProgressState]:
    """Changes the updates if asked to, and measures the step that they make.

    The updates are multiplied by ``scale``. Where ``returns`` is true, they lead back
    to the average instead, and the walks begin anew.
    """
    average, dtype = state.average, state.progress.dtype
    of_new = weight(state)

    def moved(updates: Any, params: Any, centre: Any) -> tuple[Any, Any, Any]:
        if returns is not None:
            updates = _average.returned(returns, updates, params, centre)
        # XLA merges this with the caller's own computation of the same.
        new_params = optax.apply_updates(params, updates)
        old = average._replace(averaged=centre)
        return updates, new_params, _average.push(old, new_params, of_new)

    def products(updates: Any, trees: Any) -> _cpu_schedule.Rows:
        params, centre = trees
        # The distance from the new average, which may then take the place of the old.
        _, new_params, new_average = moved(updates, params, centre)
        offset = _average.offset(new_params, new_average.averaged)
        # The lengths are those before a return, which would read the old parameters.
        # After a return the walks begin anew, so they do not matter.
        offset, updates = _averaged(offset, centre), _averaged(updates, centre)
        pairs = [(offset, offset), (updates, updates)]
        return _products.leaf_products(pairs, dtype, axis_name)

    if scale is not None:
        updates = _scaled(scale, updates)
    updates, rows = _cpu_schedule.in_groups(
        updates, (params, average.averaged), products, average.num_averaged, dtype
    )
    distances, lengths = rows
    updates, _, average = moved(updates, params, average.averaged)
    progress, walks = _measured(state, distances, lengths, of_new, momentum)
    num_walked = jnp.asarray(optax.safe_increment(state.num_walked))
    if returns is not None:
        progress = jnp.where(returns, state.progress, progress)
        walks = jnp.where(returns, 0, walks)
        num_walked = jnp.where(returns, 0, num_walked)
    return updates, ProgressState(progress, walks, num_walked, average)


def _averaged(tree: Any, centre: optax.Params) -> list[jax.Array]:
    """The leaves that are averaged in ``centre``, whatever their own dtypes."""
    leaves = zip(*map(jax.tree.leaves, (tree, centre)), strict=True)
    return [
        jnp.asarray(x)
        for x, c in leaves
        if jnp.issubdtype(jnp.asarray(c).dtype, jnp.inexact)
    ]


def _scaled(scale: jax.Array, updates: optax.Updates) -> optax.Updates:
    def multiply(u: Numeric) -> Any:
        is_inexact = jnp.issubdtype(jnp.asarray(u).dtype, jnp.inexact)
        return _tree.scale(scale, u) if is_inexact else u

    return jax.tree.map(multiply, updates)


def _measured(
    state: ProgressState,
    distances: jax.Array,
    lengths: jax.Array,
    weight: jax.Array,
    momentum: Numeric,
) -> tuple[jax.Array, jax.Array]:
    """Progress and the walks after a step, from its squared lengths by leaf.

    The distances are from the average after the step, which enters it with ``weight``.
    """
    kept = (1 - weight) ** 2
    factor = jnp.asarray(dissipation(momentum, 1.0), weight.dtype)
    walks = kept * (state.walks + factor * lengths)
    is_good = jnp.all(jnp.isfinite(distances) & jnp.isfinite(walks))
    walks = jnp.where(is_good, walks, state.walks)
    has_moved = walks > 0
    ratios = jnp.where(has_moved, distances / jnp.where(has_moved, walks, 1), 0)
    num_moved = jnp.sum(has_moved)
    mean = jnp.sum(ratios) / jnp.maximum(num_moved, 1).astype(ratios.dtype)
    return jnp.where(is_good & (num_moved > 0), mean, state.progress), walks


def measure_progress(
    momentum: Numeric = 0.9,
    *,
    axis_name: AxisName = None,
    dtype: DType | None = None,
) -> Optimizer:
    r"""Averages the iterates, measures progress, and leaves the updates alone.

    Put it last in any chain to look at progress before you let `adapt_on_progress` set
    the rate. It keeps the average c of `average_iterates`, whose horizon is
    h = max(32, k/8), and for each leaf of the parameters

    .. math::

      B \leftarrow (1 - \tfrac1h)^2 (B + D \|u_k\|^2), \qquad
      D = \frac{1 + \beta}{1 - \beta},

    where u_k is the update as applied and beta the ``momentum``. **Progress** is the
    mean over the leaves of

    .. math::

      R = \|x_{k+1} - c\|^2 / B,

    the squared distance from the average over that of a random walk. It has no unit. It
    is 1 where the updates are pure noise. Around an optimum it is the relaxation time
    over the horizon. On a straight line it grows with the horizon, from k/D in the
    first steps to 1.7 h/D. It starts near zero there, so read it after some 64 steps.
    See docs/progress.md.

    Args:
      momentum: beta of the direction, in [0, 1): ``b1`` of Adam, 0 for RMSprop and
        Adafactor, 0.97 for Lion. Default 0.9.
      axis_name: see `scale_by_sasa_plus`. Default None.
      dtype: the dtype of the average, as in `average_iterates`. Default None.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `ProgressState`;
      `metrics` gives its ``step`` and ``progress``, `averaged_params` its average. Its
      ``update`` needs ``params``, and ignores extra arguments. A step that is not
      finite leaves progress as it was.

    Raises:
      ValueError: if an argument is out of range, or ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax, sasa_optax
      >>> optimizer = optax.chain(optax.sgd(0.1), sasa_optax.measure_progress(0.0))
      >>> params = jnp.zeros(3)
      >>> state = optimizer.init(params)
      >>> for _ in range(256):  # along a straight line
      ...     updates, state = optimizer.update(jnp.ones(3), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(sasa_optax.metrics(state)["progress"] > 32)
      True
    """
    _checks.number("momentum", momentum, "[0, 1)")
    _checks.axis_name(axis_name)
    wide = _average.checked_dtype(dtype)

    def init(params: optax.Params) -> ProgressState:
        return start(params, wide)

    def update(
        updates: optax.Updates, state: ProgressState, params: optax.Params, **_: Any
    ) -> tuple[optax.Updates, ProgressState]:
        return step(updates, state, params, momentum, axis_name)

    return transformation(init, update, ProgressState)
