"""A task of the evidence suite, as pure functions.

They are functions of the parameters, of whatever else a model carries (running
averages, random state), and of data, so that a whole run compiles to one loop.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

Batch = Any
Data = Any
Params = Any
Rest = Any


@dataclasses.dataclass(frozen=True)
class Task:
    """What is minimised, on which data, for how long.

    Attributes:
      name: the name in the results.
      unit: the unit of the test metric, which is better the smaller it is.
      tolerance: the distance from the best tuned baseline that counts as none: in the
        unit of the metric if it is absolute, else as a share of the best loss.
      data: arrays on the device.
      init: maps a seed to the parameters and the rest of the model.
      draw: maps a key and the data to the mini-batches of a record.
      loss: the loss of a mini-batch in training mode, and the rest of the model after.
      value: the same loss as a deterministic function, for a line search.
      evaluate: the metric on validation data, which chooses rates, and on test data,
        which is reported. Both are the expected loss where that is known.
      steps_per_epoch: None where there are no epochs.
      steps_per_record: the number of steps between evaluations.
      budgets: numbers of steps, the smallest first.
      weight_decay: the coupled decay of momentum SGD.
      decoupled_decay: the decay of AdamW and its kin.
      has_running_averages: whether an averaged model needs running averages of its own.
      clip_norm: the global norm to which gradients are clipped before any optimizer.
      gives_value: whether the optimizer is given the loss, as ``value``.
      has_absolute_tolerance: see `tolerance`.
    """

    name: str
    unit: str
    tolerance: float
    data: Data
    init: Callable[[int], tuple[Params, Rest]]
    draw: Callable[[jax.Array, Data], Batch]
    loss: Callable[[Params, Rest, Batch, Data], tuple[jax.Array, Rest]]
    value: Callable[[Params, Rest, Batch, Data], jax.Array]
    evaluate: Callable[[Params, Rest, Data], tuple[jax.Array, jax.Array]]
    steps_per_epoch: int | None
    steps_per_record: int
    budgets: tuple[int, ...]
    weight_decay: float = 0.0
    decoupled_decay: float = 0.0
    has_running_averages: bool = False
    clip_norm: float | None = None
    gives_value: bool = True
    has_absolute_tolerance: bool = False

    @property
    def parts(self) -> tuple[int, int, int]:
        """A quarter, a half and all of the largest budget, in whole records."""
        whole = self.budgets[-1]
        records = whole // self.steps_per_record
        parts = (max(1, records // n) for n in (4, 2))
        quarter, half = (part * self.steps_per_record for part in parts)
        return quarter, half, whole


def model_functions(
    make: Callable[[nnx.Rngs], nnx.Module],
    loss_fn: Callable[[Any, Batch, Data], jax.Array],
) -> dict[str, Any]:
    """`init`, `loss`, `value` and the predictions of a Flax model."""
    model = make(nnx.Rngs(0))
    model.train()
    training = nnx.split(model, nnx.Param, ...)[0]
    model.eval()
    inference = nnx.split(model, nnx.Param, ...)[0]

    def init(seed: int) -> tuple[Params, Rest]:
        model = make(nnx.Rngs(seed))
        model.train()
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return params, rest

    def loss(
        params: Params, rest: Rest, batch: Batch, data: Data
    ) -> tuple[jax.Array, Rest]:
        model = nnx.merge(training, params, rest, copy=True)
        loss = loss_fn(model, batch, data)
        return loss, nnx.split(model, nnx.Param, ...)[2]

    def value(params: Params, rest: Rest, batch: Batch, data: Data) -> jax.Array:
        return loss_fn(nnx.merge(inference, params, rest, copy=True), batch, data)

    def predict(params: Params, rest: Rest, *inputs: Any) -> Any:
        return nnx.merge(inference, params, rest, copy=True)(*inputs)

    return {"init": init, "loss": loss, "value": value, "predict": predict}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
