"""The methods of the evidence suite: ways to set the rate, tuned, untuned, and ours."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import sasa_optax
from benchmarks.evidence.task import Task
from sasa_optax import EquivalenceTest, LineSearch

# Of normalised momentum: 1.0 moves like optax.sgd(0.1, momentum=0.9).
SGD_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Over four decades, for the picture of what a wrong initial rate costs.
SENSITIVITY_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
PROGRESS_RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1)
ADAM_SENSITIVITY_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)


class Setting(NamedTuple):
    """What a method may know of a run."""

    rate: jax.Array
    num_steps: int
    task: Task

    def per_epoch(self) -> dict[str, Any]:
        """The one argument that methods of this library are given."""
        steps = self.task.steps_per_epoch
        return {} if steps is None else {"steps_per_epoch": steps}


Make = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
      make: maps a `Setting` to the optimizer.
      rates: the initial rate, or the grid from which the rate is tuned.
      is_ours: whether it belongs to this library.
      knows_horizon: whether it is told how many steps there will be.
      evaluated_at: "last", the last iterate; "schedule_free", that method's own
        average; "average", one with polynomial weights; or "averaged_params", that of
        this library.
      sensitivity_rates: the initial rates of the picture; empty where it is not in it.
    """

    make: Make
    rates: tuple[float, ...] = (1.0,)
    is_ours: bool = False
    knows_horizon: bool = False
    evaluated_at: str = "last"
    sensitivity_rates: tuple[float, ...] = ()

    @property
    def is_tuned(self) -> bool:
        return len(self.rates) > 1


def constant(s: Setting) -> optax.GradientTransformation:
    return sasa_optax.qhm(s.rate, weight_decay=s.task.weight_decay)


def steps(s: Setting) -> optax.GradientTransformation:
    """A tenth of the rate after a half of the steps, and again after three quarters."""
    cuts = {s.num_steps // 2: 0.1, s.num_steps * 3 // 4: 0.1}
    schedule = optax.piecewise_constant_schedule(1.0, cuts)
    return sasa_optax.qhm(
        lambda step: s.rate * schedule(step), weight_decay=s.task.weight_decay
    )


def cosine(s: Setting) -> optax.Schedule:
    schedule = optax.cosine_decay_schedule(1.0, s.num_steps)
    return lambda step: s.rate * schedule(step)


def sgd_cosine(s: Setting) -> optax.GradientTransformation:
    return sasa_optax.qhm(cosine(s), weight_decay=s.task.weight_decay)


def adamw(rate: Any, s: Setting) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=s.task.decoupled_decay)


def schedule_free_sgd(s: Setting) -> optax.GradientTransformation:
    # Its own weight decay is coupled.
    return optax.contrib.schedule_free_sgd(
        warmup_steps=s.num_steps // 20, weight_decay=s.task.weight_decay
    )


def schedule_free_adamw(s: Setting) -> optax.GradientTransformation:
    return optax.contrib.schedule_free_adamw(
        warmup_steps=s.num_steps // 20, weight_decay=s.task.decoupled_decay
    )


def prodigy(schedule: optax.ScalarOrSchedule, s: Setting) -> Any:
    return optax.contrib.prodigy(schedule, weight_decay=s.task.decoupled_decay)


def prodigy_linear(s: Setting) -> optax.GradientTransformation:
    return prodigy(optax.linear_schedule(1.0, 0.0, s.num_steps), s)


def dadapt_adamw(s: Setting) -> optax.GradientTransformation:
    return optax.contrib.dadapt_adamw(cosine(s), weight_decay=s.task.decoupled_decay)


def dog(s: Setting) -> optax.GradientTransformation:
    # As its docstring says, for batch norm and for all other models.
    init = 1e-4 if s.task.has_running_averages else 1e-6
    return optax.contrib.dog(
        init_step=("heuristic", init), weight_decay=s.task.weight_decay
    )


def mechanize(s: Setting) -> optax.GradientTransformation:
    return optax.contrib.mechanize(adamw(cosine(s), s))


def reduce_on_plateau(s: Setting) -> optax.GradientTransformation:
    # It gets an epoch's losses at a time, as it takes the noise in one for a plateau.
    size = s.task.steps_per_epoch or 100
    plateau = optax.contrib.reduce_on_plateau(accumulation_size=size)
    return optax.chain(adamw(s.rate, s), plateau)


def ours(optimizer: Callable[..., Any], **arguments: Any) -> Make:
    """A complete optimizer of this library, at its defaults except ``arguments``."""

    def make(s: Setting, **more: Any) -> optax.GradientTransformation:
        named = s.per_epoch() | {"weight_decay": s.task.weight_decay}
        return optimizer(s.rate, **(named | arguments | more))

    return make


def reduced(inner: Make, **arguments: Any) -> Make:
    """`reduce_on_stationarity` after another optimizer."""

    def make(s: Setting, **more: Any) -> optax.GradientTransformation:
        named = s.per_epoch() | arguments | more
        return optax.chain(inner(s), sasa_optax.reduce_on_stationarity(**named))

    return make


def adam_salsa(s: Setting, **more: Any) -> optax.GradientTransformation:
    named: dict[str, Any] = {"search": LineSearch(direction="update")}
    named |= s.per_epoch() | more
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(s.task.decoupled_decay),
        sasa_optax.scale_by_salsa(s.rate, **named),
    )


def adamw_constant(s: Setting) -> optax.GradientTransformation:
    return adamw(s.rate, s)


def averaged(inner: Make) -> Make:
    """`average_iterates` after another optimizer."""

    def make(s: Setting, **more: Any) -> optax.GradientTransformation:
        return optax.chain(inner(s), sasa_optax.average_iterates(**more))

    return make


def following(inner: Make, **arguments: Any) -> Make:
    """`adapt_on_progress` after another optimizer."""

    def make(s: Setting, **more: Any) -> optax.GradientTransformation:
        servo = sasa_optax.adapt_on_progress(**(arguments | more))
        return optax.chain(inner(s), servo)

    return make


# The tolerance of the stored runs, somewhat stricter than the default of 0.02.
_EQUIVALENCE = EquivalenceTest(delta=0.3 / 19)
_centred = functools.partial(
    sasa_optax.salsa, statistic="centred", test=EquivalenceTest(delta=0.35)
)
_our = functools.partial(Method, is_ours=True)
_averaged = functools.partial(_our, evaluated_at="averaged_params")

METHODS: dict[str, Method] = {
    "adamw-progress": _averaged(
        following(adamw_constant), (1e-3,), sensitivity_rates=PROGRESS_RATES
    ),
    "adamw-progress(learning_rate=1e-05)": _averaged(
        following(adamw_constant), (1e-5,)
    ),
    "adamw-progress(learning_rate=0.01)": _averaged(following(adamw_constant), (1e-2,)),
    "prodigy-progress": _averaged(following(functools.partial(prodigy, 1.0))),
    "sgd-progress": _averaged(following(constant)),
    "sgd-constant": Method(constant, SGD_RATES, sensitivity_rates=SENSITIVITY_RATES),
    "sgd-steps": Method(steps, SGD_RATES, knows_horizon=True),
    "sgd-cosine": Method(
        sgd_cosine,
        SGD_RATES,
        knows_horizon=True,
        sensitivity_rates=SENSITIVITY_RATES,
    ),
    "adamw-cosine": Method(
        lambda s: adamw(cosine(s), s),
        ADAM_RATES,
        knows_horizon=True,
        sensitivity_rates=ADAM_SENSITIVITY_RATES,
    ),
    "adamw-1e-3": Method(adamw_constant, (1e-3,)),
    "adamw-plateau": Method(reduce_on_plateau, (1e-3,)),
    "schedule-free-sgd": Method(
        schedule_free_sgd, knows_horizon=True, evaluated_at="schedule_free"
    ),
    "schedule-free-adamw": Method(
        schedule_free_adamw, knows_horizon=True, evaluated_at="schedule_free"
    ),
    "prodigy-linear": Method(prodigy_linear, knows_horizon=True),
    "dadapt-adamw-cosine": Method(dadapt_adamw, knows_horizon=True),
    "dog-averaged": Method(dog, evaluated_at="average"),
    "mechanize-adamw-cosine": Method(mechanize, knows_horizon=True),
    "salsa": _our(
        ours(sasa_optax.salsa),
        (1e-3,),
        sensitivity_rates=SENSITIVITY_RATES,
    ),
    "salsa-equivalence": _our(ours(sasa_optax.salsa, test=_EQUIVALENCE), (1e-3,)),
    "sasa-plus": _our(ours(sasa_optax.sasa_plus), sensitivity_rates=SENSITIVITY_RATES),
    "sasa-plus-equivalence": _our(ours(sasa_optax.sasa_plus, test=_EQUIVALENCE)),
    "sasa": _our(ours(sasa_optax.sasa)),
    "slope": _our(ours(sasa_optax.slope)),
    "adamw-stationarity": _our(
        reduced(adamw_constant), (1e-3,), sensitivity_rates=ADAM_SENSITIVITY_RATES
    ),
    "adamw-stationarity-equivalence": _our(
        reduced(adamw_constant, test=_EQUIVALENCE), (1e-3,)
    ),
    "prodigy-stationarity": _our(reduced(functools.partial(prodigy, 1.0))),
    "prodigy-stationarity-equivalence": _our(
        reduced(functools.partial(prodigy, 1.0), test=_EQUIVALENCE)
    ),
    "adam-salsa": _our(adam_salsa, (1e-3,)),
    "salsa-averaged": _averaged(ours(sasa_optax.salsa), (1e-3,)),
    "salsa-centred-averaged": _averaged(ours(_centred), (1e-3,)),
    "sasa-plus-averaged": _averaged(ours(sasa_optax.sasa_plus, average=True)),
    "adam-salsa-averaged": _averaged(adam_salsa, (1e-3,)),
    "adamw-1e-3-averaged": _averaged(averaged(adamw_constant), (1e-3,)),
    "prodigy-averaged": _averaged(averaged(functools.partial(prodigy, 1.0))),
    "prodigy-stationarity-averaged": _averaged(
        reduced(functools.partial(prodigy, 1.0), average=True)
    ),
    "sgd-constant-averaged": _averaged(averaged(constant), SGD_RATES),
}

# Compared at a quarter, a half and all of the steps.
COSINES = "sgd-cosine", "adamw-cosine"
ANYTIME = (
    *COSINES,
    "adamw-progress",
    "adamw-progress(learning_rate=1e-05)",
    "adamw-progress(learning_rate=0.01)",
    "prodigy-progress",
    "sgd-progress",
    "prodigy-linear",
    "schedule-free-sgd",
    "schedule-free-adamw",
    "prodigy-stationarity-averaged",
    "salsa-averaged",
    "adamw-1e-3-averaged",
)


def method_named(name: str) -> Method:
    """One of `METHODS`, or with arguments: "salsa(window=Window(leak_ratio=4))"."""
    if name in METHODS:
        return METHODS[name]
    base, _, arguments = name.partition("(")
    if base not in METHODS:
        raise SystemExit(f"method must be one of {', '.join(METHODS)}, got {base!r}.")
    # The arguments are Python that the caller of the program wrote.
    named = eval(f"dict({arguments}", dict(vars(sasa_optax)))
    method = METHODS[base]
    # The rate is traced, so it is not an argument of `make`.
    rates = (named.pop("learning_rate"),) if "learning_rate" in named else method.rates
    make = functools.partial(method.make, **named)
    return dataclasses.replace(method, make=make, rates=rates)
