"""The work on one artifact that any number of processes share: units are claimed, made, published and counted.

There is no server and no lock, and nobody waits for another: a unit is a free one, or one whose worker is dead.
A unit is done when its file is there. The manifest is the last unit: who takes it finishes the artifact, so what it
says must not depend on who that is. Made twice is harmless: the first publication stays.
"""

from __future__ import annotations

import filecmp
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from distill.errors import ArtifactError
from distill.files import digest, json_text, listed, place_first, write_atomic, write_first
from distill.progress import Progress
from distill.provenance import Provenance
from distill.run_folder import Artifact
from distill.say import say
from distill.sharing.claims import CLAIMS, Claims
from distill.sharing.records import provenance_entries, read_records
from distill.sharing.search import MANIFEST, Search
from distill.sharing.sweep import sweep
from distill.sharing.worker import Worker

PLAN, PRIVATE = ".units.json", ".making-"
Make = Callable[[int, Path, Progress], None]
"""(position of the unit, file to write, progress to be told of the unit's own steps)."""


class Sharing:
    """One worker's part in an artifact.

    Args:
        run: the run folder.
        artifact: what is made; begun.
        worker: this worker, at work.
        wait: stay until the artifact is complete; else leave when what is left is in living hands, as far as is asked:
            a few of many are asked, and as these will ask in their turn, the last that lives leaves no unit of a dead.
        quiet: show no progress.
        beside: files outside the artifact that the finisher writes too; they must be there for it to be finished.
    """

    def __init__(
        self,
        run: Path,
        artifact: Artifact,
        worker: Worker,
        *,
        wait: bool = True,
        quiet: bool = False,
        beside: Sequence[Path] = (),
    ):
        self.run, self.artifact, self.worker = run, artifact, worker
        self.wait, self.quiet, self.beside = wait, quiet, beside
        self.folder, self.claims = artifact.folder, Claims(artifact.folder / CLAIMS)
        self.private = self.folder / f"{PRIVATE}{worker.id}"
        self.token = self.private / "worker"
        self.units: Sequence[str] = ()

    def work(
        self,
        units: Sequence[str],
        make: Make,
        finish: Callable[[], None],
        description: str,
        step: str = "unit",
        steps: int = 1,
        quiet: bool = False,
    ) -> None:
        """Make free units until none is left; then finish the artifact if nobody else does.

        Args:
            units: the names of their files, in order; the same for every worker.
            make: writes the file of one unit and counts its steps.
            finish: checks all units and writes the manifest, ``artifact.finish``.
            description: name of the work, for the progress.
            step: what the progress counts.
            steps: how many of them a unit has.
            quiet: a unit shows its own progress.

        Raises:
            ArtifactError: a file lies there that is no unit, or the folder was removed or begun anew meanwhile.
        """
        self.units, numbers = units, {name: number for number, name in enumerate(units)}
        self._open()
        search = Search(self.run, self.folder, self.claims, units, self.worker, self.token)
        present, pauses = search.look(), search.pauses()
        total, counted = len(units) * steps, search.done()
        try:
            with Progress(total, description, step, done=counted * steps, quiet=self.quiet or quiet) as progress:
                while not self.finished(present):
                    taken = self._claim(search.free) or self._claim(search.deserted)
                    if taken is None and not self.wait:
                        return
                    if taken is None:
                        time.sleep(next(pauses))
                    # On and on without another look while units are known that nobody has.
                    while taken is not None:
                        if taken == MANIFEST:
                            self._finish(finish)
                        else:
                            counted += self._make(taken, numbers[taken], make, progress)
                            pauses = search.pauses()
                        taken = None if search.old else self._claim(search.free)
                    present = search.look()
                    others = search.done() - counted
                    if others > 0:
                        counted += others
                        progress.update(others * steps)
        finally:
            shutil.rmtree(self.private, ignore_errors=True)
        sweep(self.run, self.artifact, self.worker, self.beside)

    def _open(self) -> None:
        """Make the folders of claims and of unfinished files, the list of units, and what this worker claims with."""
        try:
            self.claims.folder.mkdir(exist_ok=True)
            self.private.mkdir(exist_ok=True)
            write_atomic(self.token, self.worker.id)
            write_first(self.folder / PLAN, json_text({"units": list(self.units)}))
        except OSError:
            # Others have finished since this worker began, and swept; NFS may call what is gone stale.
            if not self.finished():
                raise

    def finished(self, present: Collection[str] | None = None) -> bool:
        """Whether the artifact is complete, and what is made beside it too.

        Args:
            present: the names in its folder, where they have just been listed.
        """
        present = listed(self.folder) if present is None else present
        return MANIFEST in present and all(path.name in listed(path.parent) for path in self.beside)

    def _claim(self, attempt: Callable[[], str | None]) -> str | None:
        """A unit, or the manifest, that this attempt gives this worker; None when it gives none."""
        try:
            return attempt()
        except FileNotFoundError:
            # Another worker has finished and swept; or somebody has removed the folder by hand.
            if not self.finished():
                self.artifact.check_begun()
                self._open()
        except OSError:
            if not self.finished():
                raise
        return None

    def _make(self, unit: str, number: int, make: Make, progress: Progress) -> bool:
        # The others have finished and swept, and one that came too late has made its folder of claims again.
        if (self.folder / unit).exists():
            return False
        began, path = self.worker.seconds, self.private / unit
        try:
            make(number, path, progress)
            self._publish(unit, path, began)
        except OSError:
            # This worker slept for longer than its lease, the others have finished and swept.
            if not self.finished():
                raise
        return True

    def _publish(self, unit: str, path: Path, began: float) -> None:
        self.artifact.check_begun()
        target = self.folder / unit
        if place_first(path, target):
            self.worker.made(unit, began, "published")
        elif filecmp.cmp(path, target, shallow=False):
            self.worker.made(unit, began, "equal")
        else:
            first = self._maker(unit)
            say(
                f"guard: {unit} differs from the one that {first} published first, which stays; "
                f"{self.worker.id} ({self.worker.record['hardware']}) drops its own."
            )
            self.worker.made(unit, began, "dropped", first=first)
        path.unlink(missing_ok=True)

    def _maker(self, unit: str) -> str:
        for record in read_records(self.run, self.artifact.kind):
            if any(each["unit"] == unit and each["result"] == "published" for each in record.facts["units"]):
                return f"{record.worker} ({record.facts['hardware']})"
        return "another worker"

    def _finish(self, finish: Callable[[], None]) -> None:
        if self.finished():
            return
        self.artifact.check_begun()
        strangers = [path for path in self.artifact.files() if str(path.relative_to(self.folder)) not in self.units]
        if strangers:
            raise ArtifactError(
                f"{strangers[0]} is no part of {self.folder}; remove it and run the same command again."
            )
        recipe = digest(self.artifact.recipe.as_json())
        entries = provenance_entries(self.run, self.artifact.kind, recipe)
        try:
            Provenance(self.run / "provenance.json").of_workers(self.artifact.kind, entries)
            finish()
        except OSError:
            # So slow that it was taken for dead: another has finished, and swept the manifest under its passing name.
            if not self.finished():
                raise
