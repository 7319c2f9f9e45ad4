"""What is known of a cell's runs, however a test cuts them."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from benchmarks.validity import simulation
from benchmarks.validity.cells import Quadratic
from benchmarks.validity.law import EARLY, start_moments


@dataclasses.dataclass(frozen=True)
class Exact:
    """The truth in closed form, for momentum."""

    cell: Quadratic

    @functools.cached_property
    def settled(self) -> int:
        """The first step at which a drop is not early."""
        return self.cell.law.steps_to_settle(start_moments(self.cell.start))

    def excess_at(self, drops: Sequence[int], factor: float) -> list[float]:
        """The expected excess loss just before each cut of a run cut at these steps."""
        law, moments = self.cell.law, start_moments(self.cell.start)
        excess = []
        for begin, end in itertools.pairwise([0, *drops]):
            moments = law.after(moments, end - begin)
            excess.append(law.excess(moments))
            law, moments = law.cut(factor), moments.without_momentum()
        return excess

    def possible_drops(self, factor: float) -> int:
        """The drops of a run that is cut as soon as it has settled, at each rate."""
        law, moments = self.cell.law, start_moments(self.cell.start)
        step = 0
        for drops in itertools.count():
            wait = law.steps_to_settle(moments)
            step += wait
            if step > self.cell.steps:
                return drops
            moments = law.after(moments, wait).without_momentum()
            law = law.cut(factor)
        raise AssertionError("unreachable")


@dataclasses.dataclass(frozen=True)
class Estimated:
    """The same for Adam, which has no closed form, from runs at the first rate."""

    cell: Quadratic

    @functools.cached_property
    def curve(self) -> np.ndarray:
        """The excess loss by block, in units of its mean over the second half."""
        length = int(16 * self.cell.relaxation)
        losses = simulation.constant_rate_losses(self.cell, length)
        return losses / np.mean(losses[losses.size // 2 :])

    @functools.cached_property
    def settled(self) -> int:
        return int(simulation.BLOCK * (1 + np.argmax(self.curve <= EARLY)))

    def excess_at(self, drops: Sequence[int], factor: float) -> list[float]:
        """The excess loss just before the first cut; the later ones are not known."""
        del factor
        last = self.curve.size - 1
        blocks = (min(step // simulation.BLOCK, last) for step in drops[:1])
        return [float(self.curve[block]) for block in blocks]

    def possible_drops(self, factor: float) -> int:
        """Those of momentum, which is about as fast near stationarity."""
        return Exact(self.cell).possible_drops(factor)


@functools.lru_cache
def truth_of(cell: Quadratic) -> Exact | Estimated:
    return Estimated(cell) if cell.direction == "adam" else Exact(cell)
