import json
import os
import resource
import shutil
import sys
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from data_prep import prepare, verify
from data_prep.__main__ import main
from distill.errors import ConfigError, DataError


def test_digits_are_one_set_of_500_test_images(configure, tmp_path):
    from sklearn.datasets import load_digits

    prepared = prepare(configure("dataset=digits"))
    train, test = prepared.samples("train"), prepared.samples("test")
    assert np.bincount(test.labels).tolist() == [50] * 10
    assert len(train) == 1297
    assert [c.name for c in prepared.classes] == [str(digit) for digit in range(10)]
    digits = load_digits()
    numbers = {int(path.stem) for path in [*train.paths, *test.paths]}
    assert numbers == set(range(1797))
    for position in (0, 100, 499):
        number = int(test.path(position).stem)
        pixels = np.asarray(Image.open(test.path(position)))
        assert (pixels.dtype, pixels.shape) == (np.uint8, (8, 8))
        assert np.abs(pixels / 255 * 16 - digits.images[number]).max() < 0.05
        assert digits.target[number] == test.labels[position]
    assert prepare(configure("dataset=digits", f"data_root={tmp_path / 'other'}")).fingerprint == prepared.fingerprint


def test_a_folder_is_referred_to_where_it_lies(own, tree, tmp_path):
    prepared = prepare(own(tree))
    assert [(c.folder, c.imagenet_index) for c in prepared.classes] == [("ant", None), ("bee", None), ("cat", None)]
    train = prepared.samples("train")
    assert train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert all(path.is_relative_to(tree) for path in train.paths)
    assert not (tmp_path / "data" / "own" / "images").exists()
    assert prepared.manifest["splits"]["test"]["per_class"] == [3, 3, 3]


def test_a_copy_needs_its_source_no_more(own, tree):
    prepared = prepare(own(tree, "dataset.copy=true"))
    shutil.rmtree(tree)
    assert verify(prepared.folder) == 27


def test_a_set_that_refers_to_its_images_is_not_copied_later(own, tree, tmp_path):
    folder = prepare(own(tree)).folder
    for source in (tree, ""):
        with pytest.raises(DataError, match=r"refers to the images in .*tree, and dataset\.copy=true asks for a copy"):
            prepare(own(source, "dataset.copy=true"))
    prepare(own(tree))
    shutil.rmtree(folder)
    assert prepare(own(tree, "dataset.copy=true")).root == folder / "images"
    assert prepare(own(tree, "dataset.copy=true")).root == folder / "images"


def test_a_copy_of_a_source_that_moved_stays_one(own, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(own(tree, "data_root=data"))
    moved = tree.rename(tmp_path / "moved")
    for _ in range(2):
        prepared = prepare(own(moved, "data_root=data", "dataset.copy=true"))
        assert prepared.manifest["images"] == "images"
    shutil.rmtree(moved)
    assert verify(prepared.folder) == 27


@pytest.mark.parametrize("form", ["zip", "zip with a top folder", "tar", "tar.gz"])
def test_archives_hold_the_same_data_set(own, tree, pack, tmp_path, form):
    expected = prepare(own(tree)).fingerprint
    path = tmp_path / "archive"
    if form.startswith("zip"):
        pack(tree, path, "own-1.0" if "top" in form else "")
    else:
        with tarfile.open(path, "w:gz" if form == "tar.gz" else "w") as archive:
            archive.add(tree, "own-1.0")
    prepared = prepare(own(path, f"data_root={tmp_path / 'unpacked'}"))
    assert prepared.fingerprint == expected
    path.unlink()
    assert prepare(own(path, f"data_root={tmp_path / 'unpacked'}")).samples("train").path(0).is_file()


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_test_folder_has_many_names(own, tree, tmp_path, name):
    expected = prepare(own(tree)).fingerprint
    (tree / "test").rename(tree / name)
    assert prepare(own(tree, f"data_root={tmp_path / 'other'}")).fingerprint == expected


def test_a_set_without_test_images_is_accepted_until_they_are_asked_for(own, scans, tmp_path):
    prepared = prepare(own(scans(tmp_path / "alone", {"train": 4})))
    assert len(prepared.samples("train")) == 12
    with pytest.raises(DataError, match="has no test split"):
        prepared.samples("test")


def test_tiny_imagenet_layout(own, scans, pack, tmp_path):
    """train/CLASS/images/*.JPEG with boxes beside them, val/images with annotations, test/images without labels."""
    plain, tiny = scans(tmp_path / "plain", {"train": 4, "val": 2}), tmp_path / "tiny-imagenet-200"
    lines = []
    for file in sorted(plain.rglob("*.png")):
        split, name = file.relative_to(plain).parts[:2]
        if split == "train":
            target = tiny / "train" / name / "images" / f"{name}_{file.stem}.JPEG"
        else:
            target = tiny / "val" / "images" / f"val_{name}_{file.stem}.JPEG"
            lines.append(f"{target.name}\t{name}\t0\t0\t8\t8\n")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    for name in ("ant", "bee", "cat"):
        (tiny / "train" / name / f"{name}_boxes.txt").write_text("0 0 8 8\n")
    (tiny / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    (tiny / "test" / "images").mkdir(parents=True)
    shutil.copyfile(file, tiny / "test" / "images" / "test_0.JPEG")
    prepared = prepare(own(pack(tiny, tmp_path / "tiny.zip", tiny.name)))
    assert {name: entry["per_class"] for name, entry in prepared.manifest["splits"].items()} == {
        "train": [4, 4, 4],
        "test": [2, 2, 2],
    }
    test = prepared.samples("test")
    assert [path.name.split("_")[1] for path in test.paths] == [prepared.classes[label].name for label in test.labels]


def test_the_fingerprint_follows_bytes_labels_and_class_order(own, tree, tmp_path):
    def fingerprint(name):
        return prepare(own(tree, f"data_root={tmp_path / name}")).fingerprint

    first = fingerprint("first")
    (tree / "train" / "ant").rename(tree / "train" / "dog")
    (tree / "test" / "ant").rename(tree / "test" / "dog")
    renamed = fingerprint("renamed")
    file = next((tree / "train" / "bee").iterdir())
    Image.fromarray(np.asarray(Image.open(file)) ^ 1).save(file)
    changed = fingerprint("changed")
    assert len({first, renamed, changed}) == 3


def test_photographs_map_to_imagenet(configure, photographs):
    config = configure("dataset=imagenette", "dataset.num_classes=3", f"dataset.source={photographs}")
    prepared = prepare(config)
    assert [(c.imagenet_index, c.name) for c in prepared.classes] == [
        (0, "tench"),
        (217, "English springer"),
        (701, "parachute"),
    ]
    assert prepared.manifest["splits"]["train"]["images"] == 18
    assert verify(prepared.folder) == 27


def test_a_prepared_set_is_returned_without_work(own, tree, tmp_path, monkeypatch):
    first = prepare(own(tree))
    files = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    monkeypatch.setattr(sys.modules["data_prep.prepare"], "freeze", None)
    assert prepare(own(tree)).fingerprint == first.fingerprint
    assert prepare(own("")).fingerprint == first.fingerprint, "without a source it is taken as it is"
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == files


def test_a_source_that_moved_is_the_same(own, tree, tmp_path):
    first = prepare(own(tree))
    moved = tree.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"no longer in .* dataset\.source"):
        prepare(own(""))
    prepared = prepare(own(moved))
    assert prepared.fingerprint == first.fingerprint
    assert verify(prepared.folder) == 27


@pytest.mark.parametrize("change", ["other images", "one image more", "archive", "digits"])
def test_another_source_under_the_same_name_is_refused(own, tree, scans, pack, configure, tmp_path, change):
    first = prepare(own(tree))
    if change == "other images":
        source = scans(tmp_path / "second", {"train": 6, "test": 3}, start=20)
        shutil.copy(source / "train" / "ant" / os.listdir(source / "train" / "ant")[0], source / "train" / "bee")
    elif change == "one image more":
        shutil.copy(next((tree / "train" / "ant").iterdir()), tree / "train" / "ant" / "more.png")
        source = tree
    elif change == "archive":
        source = pack(tree, tmp_path / "tree.zip")
    else:
        prepare(configure("dataset=digits"))
        with pytest.raises(DataError, match=r"prepared from digits, and .*tree holds other images"):
            prepare(configure("dataset=digits", f"dataset.source={tree}", "dataset.num_classes=3"))
        return
    with pytest.raises(DataError, match=r"own was prepared from .* holds other images; choose another dataset\.name"):
        prepare(own(source))
    assert verify(first.folder) == 27


def test_wrong_counts_and_names_are_told(own, tree, configure, tmp_path):
    with pytest.raises(ConfigError, match=r"num_classes=4, but .*tree has 3 classes; set dataset\.num_classes=3"):
        prepare(own(tree, "dataset.num_classes=4"))
    prepare(own(tree))
    with pytest.raises(ConfigError, match=r"num_classes=4, but .*own has 3 classes"):
        prepare(own(tree, "dataset.num_classes=4"))
    with pytest.raises(ConfigError, match=r"provider=nothing is not one of: digits, folder, torchvision"):
        prepare(configure("dataset.provider=nothing", "dataset.name=x"))
    with pytest.raises(ConfigError, match=r"dataset\.source is not set"):
        prepare(configure("dataset=imagenet1k"))
    with pytest.raises(DataError, match="nowhere does not exist"):
        prepare(own("nowhere"))
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(DataError, match="neither a folder nor a readable zip or tar archive"):
        prepare(own(tmp_path / "text", "dataset.name=other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: shutil.rmtree(t / "test" / "bee"), r"test has no folder of class bee"),
        (lambda t: (t / "test" / "dog").mkdir(), r"test has classes that train has not: dog"),
        (lambda t: [f.unlink() for f in (t / "train" / "cat").iterdir()], r"train has no image of class cat"),
        (lambda t: shutil.rmtree(t / "train"), r"holds no folder train"),
        (lambda t: [shutil.rmtree(c) for c in (t / "train").iterdir()], r"train holds no class folders"),
        (
            lambda t: (t / "train" / "bee").rename(os.fsdecode(bytes(t / "train") + b"/\xff")),
            r"udcff', whose name is no",
        ),
    ],
)
def test_splits_must_have_the_same_classes(own, tree, change, message):
    change(tree)
    with pytest.raises(DataError, match=message):
        prepare(own(tree))


def damage(tree: Path) -> list[Path]:
    """Seven files that are no whole images, the last one a link that leads nowhere."""
    victims = [*sorted((tree / "train" / "ant").iterdir())[:5], *sorted((tree / "test" / "bee").iterdir())[:2]]
    for number, victim in enumerate(victims[:6]):
        content = victim.read_bytes()
        victim.write_bytes([content[:-30], b"", b"no image", content[:40]][number % 4])
    victims[6].unlink()
    victims[6].symlink_to(tree / "nowhere")
    return victims


def test_unreadable_images_stop_the_import_by_name(own, tree):
    victims = damage(tree)
    with pytest.raises(DataError, match=r"^7 images are unreadable: .*; and 2 more; .*on_corrupt=skip\.$") as caught:
        prepare(own(tree))
    assert [str(victim) in str(caught.value) for victim in victims] == [True] * 5 + [False] * 2
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=f"{victims[6]} is a link that leads nowhere"):
        prepare(own(tree, "dataset.copy=true", "dataset.name=copy"))


def test_unreadable_images_are_left_out_and_counted_on_request(own, tree):
    victims = damage(tree)
    victims[0] = victims[0].rename(os.fsdecode(bytes(victims[0].parent) + b"/\xff.png"))
    prepared = prepare(own(tree, "dataset.on_corrupt=skip"))
    assert prepared.manifest["corrupt"] == {
        "count": 7,
        "files": sorted(ascii(str(victim.relative_to(tree)))[1:-1].replace("udc", "x") for victim in victims),
    }
    assert prepared.manifest["splits"]["train"]["per_class"] == [1, 6, 6]
    assert not set(prepared.samples("train").paths) & set(victims)
    with pytest.raises(DataError, match=r"without 7 unreadable images, and dataset\.on_corrupt is error"):
        prepare(own(tree))
    assert verify(prepared.folder) == 20


def test_a_class_without_a_readable_image_is_refused(own, tree):
    for file in (tree / "test" / "cat").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="test has no readable image of class cat"):
        prepare(own(tree, "dataset.on_corrupt=skip"))


def test_a_corrupt_photograph_inside_an_archive_is_named(configure, photographs, tmp_path):
    import zipfile

    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(photographs) as whole, zipfile.ZipFile(damaged, "w") as copy:
        names = whole.namelist()
        for name in names:
            content = whole.read(name)
            copy.writestr(name, content[: len(content) // 3] if name == names[4] else content)
    config = configure("dataset=imagenette", "dataset.num_classes=3", f"dataset.source={damaged}")
    with pytest.raises(DataError, match=rf"^1 image is unreadable: .*{Path(names[4]).name} cannot be decoded"):
        prepare(config)


def test_verify_names_what_changed(own, tree):
    prepared = prepare(own(tree, "dataset.copy=true"))
    paths = prepared.samples("train").paths
    paths[0].write_bytes(paths[0].read_bytes()[:-1] + b"?")
    paths[1].write_bytes(b"")
    paths[2].unlink()
    with pytest.raises(
        DataError, match=rf"3 of 27 images .*{paths[0].name} has changed; .* has changed; .* does not exist"
    ):
        verify(prepared.folder)


def test_a_full_disk_is_told_and_leaves_nothing_half_done(configure, photographs):
    """A limit on the size of files makes real writes fail as a full disk does."""
    config = configure("dataset=imagenette", "dataset.num_classes=3", f"dataset.source={photographs}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(
            DataError, match=r"could not be written to .*imagenette \(File too large.*; make room there"
        ):
            prepare(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert verify(prepare(config).folder) == 27


def test_a_folder_of_someone_else_is_left_alone(own, tree, tmp_path):
    (tmp_path / "data" / "own").mkdir(parents=True)
    (tmp_path / "data" / "own" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(DataError, match="was not made by guard prepare"):
        prepare(own(tree))
    assert os.listdir(tmp_path / "data" / "own") == ["thesis.txt"]


def test_an_interrupted_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.__main__.verify", mock.Mock(side_effect=KeyboardInterrupt))
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "data_prep: interrupted; run the same command again.\n"


def test_the_command_line(own, tree, tmp_path, capsys):
    overrides = ["dataset.name=own", "dataset.num_classes=3", f"data_root={tmp_path / 'data'}"]
    assert main(["prepare", f"dataset.source={tree}", *overrides]) == 0
    assert "3 classes, 18 train, 9 test images." in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "data" / "own")]) == 0
    assert "27 images" in capsys.readouterr().out
    (tree / "train" / "ant" / os.listdir(tree / "train" / "ant")[0]).unlink()
    assert main(["verify", str(tmp_path / "data" / "own")]) == 1
    assert "verify: 27/27" in capsys.readouterr().err
    assert main(["prepare", "dataset.nmae=own"]) == 2
    assert "dataset.name" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "data" / "own" / "manifest.json").read_text())
    assert manifest["format"] == "guard-dataset"
