"""What has become of the jobs of a launch, from their files and, where it answers, from Slurm."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.errors import GuardError, Preempted
from distill.files import listed
from distill.sharing.host import process_start
from distill.sharing.status import duration
from launchers.ledger import ATTEMPTS, Entry, Launch

ERRORS = ("guard: ", "Error", "oom", "Killed", "CANCELLED", "error: ")
"""What a line holds that says why something has failed; what comes first says it best."""
TAIL = 16384


@dataclass(frozen=True)
class Task:
    """One job of a node of the graph.

    Attributes:
        id: its number.
        state: pending, running, done, failed, stopped (to be continued), cancelled, or lost.
        text: why it waits, where it runs and for how long, or how it has ended.
        tries: how often its work has begun.
    """

    id: str
    state: str
    text: str = ""
    tries: int = 0


@dataclass(frozen=True)
class Node:
    """One node of the graph of a launch, with its jobs, its state, and why."""

    entry: Entry
    tasks: Sequence[Task]
    state: str
    why: str = ""


def nodes(launch: Launch) -> tuple[list[Node], str]:
    """The state of every node, and what must be said of Slurm, if it does not answer."""
    queued: Mapping[str, object] | None = {}
    past: dict[str, str] = {}
    remark = ""
    if launch.executor == "slurm":
        from launchers.slurm import account, queue

        try:
            queued = queue(launch.label)
            past = account([each for entry in launch.jobs for each in entry.ids if each not in queued])
        except GuardError as error:
            queued, remark = None, f"{error} What follows is from the files alone."
    found: dict[str, Node] = {}
    for entry in launch.jobs:
        tasks = [_task(launch, entry, number, queued, past) for number in entry.ids]
        found[entry.key] = _node(launch, entry, tasks, found)
    return list(found.values()), remark


def _node(launch: Launch, entry: Entry, tasks: Sequence[Task], before: Mapping[str, Node]) -> Node:
    states = {task.state for task in tasks}
    broken = next((key for key in entry.after if key in before and before[key].state in ("failed", "cancelled")), None)
    if "failed" in states:
        failed = next(task for task in tasks if task.state == "failed")
        return Node(entry, tasks, "failed", f"job {failed.id} {failed.text}{_last_error(launch, entry, failed)}")
    if "running" in states:
        return Node(entry, tasks, "running")
    if states == {"done"}:
        return Node(entry, tasks, "done")
    if broken is not None and not states & {"done", "stopped"}:
        return Node(entry, tasks, "cancelled", f"it needs {broken}, which {_past(before[broken].state)}")
    if "pending" in states:
        return Node(entry, tasks, "pending")
    if launch.state == "cancelled" or "cancelled" in states:
        return Node(entry, tasks, "cancelled", "by guard cancel" if launch.state == "cancelled" else "")
    if not tasks:
        waits = launch.alive
        return Node(entry, tasks, "pending" if waits else "cancelled", "" if waits else "it was not submitted")
    gone = next((task for task in tasks if task.state not in ("done",)), tasks[0])
    return Node(entry, tasks, "failed", f"job {gone.id} {gone.text}{_last_error(launch, entry, gone)}")


def _past(state: str) -> str:
    return "has failed" if state == "failed" else "was cancelled"


def _task(
    launch: Launch, entry: Entry, number: str, queued: Mapping[str, object] | None, past: Mapping[str, str]
) -> Task:
    from launchers.slurm import Queued

    lines = _attempts(launch.folder / entry.logs / f"{number}_{ATTEMPTS}")
    tries = sum(words[1] == "start" for words in lines)
    last = lines[-1] if lines else []
    code = int(last[2]) if len(last) > 2 and last[1] == "exit" else None
    known = queued.get(number) if queued else None
    if isinstance(known, Queued):
        if known.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
            again = f", begun {tries} times" if tries > 1 else ", begun once" if tries else ""
            return Task(number, "pending", f"{known.reason}{again}", tries)
        return Task(number, "running", f"on {known.nodes or '?'} for {known.elapsed}", tries)
    if code == 0:
        return Task(number, "done", "", tries)
    if code is not None:
        state = "stopped" if code == Preempted.exit_code else "failed"
        often = "once" if tries == 1 else f"{tries} times"
        return Task(number, state, f"ended with exit code {code}, tried {often}", tries)
    if last and (queued is None or launch.executor == "local") and not _left_alone(launch, number):
        return Task(number, "running", f"for {duration(max(time.time() - float(last[0]), 0))}", tries)
    ended = past.get(number, "")
    if ended.startswith("CANCELLED") or (not last and launch.state == "cancelled"):
        return Task(number, "cancelled", ended or "CANCELLED", tries)
    if last:
        return Task(number, "lost", f"ended without a word{f': {ended}' if ended else ''}", tries)
    if queued is None:
        return Task(number, "pending", "not begun", tries)
    return Task(number, "cancelled", ended or "it has left the queue before it began", tries)


def _left_alone(launch: Launch, number: str) -> bool:
    """Whether the process of a job is gone, and so is the launch that would have noted how it ended."""
    return launch.abandoned and process_start(int(number)) is None


def _attempts(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return [words for words in (line.split() for line in lines) if len(words) >= 2]


def log_files(launch: Launch, entry: Entry) -> list[Path]:
    """The logs of a node, in the order of its jobs and ranks."""
    folder = launch.folder / entry.logs
    names = [name for name in listed(folder) if name.endswith("_log.out")]
    numbers = lambda name: [int(part) for part in name.removesuffix("_log.out").split("_") if part.isdecimal()]  # noqa: E731
    return [folder / name for name in sorted(names, key=numbers)]


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; of a line that was drawn over itself, as progress is, what it showed in the end."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(file.tell() - TAIL * max(lines // 50, 1), 0))
        text = file.read().decode(errors="replace")
    shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in shown if line][-lines:]


def _last_error(launch: Launch, entry: Entry, task: Task) -> str:
    """The last line that says why a job has failed, with its log."""
    # Of one that could not say it itself Slurm has: JOB 12 ON n1 CANCELLED AT … DUE TO TIME LIMIT.
    marks = ("CANCELLED AT", *ERRORS) if task.state == "lost" else ERRORS
    for path in reversed([path for path in log_files(launch, entry) if path.name.startswith(f"{task.id}_")]):
        lines = tail(path, 60)
        for mark in marks:
            if found := [line for line in lines if mark in line]:
                return f": {found[-1]} ({path})"
    return ""
