"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from distill.say import say


class Progress:
    """A context manager that counts.

    On a terminal it is a tqdm bar on stderr. Where stderr is no terminal (a log file, Slurm) it prints one line at the
    start of work, then at most one every ``interval`` seconds, and one at the end.

    Args:
        total: how many units of work there are.
        description: what is done, for instance ``squeeze``.
        unit: name of one unit, for instance ``step``.
        done: units that were complete before.
        quiet: show nothing (ranks other than 0).
    """

    def __init__(
        self, total: int, description: str, unit: str = "it", done: int = 0, quiet: bool = False, interval: float = 15.0
    ):
        self.total, self.description, self.unit, self.done, self.interval = total, description, unit, done, interval
        self.first, self.began, self.told = done, time.monotonic(), time.monotonic()
        self.notes: dict[str, Any] = {}
        self.told_at: int | None = None
        self.plain = not quiet and not sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=done, desc=description, unit=unit, disable=quiet or self.plain, dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
        if self.plain:
            self._line()
        return self

    def update(self, count: int = 1, **notes: Any) -> None:
        """Count ``count`` finished units; ``notes`` are shown beside the rate (loss=0.31)."""
        self.done += count
        self.notes.update(notes)
        if notes and not self.bar.disable:
            self.bar.set_postfix(self.notes, refresh=False)
        self.bar.update(count)
        if self.plain and time.monotonic() - self.told > self.interval:
            self._line()

    def _line(self) -> None:
        self.told, self.told_at = time.monotonic(), self.done
        elapsed = self.told - self.began
        rate = (self.done - self.first) / elapsed if elapsed > 0 else 0.0
        speed = f", {rate:.3g} {self.unit}/s" if rate > 0 else ""
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 and self.done < self.total else ""
        notes = "".join(f", {key} {value}" for key, value in self.notes.items())
        text = f"{self.description}: {self.done}/{self.total} {self.unit}{speed}{left}{notes}"
        say(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.plain and self.told_at != self.done:
            self._line()
