"""The test cluster itself: what launches rely on works, and nothing of it stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.all_reduce import AllReduce
from tests.cluster.machines import until, variables
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.cluster
HOLD = """
import signal, time
from tests.cluster.slurm import Slurm

# It is ignored by what a script started with an ampersand, as the tests may be.
signal.signal(signal.SIGINT, signal.default_int_handler)
with Slurm() as slurm:
    slurm.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 600")
    while len(slurm.tasks("1")) < 2:
        time.sleep(0.1)
    print(slurm.folder, flush=True)
    time.sleep(600)
"""


def _of(folder: str) -> list[int]:
    """Processes of a cluster, daemons and jobs."""
    everything = [int(each) for each in os.listdir("/proc") if each.isdigit()]
    return [each for each in everything if variables(each).get("SLURM_CONF", "").startswith(folder)]


def test_ranks_meet_and_a_preempted_job_goes_on(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from submitit import SlurmExecutor

    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    executor = SlurmExecutor(tmp_path / "log", max_num_timeout=1)
    executor.update_parameters(nodes=2, ntasks_per_node=1, time=5, mem="1GB")
    job = executor.submit(AllReduce(), tmp_path, 0).job_id
    try:
        until(lambda: len(list(tmp_path.glob("0-?"))) == 2, 100, "the first sums")
        assert len(slurm.tasks(job, rank=1)) >= 1
        slurm.signal(job, "USR2")
        slurm.wait(job, "PENDING")
        slurm.hurry(job)
        assert slurm.wait(job, seconds=100) == "COMPLETED"
    except (AssertionError, TimeoutError) as error:
        error.add_note("\n".join(each.read_text() for each in (tmp_path / "log").glob("*.err")))
        raise
    finally:
        slurm.run("scancel", job)
    assert {each.name: each.read_text() for each in tmp_path.glob("?-?")} == dict.fromkeys(
        ("0-0", "0-1", "1-0", "1-1"), "3"
    )
    assert slurm.jobs()[job]["Restarts"] == "1"


def test_a_job_outlives_its_daemon(slurm: Slurm, tmp_path: Path) -> None:
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; hostname"
    job = slurm.run("sbatch", "--parsable", "--nodelist=n1", f"--output={tmp_path}/out", f"--wrap={wait}").strip()
    slurm.wait(job, "RUNNING")
    slurm.kill_slurmd("n1")
    (tmp_path / "go").touch()
    slurm.start_slurmd("n1")
    assert slurm.wait(job) == "COMPLETED"
    assert (tmp_path / "out").read_text() == "n1\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_stays(slurm: Slurm, number: signal.Signals) -> None:
    """A second cluster beside the first, whose owner is killed or interrupted while a job runs."""
    hosts = Path("/etc/hosts").read_bytes()
    owner = subprocess.Popen([sys.executable, "-c", HOLD], env=slurm.environment, stdout=subprocess.PIPE, text=True)
    folder = (owner.stdout.readline() if owner.stdout else "").strip()
    assert folder not in ("", str(slurm.folder))
    assert len(_of(folder)) > 6
    owner.send_signal(number)
    owner.communicate(timeout=100)
    until(lambda: not _of(folder), 100, "the end of all processes")
    if number == signal.SIGKILL:
        shutil.rmtree(folder)
    assert not Path(folder).exists()
    assert Path("/etc/hosts").read_bytes() == hosts
    assert "is UP" in slurm.run("scontrol", "ping")


def test_what_asks_for_too_much_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    """``--test-only`` tells scripts that fit from those that do not."""
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun hostname\n")
    wide = ["--partition=a100", "--ntasks-per-node=8", "--cpus-per-task=16", "--mem=480GB"]
    for gpus in ("--gres=gpu:8", "--gpus-per-node=8"):
        assert "on nodes a[1-64]" in slurm.test_only(*wide, gpus, "--nodes=64", str(script))
    for wrong in (["--gres=gpu:9"], ["--nodes=65"], ["--cpus-per-task=17"], ["--partition=none"], ["--mem=2000GB"]):
        with pytest.raises(RuntimeError, match="refused: "):
            slurm.test_only(*wide, *wrong, str(script))
