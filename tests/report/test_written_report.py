"""The files of a report, made of two small runs with real digits as their images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from distill import report
from distill.files import save_tensors, write_json
from distill.run_folder import Artifact, Recipe
from tests.report.conftest import RunMaker, network


@pytest.fixture
def runs(make_run: RunMaker) -> list[Path]:
    scans, labels = load_digits(return_X_y=True)
    images = torch.tensor(scans[:40] * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    folders = []
    for name, weight in (("sre2l", None), ("guard", 1.0)):
        folder = make_run(f"demo/{name}", {"name": name, "weight": weight}, [network(0, 0.9, {("pgd20", 8.0): 0.4})])
        artifact = Artifact(folder / "distilled", "distilled", Recipe({}))
        artifact.begin()
        save_tensors(folder / "distilled" / "unit.safetensors", {"images": images, "labels": torch.tensor(labels[:40])})
        names = [f"digit {i}" for i in range(10)]
        artifact.finish(units=["unit.safetensors"], class_names=names, mean=[0.0] * 3, std=[1.0] * 3)
        folders.append(folder)
    return folders


def test_tables_and_pictures_are_written(runs: list[Path]) -> None:
    folder = runs[0].parent
    report.write(folder, runs)
    written = {"report.md", "report.csv", "report.html", "distilled.png"}
    assert {path.name for path in folder.iterdir()} == {"sre2l", "guard", *written}
    assert (folder / "report.md").read_text() == report.compare(runs, "markdown")
    assert (folder / "report.csv").read_text() == report.compare(runs, "csv")
    with Image.open(runs[0] / "distilled.png") as own, Image.open(folder / "distilled.png") as both:
        assert own.height > own.width, "ten classes, four images of each"
        assert both.width > both.height, "two runs, two images of each of ten classes"


def test_one_run_alone(runs: list[Path]) -> None:
    report.write(runs[0], runs[:1])
    assert {"report.md", "report.csv", "distilled.png"} < {path.name for path in runs[0].iterdir()}
    assert "pgd20@8" in report.compare(runs[:1])


def test_tensorboard_shows_the_report_once(runs: list[Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = runs[0].parent
    report.write(folder, runs)
    assert not (folder / "tensorboard").exists(), "no run has events of its own"
    (runs[0] / "tensorboard").mkdir()
    assert report.show_report(folder, runs)
    shown = folder / "tensorboard" / "report"
    before = {path: path.stat().st_mtime_ns for path in shown.iterdir()}
    assert not report.show_report(folder, runs)
    assert {path: path.stat().st_mtime_ns for path in shown.iterdir()} == before
    results = json.loads((runs[0] / "results.json").read_text())
    results["students"][0]["attacks"].append({**results["students"][0]["attacks"][0], "epsilon": 16.0})
    write_json(runs[0] / "results.json", results)
    assert report.show_report(folder, runs)
    events = EventAccumulator(str(shown)).Reload()
    assert events.Tags()["images"] == ["report/accuracy-0-pgd20-Linf"]
    assert len(events.Images("report/accuracy-0-pgd20-Linf")) == 1
    assert [len(list(shown.glob("*tfevents*"))), len(events.Tensors("report/table/text_summary"))] == [1, 1]
    table = events.Tensors("report/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table == report.compare(runs, "markdown")
    assert [path.name for path in shown.parent.iterdir()] == ["report"]


def test_a_table_needs_no_torch(runs: list[Path]) -> None:
    code = "import sys; from distill.report import compare; compare(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *map(str, runs)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
