"""How far the work on an artifact is, who is at it, and how long it takes; read while others write."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distill.files import digest, listed, read_json
from distill.run_folder import Artifact
from distill.sharing.claims import CLAIMS, Claims
from distill.sharing.records import Record, read_record, read_records, record_path
from distill.sharing.search import HOLDERS, MANIFEST
from distill.sharing.sharing import PLAN
from distill.sharing.worker import WORKERS

LATEST = 5
"""A worker's rate is that of its latest units."""
DESERTED = "no worker is alive: the same command continues"


@dataclass(frozen=True)
class WorkerState:
    """One worker on an artifact.

    Attributes:
        worker: its id: host, process id and a random part.
        hardware: what it computes on.
        state: alive, ended or dead.
        made: units that it published.
        double: units that another worker published before it.
        busy: the part of its time in which it made units. That time is from when it began its first unit to when
            anybody began the last unit that is made by now, for until then there was work for everyone; that of a
            worker that died or was stopped ends with its own last unit. NaN where there is no such time yet.
        pace: seconds for one of its latest units; NaN before the first.
        unit: what it is making, or "".
        since: how long it has been at that, in seconds.
    """

    worker: str
    hardware: str
    state: str
    made: int
    double: int
    busy: float
    pace: float
    unit: str = ""
    since: float = 0.0


@dataclass(frozen=True)
class ArtifactState:
    """How far an artifact is.

    Attributes:
        name: of its folder.
        state: complete, in progress, or not begun.
        step: of the newest checkpoint of a training; None without one.
        total: units of an artifact that is shared, 0 for others.
        done: units that are published.
        making: units that living workers are making.
        workers: everyone who has worked on it.
    """

    name: str
    state: str
    step: int | None = None
    total: int = 0
    done: int = 0
    making: int = 0
    workers: Sequence[WorkerState] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Units that nobody is making."""
        return self.total - self.done - self.making

    @property
    def rate(self) -> float:
        """Units an hour of the workers that live, 0 when it is not known."""
        known = [each.pace for each in self.workers if each.pace == each.pace]
        if not known:
            return 0.0
        # One that has only begun is taken to be as fast as the others.
        average = sum(known) / len(known)
        paces = [each.pace if each.pace == each.pace else average for each in self.workers if each.state == "alive"]
        return sum(3600 / max(pace, 1e-3) for pace in paces)

    @property
    def seconds_left(self) -> float | None:
        """Until the last unit is published; None when it is not known."""
        return 3600 * (self.total - self.done) / self.rate if self.rate else None


def artifact_state(run: Path, name: str) -> ArtifactState:
    """Look at one artifact of a run; nothing is changed.

    Raises:
        ArtifactError: a JSON file of it is damaged.
    """
    folder, present = run / name, listed(run / name)
    if "recipe.json" not in present and MANIFEST not in present:
        return ArtifactState(name, "not begun")
    stored = read_json(folder / (MANIFEST if MANIFEST in present else "recipe.json"))
    records, now = read_records(run, name, digest(stored["recipe"])), _now(run)
    if MANIFEST in present:
        shared = len(stored["files"]) if records else 0
        return ArtifactState(name, "complete", None, shared, shared, 0, _workers(records, now, {}))
    with contextlib.suppress(FileNotFoundError):
        units: list[str] = read_json(folder / PLAN)["units"]
        held = dict(_held(folder, {*units, MANIFEST} - present))
        workers = _workers(records, now, held)
        making = sum(each.state == "alive" and each.unit in units for each in workers)
        done = sum(unit in present for unit in units)
        return ArtifactState(name, "in progress", None, len(units), done, making, workers)
    steps = [path.rpartition("-")[2] for path in present if path.startswith(".checkpoint-")]
    return ArtifactState(name, "in progress", max((int(step) for step in steps if step.isdecimal()), default=None))


def units_left(run: Path, artifact: Artifact) -> str:
    """One line about an artifact that this worker leaves before it is complete.

    Where many units are in the hands of others, a few of these are asked whether they live.
    """
    name, rest = artifact.kind, ""
    with contextlib.suppress(FileNotFoundError):
        units: list[str] = read_json(run / name / PLAN)["units"]
        held, present = Claims(run / name / CLAIMS).held(), listed(run / name)
        left = [unit for unit in units if unit in held and unit not in present]
        asked = random.sample(left, min(HOLDERS, len(left)))
        total, done, alive = len(units), sum(unit in present for unit in units), _living(run, name, held, asked)
        if alive:
            rest = f"other workers are making {alive + len(left) - len(asked)}"
        elif MANIFEST in held and _living(run, name, held, [MANIFEST]):
            rest = "another worker is finishing it"
    if not rest:
        # Seldom: all that were asked are dead, or the last unit has just been published, or the manifest.
        state = artifact_state(run, name)
        if state.state == "complete":
            return "complete"
        total, done = state.total, state.done
        if state.making:
            rest = f"other workers are making {state.making}"
        else:
            living = any(worker.state == "alive" for worker in state.workers)
            rest = "another worker is finishing it" if living else DESERTED
    return f"has {done} of {total} units; {rest}: guard status {run}"


def _living(run: Path, name: str, held: Mapping[str, int], units: Sequence[str]) -> int:
    """How many of these units that are claimed are in living hands."""
    claims = Claims(run / name / CLAIMS)
    holders = [claims.holder(unit, held[unit])[0] for unit in units]
    records, now = [read_record(record_path(run, name, holder)) for holder in holders], _now(run)
    return sum(record is not None and record.state(now) == "alive" for record in records)


def _held(folder: Path, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """(worker, unit) for every unit that is wanted and claimed."""
    claims = Claims(folder / CLAIMS)
    for unit, generation in claims.held().items():
        if unit in wanted:
            with contextlib.suppress(FileNotFoundError):
                yield claims.holder(unit, generation)[0], unit


def _workers(records: Sequence[Record], now: float, held: Mapping[str, str]) -> list[WorkerState]:
    """The state of each worker, judged by the time of the file server.

    Args:
        held: worker → the unit that it has claimed.
    """
    until = max((_began(each) + unit["at"] for each in records for unit in each.facts["units"]), default=0.0)
    return [_worker(each, now, until, held.get(each.worker, "")) for each in records]


def _worker(record: Record, now: float, until: float, unit: str) -> WorkerState:
    facts, units, state = record.facts, record.facts["units"], record.state(now)
    last = units[-1]["at"] + units[-1]["seconds"] if units else 0.0
    latest, present = units[-LATEST:], unit if state == "alive" else ""
    return WorkerState(
        record.worker,
        facts["hardware"],
        state,
        sum(each["result"] == "published" for each in units),
        sum(each["result"] != "published" for each in units),
        _busy(record, state, until, bool(present)),
        sum(each["seconds"] for each in latest) / len(latest) if latest else float("nan"),
        present,
        max(now - _began(record) - last, 0.0) if present else 0.0,
    )


def _busy(record: Record, state: str, until: float, making: bool) -> float:
    spans = [(each["at"], each["at"] + each["seconds"]) for each in record.facts["units"]]
    if not spans:
        return float("nan")
    end = until - _began(record)
    if state == "dead" or record.facts.get("error"):
        end = min(end, spans[-1][1])
    elif making:
        spans.append((spans[-1][1], end))
    span = end - spans[0][0]
    return sum(max(min(stop, end) - start, 0.0) for start, stop in spans) / span if span > 0 else float("nan")


def _began(record: Record) -> float:
    """When a worker began, by the file server's clock; by its machine's own in the moment before that is known."""
    began = record.facts.get("began")
    return float(began or datetime.datetime.fromisoformat(record.facts["started"]).timestamp())


def _now(run: Path) -> float:
    """The file server's clock, told by a file without a name; our own where none can be made."""
    try:
        with tempfile.TemporaryFile(dir=run / WORKERS) as file:
            file.write(b"\0")
            file.flush()
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()
