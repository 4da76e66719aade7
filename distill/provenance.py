"""Which command, code, versions and hardware made a result."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from distill.environment import detect
from distill.files import read_json, write_json

SNAPSHOT = "snapshot.json"
"""Beside the packages, where a launch has copied them."""


class Provenance:
    """``provenance.json``: for each stage which command, code, versions and hardware made it, and how long it took."""

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def record(self, stage: str, **details: Any) -> Iterator[dict[str, Any]]:
        """Record one piece of work on a stage; interrupted ones stay in the list without an end."""
        entry: dict[str, Any] = {"started": _now(), **environment(), **details}
        content = read_json(self.path) if self.path.is_file() else {}
        content.setdefault(stage, []).append(entry)
        write_json(self.path, content)
        began = datetime.datetime.now()
        yield entry
        entry["finished"] = _now()
        entry["seconds"] = round((datetime.datetime.now() - began).total_seconds(), 3)
        write_json(self.path, content)

    def of_workers(self, stage: str, entries: list[dict[str, Any]]) -> None:
        """Write down everyone who has worked on a stage that is shared; entries of the time before workers stay."""
        content = read_json(self.path) if self.path.is_file() else {}
        before = [entry for entry in content.get(stage, []) if "worker" not in entry]
        write_json(self.path, {**content, stage: [*before, *entries]})


def environment() -> dict[str, Any]:
    """Command, code, versions and hardware of this process."""
    versions = {}
    optional = ("deepspeed", "torchattacks", "ffcv", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    for package in ("guard-distill", "torch", "torchvision", "numpy", "pillow", *optional):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    facts: dict[str, Any] = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "world_size": detect().world_size,
    }
    if snapshot := _snapshot():
        facts["snapshot"] = snapshot["sha256"]
    if scheduler := _scheduler():
        facts["slurm"] = scheduler
    if "torch" in sys.modules:
        import torch

        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
    return facts


def processor() -> str:
    """The model of the CPU, for people."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def commit() -> str | None:
    """The commit of the code, with ``+changes`` when the checkout has some; None outside a checkout.

    Of the copy that a launch has made it is the commit of the checkout at that time.
    """
    folder = Path(__file__).resolve().parent
    if snapshot := _snapshot():
        return snapshot["commit"]

    def git(*arguments: str) -> str:
        # Without locks: a run that is killed here must not leave an index.lock in its user's checkout.
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _snapshot() -> dict[str, Any]:
    """What a launch has written down about the copy of the code that this process runs, if it does run one."""
    path = Path(__file__).resolve().parent.parent / SNAPSHOT
    return dict(read_json(path)) if path.is_file() else {}


def _scheduler() -> dict[str, str]:
    """The Slurm job of this process, if any."""
    names = {
        "job": "SLURM_JOB_ID",
        "array": "SLURM_ARRAY_JOB_ID",
        "task": "SLURM_ARRAY_TASK_ID",
        "restarts": "SLURM_RESTART_COUNT",
    }
    return {name: os.environ[variable] for name, variable in names.items() if variable in os.environ}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
