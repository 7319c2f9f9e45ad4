"""What ``steps_per_epoch`` sets, and the defaults without it."""

from typing import NamedTuple

from sasa_optax import _checks

# With fewer samples, a test would estimate a variance from fewer than ten batches.
_FEWEST_SAMPLES, _MOST_SAMPLES = 100, 1000


class Defaults(NamedTuple):
    """The defaults of `Window` and `LineSearch` that depend on the epoch."""

    min_samples: int
    test_interval: int
    smoothing: float


def defaults(steps_per_epoch: int | None) -> Defaults:
    if steps_per_epoch is None:
        return Defaults(min_samples=1000, test_interval=100, smoothing=0.1)
    steps = _checks.static_integer("steps_per_epoch", steps_per_epoch, 1)
    epoch = min(_MOST_SAMPLES, max(_FEWEST_SAMPLES, steps))
    return Defaults(min_samples=epoch, test_interval=epoch, smoothing=steps**-0.5)
