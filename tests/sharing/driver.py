"""A worker on light units, started as a process of its own: ``python -m tests.sharing.driver RUN UNITS [key=value …]``.

Unit n is a file of counted random numbers, so that its bytes are a function of n; ``seconds`` is how long it takes.
``stop=n`` suspends the process in unit n, ``stop=PATTERN`` in the moment before a file of that name is published.
``beside=NAME`` is a file of the run that whoever finishes the artifact writes after its manifest.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from distill.errors import GuardError
from distill.files import digest, write_atomic
from distill.progress import Progress
from distill.randomness import generator
from distill.run_folder import Artifact, Recipe
from distill.sharing import Sharing, Worker

KIND = "labels"


def names(count: int) -> list[str]:
    """The files of the units."""
    return [f"unit_{number:04d}.bin" for number in range(count)]


def artifact(run: Path, count: int) -> Artifact:
    """What the workers make."""
    return Artifact(run / KIND, KIND, Recipe({"units": count}))


def content(number: int, key: str = "") -> bytes:
    """The bytes of a unit; another key stands for hardware that computes otherwise."""
    return generator(0, f"unit{key}", number).integers(0, 256, 30_000, np.uint8).tobytes()


def suspend() -> None:
    """Stand still until somebody sends SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def suspend_before(pattern: str) -> None:
    """Stand still once, when a file is written and about to be linked or renamed to what matches the pattern."""
    waiting = [pattern]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if waiting and event in ("os.link", "os.rename") and Path(str(arguments[1])).match(pattern):
            waiting.clear()
            suspend()

    sys.addaudithook(hook)


def main() -> None:
    """Work until the artifact is complete, or until nothing is free with ``wait=0``."""
    run, count = Path(sys.argv[1]), int(sys.argv[2])
    given = {"seconds": "0", "lease": "120", "wait": "1", "key": "", "hardware": "CPU", "stop": "", "beside": ""}
    given |= dict(text.split("=", 1) for text in sys.argv[3:])
    if given["stop"] and not given["stop"].isdecimal():
        suspend_before(given["stop"])
    made = artifact(run, count)
    made.begin(alone=False)
    recipe = digest(made.recipe.as_json())
    with Worker(run, KIND, recipe, lease=float(given["lease"]), hardware=given["hardware"]) as worker:
        print(worker.id, flush=True)

        def make(number: int, path: Path, progress: Progress) -> None:
            ends = time.monotonic() + float(given["seconds"])
            if given["stop"] == str(number):
                suspend()
            while time.monotonic() < ends:
                time.sleep(0.002)
            write_atomic(path, content(number, given["key"]))
            progress.update()

        def finish() -> None:
            seen = [hashlib.sha256((made.folder / name).read_bytes()).hexdigest() for name in names(count)]
            made.finish(units=names(count), seen=seen)
            for path in beside:
                write_atomic(path, "made beside it")

        beside = [run / given["beside"]] if given["beside"] else []
        sharing = Sharing(run, made, worker, wait=given["wait"] == "1", quiet=True, beside=beside)
        sharing.work(names(count), make, finish, "test")


if __name__ == "__main__":
    try:
        main()
    except GuardError as error:
        sys.exit(f"guard: {error}")
