"""A whole run, compiled to one loop: from a rate and a seed to its curves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sasa_optax
from benchmarks.evidence.contenders import Method, Setting
from benchmarks.evidence.task import Task


class Carry(NamedTuple):
    """What a step changes."""

    params: Any
    rest: Any
    opt_state: Any
    average: Any
    num_steps: jax.Array


def averaged(average: Any, params: Any, num_steps: jax.Array) -> Any:
    """An average with polynomial weights of power 8, as DoG's authors recommend."""
    weight = 9.0 / (num_steps + 9.0)
    return jax.tree.map(lambda a, x: a + weight * (x - a), average, params)


def step_fn(task: Task, method: Method, optimizer: Any, data: Any) -> Callable:
    def step(carry: Carry, batch: Any) -> tuple[Carry, jax.Array]:
        params, rest, opt_state, average, num_steps = carry
        (loss, new_rest), grads = jax.value_and_grad(task.loss, has_aux=True)(
            params, rest, batch, data
        )
        # With dropout, this loss is not the one that a line search evaluates.
        searches = optax.tree.get(opt_state, "line_search_active") is not None
        is_random = bool(jax.tree.leaves(rest))
        is_given = task.gives_value and not (searches and is_random)
        updates, opt_state = optimizer.update(
            grads,
            opt_state,
            params,
            grad=grads,
            value=loss if is_given else None,
            value_fn=lambda params: task.value(params, rest, batch, data),
        )
        params = optax.apply_updates(params, updates)
        if method.evaluated_at == "average":
            average = averaged(average, params, num_steps)
        return Carry(params, new_rest, opt_state, average, num_steps + 1), loss

    return step


def evaluated(
    task: Task, method: Method, carry: Carry, batches: Any, data: Any
) -> tuple[jax.Array, jax.Array]:
    """The metrics on validation and test data, where the method is evaluated."""
    params, rest = carry.params, carry.rest
    if method.evaluated_at == "schedule_free":
        (state,) = states_of(carry.opt_state, optax.contrib.ScheduleFreeState)
        params = optax.contrib.schedule_free_eval_params(state, params)
    elif method.evaluated_at == "average":
        params = carry.average
    elif method.evaluated_at == "averaged_params":
        params = sasa_optax.averaged_params(carry.opt_state, params)
    if task.has_running_averages and method.evaluated_at != "last":
        # The running averages of the iterates are not those of the averaged model.
        some = jax.tree.map(lambda x: x[:50], batches)
        rest, _ = jax.lax.scan(
            lambda rest, batch: (task.loss(params, rest, batch, data)[1], None),
            rest,
            some,
        )
    return task.evaluate(params, rest, data)


def states_of(opt_state: Any, kinds: type | tuple[type, ...]) -> list[Any]:
    """The parts of a state that are of these kinds."""

    def is_one(node: Any) -> bool:
        return isinstance(node, kinds)

    return list(filter(is_one, jax.tree.leaves(opt_state, is_leaf=is_one)))


def rate_of(opt_state: Any, rate: jax.Array) -> jax.Array:
    """The rate now: what a controller has made of it, else the given one."""
    kinds = (
        sasa_optax.AdaptOnProgressState,
        sasa_optax.ControllerState,
        optax.contrib.ReduceLROnPlateauState,
    )
    for state in states_of(opt_state, kinds):
        now = getattr(state, "learning_rate", None)
        return rate * state.scale if now is None else now
    return rate


def start(params: Any, rest: Any, optimizer: Any, method: Method) -> Carry:
    """What the first step begins with."""
    average = params if method.evaluated_at == "average" else None
    count = jnp.zeros((), jnp.int32)
    return Carry(params, rest, optimizer.init(params), average, count)


def record_fn(
    task: Task, method: Method, optimizer: Any, rate: jax.Array, data: Any
) -> Callable:
    """A function that trains up to the next evaluation, and returns what it saw."""
    step = step_fn(task, method, optimizer, data)

    def record(carry: Carry, key: jax.Array) -> tuple[Carry, dict[str, jax.Array]]:
        batches = task.draw(key, data)
        carry, losses = jax.lax.scan(step, carry, batches)
        validation, test = evaluated(task, method, carry, batches, data)
        names = "num_drops", "num_overshoots"
        counts = [optax.tree.get(carry.opt_state, name) for name in names]
        drops = next((x for x in counts if x is not None), jnp.int32(0))
        return carry, {
            "train": losses.mean(),
            "validation": validation,
            "test": test,
            "rates": rate_of(carry.opt_state, rate),
            "drops": drops,
        }

    return record


def run_fn(task: Task, method: Method, num_steps: int) -> Callable:
    """A function from a rate, a key and initial parameters to the curves of a run."""

    def run(rate: jax.Array, key: jax.Array, params: Any, rest: Any, data: Any) -> Any:
        optimizer = method.make(Setting(rate, num_steps, task))
        if task.clip_norm is not None:
            clip = optax.clip_by_global_norm(task.clip_norm)
            optimizer = optax.chain(clip, optimizer)
        optimizer = optax.with_extra_args_support(optimizer)
        carry = start(params, rest, optimizer, method)
        keys = jax.random.split(key, num_steps // task.steps_per_record)
        record = record_fn(task, method, optimizer, rate, data)
        return jax.lax.scan(record, carry, keys)[1]

    return run
