"""``guard status``, ``guard logs`` and ``guard cancel`` for runs that were launched."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from pathlib import Path

from distill.errors import ArtifactError, GuardError
from launchers.ledger import Launch, latest_launch
from launchers.states import Node, log_files, nodes, tail


def describe(run: Path) -> str:
    """The jobs of the latest launch of a run, as text; empty where there was none.

    Raises:
        ArtifactError: what was written down of it is damaged.
    """
    launch = latest_launch(run)
    if launch is None:
        return ""
    found, remark = nodes(launch)
    state = "ended without a word" if launch.abandoned else launch.state
    lines = [f"  launch {launch.folder.name} on {launch.cluster}, {launch.started}, {state}"]
    if remark:
        lines.append(f"    {remark}")
    width = max((len(node.entry.key) for node in found), default=0)
    for node in found:
        lines.append(f"    {node.entry.key:{width}}  {_line(node)}".rstrip())
    return "\n".join(lines)


def _line(node: Node) -> str:
    """For instance: running  3 done, 2 running, 1 pending  job 12_4 on n1 for 0:31."""
    counts = Counter(task.state for task in node.tasks)
    several = ", ".join(f"{count} {state}" for state, count in counts.items()) if len(node.tasks) > 1 else ""
    at_work = [task for task in node.tasks if task.state in ("running", "pending")]
    details = "; ".join(f"job {task.id} {task.text}" for task in at_work[:4]) + ("; …" if len(at_work) > 4 else "")
    waits = f"waits for {', '.join(node.entry.after)}" if node.state == "pending" and node.entry.after else ""
    return "  ".join(filter(None, (node.state, several, node.why or details, waits if not node.why else "")))


def logs(run: Path, stage: str | None, lines: int) -> str:
    """The last lines of every log of the latest launch, or of one stage.

    Args:
        stage: name of a stage, or the key of a job with the arm before it.

    Raises:
        ArtifactError: the run was not launched, or has no such job.
    """
    launch = _launched(run)
    wanted = [each for each in launch.jobs if stage in (None, each.stage, each.key)]
    if not wanted:
        known = ", ".join(each.key for each in launch.jobs)
        raise ArtifactError(f"{stage} is not a job of launch {launch.folder.name} of {run}, which has: {known}.")
    shown = []
    for entry in wanted:
        paths = log_files(launch, entry)
        if not paths:
            shown.append(f"==> {entry.key}: no log yet")
        for path in paths:
            shown += [f"==> {entry.key}: {path}", *tail(path, lines)]
    return "\n".join(shown)


def cancel(run: Path) -> str:
    """End every job of the latest launch; what is done is kept. Returns what was done, in one sentence.

    Raises:
        ArtifactError: the run was not launched.
        GuardError: Slurm does not answer, or a local launch is of another machine.
    """
    launch = _launched(run)
    if launch.executor == "slurm":
        from launchers.slurm import cancel as cancel_jobs

        ids = cancel_jobs(launch.label)
        what = f"cancelled {len(ids)} jobs" if ids else ""
        launch.state = "cancelled"
        if ids:
            launch.write()
    else:
        # The process that runs the graph writes down that it was cancelled.
        what = _stop_driver(launch)
    if not what:
        return f"{run}: no job of launch {launch.folder.name} is left."
    return f"{run}: {what} of launch {launch.folder.name}; what is done is kept, and guard launch goes on with it."


def _stop_driver(launch: Launch) -> str:
    if launch.host != socket.gethostname():
        raise GuardError(f"{launch.folder} was launched on {launch.host}; cancel it there.")
    if not launch.alive:
        return ""
    os.kill(launch.driver[0], signal.SIGTERM)
    return f"told process {launch.driver[0]} and the processes"


def _launched(run: Path) -> Launch:
    launch = latest_launch(run)
    if launch is None and not run.is_dir():
        raise ArtifactError(f"The run folder {run} does not exist.")
    if launch is None:
        raise ArtifactError(f"{run} was not launched: it holds no launch folder.")
    return launch
