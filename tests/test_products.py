"""Products of trees: the numbers, in the order of the leaves, and in few sums."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sasa_optax
from sasa_optax import _devices, _products

_RANDOM = np.random.default_rng(0)
# Many of each size, in turn, with some that stay alone.
_SHAPES = [(3,), (2, 3), (6,), (), (0, 2), (100, 50), (1, 3), ()] * 20


@pytest.fixture(params=["of each leaf", "shared", "together"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways to sum, however many devices there are. Nothing is sharded here."""
    num = 8 if request.param == "of each leaf" else 1
    monkeypatch.setattr(_devices, "num_devices", lambda platform=None: num)
    if request.param == "together":
        # What a GPU does, on whatever this runs on.
        monkeypatch.setattr(_products, "apart", _products.together)
    return request.param


def _tree(dtype: Any = np.float32) -> list[np.ndarray]:
    return [_RANDOM.normal(size=shape).astype(dtype) for shape in _SHAPES]


def test_products_are_those_of_numpy_in_the_order_of_the_leaves(sums: str) -> None:
    x, y = _tree(), _tree()
    x[1], y[1] = x[1] + 1j, y[1] * 1j
    x[2], y[5] = x[2].astype(np.float16), y[5].astype(jnp.bfloat16)
    found = jax.jit(lambda x, y: _products.leaf_products([(x, y), (x, x)], jnp.float32))
    pairs = [(x, y), (x, x)]
    for row, (xs, ys) in zip(found(x, y), pairs, strict=True):
        wide = [np.complex128, np.complex128]
        expected = [
            np.vdot(a.astype(wide[0]), b.astype(wide[1])).real
            for a, b in zip(xs, ys, strict=True)
        ]
        assert row.dtype == jnp.float32
        # Products of up to 5000 numbers, of which a CPU adds some one after the other.
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-3)


def test_a_tree_without_leaves_has_no_product(sums: str) -> None:
    (row,) = _products.leaf_products([({}, {})], jnp.float32)
    assert row.shape == (0,)
    assert _products.total(row) == 0


def test_trees_must_have_the_same_structure(sums: str) -> None:
    with pytest.raises(ValueError, match="key"):
        _products.inner_products([({"a": 1.0}, {"b": 1.0})], jnp.float32)


def test_small_leaves_of_a_size_share_sums(sums: str) -> None:
    leaves = [np.ones(8, np.float32)] * 100
    products = jax.jit(lambda x: _products.leaf_products([(x, x)], jnp.float32))
    text = str(products.lower(leaves).compile().as_text())
    num_sums = len(re.findall(r" reduce\(", text))
    assert num_sums == (100 if sums == "of each leaf" else 2)


_NUM_LEAVES = 100
_CHAINED = {
    "reduce_on_stationarity": lambda: sasa_optax.reduce_on_stationarity(average=True),
    "centred": lambda: sasa_optax.reduce_on_stationarity(statistic="centred"),
    "adapt_on_progress": sasa_optax.adapt_on_progress,
}


def _sizes(optimizer: optax.GradientTransformation) -> dict[str, int]:
    """The instructions in each computation of a compiled step, the main one first."""
    params = [jnp.ones((32, 8)) for _ in range(_NUM_LEAVES)]
    update = optax.with_extra_args_support(optimizer).update

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step).lower(params, optimizer.init(params), params).compile()
    sizes: dict[str, int] = {}
    name = ""
    for line in str(compiled.as_text()).splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "main" if head[1] else head[2]
        sizes[name] = sizes.get(name, 0) + (" = " in line)
    return sizes


@functools.cache
def _inner_sizes() -> dict[str, int]:
    return _sizes(optax.adamw(1e-3))


@pytest.mark.parametrize("name", _CHAINED)
def test_many_leaves_make_no_program_that_compiles_slowly(name: str, sums: str) -> None:
    """The time to compile grows with the instructions, and faster within a fusion."""
    inner = _inner_sizes()
    outer = _sizes(optax.chain(optax.adamw(1e-3), _CHAINED[name]()))
    few_leaves = 3000  # The test of the window does not depend on the leaves.
    assert sum(outer.values()) - few_leaves < 2.5 * sum(inner.values())
    del outer["main"]
    assert max(outer.values()) < 4 * _NUM_LEAVES
