"""Checkpoints of a training: folders that appear whole, the last few of them, checked before they are read."""

from __future__ import annotations

import os
import secrets
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

from distill.data.batch import Loader
from distill.errors import ArtifactError, lost_another
from distill.files import file_digest, listed, read_json, write_json
from distill.say import say
from distill.training.engine import Engine
from distill.training.processes import Processes

NAME = ".checkpoint"
POSITION = "position.json"


class Overtaken(Exception):
    """Another worker has finished this training meanwhile."""


class Checkpoint:
    """The latest states of one training, in ``folder/.checkpoint<label>-<step>``.

    What is stored depends neither on the world size nor on the engine. A name stands for a whole checkpoint from the
    moment when it appears to that when it goes, so that one process may read while another writes.

    Args:
        folder: the artifact that is being made.
        label: tells several trainings of one artifact apart (``-seed0``).
        minutes: time between two checkpoints.
        keep: this many stay.
        result: file that the training makes, where workers share such files: one that was taken for dead may wake up
            while another goes on with its training. Then both write the same states, and neither disturbs the other.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        label: str = "",
        minutes: float = 5.0,
        keep: int = 2,
        result: Path | None = None,
    ):
        self.path = folder / f"{NAME}{label}"
        self.processes, self.seconds, self.keep, self.result = processes, 60 * minutes, keep, result
        self.saved, self.step = time.monotonic(), -1

    def restore(self, engine: Engine, loader: Loader[Any]) -> bool:
        """Continue from the latest whole checkpoint, the same on every rank. Returns whether there was one.

        A damaged one is passed over, with a line on stderr.

        Raises:
            ArtifactError: when all are damaged, or one does not fit.
        """
        while (chosen := self._chosen()) is not None:
            try:
                engine.load(chosen)
                position = read_json(chosen / POSITION)["loader"]
            except (RuntimeError, KeyError, ValueError, OSError, EOFError) as error:
                if lost_another(error) or isinstance(error, torch.OutOfMemoryError):
                    raise
                if self.result is not None and not chosen.exists():
                    # Another worker has let go of it for a later one.
                    continue
                steps = [_step(path) for path in self._folders() if 0 <= _step(path) < _step(chosen)]
                otherwise = f"go on from step {max(steps)}" if steps else "start that training again"
                raise ArtifactError(
                    f"The checkpoint {chosen} cannot be read or does not fit ({textwrap.shorten(str(error), 200)}); "
                    f"remove it to {otherwise}."
                ) from error
            loader.load_state_dict(position)
            self.step = engine.step_count
            return True
        return False

    def due(self, *, epoch_ends: bool = False) -> bool:
        """Whether the time for another has come: ``minutes`` after the last, at the end of an epoch a tenth of that.

        Epochs of less would be slowed down by it. Rank 0's clock decides; the other ranks say no.
        """
        age = time.monotonic() - self.saved
        return self.processes.main and age >= (self.seconds / 10 if epoch_ends else self.seconds)

    def save(self, engine: Engine, loader: Loader[Any]) -> None:
        """Write the present state and remove the oldest. Every rank calls it; it returns when all is on disk."""
        if engine.step_count != self.step:
            target = self.path.with_name(f"{self.path.name}-{engine.step_count:08d}")
            temporary = _passing(target)
            if self.processes.main:
                temporary.mkdir(parents=True)
            try:
                engine.save(temporary)
                if self.processes.main:
                    self._finish(temporary, target, loader)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            self.step = engine.step_count
        self.processes.barrier()
        self.saved = time.monotonic()

    def check_wanted(self) -> None:
        """Raises Overtaken when the result is there: another worker has finished."""
        if self.result is not None and self.result.name in listed(self.result.parent):
            raise Overtaken

    def remove(self) -> None:
        """Remove every checkpoint, when the artifact is complete."""
        for path in self._folders():
            _remove(path)

    def _finish(self, temporary: Path, target: Path, loader: Loader[Any]) -> None:
        """Describe the files, which are on disk, put them under their name, and let go of what is older or given up."""
        files = {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in temporary.iterdir()}
        write_json(temporary / POSITION, {"loader": _position(loader), "files": files})
        _synchronise(temporary)
        _place(temporary, target)
        _synchronise(target.parent)
        step, present = _step(target), [path for path in self._folders() if path != target]
        # What is later than the one that was restored is damaged, or of a worker that has overtaken this one.
        whole = [path for path in present if 0 <= _step(path) <= self.step or (_step(path) >= 0 and not _problem(path))]
        older = sorted((path for path in whole if _step(path) < step), key=_step, reverse=True)
        kept = {*older[: self.keep - 1], *(path for path in whole if _step(path) > step)}
        for path in present:
            # Where workers share trainings, what has a passing name may be another's.
            if path not in kept and (_step(path) >= 0 or self.result is None):
                _remove(path)

    def _chosen(self) -> Path | None:
        """The checkpoint to go on from, the same on every rank."""
        chosen, problem = self.processes.tell(self._choose() if self.processes.main else (None, ""))
        if problem:
            raise ArtifactError(problem)
        return chosen

    def _choose(self) -> tuple[Path | None, str]:
        """The newest whole checkpoint, if any, or why none of those that are there will do."""
        damaged: list[str] = []
        waiting = [path for path in self._folders() if _step(path) >= 0]
        while waiting:
            path = max(waiting, key=_step)
            problem = _problem(path)
            if not problem:
                for text in damaged:
                    say(f"guard: {text}; going on from step {_step(path)}.")
                return path, ""
            if self.result is not None and not path.exists():
                # Another worker has let go of it: there is a later one.
                return self._choose()
            damaged.append(f"The checkpoint {path} is damaged ({problem})")
            waiting.remove(path)
        if not damaged:
            return None, ""
        return None, f"{'; '.join(damaged)}; remove {self.path}-* to start that stage again."

    def _folders(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}-*"))


def _position(loader: Loader[Any]) -> dict[str, Any]:
    """The loader's position. The end of an epoch is the start of the next: the count of batches may depend on ranks."""
    state = loader.state_dict()
    ended = state["position"] >= len(loader)
    return {**state, "epoch": state["epoch"] + 1, "position": 0} if ended else state


def _problem(path: Path) -> str:
    """What is wrong with a checkpoint; nothing when every file is as it was written."""
    if not (path / POSITION).is_file():
        return f"{POSITION} is missing"
    try:
        for name, entry in read_json(path / POSITION)["files"].items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if file_digest(path / name) != entry["sha256"]:
                return f"{name} is not what was written"
    except (ArtifactError, AttributeError, KeyError, TypeError):
        return f"{POSITION} is unreadable"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def _passing(path: Path) -> Path:
    """A name beside ``path`` that no other process of any machine takes, and that is no checkpoint's."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _place(temporary: Path, target: Path) -> None:
    """Give a checkpoint its name; a whole one that has it already is the same state and stays, a damaged one goes."""
    if target.exists():
        if not _problem(target):
            shutil.rmtree(temporary, ignore_errors=True)
            return
        _remove(target)
    try:
        os.replace(temporary, target)
    except OSError:
        # Another worker was faster in this very moment.
        if _problem(target):
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint: its name first, so that nobody reads half of it."""
    gone = _passing(path)
    try:
        os.rename(path, gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def _synchronise(path: Path) -> None:
    """Ask the operating system to have the names in a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step(path: Path) -> int:
    """The step of a checkpoint; -1 for one that was never finished."""
    digits = path.name.rsplit("-", 1)[1]
    return int(digits) if digits.isdigit() else -1
