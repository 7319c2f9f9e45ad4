"""What a line search takes as `value_fn` and other arguments, and what it refuses."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from line_searches import quadratic, search_of

import sasa_optax

get = optax.tree.get


# What value_fn may be.


class CallableObject:
    def __call__(self, params: jax.Array, batch: jax.Array, scale: float = 1.0) -> Any:
        return scale * quadratic(params, batch)


def plain(params: jax.Array, batch: jax.Array, scale: float = 1.0) -> Any:
    return scale * quadratic(params, batch)


def with_kwargs(params: jax.Array, **kwargs: Any) -> Any:
    assert kwargs.pop("unknown", 0.0) is not None
    return plain(params, **kwargs)


def keyword_only(params: jax.Array, *, batch: jax.Array, scale: float = 1.0) -> Any:
    return plain(params, batch, scale)


VALUE_FNS: dict[str, Any] = {
    "plain": plain,
    "jitted": jax.jit(plain),
    "object": CallableObject(),
    "method": CallableObject().__call__,
    "kwargs": with_kwargs,
    "keyword_only": keyword_only,
    "partial": functools.partial(plain, scale=5.0),
    "checkpointed": jax.checkpoint(plain),
}


@pytest.mark.parametrize("name", VALUE_FNS)
def test_value_fn_gets_the_extra_arguments_that_it_takes(name: str) -> None:
    optimizer = sasa_optax.ssls(0.5, search=sasa_optax.LineSearch(max_trials=1))
    x, batch = jnp.ones(2), jnp.full(2, 3.0)
    state = optimizer.init(x)

    @functools.partial(jax.jit, static_argnames="unknown")
    def step_size(batch: jax.Array, scale: Any, unknown: str) -> Any:
        grads = scale * (x - batch)
        _, after = optimizer.update(
            grads,
            state,
            x,
            grad=grads,
            value_fn=VALUE_FNS[name],
            batch=batch,
            scale=scale,
            unknown=unknown,
        )
        return search_of(after).step_size

    # With a curvature of `scale`, the longest accepted step is 1.9 / scale.
    for scale, expected in [(1.8, 1.0), (2.0, 0.5)]:
        assert float(step_size(batch, scale, "x")) == expected
    # At its minimum no step is accepted, and none is tried.
    assert float(step_size(x, 1.0, "x")) == 0.25


def test_value_fn_keeps_its_defaults_and_what_is_bound() -> None:
    x = jnp.ones(2)
    optimizer = sasa_optax.scale_by_ssls(
        0.5, search=sasa_optax.LineSearch(max_trials=1)
    )

    def step_size(value_fn: Any, grad: jax.Array, **kwargs: Any) -> float:
        state = optimizer.init(x)
        _, state = optimizer.update(
            grad, state, x, grad=grad, value_fn=value_fn, **kwargs
        )
        return float(search_of(state).step_size)

    batch = jnp.zeros(2)
    assert step_size(plain, x, batch=batch) == 1.0
    steep = functools.partial(plain, scale=5.0)
    assert step_size(steep, 5 * x, batch=batch) == 0.5
    bound = functools.partial(plain, batch=batch, scale=5.0)
    assert step_size(bound, 5 * x, scal=1.0) == 0.5


def positional_only(x: jax.Array, /) -> Any:
    return quadratic(x)


def with_args(params: jax.Array, *args: Any) -> Any:
    assert not args
    return quadratic(params)


@pytest.mark.parametrize(
    ("value_fn", "name"), [(positional_only, "x"), (with_args, "args")]
)
def test_value_fn_does_not_get_by_name_what_it_takes_by_place(
    value_fn: Any, name: str
) -> None:
    optimizer = sasa_optax.scale_by_ssls()
    x = jnp.ones(2)
    _, state = optimizer.update(
        x, optimizer.init(x), x, grad=x, value_fn=value_fn, **{name: x}
    )
    assert float(get(state, "learning_rate")) == pytest.approx(1.1e-3)


# What is refused.

SCALE_BY = [sasa_optax.scale_by_ssls, sasa_optax.scale_by_salsa]
ALL = [sasa_optax.ssls, sasa_optax.salsa, *SCALE_BY]
for_all = pytest.mark.parametrize("make", ALL)


@for_all
def test_missing_arguments_are_named(make: Any) -> None:
    optimizer, x = make(), jnp.ones(2)
    state = optimizer.init(x)
    with pytest.raises(ValueError, match=r"needs the current parameters.*params\)"):
        optimizer.update(x, state, grad=x, value_fn=quadratic)
    with pytest.raises(ValueError, match=r"needs `value_fn`.*value_fn=value_fn"):
        optimizer.update(x, state, x, grad=x)
    if make in SCALE_BY:
        with pytest.raises(ValueError, match=r"needs `grad`.*grad=grads"):
            optimizer.update(x, state, x, value_fn=quadratic)


@for_all
def test_what_may_have_been_meant_for_value_fn_is_named(make: Any) -> None:
    optimizer, x = make(), jnp.ones(2)
    state = optimizer.init(x)
    with pytest.raises(ValueError, match=r"needs `value_fn`.*Did you mean 'loss_fn'"):
        optimizer.update(x, state, x, grad=x, loss_fn=quadratic)
    with pytest.raises(ValueError, match=r"apply_gradients.*SVI") as error:
        optimizer.update(x, state, x, grad=x, batch=x)
    assert "Did you mean" not in str(error.value)


@for_all
def test_value_fn_must_be_a_function(make: Any) -> None:
    optimizer, x = make(), jnp.ones(2)
    with pytest.raises(ValueError, match=r"^value_fn must be a function.*got 3\.0\."):
        optimizer.update(x, optimizer.init(x), x, grad=x, value_fn=3.0)


@pytest.mark.parametrize("make", [sasa_optax.ssls, sasa_optax.salsa])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: (jnp.sum(x), x), "got a tuple: .*auxiliary"),
        (lambda x: [jnp.sum(x)], "got a list: .*auxiliary"),
        (lambda x: {"loss": jnp.sum(x)}, "got a dict: .*auxiliary"),
        (lambda x: x[:1], r"shape \(1,\) and dtype float32"),
        (lambda x: jnp.int32(1), r"shape \(\) and dtype int32"),
        (lambda x: jnp.sum(x) > 0, r"shape \(\) and dtype bool"),
        (lambda x: jnp.sum(x) * 1j, r"shape \(\) and dtype complex64"),
    ],
)
def test_losses_that_are_no_scalars_are_refused(
    make: Any, result: Callable[..., Any], message: str
) -> None:
    optimizer, x = make(), jnp.ones(2)
    state = optimizer.init(x)
    with pytest.raises(ValueError, match=f"^value_fn's result must be .*{message}"):
        optimizer.update(x, state, x, value_fn=result)
    with pytest.raises(ValueError, match=f"^value must be .*{message}"):
        optimizer.update(x, state, x, value_fn=jnp.sum, value=result(x))


@pytest.mark.parametrize("value", [2.0, np.float64(2.0), np.float32(2.0)])
def test_the_value_may_be_a_number(value: Any) -> None:
    optimizer, x = sasa_optax.scale_by_ssls(0.1), jnp.ones(2)
    _, state = optimizer.update(
        x, optimizer.init(x), x, grad=x, value_fn=jnp.sum, value=value
    )
    assert float(get(state, "learning_rate")) == pytest.approx(0.11)
    assert get(state, "learning_rate").dtype == jnp.float32


NUMBER_0_1 = "a number in (0, 1)"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("smoothing", x, "a number in (0, 1]") for x in (0, 1.1, np.nan, "0.1")),
        *(("sufficient_decrease", x, NUMBER_0_1) for x in (0, 1, "0.5")),
        *(("increase_factor", x, "a number in [1, inf)") for x in (0.5, np.inf)),
        *(("decrease_factor", x, NUMBER_0_1) for x in (0, 1, np.nan)),
        *(("max_trials", x, "an integer of at least 1") for x in (0, 1.5, True)),
        ("direction", "grad", "'gradient' or 'update'"),
        *(("interval", x, "an integer of at least 1") for x in (0, 2.0)),
        *(("max_learning_rate", x, "a number in (0, inf)") for x in (0, np.inf)),
        ("loss_test", "slope", "a sasa_optax.SlopeTest"),
    ],
)
def test_the_options_of_a_search_are_checked(
    name: str, value: Any, allowed: str
) -> None:
    message = f"{name} must be {allowed}, got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sasa_optax.LineSearch(**{name: value})


@for_all
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("learning_rate", x, "a number in (0, inf)") for x in (0, None)),
        *(("min_learning_rate", x, "a number in [0, inf)") for x in (-1, np.nan)),
        ("steps_per_epoch", 0, "an integer of at least 1"),
        ("search", {"smoothing": 0.1}, "a sasa_optax.LineSearch"),
    ],
)
def test_arguments_are_checked(
    make: Any, name: str, value: object, allowed: str
) -> None:
    message = f"{name} must be {allowed}, got {value!r}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**{name: value})


@for_all
def test_a_schedule_is_refused_as_the_rate(make: Any) -> None:
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    with pytest.raises(ValueError, match=r"learning_rate must be .*got the schedule"):
        make(schedule)


@for_all
@pytest.mark.parametrize("most", [0.05, 0.1])
def test_the_largest_rate_exceeds_the_others(make: Any, most: float) -> None:
    search = sasa_optax.LineSearch(max_learning_rate=most)
    for name in ("learning_rate", "min_learning_rate"):
        with pytest.raises(
            ValueError,
            match=f"^max_learning_rate must be greater than {name}, "
            f"got max_learning_rate={most} and {name}=0.1",
        ):
            make(**{"learning_rate": 0.01, name: 0.1, "search": search})
