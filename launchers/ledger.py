"""The launches of a run: ``RUN/launch/0001/`` holds the code, what was submitted, and the logs of all jobs."""

from __future__ import annotations

import contextlib
import datetime
import re
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import ArtifactError
from distill.files import json_text, listed, locked, read_json, write_atomic
from distill.sharing.host import process_gone

FOLDER, LEDGER, CODE = "launch", "launch.json", "code"
ATTEMPTS = "attempts"
"""Ends the name of the file, among the logs, in which it is noted how the work of a job began and ended."""
FORMAT, VERSION = "guard-launch", 1


@dataclass
class Entry:
    """A job of a launch.

    Attributes:
        key: its name in the graph.
        stage: its stage.
        run: its run folder; the experiment's for the report.
        after: keys of the jobs that it waits for.
        ids: of its jobs: one, or one for each worker of an array.
        logs: folder of their logs, relative to that of the launch.
        shape: nodes, processes on each, and limits, for people.
    """

    key: str
    stage: str
    run: str
    after: list[str]
    logs: str
    shape: str
    ids: list[str] = field(default_factory=list)


@dataclass
class Launch:
    """One launch as it is written down.

    Attributes:
        folder: where it lies.
        executor: ``slurm`` or ``local``.
        cluster: name of the cluster.
        command: the command line.
        started: when, in UTC.
        host: where it was submitted.
        state: submitting, submitted, cancelled, failed when Slurm refused a job; of a local launch also running, done.
        driver: of a local launch the process that runs the graph, and when it started.
        jobs: in the order of their submission.
    """

    folder: Path
    executor: str
    cluster: str
    command: str
    started: str
    host: str
    state: str = "submitting"
    driver: list[int] = field(default_factory=list)
    jobs: list[Entry] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Written on every job of it, by which they are found in a queue."""
        return f"guard:{self.folder.resolve()}"

    @property
    def alive(self) -> bool:
        """Whether the process that runs a local launch is at work on this machine."""
        return bool(self.driver) and self.host == socket.gethostname() and not process_gone(*self.driver)

    @property
    def abandoned(self) -> bool:
        """Whether the process that ran a local launch of this machine has ended without a word."""
        here = self.executor == "local" and self.host == socket.gethostname()
        return here and self.state == "running" and not self.alive

    def write(self) -> None:
        """Write it down as it is now."""
        content = {**asdict(self), "format": FORMAT, "version": VERSION}
        del content["folder"]
        write_atomic(self.folder / LEDGER, json_text(content))

    def entry(self, key: str) -> Entry:
        """The job with that key."""
        return next(entry for entry in self.jobs if entry.key == key)


def read_launch(folder: Path) -> Launch:
    """Raises ArtifactError when it is damaged or of another version."""
    content: dict[str, Any] = read_json(folder / LEDGER)
    if content.pop("format", None) != FORMAT or content.pop("version", None) != VERSION:
        raise ArtifactError(f"{folder / LEDGER} is no launch of this version.")
    jobs = [Entry(**entry) for entry in content.pop("jobs")]
    return Launch(folder, jobs=jobs, **content)


def launches(run: Path) -> list[Path]:
    """The folders of all launches of a run that were written down, in order."""
    names = sorted(name for name in listed(run / FOLDER) if re.fullmatch(r"\d{4,}", name))
    return [run / FOLDER / name for name in names if (run / FOLDER / name / LEDGER).is_file()]


def latest_launch(run: Path) -> Launch | None:
    """The latest launch of a run, or of the experiment that it is an arm of. Raises ArtifactError for a file."""
    if run.is_file():
        raise ArtifactError(f"{run} is a file and no run folder.")
    for place in (run, run.parent):
        if found := launches(place):
            launch = read_launch(found[-1])
            if place == run or any(Path(entry.run).resolve() == run.resolve() for entry in launch.jobs):
                return launch
    return None


@contextlib.contextmanager
def submitting(run: Path) -> Iterator[None]:
    """Hold the launches of a run while one is submitted.

    Raises:
        ArtifactError: another process is at it.
    """
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    with locked(run / FOLDER, f"Another guard launch is submitting {run}; guard status {run} shows what it does."):
        yield


def new_folder(run: Path) -> Path:
    """The folder of the next launch. Raises ArtifactError when another process makes it in the same moment."""
    taken = [int(name) for name in listed(run / FOLDER) if name.isdecimal()]
    folder = run / FOLDER / f"{max(taken, default=0) + 1:04d}"
    try:
        # Exclusive on file systems without locks too.
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise ArtifactError(f"Another guard launch is submitting {run}.") from error
    return folder


def now() -> str:
    """The present time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
