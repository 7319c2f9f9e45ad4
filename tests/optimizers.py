"""Every public optimizer, ready for tests that treat them all alike."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sasa_optax
from sasa_optax import Window

Optimizer = optax.GradientTransformationExtraArgs

_DEFAULT_WINDOW = Window()
# So small that a test runs within a few steps.
SMALL_WINDOW = Window(leak_ratio=1, min_samples=4, test_interval=1, max_window=32)
SMALL: dict[str, Any] = {"window": SMALL_WINDOW}


def smaller(**changes: Any) -> dict[str, Any]:
    """`SMALL` with other values for some fields of its window."""
    return {"window": dataclasses.replace(SMALL_WINDOW, **changes)}


PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}


def never_stationary(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
    """A test that compiles in no time, for tests of what happens before it."""
    return sasa_optax.TestResult(mean=samples.values[0], stationary=False)


def always_stationary(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
    return sasa_optax.TestResult(mean=jnp.sum(samples.values), stationary=True)


def squares(tree: Any) -> jax.Array:
    """The squared norm, a loss for any parameters; shape (), at least float32.

    Integers and booleans do not count.
    """

    def part(x: jax.Array) -> jax.Array:
        # JAX promotes no float8.
        wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
        return jnp.sum(jnp.abs(wide) ** 2)

    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    parts = [part(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(parts, jnp.zeros((), jnp.float32))


def _slope(
    learning_rate: float = 1.0,
    window: Window = _DEFAULT_WINDOW,
    axis_name: str | None = None,
) -> Optimizer:
    """SLOPE with the squared norm of the gradients as its loss, finite if they are."""
    optimizer = sasa_optax.slope(learning_rate, window=window, axis_name=axis_name)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        extra_args["value"] = squares(updates)
        return optimizer.update(updates, state, params, **extra_args)

    return Optimizer(optimizer.init, update)


def _searching(optimizer: Optimizer) -> Optimizer:
    """A line search whose loss is made from the parameters, by ``loss_fn`` if given."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        loss_fn = extra_args.pop("loss_fn", squares)
        extra_args = {"grad": updates} | extra_args
        extra_args |= {"value": None, "value_fn": loss_fn}
        return optimizer.update(updates, state, params, **extra_args)

    return Optimizer(optimizer.init, update)


def _salsa(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    def made(
        learning_rate: float = 1.0,
        window: Window = _DEFAULT_WINDOW,
        axis_name: str | None = None,
    ) -> Optimizer:
        return _searching(make(learning_rate, window=window, axis_name=axis_name))

    return made


def _windowless(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """An optimizer that takes none of the arguments in `SMALL`."""

    def made(**arguments: Any) -> Optimizer:
        kept = {name: x for name, x in arguments.items() if name not in SMALL}
        return make(1.0, **kept)

    return made


# The optimizers that test for stationarity, at a learning rate of one.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sasa": functools.partial(sasa_optax.sasa, 1.0),
    "sasa_plus": functools.partial(sasa_optax.sasa_plus, 1.0),
    "sasa_plus_centred": functools.partial(
        sasa_optax.sasa_plus,
        1.0,
        nu=0.5,
        statistic="centred",
        average=True,
    ),
    "scale_by_sasa_plus": functools.partial(sasa_optax.scale_by_sasa_plus, 1.0),
    "reduce_on_stationarity": sasa_optax.reduce_on_stationarity,
    "slope": _slope,
    "salsa": _salsa(sasa_optax.salsa),
    "scale_by_salsa": _salsa(sasa_optax.scale_by_salsa),
}


def _qhm(learning_rate: float, **arguments: Any) -> Optimizer:
    optimizer = sasa_optax.qhm(learning_rate, weight_decay=0.1, **arguments)
    return optax.with_extra_args_support(optimizer)


def _averaged(learning_rate: float, **arguments: Any) -> Optimizer:
    average = sasa_optax.average_iterates(**arguments)
    return optax.chain(optax.sgd(0.1 * learning_rate), average)


def in_midrun(state: Any, params: Any) -> Any:
    """A state of 200 steps, such that all that may happen does in the next 24 steps.

    The rate has just risen. As its losses were far below what they are now, this is
    found to be an overshoot, and then that the model is lost. Then the rate rises
    again, up to what the ceiling allows.
    """

    def age() -> jax.Array:  # no two leaves may share a buffer
        return jnp.full((), 200, jnp.int32)

    state = optax.tree.set(state, num_averaged=age(), num_walked=age())
    if optax.tree.get(state, "num_losses") is None:
        return state
    loss, kept = squares(params), optax.tree.get(state, "losses")
    losses = {"fast": 0.25, "slow": 0.32, "first": 0.27, "best": 0.12}
    losses = {name: x * loss for name, x in losses.items()}
    losses["variance"] = (0.1 * loss) ** 2
    losses["error_of_first"] = 0.05 * loss
    losses = {name: x.astype(kept.fast.dtype) for name, x in losses.items()}
    losses["num_losses"] = jnp.full((), 100, jnp.int32)
    losses = kept._replace(has_gained=jnp.ones((), bool), **losses)
    state = optax.tree.set(state, last_rise=age())
    return optax.tree.set(state, losses=losses)


def _servo(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """An optimizer in the middle of a run, whose loss is made from the parameters."""

    def made(learning_rate: float, **arguments: Any) -> Optimizer:
        descent = optax.sgd(0.1 * learning_rate)
        optimizer = optax.chain(descent, make(momentum=0.0, **arguments))

        def init(params: Any) -> Any:
            return in_midrun(optimizer.init(params), params)

        def update(
            updates: Any, state: Any, params: Any = None, **extra_args: Any
        ) -> Any:
            extra_args = {"value": squares(params)} | extra_args
            return optimizer.update(updates, state, params, **extra_args)

        return Optimizer(init, update)

    return made


# The optimizers that decide nothing.
PLAIN = ("qhm", "average_iterates")

# The optimizers that follow progress. They keep no window.
SERVOS = ("adapt_on_progress", "measure_progress")

# The fields of any state that show what the optimizer has decided.
DECISIONS = (
    *("num_drops", "last_test", "scale", "num_evaluations", "progress", "ceiling"),
    *("past_scale", "num_overshoots", "num_brakes", "last_cut", "last_rise"),
)


def decided(state: Any) -> dict[str, Any]:
    found = {field: optax.tree.get(state, field) for field in DECISIONS}
    return {field: x for field, x in found.items() if x is not None}


def without_momentum(state: Any) -> Any:
    """The state without the trace, which may hold what is not finite."""

    def is_momentum(node: Any) -> bool:
        return isinstance(node, sasa_optax.MomentumState)

    return jax.tree.map(
        lambda node: node.controller if is_momentum(node) else node,
        state,
        is_leaf=is_momentum,
    )


ALL: dict[str, Callable[..., Optimizer]] = OPTIMIZERS | {
    "ssls": _windowless(lambda *args, **kw: _searching(sasa_optax.ssls(*args, **kw))),
    "scale_by_ssls": _windowless(
        lambda *args, **kw: _searching(sasa_optax.scale_by_ssls(*args, **kw))
    ),
    "qhm": _windowless(_qhm),
    "average_iterates": _windowless(_averaged),
    "adapt_on_progress": _windowless(_servo(sasa_optax.adapt_on_progress)),
    "measure_progress": _windowless(_servo(sasa_optax.measure_progress)),
}


def started(
    optimizer: optax.GradientTransformation, params: Any
) -> tuple[Any, Callable[..., Any]]:
    """The initial state, and the compiled update.

    The types of optax know no state but a tree of arrays. Here it may be anything.
    """
    return optimizer.init(params), jax.jit(optimizer.update)


def take_step(
    update: Callable[..., Any], grads: Any, state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any]:
    """The parameters and the state after a step."""
    updates, state = update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


@functools.cache
def small(name: str) -> tuple[Optimizer, Callable[..., Any]]:
    """An optimizer and its compiled update, for the tests that can share them."""
    optimizer = ALL[name](**SMALL)
    return optimizer, jax.jit(optimizer.update)
