"""The dynamics on which the tests are tried: quadratics and series."""

import dataclasses
import functools

import numpy as np

from benchmarks.validity.law import Law

# A window of 1000 samples takes 8000 steps to fill, so no run is shorter than this.
SHORTEST = 60_000
# Every coordinate starts so many stationary standard deviations from its optimum.
START = 10.0


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """A quadratic and a rate. The noise in the gradient has variance 1.

    Attributes:
      name: the name of the cell.
      dimension: the number of parameters.
      condition: the eigenvalues are spread geometrically from 1/condition to 1.
      relaxation: the relaxation time of the slowest mode, in steps; it sets the rate.
      distance: how far each coordinate of the optimum lies from zero.
      noise: "gaussian", or "heavy" for Student's t with 3 degrees of freedom, scaled.
      momentum: the momentum of the direction.
      direction: "momentum" or "adam".
      length: the length of a run, in relaxation times at its first rate.
      min_samples: a field of the test's window; None for the library's default.
    """

    name: str
    dimension: int = 20
    condition: float = 100.0
    relaxation: float = 5000.0
    distance: float = 0.0
    noise: str = "gaussian"
    momentum: float = 0.9
    direction: str = "momentum"
    length: float = 60.0
    min_samples: int | None = None

    @property
    def eigenvalues(self) -> np.ndarray:
        return np.geomspace(1 / self.condition, 1, self.dimension)

    @property
    def rate(self) -> float:
        # Normalised momentum moves a slow mode by rate * eigenvalue a step. So does
        # Adam once the gradients are mostly noise, of variance 1.
        return self.condition / self.relaxation

    @property
    def steps(self) -> int:
        return max(SHORTEST, int(self.length * self.relaxation))

    @property
    def is_large(self) -> bool:
        return self.dimension > 100

    @functools.cached_property
    def law(self) -> Law:
        return Law(self.eigenvalues, self.rate, self.momentum)

    @property
    def start(self) -> np.ndarray:
        """The first parameters minus the optimum."""
        return START * np.sqrt(self.law.covariance[:, 0, 0])


@dataclasses.dataclass(frozen=True)
class Series:
    """An AR(1) stream of variance 1 around a mean that falls linearly to zero.

    Attributes:
      name: the name of the cell.
      phi: the correlation of neighbours.
      mean: the mean of the stream at its start.
      trend: the number of steps until the mean is zero.
      relaxation: the unit of time.
      steps: the length of a run.
    """

    name: str
    phi: float = 0.9
    mean: float = 0.0
    trend: int = 0
    relaxation: float = 5000.0
    steps: int = 120_000
    is_large = False


Cell = Quadratic | Series

CELLS: tuple[Cell, ...] = (
    Quadratic("base"),
    Quadratic("relaxation 200", relaxation=200.0),
    Quadratic("relaxation 2,000", relaxation=2000.0),
    Quadratic("relaxation 20,000", relaxation=20000.0, length=30.0),
    Quadratic("condition 10", condition=10.0),
    Quadratic("condition 1,000", condition=1000.0),
    Quadratic("dimension 1,000", dimension=1000),
    Quadratic("far", distance=10.0),
    Quadratic("heavy", noise="heavy"),
    Quadratic("plain SGD", momentum=0.0),
    Quadratic("200, far", relaxation=200.0, distance=10.0),
    Quadratic("20,000, far", relaxation=20000.0, distance=10.0, length=30.0),
    Quadratic("200, 1,000, far", dimension=1000, relaxation=200.0, distance=10.0),
    Quadratic("200, window 100", relaxation=200.0, min_samples=100),
    Quadratic("2,000, window 100", relaxation=2000.0, min_samples=100),
    Quadratic("Adam", direction="adam"),
    Quadratic("Adam, far", direction="adam", distance=10.0),
    Series("stationary series"),
    Series("trend", mean=5.0, trend=60_000),
)
QUICK = Quadratic("quick", dimension=3, relaxation=150.0, condition=10.0)
