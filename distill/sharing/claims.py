"""Claims: which worker makes which unit, without a server and without locks.

A claim is a file ``UNIT.GENERATION`` that only one process can create; it holds the id of its worker. When that worker
is dead another one creates the next generation. No claim is removed while work goes on, so whoever creates a generation
knows that the one before it is the one that it has judged.
"""

from __future__ import annotations

import os
from pathlib import Path

from distill.files import NO_LINKS, listed

CLAIMS = ".claims"
"""The folder of the claims in an artifact."""


class Claims:
    """The claims of one artifact.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def held(self) -> dict[str, int]:
        """Unit → its latest generation, for the units that were claimed at any time."""
        found: dict[str, int] = {}
        for name in listed(self.folder):
            unit, _, generation = name.rpartition(".")
            if generation.isdecimal():
                found[unit] = max(found.get(unit, 0), int(generation))
        return found

    def holder(self, unit: str, generation: int) -> tuple[str, float]:
        """The id of the worker that holds a claim, and the file's time.

        Without links the id is empty in the moment before it is written.

        Raises:
            FileNotFoundError: the claims have been removed, for the artifact is complete.
        """
        with open(self._path(unit, generation)) as file:
            return file.read(), os.fstat(file.fileno()).st_mtime

    def take(self, unit: str, generation: int, token: Path) -> bool:
        """Claim a unit. Returns whether this worker was the first.

        Args:
            token: a file on the same file system that holds the worker's id.

        Raises:
            FileNotFoundError: the claims have been removed.
        """
        path = self._path(unit, generation)
        try:
            os.link(token, path)
        except FileExistsError:
            # NFS: the answer to a link that was made may be lost, and the question asked again.
            return os.path.samefile(token, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _create(path, token.read_text())
        return True

    def _path(self, unit: str, generation: int) -> Path:
        return self.folder / f"{unit}.{generation}"


def _create(path: Path, content: str) -> bool:
    """Make a file unless it is there; returns whether it was not."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w") as file:
            file.write(content)
    except OSError as error:
        # A full disk: nobody could tell whose claim it is.
        path.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise
    return True
