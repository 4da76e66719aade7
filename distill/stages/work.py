"""What a stage is given to work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import Config
from distill.models.compiled import RUN_EAGERLY
from distill.progress import Progress
from distill.run_folder import Artifact
from distill.sharing import Make, Sharing
from distill.training.checkpoint import Checkpoint
from distill.training.monitor import Monitor, NullMonitor
from distill.training.processes import Processes
from distill.training.worker_events import show_workers

if TYPE_CHECKING:
    from distill.data.catalogue import PreparedSet


@dataclass(frozen=True)
class Work:
    """One stage's piece of work.

    Attributes:
        config: the whole configuration.
        run: the run folder.
        artifact: what the stage makes; begun, and finished by the stage: on rank 0, or where it is shared by the worker
            that finds all units there.
        prepared: the real images.
        processes: this process among the others.
        monitor: where numbers and pictures go.
        sharing: this process among all workers on the artifact, where the stage is one that is shared.
    """

    config: Config
    run: Path
    artifact: Artifact
    prepared: PreparedSet
    processes: Processes
    monitor: NullMonitor
    sharing: Sharing | None = None

    @property
    def folder(self) -> Path:
        """The folder of the artifact."""
        return self.artifact.folder

    def share(
        self,
        units: Sequence[str],
        make: Make,
        finish: Callable[[], None],
        description: str,
        step: str = "unit",
        steps: int = 1,
        quiet: bool = False,
    ) -> None:
        """Make those units of a shared stage that no other worker makes; see ``Sharing.work``."""
        assert self.sharing is not None, "the stage is listed as shared"
        record, tensorboard = self.sharing.worker.record, self.config.monitor.tensorboard

        def make_and_note(number: int, path: Path, progress: Progress) -> None:
            make(number, path, progress)
            if RUN_EAGERLY:
                record["environment"]["not_compiled"] = dict(RUN_EAGERLY)

        def finish_and_show() -> None:
            finish()
            if tensorboard:
                show_workers(self.run)

        self.sharing.work(units, make_and_note, finish_and_show, description, step, steps, quiet)

    def checkpoint(self, label: str = "", processes: Processes | None = None, result: Path | None = None) -> Checkpoint:
        """The checkpoints of a training of this stage; see ``Checkpoint``."""
        minutes, keep = self.config.monitor.checkpoint_minutes, self.config.monitor.keep_checkpoints
        return Checkpoint(self.folder, processes or self.processes, label, minutes, keep, result)

    def series(self, name: str) -> NullMonitor:
        """Where the numbers of one unit of a shared stage go that is told of while it is made."""
        assert self.sharing is not None, "the stage is listed as shared"
        tensorboard = self.config.monitor.tensorboard
        return Monitor(self.run, self.artifact.kind, tensorboard, series=name, writer=self.sharing.worker.id)
