"""A restored run continues as if it had never stopped, bit for bit."""

import functools
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optimizers import ALL, OPTIMIZERS, decided, small, smaller, take_step

import sasa_optax

_ROOT = pathlib.Path(__file__).parent.parent
_environment = functools.partial(pytest.mark.environment, "6. Checkpoints")
for_all = pytest.mark.parametrize("name", ALL)
_NOISE = np.random.default_rng(0).normal(size=(24, 8, 2)).astype(np.float32)

Restore = Callable[[Any, Any, pathlib.Path], Any]


def _run(update: Any, at: Any, first: int, last: int) -> Any:
    """The parameters and the state at the step ``last``, from those at ``first``."""
    params, state = at
    for noise in _NOISE[first:last]:
        grads = jax.tree.map(lambda x, e=noise: 0.1 * x + 0.1 * e, params)
        params, state = take_step(update, grads, state, params)
    return params, state


def _start(name: str) -> Any:
    params = {"w": jnp.ones((8, 2))}
    return params, small(name)[0].init(params)


@functools.cache
def _uninterrupted(name: str) -> Any:
    return _run(small(name)[1], _start(name), 0, len(_NOISE))


def _by_orbax(saved: Any, template: Any, folder: pathlib.Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", template)


def _by_flax(saved: Any, template: Any, folder: pathlib.Path) -> Any:
    (folder / "state").write_bytes(flax.serialization.to_bytes(saved))
    return flax.serialization.from_bytes(template, (folder / "state").read_bytes())


def _by_pickle(saved: Any, template: Any, folder: pathlib.Path) -> Any:
    del template, folder
    return pickle.loads(pickle.dumps(jax.device_get(saved)))


@pytest.mark.parametrize(
    "restore",
    [
        pytest.param(_by_orbax, marks=_environment("orbax, at any step: bit for bit")),
        pytest.param(_by_flax, marks=_environment("flax.serialization: bit for bit")),
        pytest.param(_by_pickle, marks=_environment("pickle: bit for bit")),
    ],
)
# These are the start, a step before any test, and one among the drops.
@pytest.mark.parametrize("step", [0, 3, 11])
@for_all
def test_a_restored_run_is_the_same(
    name: str, step: int, restore: Restore, tmp_path: pathlib.Path
) -> None:
    update = small(name)[1]
    saved = _run(update, _start(name), 0, step)
    restored = restore(saved, _start(name), tmp_path)
    chex.assert_trees_all_equal_dtypes(restored, saved)
    finished = _run(update, restored, step, len(_NOISE))
    chex.assert_trees_all_equal(finished, _uninterrupted(name))


@pytest.mark.parametrize("name", ["sasa_plus", "reduce_on_stationarity"])
def test_they_have_dropped_by_then(name: str) -> None:
    assert int(optax.tree.get(_uninterrupted(name)[1], "num_drops")) > 0


def test_it_has_been_cut_twice_by_then_and_has_risen() -> None:
    decisions = decided(_uninterrupted("adapt_on_progress")[1])
    assert int(decisions["num_overshoots"]) == int(decisions["num_brakes"]) == 1
    assert int(decisions["last_rise"]) > int(decisions["last_cut"])


def _counts(decisions: dict[str, Any]) -> list[int]:
    leaves = jax.tree.leaves(decisions)
    return [int(x) for x in leaves if not jnp.issubdtype(x.dtype, jnp.inexact)]


@_environment("orbax, onto another sharding: the same decisions")
@for_all
def test_onto_another_sharding(name: str, tmp_path: pathlib.Path) -> None:
    update = small(name)[1]
    saved = _run(update, _start(name), 0, 11)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))

    def place(x: jax.Array) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("fsdp") if x.shape == (8, 2) else PartitionSpec()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    params, state = _by_orbax(saved, jax.tree.map(place, saved), tmp_path)
    assert len(params["w"].addressable_shards) == len(jax.devices())
    finished = _run(update, (params, state), 11, len(_NOISE))
    expected = _uninterrupted(name)
    chex.assert_trees_all_close(finished, expected, rtol=1e-4, atol=1e-5)
    decisions = [_counts(decided(x[1])) for x in (finished, expected)]
    assert decisions[0] == decisions[1]


@_environment("a state with another `max_window`: an error that says what to do")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_window_is_an_error(name: str) -> None:
    params, state = _start(name)
    other = ALL[name](**smaller(max_window=40))
    with pytest.raises(
        ValueError, match=r"max_window is 40.*resize_window\(state, 40\)"
    ):
        other.update(params, state, params)


@_environment("`resize_window`: the run goes on as with that window all along")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_larger_window(name: str) -> None:
    larger = ALL[name](**smaller(max_window=40))
    saved = _run(small(name)[1], _start(name), 0, 11)
    nested = {"deep": (saved[1], jnp.ones(2))}
    resized = sasa_optax.resize_window(nested, 40)["deep"][0]
    update = jax.jit(larger.update)
    _, actual = _run(update, (saved[0], resized), 11, len(_NOISE))
    params = {"w": jnp.ones((8, 2))}
    _, expected = _run(update, (params, larger.init(params)), 0, len(_NOISE))
    fields = ("scale", "num_drops", "last_test", "num_nonfinite")
    for field in fields:
        one, other = (optax.tree.get(x, field) for x in (actual, expected))
        chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-6)


@functools.cache
def _recording(max_window: int) -> tuple[Any, Any]:
    """An optimizer that keeps its losses, and never tests; and its update."""
    window = sasa_optax.Window(
        min_samples=4, max_window=max_window, test_interval=10**6
    )
    optimizer = sasa_optax.slope(1.0, window=window)
    return optimizer, jax.jit(optimizer.update)


def _record(state: Any, max_window: int, values: range) -> Any:
    for value in values:
        loss = jnp.float32(value)
        _, state = _recording(max_window)[1](
            jnp.ones(1), state, jnp.ones(1), value=loss
        )
    return state


@pytest.mark.parametrize("capacity", [8, 20])
@pytest.mark.parametrize("new_capacity", [5, 8, 13, 30])
@pytest.mark.parametrize("num_pushed", [0, 4, 8, 17, 43])
def test_resized_windows_hold_the_newest(
    capacity: int, new_capacity: int, num_pushed: int
) -> None:
    def samples(window: sasa_optax.WindowState) -> list[float]:
        """By the documented rule, with leak_ratio=1."""
        buffer = np.asarray(window.buffer)[0]
        num_kept = min(int(window.total), buffer.size)
        head = int(window.head)
        return [
            float(buffer[(head - num_kept + i) % buffer.size]) for i in range(num_kept)
        ]

    state = _recording(capacity)[0].init(jnp.ones(1))
    state = _record(state, capacity, range(num_pushed))
    state = sasa_optax.resize_window(state, new_capacity)
    stored = list(range(num_pushed))[-capacity:][-new_capacity:]
    assert samples(state.controller.window) == stored
    state = _record(state, new_capacity, range(100, 103))
    stored = [*stored, 100, 101, 102][-new_capacity:]
    assert samples(state.controller.window) == stored


def test_without_a_window_there_is_nothing_to_resize() -> None:
    with pytest.raises(ValueError, match=r"opt_state must be .* with a window"):
        sasa_optax.resize_window(optax.adam(0.1).init(jnp.ones(2)), 100)


_TRAINING = """
import pathlib, pickle, sys
import jax, jax.numpy as jnp, numpy as np, optax, sasa_optax
import orbax.checkpoint as ocp

folder, num_steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
window = sasa_optax.Window(min_samples=20, test_interval=10, leak_ratio=2)
optimizer = sasa_optax.sasa_plus(0.5, window=window)
update = jax.jit(optimizer.update)
params = jnp.ones(4)
state = optimizer.init(params)
with ocp.CheckpointManager(folder) as manager:
    first = manager.latest_step() or 0
    if first:
        template = ocp.args.StandardRestore((params, state))
        params, state = manager.restore(first, args=template)
    print("from", first, flush=True)
    for step in range(first + 1, num_steps + 1):
        noise = np.random.default_rng(step).normal(size=4).astype(np.float32)
        updates, state = update(params + noise, state, params)
        params = optax.apply_updates(params, updates)
        if step % 20 == 0:
            manager.save(step, args=ocp.args.StandardSave((params, state)))
            manager.wait_until_finished()
            print("saved", step, flush=True)
print(pickle.dumps(jax.device_get(jax.tree.leaves((params, state)))).hex())
"""


def _training(folder: pathlib.Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _TRAINING, str(folder), "200"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.environment("7. Faults", "killed and restarted: bit for bit", "sasa_plus")
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: pathlib.Path) -> None:
    with _training(tmp_path / "killed") as killed:
        assert killed.stdout is not None
        lines = iter(killed.stdout.readline, "")
        assert any("saved 80" in line for line in lines)
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    with _training(tmp_path / "whole") as whole, _training(tmp_path / "killed") as rest:
        expected, actual = (run.communicate(timeout=100)[0] for run in (whole, rest))
    assert int(re.findall(r"from (\d+)", actual)[0]) >= 80
    assert actual.splitlines()[-1] == expected.splitlines()[-1]
    leaves = pickle.loads(bytes.fromhex(expected.splitlines()[-1]))
    assert len(leaves) > 10


@pytest.mark.filterwarnings("ignore:.*[Ss]harding.*:UserWarning")
def test_the_code_of_the_page_runs() -> None:
    text = (_ROOT / "docs" / "checkpointing.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    assert names["state"].controller.window.buffer.shape[1] == 4096
