"""The graph of jobs: what is left to do, what waits for what, how many workers there are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distill.arms import configurations
from distill.compose import compose
from distill.config import Config
from distill.errors import ArtifactError
from launchers.graph import build_graph, commands_left, workers
from tests.running import SMALL, command, guard

CLUSTER = "cluster=slurm_test"


def configs(folder: Path, *overrides: str) -> list[Config]:
    places = [f"run_root={folder / 'runs'}", f"data_root={folder / 'data'}"]
    return configurations([*overrides, *places], None)


def edges(runs: list[Config]) -> dict[str, set[str]]:
    return {job.key: set(job.after) for job in build_graph(runs)}


def test_a_new_run_needs_everything(tmp_path: Path) -> None:
    assert edges(configs(tmp_path, *SMALL, CLUSTER)) == {
        "prepare": set(),
        "squeeze": {"prepare"},
        "recover": {"squeeze"},
        "relabel": {"squeeze", "recover"},
        "evaluate": {"squeeze", "recover", "relabel"},
        "report": {"evaluate"},
    }


def test_arms_share_the_data_and_the_report(tmp_path: Path) -> None:
    found = edges(configs(tmp_path, "experiment=demo", CLUSTER))
    assert found["sre2l/squeeze"] == found["guard/squeeze"] == {"prepare"}
    assert found["guard/recover"] == {"guard/squeeze"}
    assert found["report"] == {"sre2l/evaluate", "guard/evaluate"}
    assert len(found) == 10


def test_a_teacher_that_another_run_trains_is_waited_for(tmp_path: Path) -> None:
    runs = configs(tmp_path, "experiment=demo", CLUSTER)
    runs[1].squeeze.reuse = f"{runs[0].run_root}/{runs[0].name}"
    assert edges(runs)["guard/squeeze"] == {"sre2l/squeeze"}
    runs[1].squeeze.reuse = ""
    runs[0].recover.teachers = [f"{runs[1].run_root}/{runs[1].name}"]
    assert edges(runs)["sre2l/recover"] == {"sre2l/squeeze", "guard/squeeze"}


def test_ready_images_wait_for_no_teacher(tmp_path: Path) -> None:
    found = edges(configs(tmp_path, *SMALL, CLUSTER, "recover.images=somewhere"))
    assert found["recover"] == {"prepare"}
    assert found["relabel"] == {"squeeze", "recover"}


def test_without_stored_labels_there_is_no_job_for_them(tmp_path: Path) -> None:
    assert "relabel" not in edges(configs(tmp_path, *SMALL, CLUSTER, "relabel.mode=online"))


@pytest.mark.parametrize(
    ("overrides", "stage", "count"),
    [
        (["cluster.recover.workers=64"], "recover", 2),
        (["cluster.recover.workers=64", "recover.ipc=500"], "recover", 64),
        (["cluster.relabel.workers=64"], "relabel", 20),
        (["evaluate.seeds=[0,1,2]"], "evaluate", 3),
        (["evaluate.seeds=[0,1,2]", "cluster.evaluate.workers=2"], "evaluate", 2),
    ],
)
def test_workers_are_never_more_than_units(overrides: list[str], stage: str, count: int) -> None:
    assert workers(compose([*SMALL, CLUSTER, *overrides]), stage) == count


def test_what_is_complete_is_left_out(tmp_path: Path) -> None:
    few = ["squeeze.epochs=1", "recover.iterations=2"]
    for stage in ("squeeze", "recover"):
        done = guard(command(tmp_path, *few, stage=stage))
        assert done.returncode == 0, done.stderr
    run = configs(tmp_path, *SMALL, *few, CLUSTER, "name=run")
    assert edges(run) == {"relabel": set(), "evaluate": {"relabel"}, "report": {"evaluate"}}

    other = configs(tmp_path, *SMALL, *few, CLUSTER, "name=run", "recover.lr=0.5")
    with pytest.raises(ArtifactError, match=r"recover\.lr"):
        commands_left(other[0])

    shutil.rmtree(tmp_path / "runs" / "run" / "teacher")
    assert commands_left(run[0]) == ["squeeze", "recover", "relabel", "evaluate"]
