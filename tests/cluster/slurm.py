"""A real Slurm on one machine: munged, slurmctld and two nodes with slurmd, all below one temporary folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.cluster.configuration import NODES, write_configuration
from tests.cluster.machines import NAMESPACES, Machine, run, until, variables
from tests.cluster.scontrol import facts_of, name_of_job, state_of
from tests.running import free_port

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
HEAD = "head"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    if os.geteuid() != 0:
        return "a test cluster needs root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)}; make slurm installs what a test cluster needs"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    return f"a test cluster needs namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Slurm:
    """A cluster with nodes ``n1`` and ``n2`` of two CPUs each in the partition ``gpu``; as a context.

    The partition ``a100`` has 64 machines of 128 CPUs and 8 GPUs, for ``sbatch --test-only``. Clients are processes
    with ``environment``.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {
            **clean,
            "PATH": _path(),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PYTHONPATH": f"{ROOT}:{clean.get('PYTHONPATH', '')}".rstrip(":"),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.machines: dict[str, Machine] = {}

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException as error:
            error.add_note(self.logs())
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, *command: str) -> str:
        """What a client prints: ``run("squeue", "--states=all")``."""
        return run(command, self.environment)

    def jobs(self) -> dict[str, dict[str, str]]:
        """Job id (``7``, ``7_0``; ``7_[1-3]`` for tasks of an array that wait) → what ``scontrol show job`` says."""
        found = {}
        for line in self.run("scontrol", "show", "job", "--oneliner").splitlines():
            facts = facts_of(line)
            if "JobId" in facts:
                found[name_of_job(facts)] = facts
        return found

    def state(self, job: str) -> str:
        """State of a job or of one task of an array: PENDING, RUNNING, …; UNKNOWN when there is no such job."""
        return state_of(job, self.jobs())

    def wait(self, job: str, states: Iterable[str] | str = ENDED, seconds: float = 60) -> str:
        """Wait until a job is in one of some states (if nothing else is said: until it has ended); returns which."""
        wanted = {states} if isinstance(states, str) else set(states)
        try:
            until(lambda: self.state(job) in wanted, seconds, f"job {job} in {', '.join(sorted(wanted))}", every=0.2)
        except TimeoutError as error:
            error.add_note(self.report())
            raise
        return self.state(job)

    def test_only(self, *arguments: str) -> str:
        """When and where a script would run, as Slurm says; RuntimeError when it does not take the script."""
        words = ["sbatch", "--test-only", *arguments]
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, timeout=60)
        if done.returncode:
            raise RuntimeError(f"refused: {done.stderr.strip()}")
        return done.stderr

    def hurry(self, job: str) -> None:
        """Let a job start soon that Slurm holds back because it was requeued.

        Not within the same second: slurmd counts in whole ones, and takes a job that comes back that soon for the one
        that it has just ended ("already killed, do not launch batch job").
        """
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    def signal(self, job: str, name: str) -> None:
        """Let Slurm send a signal to all tasks of a job, as it does before it preempts."""
        self.run("scancel", f"--signal={name}", job)

    def tasks(self, job: str, rank: int | None = None) -> list[int]:
        """Ids of the processes of a job: those of one rank, or all that srun has started."""
        array, _, task = job.partition("_")
        wanted = {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {"SLURM_JOB_ID": job}
        if rank is not None:
            wanted["SLURM_PROCID"] = str(rank)
        running = [each for node in NODES for each in self.machines[node].processes()]
        found = {each: variables(each) for each in running}
        return [each for each, its in found.items() if "SLURM_STEP_ID" in its and wanted.items() <= its.items()]

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon of a node. Its jobs go on, until Slurm gives the node up after 15 s or the daemon is back."""
        self.machines[node].kill("slurmd")

    def start_slurmd(self, node: str) -> None:
        """Start the daemon of a node again, and wait until Slurm counts on it."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.machines[node].start("slurmd", "-D", "-N", node)
        until(lambda: self._ready(node, now), 100, f"slurmd of {node}", every=0.2)

    def cut_power(self, node: str) -> None:
        """End a node with everything that runs there."""
        self.machines[node].end()

    def restore_power(self, node: str) -> None:
        """Start a node whose power was cut."""
        self._boot(node)
        self.start_slurmd(node)

    def tidy(self) -> None:
        """Bring back what is missing, and end every job: one test must not disturb the next."""
        for node in NODES:
            if self.machines[node].ended:
                self.restore_power(node)
            elif not self.machines[node].processes("slurmd"):
                self.start_slurmd(node)
        self.run("scancel", "--user=root")
        until(lambda: not self.run("squeue", "--noheader").strip(), 100, "an empty queue", every=0.2)

    def report(self) -> str:
        """The queue and the nodes."""
        parts = []
        for command in (["squeue", "--states=all"], ["sinfo", "--Node", "--long"]):
            with contextlib.suppress(RuntimeError):
                parts.append(self.run(*command))
        return "\n".join(parts)

    def logs(self, last: int = 40) -> str:
        """The last lines of every daemon's log, and what was said before there were logs."""
        lines = []
        for log in sorted(self.folder.glob("*.log")):
            count = last if log.name.startswith("slurm") else 5
            lines += [f"== {log.name}", *log.read_text(errors="replace").splitlines()[-count:]]
        return "\n".join(lines)

    def _start(self) -> None:
        self.folder.chmod(0o755)
        own = Path("/etc/hosts").read_text().rstrip()
        (self.folder / "hosts").write_text(f"{own}\n127.0.0.1 {' '.join((HEAD, *NODES))}\n")
        port, *ports = (int(free_port()) for _ in range(3))
        write_configuration(self.folder, port, ports)
        for name in (HEAD, *NODES):
            self._boot(name)
        head = self.machines[HEAD]
        files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log", "pid-file": "munged.pid"}
        places = [f"--{option}={self.folder / name}" for option, name in {**files, "seed-file": "munge.seed"}.items()]
        head.start("munged", "--foreground", *places)
        until((self.folder / "munge.socket").exists, 100, "munged")
        head.start("slurmctld", "-D", "-i")
        until(self._answers, 100, "slurmctld", every=0.2)
        for node in NODES:
            self.start_slurmd(node)

    def _boot(self, name: str) -> None:
        log = self.folder / f"{name}.log"
        Path(f"{log}.up").unlink(missing_ok=True)
        self.machines[name] = Machine(name, self.folder / "hosts", log, self.environment)

    def _answers(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return "is UP" in self.run("scontrol", "ping")
        return False

    def _ready(self, node: str, since: str) -> bool:
        facts = facts_of(self.run("scontrol", "show", "node", node, "--oneliner"))
        free = facts["State"].split("+")[0] in ("IDLE", "MIXED", "ALLOCATED") and "+" not in facts["State"]
        return free and facts["SlurmdStartTime"] >= since

    def _end(self) -> None:
        for machine in self.machines.values():
            machine.end()
        shutil.rmtree(self.folder)


def _path() -> str:
    """Debian keeps daemons where only root's shells look."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
