"""Proximal policy optimization (PPO) of a policy that balances a pole on a cart.

The data come from the policy that is trained, so they change with it. A step is the
update by one mini-batch. The rest of the model has the environments, and what the
policy did in them last, which is trained on for some epochs.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.evidence.images import shuffled_rows
from benchmarks.evidence.task import Batch, Data, Params, Rest, Task

# The cart and pole of Barto, Sutton and Anderson (1983), as in Gymnasium's CartPole-v1.
GRAVITY = 9.8
CART_MASS, POLE_MASS = 1.0, 0.1
HALF_LENGTH = 0.5
FORCE = 10.0
SECONDS_PER_STEP = 0.02
POSITION_LIMIT = 2.4
ANGLE_LIMIT = jnp.pi * 12 / 180
MOST_STEPS = 500

DISCOUNT, TRACE_DECAY = 0.99, 0.95
CLIP = 0.2
VALUE_WEIGHT, ENTROPY_WEIGHT = 0.5, 0.01


def start(key: jax.Array, count: int) -> jax.Array:
    """Positions, velocities, angles and angular velocities, (count, 4) float32."""
    return jax.random.uniform(key, (count, 4), minval=-0.05, maxval=0.05)


def move(states: jax.Array, actions: jax.Array) -> jax.Array:
    """The states (n, 4) after a push to the left (0) or to the right (1)."""
    _, velocity, angle, spin = states.T
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    mass = CART_MASS + POLE_MASS
    force = jnp.where(actions == 1, FORCE, -FORCE)
    push = (force + POLE_MASS * HALF_LENGTH * spin**2 * sine) / mass
    turn = (GRAVITY * sine - cosine * push) / (
        HALF_LENGTH * (4 / 3 - POLE_MASS * cosine**2 / mass)
    )
    acceleration = push - POLE_MASS * HALF_LENGTH * turn * cosine / mass
    slopes = jnp.stack([velocity, acceleration, spin, turn], axis=1)
    return states + SECONDS_PER_STEP * slopes


def has_fallen(states: jax.Array) -> jax.Array:
    is_out = jnp.abs(states[:, 0]) > POSITION_LIMIT
    return is_out | (jnp.abs(states[:, 2]) > ANGLE_LIMIT)


def layers(outputs: int, scale: float, rngs: nnx.Rngs) -> nnx.Sequential:
    """Two hidden layers, orthogonal at first, as is usual for PPO."""

    def linear(inputs: int, outputs: int, scale: float) -> nnx.Linear:
        init = nnx.initializers.orthogonal(scale)
        return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)

    return nnx.Sequential(
        linear(4, 64, 2**0.5),
        jnp.tanh,
        linear(64, 64, 2**0.5),
        jnp.tanh,
        linear(64, outputs, scale),
    )


class ActorCritic(nnx.Module):
    """The logits of the two actions, and the expected discounted return."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.actor = layers(2, 0.01, rngs)
        self.critic = layers(1, 1.0, rngs)

    def logits(self, states: jax.Array) -> jax.Array:
        return self.actor(states)

    def value(self, states: jax.Array) -> jax.Array:
        return self.critic(states)[..., 0]


class Environments(NamedTuple):
    """States, (environments, 4) float32, and the steps since their starts, int32."""

    states: jax.Array
    ages: jax.Array


class Transitions(NamedTuple):
    """What a policy did, and what it gained by that; each (transitions, ...)."""

    states: jax.Array
    actions: jax.Array
    log_probabilities: jax.Array
    advantages: jax.Array
    returns: jax.Array


class Carried(NamedTuple):
    """The rest of the model."""

    environments: Environments
    transitions: Transitions
    num_updates: jax.Array


def log_probability(logits: jax.Array, actions: jax.Array) -> jax.Array:
    log_policy = nnx.log_softmax(logits)
    return jnp.take_along_axis(log_policy, actions[..., None], axis=-1)[..., 0]


def rollout(
    model: ActorCritic, environments: Environments, key: jax.Array, num_steps: int
) -> tuple[Environments, Transitions]:
    """Lets the policy act in each environment, which starts anew when it ends."""

    def step(
        now: Environments, key: jax.Array
    ) -> tuple[Environments, tuple[jax.Array, ...]]:
        action_key, start_key = jax.random.split(key)
        actions = jax.random.categorical(action_key, model.logits(now.states))
        moved, ages = move(now.states, actions), now.ages + 1
        fallen = has_fallen(moved)
        has_ended = fallen | (ages == MOST_STEPS)
        states = jnp.where(has_ended[:, None], start(start_key, len(ages)), moved)
        then = Environments(states, jnp.where(has_ended, 0, ages))
        return then, (now.states, actions, moved, fallen, has_ended)

    keys = jax.random.split(key, num_steps)
    environments, seen = jax.lax.scan(step, environments, keys)
    states, actions, moved, fallen, has_ended = seen
    # The rewards are such that a return is at most 1. An episode that reached its limit
    # would have gone on, unlike one that ended in a fall.
    values = model.value(states)
    later = DISCOUNT * jnp.where(fallen, 0.0, model.value(moved))
    advantages = generalized_advantages(1 - DISCOUNT + later - values, has_ended)
    log_probabilities = log_probability(model.logits(states), actions)
    transitions = Transitions(
        states, actions, log_probabilities, advantages, advantages + values
    )
    return environments, jax.tree.map(jnp.concatenate, transitions)


def generalized_advantages(errors: jax.Array, has_ended: jax.Array) -> jax.Array:
    """Sums of the errors of the values until the episode ends; (steps, episodes)."""

    def add(
        later: jax.Array, now: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        error, has_ended = now
        advantage = error + DISCOUNT * TRACE_DECAY * jnp.where(has_ended, 0.0, later)
        return advantage, advantage

    nothing = jnp.zeros(errors.shape[1])
    return jax.lax.scan(add, nothing, (errors, has_ended), reverse=True)[1]


def clipped_loss(model: ActorCritic, batch: Transitions) -> jax.Array:
    logits = model.logits(batch.states)
    ratio = jnp.exp(log_probability(logits, batch.actions) - batch.log_probabilities)
    scale = batch.advantages.std() + 1e-8
    advantages = (batch.advantages - batch.advantages.mean()) / scale
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    gain = jnp.minimum(ratio * advantages, clipped * advantages).mean()
    entropy = -jnp.sum(nnx.softmax(logits) * nnx.log_softmax(logits), axis=-1).mean()
    error = jnp.mean((model.value(batch.states) - batch.returns) ** 2) / 2
    return VALUE_WEIGHT * error - gain - ENTROPY_WEIGHT * entropy


def episode_lengths(model: ActorCritic, states: jax.Array, key: jax.Array) -> jax.Array:
    """The steps until the policy lets each pole fall, or `MOST_STEPS`; float32."""

    def step(
        carry: tuple[jax.Array, jax.Array, jax.Array], key: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        states, is_up, lengths = carry
        states = move(states, jax.random.categorical(key, model.logits(states)))
        # The step of the fall counts, as it does in Gymnasium.
        return (states, is_up & ~has_fallen(states), lengths + is_up), None

    carry = states, jnp.full(len(states), True), jnp.zeros(len(states))
    return jax.lax.scan(step, carry, jax.random.split(key, MOST_STEPS))[0][2]


def cartpole(
    *,
    num_environments: int = 4,
    steps_per_rollout: int = 64,
    batch_size: int = 64,
    num_epochs: int = 4,
    rollouts_per_record: int = 10,
    num_records: int = 24,
    num_episodes: int = 256,
) -> Task:
    """The policy draws its actions when it is evaluated, as it does in training."""
    num_rows = num_environments * steps_per_rollout
    updates_per_rollout = num_epochs * (num_rows // batch_size)
    steps_per_record = rollouts_per_record * updates_per_rollout
    graph = nnx.split(ActorCritic(nnx.Rngs(0)))[0]

    @jax.jit
    def act(
        params: Params, environments: Environments, key: jax.Array
    ) -> tuple[Environments, Transitions]:
        model = nnx.merge(graph, jax.lax.stop_gradient(params))
        return rollout(model, environments, key, steps_per_rollout)

    def init(seed: int) -> tuple[Params, Rest]:
        params = nnx.state(ActorCritic(nnx.Rngs(seed)))
        start_key, key = jax.random.split(jax.random.key(seed))
        ages = jnp.zeros(num_environments, jnp.int32)
        fresh = Environments(start(start_key, num_environments), ages)
        environments, transitions = act(params, fresh, key)
        return params, Carried(environments, transitions, jnp.zeros((), jnp.int32))

    def draw(key: jax.Array, data: Data) -> Batch:
        del data
        rows_key, act_key = jax.random.split(key)
        epochs = rollouts_per_record * num_epochs
        rows = shuffled_rows(rows_key, num_rows, batch_size, epochs)
        return rows, jax.random.split(act_key, len(rows))

    def value(params: Params, rest: Rest, batch: Batch, data: Data) -> jax.Array:
        del data
        rows = jax.tree.map(lambda array: array[batch[0]], rest.transitions)
        return clipped_loss(nnx.merge(graph, params), rows)

    def loss(
        params: Params, rest: Rest, batch: Batch, data: Data
    ) -> tuple[jax.Array, Rest]:
        num_updates = rest.num_updates + 1
        # These are for the next step, so that the loss of each step is a function of
        # its parameters. The policy that acts is one update old, as its ratios know.
        environments, transitions = jax.lax.cond(
            num_updates % updates_per_rollout == 0,
            lambda: act(params, rest.environments, batch[1]),
            lambda: (rest.environments, rest.transitions),
        )
        carried = Carried(environments, transitions, num_updates)
        return value(params, rest, batch, data), carried

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        del rest
        missing = MOST_STEPS - episode_lengths(nnx.merge(graph, params), *data)
        validation, test = jnp.split(missing, 2)
        return validation.mean(), test.mean()

    start_key, key = jax.random.split(jax.random.key(0))
    return Task(
        name="cartpole",
        unit=f"steps short of {MOST_STEPS}",
        # Gymnasium takes it for solved within 25 steps.
        tolerance=25.0,
        has_absolute_tolerance=True,
        data=(start(start_key, 2 * num_episodes), key),
        init=init,
        draw=draw,
        loss=loss,
        value=value,
        evaluate=evaluate,
        steps_per_epoch=steps_per_record,
        steps_per_record=steps_per_record,
        budgets=(num_records * steps_per_record,),
        clip_norm=0.5,
    )


def cartpole_without_value() -> Task:
    """The loss of a policy says little about how good it is."""
    return dataclasses.replace(
        cartpole(), name="cartpole-without-value", gives_value=False
    )
