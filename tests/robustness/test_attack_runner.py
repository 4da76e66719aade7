"""Outcomes per image: right figures, counted randomness, nothing left behind."""

from __future__ import annotations

import contextlib
import copy
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
from distill.robustness.attacks import MEMORYLESS, TOGETHER, PlannedAttack, library, parameters
from distill.robustness.lending import NothingLeft, answers, lent
from distill.robustness.runner import run_attack, top_accuracy
from distill.robustness.suite import plan, shipped_suite
from distill.robustness.threat import Threat

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


def test_outcomes_depend_neither_on_the_loader_nor_on_the_batch(network: nn.Module, batch: Batch) -> None:
    batch = Batch(batch.images[:70], batch.labels[:70], batch.indices[:70])
    shuffled = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    loaders = [
        [batch],
        [Batch(*part) for part in zip(*(t.split(7) for t in (batch.images, batch.labels, batch.indices)), strict=True)],
        [Batch(batch.images[shuffled], batch.labels[shuffled], batch.indices[shuffled])],
    ]
    suite = {
        "pgd": PGD,
        "apgd": {"attack": "APGD", "steps": 3},
        "random": {**PGD, "target": "random"},
        "cw": {"attack": "CW", "repaired": True, "within_radius": True, "steps": 20, "c": 5},
    }
    first, *others = (
        attack_accuracy(network, loader, suite, epsilon=[12], batch_size=size, forward_batch=8, quiet=True)
        for loader, size in zip(loaders, (64, 7, 1), strict=True)
    )
    assert first.clean.indices.tolist() == batch.indices.tolist()
    assert all(0 < each.robust.sum() < len(batch) for each in first.attacks)
    for other in others:
        assert torch.equal(other.clean.correct, first.clean.correct)
        for mine, theirs in zip(first.attacks, other.attacks, strict=True):
            assert mine.as_json() == theirs.as_json(), "the effort too"
            assert torch.equal(mine.robust, theirs.robust)


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_classes_that_are_run_together_do_not_mix_their_images(network: nn.Module, batch: Batch, name: str) -> None:
    entry: dict[str, object] = {"attack": name}
    if name == "RepairedCW":
        entry = {"attack": "CW", "repaired": True, "within_radius": True, "c": 5}
    known = parameters(name)
    entry |= {key: number for key, number in (("steps", 3), ("n_queries", 60), ("N", 2), ("m", 2)) if key in known}
    if name == "FAB":
        entry["multi_targeted"] = True
    if name == "PGDL2":
        entry |= {"eps": 1.0, "alpha_ratio": 0.25}
    few = Batch(batch.images[:21], batch.labels[:21], batch.indices[:21])
    first, second, third = (
        attack_accuracy(network, [few], {"a": entry}, epsilon=[24], batch_size=size, forward_batch=4, quiet=True)
        for size in (16, 5, 1)
    )
    assert torch.equal(first.attacks[0].robust, second.attacks[0].robust)
    assert torch.equal(first.attacks[0].robust, third.attacks[0].robust)
    assert first.attacks[0].as_json() == second.attacks[0].as_json() == third.attacks[0].as_json()


def test_a_class_that_mixes_its_images_gets_one_at_a_time(network: nn.Module, batch: Batch) -> None:
    assert "DeepFool" not in TOGETHER
    few = Batch(batch.images[:6], batch.labels[:6], batch.indices[:6])
    suite = {"deepfool": {"attack": "DeepFool", "steps": 20}, "onepixel": {"attack": "OnePixel", "steps": 2}}
    one, two = (attack_accuracy(network, [few], suite, batch_size=size, quiet=True) for size in (1, 6))
    for mine, theirs in zip(one.attacks, two.attacks, strict=True):
        assert mine.as_json() == theirs.as_json()
    assert one.attacks[0].accuracy < 1


def test_an_outcome_belongs_to_the_image_wherever_it_stands(network: nn.Module, batch: Batch) -> None:
    some = Batch(batch.images[40:60], batch.labels[40:60], batch.indices[40:60])
    suite = {"pgd": PGD, "square": {"attack": "Square", "n_queries": 50}}
    whole, part = (attack_accuracy(network, [each], suite, epsilon=[14], quiet=True) for each in (batch, some))
    for mine, theirs in zip(whole.attacks, part.attacks, strict=True):
        assert torch.equal(mine.robust[40:60], theirs.robust)


def test_one_attack_alone_is_the_same_as_in_its_suite(network: nn.Module, batch: Batch) -> None:
    suite = {"square": {"attack": "Square", "n_queries": 20}, "pgd": PGD}
    report = attack_accuracy(network, [batch], suite, epsilon=[8, 16], batch_size=50, quiet=True)
    alone = plan(suite, [8, 16])[3]
    again = run_attack(network, batch, report.clean.correct, alone, num_classes=10, quiet=True)
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


class _Inside(nn.Module):
    """A network that computes in a type of its own."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = copy.deepcopy(network).to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_may_compute_in_any_type(network: nn.Module, batch: Batch, dtype: torch.dtype) -> None:
    few = Batch(batch.images[:20], batch.labels[:20], batch.indices[:20])
    suite = {name.lower(): {"attack": name, "steps": 3} for name in ("APGD", "APGDT", "FAB")}
    report = attack_accuracy(_Inside(network, dtype), [few], suite, epsilon=[24], quiet=True)
    assert all(attack.accuracy < report.clean.as_json()["top1"] for attack in report.attacks)


class _Undecided(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 10)


def test_of_equal_answers_the_first_count(batch: Batch) -> None:
    clean = top_accuracy(_Undecided(), [batch], quiet=True)
    assert torch.equal(clean.correct, batch.labels == 0)
    assert torch.equal(clean.in_top5, batch.labels < 5)


def test_answers_are_in_ieee_float32_whatever_surrounds_the_attack(network: nn.Module, batch: Batch) -> None:
    few, matmul = Batch(batch.images[:40], batch.labels[:40], batch.indices[:40]), torch.backends.cuda.matmul
    shown = few.images / 255

    def logits() -> Tensor:
        with lent(network) as handle:
            return answers(handle, shown, "digits")

    plain = logits()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(), plain)
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        report = attack_accuracy(network, [few], {"pgd": PGD}, quiet=True)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert report.attacks[0].as_json() == attack_accuracy(network, [few], {"pgd": PGD}, quiet=True).attacks[0].as_json()


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
    wrong = Batch(batch.images, labels, batch.indices)
    report = attack_accuracy(watching, [wrong], suite, epsilon=[2], batch_size=32, forward_batch=8, quiet=True)
    right = report.clean.correct
    assert not right[::3].any()
    nearest = torch.cdist(torch.cat(watching.shown).flatten(1), (batch.images / 255).flatten(1)).argmin(1)
    assert set(nearest.tolist()) == set(right.nonzero().flatten().tolist())
    assert not report.attacks[0].robust[~right].any()


def test_an_image_is_dropped_as_soon_as_it_is_broken(network: nn.Module, batch: Batch) -> None:
    """From the outcomes of ever longer attacks it is known after which step each image is broken."""
    plain = {**PGD, "random_start": False}
    runs = [
        attack_accuracy(
            network, [batch], {"pgd": {**plain, "alpha_ratio": 0.1, "steps": steps}}, epsilon=[24], quiet=True
        )
        for steps in range(1, 9)
    ]
    right = int(runs[0].clean.correct.sum())
    left = [right, *(int(run.attacks[0].robust.sum()) for run in runs)]
    assert left == sorted(left, reverse=True)
    assert 0 < left[-1] < left[1]
    # The clean images and what the first step makes of them are asked about for all. What breaks is noticed in a step's
    # own pass, so that the next has fewer; the last images are asked about once more, without a gradient.
    backward = right + sum(left[:7])
    result = runs[-1].attacks[0]
    assert (result.forward, result.backward) == (backward + left[7], backward)
    assert result.as_json()["effort"] == {"forward": (backward + left[7]) / right, "backward": backward / right}


@pytest.mark.parametrize("name", sorted(MEMORYLESS))
def test_images_that_go_round_in_a_circle_are_left_alone_and_nothing_else_changes(
    network: nn.Module, batch: Batch, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = {"a": {"attack": name, "steps": 80, "alpha_ratio": 0.25}}
    quick, again = (
        attack_accuracy(network, [batch], suite, epsilon=[12], batch_size=size, forward_batch=8, quiet=True).attacks[0]
        for size in (64, 5)
    )
    monkeypatch.setattr("distill.robustness.attacks.MEMORYLESS", frozenset())
    (whole,) = attack_accuracy(network, [batch], suite, epsilon=[12], forward_batch=8, quiet=True).attacks
    assert 0 < whole.robust.sum() < len(batch)
    assert torch.equal(quick.robust, whole.robust)
    assert quick.backward < 0.6 * whole.backward
    assert quick.as_json() == again.as_json(), "when an image is left alone does not depend on its batch"
    assert quick.specification == whole.specification


@pytest.mark.parametrize("name", sorted(MEMORYLESS))
def test_where_a_memoryless_attack_has_been_before_it_goes_the_same_way_again(
    network: nn.Module, batch: Batch, name: str
) -> None:
    (planned,) = plan({"a": {"attack": name, "steps": 60, "alpha_ratio": 0.25}}, [12])
    few = Batch(batch.images[:16], batch.labels[:16], batch.indices[:16])
    watching = _Watching(network)
    # Another model is the victim, so that no image is dropped, whatever it looks like.
    right = torch.ones(16, dtype=torch.bool)
    run_attack(network, few, right, planned, num_classes=10, forward_batch=16, source=watching, quiet=True)
    steps = torch.stack(watching.shown)
    assert len(steps) == 60
    returns = 0
    for image in steps.unbind(1):
        before: dict[bytes, int] = {}
        for step, now in enumerate(image[:-1]):
            first = before.setdefault(now.numpy().tobytes(), step)
            if first < step:
                returns += 1
                assert torch.equal(image[first + 1], image[step + 1])
    assert returns > 100


def test_a_circle_is_found_whatever_its_length(network: nn.Module) -> None:
    """An attack that shows the same few images in turn."""
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    asked = {}
    for length in (1, 2, 5, 12):
        with lent(network, 4) as watched:
            labels = answers(watched, images, "images").argmax(1)
            clean = torch.zeros(1, 3, 16, 16)
            for memoryless in (True, False):
                watched.forward_passes = 0
                watched.attack(clean, labels[:1], 1, Threat("Linf", 1.0), memoryless)
                with contextlib.suppress(NothingLeft), torch.enable_grad():
                    for step in range(400):
                        # None is ever broken.
                        watched.labels = labels[step % length : step % length + 1]
                        watched(images[step % length][None].clone().requires_grad_())
                asked[length, memoryless] = watched.forward_passes
                watched.release()
    assert [asked[length, False] for length in (1, 2, 5, 12)] == [400] * 4
    assert [asked[length, True] for length in (1, 2, 5, 12)] == [5, 6, 45, 109]


def test_an_ensemble_drops_what_an_earlier_part_broke(network: nn.Module, batch: Batch) -> None:
    # Under one name, for random starts belong to it.
    first = {"aa": {"attack": "APGD", "steps": 5}}
    (alone,) = attack_accuracy(network, [batch], first, epsilon=[24], quiet=True).attacks
    suite = {"aa": {"attack": "AutoAttack", "steps": 5, "n_queries": 30, "n_classes": 4}}
    (whole,) = attack_accuracy(network, [batch], suite, epsilon=[24], quiet=True).attacks
    assert 0 < whole.accuracy <= alone.accuracy < 0.9
    assert not (whole.robust & ~alone.robust).any()
    # One pass and one more for each step and image, of APGD, three targets of APGDT and of FAB, and Square's queries.
    survivors = int(alone.robust.sum())
    assert whole.forward <= alone.forward + survivors * (3 * 8 + 3 * 12 + 32)


def test_another_model_as_the_source(network: nn.Module, batch: Batch) -> None:
    """Images made for another network; the victim is asked once for each."""
    (plan_one,) = plan({"transfer": {**PGD, "source": "teacher"}}, [24])
    torch.manual_seed(3)
    other = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    right = top_accuracy(network, [batch], quiet=True).correct
    known = (network, batch, right, plan_one)
    own = run_attack(*known, num_classes=10, source=network, quiet=True)
    foreign = run_attack(*known, num_classes=10, source=other, quiet=True)
    assert own.accuracy < foreign.accuracy
    assert foreign.forward == int(right.sum()) * (PGD["steps"] + 1)  # type: ignore[operator]
    assert foreign.specification["source"] == "teacher"


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
        assert (specification["library"], specification["seed"]) == ("torchattacks 3.5.1", 0)
        assert attack["effort"]["forward"] > 0
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
        run_attack(network, batch, right, planned, num_classes=10, quiet=True)

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
