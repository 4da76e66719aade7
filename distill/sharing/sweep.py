"""What is removed when an artifact is complete: by one worker for all, for it is a name for every unit."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable
from pathlib import Path

from distill.files import listed, remove
from distill.run_folder import Artifact
from distill.sharing.claims import CLAIMS
from distill.sharing.records import Record, read_record, record_path
from distill.sharing.worker import Worker

GONE = ".gone-"
"""What is being removed; behind it comes the id of the worker that does so."""
ROUNDS = 10
"""Workers that come too late leave folders of their own meanwhile."""


def sweep(run: Path, artifact: Artifact, worker: Worker, beside: Iterable[Path] = ()) -> None:
    """Remove the claims, and what workers that died have left, unless another worker is doing so.

    Args:
        beside: the files that are made outside the artifact.
    """
    for _ in range(ROUNDS):
        names = sorted(name for name in listed(artifact.folder) if name.startswith("."))
        owners = {name.removeprefix(GONE).rpartition("-")[0] for name in names if name.startswith(GONE)}
        if any(_alive(_record(run, artifact, owner), worker) for owner in owners - {worker.id}):
            # It lists the folder once more when it has removed what it took.
            return
        if CLAIMS in names and not _take([CLAIMS], artifact.folder, worker):
            return
        taken = _take((name for name in names if name != CLAIMS), artifact.folder, worker)
        if not taken and CLAIMS not in names:
            break
    _sweep_records(run, artifact, worker)
    for path in beside:
        # Who was at it for so long that it was taken for dead finds it made.
        remove(path.parent.glob(f".{path.name}.*.tmp"))


def _take(names: Iterable[str], folder: Path, worker: Worker) -> bool:
    """Remove these names; returns whether one was still there."""
    found = False
    for name in names:
        # Renamed first: a worker that wakes up finds its claims whole or not at all.
        gone = folder / f"{GONE}{worker.id}-{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            (folder / name).rename(gone)
            found = True
            remove([gone])
    return found


def _sweep_records(run: Path, artifact: Artifact, worker: Worker) -> None:
    """Remove what workers that died have left beside the records."""
    prefix, folder, now = f".{artifact.kind}-", worker.path.parent, worker.now()
    for name in listed(folder):
        if not (name.startswith(prefix) and name.endswith(".tmp")):
            continue
        record = _record(run, artifact, name.removeprefix(prefix).partition(".json.")[0])
        with contextlib.suppress(FileNotFoundError):
            # Without a record it is of a worker that just begins, or died when it began.
            age = now - (folder / name).stat().st_mtime
            if age > worker.lease if record is None else record.state(now) != "alive":
                remove([folder / name])


def _record(run: Path, artifact: Artifact, worker: str) -> Record | None:
    return read_record(record_path(run, artifact.kind, worker))


def _alive(record: Record | None, worker: Worker) -> bool:
    return record is not None and record.state(worker.now()) == "alive"
