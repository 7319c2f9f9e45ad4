"""How the line search of SALSA ends, and what comes after it."""

import jax
import numpy as np
import optax
import pytest
from line_searches import (
    CALLS,
    COMPILED,
    Salsa,
    active,
    for_given_or_not,
    loss_test_of,
    losses_of,
    rates,
    search_of,
)

get = optax.tree.get
pytestmark = pytest.mark.usefixtures("x64")


@for_given_or_not
def test_after_its_end_the_search_evaluates_nothing(with_value: bool) -> None:
    run = Salsa(with_value)
    jax.effects_barrier()
    start, seen = len(CALLS), []
    states = []
    # The losses rise, then fall for long.
    for offset in [*range(8), *range(0, -20, -1)]:
        states += run.run([offset])
        jax.effects_barrier()
        seen.append(len(CALLS) - start)
    counts = [int(search_of(state).num_evaluations) for state in states]
    assert seen == counts
    last = active(states).index(False)
    per_step = 1 if with_value else 2
    expected = [per_step * min(step, last + 1) for step in range(1, 29)]
    assert counts == expected
    assert not any(active(states)[last:])
    assert len(set(rates(states)[last:])) == 1
    assert losses_of(states[-1]).total == last + 1


def test_the_test_of_sasa_plus_ends_the_search_by_a_drop() -> None:
    run = Salsa(fires=True)
    states = run.run(-np.arange(20.0))
    assert active(states) == [True] * 4 + [False] * 16
    grown = [1e-3 * 1.1**k for k in range(1, 5)]
    # The fifth step was made with the rate that its search found.
    dropped = [1e-3 * 1.1**5 * 0.25**k for k in range(1, 5)]
    expected = grown + dropped[:1] * 5 + dropped[1:2] * 5 + dropped[2:3] * 5
    np.testing.assert_allclose(rates(states), [*expected, dropped[3]][:20], rtol=1e-9)
    assert [int(get(state, "num_drops")) for state in states] == [
        *[0] * 4,
        *[1] * 5,
        *[2] * 5,
        *[3] * 5,
        4,
    ]
    assert int(search_of(states[-1]).num_evaluations) == 5
    assert not bool(loss_test_of(states[-1]).stationary)


def test_during_warmup_a_test_that_fires_ends_nothing() -> None:
    states = Salsa(fires=True, warmup_steps=9).run(-np.arange(12.0))
    assert bool(get(states[8], "last_test").stationary)
    assert active(states) == [True] * 9 + [False] * 3
    assert [int(get(state, "num_drops")) for state in states] == [0] * 9 + [1] * 3


def test_a_search_that_no_test_ends_goes_on() -> None:
    states = Salsa(fires=False).run(-np.arange(30.0))
    assert all(active(states))
    assert len(set(rates(states))) == 30


@for_given_or_not
@pytest.mark.parametrize("interval", [3, 5, 100])
def test_no_slope_is_taken_of_fewer_than_four_losses(
    interval: int, with_value: bool
) -> None:
    run = Salsa(with_value, interval=interval)
    for _ in range(2):
        # The losses are positive and fall, so zeros for missing ones would show.
        states = run.run(100.0 - np.arange(len(run.losses), len(run.losses) + 20))
        assert all(active(states))
        tested = loss_test_of(states[-1])
        assert int(tested.num_samples) == 0 or int(tested.num_samples) >= 4


@for_given_or_not
def test_between_searches_losses_are_recorded_if_they_are_given(
    with_value: bool,
) -> None:
    run = Salsa(with_value, interval=3, min_samples=15)
    states = run.run(-np.arange(10.0))
    totals = [int(losses_of(state).total) for state in states]
    searches = [1 + step // 3 for step in range(10)]
    assert totals == (list(range(1, 11)) if with_value else searches)
    buffer = np.asarray(losses_of(states[-1]).buffer)[0, : totals[-1]]
    np.testing.assert_allclose(
        buffer, run.losses if with_value else run.losses[::3], rtol=1e-12
    )
    counts = [int(search_of(state).num_evaluations) for state in states]
    assert counts == [n * (1 if with_value else 2) for n in searches]


def test_salsa_compiles_once_for_its_whole_life() -> None:
    run = Salsa()
    run.step(0.0)
    num_compiled = len(COMPILED)
    states = run.run(np.arange(12.0))
    assert active(states)[0]
    assert not active(states)[-1]
    assert len(COMPILED) == num_compiled
