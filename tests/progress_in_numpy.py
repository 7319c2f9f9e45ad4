"""Progress by its definition, from sums over all updates, in NumPy."""

import numpy as np
import scipy.stats


def horizons(steps: int, age: int = 0) -> np.ndarray:
    """The horizon at each step of a run that is ``age`` steps old."""
    return np.maximum(32, np.arange(age + 1, age + steps + 1) / 8)


def weights(steps: int, age: int = 0) -> np.ndarray:
    """How much of update j is left in x - c after step k; [k, j]."""
    kept = np.log1p(-1 / horizons(steps, age))
    total = np.cumsum(kept)
    log_weights = total[:, None] - (total - kept)[None]
    return np.tril(np.exp(np.minimum(log_weights, 0)))


def past_scales(scales: np.ndarray) -> np.ndarray:
    """The geometric mean of the scales of about a horizon, after each step."""
    kept = weights(len(scales)) / (horizons(len(scales)) - 1)
    return np.exp(kept @ np.log(scales))


def dissipation(momentum: float, nu: float = 1.0) -> float:
    """1 / (the variance of a direction made of white gradients of variance 1)."""
    lags = np.arange(10_000)
    impulse = nu * (1 - momentum) * momentum**lags
    impulse[0] += 1 - nu
    return 1 / float(np.sum(impulse**2))


def expected_progress(
    moves: np.ndarray, momentum: float = 0.0, age: int = 0
) -> np.ndarray:
    """R of one leaf after each step, from its updates of shape (steps, ...)."""
    moves = moves.reshape(len(moves), -1)
    left = weights(len(moves), age)
    distances = np.sum((left @ moves) ** 2, axis=1)
    walks = dissipation(momentum) * (left**2 @ np.sum(moves**2, axis=1))
    return distances / np.where(walks > 0, walks, 1)


def mean_stall() -> float:
    """The mean on a plateau of how surely the loss rises, from 0 to 1.

    It is that of the difference of two averages, one with eight times the horizon of
    the other, in units of three standard deviations of the fast one.
    """
    difference = scipy.stats.norm(scale=np.sqrt(1 + 1 / 8 - 4 / 9))
    return float(difference.expect(lambda z: np.clip(z / 3, 0, 1)))
