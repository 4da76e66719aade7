"""Ready images: exports come back as they were, and a run goes on from them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from distill import cli
from distill.compose import compose
from distill.data import DistilledSet
from distill.data.catalogue import PreparedSet
from distill.errors import ConfigError
from distill.exchange import images_fingerprint
from tests.exchange.moving import read, write
from tests.running import command


@pytest.mark.parametrize(("form", "images"), [("folder", "png"), ("pt", "float32"), ("pt", "uint8")])
def test_a_round_trip_changes_no_pixel(
    run: Path, distilled: DistilledSet, prepared: PreparedSet, tmp_path: Path, form: str, images: str
) -> None:
    ready = read(write(run, form, tmp_path / "set", images=images), prepared)
    assert torch.equal(ready.images, distilled.images)
    assert torch.equal(ready.labels, distilled.labels)
    assert ready.notes == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recover.images_set=0"], "recover.images_set belongs to recover.images, which is not set."),
        (
            ["recover.images=x", "recover.images_mean=[0,0,0]"],
            "images_mean and recover.images_std go together; set both.",
        ),
    ],
)
def test_options_that_do_nothing_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        compose(["dataset=digits", *overrides])


def test_published_accuracies_do_not_stand_beside_images_of_others(capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, published in (([], True), (["recover.images=x"], False)):
        assert cli.main(["config", "experiment=imagenette_ipc10", "arm=guard", *overrides]) == 0
        assert ("published: {}" not in capsys.readouterr().out) == published


def test_normalisation_of_pixels_is_refused(run: Path, prepared: PreparedSet, tmp_path: Path) -> None:
    given = ("recover.images_mean=[0,0,0]", "recover.images_std=[1,1,1]")
    for form, images, words in [
        ("folder", "png", r"recover\.images_mean is for torch files"),
        ("pt", "float32", r"recover\.images_mean and recover\.images_std do nothing: .* says how its images are\."),
        ("pt", "uint8", r"recover\.images_mean and recover\.images_std do nothing"),
    ]:
        with pytest.raises(ConfigError, match=words):
            read(write(run, form, tmp_path / f"{form}-{images}", images=images), prepared, *given)


def test_a_run_goes_on_from_ready_images(
    place: Path, run: Path, folder: Path, distilled: DistilledSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relabelled, evaluated and attacked; taking them needs no teacher; a change of the images is seen."""
    # Another number of images for one class: the manifest and the table go by the largest.
    (folder / "new004/class004_id002.png").unlink()
    images = f"recover.images={folder}"

    def guard(stage: str) -> int:
        options = [images, f"squeeze.reuse={run}", "relabel.epochs=2", "attacks.max_images=20"]
        return cli.main(command(place, *options, name="imported", stage=stage)[3:])

    assert guard("recover") == 0
    imported = place / "runs/imported"
    assert not (imported / "teacher").exists()
    assert guard("run") == 0
    taken = DistilledSet.open(imported)
    kept = torch.ones(30, dtype=torch.bool)
    kept[24] = False
    assert torch.equal(taken.images, distilled.images[kept])
    manifest = json.loads((imported / "distilled/manifest.json").read_text())
    assert manifest["source"] == {"kind": "folder", "sha256": images_fingerprint(folder)}
    results = json.loads((imported / "results.json").read_text())
    assert results["ipc"] == manifest["ipc"] == 3
    assert results["method"] == "ready images"
    assert results["recover"] == {"source": manifest["source"]}
    assert len(results["students"][0]["attacks"]) == 2
    write(imported, "parquet", tmp_path / "again")
    assert "ready images (folder)" in (tmp_path / "again/README.md").read_text()
    # Gone: every stage looks for it. Moved: the same run. Changed: another one.
    folder.rename(tmp_path / "moved")
    capsys.readouterr()
    assert guard("relabel") == 2
    assert "set does not exist; put it back, or say where it lies now." in capsys.readouterr().err
    images = f"recover.images={tmp_path / 'moved'}"
    assert guard("run") == 0
    (tmp_path / "moved/new004/class004_id001.png").unlink()
    capsys.readouterr()
    assert guard("run") == 1
    told = capsys.readouterr().err
    assert told.startswith("guard: ")
    assert "these differ: the images it was made from" in told
    assert told.count("\n") == 1


def test_ready_images_are_checked_before_a_teacher_is_trained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"images": torch.zeros(10, 3, 32, 16), "labels": torch.arange(10)}, tmp_path / "x.pt")
    for path, words in ((tmp_path / "x.pt", "16 x 32 pixels"), (tmp_path / "nowhere", "nowhere does not exist")):
        assert cli.main(command(place, f"recover.images={path}", name="early")[3:]) != 0
        assert words in capsys.readouterr().err
    assert not (place / "runs/early/teacher").exists()
