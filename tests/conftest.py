"""Order of the files: two processes work on them, and the longest must not be left for the end."""

from __future__ import annotations

import pytest

LONGEST = (
    "cluster/",
    "distributed/test_kill_and_stop.py",
    "resume/",
    "distributed/",
    "launchers/",
    "test_faults.py",
    "sharing/",
    "robustness/",
    "data/",
    "recovery/",
    "stages/",
    "browser/",
    "test_controls.py",
    "test_cli.py",
)
"""Files and folders that take longest, in this order; the others follow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file; the order within a file stays."""

    def place(item: pytest.Item) -> int:
        path = item.nodeid.partition("::")[0].removeprefix("tests/")
        return next((number for number, name in enumerate(LONGEST) if path.startswith(name)), len(LONGEST))

    items.sort(key=place)
