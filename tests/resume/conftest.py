"""The run that nothing interrupts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.resume.interruption import OPTIONS
from tests.running import command, guard


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and how long it took from a prepared data set; in an interpreter of its own."""
    folder = tmp_path_factory.mktemp("whole")
    assert guard(command(folder, stage="prepare")).returncode == 0
    began = time.monotonic()
    done = guard(command(folder, *OPTIONS), fresh=True)
    assert done.returncode == 0, done.stderr
    return folder, time.monotonic() - began
