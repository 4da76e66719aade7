"""What is told twice after an interruption is seen once; and every file has one writer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from distill.report.history import read_history, read_lines
from distill.training.monitor import Monitor


@pytest.fixture(autouse=True)
def first_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second and process are read in the order of their numbers as text, the tenth before the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def shown(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def tell(monitor: Monitor, steps: range, value: float) -> None:
    for step in steps:
        monitor.scalars(step, {"loss": value})
    # A kill would leave as much, but for the last two minutes of events.
    monitor.close()


def test_a_training_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    tell(Monitor(tmp_path, "teacher"), range(10, 60, 10), 1.0)
    again = Monitor(tmp_path, "teacher")
    again.resumed(30)
    tell(again, range(40, 80, 10), 2.0)
    wanted = [(10, 1.0), (20, 1.0), (30, 1.0), (40, 2.0), (50, 2.0), (60, 2.0), (70, 2.0)]
    assert shown(tmp_path / "tensorboard/1_teacher", "1_teacher/loss") == wanted
    steps, values = read_history(tmp_path)["teacher", "loss"]
    assert list(zip(steps, values, strict=True)) == wanted


def test_a_finisher_that_was_killed_while_it_told(tmp_path: Path) -> None:
    tell(Monitor(tmp_path, "distilled", anew=True), range(3), 1.0)
    tell(Monitor(tmp_path, "distilled", anew=True), range(6), 1.0)
    assert [step for step, _ in shown(tmp_path / "tensorboard/2_distilled", "2_distilled/loss")] == list(range(6))


def test_a_seed_that_another_worker_goes_on_with(tmp_path: Path) -> None:
    for writer, start, value in (("b", 0, 1.0), ("a", 30, 2.0)):
        monitor = Monitor(tmp_path, "student", series="seed0", writer=writer)
        monitor.resumed(start)
        tell(monitor, range(start + 10, start + 50, 10), value)
        # Lines tell the millisecond.
        time.sleep(0.01)
    assert {path.name for path in (tmp_path / "metrics").iterdir()} == {
        "student-seed0-a.jsonl",
        "student-seed0-b.jsonl",
    }
    assert not (tmp_path / "metrics.jsonl").exists()
    wanted = [(10, 1.0), (20, 1.0), (30, 1.0), (40, 2.0), (50, 2.0), (60, 2.0), (70, 2.0)]
    assert shown(tmp_path / "tensorboard/4_student/seed0", "4_student/loss") == wanted
    steps, values = read_history(tmp_path)["student", "loss"]
    assert list(zip(steps, values, strict=True)) == wanted
    assert {line["series"] for line in read_lines(tmp_path)} == {"seed0"}


def test_nothing_is_opened_before_something_is_told(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, "labels", anew=True)
    monitor.resumed(0)
    monitor.close()
    assert not list(tmp_path.iterdir())


def test_images_of_bytes_and_of_floats_look_the_same(tmp_path: Path) -> None:
    images = torch.arange(2 * 3 * 64 * 64).reshape(2, 3, 64, 64) % 256
    monitor = Monitor(tmp_path, "labels")
    monitor.images(0, "bytes", images.to(torch.uint8))
    monitor.images(0, "floats", images / 255)
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard/3_labels")).Reload()
    (first,), (second,) = (events.Images(f"3_labels/{name}") for name in ("bytes", "floats"))
    assert first.encoded_image_string == second.encoded_image_string
