"""What torchattacks 3.5.1 gets wrong, shown on it as it is, and right with our repair (SPEC §3)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.robustness import attack_accuracy
from distill.robustness.attacks import build, library
from distill.robustness.suite import plan, shipped_suite


class _Linear(nn.Module):
    """Logits a·x + b of images of 3x2x2, in eval mode."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def _two_classes(shift: float) -> _Linear:
    """Two classes that differ by the brightness of the first pixel; the logits of both are moved by ``shift``."""
    weight = torch.zeros(2, 12)
    weight[1, 0] = 4.0
    return _Linear(weight, torch.tensor([1.0 + shift, shift])).eval().requires_grad_(False)


class _Told:
    """The repaired CW as the runner calls it."""

    def __init__(self, model: nn.Module, **arguments: Any):
        self.attack = library()["RepairedCW"](model, **arguments)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = self.attack(images, labels)
        return found


def _broken_by(attack: Callable[..., Any], shift: float, pixel: float = 0.2, **more: Any) -> list[bool]:
    """Which of two equal images a CW attack breaks; they are right by 0.05 in the first pixel."""
    model, images = _two_classes(shift), torch.full((2, 3, 2, 2), 0.5)
    images[:, 0, 0, 0] = pixel
    labels = torch.zeros(2, dtype=torch.int64)
    assert (model(images).argmax(1) == labels).all()
    found = attack(model, **{"c": 5.0, "steps": 200, "lr": 0.05, **more})(images, labels)
    return [bool(wrong) for wrong in model(found).argmax(1) != labels]


def test_cw_on_negative_logits() -> None:
    """Issue 184: a class that is masked out counts as a logit of 0, which is more than any that is negative."""
    assert _broken_by(torchattacks.CW, shift=5) == [True, True]
    assert _broken_by(torchattacks.CW, shift=-50) == [False, False]
    assert _broken_by(_Told, shift=5) == _broken_by(_Told, shift=-50) == [True, True]


def test_cw_moves_black_and_white_pixels() -> None:
    assert _broken_by(torchattacks.CW, shift=5, pixel=0.0) == [False, False]
    assert _broken_by(_Told, shift=5, pixel=0.0, c=50.0, steps=2000) == [True, True]


def test_cw_does_not_stop_for_the_sake_of_others() -> None:
    """The library stops when the sum of all costs rises: an image's result depends on its company."""
    model = _Rising(_two_classes(5))
    images = torch.full((51, 3, 2, 2), 0.5)
    images[0, 0, 0, 0], images[1:, 0, 0, 0] = 0.2, 0.3
    labels, options = torch.tensor([0] + [1] * 50), {"c": 5.0, "steps": 100, "lr": 0.004}
    labels[1:] = model(images[1:]).argmax(1)

    def first(attack: Callable[..., Any], count: int) -> Tensor:
        found: Tensor = attack(model, **options)(images[:count], labels[:count])[0]
        return found

    assert not torch.equal(first(torchattacks.CW, 1), first(torchattacks.CW, 51))
    assert torch.equal(first(_Told, 1), first(_Told, 51))
    assert (first(_Told, 51) - images[0]).abs().max() > 0.01


class _Rising(nn.Module):
    """All images but the first get a margin that grows as they move, so that their cost rises."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.anchor = model, nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        moved = (images[:, :1, 0, 0] - 0.3).square().detach() * 1e4
        moved[0] = 0
        return torch.cat([logits[:, :1], logits[:, 1:] + moved], dim=1)


def test_autoattack_takes_the_official_steps() -> None:
    """Issue 196: the parts of the library's AutoAttack take 10 steps, and there is no way to ask for more."""
    parts = torchattacks.AutoAttack(_two_classes(0), eps=0.1, n_classes=10)._autoattack.attacks
    assert [part.steps for part in parts[:3]] == [10, 10, 10]
    (strict,) = plan({"aa": shipped_suite("strict")["autoattack"]}, [8.0])
    ensemble = build(strict, 10, 0, 48).specification["ensemble"]
    assert [part["arguments"]["steps"] for part in ensemble[:3]] == [100, 100, 100]


def test_targeted_attacks_take_nine_targets_of_a_thousand() -> None:
    assert torchattacks.APGDT(_two_classes(0), n_classes=1000).n_target_classes == 999
    for attack in ("APGDT", "FAB"):
        entry = {"attack": attack, "multi_targeted": True} if attack == "FAB" else {"attack": attack}
        (one,) = plan({"a": entry}, [8.0])
        assert len(build(one, 1000, 0, 48).stages) == 9
        assert len(build(one, 6, 0, 48).stages) == 5, "every other class, where there are fewer"
        (asked,) = plan({"a": {**entry, "n_classes": 30}}, [8.0])
        assert len(build(asked, 1000, 0, 48).stages) == 29


def _steep(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 10)).eval().requires_grad_(False)
    images = torch.rand(count, 3, 4, 4)
    return model, images, model(images).argmax(1)


def test_apgdt_in_l2_steps_by_each_image() -> None:
    """torchattacks takes the step size of the first image for all, so that the others depend on it."""
    model, images, labels = _steep(6)

    def moved(attack: Any, rows: list[int]) -> Tensor:
        made = attack(model, norm="L2", eps=0.3, steps=40, n_classes=4)
        if hasattr(made, "begin"):
            made.begin(2, 0)
        else:
            made.target_class = 2
        torch.manual_seed(0)
        start = torch.randn(6, 3, 4, 4)
        # The same start for an image, wherever it stands.
        drawn, torch.randn = torch.randn, lambda *shape: start[rows]
        try:
            run = super(type(made), made).attack_single_run if hasattr(made, "begin") else made.attack_single_run
            if hasattr(made, "begin"):
                ranked = model(images[rows]).sort(dim=1).indices
                object.__setattr__(made, "chosen", ranked[:, -2])
            found: Tensor = run(images[rows], labels[rows])[0]
        finally:
            torch.randn = drawn
        return found[rows.index(3)]

    assert not torch.equal(moved(torchattacks.APGDT, [0, 3]), moved(torchattacks.APGDT, [3, 0]))
    assert torch.equal(moved(library()["APGDT"], [0, 3]), moved(library()["APGDT"], [3, 0]))


@pytest.mark.parametrize("name", ["APGD", "APGDT", "FAB", "Square", "AutoAttack"])
def test_the_global_generators_are_left_alone(name: str) -> None:
    model, images, labels = _steep(4)
    torch.manual_seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    few = {"n_queries": 5} if name == "Square" else {} if name == "AutoAttack" else {"steps": 2}
    getattr(torchattacks, name)(model, eps=0.01, **few)(images, labels)
    assert not torch.equal(torch.get_rng_state(), before[0]), "the library seeds for everybody"
    torch.set_rng_state(before[0])
    batch = Batch((255 * images).to(torch.uint8), labels, torch.arange(4))
    entry = {"attack": name, **({"steps": 2, "n_queries": 5} if name == "AutoAttack" else few)}
    attack_accuracy(model, [batch], entry, epsilon=[2], quiet=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert before[1] == np.random.get_state()[1].tolist()
    assert before[2] == random.getstate()
