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
      searches: whether it is given the gradient and the loss as a function.
    """

    name: str
    baseline: str
    make: Make
    prepare: Callable[[Any], Any] = lambda state: state
    searches: bool = False


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
SWITCHED = Case(
    "salsa, after its switch", "sgd", sasa_optax.salsa, switched, searches=True
)
AVERAGED = behind("average_iterates", "sgd", sasa_optax.average_iterates)
ADAPTED = behind("adapt_on_progress", "adamw", sasa_optax.adapt_on_progress)
REDUCED = behind("reduce_on_stationarity", "adamw", sasa_optax.reduce_on_stationarity)
AVERAGED_ADAMW = behind("average_iterates", "adamw", sasa_optax.average_iterates)
PLATEAU = behind("reduce_on_plateau", "adamw", optax.contrib.reduce_on_plateau)
PRODIGY = Case("prodigy", "adamw", lambda: optax.contrib.prodigy())
SCHEDULE_FREE_SGD = Case(
    "schedule_free_sgd", "sgd", lambda: optax.contrib.schedule_free_sgd(0.1)
)
SCHEDULE_FREE = Case(
    "schedule_free_adamw", "adamw", lambda: optax.contrib.schedule_free_adamw(1e-3)
)

CASES = [
    SASA_PLUS,
    SASA,
    SWITCHED,
    Case(
        "salsa, after its switch, average=False",
        "sgd",
        lambda: sasa_optax.salsa(average=False),
        switched,
        searches=True,
    ),
    AVERAGED,
    Case(
        "sasa_plus, centred",
        "sgd",
        lambda: sasa_optax.sasa_plus(1.0, statistic="centred"),
    ),
    Case("slope", "sgd", lambda: sasa_optax.slope(1.0)),
    Case("dog", "sgd", lambda: optax.contrib.dog()),
    SCHEDULE_FREE_SGD,
    ADAPTED,
    behind("measure_progress", "adamw", sasa_optax.measure_progress),
    REDUCED,
    AVERAGED_ADAMW,
    PLATEAU,
    PRODIGY,
    SCHEDULE_FREE,
]
MODEL_CASES = [
    ADAPTED,
    SASA_PLUS,
    SASA,
    Case("salsa, searching", "sgd", searching, searches=True),
    SWITCHED,
    REDUCED,
    AVERAGED,
]
LARGE_MODEL_CASES = [ADAPTED, REDUCED, AVERAGED_ADAMW]
# The methods that docs/peers.md compares, all beside AdamW.
PEERS = [
    Case("sgd, with momentum", "adamw", BASELINES["sgd"]),
    dataclasses.replace(SCHEDULE_FREE_SGD, baseline="adamw"),
    SCHEDULE_FREE,
    PRODIGY,
    Case("dog", "adamw", lambda: optax.contrib.dog()),
    Case(
        "dog, then average_iterates",
        "adamw",
        lambda: optax.chain(optax.contrib.dog(), sasa_optax.average_iterates()),
    ),
    Case(
        "mechanize of adamw",
        "adamw",
        lambda: optax.contrib.mechanize(BASELINES["adamw"]()),
    ),
    Case("dadapt_adamw", "adamw", lambda: optax.contrib.dadapt_adamw()),
    PLATEAU,
    AVERAGED_ADAMW,
    REDUCED,
    behind(
        "reduce_on_stationarity, average=True",
        "adamw",
        lambda: sasa_optax.reduce_on_stationarity(average=True),
    ),
    ADAPTED,
]
