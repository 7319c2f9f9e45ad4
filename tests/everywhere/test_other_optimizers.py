"""The steps of all of optax's own optimizers are measured correctly."""

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import SERVOS, never_stationary

import sasa_optax

_wrapped = functools.partial(pytest.mark.environment, "4. optax")

# Two of optax's own are left out. schedule_free takes for granted that the parameters
# moved by the whole of its last update, and differentially private SGD needs the
# gradients of single examples.
_OTHERS = [
    *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw"),
    *("adamw", "adan", "amsgrad", "fromage", "lamb", "lars", "lbfgs", "lion", "nadam"),
    *("nadamw", "noisy_sgd", "novograd", "polyak_sgd", "radam"),
    *("optimistic_gradient_descent", "rmsprop", "rprop", "sgd", "sign_sgd"),
    *("sm3", "yogi", "acprop", "ademamix", "adopt", "cocob", "dadapt_adamw", "dog"),
    *("dowg", "mechanize", "momo", "momo_adam", "muon", "prodigy"),
    *("sam", "simplified_ademamix", "sophia"),
]
# The oldest optax supported has none of these. In any other that is tested, a missing
# name is an error.
if optax.__version__ != "0.2.5":
    _OTHERS += ["galore", "madgrad", "optimistic_adam_v2", "signum"]
_ARGUMENTS: dict[str, Any] = {
    "mechanize": {"base_optimizer": optax.sgd(0.1)},
    "noisy_sgd": {"learning_rate": 0.1, "key": 0},
    "sam": {"optimizer": optax.sgd(0.1), "adv_optimizer": optax.sgd(0.05)},
}


def _other(name: str) -> optax.GradientTransformationExtraArgs:
    make = getattr(optax, name, None) or getattr(optax.contrib, name)
    parameters = inspect.signature(make).parameters
    rate = {"learning_rate": 0.1} if "learning_rate" in parameters else {}
    return optax.with_extra_args_support(make(**_ARGUMENTS.get(name, rate)))


def _loss_for_others(params: Any) -> jax.Array:
    parts = [jnp.sum(jnp.sin(x) + x**2) for x in jax.tree.leaves(params)]
    return sum(parts, jnp.zeros(()))


def _start_for_others() -> Any:
    return {"w": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "b": jnp.ones(4)}


def _moved(optimizer: Any, other: str, params: Any, state: Any) -> Any:
    """The updates and the state of an optimizer that contains one of optax's."""
    value, grads = jax.value_and_grad(_loss_for_others)(params)
    extra = {"value": value, "grad": grads, "value_fn": _loss_for_others}
    of_sophia = extra | {"obj_fn": _loss_for_others}
    extra = {"sam": {}, "sophia": of_sophia}.get(other, extra)
    return optimizer.update(grads, state, params, **extra)


for_all_others = pytest.mark.parametrize("other", _OTHERS)
_after_others = functools.partial(
    _wrapped, "each of optax's and optax.contrib's optimizers"
)


@_after_others("reduce_on_stationarity")
@for_all_others
def test_reduce_on_stationarity_after_any_optimizer(other: str) -> None:
    """The statistic is the change of the squared norm."""
    window = sasa_optax.Window(min_samples=4, max_window=8)
    controller = sasa_optax.reduce_on_stationarity(test=never_stationary, window=window)
    optimizer = optax.chain(_other(other), controller)
    params = _start_for_others()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = _moved(optimizer, other, params, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    norms = [optax.tree.norm(params, squared=True)]
    for _ in range(5):
        params, state = step(params, state)
        norms.append(optax.tree.norm(params, squared=True))
    samples = optax.tree.get(state, "window").buffer[0, :5]
    expected = -np.diff(np.asarray(norms)) / 2
    np.testing.assert_allclose(samples, expected, rtol=1e-3, atol=1e-4)


def _progress_of(
    iterates: list[Any], updates: list[Any], momentum: float, age: int
) -> list[float]:
    """Progress after each step, computed by NumPy as `measure_progress` defines it.

    The average is x_0 at first, ``age`` steps before which nothing moved.
    """
    factor = (1 + momentum) / (1 - momentum)
    centres = [np.asarray(x, np.float64) for x in jax.tree.leaves(iterates[0])]
    walks = [0.0 for _ in centres]
    progress = []
    for k, (x, u) in enumerate(zip(iterates[1:], updates, strict=True), age + 1):
        horizon = max(32, k / 8)
        ratios = []
        leaves = zip(*map(jax.tree.leaves, (x, u)), strict=True)
        for i, pair in enumerate(leaves):
            new, move = (np.asarray(z, np.float64) for z in pair)
            centres[i] = centres[i] + (new - centres[i]) / horizon
            walks[i] = (1 - 1 / horizon) ** 2 * (walks[i] + factor * np.sum(move**2))
            if walks[i] > 0:
                ratios.append(np.sum((new - centres[i]) ** 2) / walks[i])
        progress.append(float(np.mean(ratios)) if ratios else 1.0)
    return progress


# Some have momentum, and some begin in the middle of a run.
@_after_others(*SERVOS)
@for_all_others
def test_progress_after_any_optimizer(other: str) -> None:
    """Progress is that of the iterates, and the step is the scaled one of optax."""
    momentum, age = (0.9, 0) if len(other) % 2 else (0.5, 1000)
    servo = sasa_optax.adapt_on_progress(momentum)
    inner = _other(other)
    measure = sasa_optax.measure_progress(momentum)
    # What optax's own hands on in the chain.
    seen: list[Any] = []
    spy = optax.stateless(lambda updates, _: seen.append(updates) or updates)
    optimizer = optax.chain(optax.chain(inner, spy), servo, measure)
    params = _start_for_others()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = _moved(optimizer, other, params, state)
        return optax.apply_updates(params, updates), state, updates, seen.pop()

    # The state of optax's own may have fields of the same names.
    start: Any = optimizer.init(params)
    first, *ours = start
    ours = optax.tree.set(ours, num_averaged=jnp.full((), age, jnp.int32))
    ours = optax.tree.set(ours, scale=jnp.full((), 0.5))
    state: Any = (first, *ours)
    iterates, moves = [params], []
    for _ in range(6):
        scale = float(optax.tree.get(state[1], "scale"))
        params, state, updates, wanted = step(params, state)
        wanted = jax.tree.map(lambda u, s=scale: s * u, wanted)
        chex.assert_trees_all_close(updates, wanted, rtol=1e-4, atol=1e-7)
        iterates.append(params)
        moves.append(updates)
        *_, expected = _progress_of(iterates, moves, momentum, age)
        # Steps that are tiny beside the parameters lose digits to rounding.
        length = max(float(jnp.max(jnp.abs(u))) for u in jax.tree.leaves(moves))
        rel = 1e-3 + 1e-6 / max(length, 1e-6)
        for servo_state in state[1:]:
            progress = float(optax.tree.get(servo_state, "progress"))
            assert progress == pytest.approx(expected, rel=rel, abs=1e-4)
