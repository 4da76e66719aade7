"""A network that hides its gradients is found out; an honest one is left in peace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.robustness.runner import run_attack, top_accuracy
from distill.robustness.sanity import checks, judge, subset


class _Quantised(nn.Module):
    """Pixels rounded to three levels on the way in: the gradient is zero almost everywhere (Athalye et al., 2018)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((2 * images).round() / 2)
        return logits


def _judged(model: nn.Module, batch: Batch, teacher: nn.Module, norm: str, epsilon: float) -> dict[str, Any]:
    chosen = torch.as_tensor(subset(len(batch), 40))
    few = Batch(batch.images[chosen], batch.labels[chosen], batch.indices[chosen])
    right = top_accuracy(model, [few], quiet=True).correct
    found = []
    for one in checks(norm, [epsilon], "seed0"):
        source = teacher if one.arguments.get("source") else None
        found.append(run_attack(model, few, right, one, num_classes=10, source=source, quiet=True).as_json())
    return judge([], found)


def test_an_honest_network_raises_no_flag(network: nn.Module, batch: Batch) -> None:
    for norm, epsilon in (("Linf", 20.0), ("L2", 1.5)):
        result = _judged(network, batch, network, norm, epsilon)
        assert [each["name"] for each in result["checks"]] == ["far", "noise", "square", "transfer"]
        assert result["flags"] == []
        by_name = {each["name"]: each for each in result["checks"]}
        assert by_name["far"]["value"] == 0
        assert by_name["noise"]["value"] > by_name["noise"]["reference"] + 0.2


def test_hidden_gradients_are_found(network: nn.Module, batch: Batch) -> None:
    result = _judged(_Quantised(network), batch, network, "Linf", 30.0)
    failed = {each["name"] for each in result["checks"] if not each["passed"]}
    assert {"far", "transfer"} <= failed
    assert len(result["flags"]) == len(failed)
    for flag in result["flags"]:
        assert flag.startswith("gradient masking suspected: ")
    assert any("made for the teacher" in flag and "at 30" in flag for flag in result["flags"])


def test_a_larger_ball_that_helps_is_suspicious() -> None:
    def curve(*accuracies: float) -> list[dict[str, Any]]:
        radii = (4.0, 1.0, 2.0)
        return [{"name": "pgd", "epsilon": e, "accuracy": a} for e, a in zip(radii, accuracies, strict=True)]

    assert judge(curve(0.2, 0.6, 0.4), [])["flags"] == []
    (flag,) = judge(curve(0.5, 0.6, 0.4), [])["flags"]
    assert flag == "gradient masking suspected: pgd leaves 50.0 % standing at 4, 40.0 % at pgd@2"
    (flag,) = judge(curve(0.238, 0.2, 0.219), [])["flags"]
    assert "23.8 % standing at 4, 20.0 % at pgd@1" in flag, "small rises add up"
    assert judge([{"name": "cw", "epsilon": None, "accuracy": 0.3}], []) == {"flags": [], "checks": []}


def test_two_points_are_not_suspicious() -> None:
    def outcome(name: str, images: int, epsilon: float = 1.0) -> dict[str, Any]:
        return {"name": name, "epsilon": epsilon, "accuracy": images / 100}

    for images in range(99):
        checked = [outcome("sanity_white", images + 2), outcome("sanity_noise", images)]
        curve = [outcome("pgd", images), outcome("pgd", images + 2, 2.0)]
        assert judge(curve, checked)["flags"] == []
        if images:
            worse = [outcome("sanity_white", images + 2), outcome("sanity_noise", images - 1)]
            assert len(judge([curve[1], outcome("pgd", images - 1, 1.0)], worse)["flags"]) == 2


def test_every_part_of_the_images_has_its_share() -> None:
    assert subset(1000, 4).tolist() == [0, 333, 666, 999]
    assert subset(3, 100).tolist() == [0, 1, 2]
    assert [one.label for one in checks("L2", [0.5, 0.25, 1.0], "teacher")] == [
        *("sanity_white@L2-0.5", "sanity_far@L2-32", "sanity_noise@L2-0.5", "sanity_square@L2-0.5"),
    ]
