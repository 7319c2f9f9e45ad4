"""Runs of SSLS and SALSA, and readers of their states, for several test files."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import part_of

import sasa_optax

for_given_or_not = pytest.mark.parametrize("with_value", [True, False])


def quadratic(
    x: Any, target: Any = 0.0, curvature: Any = 1.0, offset: Any = 0.0
) -> Any:
    """A loss for NumPy and JAX alike."""
    return (curvature * (x - target) ** 2).sum() / 2 + offset


def history(
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
    params: Any,
    batches: Any = None,
    *,
    num_steps: int | None = None,
    with_value: bool = True,
) -> Any:
    """Parameters and states after every step; ``batches`` are a dict of extra args."""
    update = optax.with_extra_args_support(optimizer).update

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        batch = batch or {}
        value, grads = jax.value_and_grad(loss)(params, **batch)
        extra = {"value": value} if with_value else {}
        updates, state = update(
            grads, state, params, grad=grads, value_fn=loss, **extra, **batch
        )
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    def scan(params: Any, state: Any, batches: Any) -> Any:
        return jax.lax.scan(step, (params, state), batches, length=num_steps)[1]

    return jax.jit(scan)(params, optimizer.init(params), batches)


def one_step(
    optimizer: optax.GradientTransformation,
    loss: Callable[..., Any],
    params: Any,
    **kwargs: Any,
) -> Any:
    """The state after the first step."""
    _, states = history(optimizer, loss, params, num_steps=1, **kwargs)
    return jax.tree.map(lambda x: x[0], states)


def search_of(state: Any) -> sasa_optax.LineSearchState:
    """The state of the search, however nested."""
    return part_of(state, sasa_optax.LineSearchState)


def losses_of(state: Any) -> sasa_optax.WindowState:
    """The losses that SALSA has recorded."""
    losses = search_of(state).losses
    assert losses is not None
    return losses


def loss_test_of(state: Any) -> Any:
    """The newest `TestResult` of these losses."""
    result = search_of(state).loss_test
    assert result is not None
    return result


def never_stationary(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
    """A test that compiles faster than those of the library."""
    return sasa_optax.TestResult(mean=samples.values[0])


# SALSA, a step at a time. It is compiled twice, with the value given and without; its
# numbers are traced.

MAX_WINDOW = 16
# They grow by one at each evaluation of the loss, and at each compilation of a step.
CALLS: list[None] = []
COMPILED: list[None] = []


def linear(x: Any, offset: Any) -> Any:
    """A loss whose gradient is 0.01 everywhere; the offset sets its level."""
    return offset + 0.01 * x.sum()


def _counted_linear(x: jax.Array, offset: jax.Array) -> jax.Array:
    jax.debug.callback(lambda: CALLS.append(None))
    return linear(x, offset)


class SalsaOptions(NamedTuple):
    """The numbers of a run, which are traced."""

    learning_rate: float = 1e-3
    factor: float = 0.25
    min_samples: int = 4
    test_interval: int = 1
    leak_ratio: int = 1
    warmup_steps: int = 0
    interval: int = 1
    significance: float = 0.05


def _make_salsa(
    options: SalsaOptions, fires: Any
) -> optax.GradientTransformationExtraArgs:
    """SALSA with a test whose result is always ``fires``."""

    def test(samples: sasa_optax.Samples) -> sasa_optax.TestResult:
        return sasa_optax.TestResult(mean=samples.values[0], stationary=fires)

    return sasa_optax.scale_by_salsa(
        options.learning_rate,
        factor=options.factor,
        test=test,
        window=sasa_optax.Window(
            leak_ratio=options.leak_ratio,
            min_samples=options.min_samples,
            test_interval=options.test_interval,
            warmup_steps=options.warmup_steps,
            max_window=MAX_WINDOW,
        ),
        search=sasa_optax.LineSearch(
            interval=options.interval,
            loss_test=sasa_optax.SlopeTest(significance=options.significance),
        ),
    )


@functools.partial(jax.jit, static_argnames="with_value")
def _salsa_step(
    options: SalsaOptions,
    fires: Any,
    state: Any,
    params: jax.Array,
    offset: Any,
    grads: Any,
    with_value: bool,
) -> Any:
    COMPILED.append(None)
    extra = {"value": linear(params, offset)} if with_value else {}
    updates, state = _make_salsa(options, fires).update(
        grads,
        state,
        params,
        grad=grads,
        value_fn=_counted_linear,
        offset=offset,
        **extra,
    )
    return optax.apply_updates(params, updates), state


class Salsa:
    """A run of SALSA on `linear`, in float64 under the fixture `x64`.

    The statistic is tested at every step if ``fires`` says with what result, and never
    if it is None.
    """

    def __init__(
        self, with_value: bool = True, fires: bool | None = None, **options: Any
    ) -> None:
        interval = 10**6 if fires is None else 1
        self.options = SalsaOptions(test_interval=interval)._replace(**options)
        self.fires, self.with_value = bool(fires), with_value
        self.params = jnp.array([1.0, -2.0])
        self.state: Any = _make_salsa(self.options, self.fires).init(self.params)
        self.losses: list[float] = []

    def step(self, offset: float, grad: float = 0.01) -> Any:
        self.losses.append(float(linear(np.asarray(self.params), offset)))
        self.params, self.state = _salsa_step(
            self.options,
            self.fires,
            self.state,
            self.params,
            offset,
            np.full(2, grad),
            with_value=self.with_value,
        )
        return self.state

    def run(self, offsets: Iterable[Any]) -> list[Any]:
        """The states after steps whose losses have these offsets."""
        return [jax.device_get(self.step(float(offset))) for offset in offsets]


def active(states: Sequence[Any]) -> list[bool]:
    """Whether the search goes on, in each state."""
    return [bool(search_of(state).line_search_active) for state in states]


def rates(states: Sequence[Any]) -> list[float]:
    """The learning rate in each state."""
    return [float(optax.tree.get(state, "learning_rate")) for state in states]
