"""The law of normalised momentum on a quadratic, in closed form."""

import dataclasses
import functools

import numpy as np

# A drop is early while the expected excess loss is above so many times its stationary
# value.
EARLY = 1.1


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of (parameters - optimum, momentum), by coordinate."""

    mean: np.ndarray
    covariance: np.ndarray

    def without_momentum(self) -> "Moments":
        keep = np.array([1.0, 0.0])
        return Moments(self.mean * keep, self.covariance * np.outer(keep, keep))


def start_moments(offset: np.ndarray) -> Moments:
    """The moments at a known distance from the optimum, without momentum."""
    mean = np.stack([offset, np.zeros_like(offset)], axis=-1)
    return Moments(mean, np.zeros((offset.size, 2, 2)))


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """A linear recursion, driven by noise of variance 1 in the gradient."""

    eigenvalues: np.ndarray
    rate: float
    momentum: float

    @functools.cached_property
    def recursion(self) -> np.ndarray:
        """The matrix that takes the mean one step further, (dimension, 2, 2)."""
        a, b, e = self.rate, self.momentum, self.eigenvalues
        rows = [[1 - a * (1 - b) * e, -a * b + 0 * e], [(1 - b) * e, b + 0 * e]]
        return np.moveaxis(np.array(rows), -1, 0)

    @functools.cached_property
    def covariance(self) -> np.ndarray:
        """The stationary covariance, S = M S M' + D; shape (dimension, 2, 2)."""
        drive = (1 - self.momentum) * np.array([-self.rate, 1.0])
        m = self.recursion
        kronecker = np.einsum("dij,dkl->dikjl", m, m).reshape(-1, 4, 4)
        # All axes are written out, as NumPy 1 and 2 differ in those that they add.
        noise = np.broadcast_to(np.outer(drive, drive).reshape(4, 1), (len(m), 4, 1))
        return np.linalg.solve(np.eye(4) - kronecker, noise).reshape(-1, 2, 2)

    def after(self, moments: Moments, steps: int) -> Moments:
        power = np.linalg.matrix_power(self.recursion, steps)
        deviation = moments.covariance - self.covariance
        return Moments(
            mean=np.einsum("dij,dj->di", power, moments.mean),
            covariance=self.covariance + power @ deviation @ np.swapaxes(power, 1, 2),
        )

    def excess(self, moments: Moments) -> float:
        """The expected excess loss, in units of the stationary one."""
        squares = moments.mean[:, 0] ** 2 + moments.covariance[:, 0, 0]
        stationary = np.sum(self.eigenvalues * self.covariance[:, 0, 0])
        return float(np.sum(self.eigenvalues * squares) / stationary)

    def steps_to_settle(self, moments: Moments) -> int:
        """The number of steps until the expected excess loss is at most `EARLY`.

        It is found by bisection: the slow modes settle last, and do not oscillate.
        """

        def is_unsettled(steps: int) -> bool:
            return self.excess(self.after(moments, steps)) > EARLY

        low, high = 0, 1
        while is_unsettled(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_unsettled(middle) else (low, middle)
        return high

    def cut(self, factor: float) -> "Law":
        return dataclasses.replace(self, rate=factor * self.rate)
