"""``guard launch`` without Slurm: the plan, the local executor, the copy of the code."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from distill.compose import compose
from distill.config_cluster import JobConfig
from distill.errors import GuardError, Preempted
from launchers import snapshot
from launchers.graph import Job
from launchers.ledger import Entry, Launch, now
from launchers.local import check_gpus, run_graph
from tests.running import command, contents, environment, guard

SHORT = (
    "squeeze.epochs=2",
    "recover.iterations=10",
    "relabel.epochs=4",
    "attacks.epsilon=[4]",
    "attacks.sanity_images=0",
)


def launch(folder: Path, *overrides: str, options: tuple[str, ...] = ()) -> list[str]:
    words = command(folder, *overrides, stage="launch")
    return [*words[:4], *options, *words[4:]]


def artifacts(run: Path) -> dict[str, bytes]:
    """What the stages of a run have made; its configuration also holds its name and the cluster."""
    folders = ("teacher/", "distilled/", "labels/", "student/", "outcomes/")
    found = {name: content for name, content in contents(run).items() if name.startswith(folders)}
    assert len({name.split("/")[0] for name in found}) == len(folders)
    return found


def test_local_jobs_make_the_same_run(tmp_path: Path) -> None:
    done = guard(launch(tmp_path, *SHORT, "cluster.recover.workers=2", "name=launched"))
    assert done.returncode == 0, done.stdout + done.stderr
    reference = guard(command(tmp_path, *SHORT))
    assert reference.returncode == 0, reference.stderr
    assert artifacts(tmp_path / "runs" / "launched") == artifacts(tmp_path / "runs" / "run")

    provenance = json.loads((tmp_path / "runs" / "launched" / "provenance.json").read_text())
    copied = json.loads((tmp_path / "runs" / "launched" / "launch" / "0001" / "code" / "snapshot.json").read_text())
    assert {entry["snapshot"] for entries in provenance.values() for entry in entries} == {copied["sha256"]}
    assert provenance["teacher"][0]["command"].startswith("guard squeeze dataset=digits")

    again = guard(launch(tmp_path, *SHORT, "cluster.recover.workers=2", "name=launched"))
    assert "everything is complete" in again.stdout
    status = guard([*command(tmp_path)[:3], "status", str(tmp_path / "runs" / "launched")])
    assert re.search(r"recover\s+done  2 done", status.stdout), status.stdout


def test_a_failing_stage_is_tried_again_and_ends_what_waits_for_it(tmp_path: Path) -> None:
    # NaN within the first steps.
    words = launch(tmp_path, *SHORT, "squeeze.lr=1e30", "cluster.retry=1")
    done = guard(words)
    assert done.returncode == 1
    assert "squeeze: has failed" in done.stdout
    assert "recover: does not run, for squeeze has failed" in done.stdout
    run = tmp_path / "runs" / "run"
    status = guard([*command(tmp_path)[:3], "status", str(run)]).stdout
    assert re.search(r"squeeze\s+failed  job \d+ .*guard: .*(NaN|inf|nan).*_log\.out", status), status
    assert re.search(r"recover\s+cancelled  it needs squeeze, which has failed", status), status
    assert len(list((run / "launch" / "0001" / "squeeze").glob("*_attempts"))) == 2


def test_cancel_stops_a_local_launch_and_another_goes_on(tmp_path: Path) -> None:
    words = launch(tmp_path, *SHORT, "squeeze.epochs=200")
    run = tmp_path / "runs" / "run"
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(), text=True
    ) as first:
        deadline = time.monotonic() + 120
        while not list((run / "teacher").glob(".checkpoint-[0-9]*")):
            assert time.monotonic() < deadline, "no checkpoint"
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
        second = guard(words)
        assert second.returncode == 1
        assert f"is being run by process {first.pid}" in second.stderr
        told = guard([*command(tmp_path)[:3], "cancel", str(run)])
        assert "what is done is kept" in told.stdout, told.stderr
        output = first.communicate(timeout=120)[0]
    assert first.returncode == 75, output
    assert not (run / "teacher" / "manifest.json").exists()
    assert "cancelled" in guard([*command(tmp_path)[:3], "status", str(run)]).stdout


def test_the_plan_shows_graph_resources_and_scripts_and_writes_nothing(tmp_path: Path) -> None:
    done = guard(
        launch(tmp_path, "cluster=slurm_a100", "cluster.account=us", "squeeze.batch_size=1024", options=("--dry-run",))
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"squeeze +1 job, 4 x 8 processes, 8 GPUs a node, 8 CPUs, 400 GiB, 24:00 h +after prepare", done.stdout
    )
    scripts = dict(re.findall(r"==== (\S+) ====\n(.*?)(?=\n====|\Z)", done.stdout, re.DOTALL))
    assert list(scripts) == ["prepare", "squeeze", "recover", "relabel", "evaluate", "report"]
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--account=us", "--signal=USR2@180"):
        assert f"#SBATCH {line}\n" in scripts["squeeze"]
    assert "#SBATCH --array=0-1%2\n" in scripts["recover"]
    assert "--gpus-per-node" not in scripts["report"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("cluster=slurm_a100", "squeeze.batch_size=100"), "does not divide over 32 ranks"),
        (("cluster.partition=gpu",), "cluster.partition is an option of Slurm"),
        (("cluster.squeeze.nodes=2",), "cluster=local is one machine"),
        (("cluster=slurm_test", "+cluster.options.array=3"), "is set by guard launch itself"),
        (("cluster=slurm_test", "cluster.container_mounts=[/a]"), "belongs to cluster.container"),
        (("cluster=slurm_test", "cluster.notice=1"), "cluster.notice=1 must be at least 10"),
        (("cluster=nowhere",), "is not one of: local, slurm_a100, slurm_test"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    done = guard(launch(tmp_path, *overrides, options=("--dry-run",)))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("listed", "gpus", "seen"),
    [
        ("4,5", 1, {"4", "5"}),
        ("GPU-8a, GPU-1c,MIG-3f,7", 2, {"GPU-8a,GPU-1c", "MIG-3f,7"}),
        (None, 2, {"0,1", "2,3"}),
        ("4,5", 0, {""}),
    ],
)
def test_local_jobs_see_the_gpus_that_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str | None, gpus: int, seen: set[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    config = compose(["dataset=digits", "cluster=local"])
    jobs = [Job("recover", "recover", (config,), 2, JobConfig(gpus=gpus), ())]
    check_gpus(jobs)
    # The first to come waits for the other, so that both have their GPUs at the same time.
    line = (
        'mkdir "$0/both" || touch "$0/met"; echo "$CUDA_VISIBLE_DEVICES" >> "$0/seen"; '
        'until [ -e "$0/met" ]; do sleep 0.1; done'
    )
    work = functools.partial(subprocess.check_call, ["sh", "-c", line, str(tmp_path)])
    entry = Entry("recover", "recover", str(tmp_path), [], "recover", "")
    run_graph(jobs, {"recover": work}, Launch(tmp_path, "local", "local", "", now(), "", jobs=[entry]))
    lines = (tmp_path / "seen").read_text().splitlines()
    assert (len(lines), set(lines)) == (2, seen)


def test_a_signal_between_two_jobs_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the first has told its end; what waits for that is not done, and does not begin."""
    config = compose(["dataset=digits", "cluster=local"])
    jobs = [Job(key, key, (config,), 1, JobConfig(), ()) for key in ("recover", "relabel")]
    works = {job.key: functools.partial(subprocess.check_call, ["touch", str(tmp_path / job.key)]) for job in jobs}
    entries = [Entry(job.key, job.stage, str(tmp_path), [], job.key, "") for job in jobs]
    launch = Launch(tmp_path, "local", "local", "", now(), "", jobs=entries)
    told: list[str] = []

    def tell(text: str, **options: object) -> None:
        told.append(text)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("launchers.local.print", tell, raising=False)
    with pytest.raises(Preempted):
        run_graph(jobs, works, launch)
    assert told == ["recover: done"]
    assert launch.state == "cancelled"
    assert (tmp_path / "recover").exists()
    assert not (tmp_path / "relabel").exists()


@pytest.mark.parametrize(
    ("listed", "count", "overrides"),
    [
        ("4,5", 2, ("cluster.recover.workers=3", "cluster.recover.gpus=1", "recover.classes_per_unit=1")),
        ("4,5,-1,6", 2, ("cluster.squeeze.gpus=3",)),
        ("", 0, ("cluster.squeeze.gpus=1",)),
    ],
)
def test_more_gpus_than_are_listed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, count: int, overrides: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    done = guard(launch(tmp_path, *overrides))
    assert done.returncode == 2
    assert f"CUDA_VISIBLE_DEVICES={listed} lists {count}; lower cluster." in done.stderr
    assert not (tmp_path / "runs").exists()
    fitting = guard(
        launch(tmp_path, *overrides[:2], "cluster.parallel=2", "cluster.squeeze.gpus=0", options=("--dry-run",))
    )
    assert fitting.returncode == 0, fitting.stderr


def test_only_launch_takes_options_of_clusters(tmp_path: Path) -> None:
    done = guard(command(tmp_path, "cluster=slurm_test"))
    assert (done.returncode, done.stderr) == (
        2,
        "guard: cluster=slurm_test is about guard launch; guard run works on this machine.\n",
    )


@pytest.mark.parametrize("words", [("logs", "run", "--lines=0"), ("status", "run", "--watch=0")])
def test_counts_and_seconds_are_positive(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert guard([*command(tmp_path)[:3], *words]).returncode == 2


def test_the_copy_of_the_code_is_what_runs(tmp_path: Path) -> None:
    folder = snapshot.take(tmp_path / "code")
    shown = subprocess.run(
        [*command(tmp_path)[:1], "-c", "import distill, launchers; print(distill.__file__)"],
        env={**environment(), "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == str(folder / "distill" / "__init__.py"), shown.stderr
    with pytest.raises(GuardError, match="not the copy that was submitted"):
        snapshot.check_code(folder)
    told = json.loads((folder / "snapshot.json").read_text())
    (folder / "distill" / "errors.py").write_text("# changed")
    assert snapshot._digest(folder) != told["sha256"]
