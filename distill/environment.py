"""Who this process is among those of a run: what torchrun, Slurm or nobody says in environment variables.

The only place that reads them. submitit's ``TorchDistributedEnvironment.export`` speaks torchrun's language.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distill.errors import ConfigError

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PORTS = range(20000, 30000)
"""Below the ports that Linux gives to connections (32768 and up) and Debian's services leave them free."""
PSEUDO_STEPS = 0xFFFFFFF0
"""From here on Slurm numbers what is no step of srun: batch scripts and interactive shells."""


@dataclass(frozen=True)
class Environment:
    """One process among those of a run.

    Attributes:
        kind: who started it: ``torchrun`` or another that sets RANK, ``slurm`` for one of several tasks of srun.
        rank: 0 … world_size − 1.
        local_rank: the same among the processes of this machine.
        local_world_size: processes on this machine.
        master_address: host of rank 0; None for one process.
        master_port: where rank 0 listens there; None for one process.
        own_gpu: Slurm lets this process see its own GPUs only, so that its first one is cuda:0.
    """

    kind: Literal["torchrun", "slurm", "single"] = "single"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_address: str | None = None
    master_port: int | None = None
    own_gpu: bool = False


def detect(environ: Mapping[str, str] = os.environ) -> Environment:
    """Read the variables: RANK and its like first, then Slurm's, when srun has started several tasks.

    Raises:
        ConfigError: a variable is missing, no number or contradicts another.
    """
    given = [name for name in RANKS if name in environ]
    tasks = _tasks(environ)
    if given:
        return _from_ranks(environ, given, tasks)
    if tasks > 1:
        return _from_slurm(environ, tasks)
    return Environment(own_gpu=_own_gpu(environ))


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that tells people; so is one that does not know who it is."""
    try:
        return detect(environ).rank == 0
    except ConfigError:
        return True


def _from_ranks(environ: Mapping[str, str], given: list[str], tasks: int) -> Environment:
    missing = [name for name in RANKS if name not in environ]
    if missing:
        raise ConfigError(
            f"{_told(environ, *given)} without {' and '.join(missing)}; start with torchrun, which sets all of "
            f"{', '.join(RANKS)}, or unset {_these(given)}."
        )
    rank, world_size, local_rank = (_number(environ, name) for name in RANKS)
    if rank >= world_size:
        raise ConfigError(
            f"{_told(environ, 'RANK', 'WORLD_SIZE')}, and ranks count from 0 to WORLD_SIZE - 1; start with torchrun, "
            f"which sets them, or unset {_these(RANKS)}."
        )
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else local_rank + 1
    if not local_rank < local_world_size <= world_size:
        names = ["LOCAL_RANK", *(["LOCAL_WORLD_SIZE"] if "LOCAL_WORLD_SIZE" in environ else []), "WORLD_SIZE"]
        raise ConfigError(
            f"{_told(environ, *names)} cannot be: the processes of one machine are part of all; start with torchrun, "
            f"which sets them, or unset {_these([*RANKS, 'LOCAL_WORLD_SIZE'])}."
        )
    if tasks > 1:
        _agree_with_slurm(environ, rank, world_size, tasks)
    own_gpu = _own_gpu(environ)
    if world_size == 1:
        return Environment("torchrun", own_gpu=own_gpu)
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if absent:
        raise ConfigError(
            f"{_told(environ, 'WORLD_SIZE')} without {' and '.join(absent)}: the processes do not know where to meet; "
            f"start with torchrun, which sets them, or set them to a host and a free port of rank 0."
        )
    address, port = environ["MASTER_ADDR"], _port(environ)
    return Environment("torchrun", rank, world_size, local_rank, local_world_size, address, port, own_gpu)


def _agree_with_slurm(environ: Mapping[str, str], rank: int, world_size: int, tasks: int) -> None:
    """One torchrun for each task is right when they know each other, and so are ranks that are Slurm's own."""
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if environ.get("GROUP_WORLD_SIZE") == "1":
        raise ConfigError(
            f"{_told(environ, count)}, and torchrun has met no other (GROUP_WORLD_SIZE=1), so that every task works "
            f"on its own; use srun torchrun --nnodes={tasks} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT …, or "
            f"srun --ntasks=1."
        )
    if "GROUP_WORLD_SIZE" in environ:
        return
    task = _number(environ, "SLURM_PROCID")
    if world_size < tasks or (world_size == tasks and rank != task):
        raise ConfigError(
            f"{_told(environ, 'RANK', 'WORLD_SIZE')} contradict {_told(environ, 'SLURM_PROCID', count)}; unset "
            f"{_these(RANKS)}, for srun's tasks find each other without them, or start torchrun."
        )


def _from_slurm(environ: Mapping[str, str], tasks: int) -> Environment:
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environ]
    if missing:
        raise ConfigError(
            f"{_told(environ, 'SLURM_STEP_ID')} of {tasks} tasks without {' and '.join(missing)}; start with srun, "
            f"which sets them, or unset SLURM_STEP_ID to work alone."
        )
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    if rank >= tasks:
        raise ConfigError(
            f"{_told(environ, 'SLURM_PROCID')} is none of the {tasks} tasks of the step; start with srun, which sets "
            f"both, or unset SLURM_STEP_ID to work alone."
        )
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    address = environ.get("MASTER_ADDR") or (first_host(nodes) if nodes else "")
    if not address:
        raise ConfigError(
            f"{_told(environ, 'SLURM_PROCID')} of {tasks} tasks without SLURM_STEP_NODELIST; start with srun, which "
            f"sets it, or set MASTER_ADDR to the host of task 0."
        )
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    port = _port(environ) if environ.get("MASTER_PORT") else PORTS[(61 * job + step) % len(PORTS)]
    spread = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    # "2(x3),1": two tasks on each of three nodes, one on the last. Nodes differ by little: the fullest counts.
    local = max([local_rank + 1, *(int(count) for count in re.findall(r"(?:^|,)(\d+)", spread))])
    return Environment("slurm", rank, tasks, local_rank, min(local, tasks), address, port, _own_gpu(environ))


def first_host(nodes: str) -> str:
    """The first host of Slurm's notation: ``gpu[007-012,20],login`` → ``gpu007``."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", nodes)
    assert first is not None
    return re.sub(r"\[([^-,\]]*)[^]]*\]", r"\1", first[0])


def _tasks(environ: Mapping[str, str]) -> int:
    """How many tasks srun has started beside this one, itself included; 1 outside a step of srun."""
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdecimal() or int(step) >= PSEUDO_STEPS:
        return 1
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        if name in environ:
            return _number(environ, name)
    return 1


def _own_gpu(environ: Mapping[str, str]) -> bool:
    bound = environ.get("SLURM_GPU_BIND", "")
    return (
        bool(environ.get("SLURM_GPUS_PER_TASK"))
        or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
        or any(word in bound for word in ("single:", "per_task:"))
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"The environment variable {name}={text!r} is no count; unset it, or start with torchrun or srun."
        )
    return int(text)


def _port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise ConfigError(f"MASTER_PORT={port} is no port; use one from 1024 to 65535 that is free on rank 0's host.")
    return port


def _told(environ: Mapping[str, str], *names: str) -> str:
    *most, last = [f"{name}={environ.get(name, '')}" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def _these(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names)
