"""The cluster of a test session, its logs beside every test that fails on it, and the run that nothing interrupts."""

from __future__ import annotations

import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.cluster.launching import LONG
from tests.cluster.slurm import Slurm, missing
from tests.running import command, guard, ranks


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    """A real Slurm; see tests/cluster/slurm.py."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Slurm() as started:
        yield started


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """The cluster of the session with an empty queue, before the test and after it."""
    yield cluster
    cluster.tidy()


@pytest.fixture(scope="session")
def teacher(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a teacher of two ranks that nothing interrupted."""
    # Where there is no cluster, nothing is compared with it.
    folder = tmp_path_factory.mktemp("whole")
    _check(guard(command(folder, *LONG, stage="prepare")))
    # Equal bits need an equal number of ranks.
    _check(ranks(2, command(folder, *LONG, stage="squeeze")))
    return folder


@pytest.fixture(scope="session")
def whole(teacher: Path) -> Path:
    """The folder of a complete run that nothing interrupted."""
    _check(guard(command(teacher, *LONG)))
    return teacher


def _check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    cluster = getattr(item, "funcargs", {}).get("slurm")
    if report.when == "call" and report.failed and cluster:
        report.sections.append(("Slurm", f"{cluster.report()}\n{cluster.logs()}"))
    return report
