"""Is a robust accuracy what it seems? Checks for gradient masking (Athalye et al., ICML 2018, section 3.1).

A network may hide its gradients instead of being robust; then attacks that follow them fail, and the accuracy under
attack says nothing. Signs of it, each a check on a few images of every network: a larger ball that helps the network;
a ball as large as the pixel range that leaves images standing; an attack without gradients, images made for another
network, or plain noise that do more harm than an attack with gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.robustness.attacks import PlannedAttack
from distill.robustness.metrics import attack_label

PREFIX = "sanity_"
SLACK = 0.02 + 1e-9
"""Share of the images by which a comparison may fail without being called suspicious, and what the difference of two
shares may be rounded by."""
QUERIES = 200
FAR = {"Linf": 128.0, "L2": 32.0}
"""Radii at which every image can be made to look like another: half the pixel range, and a length beyond any margin."""


def checks(norm: str, epsilons: Sequence[float], network: str) -> list[PlannedAttack]:
    """The attacks of the checks of one network, at the middle one of the radii.

    Args:
        network: images from the teacher are shown to students only.
    """
    middle = sorted(epsilons)[len(epsilons) // 2]
    pgd = "PGD" if norm == "Linf" else "PGDL2"
    white = {"steps": 20, "alpha_ratio": 0.25}
    planned = [
        PlannedAttack(f"{PREFIX}white", pgd, middle, white, norm),
        PlannedAttack(f"{PREFIX}far", pgd, FAR[norm], {"steps": 50, "alpha_ratio": 0.1}, norm),
        PlannedAttack(f"{PREFIX}noise", "RandomNoise", middle, {}, norm),
        PlannedAttack(f"{PREFIX}square", "Square", middle, {"n_queries": QUERIES}, norm),
    ]
    if network != "teacher":
        planned.append(PlannedAttack(f"{PREFIX}transfer", pgd, middle, {**white, "source": "teacher"}, norm))
    return planned


def subset(count: int, wanted: int) -> NDArray[np.int64]:
    """Positions of evenly spaced images among ``count``, so that every class has its share."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(np.int64))


def judge(attacks: Sequence[Mapping[str, Any]], checked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the checks say of a network.

    Args:
        attacks: its attacks in ``results.json``.
        checked: the outcomes of ``checks``, in the same form.

    Returns:
        ``{"flags": [sentence, …], "checks": [{"name", "epsilon", "value", "reference", "passed", "sentence"}, …]}``;
        value and reference are accuracies, and no flag means that nothing is suspicious.
    """
    found = _monotone(attacks)
    by_name = {each["name"].removeprefix(PREFIX): each for each in checked}
    if "far" in by_name:
        far = by_name["far"]
        # Nothing is right any more where the attacker may show any image.
        found.append(_check("far", far, None, far["accuracy"] <= SLACK, "leaves {value} standing in a ball of {label}"))
    white = by_name.get("white")
    for name, what in (
        ("noise", "random noise leaves {value} standing, PGD-20 {reference}"),
        ("square", "Square, without gradients, leaves {value} standing, PGD-20 {reference}"),
        ("transfer", "images made for the teacher leave {value} standing, PGD-20 {reference}"),
    ):
        if white and name in by_name:
            passed = by_name[name]["accuracy"] >= white["accuracy"] - SLACK
            found.append(_check(name, by_name[name], white, passed, what + ", at {label}"))
    flags = [f"gradient masking suspected: {each['sentence']}" for each in found if not each["passed"]]
    return {"flags": flags, "checks": found}


def _monotone(attacks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One check for each attack that ran at several radii: a larger one does at least the harm of any smaller one."""
    names = dict.fromkeys((each["name"], each.get("norm", "Linf")) for each in attacks if each["epsilon"] is not None)
    found = []
    for name, norm in names:
        curve = [a for a in attacks if (a["name"], a.get("norm", "Linf")) == (name, norm)]
        curve = sorted((each for each in curve if each["epsilon"] is not None), key=lambda each: each["epsilon"])
        pairs = list(itertools.combinations(curve, 2))
        if pairs:
            small, large = max(pairs, key=lambda pair: pair[1]["accuracy"] - pair[0]["accuracy"])
            passed = large["accuracy"] <= small["accuracy"] + SLACK
            what = f"{name} leaves {{value}} standing at {{label}}, {{reference}} at {attack_label(small)}"
            found.append(_check(f"larger radius ({name})", large, small, passed, what))
    return found


def _check(
    name: str, value: Mapping[str, Any], reference: Mapping[str, Any] | None, passed: bool, sentence: str
) -> dict[str, Any]:
    beside = None if reference is None else reference["accuracy"]
    said = sentence.format(
        value=f"{100 * value['accuracy']:.1f} %",
        reference="" if beside is None else f"{100 * beside:.1f} %",
        label=attack_label(value).removeprefix(PREFIX).split("@")[-1],
    )
    if name == "far":
        said = f"PGD {said}"
    return {
        "name": name,
        "epsilon": value["epsilon"],
        "value": value["accuracy"],
        "reference": beside,
        "passed": bool(passed),
        "sentence": said,
    }
