"""What processes tell people on stderr."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

TELLING = """
from distill.progress import Progress
from distill.say import say

say("guard: said.")
with Progress(2, "student 0", unit="step") as progress:
    progress.update(2)
"""


def test_a_line_is_written_in_one_piece() -> None:
    """Unbuffered, as torchrun starts Python, a process writes its lines whole: others may write between its writes."""
    read, written = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with read, written:
        subprocess.run([sys.executable, "-u", "-c", TELLING], stderr=written, check=True)
        read.setblocking(False)
        pieces = [read.recv(4096).decode() for _ in range(3)]
    assert pieces[:2] == ["guard: said.\n", "student 0: 0/2 step\n"]
    assert re.fullmatch(r"student 0: 2/2 step, .+\n", pieces[2])
