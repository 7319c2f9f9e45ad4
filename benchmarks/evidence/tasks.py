"""The tasks of the evidence suite by name, in three tiers: all offline."""

import dataclasses
import functools
import importlib
from collections.abc import Callable

from benchmarks.evidence import images, streams, texts
from benchmarks.evidence.task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "digits-logistic": images.digits_logistic,
    "digits-mlp": images.digits_mlp,
    "fashion-mlp": images.fashion_mlp,
    "fashion-cnn": images.fashion_cnn,
    "char-transformer": texts.char_transformer,
    "byte-gpt": texts.byte_gpt,
    "negative-elbo": streams.negative_elbo,
    "least-squares": streams.least_squares,
    "factorization": streams.factorization,
}


def _large(module: str, name: str) -> Callable[[], Task]:
    """Imported when it is made, as some need packages that no small task needs."""

    def make() -> Task:
        imported = importlib.import_module(f"benchmarks.evidence.large.{module}")
        return getattr(imported, name)()

    return make


LARGE: dict[str, Callable[[], Task]] = {
    "gpt": _large("gpt", "gpt"),
    "resnet": _large("resnet", "resnet"),
    "lstm": _large("lstm", "lstm"),
    "flights": _large("flights", "flights"),
    "wordnet": _large("graph", "wordnet"),
    "stems": _large("stems", "stems"),
    "diffusion": _large("diffusion", "diffusion"),
    "cartpole": _large("cartpole", "cartpole"),
    "cartpole-without-value": _large("cartpole", "cartpole_without_value"),
}
# For an accelerator: a run takes an hour of a CPU.
FULL: dict[str, Callable[[], Task]] = {
    "gpt-full": _large("gpt", "gpt_full"),
    "resnet-full": _large("resnet", "resnet_full"),
}
# A name of its own, so that its runs are never taken for those of the suite.
QUICK = "quick"


@functools.lru_cache(maxsize=1)
def task_named(name: str) -> Task:
    if name == QUICK:
        task = images.digits_logistic()
        budgets = (2 * task.steps_per_record,)
        return dataclasses.replace(task, name=QUICK, budgets=budgets)
    known = TASKS | LARGE | FULL
    if name not in known:
        raise SystemExit(f"task must be one of {', '.join(known)}, got {name!r}.")
    return known[name]()
