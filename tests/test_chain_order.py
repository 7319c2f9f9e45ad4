"""A chain in the wrong order goes up the gradient, and says so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from line_searches import never_stationary, quadratic, search_of

import sasa_optax
from sasa_optax import LineSearch, Window

_TEST: dict[str, Any] = {
    "test": never_stationary,
    "window": Window(min_samples=99, max_window=100),
}
_ALONG_UPDATE = LineSearch(direction="update")


def _scale_by_salsa(**kwargs: Any) -> Any:
    return sasa_optax.scale_by_salsa(average=False, **_TEST, **kwargs)


_WRONG = {
    "adam, scale_by_salsa": (optax.adam(1e-3), _scale_by_salsa()),
    "adam, scale_by_salsa along the update": (
        optax.adam(1e-3),
        _scale_by_salsa(search=_ALONG_UPDATE),
    ),
    "adam, scale_by_ssls": (optax.adam(1e-3), sasa_optax.scale_by_ssls()),
    "adam, scale_by_sasa_plus": (
        optax.adam(1e-3),
        sasa_optax.scale_by_sasa_plus(0.1, **_TEST),
    ),
    "scale_by_adam, reduce_on_stationarity": (
        optax.scale_by_adam(),
        sasa_optax.reduce_on_stationarity(**_TEST),
    ),
}
_RIGHT = {
    "scale_by_adam, scale_by_salsa": (
        optax.scale_by_adam(),
        _scale_by_salsa(search=_ALONG_UPDATE),
    ),
    "scale_by_qhm, scale_by_salsa": (sasa_optax.scale_by_qhm(), _scale_by_salsa()),
    "sgd, reduce_on_stationarity": (
        optax.sgd(0.1, momentum=0.99),
        sasa_optax.reduce_on_stationarity(**_TEST),
    ),
}


def _run(optimizer: Any, passes_grad: bool = True, num_steps: int = 60) -> Any:
    """The metrics before and after each step near a noisy optimum, and <u, g>."""

    def step(carry: Any, key: jax.Array) -> Any:
        x, state = carry
        target = jax.random.normal(key, x.shape)
        grads = x - target
        extra = {"grad": grads} if passes_grad else {}
        updates, state = optimizer.update(
            grads, state, x, value_fn=quadratic, target=target, **extra
        )
        seen = sasa_optax.metrics(state), jnp.vdot(updates, grads)
        return (optax.apply_updates(x, updates), state), seen

    x, keys = jnp.ones(2), jax.random.split(jax.random.key(0), num_steps)
    state = optimizer.init(x)
    scan = jax.jit(lambda *carry: jax.lax.scan(step, carry, keys)[1])
    rows, slopes = scan(x, state)
    return {name: np.asarray(x) for name, x in rows.items()}, np.asarray(slopes)


def _history(rows: dict[str, Any]) -> sasa_optax.History:
    history = sasa_optax.History()
    for k in range(9, len(rows["step"]), 10):
        history.record({name: x[k] for name, x in rows.items()})
    return history


@pytest.mark.parametrize("name", [*_WRONG, *_RIGHT])
def test_ascents_are_counted_and_a_wrong_chain_is_named(name: str) -> None:
    is_wrong = name in _WRONG
    rows, slopes = _run(optax.chain(*(_WRONG | _RIGHT)[name]))
    np.testing.assert_array_equal(rows["num_ascents"], np.cumsum(slopes > 0))
    said = _history(rows).explain()
    if is_wrong:
        assert rows["num_ascents"][-1] > 54
        assert f"{rows['num_ascents'][-1]} of the first 60 updates went up" in said
    else:
        # Noise makes some of them.
        assert 0 < rows["num_ascents"][-1] < 40
        assert "went up" not in said


def test_without_the_gradient_nothing_is_counted() -> None:
    rows, slopes = _run(
        optax.chain(*_WRONG["adam, scale_by_sasa_plus"]), passes_grad=False
    )
    assert np.sum(slopes > 0) > 54
    assert not np.any(rows["num_ascents"])


def test_a_wrong_direction_is_counted_until_the_search_has_ended() -> None:
    optimizer = optax.chain(optax.scale(-1.0), _scale_by_salsa())
    x = jnp.ones(2)

    @jax.jit
    def step(state: Any) -> Any:
        return optimizer.update(x, state, x, grad=x, value_fn=quadratic)[1]

    def ascents(state: Any) -> int:
        return int(sasa_optax.metrics(state)["num_ascents"])

    state = optimizer.init(x)
    state = step(step(state))
    assert ascents(state) == 2
    state = optax.tree.set(state, line_search_active=jnp.zeros((), bool))
    after = step(state)
    assert ascents(after) == 2
    assert int(search_of(after).controller.step) == 3


def _recorded(*counts: tuple[int, int]) -> sasa_optax.History:
    """A history of steps with counts of ascents."""
    history = sasa_optax.History()
    for step, count in counts:
        row = {"step": step, "learning_rate": 1.0, "num_drops": 0}
        history.record(row | {"num_ascents": count})
    return history


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([(100, 97)], "97 of the first 100 updates went up the gradient."),
        ([(50, 49), (100, 97)], "97 of the first 100 updates went up the gradient."),
        # A search that ends at step 60 compares nothing afterwards.
        ([(50, 49), (60, 58), (900, 58)], "58 of the first 60 updates went up"),
        ([(100, 74)], None),
        ([(31, 31)], None),
        ([(0, 0)], None),
    ],
)
def test_most_of_the_updates_must_go_up(
    counts: list[tuple[int, int]], says: str | None
) -> None:
    said = _recorded(*counts).explain()
    lines = said.splitlines()
    assert lines[0] == "The rate has not dropped."
    assert len(lines) == (1 if says is None else 2)
    assert says is None or lines[1].startswith(says)
