"""Progress: how far the iterates have come, beside what a random walk would have."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sasa_optax import _average, _checks, _tree, _types
from sasa_optax._statistics import dissipation

_LEAK_RATIO = 8


class ProgressState(NamedTuple):
    """An average of the iterates, and how far the newest is from it.

    Attributes:
      progress: R, shape (), float32, or float64 where a parameter is. One until
        something has moved.
      walks: B of each leaf that is averaged, the squared distance from the average
        that a random walk of the same updates would have; shape (leaves,), of the
        dtype of ``progress``.
      num_walked: steps since the walks began, shape (), int32.
      average: the `AverageState` that `averaged_params` returns.
    """

    progress: jax.Array
    walks: jax.Array
    num_walked: jax.Array
    average: _average.AverageState


def start(params: optax.Params, dtype: jnp.dtype | None) -> ProgressState:
    number, num_leaves = _tree.statistic_dtype(params), len(_inexact(params))
    return ProgressState(
        progress=jnp.ones((), number),
        walks=jnp.zeros((num_leaves,), number),
        num_walked=jnp.zeros((), jnp.int32),
        average=_average.start(params, dtype),
    )


def weight(average: _average.AverageState, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The weight of the next iterate in the average, one over its horizon."""
    horizon = _average.DEFAULT_MIN_HORIZON
    return _average.weight(average, _LEAK_RATIO, horizon, dtype)


def step(
    updates: optax.Updates,
    state: ProgressState,
    params: optax.Params,
    *,
    momentum: jax.typing.ArrayLike,
    axis_name: _tree.AxisName,
    scale: jax.Array | None = None,
    returns: jax.Array | None = None,
) -> tuple[optax.Updates, ProgressState]:
    """The updates times ``scale``, or back to the average where ``returns`` is true.

    After a return the walk begins anew.
    """
    centre, dtype = state.average.averaged, state.progress.dtype

    def moved(updates: Any, params: Any, centre: Any) -> tuple[Any, Any]:
        if returns is not None:
            updates = _returned(returns, updates, params, centre)
        # As the caller will compute them, so that XLA merges the two.
        return updates, optax.apply_updates(params, updates)

    def sums(updates: Any, params: Any, centre: Any) -> list[jax.Array]:
        # Of what is scaled, not of what is applied: that would read the old parameters.
        # They differ where the walk begins anew.
        offset = _tree.subtract(moved(updates, params, centre)[1], centre)
        offset, updates = _inexact(offset), _inexact(updates)
        pairs = [(offset, offset), (updates, updates)]
        return _tree.leaf_products(pairs, dtype, axis_name)

    of_new = weight(state.average, dtype)
    if scale is not None:
        updates = _scaled(scale, updates)
    updates, always = _tree.in_sequence(
        updates,
        [params, centre],
        lambda *lists: [jnp.sum(x) for x in sums(*lists)],
        of_new,
        state.average.num_averaged,
    )
    distances, lengths = jax.lax.stop_gradient(sums(updates, params, centre))
    updates, new_params = moved(updates, params, centre)
    progress, walks = _measured(state, distances, lengths, of_new, momentum, always)
    num_walked = jnp.asarray(optax.safe_increment(state.num_walked))
    if returns is not None:
        progress = jnp.where(returns, state.progress, progress)
        walks, num_walked = (
            jnp.where(returns, 0, walks),
            jnp.where(returns, 0, num_walked),
        )
    average = _average.push(state.average, new_params, of_new)
    return updates, ProgressState(progress, walks, num_walked, average)


def _inexact(tree: Any) -> list[jax.Array]:
    """The leaves that are averaged."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def _scaled(scale: jax.Array, updates: optax.Updates) -> optax.Updates:
    def multiply(u: jax.typing.ArrayLike) -> Any:
        is_inexact = jnp.issubdtype(jnp.asarray(u).dtype, jnp.inexact)
        return _tree.scale(scale, u) if is_inexact else u

    return jax.tree.map(multiply, updates)


def _returned(
    returns: jax.Array,
    updates: optax.Updates,
    params: optax.Params,
    centre: optax.Params,
) -> optax.Updates:
    def choose(u: jax.Array, x: jax.typing.ArrayLike, c: jax.Array) -> jax.Array:
        back = c - jnp.asarray(x).astype(c.dtype)
        return jnp.where(returns, back.astype(u.dtype), u)

    return jax.tree.map(choose, updates, params, centre)


def _measured(
    state: ProgressState,
    distances: jax.Array,
    moved: jax.Array,
    weight: jax.Array,
    momentum: jax.typing.ArrayLike,
    always: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Progress and the walks after a step, from its squared lengths by leaf.

    The distances are from the average before the step; from the one after it they are
    what is kept of them.
    """
    kept = (1 - weight) ** 2
    factor = jnp.asarray(dissipation(momentum, 1.0), weight.dtype)
    walks = kept * (state.walks + factor * moved)
    is_good = always & jnp.all(jnp.isfinite(distances) & jnp.isfinite(walks))
    walks = jnp.where(is_good, walks, state.walks)
    has_moved = walks > 0
    ratios = jnp.where(has_moved, kept * distances / jnp.where(has_moved, walks, 1), 0)
    num_moved = jnp.sum(has_moved)
    mean = jnp.sum(ratios) / jnp.maximum(num_moved, 1).astype(ratios.dtype)
    return jnp.where(is_good & (num_moved > 0), mean, state.progress), walks


def measure_progress(
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the iterates, measures progress, and leaves the updates alone.

    Last in any chain, for those who want to look before they let
    `adapt_on_progress` set the rate. It keeps the average c of `average_iterates`,
    whose horizon is h = max(32, k/8), and for each leaf of the parameters

    .. math::

      B \leftarrow (1 - \tfrac1h)^2 (B + D \|u_k\|^2), \qquad
      D = \frac{1 + \beta}{1 - \beta},

    where u_k is the update as applied and beta the ``momentum``. **Progress** is the
    mean over the leaves of

    .. math::

      R = \|x_{k+1} - c\|^2 / B,

    the squared distance from the average beside that of a random walk. It has no unit.
    It is 1 where updates are noise around nothing, and the relaxation time over the
    horizon around an optimum. On a straight line it grows with the horizon, from k/D
    in the first steps to 1.7 h/D. As it begins at nearly nothing, read it from some 64
    steps on. See docs/progress.md.

    Args:
      momentum: beta, in [0, 1), of the direction: ``b1`` of Adam, 0 for RMSprop and
        Adafactor, 0.97 for Lion. Default 0.9.
      axis_name: inside `jax.shard_map`, the mesh axis, or a tuple of them, over which
        the parameters are sharded: the sums are then over it, by one all-reduce. Not
        needed under jit, nor where parameters are replicated. Default None.
      dtype: to keep the average in, as in `average_iterates`. Default None.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `ProgressState`;
      `metrics` gives its ``step`` and ``progress``, `averaged_params` its average. Its
      ``update`` needs ``params``, and ignores extra arguments. A step that is not
      finite leaves progress as it was.

    Raises:
      ValueError: at construction, if an argument is out of range; at ``update``, if
        ``params`` is missing.

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
    _checks.axis_name("axis_name", axis_name)
    wide = _average.checked_dtype(dtype)

    def init(params: optax.Params) -> ProgressState:
        return start(params, wide)

    def update(
        updates: optax.Updates,
        state: ProgressState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProgressState]:
        del extra_args
        params = _checks.params(params, "Progress")
        return step(updates, state, params, momentum=momentum, axis_name=axis_name)

    return _types.transformation(init, update)
