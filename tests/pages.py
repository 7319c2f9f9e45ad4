"""The pages of docs/ that the tests write, or check."""

import abc
import pathlib
import re
from typing import Any, ClassVar, Literal

import pytest

_DOCS = pathlib.Path(__file__).parent.parent / "docs"


class _Page(abc.ABC):
    """A plugin. It lives in the process that all workers report to."""

    path: ClassVar[pathlib.Path]

    def __init__(self, action: Literal["write", "check"]) -> None:
        self.action = action

    @abc.abstractmethod
    def made(self, text: str) -> str:
        """The text of the page, with what this run has found."""

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        text = self.path.read_text()
        if self.action == "write":
            self.path.write_text(self.made(text))
        elif self.made(text) != text:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        text = self.path.read_text()
        if self.made(text) != text:
            terminalreporter.write_line(
                f"docs/{self.path.name} does not say what the tests do: run "
                "`make matrix`."
            )


class Matrix(_Page):
    """The table of docs/everywhere.md, from the tests marked as an environment."""

    path = _DOCS / "everywhere.md"
    START = "<!-- From here on written by `make matrix`, from the tests. -->\n"

    def __init__(self, action: Literal["write", "check"]) -> None:
        super().__init__(action)
        # Whether all passed, by group, environment and optimizer.
        self.passed: dict[str, dict[str, dict[str, bool]]] = {}

    @staticmethod
    def label(item: pytest.Item) -> None:
        """Tells the reports of a test which cells of the table it fills."""
        for marker in item.iter_markers("environment"):
            group, environment, *names = marker.args
            callspec: Any = getattr(item, "callspec", None)
            names = names or [callspec.params["name"]]
            item.user_properties.append(("cells", [group, environment, names]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: list[tuple[str, Any]] = report.user_properties
        for _, (group, environment, names) in properties:
            row = self.passed.setdefault(group, {}).setdefault(environment, {})
            for name in names:
                row[name] = row.get(name, True) and report.outcome == "passed"

    def made(self, text: str) -> str:
        # Its arrays may come only after the number of devices is set.
        from optimizers import ALL

        lines = []
        for group in sorted(self.passed):
            lines += ["", f"## {group}", ""]
            lines += ["| | " + " | ".join(f"`{name}`" for name in ALL) + " |"]
            lines += ["| --- |" + " :-: |" * len(ALL)]
            for environment, row in sorted(self.passed[group].items()):
                marks = {True: "✓", False: "**fails**", None: ""}
                cells = [marks[row.get(name)] for name in ALL]
                lines += [f"| {environment} | " + " | ".join(cells) + " |"]
        intro, start, _ = text.partition(self.START)
        return intro + start + "\n".join([*lines, ""])


class Counts(_Page):
    """The last column of docs/reliability.md: how many cases the files of a row have.

    Cases are counted where they are collected or, by many workers, where they report.
    """

    path = _DOCS / "reliability.md"
    ROW = re.compile(r"^(\|.*\| )(`(?:tests|sasa_optax)[^|]*)( \| )\d+( \|)$", re.M)

    def __init__(self, action: Literal["write", "check"]) -> None:
        super().__init__(action)
        self.cases: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.cases.update(item.nodeid for item in session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.cases.add(report.nodeid)

    def made(self, text: str) -> str:
        def counted(row: re.Match[str]) -> str:
            places = tuple(re.findall("`([^`]+)`", row[2]))
            count = sum(case.startswith(places) for case in self.cases)
            return f"{row[1]}{row[2]}{row[3]}{count}{row[4]}"

        return self.ROW.sub(counted, text)


# By the name of the option.
PAGES = {"matrix": Matrix, "counts": Counts}
