"""The tasks of the evidence suite by name: small, of several kinds, all offline."""

import dataclasses
import functools
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
# A name of its own, so that its runs are never taken for those of the suite.
QUICK = "quick"


@functools.lru_cache(maxsize=1)
def task_named(name: str) -> Task:
    if name == QUICK:
        task = images.digits_logistic()
        budgets = (2 * task.steps_per_record,)
        return dataclasses.replace(task, name=QUICK, budgets=budgets)
    return TASKS[name]()
