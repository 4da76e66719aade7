"""The units of workers over time in TensorBoard: right, and safe when many write."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.files import digest
from distill.training.worker_events import show_workers

RECIPE = {"options": {}, "inputs": {}}


def record(run: Path, worker: str, began: float, ends: list[float], **more: Any) -> None:
    """The record of a worker on labels whose units took half a second each."""
    units = [
        {"unit": f"{worker}{number}", "at": end - 0.5, "seconds": 0.5, "result": "published"}
        for number, end in enumerate(ends)
    ]
    facts = {"worker": worker, "artifact": "labels", "recipe": digest(RECIPE), "started": worker, "began": began}
    path = run / "workers" / f"labels-{worker}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**facts, "ended": None, "units": units, **more}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two workers under way, another that made its unit too late, and one on another recipe."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/recipe.json").write_text(json.dumps({"recipe": RECIPE}))
    record(tmp_path, "a", 1000.0, [2.0, 7.25, 7.5])
    record(tmp_path, "b", 1003.0, [1.0, 30.0])
    late = [{"unit": "b0", "at": 0.0, "seconds": 90.0, "result": "equal"}]
    record(tmp_path, "c", 1001.0, [], units=late)
    record(tmp_path, "d", 1.0, [1.0], recipe="another")
    return tmp_path


def line(run: Path, worker: str) -> list[tuple[int, float, float]]:
    """Step, time and value of a line's points."""
    folder = run / "tensorboard/6_workers/3_labels" / worker
    (file,) = list(folder.iterdir())
    assert "tfevents" in file.name
    events = EventAccumulator(str(folder)).Reload().Scalars("6_workers/3_labels")
    return [(event.step, event.wall_time, event.value) for event in events]


def test_units_over_time_of_all_and_of_each(run: Path) -> None:
    show_workers(run)
    assert {path.name for path in (run / "tensorboard/6_workers/3_labels").iterdir()} == {"all", "a", "b"}
    assert line(run, "a") == [(0, 1000.0, 0), (2, 1002.0, 1), (8, 1007.5, 3)]
    assert line(run, "b") == [(0, 1000.0, 0), (4, 1004.0, 1), (33, 1033.0, 2)]
    assert [(step, value) for step, _, value in line(run, "all")] == [(0, 0), (2, 1), (4, 2), (8, 4), (33, 5)]


def test_what_grows_takes_the_place_of_what_was_there(run: Path) -> None:
    show_workers(run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*tfevents*")}
    show_workers(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*tfevents*")} == before, "nothing new"
    shutil.copytree(run / "workers", run / "older")
    record(run, "b", 1003.0, [1.0, 30.0, 31.0])
    show_workers(run)
    assert line(run, "b")[-1] == (34, 1034.0, 3)
    assert line(run, "all")[-1] == (34, 1034.0, 6)
    shutil.rmtree(run / "workers")
    (run / "older").rename(run / "workers")
    show_workers(run)
    assert line(run, "all")[-1] == (34, 1034.0, 6), "one that has read older records is too late"


def test_one_that_comes_late_with_less_leaves_what_tells_more(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone: TensorBoard would read both files, and go back in time between them."""
    replace = os.replace

    def late(*names: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        record(run, "b", 1003.0, [1.0, 30.0, 31.0])
        show_workers(run)
        replace(*names)

    monkeypatch.setattr(os, "replace", late)
    show_workers(run)
    assert line(run, "all")[-1] == (34, 1034.0, 6)
    assert line(run, "b")[-1] == (34, 1034.0, 3)


def _show(run: Path, turns: int) -> None:
    for _ in range(turns):
        show_workers(run)


def test_many_write_at_the_same_time(run: Path) -> None:
    context = multiprocessing.get_context("fork")
    showing = [context.Process(target=_show, args=(run, 60)) for _ in range(3)]
    for process in showing:
        process.start()
    for count in range(3, 40):
        record(run, "b", 1003.0, [float(end) for end in range(1, count)])
    for process in showing:
        process.join(200)
    assert [process.exitcode for process in showing] == [0, 0, 0]
    show_workers(run)
    assert line(run, "all")[-1][2] == 3 + 38
    assert not list(run.rglob("*.tmp"))


def test_a_run_without_workers_gets_no_events(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/recipe.json").write_text(json.dumps({"recipe": RECIPE}))
    show_workers(tmp_path)
    assert not (tmp_path / "tensorboard").exists()
