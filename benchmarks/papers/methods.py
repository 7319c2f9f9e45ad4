"""The methods of the papers, with their authors' options, beside two that have none.

There are two sets of options: those of the experiments (`pzzhang/sasa`), and those of
the package (`microsoft/statopt`). Where they differ, a method says which it has.
"""

import dataclasses
import functools
from typing import Any

import optax

import sasa_optax
from benchmarks.evidence.contenders import Method, Setting
from benchmarks.papers.protocols import Protocol
from sasa_optax import EquivalenceTest, LineSearch, SlopeTest, Window, ZeroMeanTest

_EXPERIMENTS_LEAK, _STATOPT_LEAK = 4, 8
_STATOPT_SAMPLES, _STATOPT_INTERVAL = 1000, 1000
USUAL_RATE, SALSA_RATE = 1e-3, 1e-3


@dataclasses.dataclass(frozen=True)
class PaperMethod(Method):
    """A method of an experiment.

    Attributes:
      is_shuffled: whether windows of text are drawn at random, as the tests suppose.
      is_scheduled: whether its rate follows the hand-tuned schedule.
    """

    is_shuffled: bool = False
    is_scheduled: bool = False


def window(p: Protocol, s: Setting, leak_ratio: int, samples: int, most: int) -> Window:
    """A window whose test runs once an epoch, or every ``most`` steps if it is longer.

    It is as large as a run without a drop can fill.
    """
    steps = s.task.steps_per_epoch or s.num_steps
    least = p.samples_in(samples, steps)
    return Window(
        leak_ratio=leak_ratio,
        min_samples=least,
        test_interval=min(most, steps),
        max_window=max(least + 1, -(-s.num_steps // leak_ratio)),
    )


def experiments_window(p: Protocol, s: Setting) -> Window:
    return window(p, s, _EXPERIMENTS_LEAK, p.samples, most=s.num_steps)


def statopt_window(p: Protocol, s: Setting) -> Window:
    return window(p, s, _STATOPT_LEAK, _STATOPT_SAMPLES, _STATOPT_INTERVAL)


def common(p: Protocol) -> dict[str, Any]:
    return {"momentum": p.momentum, "weight_decay": p.weight_decay}


def hand_tuned(p: Protocol, s: Setting) -> optax.GradientTransformation:
    return sasa_optax.qhm(s.rate, **common(p))


def sasa(p: Protocol, s: Setting) -> optax.GradientTransformation:
    # The authors count all samples since the drop, of which the newer half is kept.
    return sasa_optax.sasa(
        s.rate,
        factor=1 / p.drop_factor,
        test=EquivalenceTest(delta=0.02, significance=0.2),
        window=window(p, s, 2, p.samples // 2, most=s.num_steps),
        **common(p),
    )


def sasa_plus(p: Protocol, s: Setting) -> optax.GradientTransformation:
    return sasa_optax.sasa_plus(
        s.rate,
        factor=1 / p.drop_factor,
        test=ZeroMeanTest(significance=0.01, variance="overlapping_batch_means"),
        window=experiments_window(p, s),
        **common(p),
    )


def sasa_plus_statopt(p: Protocol, s: Setting) -> optax.GradientTransformation:
    return sasa_optax.sasa_plus(
        s.rate,
        factor=1 / p.drop_factor,
        test=ZeroMeanTest(significance=0.05, variance="iid"),
        window=statopt_window(p, s),
        **common(p),
    )


def slope(p: Protocol, s: Setting) -> optax.GradientTransformation:
    return sasa_optax.slope(
        s.rate,
        factor=0.5,
        test=SlopeTest(significance=0.05),
        window=statopt_window(p, s),
        **common(p),
    )


def ssls(p: Protocol, s: Setting) -> optax.GradientTransformation:
    search = LineSearch(smoothing=0.05, sufficient_decrease=0.1, max_trials=10)
    return sasa_optax.ssls(s.rate, search=search, **common(p))


def salsa(p: Protocol, s: Setting) -> optax.GradientTransformation:
    steps = s.task.steps_per_epoch or s.num_steps
    return sasa_optax.salsa(
        s.rate,
        factor=1 / p.drop_factor,
        test=ZeroMeanTest(significance=0.05, variance="iid"),
        window=statopt_window(p, s),
        search=LineSearch(smoothing=steps**-0.5, sufficient_decrease=0.05),
        average=False,
        **common(p),
    )


def adamw_progress(p: Protocol, s: Setting) -> optax.GradientTransformation:
    adamw = optax.adamw(s.rate, weight_decay=p.decoupled_decay)
    return optax.chain(adamw, sasa_optax.adapt_on_progress())


def sgd_progress(p: Protocol, s: Setting) -> optax.GradientTransformation:
    sgd = sasa_optax.qhm(s.rate, **common(p))
    return optax.chain(sgd, sasa_optax.adapt_on_progress(p.momentum))


def clipped(p: Protocol, make: Any, s: Setting) -> optax.GradientTransformation:
    optimizer = make(p, s)
    if p.clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(p.clip), optimizer)


def methods_of(p: Protocol) -> dict[str, PaperMethod]:
    """All methods of an experiment, in the order of the table."""

    def method(make: Any, rate: float = p.rate, **fields: Any) -> PaperMethod:
        return PaperMethod(functools.partial(clipped, p, make), (rate,), **fields)

    tested = functools.partial(method, is_ours=True, is_shuffled=True)
    averaged = functools.partial(method, is_ours=True, evaluated_at="averaged_params")
    methods = {
        "hand-tuned": method(hand_tuned, is_scheduled=True),
        "hand-tuned-shuffled": method(hand_tuned, is_scheduled=True, is_shuffled=True),
        "sasa": tested(sasa),
        "sasa-plus": tested(sasa_plus),
        "sasa-plus-statopt": tested(sasa_plus_statopt),
        "slope": tested(slope),
        "ssls": method(ssls, is_ours=True),
        "salsa": tested(salsa, SALSA_RATE),
        "adamw-progress": averaged(adamw_progress, USUAL_RATE),
        "sgd-progress": averaged(sgd_progress),
    }
    if p.model != "lstm":
        # Images are shuffled for all methods.
        del methods["hand-tuned-shuffled"]
    return methods
