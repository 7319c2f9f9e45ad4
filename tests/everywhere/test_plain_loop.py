"""The plain loop, which all else is compared with, makes decisions of every kind."""

import optax
import pytest
from optimizers import OPTIMIZERS, SERVOS, decided
from plain_loop import NOISE, run_plainly


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_expected_comes_from_tests_that_ran(name: str) -> None:
    _, state = run_plainly(name)
    assert int(optax.tree.get(state, "last_test").at_step) > 0


@pytest.mark.parametrize("num_steps", [8, len(NOISE)])
def test_what_is_expected_comes_from_rates_that_rose_and_were_cut(
    num_steps: int,
) -> None:
    decisions = decided(run_plainly("adapt_on_progress", num_steps)[1])
    assert int(decisions["num_overshoots"]) == 1
    assert int(decisions["num_brakes"]) == 1
    # Then it has risen again, up to what the ceiling allows.
    assert int(decisions["last_rise"]) == (0 if num_steps == 8 else 200 + num_steps)
    for name in SERVOS:
        assert float(decided(run_plainly(name)[1])["progress"]) > 1.5
