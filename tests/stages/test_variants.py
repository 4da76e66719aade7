"""The stages in their variants, on digits, in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distill.cli import main
from distill.compose import compose
from distill.data.catalogue import PreparedSet
from distill.data.distilled_set import Unit, plan_units
from distill.files import load_tensors
from distill.recovery import smallest_crop
from tests.running import SMALL

FAST = [
    *SMALL,
    "squeeze.epochs=1",
    "recover.iterations=5",
    "relabel.epochs=4",
    "attacks.epsilon=[8]",
    "attacks.max_images=20",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


def run(root: Path, name: str, *overrides: str, command: str = "run") -> Path:
    arguments = [*FAST, f"run_root={root / 'runs'}", f"data_root={root / 'data'}", f"name={name}", *overrides]
    assert main([command, *arguments, "--debug"]) == 0
    return root / "runs" / name


VARIANTS = {
    "online": ["relabel.mode=online"],
    "online_train": ["relabel.mode=online", "relabel.teacher_mode=train"],
    "hard": ["evaluate.labels=hard", "relabel.mix=mixup"],
    "bf16": ["squeeze.precision=bf16", "squeeze.label_smoothing=0.1", "relabel.precision=bf16"],
    "ema": ["squeeze.ema=0.9", "squeeze.accumulation=4", "squeeze.optimizer=adamw", "squeeze.lr=0.001"],
    "cda": ["method=cda", "recover.images_per_class=2", "recover.classes_per_unit=4"],
    "adversarial": ["regularizer=adversarial", "regularizer.steps=2"],
    "convnet": ["student.network=convnet", "student.width=8", "evaluate.optimizer=sgd", "evaluate.warmup_epochs=1"],
    "validation": [
        "squeeze.epochs=4",
        "dataset.validation_per_class=10",
        "dataset.max_per_class=50",
        "evaluate.split=validation",
    ],
    "one_left": ["teacher.stem=imagenet", "recover.ipc=1", "evaluate.batch_size=3"],
    "no_teacher": ["evaluate.teacher=false", "evaluate.max_images=50", "evaluate.seeds=[3,4]"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_end_with_results(root: Path, name: str) -> None:
    folder = run(root, name, *VARIANTS[name])
    results = json.loads((folder / "results.json").read_text())
    # 20 steps of a teacher are enough to leave chance behind, 8 of a student are not.
    if results["teacher"]:
        assert 0.2 < results["teacher"]["clean"]["top1"] <= 1
    assert (folder / "labels").is_dir() == (name not in ("online", "online_train", "hard"))
    counts = {"validation": 100, "no_teacher": 50}
    assert results["students"][0]["clean"]["count"] == counts.get(name, 500)
    assert (results["teacher"] is None) == (name == "no_teacher")
    if name == "no_teacher":
        assert results["summary"]["top1"]["sd"] is not None
    if name == "cda":
        assert len(json.loads((folder / "distilled/manifest.json").read_text())["units"]) == 3


def test_moving_average_is_the_teacher(root: Path) -> None:
    """The averaged weights are saved, and they differ from those of a training without average."""
    options = ["squeeze.accumulation=4", "squeeze.optimizer=adamw", "squeeze.lr=0.001"]
    averaged = run(root, "ema_on", "squeeze.ema=0.9", *options, command="squeeze")
    plain = run(root, "ema_off", *options, command="squeeze")
    first, second = (load_tensors(folder / "teacher/weights.safetensors") for folder in (averaged, plain))
    assert 1e-4 < (first["conv1.weight"] - second["conv1.weight"]).abs().max() < 1


def test_a_teacher_is_reused_only_when_it_is_the_same(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = run(root, "source", command="squeeze")
    copied = run(root, "copied", f"squeeze.reuse={source}", command="squeeze")
    assert (copied / "teacher/manifest.json").read_bytes() == (source / "teacher/manifest.json").read_bytes()
    places = [f"run_root={root / 'runs'}", f"data_root={root / 'data'}", "name=wrong"]
    assert main(["squeeze", *FAST, *places, f"squeeze.reuse={source}", "squeeze.lr=0.07"]) == 1
    assert "squeeze.lr (was 0.05, now 0.07)" in capsys.readouterr().err
    # Nothing was made from the wrong option, so that it does not stand in the way of the right one.
    run(root, "wrong", f"squeeze.reuse={source}", command="squeeze")


def test_initial_weights_without_training(root: Path) -> None:
    trained = run(root, "trained", command="squeeze")
    weights = trained / "teacher/weights.safetensors"
    taken = run(root, "taken", f"squeeze.weights={weights}", "squeeze.epochs=0", command="squeeze")
    first, second = load_tensors(weights), load_tensors(taken / "teacher/weights.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_penalty_that_comes_after_the_last_step_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher would be a plain one under the name of the regulariser."""
    places = [f"run_root={root / 'runs'}", f"data_root={root / 'data'}", "name=never"]
    given = ["regularizer=curvature", "regularizer.every=1000"]
    assert main(["squeeze", *FAST, *places, *given]) == 2
    assert "regularizer.every=1000 is more than the" in capsys.readouterr().err


def test_the_held_out_images_are_not_trained_on(root: Path) -> None:
    run(root, "any", command="prepare")
    prepared = PreparedSet.open(root / "data/digits")
    train = prepared.samples("train", validation_per_class=10, max_per_class=50)
    held = prepared.samples("validation", validation_per_class=10)
    assert len(train.labels) == 500
    assert len(held.labels) == 100
    assert not {train.path(i) for i in range(500)} & {held.path(i) for i in range(100)}


def test_units_cover_every_image_once() -> None:
    units = plan_units(ipc=6, images_per_class=2, num_classes=250, classes_per_unit=100)
    assert len(units) == 9
    assert units[4] == Unit(4, (100, 200), (2, 4))
    labels = torch.cat([unit.labels for unit in units])
    assert labels.bincount().tolist() == [6] * 250
    assert all(len(unit.labels.unique()) * 2 == len(unit.labels) for unit in units)


@pytest.mark.parametrize(
    ("curriculum", "at"),
    [
        ("none", [0.08, 0.08, 0.08, 0.08]),
        ("cosine", [1.0, 0.54, 0.08, 0.08]),
        ("linear", [1.0, 0.54, 0.08, 0.08]),
        ("step", [1.0, 1.0, 0.08, 0.08]),
    ],
)
def test_curriculum_of_cda(curriculum: str, at: list[float]) -> None:
    config = compose([f"recover.curriculum={curriculum}", "recover.milestone=0.5", "recover.iterations=400"]).recover
    assert [smallest_crop(config, t) for t in (0, 100, 200, 399)] == pytest.approx(at)
