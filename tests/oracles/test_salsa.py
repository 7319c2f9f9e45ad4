"""The end of SALSA's line search against the regression of SciPy."""

from typing import Any

import numpy as np
import optax
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from line_searches import (
    MAX_WINDOW,
    Salsa,
    active,
    for_given_or_not,
    loss_test_of,
    losses_of,
    rates,
)
from scipy import stats

get = optax.tree.get
x64 = pytest.mark.usefixtures("x64")


@x64
@for_given_or_not
@given(
    seed=st.integers(0, 2**32 - 1),
    trend=st.floats(-1.0, 0.2),
    interval=st.integers(1, 3),
    more_samples=st.integers(0, 3),
    leak_ratio=st.integers(1, 3),
    significance=st.floats(0.01, 0.5),
)
@example(0, 0.0, 1, 0, 1, 0.05)
@example(0, -0.3, 2, 0, 1, 0.5)
@settings(max_examples=10)
def test_the_search_ends_when_the_losses_stop_falling(
    with_value: bool,
    seed: int,
    trend: float,
    interval: int,
    more_samples: int,
    leak_ratio: int,
    significance: float,
) -> None:
    num_steps, min_samples = 40, 4 * interval + more_samples
    run = Salsa(
        with_value,
        interval=interval,
        min_samples=min_samples,
        leak_ratio=leak_ratio,
        significance=significance,
    )
    noise = np.random.default_rng(seed).normal(size=num_steps)
    states = run.run(noise + trend * np.arange(num_steps))

    rate, ended, total, kept = 1e-3, None, 0, 0
    recorded: list[float] = []
    fit: Any = None
    for step, loss in enumerate(run.losses):
        searches = step % interval == 0 and ended is None
        # On a line every step down is accepted. Gamma is 0.1, and the factor 2.
        rate *= 1 + (1 - 0.9**interval) if searches else 1
        assert rates([states[step]]) == pytest.approx([rate], rel=1e-9)
        if ended is None and (with_value or searches):
            recorded.append(loss)
            total += 1
            kept = min(-(-total // leak_ratio), MAX_WINDOW)
            if kept * (1 if with_value else interval) > min_samples:
                fit = stats.linregress(
                    np.arange(kept), recorded[-kept:], alternative="less"
                )
                assume(abs(fit.pvalue - significance) > 1e-6)
                ended = step if fit.pvalue >= significance else None
        assert active([states[step]]) == [ended is None]
        assert int(losses_of(states[step]).total) == total
        assert int(get(states[step], "num_drops")) == 0
        newest = loss_test_of(states[step])
        assert bool(newest.stationary) == (ended is not None)
        if fit is not None:
            assert float(newest.p_value) == pytest.approx(fit.pvalue, abs=1e-7)
            assert float(newest.mean) == pytest.approx(fit.slope, rel=1e-6)
            assert int(newest.num_samples) == kept
    if ended is not None:
        assert int(loss_test_of(states[-1]).step) == ended + 1
