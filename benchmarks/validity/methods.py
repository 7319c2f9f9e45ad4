"""The tests that are tried, each as a complete optimizer and as parts for a chain."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import optax

import sasa_optax
from sasa_optax import EquivalenceTest, SlopeTest, Window, ZeroMeanTest

Optimizer = optax.GradientTransformationExtraArgs


@dataclasses.dataclass(frozen=True)
class Method:
    """A test that the library offers.

    Attributes:
      make: maps a rate, ``momentum`` and ``window`` to the complete optimizer.
      options: the same settings as keyword arguments of `scale_by_sasa_plus`.
      series_test: the test of a series, where it is another.
      any_direction: whether it holds for directions other than momentum.
    """

    make: Callable[..., Optimizer]
    options: dict[str, Any]
    series_test: sasa_optax.StationarityTest | None = None
    any_direction: bool = True

    @property
    def factor(self) -> float:
        return self.options.get("factor", 0.1)

    @property
    def window(self) -> Window:
        return self.options.get("window", Window())

    @property
    def series_options(self) -> dict[str, Any]:
        test = self.series_test
        return self.options if test is None else self.options | {"test": test}


def of_sasa_plus(
    series_test: sasa_optax.StationarityTest | None = None, **options: Any
) -> Method:
    make = functools.partial(sasa_optax.sasa_plus, **options)
    return Method(make, options, series_test)


# The scale of a series is its standard deviation, not the noise of a gradient.
_equivalence = functools.partial(of_sasa_plus, EquivalenceTest(delta=0.3))
_scaled = Window(scale_min_samples=True)

METHODS = {
    "zero_mean": of_sasa_plus(test=ZeroMeanTest()),
    "equivalence": _equivalence(test=EquivalenceTest()),
    "centred": _equivalence(statistic="centred", test=EquivalenceTest(delta=0.35)),
    "zero_mean, delta=0.25": of_sasa_plus(test=ZeroMeanTest(delta=0.25)),
    "sasa": Method(
        sasa_optax.sasa,
        {"test": EquivalenceTest(), "window": Window(leak_ratio=2)},
        any_direction=False,
    ),
    "slope": Method(
        sasa_optax.slope,
        {
            "statistic": sasa_optax.loss_statistic(),
            "test": SlopeTest(),
            "factor": 0.5,
        },
    ),
    "zero_mean, scaled": of_sasa_plus(test=ZeroMeanTest(), window=_scaled),
    "equivalence, scaled": _equivalence(test=EquivalenceTest(), window=_scaled),
}


def method_named(name: str) -> Method:
    """One of `METHODS`, or one with the options that ``module:function`` returns."""
    if name in METHODS:
        return METHODS[name]
    module, _, function = name.partition(":")
    return of_sasa_plus(**getattr(importlib.import_module(module), function)())
