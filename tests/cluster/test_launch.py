"""``guard launch`` on a real Slurm: what it makes, who may launch, and what it would submit elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.browser.tensorboard_page import check_run, missing_programs
from tests.cluster.launching import (
    LONG,
    ONE_THREAD,
    STEPS,
    TWO_NODES,
    Launched,
    begin,
    differences,
    flat,
    on_cluster,
    steps,
    take_over,
)
from tests.cluster.slurm import Slurm
from tests.running import command, guard

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
TINY = [
    "experiment=demo",
    "squeeze.epochs=2",
    "squeeze.warmup_epochs=0",
    "recover.iterations=10",
    "recover.images_per_class=1",
    "recover.snapshots=[]",
    "relabel.epochs=4",
    "relabel.batch_size=20",
    "evaluate.batch_size=20",
    "evaluate.seeds=[0,1]",
    "attacks.epsilon=[8]",
    "attacks.max_images=20",
    "attacks.sanity_images=0",
]
LOST = (
    r"guard: (Another guard launch is submitting \S+?(; guard status \S+ shows what it does)?\."
    r"|\S+ has been launched already, and these jobs are left: .+; guard status .+ shows them, .+ ends them\.)\n"
)


@pytest.fixture(scope="module")
def finished(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """A finished experiment of two arms, with two students each."""
    launched = Launched(cluster, tmp_path_factory.mktemp("finished"), *TINY, "cluster.relabel.workers=1").launch()
    launched.end()
    return launched


@pytest.mark.browser
@pytest.mark.skipif(bool(missing_programs()), reason=missing_programs() or "-")
def test_tensorboard_shows_every_stage_seed_and_worker(finished: Launched) -> None:
    check_run(finished.run / "guard")


def test_an_experiment_ends_as_on_one_machine(finished: Launched, tmp_path: Path) -> None:
    launched = finished
    done = guard(command(tmp_path / "alone", *TINY))
    assert done.returncode == 0, done.stderr
    assert launched.attempts("guard/recover") == [["start", "exit 0"]] * 2
    for arm in ("sre2l", "guard"):
        assert differences(launched.run / arm, tmp_path / "alone/runs/run" / arm) == []
    assert (launched.run / "report.html").is_file()
    again = launched.guard(*launched.words()[3:])
    assert (again.returncode, again.stdout) == (0, f"{launched.run}: everything is complete.\n")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_ends_as_on_one_machine(slurm: Slurm, tmp_path: Path) -> None:
    def call(stage: str, root: str, *more: str) -> None:
        places = [f"run_root={tmp_path / root}", f"data_root={tmp_path}/data"]
        words = [sys.executable, "-m", "distill", stage, "experiment=demo", *places, *more]
        process = begin(slurm, words)
        _, said = process.communicate(timeout=3000)
        assert process.returncode == 0, said

    call("run", "alone")
    call("launch", "runs", "cluster=slurm_test", *ONE_THREAD)
    launched = Launched(slurm, tmp_path, name="demo", patience=2400)
    launched.end()
    for arm in ("sre2l", "guard"):
        assert differences(launched.run / arm, tmp_path / "alone/demo" / arm) == []


def test_a_preempted_squeeze_goes_on(slurm: Slurm, teacher: Path, tmp_path: Path) -> None:
    """Two ranks on two nodes, both with the images that are prepared already."""
    take_over(teacher, tmp_path)
    launched = Launched(slurm, tmp_path, *LONG, *TWO_NODES).launch()
    (job,) = launched.jobs("squeeze")
    launched.at_work("teacher/.checkpoint-*")
    launched.preempt(job)
    launched.end("squeeze")
    assert launched.restarts(job) == 1
    assert steps(launched.run) == list(range(5, STEPS + 1, 5)), "no step is lost, none is done twice"
    said = launched.guard("cancel", str(launched.run)).stdout
    assert re.fullmatch(r"\S+: cancelled \d jobs of launch 0001; what is done is kept.*\n", said), said
    states = launched.ended("recover", "relabel", "evaluate", "report")
    assert flat(states) == {"CANCELLED"}
    weights = "runs/run/teacher/weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (teacher / weights).read_bytes()


def test_one_of_eight_launches_wins(slurm: Slurm, tmp_path: Path) -> None:
    """A launch of another run in the same moment is not disturbed. All jobs are held, so that none runs."""
    hold = "+cluster.options.hold=true"
    run, other = (Launched(slurm, tmp_path, hold, name=name) for name in ("run", "other"))
    calls = [begin(slurm, words) for words in [run.words()] * 8 + [other.words()]]
    said = [(*call.communicate(timeout=900), call.returncode) for call in calls]
    assert said[8][1:] == ("", 0), "the other run"
    won = [out for out, _, code in said[:8] if code == 0]
    assert len(won) == 1, said
    assert won[0].startswith(f"{run.run}: submitted prepare (")
    for out, err, code in said[:8]:
        assert code == 0 or (code == 1 and not out and re.fullmatch(LOST, err)), (out, err, code)
    assert [path.name for path in run.run.glob("launch/0*")] == ["0001"]
    submitted = [each for launched in (run, other) for job in launched.ledger["jobs"] for each in job["ids"]]
    queued = slurm.run("squeue", "--noheader", "--array", "--format=%i %j").splitlines()
    ours = [line.split()[0] for line in queued if re.search(r" guard-(run|other)-", line)]
    assert sorted(submitted) == sorted(ours), "nothing else was submitted"
    assert other.guard("cancel", str(other.run)).returncode == 0
    assert flat(other.ended()) == {"CANCELLED"}
    assert flat(run.states()) == {"PENDING"}
    assert run.guard("cancel", str(run.run)).returncode == 0


@pytest.mark.slow
def test_two_runs_at_once_do_not_disturb_each_other(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """They share their images, and nodes."""
    runs = []
    for name in ("run", "other"):
        take_over(whole, tmp_path / name, "teacher")
        runs.append(Launched(slurm, tmp_path / name, *LONG).launch())
    for launched in runs:
        launched.end()
        assert differences(launched.run, whole / "runs/run") == []


def test_slurm_takes_the_scripts_of_a_large_cluster(slurm: Slurm, tmp_path: Path) -> None:
    places = [f"run_root={tmp_path}/runs", f"data_root={tmp_path}/data", "cluster.partition=a100"]
    words = [sys.executable, "-m", "distill", "launch", "experiment=imagenet1k_ipc50", "cluster=slurm_a100", *places]
    done = on_cluster(slurm, [*words, "--dry-run"])
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "nothing is written"
    overview, *parts = re.split(r"^==== (\S+) ====$", done.stdout, flags=re.MULTILINE)
    scripts = dict(zip(parts[::2], parts[1::2], strict=True))
    stages = ("squeeze", "recover", "relabel", "evaluate")
    jobs = ["prepare", *(f"{arm}/{stage}" for arm in ("sre2l", "guard") for stage in stages), "report"]
    assert list(scripts) == jobs
    assert re.findall(r"^  (\S+) ", overview, re.MULTILINE) == jobs
    for number, (key, text) in enumerate(scripts.items()):
        path = tmp_path / f"{number}.sh"
        path.write_text(text[text.index("#!/bin/bash") :])
        planned = slurm.test_only(str(path))
        nodes, processors = (4, 256) if key.endswith("squeeze") else (1, 4 if key == "report" else None)
        found = re.search(r"using (\d+) processors on nodes? (\S+) in partition a100", planned)
        assert found, planned
        assert len(slurm.run("scontrol", "show", "hostnames", found[2]).split()) == nodes
        assert processors in (None, int(found[1]))
    assert "--array=0-31%32" in scripts["guard/recover"]
    assert "--gpus-per-node=8" in scripts["guard/squeeze"]
