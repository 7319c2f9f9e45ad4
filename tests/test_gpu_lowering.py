"""What XLA is given for a GPU, which takes none to see.

docs/performance.md has the measurements.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import sasa_optax
from sasa_optax import _devices

_SHAPES = [(200, 50), (10_000,), (5000, 2)]
_OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adapt_on_progress": sasa_optax.adapt_on_progress,
    "reduce_on_stationarity": sasa_optax.reduce_on_stationarity,
    "centred": lambda: sasa_optax.reduce_on_stationarity(statistic="centred"),
    "sasa_plus": lambda: sasa_optax.sasa_plus(1.0),
    "sasa": lambda: sasa_optax.sasa(1.0),
    "slope": lambda: sasa_optax.slope(1.0),
}


@pytest.fixture(autouse=True)
def _a_single_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_devices, "num_devices", lambda platform=None: 1)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """A step of an optimizer as it is for a platform, before XLA compiles it."""
    params = {str(i): jnp.ones(shape) for i, shape in enumerate(_SHAPES)}

    def lower(name: str, platform: str) -> str:
        def chosen(*args: Any, default: Any, **platforms: Any) -> Any:
            return platforms.get(platform, default)(*args)

        monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
        optimizer = optax.with_extra_args_support(_OPTIMIZERS[name]())

        def step(params: Any, state: Any, grads: Any) -> Any:
            return optimizer.update(grads, state, params, value=jnp.float32(1.0))

        return jax.jit(step).lower(params, optimizer.init(params), params).as_text()

    return lower


def _sums_over_leaves(text: str) -> tuple[int, int]:
    """The reductions of several arrays as large as a leaf, and those of one."""
    several = one = 0
    for line in text.splitlines():
        is_of_leaf = re.search("tensor<(200x50|10000|5000x2)xf32>", line)
        if "stablehlo.reduce(" in line and is_of_leaf:
            several += line.count(" init: ") > 1
            one += line.count(" init: ") == 1
    return several, one


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("adapt_on_progress", 2),
        ("reduce_on_stationarity", 2),
        ("centred", 3),
        ("sasa_plus", 2),
        ("sasa", 3),
    ],
)
def test_a_gpu_sums_once_over_each_leaf(lowered: Any, name: str, pairs: int) -> None:
    """With two sums in the loop that updates a leaf, XLA copies what it updates."""
    assert _sums_over_leaves(lowered(name, "cuda")) == (3, 0)
    assert _sums_over_leaves(lowered(name, "cpu")) == (0, 3 * pairs)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 6),
    reason="on JAX 0.5 the test is a plain cond, also on a GPU: docs/performance.md",
)
@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_no_conditional_makes_a_gpu_wait_for_the_host(lowered: Any, name: str) -> None:
    assert "stablehlo.case" not in lowered(name, "cuda")
    has_test = name != "adapt_on_progress"
    assert ("stablehlo.case" in lowered(name, "cpu")) == has_test
