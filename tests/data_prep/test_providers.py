"""The torchvision provider without a network: torchvision's own classes are replaced by ones that hold real scans."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_prep import prepare, verify
from distill.errors import ConfigError, DataError


def downloaded(root, train, download):
    """As CIFAR10: arrays (N, 32, 32, 3), labels, class names."""
    digits = load_digits()
    part = slice(0, 200) if train else slice(200, 300)
    data = (digits.images[part] * 15).astype(np.uint8).repeat(4, 1).repeat(4, 2)[..., None].repeat(3, 3)
    return SimpleNamespace(data=data, targets=digits.target[part].tolist(), classes=[f"digit {d}" for d in range(10)])


def test_cifar_is_written_out_losslessly(configure, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", downloaded)
    prepared = prepare(configure("dataset=cifar10"))
    assert [c.name for c in prepared.classes] == [f"digit {d}" for d in range(10)]
    source, train = downloaded("", True, True), prepared.samples("train")
    assert (len(train), len(prepared.samples("test"))) == (200, 100)
    for position in (0, 57, 199):
        number = int(train.path(position).stem)
        np.testing.assert_array_equal(np.asarray(Image.open(train.path(position))), source.data[number])
        assert source.targets[number] == train.labels[position]
    assert verify(prepared.folder) == 300


def test_imagenette_is_taken_as_it_was_extracted(configure, scans, monkeypatch, tmp_path):
    def extracted(root, split, download):
        scans(tmp_path / "data" / "imagenette" / "download" / "imagenette2", {"train": 3, "val": 2})

    monkeypatch.setattr("torchvision.datasets.Imagenette", extracted)
    stale = tmp_path / "data" / "imagenette" / "download" / "imagenette2" / "train" / "half"
    config = configure("dataset=imagenette", "dataset.num_classes=3")
    monkeypatch.setattr("torchvision.datasets.Imagenette", lambda *a, **k: (stale.mkdir(parents=True), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        prepare(config)
    monkeypatch.setattr("torchvision.datasets.Imagenette", extracted)
    prepared = prepare(config)
    assert prepared.manifest["splits"]["test"]["per_class"] == [2, 2, 2]
    assert not (prepared.folder / "download").exists()
    assert prepared.samples("train").path(0).is_relative_to(prepared.folder)


def test_a_download_that_fails_says_what_to_do(configure, tree, monkeypatch):
    def unreachable(root, train, download):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", unreachable)
    with pytest.raises(DataError, match=r"could not download CIFAR10 \(.*Name or service.*pass dataset\.source="):
        prepare(configure("dataset=cifar10"))
    prepared = prepare(configure("dataset=cifar10", f"dataset.source={tree}", "dataset.num_classes=3"))
    assert len(prepared.samples("train")) == 18
    assert prepare(configure("dataset=cifar10", "dataset.num_classes=3")).fingerprint == prepared.fingerprint


def test_an_unknown_class_lists_those_there_are(configure):
    with pytest.raises(ConfigError, match="CIFAR10, CIFAR100, Imagenette"):
        prepare(configure("dataset=cifar10", "dataset.torchvision_class=SVHN"))
