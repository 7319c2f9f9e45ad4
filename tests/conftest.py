"""Fixtures and Hypothesis profiles shared by all tests."""

import importlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager

import hypothesis
import jax
import numpy as np
import pytest

# Our fixtures set up nothing that one example could leave behind for the next.
_SHARED = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],
}
hypothesis.settings.register_profile(
    "ci", max_examples=50, derandomize=True, database=None, **_SHARED
)
hypothesis.settings.register_profile("slow", max_examples=500, **_SHARED)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Most of the time goes into compiling: what one process has, the others read."""
    assert config.cache is not None
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _enable_x64() -> AbstractContextManager[None]:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    # Its home before JAX 0.8, and gone from there since.
    return importlib.import_module("jax.experimental").enable_x64()


@pytest.fixture
def x64() -> Iterator[None]:
    """Lets a test use 64-bit types."""
    with _enable_x64():
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    """Both types of statistic; JAX has 64-bit types in the second run only."""
    if request.param == "float64":
        request.getfixturevalue("x64")
    return np.dtype(request.param)
