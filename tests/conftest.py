"""Fixtures and Hypothesis profiles shared by all tests."""

import importlib
import os
import pathlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest

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


def pytest_configure(config: pytest.Config) -> None:
    """Shares compiled programs between processes: compiling takes most of the time."""
    cache = getattr(config, "cache", None)
    # With JAX 0.5, a program that is read from it may compute something else.
    if cache is not None and jax.__version_info__ >= (0, 6):
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    action = config.getoption("matrix")
    if action is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Matrix(action))


@pytest.fixture(autouse=True)
def _little_optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles the many tests of docs/everywhere.md faster, as they run for moments."""
    is_one_of_many = request.node.get_closest_marker("environment") is not None
    jax.config.update("jax_disable_most_optimizations", is_one_of_many)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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


# The table of docs/everywhere.md, made from the tests marked as an environment.

_PAGE = pathlib.Path(__file__).parent.parent / "docs" / "everywhere.md"
_START = "<!-- From here on written by `make matrix`, from the tests. -->\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix",
        choices=("write", "check"),
        help="what a run of all tests does with the table of docs/everywhere.md",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tells each report which cells of the table its test fills."""
    for item in items:
        for marker in item.iter_markers("environment"):
            group, environment, *names = marker.args
            callspec: Any = getattr(item, "callspec", None)
            names = names or [callspec.params["name"]]
            item.user_properties.append(("cells", [group, environment, names]))


class _Matrix:
    """Gathers the outcomes. It lives in the process that all workers report to."""

    def __init__(self, action: str) -> None:
        self.action = action
        # Whether all passed, by group, environment and optimizer.
        self.passed: dict[str, dict[str, dict[str, bool]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: list[tuple[str, Any]] = report.user_properties
        for _, (group, environment, names) in properties:
            row = self.passed.setdefault(group, {}).setdefault(environment, {})
            for name in names:
                row[name] = row.get(name, True) and report.outcome == "passed"

    def table(self) -> str:
        # Its arrays may come only after the number of devices is set.
        from optimizers import ALL

        lines = []
        for group in sorted(self.passed):
            lines += [f"## {group}", ""]
            lines += ["| | " + " | ".join(f"`{name}`" for name in ALL) + " |"]
            lines += ["| --- |" + " :-: |" * len(ALL)]
            for environment, row in sorted(self.passed[group].items()):
                marks = {True: "✓", False: "**fails**", None: ""}
                cells = [marks[row.get(name)] for name in ALL]
                lines += [f"| {environment} | " + " | ".join(cells) + " |"]
            lines += [""]
        return "\n".join(lines).rstrip() + "\n"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        intro, _, table = _PAGE.read_text().partition(_START)
        if self.action == "write":
            _PAGE.write_text(intro + _START + "\n" + self.table())
        elif table.strip() != self.table().strip():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        _, _, table = _PAGE.read_text().partition(_START)
        if table.strip() != self.table().strip():
            terminalreporter.write_line(
                "docs/everywhere.md does not say what the tests do: run `make matrix`."
            )
