"""Where a training is, from the last lines of its metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.errors import ArtifactError
from distill.report.trainings import describe_trainings

NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lets a test wait for half a second has not told half a second ago."""
    monkeypatch.setattr("distill.report.trainings.time.time", lambda: NOW)


def write(run: Path, name: str, lines: list[dict[str, float | str]]) -> None:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("squeeze: {epochs: 50}\nrelabel: {epochs: 300}\n")
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(step: int, ago: float, stage: str = "teacher", **more: float | str) -> dict[str, float | str]:
    return {
        "stage": stage,
        "step": step,
        "time": NOW - ago,
        "epoch": step / 100,
        "images_per_second": 512,
        **more,
    }


def test_epochs_speed_and_time_left(tmp_path: Path) -> None:
    # An epoch a minute.
    write(tmp_path, "metrics.jsonl", [line(step, 60 * (20 - step / 100)) for step in range(20, 2001, 20)])
    told = describe_trainings(tmp_path)
    assert told == {"teacher": "epoch 20.0 of 50, 512 images/s, about 30 min to go, told 0 s ago"}


def test_without_its_options_nothing_is_told_of_a_run(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", [line(step, 60) for step in range(20, 100, 20)])
    (tmp_path / "config.yaml").write_text("")
    assert describe_trainings(tmp_path) == {}
    (tmp_path / "config.yaml").write_text("squeeze: [")
    with pytest.raises(ArtifactError, match=r"config\.yaml is damaged"):
        describe_trainings(tmp_path)


def test_a_pause_between_two_starts_is_not_counted(tmp_path: Path) -> None:
    before = [line(step, 90000 + 60 * (10 - step / 100)) for step in range(20, 1001, 20)]
    after = [line(step, 60 * (20 - step / 100)) for step in range(1020, 2001, 20)]
    write(tmp_path, "metrics.jsonl", before + after)
    assert "about 30 min to go" in describe_trainings(tmp_path)["teacher"]


def test_students_are_told_one_by_one_and_a_finished_one_has_nothing_to_go(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", [])
    for seed, steps in ((0, [29900, 30000]), (1, [100, 200])):
        lines = [line(step, 30000 - step, "student", series=f"seed{seed}") for step in steps]
        write(tmp_path, f"metrics/student-seed{seed}-w.jsonl", lines)
    told = describe_trainings(tmp_path)["student"]
    assert told.startswith(
        "seed0: epoch 300.0 of 300, 512 images/s; seed1: epoch 2.0 of 300, 512 images/s, about 8.3 h to go"
    )


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", [line(step, 60 * (20 - step / 100)) for step in range(1, 2001)])
    assert "epoch 20.0 of 50" in describe_trainings(tmp_path)["teacher"]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "teacher", "st')
    assert "about 30 min to go" in describe_trainings(tmp_path)["teacher"]


def test_without_numbers_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert describe_trainings(tmp_path) == {}
    write(tmp_path, "metrics.jsonl", [])
    assert describe_trainings(tmp_path) == {}
