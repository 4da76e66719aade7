import itertools
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from distill.data.catalogue import PreparedSet
from distill.data.imagenet import imagenet_classes
from distill.errors import ConfigError, DataError

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data" / "imagenet_samples.zip"


def test_wordnet_ids_have_their_official_index_and_name():
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    classes = imagenet_classes()
    assert list(classes) == sorted(set(classes))
    assert len(classes) == 1000
    assert [classes[name][0] for name in ("n01440764", "n03888257", "n15075141")] == [0, 701, 999]
    assert list(classes.values()) == list(enumerate(_IMAGENET_CATEGORIES))


@pytest.mark.skipif(not SAMPLES.is_file(), reason="../shared/data/imagenet_samples.zip is not there")
def test_wordnet_names_are_those_in_the_names_of_real_files():
    with zipfile.ZipFile(SAMPLES) as archive:
        files = [Path(name) for name in archive.namelist() if name.endswith(".JPEG")]
    assert len(files) == 128
    for file in files:
        word, _, name = file.stem.partition("_")
        assert imagenet_classes()[word][1].startswith(name.replace("_", " "))


def test_validation_images_are_held_out_of_training(digits):
    options = {"validation_per_class": 20, "seed": 3}
    train, held = digits.samples("train", **options), digits.samples("validation", **options)
    assert np.bincount(held.labels).tolist() == [20] * 10
    assert len(train) + len(held) == 1297
    assert not set(train.paths) & set(held.paths)
    other = digits.samples("validation", validation_per_class=20, seed=4)
    assert set(other.paths) != set(held.paths)
    assert digits.samples("validation", **options).fingerprint == held.fingerprint


def test_max_per_class_chooses_from_what_is_not_held_out(digits):
    few, more = (digits.samples("train", max_per_class=count, validation_per_class=20, seed=3) for count in (5, 30))
    held = digits.samples("validation", validation_per_class=20, seed=3)
    assert np.bincount(few.labels).tolist() == [5] * 10
    assert set(few.paths) < set(more.paths)
    assert not set(more.paths) & set(held.paths)
    assert len(digits.samples("train", max_per_class=10_000)) == 1297


@pytest.mark.parametrize("count", [124, 130])
def test_holding_out_a_whole_class_is_refused(digits, count):
    with pytest.raises(ConfigError, match=r"validation_per_class=.* class \d has \d+ training images"):
        digits.samples("train", validation_per_class=count)


def test_a_validation_split_must_be_asked_for(digits):
    with pytest.raises(ConfigError, match="validation_per_class"):
        digits.samples("validation")


def test_choices_are_balanced_and_nested(digits):
    test = digits.samples("test")
    chosen = [test.choose(count, seed=1) for count in (7, 10, 25, 100, 499)]
    for smaller, larger in itertools.pairwise(chosen):
        assert set(smaller.paths) < set(larger.paths)
    for samples in chosen:
        counts = np.bincount(samples.labels, minlength=10)
        assert counts.max() - counts.min() <= 1
        assert samples.paths == sorted(samples.paths)
    assert set(test.choose(25, seed=2).paths) != set(chosen[2].paths)
    assert len(test.choose(0, seed=1)) == len(test.choose(501, seed=1)) == 500


def test_labels_follow_the_frozen_class_order(photographs):
    assert [c.folder for c in photographs.classes] == ["n01440764", "n02102040", "n03888257"]
    assert [c.name for c in photographs.classes] == ["tench", "English springer", "parachute"]
    assert [c.imagenet_index for c in photographs.classes] == [0, 217, 701]
    samples = photographs.samples("test")
    assert [photographs.classes[label].folder for label in samples.labels] == [p.parent.name for p in samples.paths]


def test_a_folder_that_is_not_prepared_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="guard prepare"):
        PreparedSet.open(tmp_path / "digits")


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": "guard-dataset", "version": 99}), "{}"])
def test_a_damaged_manifest_is_told(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is (damaged|not of format)"):
        PreparedSet.open(tmp_path)


def test_a_prepared_folder_can_be_moved(digits, tmp_path):
    moved = PreparedSet.open(Path(shutil.copytree(digits.folder, tmp_path / "elsewhere")))
    assert moved.fingerprint == digits.fingerprint
    assert moved.samples("train").path(0).is_relative_to(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_index_is_told(digits, tmp_path, damage):
    prepared = PreparedSet.open(Path(shutil.copytree(digits.folder, tmp_path / "digits")))
    file = prepared.folder / "train.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content[:-9] if damage == "truncate" else content)
    if damage == "remove":
        file.unlink()
    with pytest.raises(DataError, match=r"index .*train\.safetensors is damaged .* guard prepare"):
        prepared.samples("train")
    assert len(prepared.samples("test")) == 500
