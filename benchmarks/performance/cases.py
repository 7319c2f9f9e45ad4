"""The optimizers that are timed, each beside the plain one that it extends."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import sasa_optax

# What docs/salsa.md recommends.
SEARCH_INTERVAL = 10

Make = Callable[[], optax.GradientTransformation]

BASELINES: dict[str, Make] = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer, and the plain one that it is timed beside.

    Attributes:
      name: the name in the tables.
      baseline: the name of the plain optimizer.
      make: makes the optimizer.
      prepare: changes its initial state before it is timed.
    """

    name: str
    baseline: str
    make: Make
    prepare: Callable[[Any], Any] = lambda state: state


def reduced(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    return optax.chain(optimizer, sasa_optax.reduce_on_stationarity())


def behind(name: str, baseline: str, make: Make) -> Case:
    """A transformation chained after the plain optimizer."""
    return Case(name, baseline, lambda: optax.chain(BASELINES[baseline](), make()))


def switched(state: Any) -> Any:
    """The state of SALSA after its search."""
    return optax.tree.set(state, line_search_active=jnp.zeros((), bool))


def searching() -> optax.GradientTransformation:
    search = sasa_optax.LineSearch(interval=SEARCH_INTERVAL)
    return sasa_optax.salsa(search=search)


SASA_PLUS = Case("sasa_plus", "sgd", lambda: sasa_optax.sasa_plus(1.0))
SASA = Case("sasa", "sgd", lambda: sasa_optax.sasa(1.0))
SWITCHED = Case("salsa, after its switch", "sgd", sasa_optax.salsa, switched)
AVERAGED = behind("average_iterates", "sgd", sasa_optax.average_iterates)
ADAPTED = behind("adapt_on_progress", "adamw", sasa_optax.adapt_on_progress)
REDUCED = behind("reduce_on_stationarity", "adamw", sasa_optax.reduce_on_stationarity)

CASES = [
    SASA_PLUS,
    SASA,
    SWITCHED,
    Case(
        "salsa, after its switch, average=False",
        "sgd",
        lambda: sasa_optax.salsa(average=False),
        switched,
    ),
    AVERAGED,
    Case(
        "sasa_plus, centred",
        "sgd",
        lambda: sasa_optax.sasa_plus(1.0, statistic="centred"),
    ),
    Case("slope", "sgd", lambda: sasa_optax.slope(1.0)),
    Case("dog", "sgd", lambda: optax.contrib.dog()),
    Case("schedule_free_sgd", "sgd", lambda: optax.contrib.schedule_free_sgd(0.1)),
    ADAPTED,
    behind("measure_progress", "adamw", sasa_optax.measure_progress),
    REDUCED,
    behind("average_iterates", "adamw", sasa_optax.average_iterates),
    behind("reduce_on_plateau", "adamw", optax.contrib.reduce_on_plateau),
    Case("prodigy", "adamw", lambda: optax.contrib.prodigy()),
    Case(
        "schedule_free_adamw", "adamw", lambda: optax.contrib.schedule_free_adamw(1e-3)
    ),
]
MODEL_CASES = [
    ADAPTED,
    SASA_PLUS,
    SASA,
    Case("salsa, searching", "sgd", searching),
    SWITCHED,
    REDUCED,
    AVERAGED,
]
