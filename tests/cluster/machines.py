"""Machines of a test cluster: names of their own and processes of their own, on the machine that runs the tests.

Each has its own mount, host name and process id namespaces, and the network of all. Its first process is a shell that
takes commands through a pipe: when the tests end in whatever way, the pipe closes, the shell ends, and with it, by the
rules of a process id namespace, everything that ever was started there.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

NAMESPACES = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]


class Machine:
    """One machine; ``hosts`` takes the place of its ``/etc/hosts``, ``log`` is what its programs print."""

    def __init__(self, name: str, hosts: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        self._commands, outside = os.pipe()
        self._pipe = os.fdopen(outside, "w")
        with log.open("a") as output:
            self._outer = subprocess.Popen(
                [*NAMESPACES, "bash", "-s"],
                stdin=self._commands,
                stdout=output,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
            )
        os.close(self._commands)
        place = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts && hostname {name}"
        self._say(f"{place} && touch {log}.up || exit 1")
        until(lambda: Path(f"{log}.up").exists() or self._outer.poll() is not None, 100, f"machine {name}")
        if self._outer.poll() is not None:
            raise RuntimeError(f"no namespaces for machine {name}: {log.read_text()}")
        self.init = children()[self._outer.pid][0]

    @property
    def ended(self) -> bool:
        """Whether its power was cut."""
        return self._outer.poll() is not None

    def start(self, *command: str) -> None:
        """Start a program that stays in the foreground."""
        self._say(f"{shlex.join(command)} </dev/null &")

    def processes(self, name: str | None = None) -> list[int]:
        """Ids, as the tests see them, of the programs that run there: all, or those of one name."""
        tree, found, left = children(), [], [self.init]
        while left:
            left = [child for each in left for child in tree.get(each, [])]
            found += left
        return [each for each in found if name is None or name_of(each) == name]

    def kill(self, name: str) -> None:
        """SIGKILL to every program of that name, and wait for their end."""
        gone = self.processes(name)
        for each in gone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        until(lambda: not set(gone) & set(self.processes(name)), 100, f"the end of {name}")

    def end(self) -> None:
        """Take the machine away, as a power cut would. Nothing of it is left when this returns."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self._outer.wait()
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()

    def _say(self, line: str) -> None:
        self._pipe.write(line + "\n")
        self._pipe.flush()


def children() -> dict[int, list[int]]:
    """Process id → ids of its children that run."""
    found: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name before it may hold spaces and brackets.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found.setdefault(int(parent), []).append(int(folder.name))
    return found


def name_of(process: int) -> str:
    """The name of a program that runs, or nothing."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return ""


def variables(process: int) -> dict[str, str]:
    """The environment that a process was started with."""
    with contextlib.suppress(OSError):
        pairs = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return {}


def until(ready: Callable[[], object], seconds: float, what: str, every: float = 0.05) -> None:
    """Wait until something is the case, and fail with its name when that takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds:.0f} s")
        time.sleep(every)


def run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command prints; when it fails, an error with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), timeout=60)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
