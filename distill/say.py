"""Lines for people, on stderr."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Write a line with its end in one piece.

    torchrun starts its processes with ``python -u``, where ``print`` writes the two apart: lines of several processes
    would run into each other in a log.
    """
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
