"""Controls: runs beside an experiment, in one switch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.cli import main
from distill.data import DistilledSet
from distill.data.catalogue import PreparedSet
from distill.data.decode import decode_square
from tests.running import SMALL

FAST = ["squeeze.epochs=2", "recover.iterations=12", "relabel.epochs=4", "evaluate.max_images=100"]
FAST += ["evaluate.seeds=[0,1]", "evaluate.teacher=false", "attacks.epsilon=[8]", "attacks.max_images=20"]
FAST += ["attacks.sanity_images=0", "monitor.tensorboard=false", "monitor.checkpoint_minutes=5"]
GUARD = ["regularizer=curvature", "regularizer.weight=1", "regularizer.h=1.5", "recover.snapshots=[0,10]"]
CONTROLS = ("control_random", "control_full", "control_adversarial")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(root: Path, *overrides: str, command: str = "run", name: str = "small") -> int:
    places = [f"run_root={root / 'runs'}", f"data_root={root / 'data'}", f"name={name}"]
    return main([command, *SMALL, *FAST, *places, *overrides])


def printed(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, dict]:
    """Name of every run that a command line asks for and its configuration."""
    import yaml

    assert main(["config", *overrides]) == 0, capsys.readouterr().err
    return {each["name"]: each for each in yaml.safe_load_all(capsys.readouterr().out) if each}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GUARD on digits with every control."""
    root = tmp_path_factory.mktemp("controls")
    assert run(root, *GUARD, "controls=all") == 0
    return root


def results(root: Path, arm: str) -> dict:
    return json.loads((root / "runs/small" / arm / "results.json").read_text())


def test_controls_stand_in_one_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every run has its rows, and the spread over students beside every accuracy."""
    assert (root / "runs/small/report.md").is_file()
    assert main(["report", str(root / "runs/small")]) == 0
    table = capsys.readouterr().out
    for arm in ("main", *CONTROLS):
        rows = [line for line in table.splitlines() if line.startswith(f"{arm} ")]
        assert len(rows) == (2 if arm == "control_full" else 1)
        assert [row for row in rows if " student " in row and "±" in row]
    assert results(root, "main")["method"] == "sre2l"
    assert results(root, "control_random")["method"] == results(root, "control_full")["method"] == "real images"
    names = [results(root, arm)["regularizer"]["name"] for arm in ("main", *CONTROLS)]
    assert names == ["curvature", "none", "none", "adversarial"]


def test_nothing_is_made_twice(root: Path) -> None:
    """The page aside, which ``guard report`` above has written with the runs in another order."""

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.suffix != ".html"}

    before = times()
    assert run(root, *GUARD, "controls=all") == 0
    assert times() == before


@pytest.mark.parametrize("arm", ["control_random", "control_full"])
def test_the_images_of_a_control_are_whole_training_images(root: Path, arm: str) -> None:
    """Pixel for pixel, different ones, of the right class, and none that is tested."""
    prepared, distilled = PreparedSet.open(root / "data/digits"), DistilledSet.open(root / "runs/small" / arm)
    assert len(distilled) == 20
    kept = [
        (image.numpy().tobytes(), int(label)) for image, label in zip(distilled.images, distilled.labels, strict=True)
    ]
    assert len(set(kept)) == 20

    def pixels(split: str) -> set[tuple[bytes, int]]:
        samples = prepared.samples(split)
        found = enumerate(samples.labels.tolist())
        return {(decode_square(str(samples.path(place)), 32).tobytes(), label) for place, label in found}

    train = pixels("train")
    assert set(kept) <= train
    assert not {image for image, _ in kept} & {image for image, _ in pixels("test") - train}


def test_the_losses_of_real_images_are_told(root: Path) -> None:
    """The batch-norm matching of images that nobody optimised is the yardstick of those that were."""
    matching = results(root, "control_random")["recover"]["bn_loss"]
    again = DistilledSet.open(root / "runs/small/control_random")
    assert 0 < matching < 1e4
    assert results(root, "control_random")["recover"]["teacher_top1"] > 0.3
    assert again.images.dtype == torch.uint8


def test_plain_teachers_are_trained_once(root: Path) -> None:
    """The teacher of control_full is that of control_random, byte for byte; it is tested whatever the others are."""
    folders = [root / "runs/small" / arm / "teacher" for arm in CONTROLS]
    manifests = [(folder / "manifest.json").read_bytes() for folder in folders]
    assert manifests[0] == manifests[1] != manifests[2]
    assert results(root, "control_random")["teacher"] is None
    assert results(root, "control_full")["teacher"]["clean"]["top1"] > 0.3


def test_class_labels_alone_teach_the_student_of_control_full(root: Path) -> None:
    folder = root / "runs/small"
    assert (folder / "control_random/labels/manifest.json").is_file()
    assert not (folder / "control_full/labels").exists()
    first, second = (results(root, arm)["students"] for arm in CONTROLS[:2])
    assert first != second


def test_another_seed_chooses_other_images(root: Path) -> None:
    """And the same seed the same ones, whatever they are recovered with."""
    more = ["controls=random", "arm=control_random", "recover.iterations=20"]
    images = {}
    for name, seed in (("first", 0), ("second", 1)):
        assert run(root, *GUARD, *more, f"seed={seed}", name=name, command="squeeze") == 0
        assert run(root, *GUARD, *more, f"seed={seed}", name=name, command="recover") == 0
        images[seed] = DistilledSet.open(root / "runs" / name / "control_random").images
    assert torch.equal(images[0], DistilledSet.open(root / "runs/small/control_random").images)
    assert not torch.equal(images[0], images[1])


def test_what_a_control_sets_wins_over_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["experiment=imagenette_smoke", "controls=[random,adversarial]", "regularizer.weight=3"]
    given += ["recover.iterations=50", "recover.compile=true", "recover.ipc=20", "evaluate.seeds=[0,1,2]"]
    found = printed(capsys, *given)
    assert list(found) == [f"imagenette_smoke/{arm}" for arm in ("main", "control_random", "control_adversarial")]
    main_run, random, adversarial = found.values()
    assert (main_run["regularizer"]["weight"], main_run["recover"]["iterations"]) == (3, 50)
    assert (random["regularizer"]["name"], random["regularizer"]["weight"]) == ("none", None)
    assert (random["recover"]["iterations"], random["recover"]["compile"]) == (0, False)
    assert (adversarial["regularizer"]["epsilon"], adversarial["regularizer"]["h"]) == (1, None)
    assert adversarial["recover"]["iterations"] == 50
    assert all(run["recover"]["ipc"] == 20 and run["evaluate"]["seeds"] == [0, 1, 2] for run in found.values())


def test_full_is_the_network_of_the_student(capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = printed(
        capsys, "experiment=demo", "controls=full", "student.width=24", "student.network=resnet18", "arm=control_full"
    ).values()
    assert (found["teacher"]["network"], found["teacher"]["width"]) == ("resnet18", 24)
    assert found["student"] == found["teacher"]


@pytest.mark.parametrize("experiment", ["cifar10_ipc1", "sre2l_tiny_imagenet_ipc50", "imagenet1k_distributed"])
def test_experiments_take_every_control(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Online teachers, codecs, curricula and several steps of distribution are no obstacle."""
    found = printed(capsys, f"experiment={experiment}", "controls=all", "student.width=48")
    assert [name.split("/")[1] for name in found][-3:] == list(CONTROLS)
    assert found[f"{experiment}/control_full"]["teacher"]["width"] == 48


def test_controls_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "controls").mkdir()
    (tmp_path / "controls" / "strong.yaml").write_text(
        "control_strong: [regularizer=adversarial, regularizer.epsilon=8, regularizer.step_size=2]\n"
    )
    found = printed(capsys, "experiment=demo", "controls=[random,strong]", "--config-dir", str(tmp_path))
    assert found["demo/control_strong"]["regularizer"]["epsilon"] == 8
    (tmp_path / "controls" / "strong.yaml").write_text("strong: [regularizer=adversarial]\n")
    assert main(["config", "experiment=demo", "controls=strong", "--config-dir", str(tmp_path)]) == 2
    assert "controls.strong must be called control_" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["controls=[random,fulll]"], ["controls=[random,fulll] is not one of", "adversarial, all, full, random"]),
        (["controls=none"], ["controls=none is not one of"]),
        (
            ["experiment=demo", "controls=random", "arm=control_full"],
            ["arm=control_full", "sre2l, guard, control_random"],
        ),
        (
            ["experiment=demo", "controls=full", "student.network=convnet"],
            ["control_full", "convnet has no batch norm"],
        ),
        (["experiment=sre2l_imagenet1k_ipc10", "controls=adversarial"], ["control_adversarial", "squeeze.epochs=0"]),
        (["experiment=sre2l_imagenet1k_ipc10", "regularizer=curvature"], ["regularizer=curvature", "squeeze.epochs=0"]),
        (["recover.iterations=0"], ["recover.iterations=0", "recover.start=random_patches", "noise would stay noise"]),
        (["recover.iterations=0", "recover.start=best_patches", "recover.compile=true"], ["recover.compile=true"]),
        (["recover.iterations=0", "recover.start=best_patches", "recover.snapshots=[0]"], ["recover.snapshots"]),
    ],
)
def test_what_cannot_be_is_one_sentence(given: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *given]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert [word for word in words if word not in told] == []


def test_a_run_does_not_become_a_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "squeeze.epochs=1", command="squeeze", name="alone") == 0
    assert run(tmp_path, "squeeze.epochs=1", "controls=random", name="alone") == 2
    told = capsys.readouterr().err
    assert "alone is a run of its own" in told
    assert not (tmp_path / "runs/alone/main").exists()
    assert run(tmp_path, name="alone/teacher") == 2
    assert "alone is a run, inside which reports see no other" in capsys.readouterr().err
    reuse = [f"squeeze.reuse={tmp_path / 'runs/alone'}", "controls=random", "arm=main", "squeeze.epochs=1"]
    assert run(tmp_path, *reuse, name="beside", command="squeeze") == 0
    assert run(tmp_path, name="beside") == 2
    assert "beside holds the run" in capsys.readouterr().err


def test_photographs_are_cut_to_their_central_square(tmp_path: Path) -> None:
    """Of images that are no squares, of several sizes, the whole height or width is seen."""
    drawn = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "source" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                shape = (50, 40 + 10 * number, 3) if number % 2 else (40, 48, 3)
                Image.fromarray(drawn.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{split}{number}.png")
    options = [f"dataset.source={tmp_path / 'source'}", "dataset.name=own", "dataset.provider=folder"]
    options += ["dataset.num_classes=2", "dataset.image_size=32", "dataset.stored_size=0", "squeeze.batch_size=4"]
    options += ["controls=random", "arm=control_random", "recover.ipc=3"]
    assert run(tmp_path, *options, command="squeeze", name="photos") == 0
    assert run(tmp_path, *options, command="recover", name="photos") == 0
    prepared = PreparedSet.open(tmp_path / "data/own")
    samples = prepared.samples("train")
    wanted = set()
    for place in range(6):
        image = Image.open(samples.path(place))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        wanted.add(image.crop(box).resize((32, 32), Image.Resampling.BILINEAR).tobytes())
    images = DistilledSet.open(tmp_path / "runs/photos/control_random").images.permute(0, 2, 3, 1)
    assert {image.numpy().tobytes() for image in images} == wanted
