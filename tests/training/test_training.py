"""Schedules, the engine, checkpoints and the loop, on scikit-learn's digits."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from distill.config import EngineConfig, SqueezeConfig
from distill.data.batch import Batch
from distill.errors import ArtifactError, NonFiniteError
from distill.randomness import permutation
from distill.training.checkpoint import Checkpoint
from distill.training.engine import Task, build_engine
from distill.training.loop import train
from distill.training.monitor import Monitor, NullMonitor
from distill.training.processes import Processes
from distill.training.schedule import build_optimizer, learning_rate_factor

ALONE = Processes(0, 1, torch.device("cpu"))


class DigitsLoader:
    """Digits in memory with a position, as the Loader contract asks."""

    def __init__(self, batch_size=100):
        digits = load_digits()
        images = torch.from_numpy(digits.images * 255 / 16).to(torch.uint8)
        self.images = images[:, None].expand(-1, 3, -1, -1).contiguous()
        self.labels = torch.from_numpy(digits.target.astype(np.int64))
        self.batch_size, self.epoch, self.position = batch_size, 0, 0

    def __len__(self):
        return len(self.labels) // self.batch_size

    def __iter__(self):
        order = torch.from_numpy(permutation(0, "order", self.epoch, len(self.labels)))
        while self.position < len(self):
            chosen = order[self.position * self.batch_size :][: self.batch_size]
            self.position += 1
            yield Batch(self.images[chosen], self.labels[chosen], chosen, self.epoch)

    def set_epoch(self, epoch):
        self.epoch, self.position = epoch, 0

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


class DigitsTask(Task):
    def __init__(self, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        self.calls, self.fail_at = 0, fail_at

    def forward(self, batch):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        loss = nn.functional.cross_entropy(self.network(batch.images / 255), batch.labels)
        return {"loss": loss, "cross_entropy": loss}


def make(tmp_path, fail_at=None, ema=0.9, minutes=0.0, optimizer="adamw"):
    task, loader = DigitsTask(fail_at), DigitsLoader()
    config = SqueezeConfig(epochs=3, optimizer=optimizer, lr=0.01, warmup_epochs=0.5)
    engine = build_engine(EngineConfig("torch"), ALONE)
    engine.prepare(task, *build_optimizer(task.network, config, 3, len(loader)), ema=ema)
    return engine, loader, Checkpoint(tmp_path, ALONE, minutes=minutes)


def finish(engine, loader, checkpoint):
    train(engine, loader, 3, checkpoint, NullMonitor(), description="test", every=7)
    return engine.trained_network().state_dict()


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


def test_only_the_last_checkpoint_stays_and_a_torn_one_is_passed_over(tmp_path):
    engine, loader, checkpoint = make(tmp_path)
    finish(engine, loader, checkpoint)
    (kept,) = tmp_path.iterdir()
    torn = tmp_path / ".checkpoint-00000999.tmp"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half")
    again = make(tmp_path)
    assert again[2].restore(again[0], again[1])
    assert again[0].step_count == 51
    (kept / "state.pt").write_bytes((kept / "state.pt").read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be read"):
        again[2].restore(again[0], again[1])
    again[2].remove()
    assert not list(tmp_path.iterdir())


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
