"""The methods of the evidence suite: ways to set the rate, tuned, untuned, and ours."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import sasa_optax
from benchmarks.evidence.task import Params, Task
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
      tasks: the only tasks that it is meant for; empty if for all.
    """

    make: Make
    rates: tuple[float, ...] = (1.0,)
    is_ours: bool = False
    knows_horizon: bool = False
    evaluated_at: str = "last"
    sensitivity_rates: tuple[float, ...] = ()
    tasks: tuple[str, ...] = ()

    @property
    def is_tuned(self) -> bool:
        return len(self.rates) > 1


def constant(s: Setting) -> jax.Array:
    return s.rate


def steps(s: Setting) -> optax.Schedule:
    """A tenth of the rate after a half of the steps, and again after three quarters."""
    cuts = {s.num_steps // 2: 0.1, s.num_steps * 3 // 4: 0.1}
    schedule = optax.piecewise_constant_schedule(1.0, cuts)
    return lambda step: s.rate * schedule(step)


def cosine(s: Setting) -> optax.Schedule:
    schedule = optax.cosine_decay_schedule(1.0, s.num_steps)
    return lambda step: s.rate * schedule(step)


def wsd(s: Setting) -> optax.Schedule:
    """Warm-up over 2 % of the steps, then stable, then linear decay over 20 %."""
    warmup, decay = s.num_steps // 50, s.num_steps // 5
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, warmup),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, decay),
        ],
        [warmup, s.num_steps - decay],
    )
    return lambda step: s.rate * schedule(step)


def linear(s: Setting) -> optax.Schedule:
    return optax.linear_schedule(1.0, 0.0, s.num_steps)


def momentum(schedule: Callable[[Setting], optax.ScalarOrSchedule]) -> Make:
    return lambda s: sasa_optax.qhm(schedule(s), weight_decay=s.task.weight_decay)


def adam(
    optimizer: Make, schedule: Callable[[Setting], optax.ScalarOrSchedule]
) -> Make:
    """An optimizer of Adam's kin, with decoupled weight decay."""
    return lambda s: optimizer(schedule(s), weight_decay=s.task.decoupled_decay)


def schedule_free(
    optimizer: Make, decay: str, one_in: int = 20, **arguments: Any
) -> Make:
    """``decay`` names the kind of weight decay; one step in ``one_in`` is warm-up."""
    return lambda s: optimizer(
        warmup_steps=s.num_steps // one_in,
        weight_decay=getattr(s.task, decay),
        **arguments,
    )


def dog(s: Setting) -> optax.GradientTransformation:
    # As its docstring says, for batch norm and for all other models.
    init = 1e-4 if s.task.has_running_averages else 1e-6
    return optax.contrib.dog(
        init_step=("heuristic", init), weight_decay=s.task.weight_decay
    )


def muon_axes(params: Params) -> Any:
    """The axes of a transformer's hidden matrices; None where Adam takes the place."""

    def axes(path: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        if "blocks" not in name or "kernel" not in name:
            return None
        # The heads of attention are inputs of one kernel, and outputs of the others.
        inputs = x.ndim - 1 if "out" in name else 1
        every = tuple(range(x.ndim))
        return optax.contrib.MuonDimensionNumbers(every[:inputs], every[inputs:])

    return jax.tree_util.tree_map_with_path(axes, params)


def muon(s: Setting) -> optax.GradientTransformation:
    # Rate and decay are those of its author; at 0.02 Adam has its usual 1e-3.
    return optax.contrib.muon(
        s.rate,
        weight_decay=0.01,
        adam_learning_rate=s.rate / 20,
        adam_weight_decay=s.task.decoupled_decay,
        muon_weight_dimension_numbers=muon_axes,
    )


def mechanize(s: Setting) -> optax.GradientTransformation:
    return optax.contrib.mechanize(adam(optax.adamw, cosine)(s))


def reduce_on_plateau(s: Setting) -> optax.GradientTransformation:
    # It gets an epoch's losses at a time, as it takes the noise in one for a plateau.
    size = s.task.steps_per_epoch or 100
    plateau = optax.contrib.reduce_on_plateau(accumulation_size=size)
    return optax.chain(ADAMW(s), plateau)


def ours(optimizer: Callable[..., Any], **arguments: Any) -> Make:
    """A complete optimizer of this library, at its defaults except ``arguments``."""

    def make(s: Setting, **more: Any) -> optax.GradientTransformation:
        named = s.per_epoch() | {"weight_decay": s.task.weight_decay}
        return optimizer(s.rate, **(named | arguments | more))

    return make


def behind(inner: Make, transformation: Make, **arguments: Any) -> Make:
    """A transformation of this library after another optimizer."""

    def make(s: Setting, **more: Any) -> optax.GradientTransformation:
        is_told = transformation is sasa_optax.reduce_on_stationarity
        named = (s.per_epoch() if is_told else {}) | arguments | more
        return optax.chain(inner(s), transformation(**named))

    return make


def adam_salsa(s: Setting, **more: Any) -> optax.GradientTransformation:
    named: dict[str, Any] = {"search": LineSearch(direction="update")}
    named |= s.per_epoch() | more
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(s.task.decoupled_decay),
        sasa_optax.scale_by_salsa(s.rate, **named),
    )


ADAMW, SGD = adam(optax.adamw, constant), momentum(constant)
PRODIGY = adam(optax.contrib.prodigy, lambda s: 1.0)

# The tolerance of the stored runs, somewhat stricter than the default of 0.02.
_EQUIVALENCE = EquivalenceTest(delta=0.3 / 19)
_centred = functools.partial(
    sasa_optax.salsa, statistic="centred", test=EquivalenceTest(delta=0.35)
)
_adapt, _average = sasa_optax.adapt_on_progress, sasa_optax.average_iterates
_reduce = sasa_optax.reduce_on_stationarity
_our = functools.partial(Method, is_ours=True)
_averaged = functools.partial(_our, evaluated_at="averaged_params")

METHODS: dict[str, Method] = {
    "adamw-progress": _averaged(
        behind(ADAMW, _adapt), (1e-3,), sensitivity_rates=PROGRESS_RATES
    ),
    "adamw-progress(learning_rate=1e-05)": _averaged(behind(ADAMW, _adapt), (1e-5,)),
    "adamw-progress(learning_rate=0.01)": _averaged(behind(ADAMW, _adapt), (1e-2,)),
    "prodigy-progress": _averaged(behind(PRODIGY, _adapt)),
    "sgd-progress": _averaged(behind(SGD, _adapt)),
    "sgd-constant": Method(SGD, SGD_RATES, sensitivity_rates=SENSITIVITY_RATES),
    "sgd-steps": Method(momentum(steps), SGD_RATES, knows_horizon=True),
    "sgd-cosine": Method(
        momentum(cosine),
        SGD_RATES,
        knows_horizon=True,
        sensitivity_rates=SENSITIVITY_RATES,
    ),
    "adamw-cosine": Method(
        adam(optax.adamw, cosine),
        ADAM_RATES,
        knows_horizon=True,
        sensitivity_rates=ADAM_SENSITIVITY_RATES,
    ),
    "adamw-1e-3": Method(ADAMW, (1e-3,)),
    "adamw-plateau": Method(reduce_on_plateau, (1e-3,)),
    "schedule-free-sgd": Method(
        schedule_free(optax.contrib.schedule_free_sgd, "weight_decay"),
        knows_horizon=True,
        evaluated_at="schedule_free",
    ),
    "schedule-free-adamw": Method(
        schedule_free(optax.contrib.schedule_free_adamw, "decoupled_decay"),
        knows_horizon=True,
        evaluated_at="schedule_free",
    ),
    "prodigy-linear": Method(adam(optax.contrib.prodigy, linear), knows_horizon=True),
    "dadapt-adamw-cosine": Method(
        adam(optax.contrib.dadapt_adamw, cosine), knows_horizon=True
    ),
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
        behind(ADAMW, _reduce), (1e-3,), sensitivity_rates=ADAM_SENSITIVITY_RATES
    ),
    "adamw-stationarity-equivalence": _our(
        behind(ADAMW, _reduce, test=_EQUIVALENCE), (1e-3,)
    ),
    "prodigy-stationarity": _our(behind(PRODIGY, _reduce)),
    "prodigy-stationarity-equivalence": _our(
        behind(PRODIGY, _reduce, test=_EQUIVALENCE)
    ),
    "adam-salsa": _our(adam_salsa, (1e-3,)),
    "salsa-averaged": _averaged(ours(sasa_optax.salsa), (1e-3,)),
    "salsa-centred-averaged": _averaged(ours(_centred), (1e-3,)),
    "sasa-plus-averaged": _averaged(ours(sasa_optax.sasa_plus, average=True)),
    "adam-salsa-averaged": _averaged(adam_salsa, (1e-3,)),
    "adamw-1e-3-averaged": _averaged(behind(ADAMW, _average), (1e-3,)),
    "prodigy-averaged": _averaged(behind(PRODIGY, _average)),
    "prodigy-stationarity-averaged": _averaged(behind(PRODIGY, _reduce, average=True)),
    "sgd-constant-averaged": _averaged(behind(SGD, _average), SGD_RATES),
}
SMALL_METHODS = tuple(METHODS)
METHODS |= {
    "adamw-progress(learning_rate=0.0001)": _averaged(behind(ADAMW, _adapt), (1e-4,)),
    "muon-progress": _averaged(
        behind(muon, _adapt), (0.02,), tasks=("gpt", "gpt-full")
    ),
    "adamw-wsd": Method(adam(optax.adamw, wsd), ADAM_RATES, knows_horizon=True),
    # Of the AlgoPerf submission of its authors, arXiv 2405.15682.
    "schedule-free-adamw-calibrated": Method(
        schedule_free(
            optax.contrib.schedule_free_adamw,
            "decoupled_decay",
            one_in=50,
            learning_rate=0.0025,
            b2=0.9955159689799007,
        ),
        knows_horizon=True,
        evaluated_at="schedule_free",
    ),
}
LARGE_METHODS = (
    "adamw-cosine",
    "adamw-wsd",
    "schedule-free-adamw",
    "schedule-free-adamw-calibrated",
    "prodigy-linear",
    "adamw-progress",
    "adamw-progress(learning_rate=0.0001)",
    "prodigy-progress",
    "muon-progress",
)

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

# In the large tier all methods are compared so.
LARGE_SCHEDULES = "adamw-cosine", "adamw-wsd"


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
