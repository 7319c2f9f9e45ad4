"""Fixtures and Hypothesis profiles shared by all tests."""

import importlib
import os
import pathlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import hypothesis
import jax
import numpy as np
import pytest
from pages import PAGES, Matrix

NUM_DEVICES = int(os.environ.get("NUM_DEVICES", "8"))

# No fixture here sets up what one example could leave behind for the next.
_SHARED = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],
}
hypothesis.settings.register_profile(
    "ci", max_examples=50, derandomize=True, database=None, **_SHARED
)
hypothesis.settings.register_profile("slow", max_examples=500, **_SHARED)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _compile_faster() -> None:
    """Has XLA compile in a third of the time, here and in the processes of tests.

    On a single device the tests compile as users do.
    """
    if NUM_DEVICES == 1:
        return
    # The workers keep all cores busy, so a program is not compiled in parts.
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    # Code is emitted in the older way, which JAX 0.11 no longer has.
    if (0, 6) <= jax.__version_info__ < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # Programs do not keep the lines of Python that they come from.
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    jax.config.update("jax_traceback_in_locations_limit", 0)


def pytest_configure(config: pytest.Config) -> None:
    """Shares compiled programs between processes: compiling takes most of the time."""
    _compile_faster()
    cache = getattr(config, "cache", None)
    # With JAX 0.5, a program that is read from it may compute something else.
    if cache is not None and jax.__version_info__ >= (0, 6):
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    for name, page in PAGES.items():
        action = config.getoption(name)
        if action is not None and not hasattr(config, "workerinput"):
            config.pluginmanager.register(page(action))


@pytest.fixture(autouse=True)
def _little_optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles most tests faster, as they run for moments."""
    is_brief = request.node.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", is_brief)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Linux allows a process 65,530 maps, and each compiled program takes several.
_MAPS = pathlib.Path("/proc/self/maps")
_MANY_MAPS = 30_000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Frees the programs of a file after it, or earlier if they are many."""
    is_last = nextitem is None or nextitem.path != item.path
    num_maps = _MAPS.read_bytes().count(b"\n") if _MAPS.exists() else 0
    if is_last or num_maps > _MANY_MAPS:
        jax.clear_caches()


def _enable_x64() -> AbstractContextManager[None]:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    # JAX had it here before version 0.8.
    return importlib.import_module("jax.experimental").enable_x64()


@pytest.fixture
def x64() -> Iterator[None]:
    """Lets a test use 64-bit types."""
    with _enable_x64():
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    """Both types of statistics. JAX has 64-bit types in the second run only."""
    if request.param == "float64":
        request.getfixturevalue("x64")
    return np.dtype(request.param)


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, page in PAGES.items():
        parser.addoption(
            f"--{name}",
            choices=("write", "check"),
            help=f"what a run of all tests does with docs/{page.path.name}",
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        Matrix.label(item)
