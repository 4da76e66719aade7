"""Figures made from accuracies: robustness ratios, mean and spread over students (SPEC §3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def robustness_ratio(clean: float, attacked: Sequence[float]) -> float | None:
    """RR = 1 − (C − ā) / (C − a_min): 1 when the attacks do no harm on average, 0 when each does the worst harm.

    Args:
        clean: accuracy C without attack, a fraction.
        attacked: accuracies under the attacks; ā is their mean and a_min their least.

    Returns:
        A number, or None where it is undefined: no attack, or C = a_min.
    """
    if not attacked or clean == min(attacked):
        return None
    return 1 - (clean - mean(attacked)) / (clean - min(attacked))


def improved_robustness_ratio(clean: float, attacked: Sequence[float]) -> float | None:
    """I-RR = 1 − (C − ā)(C − a_min) / C², as RR but with the size of the loss; None without attacks or where C = 0."""
    if not attacked or clean == 0:
        return None
    return 1 - (clean - mean(attacked)) * (clean - min(attacked)) / clean**2


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def sample_deviation(values: Sequence[float]) -> float | None:
    """Standard deviation with n − 1 in the denominator; None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """``{"mean", "sd", "n"}`` of the values that are defined; None when none is."""
    known = [value for value in values if value is not None]
    return {"mean": mean(known), "sd": sample_deviation(known), "n": len(known)} if known else None


def attack_label(attack: Mapping[str, Any]) -> str:
    """``pgd20@16`` for an attack of ``results.json`` at 16/255, ``pgd20@L2-0.5``, or the bare name."""
    epsilon = attack["epsilon"]
    if epsilon is None:
        return str(attack["name"])
    return f"{attack['name']}@{'L2-' if attack.get('norm') == 'L2' else ''}{epsilon:g}"


def ratios(network: Mapping[str, Any]) -> dict[str, float | None]:
    """``{"rr", "i_rr"}`` of one network's part of ``results.json``, over all its attacks at all radii.

    The clean accuracy in them is that of the attacked images, which may be fewer than the tested ones.
    """
    attacked = [attack["accuracy"] for attack in network["attacks"]]
    clean = network["attacks"][0]["clean"] if attacked else network["clean"]["top1"]
    return {"rr": robustness_ratio(clean, attacked), "i_rr": improved_robustness_ratio(clean, attacked)}


def summarise(networks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, sample standard deviation and number over networks that differ in their seed.

    Args:
        networks: the parts ``students`` of ``results.json``; accuracies are fractions.

    Returns:
        ``{"top1": S, "top5": S, "attacks": {"pgd20@16": S, …}, "rr": S | None, "i_rr": S | None}`` with
        S = ``{"mean", "sd", "n"}``, sd None for a single network. The ratios are means of each network's own ratio.
    """
    labels = dict.fromkeys(attack_label(attack) for network in networks for attack in network["attacks"])
    by_label = {
        label: [a["accuracy"] for network in networks for a in network["attacks"] if attack_label(a) == label]
        for label in labels
    }
    own = [ratios(network) for network in networks]
    return {
        "top1": spread([network["clean"]["top1"] for network in networks]),
        "top5": spread([network["clean"]["top5"] for network in networks]),
        "attacks": {label: spread(values) for label, values in by_label.items()},
        "rr": spread([ratio["rr"] for ratio in own]),
        "i_rr": spread([ratio["i_rr"] for ratio in own]),
    }
