"""The graph of jobs on this machine, through submitit's local executor: one node after the other."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from submitit import LocalExecutor
from submitit.local.local import LocalJob

from distill.errors import SIGNALS, ConfigError, GuardError, Preempted
from launchers.graph import Job
from launchers.job import StageJob
from launchers.ledger import ATTEMPTS, CODE, Launch
from launchers.torchrun import children

POLL = 0.3
"""Seconds between two looks at the processes."""


def check_gpus(jobs: Sequence[Job]) -> None:
    """Raises ConfigError when the workers of a job ask for more GPUs at a time than CUDA_VISIBLE_DEVICES lists."""
    visible = _visible_gpus()
    for job in jobs:
        together = min(job.workers, job.configs[0].cluster.parallel)
        if visible is not None and together * job.resources.gpus > len(visible):
            raise ConfigError(
                f"{job.key} asks for {together} x {job.resources.gpus} GPUs, and "
                f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} lists {len(visible)}; lower "
                f"cluster.{job.stage}.gpus, the workers or cluster.parallel, or list more."
            )


def run_graph(jobs: Sequence[Job], works: Mapping[str, StageJob], launch: Launch) -> None:
    """Run every node of the graph, in order; the workers of one at the same time, ``cluster.parallel`` at most.

    Raises:
        GuardError: a node has failed; what waits for it did not run, and what does not wait for it did.
        Preempted: after SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C; the processes were told so too.
    """
    failed: list[str] = []
    launch.state = "running"
    with _told() as stop:
        for job in jobs:
            if not any(key in failed for key in job.after) and _Node(job, works[job.key], launch, stop).run():
                print(f"{job.key}: done", flush=True)
                continue
            failed.append(job.key)
            if stop:
                launch.state = "cancelled"
                launch.write()
                raise Preempted
            why = next((f" does not run, for {key} has failed" for key in job.after if key in failed), " has failed")
            print(f"{job.key}:{why}", flush=True)
    launch.state = "failed" if failed else "done"
    launch.write()
    if failed:
        raise GuardError(f"{failed[0]} has failed; its logs: {launch.folder / launch.entry(failed[0]).logs}.")


class _Node:
    """One node of the graph: its workers, each tried ``cluster.retry`` times more than once."""

    def __init__(self, job: Job, work: StageJob, launch: Launch, stop: list[int]):
        self.job, self.work, self.launch, self.stop = job, work, launch, stop
        self.cluster = job.configs[0].cluster
        self.logs = launch.folder / launch.entry(job.key).logs
        self.running: dict[int, LocalJob[None]] = {}

    def run(self) -> bool:
        """Whether all workers have succeeded."""
        waiting, tries, good = list(range(self.job.workers)), [0] * self.job.workers, True
        while waiting or self.running:
            while waiting and len(self.running) < self.cluster.parallel and not self.stop:
                worker = waiting.pop(0)
                self.running[worker] = self._start(worker, self._free_slot())
            for worker, process in list(self.running.items()):
                if not process.done():
                    continue
                del self.running[worker]
                success = all(task.paths.result_pickle.exists() for task in process._sub_jobs or [process])
                self._note(process, f"exit {int(not success)}")
                tries[worker] += 1
                if not success and tries[worker] <= self.cluster.retry and not self.stop:
                    waiting.append(worker)
                else:
                    good &= success
            if self.stop:
                # What has not begun by now is not done.
                good &= not waiting
                waiting.clear()
                self._pass_on()
            time.sleep(POLL)
        return good

    def _free_slot(self) -> int:
        taken = {getattr(process, "slot", -1) for process in self.running.values()}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _start(self, worker: int, slot: int) -> LocalJob[None]:
        asked = self.job.resources
        executor = LocalExecutor(
            self.logs, max_num_timeout=self.cluster.requeues + 1, python=self.cluster.python or None
        )
        executor.update_parameters(
            timeout_min=asked.minutes,
            tasks_per_node=self.job.tasks,
            gpus_per_node=asked.gpus,
            signal_delay_s=self.cluster.notice,
            stderr_to_stdout=True,
            setup=self.cluster.setup,
        )
        # Not by update_parameters, which takes numbers alone: GPUs have UUIDs too.
        executor.parameters["visible_gpus"] = _gpus_of(slot, asked.gpus)
        with _environment(self.launch.folder / CODE, asked.cpus):
            process = executor.submit(self.work)
        assert isinstance(process, LocalJob)
        process.slot = slot  # type: ignore[attr-defined]
        # In the place of the one that has failed, if any.
        self.launch.entry(self.job.key).ids[worker : worker + 1] = [process.job_id]
        self.launch.write()
        self._note(process, f"start 0 {socket.gethostname()}")
        return process

    def _note(self, process: LocalJob[None], text: str) -> None:
        with open(self.logs / f"{process.job_id}_{ATTEMPTS}", "a") as file:
            file.write(f"{time.time():.0f} {text}\n")

    def _pass_on(self) -> None:
        """Tell the processes to save and stop; with setup lines there is a shell before them."""
        for process in self.running.values():
            for each in [int(process.job_id), *children(int(process.job_id))]:
                if each != int(process.job_id) or not self.cluster.setup:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, signal.SIGTERM)


def _visible_gpus() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES lists; None where it is not set. For CUDA the list ends before an entry of no GPU."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return None
    names = [name.strip() for name in listed.split(",")]
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))


def _gpus_of(slot: int, count: int) -> tuple[str, ...]:
    """The GPUs of the worker in a slot, as CUDA_VISIBLE_DEVICES names them."""
    visible, first = _visible_gpus(), slot * count
    if visible is None:
        return tuple(map(str, range(first, first + count)))
    return tuple(visible[first : first + count])


@contextlib.contextmanager
def _told() -> Iterator[list[int]]:
    """Inside the block, the signals that ask to stop are collected in a list."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in (*SIGNALS, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(code: Path, threads: int) -> Iterator[None]:
    """The variables of a job's processes, which inherit them."""
    paths = [str(code.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    # The present folder must not come before the copy of the code, as it does for python -m.
    wanted |= {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
