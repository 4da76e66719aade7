"""What every loader must hold: bytes, order, sharding, resuming, and the same views whatever reads the images."""

import itertools
import multiprocessing
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from distill.data.augment import Augment
from distill.data.catalogue import PreparedSet
from distill.data.resolution import Resolution
from distill.errors import ConfigError, DataError
from tests.data.reading import KINDS, configure, equal, make_loader, same, threads


@pytest.fixture(params=KINDS)
def make(request, photographs):
    """A function that makes a loader of one kind; 24 training and 15 test images."""
    config = configure(photographs, request.param)
    return lambda split="train", **options: make_loader(config, photographs, split, **options)


def test_batches_are_bytes_with_their_labels(make):
    loader = make()
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    for batch in batches:
        assert batch.images.shape == (6, 3, 48, 48)
        assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert batch.labels.tolist() == loader.samples.labels[batch.indices.numpy()].tolist()
        assert batch.images.float().std() > 20
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(24))


def test_order_and_crops_are_functions_of_seed_and_epoch(make):
    loader, other = make(), make()
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    assert not same(first, second)
    assert [b.indices.tolist() for b in first] != [b.indices.tolist() for b in second]
    other.set_epoch(1)
    assert same(other, second)
    other.set_epoch(0)
    assert same(other, first), "the order has no history"


def test_resuming_at_any_batch_gives_the_batches_that_were_left(make):
    whole = make()
    whole.set_epoch(3)
    expected = list(whole)
    for stop in range(len(expected) + 1):
        stopped = make()
        stopped.set_epoch(3)
        seen = list(itertools.islice(stopped, stop))
        state = stopped.state_dict()
        assert state == {"epoch": 3, "position": stop}
        resumed = make()
        resumed.load_state_dict(state)
        rest = list(resumed)
        assert len(seen) + len(rest) == len(expected)
        assert all(map(equal, [*seen, *rest], expected))
    assert list(resumed) == [], "the epoch is over until the next one is set"


def test_only_batches_that_were_handed_out_count(make):
    loader = make()
    for number, _ in enumerate(loader, start=1):
        assert loader.state_dict() == {"epoch": 0, "position": number}


def test_the_shares_of_two_ranks_are_the_batch_of_one(make):
    ranks = [list(make(rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, first, second in zip(make(), *ranks, strict=True):
        for column in ("images", "labels", "indices"):
            parts = torch.cat([getattr(first, column), getattr(second, column)])
            assert torch.equal(getattr(batch, column), parts)


def test_workers_change_nothing(request, photographs):
    for kind in ("files", "ffcv raw", "dali"):
        alone, two = (configure(photographs, kind, f"loader.workers={workers}") for workers in (0, 2))
        assert same(make_loader(alone, photographs), make_loader(two, photographs))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_shows_every_image_once_over_all_ranks(make, photographs, world_size):
    samples = photographs.samples("test").choose(13, seed=0)
    loaders = [
        make("test", samples=samples, augment=None, batch_size=6, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(share) for share in shares]
    seen = torch.cat([batch.indices for share in shares for batch in share])
    assert sorted(seen.tolist()) == list(range(13))
    assert all(len(batch) for share in shares for batch in share)
    if world_size == 1:
        assert seen.tolist() == list(range(13))


def test_evaluation_starts_again_and_can_be_resumed(make):
    loader = make("test", augment=None)
    first = next(iter(loader))
    batches = list(loader)
    assert [len(batch) for batch in batches] == [6, 6, 3]
    assert equal(batches[0], first)
    assert same(loader, batches)
    loader.load_state_dict({"epoch": 0, "position": 2})
    assert same(loader, batches[2:])
    assert same(loader, batches)


def test_the_last_batch_is_kept_if_asked_for(make, photographs):
    samples = photographs.samples("train").choose(20, seed=0)
    for world_size, sizes in ((1, [6, 6, 6, 2]), (2, [6, 6, 8]), (3, [6, 6, 8])):
        ranks = [
            list(make(samples=samples, drop_last=False, rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        batches = list(zip(*ranks, strict=True))
        assert [sum(map(len, shares)) for shares in batches] == sizes
        assert sorted(index for shares in batches for batch in shares for index in batch.indices.tolist()) == list(
            range(20)
        )
        for shares in batches:
            assert sum(batch.weight for batch in shares) == pytest.approx(world_size)
            whole = float(torch.cat([batch.images for batch in shares]).double().mean())
            means = [batch.weight * float(batch.images.double().mean()) for batch in shares]
            assert sum(means) / world_size == pytest.approx(whole, rel=1e-12)
    assert len(make(samples=samples)) == 3


def test_batches_that_cannot_be_shared_are_refused(make):
    with pytest.raises(ConfigError, match=r"6 cannot be shared equally by 4 ranks; .* 4, 8"):
        make(world_size=4)
    with pytest.raises(ConfigError, match="24 images, fewer than one batch of 512"):
        make(batch_size=512)


def test_the_side_may_rise_over_the_epochs(make):
    loader = make(resolution=Resolution(32, 48, 1, 3, step=8))
    sides = []
    for epoch in range(5):
        loader.set_epoch(epoch)
        sides.append({batch.images.shape[-1] for batch in loader})
    assert sides == [{32}, {32}, {40}, {48}, {48}]


def test_global_state_is_left_alone(make):
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before, count = torch.get_rng_state(), np.random.get_state(), torch.get_num_threads()
    for _ in make():
        pass
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before[1])
    assert torch.get_num_threads() == count


def test_batches_are_their_own(make):
    batches = list(make())
    copies = [batch.images.clone() for batch in batches]
    loader = make()
    for _ in range(3):
        list(loader)
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(batches, copies, strict=True))


def test_two_loaders_live_beside_each_other_and_beside_forks(make, photographs):
    torch.randn(256, 256) @ torch.randn(256, 256)
    config = configure(photographs, "files with workers")
    train, test = make(), make("test", augment=None)
    expected = list(train), list(test)
    pairs = list(zip(train_again(make), test, strict=False))
    assert all(equal(a, b) for (a, _), b in zip(pairs, expected[0], strict=False))
    assert all(equal(a, b) for (_, a), b in zip(pairs, expected[1], strict=False))
    iterator = iter(train_again(make))
    next(iterator)
    assert len(list(make_loader(config, photographs))) == 4, "workers are forked while threads of this loader live"
    assert same([*expected[0][:1], *iterator], expected[0])


def train_again(make):
    loader = make()
    loader.set_epoch(0)
    return loader


def resources():
    names = threads()
    return len(names), len(os.listdir("/proc/self/fd")), names


def test_epochs_and_abandoned_epochs_leave_nothing_behind(make):
    loader = make()
    for epoch in range(3):
        loader.set_epoch(epoch)
        next(iter(loader))
        loader.set_epoch(epoch)
        list(loader)
    count, files, names = resources()
    for epoch in range(10):
        loader.set_epoch(epoch)
        next(iter(loader))
        loader.set_epoch(epoch)
        list(loader)
    deadline = time.monotonic() + 60
    while (now := resources())[0] > count and time.monotonic() < deadline:
        time.sleep(0.05)  # Nobody waits for the end of some.
    assert now[0] <= count, (now[2], names)
    assert now[1] <= files
    assert multiprocessing.active_children() == []
    assert not [thread for thread in threading.enumerate() if not thread.is_alive()]


def test_a_file_that_was_damaged_since_is_named(photographs, tmp_path):
    for kind in ("files", "files with workers", "dali"):
        config = configure(photographs, kind)
        images = tmp_path / kind
        shutil.copytree(photographs.root, images)
        for damage in ("truncate", "remove"):
            prepared = PreparedSet(photographs.folder, photographs.manifest)
            prepared.root = images
            loader = make_loader(config, prepared)
            victim = loader.samples.path(5)
            content = victim.read_bytes()
            victim.write_bytes(content[:2000])
            if damage == "remove":
                victim.unlink()
            with pytest.raises(DataError) as caught:
                list(loader)
            assert str(victim) in str(caught.value)
            assert "Traceback" not in str(caught.value)
            assert "\n" not in str(caught.value)
            victim.write_bytes(content)
            loader.set_epoch(0)
            assert len(list(loader)) == 4, "a loader works again when the file is back"


def statistics(loader, epochs=40):
    """Mean and standard error of what augmentation does to the images of a class, over some epochs."""
    colours, turns = [], []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            images = batch.images.double()
            colours.append(images.mean(dim=(2, 3)))
            turns.append((images[..., :24].mean(dim=(1, 2, 3)) - images[..., 24:].mean(dim=(1, 2, 3))).abs())
    values = torch.cat([torch.cat(colours), torch.cat(turns)[:, None]], dim=1)
    return values.mean(0), values.std(0) / len(values) ** 0.5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("memory", "files", "files with workers")])
def test_the_views_are_those_of_the_folder_loader(photographs, kind):
    """The same boxes of the same images: they differ by interpolation, and by JPEG where a file was compressed anew."""
    squares = "squares" in kind
    reference = configure(photographs, "memory" if squares else "files")
    config = configure(photographs, kind)
    for options in ({}, {"augment": Augment(crop="padded")}, {"augment": Augment(crop="none")}, {"augment": None}):
        mine, theirs = (make_loader(c, photographs, **options) for c in (config, reference))
        if "quasi" in kind:
            object.__setattr__(mine.order, "permute", None)
        differences = []
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.indices, b.indices)
            differences.append((a.images.double() - b.images.double()).abs().mean())
        difference = float(torch.stack(differences).mean())
        print(f"{kind} {options}: mean difference {difference:.2f} of 255")
        # 48-pixel views of 224-pixel photographs; another image, box or flip differs by 40 to 80.
        assert difference < 8
    (a, a_error), (b, b_error) = (statistics(make_loader(c, photographs)) for c in (config, reference))
    assert torch.all((a - b).abs() < 4 * (a_error**2 + b_error**2).sqrt() + 0.5)
