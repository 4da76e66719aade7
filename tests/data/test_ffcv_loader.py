"""What is special about .beton files: pages, damage, and the boxes of resized records."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from data_prep import prepare
from distill.compose import compose
from distill.data.beton import BetonLayout
from distill.data.catalogue import PreparedSet
from distill.data.crops import UNIFORMS, resized_boxes
from distill.data.pages import PageCache
from distill.errors import ArtifactError, ConfigError, DataError
from distill.randomness import uniforms
from tests.data.conftest import SHARED
from tests.data.reading import configure, make_loader, skip_without


@pytest.fixture(autouse=True)
def _needs_ffcv():
    skip_without("ffcv")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """64 photographs of ImageNet as they are, a class each."""
    if not (SHARED / "imagenet_samples.zip").is_file():
        pytest.skip("../shared/data/imagenet_samples.zip is not there")
    folder = tmp_path_factory.mktemp("samples")
    shutil.unpack_archive(SHARED / "imagenet_samples.zip", folder / "all")
    for child in sorted((folder / "all/train").iterdir())[:64]:
        shutil.move(child, folder / "images/train" / child.name)
    options = [f"dataset.source={folder / 'images'}", "dataset.num_classes=64", f"data_root={folder / 'data'}"]
    return prepare(compose(["dataset=imagenette", *options]))


def beton_of(config, prepared):
    return BetonLayout.of(config.format, config.dataset).folder(prepared) / "train.beton"


def test_quasi_random_order_opens_few_pages_at_a_time(samples):
    kind = "ffcv quasi-random"
    config = configure(samples, kind, "dataset.image_size=224", "format.mode=raw")
    loader = make_loader(config, samples, size=64, batch_size=1)
    pages = loader.starts // loader.page_size
    assert len(np.unique(pages)) > 4
    orders = []
    for epoch in (0, 1, 0):
        order = loader.order.permute(epoch)
        assert sorted(order.tolist()) == list(range(64))
        sequence, kept = pages[order].tolist(), []
        for position, page in enumerate(sequence):
            kept.append(page)
            still = {p for p in kept if p in sequence[position:]}
            assert len(still) <= 3, "two open pages, and the one that closes with this image"
        orders.append(order.tolist())
    assert orders[0] == orders[2] != orders[1], "no history, unlike FFCV's own"


def test_the_process_cache_keeps_few_pages_and_changes_no_pixel(samples, monkeypatch):
    options = ("dataset.image_size=224", "format.mode=raw")
    kept = []
    end = PageCache.end
    monkeypatch.setattr(PageCache, "end", lambda self, batch: (kept.append(len(self.kept)), end(self, batch)))
    loaders = [
        make_loader(configure(samples, "ffcv quasi-random", *options, f"loader.cache={cache}"), samples, batch_size=2)
        for cache in ("page", "process")
    ]
    for a, b in zip(*loaders, strict=True):
        assert torch.equal(a.images, b.images)
    assert len(kept) >= 29
    assert max(kept) < len(np.unique(loaders[0].starts // loaders[0].page_size))


def test_a_process_cache_that_does_not_fit_into_memory_is_refused(samples, tmp_path):
    everything = [np.arange(1 << 20)] * 2
    with pytest.raises(ConfigError, match=r"GiB .* use loader\.order=quasi_random, or loader\.cache=page"):
        PageCache(tmp_path / "x.beton", 1 << 22, everything, None)


def test_boxes_of_resized_records_have_the_law_of_the_originals(samples):
    loader = make_loader(configure(samples, "ffcv raw", "dataset.image_size=224"), samples)
    statistics = []
    shapes = samples.samples("train").index.shapes
    assert (loader.shapes < shapes).any()
    for heights, widths in (loader.shapes.T, shapes.T):
        found = []
        for epoch in range(20):
            boxes = resized_boxes(uniforms(0, "augment", epoch, range(64), UNIFORMS), heights, widths).astype(float)
            area, aspect = boxes[:, 2] * boxes[:, 3] / (heights * widths), np.log(boxes[:, 3] / boxes[:, 2])
            found.append(np.stack([area, aspect, boxes[:, 0] / heights, boxes[:, 1] / widths]))
        statistics.append(np.concatenate(found, axis=1))
    mine, theirs = statistics
    assert np.abs(mine.mean(1) - theirs.mean(1)).max() < 0.005
    assert np.abs(mine.std(1) - theirs.std(1)).max() < 0.005


@pytest.fixture
def copied(photographs, tmp_path):
    """A prepared set of its own with .beton files of JPEG records, its configuration, and the training file."""
    config = configure(photographs, "ffcv jpg")
    folder = tmp_path / "data/imagenette"
    shutil.copytree(photographs.folder, folder, symlinks=True)
    prepared = PreparedSet.open(folder)
    return prepared, config, beton_of(config, prepared)


def damage_record(path):
    entry = json.loads((path.parent / "manifest.json").read_text())["files"]["train"]
    with open(path, "r+b") as file:
        file.seek(entry["data_start"])
        file.write(bytes(400))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_index(path):
    with open(path, "r+b") as file:
        file.seek(2200)
        file.write(b"\xff\xff\xff")


def other_images(path):
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["fingerprint"] = "0" * 64
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_record, r"Record \d+ of .*train\.beton is damaged; .* format=ffcv again"),
        (truncate, r"train\.beton has \d+ bytes and was written with \d+: it is truncated .* format=ffcv again"),
        (damage_index, r"The index of .*train\.beton is damaged; .* format=ffcv again"),
        (other_images, r"was written from other images than .* format=ffcv again"),
        (lambda path: path.unlink(), r"train\.beton does not exist; .* format=ffcv again"),
        (lambda path: shutil.rmtree(path.parent), r"holds no \.beton files; run guard prepare .* format=ffcv"),
        (lambda path: (path.parent / "manifest.json").write_text("{"), r"manifest\.json is damaged; .* format=ffcv"),
    ],
)
def test_damage_is_told_in_one_sentence(copied, damage, sentence):
    prepared, config, path = copied
    damage(path)
    with pytest.raises((DataError, ArtifactError), match=sentence) as caught:
        list(make_loader(config, prepared))
    assert "\n" not in str(caught.value)


def test_labels_of_another_data_set_are_refused(copied):
    prepared, config, _ = copied
    samples = prepared.samples("train")
    samples.index.labels[:] = samples.index.labels[::-1].copy()
    with pytest.raises(DataError, match=r"labels of .*train\.beton are not those of the data set"):
        make_loader(config, prepared, samples=samples)


@pytest.mark.parametrize(
    ("package", "loader", "line"),
    [
        (
            "ffcv",
            "ffcv",
            "apt-get install libopencv-dev libturbojpeg0-dev pkg-config, then pip install 'guard-distill",
        ),
        ("nvidia.dali", "dali", "pip install 'guard-distill[dali]', or 'guard-distill[dali-cuda12]'"),
    ],
)
def test_a_missing_package_is_one_sentence_before_any_work(tmp_path, package, loader, line):
    code = f"import sys; sys.modules[{package!r}] = None\nfrom distill.cli import main\nsys.exit(main(sys.argv[1:]))"
    places = [f"data_root={tmp_path / 'data'}", f"run_root={tmp_path / 'runs'}"]
    arguments = ["squeeze", "dataset=digits", f"loader={loader}", *places]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
