"""Schedules, the engine, checkpoints and the loop, on scikit-learn's digits."""

import json
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.config import EngineConfig
from distill.errors import ArtifactError, NonFiniteError
from distill.training.checkpoint import Checkpoint
from distill.training.engine import build_engine
from distill.training.health import Health, short
from distill.training.loop import train
from distill.training.monitor import Monitor
from distill.training.processes import Processes
from distill.training.schedule import learning_rate_factor
from tests.training.digits import ALONE, DigitsLoader, DigitsTask, finish, make


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [1, 10, 17, 18, 40])
def test_interrupted_equals_uninterrupted(tmp_path, stop, optimizer):
    whole = finish(*make(tmp_path / "whole", optimizer=optimizer))
    parts = make(tmp_path / "parts", fail_at=stop, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        finish(*parts)
    resumed = make(tmp_path / "parts", optimizer=optimizer)
    ended = finish(*resumed)
    assert resumed[0].task.calls == 3 * 17 - stop
    assert all(torch.equal(whole[name], ended[name]) for name in whole)


def checkpoints(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_kill_left_of_a_save_goes_with_the_next(tmp_path):
    engine, loader, checkpoint = make(tmp_path, minutes=60)
    engine.step(next(iter(loader)))
    half = tmp_path / ".checkpoint-00000000.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert not checkpoint.restore(engine, loader)
    checkpoint.save(engine, loader)
    assert checkpoints(tmp_path) == [".checkpoint-00000001"]


def damage(path, kind):
    content = path.read_bytes()
    middle = len(content) // 2
    changed = {
        "truncated": content[:-100],
        "empty": b"",
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[kind])


def test_the_last_checkpoints_stay(tmp_path):
    for keep, names in ((1, [51]), (3, [49, 50, 51])):
        folder = tmp_path / str(keep)
        engine, loader, _ = make(folder)
        finish(engine, loader, Checkpoint(folder, ALONE, minutes=0.0, keep=keep))
        assert checkpoints(folder) == [f".checkpoint-{step:08d}" for step in names]


@pytest.mark.parametrize("kind", ["truncated", "empty", "one bit", "missing"])
@pytest.mark.parametrize("file", ["state.pt", "position.json"])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, capsys, file, kind):
    engine, loader, checkpoint = make(tmp_path)
    finish(engine, loader, checkpoint)
    whole = engine.trained_network().state_dict()
    half = tmp_path / ".checkpoint-00000999.tmp"
    half.mkdir()
    damage(tmp_path / ".checkpoint-00000051" / file, kind)
    capsys.readouterr()

    again = make(tmp_path)
    assert again[2].restore(again[0], again[1])
    assert again[0].step_count == 50
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert ".checkpoint-00000051 is damaged" in told
    assert "going on from step 50" in told

    # What is made anew takes the place of what was damaged.
    ended = finish(*make(tmp_path))
    assert all(torch.equal(whole[name], ended[name]) for name in whole)
    capsys.readouterr()
    last = make(tmp_path)
    assert last[2].restore(last[0], last[1])
    assert (last[0].step_count, capsys.readouterr().err) == (51, "")
    assert checkpoints(tmp_path) == [".checkpoint-00000050", ".checkpoint-00000051"]

    for step in (50, 51):
        damage(tmp_path / f".checkpoint-{step:08d}" / file, kind)
    fresh = make(tmp_path)
    with pytest.raises(ArtifactError, match=r"00000051 is damaged .*00000050 is damaged .*remove .*checkpoint-\*"):
        fresh[2].restore(fresh[0], fresh[1])
    fresh[2].remove()
    assert checkpoints(tmp_path) == []


def test_checkpoints_newer_than_the_one_restored_make_room(tmp_path):
    """They were damaged; left there they would count among the last ones."""
    engine, loader, checkpoint = make(tmp_path)
    finish(engine, loader, checkpoint)
    damage(tmp_path / ".checkpoint-00000051/state.pt", "truncated")
    (tmp_path / ".checkpoint-00000051").rename(tmp_path / ".checkpoint-00000077")
    finish(*make(tmp_path, fail_at=None))
    assert checkpoints(tmp_path) == [".checkpoint-00000050", ".checkpoint-00000051"]


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(tmp_path):
    """40 is good and 50 damaged: a save at 60 keeps 40."""
    engine, loader, checkpoint = make(tmp_path, minutes=60)
    for step, batch in enumerate([batch for _ in range(4) for batch in _epoch(loader)][:50], start=1):
        engine.step(batch)
        if step in (40, 50):
            checkpoint.save(engine, loader)
    damage(tmp_path / ".checkpoint-00000050/state.pt", "one bit")
    again, loader, checkpoint = make(tmp_path, minutes=60)
    assert checkpoint.restore(again, loader)
    assert again.step_count == 40
    for batch in [*_epoch(loader), *_epoch(loader)][:20]:
        again.step(batch)
    checkpoint.save(again, loader)
    assert checkpoints(tmp_path) == [".checkpoint-00000040", ".checkpoint-00000060"]
    damage(tmp_path / ".checkpoint-00000060/state.pt", "one bit")
    last, loader, checkpoint = make(tmp_path)
    assert checkpoint.restore(last, loader)
    assert last.step_count == 40


def _epoch(loader):
    loader.set_epoch(0)
    return list(loader)


def test_a_checkpoint_that_does_not_fit_says_what_removing_it_does(tmp_path):
    engine, loader, checkpoint = make(tmp_path)
    finish(engine, loader, checkpoint)
    other, loader, checkpoint = make(tmp_path)
    other.task.network[1] = nn.Identity()
    with pytest.raises(ArtifactError, match=r"00000051 .* does not fit \(.*Unexpected key.* go on from step 50\.$"):
        checkpoint.restore(other, loader)
    shutil.rmtree(tmp_path / ".checkpoint-00000050")
    with pytest.raises(ArtifactError, match=r"remove it to start that training again\.$"):
        checkpoint.restore(other, loader)


def test_a_lost_rank_is_not_told_as_an_unreadable_checkpoint(tmp_path):
    engine, loader, checkpoint = make(tmp_path)
    finish(engine, loader, checkpoint)

    def lost(folder):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2000")

    engine.load = lost
    with pytest.raises(RuntimeError, match="closed by peer"):
        checkpoint.restore(engine, loader)


def test_the_end_of_an_epoch_is_the_start_of_the_next(tmp_path):
    """How many batches an epoch has may depend on the world size, so its end is not written as a count."""
    engine, loader, checkpoint = make(tmp_path)
    for batch in loader:
        engine.step(batch)
    checkpoint.save(engine, loader)
    assert loader.state_dict() == {"epoch": 0, "position": 17}
    stored = json.loads((tmp_path / ".checkpoint-00000017/position.json").read_text())
    assert stored["loader"] == {"epoch": 1, "position": 0}


def test_epochs_are_kept_when_a_tenth_of_the_time_has_passed(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("distill.training.checkpoint.time", SimpleNamespace(monotonic=lambda: now[0]))
    checkpoint = Checkpoint(tmp_path, ALONE, minutes=1 / 60)
    seen = []
    for passed in (0.0, 0.09, 0.11, 0.99, 1.01):
        now[0] = 1000 + passed
        seen.append((checkpoint.due(epoch_ends=True), checkpoint.due()))
    assert seen == [(False, False), (False, False), (True, False), (True, False), (True, True)]
    other = Checkpoint(tmp_path, Processes(1, 2, torch.device("cpu")), minutes=0)
    assert not other.due(epoch_ends=True), "the clock of rank 0 decides"


def test_health_counts_images_and_waiting(tmp_path):
    began = time.monotonic()
    health = Health(ALONE)
    time.sleep(0.1)
    health.count(100, 0.04)
    health.count(37, 0.01)
    values = health.record({"loss": torch.tensor(0.5)}, learning_rate=0.1)
    assert (values["loss"], values["learning_rate"]) == (0.5, 0.1)
    elapsed = 137 / values["images_per_second"]
    assert 0.1 <= elapsed <= time.monotonic() - began
    assert values["data_wait"] == pytest.approx(0.05 / elapsed)
    assert short(values)["loss"] == "0.5"
    assert health.record({"loss": torch.tensor(0.5)}, learning_rate=0.1)["images_per_second"] == 0


def test_the_recorded_learning_rate_is_that_of_the_step(tmp_path):
    engine, loader, checkpoint = make(tmp_path / "run", minutes=60)
    monitor = Monitor(tmp_path, "teacher", tensorboard=False)
    train(engine, loader, 3, checkpoint, monitor, description="test", every=1)
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    factor = learning_rate_factor("cosine", 51, warmup=8)
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01 * factor(step) for step in range(51)])
    assert all(line["parameter_gradient"] > 0 for line in lines)


def test_accumulation_gives_the_same_step():
    """Without batch norm the mean over micro-batches is the batch."""
    results = []
    for accumulation in (1, 4):
        engine, loader = _without_batchnorm(accumulation)
        for batch in loader:
            engine.step(batch)
        results.append(engine.trained_network().state_dict())
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def _without_batchnorm(accumulation):
    task, loader = DigitsTask(), DigitsLoader()
    task.network[1] = nn.Identity()
    engine = build_engine(EngineConfig("torch"), ALONE)
    optimizer = torch.optim.SGD(task.network.parameters(), lr=0.05)
    engine.prepare(task, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), accumulation)
    return engine, loader


def test_nan_stops_before_the_step_and_names_step_and_term(tmp_path):
    engine, loader, _ = make(tmp_path)
    batches = iter(loader)
    engine.step(next(batches))
    before = {name: value.clone() for name, value in engine.task.state_dict().items()}
    hook = engine.task.register_forward_hook(lambda module, inputs, terms: {**terms, "loss": terms["loss"] * math.nan})
    with pytest.raises(NonFiniteError, match="loss became nan at step 1"):
        engine.step(next(batches))
    hook.remove()
    hook = engine.task.register_forward_hook(lambda m, i, terms: {k: v * math.inf for k, v in terms.items()})
    with pytest.raises(NonFiniteError, match="cross_entropy became inf at step 1"):
        engine.step(next(batches))
    weights = {name: value for name, value in before.items() if "running" not in name and "num_batches" not in name}
    assert all(torch.equal(value, engine.task.state_dict()[name]) for name, value in weights.items())


def test_learning_rates():
    cosine = learning_rate_factor("cosine", 100, warmup=10)
    assert [cosine(0), cosine(9)] == [0.1, 1.0]
    assert cosine(10) == 1.0
    assert cosine(55) == pytest.approx(0.5)
    assert cosine(100) == pytest.approx(0.0)
    assert learning_rate_factor("linear", 10)(5) == 0.5
    step = learning_rate_factor("step", 10, milestones=[3, 6], factor=0.1)
    assert [step(2), step(3), step(6)] == pytest.approx([1, 0.1, 0.01])
    assert learning_rate_factor("constant", 10)(9) == 1.0


def test_monitor_survives_half_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "teacher", "st')
    monitor = Monitor(tmp_path, "teacher", tensorboard=False)
    monitor.scalars(3, {"loss": 0.5}, "a")
    monitor.close()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["loss"], last["series"]) == (3, 0.5, "a")
