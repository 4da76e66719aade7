"""Two workers that train the same thing, one of which was taken for dead: neither disturbs the other."""

import multiprocessing
import shutil

import pytest
import torch

from distill.errors import ArtifactError
from distill.training.checkpoint import Checkpoint, Overtaken
from distill.training.loop import train
from distill.training.monitor import NullMonitor
from tests.training.digits import ALONE, DigitsLoader, make

RESULT = "result"


class Trainer:
    """A worker on the training of ``folder``."""

    def __init__(self, folder, keep=2):
        self.engine, self.loader, _ = make(folder)
        self.checkpoint = Checkpoint(folder, ALONE, "-seed0", 0.0, keep, folder / RESULT)

    def restore(self):
        assert self.checkpoint.restore(self.engine, self.loader)
        return self.engine.step_count

    def go_to(self, step):
        """Train so far, and save."""
        while self.engine.step_count < step:
            self.loader.set_epoch(self.engine.step_count // len(self.loader))
            self.loader.position = self.engine.step_count % len(self.loader)
            self.engine.step(next(iter(self.loader)))
        self.checkpoint.save(self.engine, self.loader)

    def state(self):
        return self.engine.trained_network().state_dict()


def steps(folder):
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob(".checkpoint-seed0-*"))


def test_one_that_wakes_up_leaves_the_later_ones(tmp_path):
    sleeper = Trainer(tmp_path)
    sleeper.go_to(4)
    other = Trainer(tmp_path)
    assert other.restore() == 4
    other.go_to(8)
    other.go_to(12)
    sleeper.go_to(6)
    assert steps(tmp_path) == [6, 8, 12]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".checkpoint-seed0-00000012/*")}
    sleeper.go_to(12)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the same state is not written twice"
    assert steps(tmp_path) == [8, 12]
    other.go_to(14)
    assert Trainer(tmp_path).restore() == 14
    third = Trainer(tmp_path)
    third.restore()
    third.go_to(20)
    sleeper.go_to(20)
    assert all(torch.equal(value, sleeper.state()[name]) for name, value in third.state().items())


def test_a_damaged_one_makes_room_for_the_same_step(tmp_path):
    first = Trainer(tmp_path)
    for step in (4, 8):
        first.go_to(step)
    (tmp_path / ".checkpoint-seed0-00000008/state.pt").write_bytes(b"short")
    second = Trainer(tmp_path)
    assert second.restore() == 4
    second.go_to(8)
    assert Trainer(tmp_path).restore() == 8


def test_what_another_writes_or_has_removed_is_no_error(tmp_path):
    first, second = Trainer(tmp_path), Trainer(tmp_path)
    first.go_to(3)
    half = tmp_path / ".checkpoint-seed0-00000009.1234-abcdef01.tmp"
    half.mkdir()
    second.go_to(5)
    assert half.is_dir(), "it may be another worker's, who is writing"
    shutil.rmtree(tmp_path / ".checkpoint-seed0-00000003")
    first.go_to(7)
    for path in tmp_path.glob(".checkpoint-seed0-*"):
        shutil.rmtree(path)
    first.go_to(9)
    assert steps(tmp_path) == [9]


def test_the_checkpoint_that_is_read_goes_meanwhile(tmp_path):
    """Another worker saves a later one, and lets go of it, between the choice and the reading."""
    first, other, late = Trainer(tmp_path, keep=1), Trainer(tmp_path, keep=1), Trainer(tmp_path)
    first.go_to(3)
    assert other.restore() == 3
    load, tried = late.engine.load, []

    def slow(folder):
        if not tried:
            other.go_to(6)
        tried.append(folder.name)
        load(folder)

    late.engine.load = slow
    assert late.restore() == 6
    assert tried == [".checkpoint-seed0-00000003", ".checkpoint-seed0-00000006"]
    late.engine.load = lambda folder: load(folder / "missing")
    with pytest.raises(ArtifactError, match="cannot be read or does not fit"):
        late.restore()


def test_a_training_ends_when_its_result_is_there(tmp_path):
    engine = make(tmp_path)[0]
    checkpoint = Checkpoint(tmp_path, ALONE, "-seed0", 0.0, 2, tmp_path / RESULT)

    class Publishing(DigitsLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 5:
                    (tmp_path / RESULT).write_text("of another worker")
                yield batch

    with pytest.raises(Overtaken):
        train(engine, Publishing(), 3, checkpoint, NullMonitor(), description="test")
    assert engine.step_count == 6


def _work(folder, turns, failed):
    try:
        trainer = Trainer(folder, keep=1)
        for number in range(turns):
            if trainer.engine.step_count >= 20 or number % 7 == 3:
                trainer = Trainer(folder, keep=1)
                if list(folder.glob(".checkpoint-seed0-*[0-9]")):
                    trainer.restore()
            if trainer.engine.step_count < 20:
                trainer.go_to(trainer.engine.step_count + 1)
    except BaseException as error:
        failed.put(repr(error))
        raise


def test_many_at_the_same_time(tmp_path):
    """Three processes start, save, let go and read the same steps in whatever order."""
    whole = Trainer(tmp_path / "whole")
    whole.go_to(20)
    folder = tmp_path / "shared"
    context = multiprocessing.get_context("spawn")
    failed = context.Queue()
    workers = [context.Process(target=_work, args=(folder, 60, failed)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0, 0], failed.get(timeout=5)
    last = Trainer(folder)
    last.restore()
    last.go_to(20)
    assert all(torch.equal(value, last.state()[name]) for name, value in whole.state().items())
