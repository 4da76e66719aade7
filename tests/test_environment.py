"""Who a process is: the variables of torchrun, submitit and Slurm, and what is wrong with them."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from distill.environment import PORTS, RANKS, Environment, detect, first_host, speaks
from distill.errors import ConfigError

MEET = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEET}
AGENTS = {**TORCHRUN, "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "guard"}
STEP = {
    "SLURM_JOB_ID": "812",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
"""Task 3 of 4 on two nodes, as Slurm describes it."""


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def test_nobody_says_anything() -> None:
    assert detect({}) == Environment("single", 0, 1, 0, 1, None, None)
    assert detect({"PATH": "/bin", **MEET}) == Environment()


def test_torchrun() -> None:
    assert detect(TORCHRUN) == detect(AGENTS) == Environment("torchrun", 3, 4, 1, 2, "node1", 29500)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert detect(alone) == Environment("torchrun")
    assert not speaks(TORCHRUN)
    assert speaks(alone)


def test_every_rank_of_every_size_is_itself() -> None:
    for machines, each in itertools.product((1, 2, 3), (1, 2, 8)):
        for rank in range(machines * each):
            counts = {"RANK": rank, "WORLD_SIZE": machines * each, "LOCAL_RANK": rank % each, "LOCAL_WORLD_SIZE": each}
            found = detect({**{name: str(count) for name, count in counts.items()}, **MEET})
            assert (found.rank, found.world_size) == (rank, machines * each)
            assert (found.local_rank, found.local_world_size) == (rank % each, each)


def test_tasks_of_a_step_of_slurm_find_each_other() -> None:
    found = detect(STEP)
    port = found.master_port
    assert found == Environment("slurm", 3, 4, 1, 2, "gpu07", port)
    assert port in PORTS
    assert detect({**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).master_port == port, "every task the same"
    others = [{**STEP, "SLURM_JOB_ID": str(job)} for job in range(813, 900)]
    others += [{**STEP, "SLURM_STEP_ID": str(step)} for step in range(1, 50)]
    assert port not in [detect(other).master_port for other in others], "another step of the same nodes"
    chosen = detect({**STEP, **MEET})
    assert (chosen.master_address, chosen.master_port) == ("node1", 29500)
    uneven = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}
    assert detect(uneven).local_world_size == 3


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"SLURM_STEP_ID": ""}, "an sbatch script"),
        ({"SLURM_STEP_ID": "4294967291"}, "an sbatch script, in numbers"),
        ({"SLURM_STEP_ID": "4294967290"}, "an interactive step of salloc"),
        ({"SLURM_STEP_ID": "batch"}, "a word"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "one task, as in a job array"),
    ],
)
def test_where_srun_has_not_started_several_a_process_is_alone(change: dict[str, str], what: str) -> None:
    variables = {**STEP, **change}
    assert detect(variables) == Environment(), what
    standalone = {**variables, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}
    assert detect(standalone).kind == "torchrun", f"torchrun --standalone in {what}"


def test_a_torchrun_for_each_task_and_submitit_are_believed() -> None:
    """``srun torchrun``: one agent for each of two nodes, eight ranks under each."""
    step = {**STEP, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    agent = {**AGENTS, "RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    assert detect({**step, **agent}) == Environment("torchrun", 8, 16, 0, 8, "node1", 29500)
    assert detect({**STEP, **TORCHRUN}) == Environment("torchrun", 3, 4, 1, 2, "node1", 29500)
    fewer = {**AGENTS, "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert detect({**STEP, **fewer, "GROUP_WORLD_SIZE": "3"}).world_size == 3, "--nnodes=1:4 with three"


def test_a_task_that_sees_only_its_own_gpu() -> None:
    for name, value in (
        ("SLURM_GPUS_PER_TASK", "1"),
        ("SLURM_TRES_PER_TASK", "cpu=4,gres/gpu=1"),
        ("SLURM_GPU_BIND", "per_task:1"),
    ):
        assert detect({**STEP, name: value}).own_gpu
        assert detect({**STEP, **TORCHRUN, name: value}).own_gpu
    assert not detect({**STEP, "SLURM_GPU_BIND": "none"}).own_gpu


WRONG = [
    ({"RANK": "1"}, "RANK=1 without WORLD_SIZE and LOCAL_RANK; start with torchrun"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without RANK and WORLD_SIZE; "),
    (without(TORCHRUN, "LOCAL_RANK"), "RANK=3 and WORLD_SIZE=4 without LOCAL_RANK; "),
    ({**TORCHRUN, "RANK": "4"}, "RANK=4 and WORLD_SIZE=4, and ranks count from 0 to WORLD_SIZE - 1; "),
    ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' is no count"),
    ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no count"),
    ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE='' is no count"),
    ({**TORCHRUN, "WORLD_SIZE": "0"}, "RANK=3 and WORLD_SIZE=0"),
    ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2, LOCAL_WORLD_SIZE=2 and WORLD_SIZE=4 cannot be"),
    ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK=1, LOCAL_WORLD_SIZE=8 and WORLD_SIZE=4 cannot be"),
    (without({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_WORLD_SIZE"), "LOCAL_RANK=4 and WORLD_SIZE=4 cannot be"),
    (without(TORCHRUN, "MASTER_ADDR"), "WORLD_SIZE=4 without MASTER_ADDR: the processes do not know where to meet; "),
    (without(TORCHRUN, *MEET), "WORLD_SIZE=4 without MASTER_ADDR and MASTER_PORT: "),
    ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ({**STEP, **AGENTS, "GROUP_WORLD_SIZE": "1"}, "SLURM_STEP_NUM_TASKS=4, and torchrun has met no other"),
    (
        {**STEP, **TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"},
        "RANK=0 and WORLD_SIZE=4 contradict SLURM_PROCID=3 and SLURM_STEP_NUM_TASKS=4; unset RANK, WORLD_SIZE",
    ),
    ({**STEP, **TORCHRUN, "RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 contradict SLURM_PROCID=3"),
    (without(STEP, "SLURM_PROCID"), "SLURM_STEP_ID=0 of 4 tasks without SLURM_PROCID; start with srun"),
    (without(STEP, "SLURM_LOCALID"), "SLURM_STEP_ID=0 of 4 tasks without SLURM_LOCALID; "),
    ({**STEP, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 is none of the 4 tasks of the step; "),
    ({**STEP, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many' is no count"),
    (without(STEP, "SLURM_STEP_NODELIST"), "SLURM_PROCID=3 of 4 tasks without SLURM_STEP_NODELIST; "),
]


@pytest.mark.parametrize(("variables", "told"), WRONG)
def test_what_contradicts_itself_is_told_in_one_sentence(variables: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as stopped:
        detect(variables)
    text = str(stopped.value)
    assert told in text
    assert text.endswith(".")
    assert "; " in text, "the way out"
    assert speaks(variables)


def test_a_missing_variable_never_gives_another_rank() -> None:
    """Whichever of torchrun's variables are lost: the same answer, or an error."""
    whole = detect(TORCHRUN)
    for count in range(1, len(TORCHRUN)):
        for lost in itertools.combinations(TORCHRUN, count):
            if {*RANKS} <= {*lost}:
                continue
            try:
                found = detect(without(TORCHRUN, *lost))
            except ConfigError:
                continue
            assert (found.rank, found.world_size, found.local_rank) == (whole.rank, whole.world_size, whole.local_rank)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-3]", "n1"),
        ("n[007,012-020],login", "n007"),
        ("n[12],m[1-2]", "n12"),
        ("rack[3-4]-[01-02]", "rack3-01"),
        ("gpu-a100-[08-09].cluster.example", "gpu-a100-08.cluster.example"),
    ],
)
def test_the_first_host_of_slurms_notation(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_the_command_line_says_it_before_any_work(tmp_path) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, "-m", "distill", "run", "experiment=demo", f"run_root={tmp_path}"]
    done = subprocess.run(
        command, env={"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("guard: RANK=2 and WORLD_SIZE=2, and ranks count from 0")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
