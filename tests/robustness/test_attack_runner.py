"""Outcomes per image: right figures, counted randomness, nothing left behind."""

from __future__ import annotations

import gc
import json
import random
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.errors import DataError, GuardError, NonFiniteError
from distill.robustness import attack_accuracy
from distill.robustness.attacks import PlannedAttack, library
from distill.robustness.runner import run_attack, top_accuracy
from distill.robustness.suite import plan, shipped_suite

PGD = {"attack": "PGD", "steps": 5, "alpha_ratio": 0.25}


def test_accuracy_falls_with_the_radius(network: nn.Module, batch: Batch) -> None:
    report = attack_accuracy(network, [batch], epsilon=(1, 8, 16, 64), quiet=True)
    accuracies = [attack.accuracy for attack in report.attacks]
    assert report.clean.as_json()["top1"] > 0.95
    assert report.count == 120
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > 0.9
    assert accuracies[3] < 0.02
    for attack in report.attacks:
        assert not (attack.robust & ~report.clean.correct).any()
        assert attack.as_json()["clean"] == report.clean.as_json()["top1"]


def test_outcomes_do_not_depend_on_the_loader(network: nn.Module, batch: Batch) -> None:
    shuffled = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    loaders = [
        [batch],
        [Batch(*part) for part in zip(*(t.split(7) for t in (batch.images, batch.labels, batch.indices)), strict=True)],
        [Batch(batch.images[shuffled], batch.labels[shuffled], batch.indices[shuffled])],
    ]
    suite = {"pgd": PGD, "apgd": {"attack": "APGD", "steps": 3}}
    first, *others = (
        attack_accuracy(network, loader, suite, epsilon=[12], batch_size=50, quiet=True) for loader in loaders
    )
    assert first.clean.indices.tolist() == batch.indices.tolist()
    assert 0 < first.attacks[0].robust.sum() < len(batch)
    for other in others:
        assert torch.equal(other.clean.correct, first.clean.correct)
        for mine, theirs in zip(first.attacks, other.attacks, strict=True):
            assert torch.equal(mine.robust, theirs.robust)


def test_one_attack_alone_is_the_same_as_in_its_suite(network: nn.Module, batch: Batch) -> None:
    suite = {"square": {"attack": "Square", "n_queries": 20}, "pgd": PGD}
    report = attack_accuracy(network, [batch], suite, epsilon=[8, 16], batch_size=50, quiet=True)
    alone = plan(suite, [8, 16])[3]
    again = run_attack(
        *(network, batch.images, batch.labels, report.clean.correct, alone), num_classes=10, batch_size=50, quiet=True
    )
    assert (alone.label, report.attacks[3].as_json()) == ("pgd@16", again.as_json())
    assert torch.equal(again.robust, report.attacks[3].robust)


def test_nothing_is_left_behind(network: nn.Module, batch: Batch) -> None:
    network.train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    statistics = network[1].running_mean.clone()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    few = Batch(batch.images[:6], batch.labels[:6], batch.indices[:6])
    suite = {"fab": {"attack": "FAB", "steps": 2}, "apgd": {"attack": "APGD", "steps": 2}, "pgd": PGD}
    with torch.no_grad():
        attack_accuracy(network, [few], suite, epsilon=[4], quiet=True)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    assert before[2] == random.getstate()
    assert network.training
    assert not network[1].training
    assert [p.requires_grad for p in network.parameters()] == [False] + [True] * 9
    assert all(p.grad is None or not p.grad.isnan().any() for p in network.parameters())
    assert torch.equal(statistics, network[1].running_mean)
    network[0].weight.requires_grad_(True)


class _Watching(nn.Module):
    """Keeps what it is shown while someone asks for gradients of the images."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.shown = network, []

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            self.shown.append(images.detach().clone())
        return self.network(images)


def test_an_image_that_is_wrong_when_clean_is_never_attacked(network: nn.Module, batch: Batch) -> None:
    labels = batch.labels.clone()
    labels[::3] = (labels[::3] + 1) % 10
    watching = _Watching(network)
    suite = {"pgd": {**PGD, "random_start": False}}
    report = attack_accuracy(
        watching, [Batch(batch.images, labels, batch.indices)], suite, epsilon=[2], batch_size=32, quiet=True
    )
    right = report.clean.correct
    assert not right[::3].any()
    shown = torch.cat(watching.shown)
    assert len(shown) == 5 * int(right.sum())
    nearest = torch.cdist(shown.flatten(1), (batch.images / 255).flatten(1)).argmin(1)
    assert set(nearest.tolist()) == set(right.nonzero().flatten().tolist())
    assert not report.attacks[0].robust[~right].any()


def test_the_paper_suite_runs_and_is_written_down(network: nn.Module, batch: Batch) -> None:
    few = Batch(batch.images[:5], batch.labels[:5], batch.indices[:5])
    suite = shipped_suite("paper")
    report = attack_accuracy(network, [few], suite, epsilon=[48], batch_size=4, quiet=True)
    written = json.loads(json.dumps(report.as_json()))
    assert [attack["name"] for attack in written["attacks"]] == list(suite)
    by_name = {attack["name"]: attack for attack in written["attacks"]}
    assert by_name["cw"]["epsilon"] is None
    assert by_name["autoattack"]["accuracy"] <= by_name["pgd100"]["accuracy"] < 0.5
    for attack in written["attacks"]:
        specification = attack["specification"]
        assert (specification["library"], specification["seed"], specification["batch_size"]) == (
            *("torchattacks 3.5.1", 0, 4),
        )
        assert attack["count"] == 5
    assert written["clean"] == {"top1": 1.0, "top5": 1.0, "count": 5}
    assert 0 <= written["rr"] <= 1


def test_top5_counts_and_few_classes(network: nn.Module, batch: Batch) -> None:
    worst = nn.Sequential(network, _Negate())
    result = top_accuracy(worst, [batch], quiet=True)
    assert result.as_json()["top5"] <= 0.05
    assert result.num_classes == 10
    three = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    labels = batch.labels % 3
    assert top_accuracy(three, [Batch(batch.images, labels, batch.indices)], quiet=True).as_json()["top5"] == 1
    with pytest.raises(DataError, match="no image"):
        top_accuracy(network, [], quiet=True)
    with pytest.raises(DataError, match="no image"):
        attack_accuracy(network, [], quiet=True)


class _Negate(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return -logits


def test_broken_attacks_and_networks_are_errors(
    network: nn.Module, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch.ones(len(batch), dtype=torch.bool)
    planned = PlannedAttack("pgd", "PGD", 1.0, {})

    def run() -> None:
        run_attack(network, batch.images, batch.labels, right, planned, num_classes=10, quiet=True)

    pgd = library()["PGD"]
    for change, error, message in (
        (lambda images: images + 3 / 255, GuardError, r"left the pixel range"),
        (lambda images: images.clamp(5 / 255, 250 / 255), GuardError, r"moved a pixel by 5\.0000/255, beyond .* 1/255"),
        (lambda images: images * float("nan"), NonFiniteError, r"pgd@1 made NaN pixels"),
    ):
        monkeypatch.setattr(pgd, "forward", lambda self, images, labels, change=change: change(images))
        with pytest.raises(error, match=message):
            run()
    monkeypatch.undo()
    run()
    broken = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    broken[1].weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN or infinite logits on clean images"):
        attack_accuracy(broken, [batch], quiet=True)


def test_an_attacked_network_can_be_forgotten(batch: Batch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    watch = weakref.ref(model)
    attack_accuracy(model, [batch], {"fgsm": {"attack": "FGSM"}, "apgd": {"attack": "APGD", "steps": 2}}, quiet=True)
    del model
    gc.collect()
    assert watch() is None


def test_a_network_without_parameters(batch: Batch, capsys: pytest.CaptureFixture[str]) -> None:
    class Brightness(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            quarters = images.mean(1).unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten(1)
            return quarters * 20

    report = attack_accuracy(Brightness(), [batch], PGD, epsilon=[1], quiet=True)
    assert report.attacks[0].name == "pgd"
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(network: nn.Module, batch: Batch) -> None:
    import copy

    model = copy.deepcopy(network).cuda()
    first, again = (attack_accuracy(model, [batch], "quick", epsilon=[8, 64], quiet=True) for _ in range(2))
    assert [a.robust.tolist() for a in first.attacks] == [a.robust.tolist() for a in again.attacks]
    assert first.attacks[1].accuracy < 0.02
