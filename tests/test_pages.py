"""The pages that the tests write."""

import pathlib
import re
from typing import Any

import pages
import pytest

_ROOT = pathlib.Path(__file__).parent.parent


def _report(nodeid: str, outcome: Any, *cells: Any) -> pytest.TestReport:
    properties = [("cells", cell) for cell in cells]
    call: dict[str, Any] = {"longrepr": None, "when": "call"}
    return pytest.TestReport(
        nodeid, ("", 0, ""), {}, outcome, **call, user_properties=properties
    )


def test_the_matrix_has_a_mark_for_each_outcome() -> None:
    matrix = pages.Matrix("check")
    for outcome, names in [
        ("passed", ["sasa", "qhm"]),
        ("failed", ["sasa"]),
        ("passed", ["sasa"]),
    ]:
        matrix.pytest_runtest_logreport(_report("x", outcome, ["1. A", "here", names]))
    start = "Intro.\n" + matrix.START
    made = matrix.made(start + "\nan old table\n")
    assert made.startswith(start + "\n## 1. A\n\n| | `sasa` |")
    assert "old" not in made
    (names, _, marks) = made.splitlines()[-3:]
    by_name = dict(zip(names.split(" | "), marks.split(" | "), strict=True))
    assert by_name["`sasa`"] == "**fails**"
    assert by_name["`qhm`"] == "✓"
    assert by_name["`slope`"].strip() == ""


def test_the_cases_of_a_row_are_counted_once_whatever_they_report() -> None:
    counts = pages.Counts("check")
    for case in ("tests/test_a.py::x[1]", "tests/test_a.py::x[2]", "tests/b/c.py::x"):
        for outcome in ("passed", "passed", "failed"):
            counts.pytest_runtest_logreport(_report(case, outcome))
    page = (
        "| group | tests | cases |\n"
        "| A | `tests/test_a.py` | 7 |\n"
        "| B | `tests/test_a.py`, `tests/b` | 0 |\n"
        "| none | `tests/d.py` | 12 |\n"
        "| no tests | 4 |\n"
    )
    numbers = re.findall(r"(\d+) \|\n", counts.made(page))
    assert numbers == ["2", "3", "0", "4"]


def test_each_file_of_tests_is_in_one_group_of_the_reliability_page() -> None:
    text = pages.Counts.path.read_text()
    *groups, _ = pages.Counts.ROW.findall(text)
    places = [place for row in groups for place in re.findall("`([^`]+)`", row[1])]
    files = [path.relative_to(_ROOT) for path in _ROOT.glob("tests/**/test_*.py")]
    for name in [*map(str, files), "sasa_optax"]:
        assert [name.startswith(place) for place in places].count(True) == 1, name
    for path in re.findall(r"`(tests[^`]*)`", text):
        assert (_ROOT / path).exists(), path
