"""Real runs for the tests: small configurations on scikit-learn's digits, started as the user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SMALL = [
    "dataset=digits",
    "teacher.network=resnet10",
    "teacher.stem=stride2",
    "teacher.width=8",
    "squeeze.epochs=4",
    "squeeze.batch_size=64",
    "squeeze.lr=0.05",
    "squeeze.crop=padded",
    "squeeze.flip=false",
    "recover.ipc=2",
    "recover.iterations=40",
    "recover.crop_scale=[0.7,1.0]",
    "recover.flip=false",
    "recover.jitter=2",
    "relabel.epochs=20",
    "relabel.flip=false",
    "evaluate.batch_size=10",
    "attacks.epsilon=[4,16]",
    "attacks.max_images=100",
    "attacks.sanity_images=4",
    "monitor.checkpoint_minutes=0.002",
    "monitor.every=10",
]
"""The whole way in a few seconds of work; checkpoints every 0.12 s, so that interruptions find some."""


def environment(threads: int = 1) -> dict[str, str]:
    """One thread a process: equal bits need equal threads, and busy cores stall OpenMP's barriers."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def command(folder: Path, *overrides: str, name: str = "run", stage: str = "run") -> list[str]:
    """The command line of a run below ``folder``."""
    places = [f"run_root={folder / 'runs'}", f"data_root={folder / 'data'}", f"name={name}"]
    return [sys.executable, "-m", "distill", stage, *SMALL, *places, *overrides]


def guard(arguments: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is text."""
    return subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=500, **options)  # type: ignore[call-overload]


def torchrun(count: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command (which begins with the interpreter) in ``count`` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return guard([*launcher, *arguments[1:]])


def contents(run: Path) -> dict[str, bytes]:
    """Every byte of a run that must not depend on how it was interrupted: all but timings, provenance, logs and
    the page that tells them."""
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if (
            not path.is_file()
            or name.startswith(("metrics", "tensorboard", "workers"))
            or name in ("provenance.json", "report.html")
        ):
            continue
        content = path.read_bytes()
        if name == "results.json":
            content = json.dumps({k: v for k, v in json.loads(content).items() if k != "provenance"}).encode()
        found[name] = content
    return found
