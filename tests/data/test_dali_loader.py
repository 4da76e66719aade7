import gc
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import prepare
from distill.compose import compose
from distill.data import dali_loader
from distill.data.augment import Augment
from distill.data.dali_loader import DaliLoader
from distill.data.folder_loader import FolderLoader
from distill.data.loaders import test_loader as testing_loader
from distill.data.loaders import training_loader
from distill.data.resolution import Resolution
from distill.errors import DataError, MissingPackageError
from tests.data.reading import equal, reading, same, threads


@pytest.fixture
def dali():
    """A mark of the tests that decode."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")


pytestmark = pytest.mark.usefixtures("dali")


@pytest.fixture(params=["torch", "dali"])
def make(request, photographs):
    """A function that makes a loader; with both ways to resize, that of a CPU and that of a GPU."""

    def loader(split="train", samples=None, **options):
        made = DaliLoader(samples or photographs.samples(split), reading(**({"workers": 2} | options)))
        made.whole = request.param == "dali"
        return made

    return loader


def moved(samples, folder):
    """The samples with a copy of their files, to be damaged."""
    return replace(samples, root=Path(shutil.copytree(samples.root, folder)))


def test_batches_are_bytes_of_their_own(make):
    loader = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(loader)
    assert len(batches) == len(loader) == 4
    for batch in batches:
        assert batch.images.shape == (6, 3, 48, 48)
        assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
        assert batch.images.is_contiguous()
        assert batch.labels.tolist() == loader.samples.labels[batch.indices.numpy()].tolist()
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(24))
    assert len({batch.images.untyped_storage().data_ptr() for batch in batches}) == 4


def test_one_pipeline_serves_epochs_and_abandoned_epochs(make, monkeypatch):
    """Each pipeline that is built leaves some memory behind."""
    built = []
    build = DaliLoader._pipeline
    monkeypatch.setattr(DaliLoader, "_pipeline", lambda self, *rest: built.append(1) or build(self, *rest))
    loader, expected = make(), []
    for epoch in range(4):
        loader.set_epoch(epoch)
        next(iter(loader))
        loader.set_epoch(epoch)
        expected.append(list(loader))
    assert len(built) == 1
    fresh = make()
    fresh.set_epoch(3)
    assert same(fresh, expected[3])


def test_the_order_and_the_crops_are_functions_of_seed_and_epoch(make):
    loader = make()
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    assert not same(first, second)
    loader.set_epoch(0)
    assert same(loader, first)
    assert same(make(workers=0), first)
    assert not same(make(seed=1), first)


def test_resuming_at_any_batch_gives_the_batches_that_were_left(make, tmp_path):
    expected = list(make())
    samples = moved(make().samples, tmp_path / "images")
    for position in range(len(expected)):
        stopped = make(samples=samples)
        stopped.load_state_dict({"epoch": 0, "position": position})
        assert equal(next(iter(stopped)), expected[position])
        assert stopped.state_dict() == {"epoch": 0, "position": position + 1}
        resumed = make(samples=samples)
        resumed.load_state_dict(stopped.state_dict())
        assert list(map(equal, resumed, expected[position + 1 :])) == [True] * (3 - position)
        for index in expected[position].indices.tolist():
            samples.path(index).unlink()  # What lies behind is not read again.


def test_the_shares_of_two_ranks_are_the_batch_of_one(make):
    ranks = [list(make(rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, first, second in zip(make(), *ranks, strict=True):
        for column in ("images", "labels", "indices"):
            parts = torch.cat([getattr(first, column), getattr(second, column)])
            assert torch.equal(getattr(batch, column), parts)


def test_evaluation_shows_every_image_once_over_all_ranks(make, photographs):
    samples = photographs.samples("test").choose(13, seed=0)
    whole = torch.cat([batch.images for batch in make(samples=samples, augment=None)])
    for world in (1, 2, 3):
        options = {"samples": samples, "augment": None, "world_size": world}
        loaders = [make(rank=rank, **options) for rank in range(world)]
        shares = [list(loader) for loader in loaders]
        assert [len(loader) for loader in loaders] == [len(share) for share in shares]
        seen = torch.cat([batch.indices for share in shares for batch in share])
        assert sorted(seen.tolist()) == list(range(13))
        images = torch.cat([batch.images for share in shares for batch in share])
        assert torch.equal(images[seen.argsort()], whole)


def test_a_short_last_batch_of_training_is_kept_when_it_is_asked_for(make):
    assert [len(batch) for batch in make(batch_size=10, drop_last=False)] == [10, 10, 4]


def test_the_resolution_rises(make):
    loader = make(resolution=Resolution(32, 64, 1, 3, 16))
    sides = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        sides.append({batch.images.shape[2:] for batch in loader})
    assert sides == [{(side, side)} for side in (32, 32, 48, 64)]


VIEWS = {
    "evaluation": {"augment": None},
    "evaluation at the files' size": {"augment": None, "size": 224},
    "evaluation of squares of the same side": {"augment": None, "stored_size": 48},
    "evaluation of larger squares": {"augment": None, "stored_size": 64},
    "evaluation of squares within the margin": {"augment": None, "stored_size": 50},
    "resized": {},
    "resized, not flipped": {"augment": Augment(flip=False)},
    "enlarged": {"augment": Augment(crop_scale=(0.01, 0.05)), "size": 96},
    "resized from squares": {"stored_size": 64},
    "padded": {"augment": Augment("padded")},
    "padded squares": {"augment": Augment("padded", padding=9), "stored_size": 64},
    "padded squares of the same side": {"augment": Augment("padded"), "stored_size": 48},
    "none": {"augment": Augment("none")},
    "none of squares": {"augment": Augment("none"), "stored_size": 64},
}


@pytest.mark.parametrize("view", VIEWS)
def test_pixels_are_those_of_the_folder_loader(make, view):
    """A crop that is off by one pixel would differ by more than 2 levels in the mean."""
    loader = make(**VIEWS[view])
    differences = []
    for batch, other in zip(loader, FolderLoader(loader.samples, loader.reading), strict=True):
        assert torch.equal(batch.indices, other.indices)
        differences.append((batch.images.float() - other.images.float()).abs().flatten(1))
    difference = torch.cat(differences)
    # DALI repeats pixels at the border of an image where Pillow and torch leave them out of the mean.
    assert difference.mean(1).max() < (0.4 if loader.whole else 0.3)
    assert difference.max() <= (30 if loader.whole else 4)


def write_kinds(photograph, folder):
    """A photograph in each kind of file that is met under the name .JPEG: plain/ and odd/."""
    exif = Image.Exif()
    exif[0x0112] = 6  # To be shown turned.
    deep = np.asarray(photograph.convert("L")).astype(np.uint16) * 257
    files = {
        "plain/grey": (photograph.convert("L"), "JPEG", {}),
        "plain/turned": (photograph, "JPEG", {"exif": exif}),
        "plain/progressive": (photograph, "JPEG", {"progressive": True, "subsampling": 0}),
        "odd/cmyk": (photograph.convert("CMYK"), "JPEG", {}),
        "odd/png": (photograph, "PNG", {}),
        "odd/palette": (photograph.convert("P"), "PNG", {}),
        "odd/alpha": (photograph.convert("RGBA"), "PNG", {}),
        "odd/deep": (Image.fromarray(deep), "PNG", {}),
        "odd/bitmap": (photograph, "BMP", {}),
    }
    for name, (image, kind, options) in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{name}.JPEG", kind, **options)


@pytest.fixture(scope="module")
def kinds(photographs, tmp_path_factory):
    source, data = tmp_path_factory.mktemp("kinds"), tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        write_kinds(Image.open(photographs.samples(split).path(0)).resize((150, 110)), source / split)
    options = ["dataset.name=kinds", "dataset.num_classes=2", f"dataset.source={source}"]
    return prepare(compose([*options, f"data_root={data}"]))


@pytest.mark.parametrize("augment", [None, Augment()])
def test_every_kind_of_file_is_read(make, kinds, augment):
    loader = make(samples=kinds.samples("test"), batch_size=9, augment=augment)
    assert loader.samples.index.plain.tolist() == [False] * 6 + [True] * 3
    (batch,), (other,) = loader, FolderLoader(loader.samples, loader.reading)
    difference = (batch.images.float() - other.images.float()).abs().flatten(1).mean(1)
    assert difference.max() < 0.6
    if augment is None:
        assert batch.images.float().mean() > 20


def test_scans_are_read(digits):
    samples = digits.samples("test")
    loader = DaliLoader(samples, reading(32, batch_size=100, augment=None, stored_size=32, workers=1))
    images = torch.cat([batch.images for batch in loader])
    expected = torch.cat([batch.images for batch in FolderLoader(samples, loader.reading)])
    assert (images.float() - expected.float()).abs().max() <= 1


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "removed": lambda path: path.unlink(),
    "overwritten": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "replaced": lambda path: Image.new("RGB", (300, 300)).save(path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_was_damaged_since_is_named_in_one_sentence(photographs, tmp_path, damage, workers):
    samples = moved(photographs.samples("train"), tmp_path / "images")
    loader = DaliLoader(samples, reading(workers=workers))
    order = np.concatenate(list(loader.order.batches(0)))
    victim = samples.path(order[14])
    DAMAGES[damage](victim)
    seen = []
    with pytest.raises(DataError) as caught:
        seen.extend(loader)
    message = str(caught.value)
    assert str(victim) in message
    assert "prepare" in message
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(seen) == 2, "the batches before it are handed out"


def test_what_only_dali_cannot_decode_is_told(photographs, tmp_path, monkeypatch):
    samples = moved(photographs.samples("train"), tmp_path / "images")
    DAMAGES["overwritten"](samples.path(3))
    monkeypatch.setattr(dali_loader, "read_image", lambda path: None)
    with pytest.raises(DataError, match=r"^NVIDIA DALI cannot .*images.* that Pillow can \(.+\); use loader=folder\.$"):
        list(DaliLoader(samples, reading()))


def resources():
    gc.collect()
    kilobytes = int(Path("/proc/self/statm").read_text().split()[1]) * 4
    return len(threads()), len(os.listdir("/proc/self/fd")), kilobytes


def test_iterations_that_are_left_early_leave_nothing_behind(make):
    loader = make()

    def leave(times):
        for _ in range(times):
            loader.set_epoch(0)
            for _ in loader:
                break

    leave(20)
    count, files, memory = resources()
    leave(40)
    after = resources()
    assert after[:2] == (count, files)
    assert after[2] - memory < 20_000
    abandoned = iter(loader)
    next(abandoned)
    del abandoned
    assert resources()[:2] == (count, files)


def test_loaders_work_beside_each_other_and_beside_forked_workers(make):
    expected, tests = list(make()), list(make("test", augment=None))
    folder = FolderLoader(make().samples, reading(workers=2))
    read = list(folder)
    folder.set_epoch(0)
    seen = []
    for batch in make():
        seen.append(batch)
        if len(seen) == 2:
            assert same(make("test", augment=None), tests)
            assert same(folder, read)
    assert same(seen, expected)
    assert multiprocessing.active_children() == []


def test_a_forked_process_ends_while_a_pipeline_lives(make):
    batches = iter(make())
    next(batches)
    child = multiprocessing.get_context("fork").Process(target=gc.collect)
    child.start()
    child.join(200)
    assert child.exitcode == 0
    assert len(list(batches)) == 3


def test_a_slow_consumer_gets_every_batch(make):
    expected = list(make())
    loader = make()
    seen = []
    for batch in loader:
        time.sleep(0.05)
        seen.append(batch)
    assert same(seen, expected)


def test_loaders_of_a_configuration(photographs):
    options = ["dataset=imagenette", "dataset.num_classes=3", f"data_root={photographs.folder.parent}"]
    config = compose([*options, "loader=dali", "dataset.image_size=32", "squeeze.batch_size=8"])
    assert [batch.images.shape for batch in training_loader(config, photographs)] == [(8, 3, 32, 32)] * 3
    loader = testing_loader(config, photographs, split="test", batch_size=10)
    assert isinstance(loader, DaliLoader)
    assert [len(batch) for batch in loader] == [10, 5]


def test_the_package_is_asked_for(photographs, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(MissingPackageError, match=r"DALI .*pip install 'guard-distill\[dali\]'.*dali-cuda12"):
        DaliLoader(photographs.samples("train"), reading())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("view", VIEWS)
def test_a_gpu_gives_the_same_pixels(photographs, view):
    options = reading(workers=2, **VIEWS[view])
    samples = photographs.samples("train")
    loader = DaliLoader(samples, replace(options, device="cuda"))
    for batch, other in zip(loader, FolderLoader(samples, options), strict=True):
        assert batch.images.is_cuda
        assert (batch.images.cpu().float() - other.images.float()).abs().flatten(1).mean(1).max() < 1.5
