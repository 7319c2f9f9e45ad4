"""Data sets that come from outside, from the packages of a system."""

import pathlib


def needed(path: pathlib.Path, how: str) -> pathlib.Path:
    """The path; where it is missing, the program ends and says how to get it."""
    if not path.exists():
        raise SystemExit(f"{path} is needed: {how}")
    return path
