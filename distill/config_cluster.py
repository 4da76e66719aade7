"""The typed schema of ``guard launch``: a cluster, and what the jobs of each stage ask it for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distill.option import option


@dataclass
class JobConfig:
    """What one job asks for."""

    gpus: int = option(0, "GPUs on each node of a job", low=0, result=False)
    cpus: int = option(
        1, "CPU cores of each process, and its threads unless threads=… says otherwise", low=1, result=False
    )
    memory: float = option(0.0, "memory on each node; 0 leaves it to Slurm", unit="GiB", low=0, result=False)
    minutes: int = option(
        60,
        "time limit of a job; one that needs longer is saved, requeued and goes on",
        unit="minutes",
        low=1,
        result=False,
    )
    partition: str = option("", "partition of this stage; cluster.partition when empty", result=False)


@dataclass
class RanksConfig(JobConfig):
    """A job of several processes that train together."""

    nodes: int = option(1, "nodes", low=1, result=False)
    tasks: int = option(1, "processes on each node, one for each GPU where there are some", low=1, result=False)


@dataclass
class WorkersConfig(JobConfig):
    """An array of jobs that share the units of a stage."""

    workers: int = option(1, "jobs of the array, never more than there are units", low=1, result=False)


@dataclass
class StudentsConfig(JobConfig):
    """An array of jobs that share the students of a run, and their tests."""

    workers: int = option(0, "jobs of the array; 0: one for each student", low=0, result=False)


@dataclass
class ClusterConfig:
    """Where ``guard launch`` runs the stages, as one graph of jobs."""

    name: str = option("", "name of the cluster, for people", result=False)
    executor: str = option(
        "local", "jobs of Slurm, or processes of this machine", choices=("slurm", "local"), result=False
    )
    partition: str = option("", "Slurm partition; its default when empty", result=False)
    account: str = option("", "Slurm account", result=False)
    qos: str = option("", "Slurm quality of service", result=False)
    constraint: str = option("", "features that nodes must have", result=False)
    options: dict[str, Any] = option({}, "further options of sbatch: name → value, true for one without", result=False)
    setup: list[str] = option([], "shell lines before the work of every job: modules, variables", result=False)
    srun_args: list[str] = option([], "further arguments of srun", result=False)
    container: str = option("", "image of a container, for srun --container-image (pyxis)", result=False)
    container_mounts: list[str] = option(
        [],
        "SOURCE:TARGET for srun --container-mounts; the folders of run, data and code must be among them",
        result=False,
    )
    python: str = option("", "interpreter of the jobs; that of guard launch when empty", result=False)
    parallel: int = option(256, "jobs of an array that run at the same time", low=1, result=False)
    notice: int = option(
        120,
        "a job is told so long before its time limit, to save and be requeued; Slurm may do so up to a minute earlier",
        unit="seconds",
        low=10,
        result=False,
    )
    requeues: int = option(
        20, "preemptions and time-outs of one job together, after which it is not requeued", low=0, result=False
    )
    retry: int = option(
        2, "so often a job that fails for another reason is tried again, inside the job", low=0, result=False
    )
    prepare: JobConfig = field(default_factory=JobConfig)
    squeeze: RanksConfig = field(default_factory=RanksConfig)
    recover: WorkersConfig = field(default_factory=WorkersConfig)
    relabel: WorkersConfig = field(default_factory=WorkersConfig)
    evaluate: StudentsConfig = field(default_factory=StudentsConfig)
    report: JobConfig = field(default_factory=JobConfig)
