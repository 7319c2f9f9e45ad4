"""The leaky window, compared with a plain list."""

import functools
import itertools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sasa_optax
from sasa_optax import Window, WindowState, _window

STEPS = 256
INT32_MAX = 2**31 - 1


class Run(NamedTuple):
    """Samples to keep, then samples to skip. After them the window may be emptied."""

    num_kept: int
    num_skipped: int
    clear: bool


# Histories are made of runs, because only long histories fill a window.
histories = st.lists(
    st.builds(Run, st.integers(0, 80), st.integers(0, 3), st.booleans()), max_size=8
)


def flags(history: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """For each of a fixed number of steps, whether to keep its sample, then clear."""
    keep, clear = [], []
    for run in history:
        keep += [True] * run.num_kept + [False] * (run.num_skipped + 1)
        clear += [False] * (run.num_kept + run.num_skipped) + [run.clear]
    padding = [False] * STEPS
    return np.array((keep + padding)[:STEPS]), np.array((clear + padding)[:STEPS])


@functools.partial(jax.jit, static_argnums=0)
def replay(
    capacity: int,
    samples: jax.Array,
    keep: jax.Array,
    clear: jax.Array,
    leak_ratio: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """What the window shows after every step."""
    options = Window(leak_ratio=leak_ratio)

    def step(state: WindowState, inputs: Any) -> Any:
        sample, keep, clear = inputs
        state = _window.clear(_window.push(state, sample, keep), clear)
        num_samples = options.num_kept(state)
        return state, (_window.contents(state, num_samples), num_samples)

    state = _window.empty(samples.shape[1], capacity, samples.dtype)
    return jax.lax.scan(step, state, (samples, keep, clear))[1]


@pytest.mark.parametrize("width", [1, 2])
@given(
    history=histories,
    # Each capacity is compiled once, so there are only a few.
    capacity=st.sampled_from([5, 8, 13, 64]),
    leak_ratio=st.integers(1, 9),
)
def test_window_is_the_newest_part_of_a_list(
    width: int, history: list[Run], capacity: int, leak_ratio: int
) -> None:
    keep, clear = flags(history)
    numbers = np.arange(1, STEPS + 1, dtype=np.float32)
    samples = np.stack([numbers, -numbers][:width], axis=1)
    # A sample that is not kept must leave no trace, even if it is not a number.
    samples[~keep] = np.nan
    shown = jax.device_get(replay(capacity, samples, keep, clear, leak_ratio))

    model = []
    for k, (contents, num_samples) in enumerate(zip(*shown, strict=True)):
        if keep[k]:
            model.append(samples[k])
        if clear[k]:
            model.clear()
        leaked = len(model) // leak_ratio + (len(model) % leak_ratio > 0)
        newest = model[len(model) - min(leaked, capacity) :]
        expected = np.zeros((width, capacity), np.float32)
        expected[:, : len(newest)] = np.reshape(newest, (-1, width)).T
        assert num_samples == len(newest)
        np.testing.assert_array_equal(contents, expected)


@pytest.mark.parametrize("leak_ratio", range(1, 10))
def test_total_saturates(leak_ratio: int) -> None:
    full = WindowState(jnp.ones((1, 7)), jnp.int32(3), jnp.int32(INT32_MAX))
    for _ in range(2):
        assert Window(leak_ratio).num_kept(full) == 7
        full = _window.push(full, jnp.full(1, 2.0), jnp.bool_(True))
    assert full.total == INT32_MAX
    assert full.head == 5
    np.testing.assert_array_equal(
        _window.contents(full, jnp.int32(7)), [[1, 1, 1, 1, 1, 2, 2]]
    )


@pytest.mark.parametrize("leak_ratio", [1, 2, 8, INT32_MAX])
@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, INT32_MAX - 1, INT32_MAX])
def test_ceiling_is_exact_up_to_the_end_of_int32(total: int, leak_ratio: int) -> None:
    capacity = 10
    state = WindowState(jnp.zeros((1, capacity)), jnp.int32(0), jnp.int32(total))
    expected = min((total + leak_ratio - 1) // leak_ratio, capacity)
    assert Window(leak_ratio).num_kept(state) == expected


def test_initial_leaves_are_distinct_buffers() -> None:
    leaves = jax.tree.leaves(_window.empty(1, 5, jnp.float32))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_types_and_shapes_never_change(dtype: np.dtype) -> None:
    state = _window.empty(2, 5, dtype)
    chex.assert_shape(state.buffer, (2, 5))
    assert [leaf.dtype for leaf in state] == [dtype, np.int32, np.int32]
    pushed = _window.push(state, jnp.ones(2, dtype), jnp.bool_(True))
    cleared = _window.clear(pushed, jnp.bool_(True))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, pushed, cleared)
    assert Window().num_kept(pushed).dtype == np.int32
    assert _window.contents(pushed, jnp.int32(1)).dtype == dtype


@pytest.mark.parametrize(
    ("steps_per_epoch", "least", "interval"),
    [(None, 1000, 100), (1, 100, 100), (250, 250, 250), (50_000, 1000, 1000)],
)
def test_what_is_not_given_is_filled_in(
    steps_per_epoch: int | None, least: int, interval: int
) -> None:
    window = Window(leak_ratio=3).resolved(steps_per_epoch)
    assert window == Window(leak_ratio=3, min_samples=least, test_interval=interval)
    given = Window(min_samples=7, test_interval=9)
    assert given.resolved(steps_per_epoch) == given


@pytest.mark.parametrize(
    ("steps_per_epoch", "first"), [(1, 900), (100, 900), (250, 2250), (5000, 9000)]
)
def test_the_first_test_ends_the_ninth_epoch(steps_per_epoch: int, first: int) -> None:
    optimizer = sasa_optax.sasa_plus(1.0, steps_per_epoch=steps_per_epoch)
    assert sasa_optax.metrics(optimizer.init(jnp.ones(2)))["next_test"] == first


@pytest.mark.parametrize("num_drops", range(6))
def test_the_samples_needed_grow_with_the_drops_up_to_what_fits(num_drops: int) -> None:
    scaled = Window(min_samples=10, max_window=2000, scale_min_samples=True)
    expected = min(10 * 4**num_drops, 1999)
    assert scaled.samples_needed(jnp.int32(num_drops), 0.25) == expected
    constant = Window(min_samples=10, max_window=2000)
    assert constant.samples_needed(jnp.int32(num_drops), 0.25) == 10


@jax.jit
def _next_test(window: Window, step: Any, total: Any, num_drops: Any) -> jax.Array:
    return window.next_test(step, total, num_drops, 0.25)


@pytest.mark.parametrize("leak_ratio", [1, 2, 8, INT32_MAX])
@pytest.mark.parametrize("interval", [1, 7, INT32_MAX])
def test_the_next_test_is_exact_up_to_the_end_of_int32(
    leak_ratio: int, interval: int
) -> None:
    window = Window(np.int32(leak_ratio), np.int32(10), np.int32(interval))
    for step, total in itertools.product(
        [0, 1, 7, 8, 999, INT32_MAX - 1, INT32_MAX],
        [0, 1, 10, 11, 80, 81, INT32_MAX - 1, INT32_MAX],
    ):
        # Python's integers have no end.
        due = step + max(10 * leak_ratio + 1 - total, 1)
        due += -due % interval
        shown = _next_test(window, *map(np.int32, (step, total, 0)))
        assert shown.dtype == np.int32
        assert shown == min(due, INT32_MAX)


def test_after_drops_the_next_test_waits_for_the_samples_that_it_needs() -> None:
    window = Window(8, 10, 100, scale_min_samples=True)
    assert _next_test(window, 1000, 0, 2) == 1000 + 8 * 10 * 16 + 20
