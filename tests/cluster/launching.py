"""Launches on the test cluster: small runs, what is waited for, and what must be left of them in the end."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.machines import until
from tests.cluster.scontrol import state_of
from tests.cluster.slurm import ENDED, Slurm
from tests.running import Started, command, contents, start

EPOCHS = 20
STEPS = 20 * EPOCHS
LONG = [
    f"squeeze.epochs={EPOCHS}",
    "monitor.every=5",
    "recover.ipc=6",
    "recover.iterations=150",
    "relabel.epochs=80",
    "evaluate.batch_size=30",
    "attacks.epsilon=[8]",
    "attacks.max_images=40",
    "attacks.sanity_images=0",
]
"""A teacher, images and labels that take long enough to be disturbed at work, and little to test."""
STAGES = ("squeeze", "recover", "relabel", "evaluate")
ONE_THREAD = [f"cluster.{stage}.cpus=1" for stage in STAGES]
"""Equal bits need equal threads, and the runs that are compared with have one."""
TWO_NODES = ["cluster.squeeze.nodes=2", "cluster.squeeze.tasks=1"]
PATIENCE = 600.0
"""Seconds; a busy machine starts processes slowly."""


class Launched:
    """A run that is launched on the cluster, in a folder with its data beside it."""

    def __init__(self, slurm: Slurm, folder: Path, *overrides: str, name: str = "run", patience: float = PATIENCE):
        self.slurm, self.folder, self.name, self.overrides = slurm, folder, name, overrides
        self.patience = patience

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "runs" / self.name

    def words(self, *more: str) -> list[str]:
        """The command line of its launch."""
        options = ["cluster=slurm_test", *ONE_THREAD, *self.overrides, *more]
        return command(self.folder, *options, name=self.name, stage="launch")

    def guard(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the cluster."""
        return on_cluster(self.slurm, [*command(self.folder)[:3], *words])

    def launch(self, *more: str) -> Launched:
        """Submit it."""
        done = on_cluster(self.slurm, self.words(*more))
        assert done.returncode == 0, done.stderr
        return self

    @property
    def ledger(self) -> dict[str, Any]:
        """What its latest launch wrote down."""
        written: dict[str, Any] = json.loads(sorted(self.run.glob("launch/*/launch.json"))[-1].read_text())
        return written

    def jobs(self, key: str) -> list[str]:
        """The jobs of one node of the graph."""
        return next(list(job["ids"]) for job in self.ledger["jobs"] if job["key"] == key)

    def states(self) -> dict[str, list[str]]:
        """Node of the graph → states of its jobs."""
        known = self.slurm.jobs()
        return {job["key"]: [state_of(each, known) for each in job["ids"]] for job in self.ledger["jobs"]}

    def at_work(self, pattern: str, count: int = 1) -> None:
        """Wait until there are so many files of a pattern in the run folder."""
        self._until(lambda: len(list(self.run.glob(pattern))) >= count, f"{count} x {pattern}")

    def preempt(self, job: str) -> None:
        """The signal before a preemption; Slurm is told to start the job again without delay."""
        self.slurm.signal(job, "USR2")
        self._until(lambda: self.slurm.state(job) in ("PENDING", *ENDED), f"the end of {job}")
        assert self.slurm.state(job) == "PENDING", "requeued"
        self.slurm.hurry(job)

    def ended(self, *keys: str) -> dict[str, list[str]]:
        """Wait until every job of some nodes of the graph (or of all) has ended; returns their states."""
        wanted = keys or tuple(self.states())

        def left() -> bool:
            states = self.states()
            return any(state not in ENDED for key in wanted for state in states[key])

        self._until(lambda: not left(), f"the end of {', '.join(wanted)}", every=0.5)
        return {key: each for key, each in self.states().items() if key in wanted}

    def end(self, *keys: str) -> None:
        """Wait until every job of some nodes of the graph (or of all) has succeeded."""
        wrong = {key: each for key, each in self.ended(*keys).items() if set(each) != {"COMPLETED"}}
        assert not wrong, f"{wrong}\n{self.story()}"

    def restarts(self, job: str) -> int:
        """How often Slurm has started a job again."""
        return int(self.slurm.jobs()[job]["Restarts"])

    def attempts(self, key: str) -> list[list[str]]:
        """What is noted of the beginnings and ends of each job of a node: ``start``, ``exit 0``, …."""
        files = [f"launch/*/{key.replace('/', '.')}/{job}_attempts" for job in self.jobs(key)]
        texts = [next(self.run.glob(each)).read_text() for each in files]
        return [[_mark(line.split()[1:]) for line in text.splitlines()] for text in texts]

    def units(self, artifact: str) -> Counter[str]:
        """Units of an artifact → how often they were made, by all workers together."""
        records = [json.loads(path.read_text()) for path in self.run.glob(f"workers/{artifact}-*.json")]
        return Counter(unit["unit"] for record in records for unit in record["units"])

    def story(self) -> str:
        """The queue and the ends of all logs, for people."""
        return "\n".join([self.slurm.report(), self.guard("logs", str(self.run)).stdout, self._status()])

    def _status(self) -> str:
        done = self.guard("status", str(self.run))
        return done.stdout + done.stderr

    def _until(self, ready: Callable[[], object], what: str, every: float = 0.1) -> None:
        try:
            until(ready, self.patience, what, every)
        except TimeoutError as error:
            error.add_note(self.story())
            raise


def begin(slurm: Slurm, words: Sequence[str]) -> Started:
    """Start a command that sees the cluster, with pipes."""
    return start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **slurm.environment)


def on_cluster(slurm: Slurm, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that sees the cluster."""
    process = begin(slurm, words)
    output, said = process.communicate(timeout=600)
    return subprocess.CompletedProcess(words, process.returncode or 0, output, said)


def take_over(whole: Path, folder: Path, *artifacts: str) -> None:
    """Begin a run with the images and some complete artifacts of another."""
    shutil.copytree(whole / "data", folder / "data")
    for name in artifacts:
        shutil.copytree(whole / "runs/run" / name, folder / "runs/run" / name)


def differences(mine: Path, theirs: Path) -> list[str]:
    """The files in which two runs differ, or that one of them lacks."""
    here, there = contents(mine), contents(theirs)
    # It holds the paths of the run and what its jobs ask for; and a lock is there only where a teacher was trained.
    beside = {"config.yaml", ".lock"}
    assert "config.yaml" in here
    return sorted(
        name for name in here.keys() | there.keys() if name not in beside and here.get(name) != there.get(name)
    )


def steps(run: Path) -> Sequence[int]:
    """The steps of the squeeze that were recorded, as they come."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["stage"] == "teacher" and "images_per_second" in line]


def flat(states: Mapping[str, Sequence[str]]) -> set[str]:
    """Every state that there is."""
    return {state for each in states.values() for state in each}


def _mark(words: Sequence[str]) -> str:
    return words[0] if words[0] == "start" else " ".join(words)
