"""Proximal policy optimization (PPO) of a policy that balances a pole on a cart.

The data come from the policy that is trained, so they change with it. A step is the
update of one mini-batch. What else the model carries are the environments, and the
steps that the policy took in them last, which the epochs of mini-batches are of.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.evidence.images import shuffled_rows
from benchmarks.evidence.task import Batch, Data, Params, Rest, Task

# The cart-pole of Barto, Sutton and Anderson (1983), as CartPole-v1 of Gymnasium has it.
GRAVITY = 9.8
CART_MASS, POLE_MASS = 1.0, 0.1
HALF_LENGTH = 0.5
FORCE = 10.0
SECONDS_PER_STEP = 0.02
POSITION_LIMIT = 2.4
ANGLE_LIMIT = 12 * 2 * jnp.pi / 360
MOST_STEPS = 500

DISCOUNT, TRACE_DECAY = 0.99, 0.95
CLIP = 0.2
VALUE_WEIGHT, ENTROPY_WEIGHT = 0.5, 0.01


def start(key: jax.Array) -> jax.Array:
    """Position, velocity, angle and angular velocity, float32, shape (4,)."""
    return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)


def move(x: jax.Array, action: jax.Array) -> jax.Array:
    """The state after a push to the left (0) or to the right (1)."""
    position, velocity, angle, spin = x
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    mass = CART_MASS + POLE_MASS
    force = jnp.where(action == 1, FORCE, -FORCE)
    push = (force + POLE_MASS * HALF_LENGTH * spin**2 * sine) / mass
    angular = (GRAVITY * sine - cosine * push) / (
        HALF_LENGTH * (4 / 3 - POLE_MASS * cosine**2 / mass)
    )
    linear = push - POLE_MASS * HALF_LENGTH * angular * cosine / mass
    return x + SECONDS_PER_STEP * jnp.stack([velocity, linear, spin, angular])


def has_fallen(x: jax.Array) -> jax.Array:
    return (jnp.abs(x[0]) > POSITION_LIMIT) | (jnp.abs(x[2]) > ANGLE_LIMIT)


def layers(outputs: int, scale: float, rngs: nnx.Rngs) -> nnx.Sequential:
    """Two hidden layers, orthogonal at the start, as is usual for PPO."""

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
    """The logits of the actions, and the expected discounted return of a state."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.actor = layers(2, 0.01, rngs)
        self.critic = layers(1, 1.0, rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        return self.actor(x)

    def value(self, x: jax.Array) -> jax.Array:
        return self.critic(x)[..., 0]


class Environments(NamedTuple):
    """States, shape (environments, 4), and the steps since their starts, int32."""

    states: jax.Array
    ages: jax.Array


class Transitions(NamedTuple):
    """What a policy did and what came of it, each (steps * environments, ...)."""

    states: jax.Array
    actions: jax.Array
    log_probabilities: jax.Array
    advantages: jax.Array
    returns: jax.Array


class Carried(NamedTuple):
    """The rest of the model: what it learns from next, and where that ended."""

    environments: Environments
    transitions: Transitions
    num_updates: jax.Array


def draw_actions(model: ActorCritic, x: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.categorical(key, model.logits(x))


def log_probability(log_policy: jax.Array, actions: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_policy, actions[..., None], axis=-1)[..., 0]


def rollout(
    model: ActorCritic, environments: Environments, key: jax.Array, num_steps: int
) -> tuple[Environments, Transitions]:
    """Lets the policy act, and estimates what its actions gained."""

    def step(environments: Environments, key: jax.Array) -> tuple[Environments, tuple]:
        action_key, start_key = jax.random.split(key)
        x, ages = environments
        actions = draw_actions(model, x, action_key)
        moved, ages = jax.vmap(move)(x, actions), ages + 1
        fallen = jax.vmap(has_fallen)(moved)
        has_ended = fallen | (ages == MOST_STEPS)
        fresh = jax.vmap(start)(jax.random.split(start_key, len(x)))
        states = jnp.where(has_ended[:, None], fresh, moved)
        now = Environments(states, jnp.where(has_ended, 0, ages))
        return now, (x, actions, moved, fallen, has_ended)

    keys = jax.random.split(key, num_steps)
    environments, seen = jax.lax.scan(step, environments, keys)
    x, actions, moved, fallen, has_ended = seen
    # The rewards sum up to at most 1. Only a fall ends what they would go on to.
    values = model.value(x)
    after = DISCOUNT * jnp.where(fallen, 0.0, model.value(moved))
    advantages = generalized_advantages(1 - DISCOUNT + after - values, has_ended)
    transitions = Transitions(
        states=x,
        actions=actions,
        log_probabilities=log_probability(nnx.log_softmax(model.logits(x)), actions),
        advantages=advantages,
        returns=advantages + values,
    )
    return environments, jax.tree.map(
        lambda array: array.reshape(-1, *array.shape[2:]), transitions
    )


def generalized_advantages(errors: jax.Array, has_ended: jax.Array) -> jax.Array:
    """Discounted sums of the errors of the values that follow within an episode."""

    def add(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple:
        error, has_ended = now
        advantage = error + DISCOUNT * TRACE_DECAY * jnp.where(has_ended, 0.0, later)
        return advantage, advantage

    none = jnp.zeros(errors.shape[1])
    return jax.lax.scan(add, none, (errors, has_ended), reverse=True)[1]


def clipped_loss(model: ActorCritic, batch: Transitions) -> jax.Array:
    log_policy = nnx.log_softmax(model.logits(batch.states))
    log_ratio = log_probability(log_policy, batch.actions) - batch.log_probabilities
    ratio = jnp.exp(log_ratio)
    scale = batch.advantages.std() + 1e-8
    advantages = (batch.advantages - batch.advantages.mean()) / scale
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    gain = jnp.minimum(ratio * advantages, clipped * advantages).mean()
    entropy = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1).mean()
    error = jnp.mean((model.value(batch.states) - batch.returns) ** 2) / 2
    return VALUE_WEIGHT * error - gain - ENTROPY_WEIGHT * entropy


def episode_lengths(model: ActorCritic, states: jax.Array, key: jax.Array) -> jax.Array:
    """The steps until the policy lets each pole fall, or `MOST_STEPS`; float32."""

    def step(carry: tuple, key: jax.Array) -> tuple:
        states, is_up, lengths = carry
        actions = draw_actions(model, states, key)
        states = jax.vmap(move)(states, actions)
        # The step that lets it fall counts, as it does in Gymnasium.
        lengths += is_up
        return (states, is_up & ~jax.vmap(has_fallen)(states), lengths), None

    count = len(states)
    carry = states, jnp.full(count, True), jnp.zeros(count)
    keys = jax.random.split(key, MOST_STEPS)
    return jax.lax.scan(step, carry, keys)[0][2]


def cartpole(
    *,
    num_environments: int = 16,
    steps_per_rollout: int = 128,
    batch_size: int = 256,
    num_epochs: int = 4,
    rollouts_per_record: int = 10,
    num_records: int = 24,
    num_episodes: int = 256,
) -> Task:
    """The policy is evaluated as it acts in training, by drawing its actions."""
    num_rows = num_environments * steps_per_rollout
    updates_per_rollout = num_epochs * (num_rows // batch_size)
    steps_per_record = rollouts_per_record * updates_per_rollout
    graph = nnx.split(ActorCritic(nnx.Rngs(0)))[0]

    def init(seed: int) -> tuple[Params, Rest]:
        params = nnx.state(ActorCritic(nnx.Rngs(seed)))
        start_key, key = jax.random.split(jax.random.key(seed))
        states = jax.vmap(start)(jax.random.split(start_key, num_environments))
        ages = jnp.zeros(num_environments, jnp.int32)
        acted = act(params, Environments(states, ages), key)
        return params, Carried(*acted, jnp.zeros((), jnp.int32))

    @jax.jit
    def act(params: Params, environments: Environments, key: jax.Array) -> tuple:
        model = nnx.merge(graph, jax.lax.stop_gradient(params))
        return rollout(model, environments, key, steps_per_rollout)

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
        # For the next step, so that this one's loss is a function of the parameters.
        # It is one update behind them, which the ratio accounts for.
        acted = jax.lax.cond(
            num_updates % updates_per_rollout == 0,
            lambda: act(params, rest.environments, batch[1]),
            lambda: (rest.environments, rest.transitions),
        )
        return value(params, rest, batch, data), Carried(*acted, num_updates)

    def evaluate(params: Params, rest: Rest, data: Data) -> tuple[jax.Array, jax.Array]:
        del rest
        model = nnx.merge(graph, params)
        lengths = episode_lengths(model, *data)
        missing = (MOST_STEPS - lengths).reshape(2, num_episodes).mean(axis=1)
        return missing[0], missing[1]

    start_key, key = jax.random.split(jax.random.key(0))
    states = jax.vmap(start)(jax.random.split(start_key, 2 * num_episodes))
    return Task(
        name="cartpole",
        unit="steps short of 500",
        tolerance=0.01,
        data=(states, key),
        init=init,
        draw=draw,
        loss=loss,
        value=value,
        evaluate=evaluate,
        steps_per_epoch=steps_per_record,
        steps_per_record=steps_per_record,
        budgets=(num_records * steps_per_record,),
    )
