"""SSLS against its equations in NumPy, decision by decision."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from line_searches import for_given_or_not, history, quadratic, search_of

import sasa_optax

x64 = pytest.mark.usefixtures("x64")
get = optax.tree.get


class Search(NamedTuple):
    """The arguments of a search, with their defaults."""

    smoothing: float = 0.1
    sufficient_decrease: float = 0.05
    increase_factor: float = 2.0
    decrease_factor: float = 0.5
    max_trials: int = 2
    interval: int = 1

    def find(
        self,
        loss: Callable[[np.ndarray], float],
        x: np.ndarray,
        grad: np.ndarray,
        descent: np.ndarray,
        rate: float,
        expect: Callable[[bool], Any] = assume,
    ) -> tuple[float, int]:
        """The step size found, and the number of trials."""
        slope = grad @ descent
        if slope <= 0:
            return self.decrease_factor * rate, 0
        eta = self.increase_factor * rate
        for trial in range(1, self.max_trials + 1):
            reached = loss(x - eta * descent)
            bound = loss(x) - self.sufficient_decrease * eta * slope
            # A decision that rounding can change says nothing.
            expect(bool(abs(reached - bound) > 1e-9 * (abs(reached) + abs(bound))))
            if reached <= bound:
                return eta, trial
            eta *= self.decrease_factor
        return eta, self.max_trials

    def smoothed(self, rate: float, eta: float) -> float:
        """The rate after the steps that this search stands for."""
        for _ in range(self.interval):
            rate = (1 - self.smoothing) * rate + self.smoothing * eta
        return rate


def confirm(condition: bool) -> None:
    assert condition


def reference_ssls(
    search: Search,
    x: np.ndarray,
    targets: np.ndarray,
    curvature: np.ndarray,
    *,
    learning_rate: float,
    momentum: float,
    nu: float,
    weight_decay: float,
    along: str,
    with_value: bool,
) -> Iterator[tuple[np.ndarray, float, float, int]]:
    """Parameters, rate, step size and evaluations after each step of ssls."""
    rate, eta, trace, evaluations = learning_rate, 0.0, np.zeros_like(x), 0
    for step, target in enumerate(targets):

        def loss(x: np.ndarray, target: np.ndarray = target) -> float:
            return quadratic(x, target, curvature) + weight_decay / 2 * x @ x

        grad = curvature * (x - target) + weight_decay * x
        trace = (1 - momentum) * grad + momentum * trace
        direction = (1 - nu) * grad + nu * trace
        if step % search.interval == 0:
            descent = grad if along == "gradient" else direction
            eta, trials = search.find(loss, x, grad, descent, rate)
            evaluations += trials + (0 if with_value else 1)
            rate = search.smoothed(rate, eta)
        x = x - rate * direction
        yield x, rate, eta, evaluations


NUM_STEPS = 12


def make_batches(
    targets: np.ndarray, curvature: np.ndarray, offset: float = 0.0
) -> dict[str, np.ndarray]:
    """A batch for each target."""
    num_steps = len(targets)
    return {
        "target": targets,
        "curvature": np.tile(curvature, (num_steps, 1)),
        "offset": np.full(num_steps, offset),
    }


# All numbers are traced, so it is compiled once for them.
@functools.partial(jax.jit, static_argnames=("along", "with_value"))
def ssls_history(
    search: Search,
    arguments: dict[str, Any],
    params: jax.Array,
    batches: Any,
    *,
    along: Any,
    with_value: bool,
) -> Any:
    """Parameters and states on batches of target, curvature and offset."""
    options = sasa_optax.LineSearch(
        direction=along, max_learning_rate=1e100, **search._asdict()
    )
    optimizer = sasa_optax.ssls(search=options, **arguments)
    return history(optimizer, quadratic, params, batches, with_value=with_value)


@x64
@for_given_or_not
@pytest.mark.parametrize("along", ["gradient", "update"])
@given(
    search=st.builds(
        Search,
        smoothing=st.floats(0.01, 1),
        sufficient_decrease=st.floats(0.01, 0.99),
        increase_factor=st.floats(1, 4),
        decrease_factor=st.floats(0.1, 0.9),
        max_trials=st.integers(1, 5),
        interval=st.integers(1, 3),
    ),
    arguments=st.fixed_dictionaries(
        {
            "learning_rate": st.floats(-3, 1.5).map(lambda x: 10**x),
            "momentum": st.floats(0, 0.95),
            "nu": st.floats(0, 1),
            "weight_decay": st.floats(0, 1),
        }
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=15)
def test_ssls_decides_as_its_equations_do(
    along: str,
    with_value: bool,
    search: Search,
    arguments: dict[str, float],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x, targets = rng.normal(size=3), rng.normal(size=(NUM_STEPS, 3))
    curvature = 10 ** rng.uniform(-1, 1, size=3)
    batches = make_batches(targets, curvature)
    static = {"along": along, "with_value": with_value}
    expected = reference_ssls(search, x, targets, curvature, **arguments, **static)
    expected = [np.stack(column) for column in zip(*expected, strict=True)]

    params, states = ssls_history(search, arguments, x, batches, **static)
    found = search_of(states)
    actual = (
        params,
        get(states, "learning_rate"),
        found.step_size,
        found.num_evaluations,
    )
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@x64
def test_whether_the_value_is_given_changes_no_decision() -> None:
    rng = np.random.default_rng(0)
    batches = make_batches(rng.normal(size=(NUM_STEPS, 3)), np.ones(3))
    arguments = {
        "learning_rate": 0.6,
        "momentum": 0.5,
        "nu": 1.0,
        "weight_decay": 0.1,
    }
    (ours, given_), (theirs, left_out) = (
        ssls_history(
            Search(),
            arguments,
            jnp.ones(3),
            batches,
            along="gradient",
            with_value=with_value,
        )
        for with_value in (True, False)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12)
    chex.assert_trees_all_close(
        get(given_, "learning_rate"), get(left_out, "learning_rate"), rtol=1e-12
    )
    trials = search_of(given_).num_evaluations
    with_start = search_of(left_out).num_evaluations
    assert (with_start - trials).tolist() == list(range(1, NUM_STEPS + 1))
    assert set(np.diff(trials).tolist()) == {1, 2}


@x64
@for_given_or_not
def test_losses_may_be_negative(with_value: bool) -> None:
    targets = np.random.default_rng(1).normal(size=(NUM_STEPS, 3))
    arguments = {
        "learning_rate": 0.6,
        "momentum": 0.9,
        "nu": 1.0,
        "weight_decay": 0.01,
    }
    ours, theirs = (
        ssls_history(
            Search(),
            arguments,
            jnp.ones(3),
            make_batches(targets, np.ones(3), offset),
            along="gradient",
            with_value=with_value,
        )
        for offset in (0.0, -1000.0)
    )
    chex.assert_trees_all_equal(ours, theirs)
    # There was something to decide.
    step_sizes = search_of(ours[1]).step_size / get(ours[1], "learning_rate")
    assert len(np.unique(np.round(step_sizes, 1))) > 1


@x64
@for_given_or_not
def test_after_adam_it_searches_along_the_update(with_value: bool) -> None:
    rng = np.random.default_rng(2)
    targets = rng.normal(size=(25, 3))
    search = Search(smoothing=0.5, sufficient_decrease=0.45)
    options = sasa_optax.LineSearch(
        smoothing=0.5, direction="update", max_learning_rate=10.0
    )
    optimizer = optax.chain(
        optax.scale_by_adam(), sasa_optax.scale_by_ssls(0.05, search=options)
    )
    x = np.array([1.0, -1.0, 0.5])
    params, states = history(
        optimizer, quadratic, jnp.asarray(x), {"target": targets}, with_value=with_value
    )
    adam = optax.scale_by_adam()
    memory, direct = adam.init(jnp.asarray(x)), jax.jit(adam.update)
    rate, evaluations, found = 0.05, 0, search_of(states)
    for step, target in enumerate(targets):
        grad = x - target
        direction, memory = direct(jnp.asarray(grad), memory)
        direction = np.asarray(direction)
        loss = functools.partial(quadratic, target=target)
        eta, trials = search.find(loss, x, grad, direction, rate, confirm)
        rate = search.smoothed(rate, eta)
        evaluations += trials + (0 if with_value else 1)
        x = x - rate * direction
        np.testing.assert_allclose(found.step_size[step], eta, rtol=1e-9)
        np.testing.assert_allclose(get(states, "learning_rate")[step], rate, rtol=1e-9)
        assert int(found.num_evaluations[step]) == evaluations
        np.testing.assert_allclose(params[step], x, rtol=1e-9)
