"""What is known of a network after it was tested and attacked: outcomes per image, and their share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill.robustness.metrics import ratios


@dataclass(frozen=True)
class CleanResult:
    """Answers of a network on images that nobody attacked, in the order of the loader.

    Attributes:
        correct: bool (N,), the first answer is the label.
        in_top5: bool (N,), the label is among the five first answers (all, where there are fewer classes).
        indices: int64 (N,), positions of the images in the list of samples.
        num_classes: number of logits.
    """

    correct: Tensor
    in_top5: Tensor
    indices: Tensor
    num_classes: int

    def as_json(self) -> dict[str, Any]:
        """``{"top1": fraction, "top5": fraction, "count": N}``."""
        count = len(self.correct)
        return {"top1": int(self.correct.sum()) / count, "top5": int(self.in_top5.sum()) / count, "count": count}


@dataclass(frozen=True)
class AttackResult:
    """What one attack at one radius left standing.

    Attributes:
        name, norm, epsilon: as in the suite; the radius in units of 1/255 for L∞, of [0, 1] pixels for L2, or None.
        robust: bool (N,), correct when clean and still correct when attacked.
        right: bool (N,), correct when clean: these were attacked.
        forward, backward: passes through the network, summed over the attacked images.
        specification: class, all arguments, library version, threat and seed.
    """

    name: str
    norm: str
    epsilon: float | None
    robust: Tensor
    right: Tensor
    forward: int
    backward: int
    specification: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Share of all N images that are robust."""
        return int(self.robust.sum()) / len(self.robust)

    def as_json(self) -> dict[str, Any]:
        """The attack's entry in ``results.json``; ``effort`` is passes for each attacked image."""
        attacked = max(int(self.right.sum()), 1)
        return {
            "name": self.name,
            "norm": self.norm,
            "epsilon": self.epsilon,
            "accuracy": self.accuracy,
            "clean": int(self.right.sum()) / len(self.right),
            "count": len(self.robust),
            "effort": {"forward": self.forward / attacked, "backward": self.backward / attacked},
            "specification": self.specification,
        }


@dataclass(frozen=True)
class AttackReport:
    """Clean and attacked accuracy of one network; every outcome is in ascending order of the images' indices."""

    clean: CleanResult
    attacks: list[AttackResult]

    @property
    def count(self) -> int:
        """Number of images N."""
        return len(self.clean.correct)

    def as_json(self) -> dict[str, Any]:
        """The network's part of ``results.json``: clean accuracy, every attack, RR and I-RR."""
        network = {"clean": self.clean.as_json(), "attacks": [attack.as_json() for attack in self.attacks]}
        return {**network, **ratios(network)}
