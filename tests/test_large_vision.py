"""The larger tasks of the evidence suite: images, diffusion and a pole on a cart."""

import gzip
import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.evidence import contenders, training
from benchmarks.evidence.large import cartpole, diffusion, resnet
from benchmarks.evidence.task import Task
from examples import fashion_mnist


def _write(path: pathlib.Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes(), 1))


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """250 images to train on, 50 for validation, and 40 to test."""
    monkeypatch.setattr(fashion_mnist, "NUM_VALIDATION", 50)
    random = np.random.default_rng(0)
    for i, count in enumerate([300, 40]):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        _write(tmp_path / fashion_mnist.FILES[2 * i], images)
        labels = random.integers(0, 10, count, np.uint8)
        _write(tmp_path / fashion_mnist.FILES[2 * i + 1], labels)
    return tmp_path


def _curves(task: Task, rate: float) -> dict[str, Any]:
    params, rest = task.init(0)
    run = training.run_fn(task, contenders.METHODS["adamw-1e-3"], task.budgets[-1])
    arguments = jnp.float32(rate), jax.random.key(0), params, rest, task.data
    seen = jax.device_get(jax.jit(run)(*arguments))
    assert all(np.isfinite(curve).all() for curve in seen.values())
    return seen


@pytest.mark.parametrize("make", [resnet.resnet, diffusion.diffusion])
def test_images_that_are_missing_say_how_to_install_them(
    make: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ("file:///nowhere",))
    with pytest.raises(SystemExit, match="apt install dataset-fashion-mnist"):
        make(tmp_path)


def test_a_resnet_trains(folder: pathlib.Path) -> None:
    task = resnet.resnet(folder, width=2, epochs=2)
    assert task.budgets == (4,)
    curves = _curves(task, 1e-2)
    assert curves["train"][1] < curves["train"][0]
    for part, num_images in {"validation": 50, "test": 40}.items():
        num_wrong = curves[part] * num_images / 100
        np.testing.assert_allclose(num_wrong, np.round(num_wrong), atol=1e-4)


def test_an_augmented_image_is_one_of_fifty() -> None:
    image = np.random.default_rng(0).integers(1, 256, (5, 5), np.uint8)
    padded = np.pad(image, 2)
    shifted = [padded[i : i + 5, j : j + 5] for i in range(5) for j in range(5)]
    possible = {x.tobytes() for each in shifted for x in (each, each[:, ::-1])}
    many = jnp.broadcast_to(image, (1000, 5, 5))
    got = np.asarray(resnet.crop_and_flip(many, jax.random.key(0)))
    assert {x.tobytes() for x in got} == possible


def test_a_diffusion_model_is_evaluated_at_fixed_noise(folder: pathlib.Path) -> None:
    task = diffusion.diffusion(
        folder,
        width=8,
        depth=1,
        num_heads=2,
        batch_size=4,
        steps_per_record=1,
        budget=2,
    )
    # At a rate of zero it stays what it was. Its block was the identity.
    curves = _curves(task, 0.0)
    params = task.init(0)[0]
    embedding, position, head = (
        np.asarray(params[layer][name][...], np.float64)
        for layer, name in [
            ("embedding", "kernel"),
            ("position", "embedding"),
            ("noise", "kernel"),
        ]
    )
    for name, images in [("validation", slice(250, 300)), ("test", slice(0, 40))]:
        file = fashion_mnist.FILES[0 if name == "validation" else 2]
        clean = fashion_mnist.read_idx(folder / file)[images] / 127.5 - 1
        noise, times = (np.asarray(x, np.float64) for x in task.data[name][1:])
        angles = np.pi / 2 * times
        error = 0.0
        for i, j in np.ndindex(7, 7):
            patch = clean[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(-1, 16)
            target = noise[:, 7 * i + j]
            x = np.cos(angles)[:, None] * patch + np.sin(angles)[:, None] * target
            x = x @ embedding + position[7 * i + j]
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
            error += np.mean((x @ head - target) ** 2) / 49
        np.testing.assert_allclose(curves[name], error, rtol=1e-4)


def _moved(state: np.ndarray, force: float) -> np.ndarray:
    """By the equations of motion before they were solved for the accelerations."""
    _, velocity, angle, spin = state
    sine, cosine = np.sin(angle), np.cos(angle)
    masses = np.array([[1.1, 0.05 * cosine], [cosine, 0.5 * 4 / 3]])
    forces = np.array([force + 0.05 * spin**2 * sine, 9.8 * sine])
    acceleration, turn = np.linalg.solve(masses, forces)
    return state + 0.02 * np.array([velocity, acceleration, spin, turn])


def test_a_pole_obeys_the_equations_of_motion() -> None:
    states = np.random.default_rng(0).normal(size=(20, 4))
    actions = np.arange(20) % 2
    expected = [_moved(s, 20.0 * a - 10) for s, a in zip(states, actions, strict=True)]
    got = cartpole.move(jnp.asarray(states, jnp.float32), jnp.asarray(actions))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_an_episode_lasts_until_the_pole_falls_or_for_500_steps() -> None:
    starts = np.random.default_rng(0).uniform(-0.05, 0.05, (6, 4))

    def push_left(states: jax.Array) -> jax.Array:
        return jnp.zeros((len(states), 2)).at[:, 0].set(1e9)

    def follow(states: jax.Array) -> jax.Array:
        pull = states @ jnp.array([0.1, 0.2, 1.0, 0.3])
        return 1e9 * jnp.stack([-pull, pull], axis=1)

    def lengths(policy: Any) -> jax.Array:
        model: Any = SimpleNamespace(logits=policy)
        states = jnp.asarray(starts, jnp.float32)
        return cartpole.episode_lengths(model, states, jax.random.key(0))

    expected = []
    for state in starts:
        steps = 0
        while abs(state[2]) <= np.deg2rad(12):
            state, steps = _moved(state, -10.0), steps + 1
        expected.append(steps)
    np.testing.assert_array_equal(lengths(push_left), expected)
    np.testing.assert_array_equal(lengths(follow), 500)


def test_advantages_are_discounted_sums_within_an_episode() -> None:
    errors = np.random.default_rng(0).normal(size=(5, 1)).astype(np.float32)
    has_ended = jnp.array([[False], [False], [True], [False], [False]])
    got = cartpole.generalized_advantages(jnp.asarray(errors), has_ended)
    decay = 0.99 * 0.95
    episodes = [(0, 3), (1, 3), (2, 3), (3, 5), (4, 5)]
    expected = [
        np.sum(errors[first:end, 0] * decay ** np.arange(end - first))
        for first, end in episodes
    ]
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-5)


def test_ppo_acts_anew_after_its_epochs() -> None:
    task = cartpole.cartpole(
        num_environments=2,
        steps_per_rollout=4,
        batch_size=4,
        num_epochs=2,
        rollouts_per_record=1,
        num_records=2,
        num_episodes=4,
    )
    assert task.budgets == (8,)
    curves = _curves(task, 1e-3)
    # At first each action is as likely as the other.
    assert np.all((curves["test"] > 400) & (curves["test"] < 492))
    params, rest = task.init(0)
    batches = task.draw(jax.random.key(0), task.data)

    def step(rest: Any, batch: Any) -> tuple[Any, Any]:
        rest = task.loss(params, rest, batch, task.data)[1]
        return rest, (rest.environments.states, rest.transitions.states)

    now, acted = jax.device_get(
        jax.jit(jax.lax.scan, static_argnums=0)(step, rest, batches)[1]
    )
    for i in range(3):
        np.testing.assert_array_equal(acted[i], rest.transitions.states)
    # The new transitions begin where the old ones ended.
    np.testing.assert_array_equal(acted[3][:2], now[2])
    assert not np.array_equal(now[3], now[2])
