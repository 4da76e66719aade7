"""Workers that are started, stopped and killed, and what must be left of their work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.files import file_digest, listed
from tests.running import environment
from tests.sharing.driver import KIND, content, names

ROOT = Path(__file__).resolve().parents[2]


class Crew:
    """Light workers on one run; a context manager that ends those that are still there.

    Args:
        run: the run folder.
        count: number of units.
    """

    def __init__(self, run: Path, count: int):
        self.run, self.count = run, count
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                kill(process)
            process.communicate()

    def start(
        self, *options: str, before: Sequence[str] = (), module: str = "tests.sharing.driver", **more: str
    ) -> subprocess.Popen[str]:
        """Start a worker.

        Args:
            options: of the driver.
            before: a command that starts it in surroundings of its own.
            more: environment variables.
        """
        process = subprocess.Popen(
            [*before, sys.executable, "-m", module, str(self.run), str(self.count), *options],
            cwd=ROOT,
            env={**environment(), **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    @staticmethod
    def suspended(process: subprocess.Popen[str], seconds: float = 100.0) -> None:
        """Wait until a worker has suspended itself: only then does it write nothing, and SIGCONT not come too early.

        A path that it made before says neither.
        """
        ends = time.monotonic() + seconds
        while os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < ends, "the worker did not come to its stop"
            time.sleep(0.005)

    def wait_for(self, name: str, seconds: float = 100.0) -> None:
        """Wait until a path below the run matches a pattern."""
        ends = time.monotonic() + seconds
        while not list(self.run.glob(name)):
            assert time.monotonic() < ends, f"{name} did not come"
            time.sleep(0.005)

    def records(self) -> list[dict[str, Any]]:
        """The records of all workers, in the order of their start."""
        found = [json.loads(path.read_text()) for path in (self.run / "workers").glob(f"{KIND}-*.json")]
        return sorted(found, key=lambda record: record["started"])

    def made(self, result: str = "published") -> list[str]:
        """The units that are noted with a result, by all workers together."""
        return sorted(each["unit"] for record in self.records() for each in record["units"] if each["result"] == result)

    def check(self, twice: int = 0) -> None:
        """Assert that the artifact is complete, every unit once and whole, and nothing is left beside them.

        Args:
            twice: units that were removed by hand and made again.
        """
        folder, expected = self.run / KIND, names(self.count)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["units"] == expected
        assert sorted(manifest["files"]) == expected
        for number, name in enumerate(expected):
            assert (folder / name).read_bytes() == content(number)
            assert manifest["files"][name]["sha256"] == file_digest(folder / name)
        assert listed(folder) == {*expected, "manifest.json", "recipe.json"}
        workers = listed(self.run / "workers")
        # One that was killed before its first record was there leaves that until its lease is over.
        passing = {name.removeprefix(".").partition(".json.")[0] for name in workers if name.endswith(".tmp")}
        assert [name for name in passing if f"{name}.json" in workers] == []
        made = self.made()
        assert len(made) == len(set(made)) + twice, "one publication of each unit"


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the whole group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str]:
    """Wait for a worker; its exit code and what it said on stderr."""
    said = process.communicate(timeout=seconds)[1]
    return process.returncode, said
