"""A small GPT on bytes of Linux's documentation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evidence import texts
from benchmarks.evidence.large import corpus
from benchmarks.evidence.task import Task


def gpt(
    load: Callable[[], dict[str, np.ndarray]] = corpus.linux_documentation,
    *,
    name: str = "gpt",
    width: int = 192,
    depth: int = 5,
    context: int = 128,
    batch_size: int = 4,
    steps_per_record: int = 150,
    num_test: int = 128,
    held_out_stride: int = 2048,
    budget: int = 3000,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Task:
    """A task on windows of 21 MB, of which it sees 1.5 MB.

    Held-out windows are so far apart that they come from all held-out files.
    """
    return texts.language_model(
        name,
        load(),
        vocabulary=256,
        width=width,
        heads=width // 32,
        depth=depth,
        context=context,
        batch_size=batch_size,
        steps_per_record=steps_per_record,
        num_test=num_test,
        held_out_stride=held_out_stride,
        budgets=(budget,),
        dtype=dtype,
    )


def gpt_full() -> Task:
    """The same on 12 MB, eight times as many windows a step."""
    return gpt(name="gpt-full", batch_size=32, num_test=512)
