"""Slurm through submitit: one job, or one array, for each node of the graph; and what Slurm says of them."""

from __future__ import annotations

import getpass
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from distill.config_cluster import ClusterConfig
from distill.errors import GuardError
from launchers.graph import Job
from launchers.job import STOPPED_TOO_OFTEN, StageJob
from launchers.ledger import ATTEMPTS, CODE, Launch

NO_SRUN = (
    "There is no srun here: is this a machine of a Slurm cluster? cluster=local runs the same jobs on this machine."
)


class _Executor(SlurmExecutor):
    """submitit's executor; ``--dry-run`` works on machines without Slurm too."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def executor(job: Job, launch: Launch, logs: Path, dependency: str) -> SlurmExecutor:
    """An executor with the parameters of one node of the graph."""
    cluster = job.configs[0].cluster
    made = _Executor(logs, max_num_timeout=cluster.requeues + 1, python=cluster.python or None)
    made.update_parameters(**_parameters(job, launch, cluster, dependency))
    return made


def _parameters(job: Job, launch: Launch, cluster: ClusterConfig, dependency: str) -> dict[str, Any]:
    asked = job.resources
    more: dict[str, Any] = {"requeue": True, **cluster.options}
    if dependency:
        more |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    parameters = {
        "job_name": f"guard-{launch.folder.parent.parent.name}-{job.key.replace('/', '-')}",
        "comment": launch.label,
        "time": asked.minutes,
        "nodes": job.nodes,
        "ntasks_per_node": job.tasks,
        "cpus_per_task": asked.cpus,
        "gpus_per_node": asked.gpus or None,
        "mem": f"{asked.memory * 1024:.0f}MB" if asked.memory else None,
        "partition": asked.partition or cluster.partition or None,
        "account": cluster.account or None,
        "qos": cluster.qos or None,
        "constraint": cluster.constraint or None,
        "signal_delay_s": cluster.notice,
        "array_parallelism": cluster.parallel,
        "stderr_to_stdout": True,
        "setup": _setup(job, launch, cluster),
        "srun_args": _srun_arguments(cluster),
        "additional_parameters": more,
    }
    return {"wckey": None, **{name: value for name, value in parameters.items() if value is not None}}


def _setup(job: Job, launch: Launch, cluster: ClusterConfig) -> list[str]:
    code, logs = (launch.folder / CODE).resolve(), (launch.folder / launch.entry(job.key).logs).resolve()
    number = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    return [
        *cluster.setup,
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        # The folder in which it was submitted must not come first, as it does for python -m.
        "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
        # Since Slurm 22.05 srun does not take this over from the job by itself.
        f"export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS={job.resources.cpus}",
        f"guard_attempts={shlex.quote(str(logs))}/{number}_{ATTEMPTS}",
        *_trying_again(cluster.retry).splitlines(),
    ]


def _trying_again(retry: int) -> str:
    """A shell function in the place of srun that tries again what dies.

    It is inside the job because a job that has failed would keep those that wait for it from ever running.
    """
    return f"""\
# 0: done; 2: wrong configuration; {STOPPED_TOO_OFTEN}: stopped too often; 75: stopped, and Slurm soon ends this job.
srun() {{
  local code attempt
  for attempt in $(seq 0 {retry}); do
    echo "$(date +%s) start ${{SLURM_RESTART_COUNT:-0}} ${{SLURM_JOB_NODELIST:-}}" >> "$guard_attempts"
    command srun "$@"; code=$?
    echo "$(date +%s) exit $code" >> "$guard_attempts"
    case $code in 0|2|{STOPPED_TOO_OFTEN}) break ;; 75) sleep 60 & wait $! ;; esac
  done
  return $code
}}
trap 'exit 143' TERM"""


def _srun_arguments(cluster: ClusterConfig) -> list[str]:
    arguments = ["--kill-on-bad-exit=1", *cluster.srun_args]
    if cluster.container:
        arguments.append(f"--container-image={cluster.container}")
    if cluster.container_mounts:
        arguments.append(f"--container-mounts={','.join(cluster.container_mounts)}")
    return arguments


def script(job: Job, launch: Launch) -> str:
    """The sbatch script of one node of the graph, as ``--dry-run`` shows it: what it waits for has no number yet."""
    made = executor(job, launch, launch.folder / launch.entry(job.key).logs, "")
    if job.workers > 1:
        made.parameters["map_count"] = job.workers
    return made._make_submission_file_text(made._submitit_command_str, "")


def submit(job: Job, work: StageJob, launch: Launch) -> list[str]:
    """Submit one node of the graph; what it waits for has been submitted.

    Returns:
        The ids of its jobs.

    Raises:
        GuardError: Slurm refuses it.
    """
    entry = launch.entry(job.key)
    waits = sorted({each.split("_")[0] for key in job.after for each in launch.entry(key).ids})
    dependency = f"afterok:{':'.join(waits)}" if waits else ""
    try:
        jobs = executor(job, launch, launch.folder / entry.logs, dependency).submit_array([work] * job.workers)
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as error:
        raise GuardError(f"Slurm does not take {job.key}: {' '.join(str(error).split())}") from error
    return [each.job_id for each in jobs]


def check_there() -> None:
    """Raises GuardError on a machine without Slurm."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise GuardError(NO_SRUN)


@dataclass(frozen=True)
class Queued:
    """A job in Slurm's queue: its state, why it waits, its nodes, and how long it runs."""

    state: str
    reason: str
    nodes: str
    elapsed: str


def queue(label: str) -> dict[str, Queued]:
    """The jobs of a launch that are pending or at work: id → what Slurm says of it.

    Raises:
        GuardError: Slurm does not answer.
    """
    form = "%i|%T|%r|%N|%M|%k"
    answer = _ask("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", f"--format={form}")
    found = {}
    for line in answer.splitlines():
        number, state, reason, nodes, elapsed, comment = line.split("|", 5)
        if comment == label:
            found[number] = Queued(state, reason, nodes, elapsed)
    return found


def account(ids: Sequence[str]) -> dict[str, str]:
    """The last state of jobs by Slurm's accounting; empty where there is none."""
    if not ids or shutil.which("sacct") is None:
        return {}
    wanted = ",".join(sorted({each.split("_")[0] for each in ids}))
    try:
        answer = _ask("sacct", "-X", "--noheader", "--parsable2", f"--jobs={wanted}", "--format=JobID,State")
    except GuardError:
        return {}
    return {number: state for number, _, state in (line.partition("|") for line in answer.splitlines())}


def cancel(label: str) -> list[str]:
    """Cancel every job of a launch; returns their ids.

    Raises:
        GuardError: Slurm does not answer, or refuses.
    """
    ids = sorted(queue(label))
    if ids:
        _ask("scancel", *ids)
    return ids


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    except FileNotFoundError as error:
        raise GuardError(NO_SRUN.replace("srun", command[0])) from error
    except subprocess.CalledProcessError as error:
        raise GuardError(f"{command[0]} failed: {' '.join(error.stderr.split())}") from error
    except subprocess.TimeoutExpired as error:
        raise GuardError(f"{command[0]} has not answered for two minutes; try again later.") from error
