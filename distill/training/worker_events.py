"""The units of shared stages over time, for TensorBoard: of all workers together, and of each; from their records.

Whoever reads the records writes the same: a line is one file, whole, under a name that grows with what it tells. So any
number of processes may do it at the same time, and again while workers go on.
"""

from __future__ import annotations

import io
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.files import digest, listed, read_json, remove
from distill.run_folder import STAGES, TENSORBOARD, numbered
from distill.sharing import MANIFEST
from distill.sharing.records import Record, read_records
from distill.sharing.worker import WORKERS

SHOWN_AS = f"{len(STAGES) + 1}_{WORKERS}"
"""Behind the stages: TensorBoard puts names that begin with a letter before those with a number."""
ALL = "all"
"""The line of all workers; the others are called by the worker's id."""
Point = tuple[float, int]
"""A time, in seconds of the file server's clock, and the units that were published by then."""


def show_workers(run: Path) -> None:
    """Write what the records say under ``run/tensorboard/6_workers/<stage>/<worker>``; a step is a second.

    Raises:
        ArtifactError: a JSON file of the run is damaged.
    """
    for stage in STAGES:
        begun = {"recipe.json", MANIFEST} & listed(run / stage)
        # The records are looked for first: of a stage that nobody shares there are none.
        if not begun or not any(name.startswith(f"{stage}-") for name in listed(run / WORKERS)):
            continue
        stored = read_json(run / stage / (MANIFEST if MANIFEST in begun else "recipe.json"))
        _show(run, stage, read_records(run, stage, digest(stored["recipe"])))


def _show(run: Path, stage: str, records: Sequence[Record]) -> None:
    ends = {record.worker: sorted(_ends(record)) for record in records}
    began = min((float(record.facts["began"]) for record in records if record.facts["began"]), default=0.0)
    together = sorted(end for several in ends.values() for end in several)
    for name, several in {ALL: together, **ends}.items():
        if several:
            points = [(began, 0), *((end, count) for count, end in enumerate(several, start=1))]
            _write(run / TENSORBOARD / SHOWN_AS / numbered(stage) / name, f"{SHOWN_AS}/{numbered(stage)}", points)


def _ends(record: Record) -> Iterator[float]:
    """When the units of a worker were published."""
    began = float(record.facts["began"] or 0)
    return (
        began + unit["at"] + unit["seconds"]
        for unit in record.facts["units"]
        if began and unit["result"] == "published"
    )


def _write(folder: Path, tag: str, points: Sequence[Point]) -> None:
    """One event file, in the place of those that told less. TensorBoard reads the files of a folder by their names."""
    content = _encoded(tag, points)
    name = f"events.out.tfevents.{round(1000 * points[-1][0]):013d}.{len(points):06d}.{digest(points)[:12]}"
    if (present := _present(folder)) and present[-1] >= name:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads every file that is called tfevents.
    temporary = folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    # Another may meanwhile have written what tells more.
    remove(folder / each for each in _present(folder)[:-1])


def _present(folder: Path) -> list[str]:
    return sorted(each for each in listed(folder) if not each.startswith("."))


def _encoded(tag: str, points: Sequence[Point]) -> bytes:
    """The points as TensorBoard's records; a step is a second, and of several units in it the last one counts."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    began, buffer = points[0][0], io.BytesIO()
    writer = RecordWriter(buffer)
    events: list[Event] = [
        Event(wall_time=began, file_version="brain.Event:2"),
        Event(wall_time=began, step=0, session_log=SessionLog(status=SessionLog.START)),
    ]
    # Step 0 is the beginning's alone.
    seconds = {math.ceil(time - began) if count else 0: (time, count) for time, count in points}
    for step, (time, count) in seconds.items():
        value = Summary.Value(tag=tag, simple_value=count)
        events.append(Event(wall_time=time, step=step, summary=Summary(value=[value])))
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()
