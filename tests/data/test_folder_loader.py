import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.compose import compose
from distill.data.augment import Augment
from distill.data.catalogue import PreparedSet
from distill.data.folder_loader import FolderLoader
from distill.data.loaders import test_loader as testing_loader
from distill.data.loaders import training_loader
from distill.errors import ConfigError, DataError


def memory_loader(digits, **options):
    settings = {"batch_size": 64, "image_size": 32, "stored_size": 32, "augment": Augment(), "seed": 0}
    samples = digits.samples("train", max_per_class=30)
    return FolderLoader(samples, **(settings | options))


def file_loader(photographs, split="train", **options):
    settings = {"batch_size": 6, "image_size": 48, "stored_size": 0, "augment": Augment(), "seed": 0}
    return FolderLoader(photographs.samples(split), **(settings | options))


@pytest.fixture(params=["memory", "files", "files with workers"])
def make(request):
    """A function that makes a training loader, for both ways of reading."""
    if request.param == "memory":
        prepared = request.getfixturevalue("digits")
        return lambda **options: memory_loader(prepared, **options)
    prepared = request.getfixturevalue("photographs")
    workers = 2 if "workers" in request.param else 0
    return lambda **options: file_loader(prepared, **({"workers": workers} | options))


def equal(a, b):
    columns = ((a.images, b.images), (a.labels, b.labels), (a.indices, b.indices))
    return a.epoch == b.epoch and all(torch.equal(x, y) for x, y in columns)


def same(batches, others):
    batches, others = list(batches), list(others)
    return len(batches) == len(others) > 0 and all(map(equal, batches, others))


def test_batches_are_bytes_on_the_device(make):
    loader = make()
    batches = list(loader)
    assert len(batches) == len(loader) == len(loader.samples) // loader.order.batch_size
    for batch in batches:
        assert batch.images.shape == (loader.order.batch_size, 3, loader.image_size, loader.image_size)
        assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert batch.labels.tolist() == loader.samples.labels[batch.indices.numpy()].tolist()
    assert len(torch.cat([batch.indices for batch in batches]).unique()) == len(batches) * loader.order.batch_size


def test_the_order_and_the_crops_are_functions_of_seed_and_epoch(make):
    loader, other = make(), make()
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    assert not same(first, second)
    other.set_epoch(1)
    assert same(other, second)
    assert not same(make(seed=1), first)


def test_resuming_within_an_epoch_gives_the_batches_that_were_left(make):
    whole = make()
    whole.set_epoch(3)
    expected = list(whole)
    stopped = make()
    stopped.set_epoch(3)
    seen = []
    for batch in stopped:
        seen.append(batch)
        if len(seen) == 2:
            break
    state = stopped.state_dict()
    assert state == {"epoch": 3, "position": 2}, "only batches that were handed out count, not those read ahead"
    resumed = make()
    resumed.load_state_dict(state)
    assert same([*seen, *resumed], expected)
    assert same(stopped, expected[2:]), "the interrupted loader itself goes on too"
    assert list(resumed) == [], "the epoch is over until the next one is set"


def test_skipped_batches_are_not_read(photographs, tmp_path):
    images = Path(shutil.copytree(photographs.root, tmp_path / "images"))
    loader = file_loader(photographs)
    batches = list(loader)
    object.__setattr__(loader.samples, "root", images)
    for index in torch.cat([batch.indices for batch in batches[:2]]).tolist():
        loader.samples.path(index).unlink()
    loader.load_state_dict({"epoch": 0, "position": 2})
    assert same(loader, batches[2:])


def test_the_shares_of_two_ranks_are_the_batch_of_one(make):
    ranks = [list(make(rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, first, second in zip(make(), *ranks, strict=True):
        for column in ("images", "labels", "indices"):
            parts = torch.cat([getattr(first, column), getattr(second, column)])
            assert torch.equal(getattr(batch, column), parts)


def test_workers_change_nothing(photographs, digits):
    assert same(file_loader(photographs, workers=0), file_loader(photographs, workers=2))
    assert same(memory_loader(digits, workers=0), memory_loader(digits, workers=2))


def test_evaluation_shows_every_image_once_over_all_ranks(digits, photographs):
    for world in (1, 2, 3):
        for prepared, stored in ((digits, 32), (photographs, 0)):
            samples = prepared.samples("test").choose(13, seed=0)
            loaders = [
                FolderLoader(
                    samples,
                    batch_size=6,
                    image_size=32,
                    stored_size=stored,
                    augment=None,
                    seed=0,
                    rank=rank,
                    world_size=world,
                )
                for rank in range(world)
            ]
            shares = [list(loader) for loader in loaders]
            assert [len(loader) for loader in loaders] == [len(share) for share in shares]
            seen = torch.cat([batch.indices for share in shares for batch in share])
            assert sorted(seen.tolist()) == list(range(13))
            assert all(len(batch) for share in shares for batch in share)
            if world == 1:
                assert seen.tolist() == list(range(13))


def test_evaluation_starts_again_but_can_be_resumed(digits):
    loader = memory_loader(digits, augment=None, batch_size=100)
    first = next(iter(loader))
    batches = list(loader)
    assert len(batches) == 3
    assert equal(batches[0], first)
    assert same(loader, batches)
    loader.load_state_dict({"epoch": 0, "position": 2})
    assert same(loader, batches[2:])
    assert same(loader, batches)


def test_batches_that_cannot_be_shared_are_refused(digits):
    with pytest.raises(ConfigError, match=r"64 cannot be shared equally by 3 ranks; .* 63, 66"):
        memory_loader(digits, world_size=3)
    with pytest.raises(ConfigError, match="300 images, fewer than one batch of 512"):
        memory_loader(digits, batch_size=512)


def test_the_global_generator_is_left_alone(make):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in make():
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_run_beside_the_threads_of_torch_and_end_with_the_iteration(photographs):
    torch.randn(512, 512) @ torch.randn(512, 512)
    for _ in range(3):
        for _ in file_loader(photographs, workers=2):
            break
    file_loader(photographs, workers=2, stored_size=48, image_size=48)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_an_image_that_was_damaged_since_is_named_in_one_sentence(photographs, tmp_path, workers, damage):
    loader = file_loader(photographs, workers=workers)
    object.__setattr__(loader.samples, "root", Path(shutil.copytree(photographs.root, tmp_path / "images")))
    victim = loader.samples.path(5)
    victim.write_bytes(victim.read_bytes()[:2000])
    if damage == "remove":
        victim.unlink()
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(victim) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=victim.name):
        FolderLoader(loader.samples, batch_size=6, image_size=32, stored_size=32, augment=None, seed=0, workers=workers)
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_is_told(photographs):
    batches = iter(file_loader(photographs, workers=1, batch_size=2))
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"worker process .* loader.workers"):
        list(batches)


def test_decoded_images_are_kept_and_a_damaged_cache_is_made_again(digits, tmp_path):
    folder, images = tmp_path / "cache", Path(shutil.copytree(digits.root, tmp_path / "images"))
    samples = digits.samples("test")
    object.__setattr__(samples, "root", images)

    def load():
        return FolderLoader(
            samples, batch_size=100, image_size=32, stored_size=32, augment=None, seed=0, cache=folder
        ).memory.clone()

    squares = load()
    (cached,) = folder.glob("decoded-test-32-*.safetensors")
    good = cached.read_bytes()
    for damaged in (good[:-100], good[:-1] + bytes([good[-1] ^ 1]), good[:5000] + b"?" + good[5001:], b""):
        cached.write_bytes(damaged)
        assert torch.equal(load(), squares)
        assert cached.read_bytes() == good
    shutil.rmtree(images)
    assert torch.equal(load(), squares), "a whole cache needs no images"
    cached.write_bytes(b"")
    with pytest.raises(DataError, match="does not exist"):
        load()


def test_a_cache_belongs_to_its_images(digits, tmp_path):
    for options in ({}, {"max_per_class": 5}, {"validation_per_class": 5}):
        FolderLoader(
            digits.samples("train", **options),
            batch_size=10,
            image_size=16,
            stored_size=16,
            augment=None,
            seed=0,
            cache=tmp_path,
        )
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_cache_that_cannot_be_written_costs_only_a_warning(digits, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.warns(UserWarning, match="not kept"):
        loader = memory_loader(digits, cache=tmp_path / "file")
    assert same(loader, memory_loader(digits))


def test_images_that_do_not_fit_into_memory_are_refused(digits):
    with pytest.raises(ConfigError, match=r"stored_size=1000000 .* GiB"):
        memory_loader(digits, stored_size=1_000_000)


def test_loaders_of_a_configuration(digits):
    options = [f"data_root={digits.folder.parent}", "dataset.validation_per_class=9", "dataset.max_per_class=20"]
    config = compose([*options, "squeeze.batch_size=50", "squeeze.crop=padded", "squeeze.padding=2", "seed=3"])
    prepared = PreparedSet.open(digits.folder)
    train = training_loader(config, prepared, rank=1, world_size=2, device="cpu")
    assert [len(batch) for batch in train] == [25] * 4
    assert train.augment == Augment("padded", (0.08, 1.0), 2, True)
    test = testing_loader(config, prepared, split="test", max_images=30, batch_size=20)
    assert [np.bincount(batch.labels, minlength=10).sum() for batch in test] == [20, 10]
    held = testing_loader(config, prepared, split="validation", batch_size=64)
    assert sum(map(len, held)) == 90
    config.dataset.num_classes = 7
    with pytest.raises(ConfigError, match="num_classes=7"):
        training_loader(config, prepared)
