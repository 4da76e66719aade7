"""The cluster of a test session, and its logs beside every test that fails on it."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.cluster.slurm import Slurm, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A real Slurm; see tests/cluster/slurm.py."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Slurm() as cluster:
        yield cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    cluster = getattr(item, "funcargs", {}).get("slurm")
    if report.when == "call" and report.failed and cluster:
        report.sections.append(("Slurm", f"{cluster.report()}\n{cluster.logs()}"))
    return report
