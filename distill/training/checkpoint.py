"""Checkpoints of a training: a folder that appears whole, and replaces the one before."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from distill.data.batch import Loader
from distill.errors import ArtifactError
from distill.files import read_json, write_json
from distill.training.engine import Engine
from distill.training.processes import Processes

NAME = ".checkpoint"


class Checkpoint:
    """The latest state of one training, in ``folder/.checkpoint…``.

    Args:
        folder: the artifact that is being made.
        label: tells several trainings of one artifact apart (``seed0``).
        minutes: time between two checkpoints; rank 0 decides.
    """

    def __init__(self, folder: Path, processes: Processes, label: str = "", minutes: float = 5.0):
        self.path = folder / f"{NAME}{label}"
        self.processes, self.seconds, self.saved = processes, 60 * minutes, time.monotonic()

    def restore(self, engine: Engine, loader: Loader[Any]) -> bool:
        """Continue from the latest complete checkpoint. Returns whether there was one.

        Raises:
            ArtifactError: when it cannot be read.
        """
        complete = [path for path in self._folders() if (path / "position.json").is_file()]
        if not complete:
            return False
        newest = max(complete, key=_step)
        try:
            engine.load(newest)
        except (RuntimeError, KeyError, ValueError, OSError, EOFError) as error:
            raise ArtifactError(
                f"The checkpoint {newest} cannot be read ({str(error).splitlines()[0]}); "
                f"remove it to start that stage again."
            ) from error
        loader.load_state_dict(read_json(newest / "position.json"))
        return True

    def due(self) -> bool:
        """Whether the time for another checkpoint has come."""
        return time.monotonic() - self.saved >= self.seconds

    def save(self, engine: Engine, loader: Loader[Any]) -> None:
        """Write the present state; the old one is removed when the new one is whole. Only rank 0 writes."""
        if not self.processes.main:
            return
        target = self.path.with_name(f"{self.path.name}-{engine.step_count:08d}")
        if not (target / "position.json").is_file():
            temporary = target.with_name(target.name + ".tmp")
            for stale in (temporary, target):
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
            engine.save(temporary)
            write_json(temporary / "position.json", loader.state_dict())
            os.replace(temporary, target)
        for path in self._folders():
            if path != target:
                shutil.rmtree(path, ignore_errors=True)
        self.saved = time.monotonic()

    def remove(self) -> None:
        """Remove every checkpoint, when the artifact is complete."""
        for path in self._folders():
            shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}-*"))


def _step(path: Path) -> int:
    digits = path.name.rsplit("-", 1)[1]
    return int(digits) if digits.isdigit() else -1
