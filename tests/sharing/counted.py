"""The driver on units, with every operation counted that Python tells its audit hooks of and that names a path of the
run: ``python -m tests.sharing.counted RUN UNITS …``. It begins when its standard input ends, and prints the counts.

That is every open, link, rename, listing, mkdir, removal and utime, also those that fail; ``stat`` is not among them.
Beside them it counts the pauses in which it waits for others, who may take long.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from types import SimpleNamespace

from distill.sharing import sharing
from tests.sharing import driver

EVENTS = ("open", "os.link", "os.rename", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rmdir", "os.utime")


def count(run: str) -> Counter[str]:
    """From now on operations below a folder are counted."""
    found: Counter[str] = Counter()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        # shutil.rmtree names what it removes by a descriptor of its folder.
        if event in EVENTS and (str(arguments[0]).startswith(run) or event in ("os.remove", "os.rmdir")):
            found[event] += 1

    def pause(seconds: float) -> None:
        found["pause"] += 1
        time.sleep(seconds)

    sharing.time = SimpleNamespace(sleep=pause)  # type: ignore[assignment]
    sys.addaudithook(hook)
    return found


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.read()
    counts = count(os.path.abspath(sys.argv[1]))
    driver.main()
    print(json.dumps(counts), flush=True)
