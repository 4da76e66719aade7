"""AutoAttack is never weaker than any attack that it consists of.

An attack draws its random numbers by its name in the suite, the radius, the part and the image. A part that runs alone
under the ensemble's name therefore does to every image exactly what it does within the ensemble, so that the ensemble
leaves exactly the images that every part leaves. Under names of their own the parts begin elsewhere, and only the
ensemble's larger effort speaks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from distill.data.batch import Batch
from distill.robustness.attacks import build
from distill.robustness.results import AttackResult
from distill.robustness.runner import run_attack, top_accuracy
from distill.robustness.suite import plan, shipped_suite


def parts(whole: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a standard AutoAttack consists of, each as an attack of its own with the same budget."""
    shared = {key: whole[key] for key in ("norm",) if key in whole}
    steps = {**shared, "steps": whole["steps"]}
    return {
        "apgd": {"attack": "APGD", "loss": "ce", **steps},
        "apgdt": {"attack": "APGDT", **steps},
        "fab": {"attack": "FAB", "multi_targeted": True, **steps},
        "square": {"attack": "Square", "n_queries": whole["n_queries"], **shared},
    }


def attacked(
    network: nn.Module, batch: Batch, name: str, entry: Mapping[str, Any], radius: float, norm: str, seed: int
) -> AttackResult:
    """One attack under a name, on the images that are right when clean."""
    right = top_accuracy(network, [batch], quiet=True).correct
    (planned,) = plan({name: entry}, [radius], norm)
    return run_attack(network, batch, right, planned, num_classes=10, seed=seed, quiet=True)


def compare(network: nn.Module, batch: Batch, norm: str, radius: float, seed: int, **budget: int) -> AttackResult:
    """Run the ensemble and each part alone, hold the deterministic fact, and give the ensemble's outcome."""
    suite = shipped_suite("strict" if norm == "Linf" else "strict_l2")
    entry = {**suite["autoattack"], **budget}
    whole = attacked(network, batch, "autoattack", entry, radius, norm, seed)
    survivors = whole.right.clone()
    for part in parts(entry).values():
        alone = attacked(network, batch, "autoattack", part, radius, norm, seed)
        assert whole.accuracy <= alone.accuracy, part
        assert not (whole.robust & ~alone.robust).any(), part
        survivors &= alone.robust
    assert torch.equal(whole.robust, survivors)
    return whole


def test_the_parts_alone_are_those_of_the_ensemble() -> None:
    """The same classes with the same arguments in the same order, at the full budget."""
    entry = shipped_suite("strict")["autoattack"]
    (whole,) = plan({"autoattack": entry}, [8.0])
    alone = [build(one, 10, 3, 768).specification for one in plan(parts(entry), [8.0])]
    ensemble = build(whole, 10, 3, 768).specification["ensemble"]
    assert ensemble == [{key: each[key] for key in ("attack", "arguments")} for each in alone]
    assert [each["arguments"].get("steps", 5000) for each in alone] == [100, 100, 100, 5000]


@pytest.mark.parametrize(("norm", "radius"), [("Linf", 8.0), ("Linf", 20.0), ("L2", 1.0)])
def test_the_ensemble_leaves_what_every_part_leaves(network: nn.Module, batch: Batch, norm: str, radius: float) -> None:
    """With a small budget, so that the parts differ in what they break."""
    few = Batch(batch.images[:60], batch.labels[:60], batch.indices[:60])
    whole = compare(network, few, norm, radius, seed=0, steps=4, n_queries=60)
    assert 0 < whole.accuracy < 0.95


def test_parts_under_names_of_their_own(network: nn.Module, batch: Batch) -> None:
    """Other random numbers: no part is better by more than one image in a hundred, nor breaks many others."""
    entry = {**shipped_suite("strict")["autoattack"], "steps": 10, "n_queries": 100}
    whole = attacked(network, batch, "autoattack", entry, 16.0, "Linf", 0)
    for name, part in parts(entry).items():
        alone = attacked(network, batch, name, part, 16.0, "Linf", 0)
        assert whole.accuracy <= alone.accuracy + 0.01, name
        assert (whole.robust & ~alone.robust).double().mean() <= 0.01, name


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "radius"), [("Linf", 8.0), ("Linf", 16.0), ("L2", 1.0)])
def test_the_full_budget(network: nn.Module, batch: Batch, norm: str, radius: float) -> None:
    for seed in (0, 1):
        whole = compare(network, batch, norm, radius, seed)
        assert whole.accuracy < float(whole.right.double().mean())
