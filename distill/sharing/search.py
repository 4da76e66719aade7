"""Which unit a worker takes next.

What this costs the shared folder grows neither with the number of units nor with that of the workers: claims stay while
work goes on, so that a unit once seen as claimed is never asked for again, and folders are listed only when what is
known has proved to be old. A worker that finds another before it goes on at a place of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.files import listed
from distill.sharing.claims import Claims
from distill.sharing.records import read_record, record_path
from distill.sharing.worker import BEATS, Worker

MANIFEST = "manifest.json"
FIRST_WAIT, GROWTH, LONGEST_WAIT = 0.25, 1.5, 3.0
"""Seconds between two looks of a worker that waits for others grow by this factor, to this or to a heartbeat's."""
OLD = 15.0
"""After so many seconds a worker lists the folder again, to tell how far the others are."""
HOLDERS = 4
"""Of so many workers that hold a unit a waiting worker asks at a time whether they live."""


class Search:
    """What one worker knows about the units of an artifact.

    Args:
        run: the run folder.
        folder: of the artifact.
        claims: its claims.
        units: the names of their files.
        worker: this worker.
        token: the file that it claims with.
    """

    def __init__(self, run: Path, folder: Path, claims: Claims, units: Sequence[str], worker: Worker, token: Path):
        self.run, self.folder, self.claims, self.units = run, folder, claims, units
        self.worker, self.token = worker, token
        # Of no influence on what is made, and another one for each worker.
        self.random = random.Random(worker.id)
        self.present: set[str] = set()
        self.held: dict[str, int] = {}
        self.holders: dict[tuple[str, int], str] = {}
        self.place, self.looked = 0, float("-inf")

    @property
    def old(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self.looked > OLD

    def look(self) -> set[str]:
        """List what is published and what is claimed. Returns the names in the artifact's folder."""
        self.present, self.looked = listed(self.folder), time.monotonic()
        self.held = self.claims.held()
        return self.present

    def done(self) -> int:
        """Units that were published when this worker looked."""
        return sum(unit in self.present for unit in self.units)

    def free(self) -> str | None:
        """Claim a unit that nobody has had. None: there is none, as far as is known.

        Raises:
            FileNotFoundError: the claims have been removed.
        """
        while (unit := self._next()) is not None:
            if self.claims.take(unit, 0, self.token):
                self.held[unit] = 0
                return unit
            # Whoever was first goes on from here, as may many that began in the same moment: go elsewhere.
            self.held = self.claims.held()
            self.held.setdefault(unit, 0)
            left = [number for number, name in enumerate(self.units) if self._unknown(name)]
            self.place = self.random.choice(left) if left else 0
        return None

    def deserted(self) -> str | None:
        """Claim a unit whose worker is dead, among a few that are claimed and not published; right after a look.

        None: those few are alive. They will look in their turn, so that the last worker that lives finds every unit
        that a dead one has left.

        Raises:
            FileNotFoundError: the claims have been removed.
        """
        wanted = [unit for unit in self._wanted() if unit in self.held]
        if not wanted:
            return None
        now = self.worker.now()
        for unit in self.random.sample(wanted, min(HOLDERS, len(wanted))):
            if not self._dead(unit, now):
                continue
            # It may have published the unit and ended since this worker looked. A manifest that is there is wanted all
            # the same, where something that is made beside it is not.
            if unit != MANIFEST and unit in listed(self.folder):
                continue
            generation = self.held[unit] + 1
            if self.claims.take(unit, generation, self.token):
                self.held[unit] = generation
                return unit
        return None

    def pauses(self) -> Iterator[float]:
        """Seconds to wait between looks: longer and longer, and never those of another worker."""
        pause = FIRST_WAIT
        while True:
            yield pause * self.random.uniform(0.75, 1.25)
            pause = min(GROWTH * pause, max(LONGEST_WAIT, self.worker.lease / BEATS))

    def _wanted(self) -> Sequence[str]:
        return [unit for unit in self.units if unit not in self.present] or [MANIFEST]

    def _unknown(self, unit: str) -> bool:
        return unit not in self.held and unit not in self.present

    def _next(self) -> str | None:
        """The first unit from this worker's place on, round to the beginning, that nobody is known to have."""
        count = len(self.units)
        for step in range(count):
            number = (self.place + step) % count
            if self._unknown(self.units[number]):
                self.place = number
                return self.units[number]
        if self._wanted()[0] == MANIFEST and MANIFEST not in self.held:
            return MANIFEST
        return None

    def _dead(self, unit: str, now: float) -> bool:
        key = (unit, self.held[unit])
        holder, claimed = self.holders.get(key, ""), now
        if not holder:
            holder, claimed = self.claims.holder(*key)
            self.holders[key] = holder
        if holder == self.worker.id:
            # Made and published, and then removed by hand.
            return True
        if not holder:
            return now - claimed > self.worker.lease
        record = read_record(record_path(self.run, self.worker.record["artifact"], holder))
        return record is None or record.state(now) != "alive"
