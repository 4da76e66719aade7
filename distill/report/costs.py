"""What runs have cost: hours of processors for each stage, bytes of what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.files import read_json
from distill.run_folder import STAGES

STAGE_NAMES = dict(zip(STAGES, ("squeeze", "recover", "relabel", "students", "attacks"), strict=True))
"""Artifact → what making it is called."""
KEPT = {"teacher": "teacher's weights", "distilled": "distilled images", "labels": "soft labels", "student": "students"}
"""Artifacts whose bytes are told."""


@dataclass(frozen=True)
class Cost:
    """What one stage of a run has taken.

    Attributes:
        stage: ``squeeze``, ``recover``, …
        hours: of each kind of device, summed over processes: ``GPU`` per device, ``CPU`` per thread.
        device: hardware, as its records name it.
        unfinished: pieces of work that were interrupted and left no time.
    """

    stage: str
    hours: dict[str, float]
    device: str
    unfinished: int


def read_provenance(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Who made each stage of a run; empty where nothing is written. Raises ArtifactError when it is damaged."""
    path = run / "provenance.json"
    content = read_json(path) if path.is_file() else {}
    return {stage: entries for stage, entries in content.items() if isinstance(entries, list)}


def stage_costs(provenance: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Cost]:
    """One entry for each stage of which something is written, in the order of the stages."""
    costs = []
    for stage in [name for name in (*STAGES, *sorted(set(provenance) - set(STAGES))) if name in provenance]:
        entries, hours, devices = provenance[stage], {"GPU": 0.0, "CPU": 0.0}, []
        for entry in entries:
            # A worker writes down itself; a stage that ranks do together is written down by the first of them.
            processes = 1 if "worker" in entry else int(entry.get("world_size") or 1)
            seconds = float(entry.get("seconds") or 0) * processes
            hours["GPU" if "gpu" in entry else "CPU"] += (
                seconds / 3600 * (1 if "gpu" in entry else int(entry.get("threads") or 1))
            )
            devices.append(str(entry.get("gpu") or entry.get("hardware") or f"CPU, {entry.get('cpus', '?')} cores"))
        costs.append(
            Cost(
                STAGE_NAMES.get(stage, stage),
                {kind: value for kind, value in hours.items() if value},
                ", ".join(dict.fromkeys(devices)),
                sum("seconds" not in entry for entry in entries),
            )
        )
    return costs


def kept_bytes(run: Path) -> dict[str, int]:
    """Bytes of each complete artifact of a run by what it is; what its manifest says, without reading the files."""
    found = {}
    for stage, name in KEPT.items():
        path = run / stage / "manifest.json"
        if path.is_file():
            files = read_json(path).get("files", {})
            found[name] = sum(int(entry["bytes"]) for entry in files.values())
    return found


def size_text(count: float) -> str:
    """``416.0 kB``; 1,000 bytes are a kB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def hours_text(hours: float) -> str:
    """``2.41 h``, ``3.2 min`` or ``40 s``."""
    seconds = 3600 * hours
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{hours:.2f} h"
