"""Loaded by every Python that starts with this folder in its path: its process stands still where a test wants it to.

GUARD_TESTS_ORDER names a file that may be there or not: a pattern of file names, and the least number at the end of a
name. The first process that is about to give such a name to a file takes the order for itself, by renaming it, and
stands still until somebody sends SIGCONT. See ``Standstill`` in ``tests.running``.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from pathlib import PurePath


def obey(order: str) -> None:
    """From now on this process looks for an order, and so do those that it forks."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in ("os.link", "os.rename"):
            return
        name = PurePath(str(arguments[1]))
        try:
            with open(order) as file:
                pattern, least = file.read().split()
            number = re.search(r"\d*$", name.name)
            if not name.match(pattern) or (int(least) and int((number and number[0]) or -1) < int(least)):
                return
            os.rename(order, f"{order}.{os.getpid()}")
        except FileNotFoundError:
            # There is none, or another process was first.
            return
        # To this thread, so that it does not go a single step further.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    sys.addaudithook(hook)


if "GUARD_TESTS_ORDER" in os.environ:
    obey(os.environ["GUARD_TESTS_ORDER"])
