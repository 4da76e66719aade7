"""A suite of attacks is data: name → {attack: torchattacks class, its arguments}; here it is checked and planned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.errors import ConfigError
from distill.robustness.attacks import OURS, PlannedAttack, library, norm_of, parameters, radius_argument

TARGETS = ("least_likely", "most_likely", "random")
CHOICES: dict[str, tuple[str, ...]] = {
    "target": TARGETS,
    "source": ("teacher",),
    "norm": ("Linf", "L2"),
    "version": ("standard", "plus", "rand"),
    "APGD.loss": ("ce", "dlr"),
    "Square.loss": ("margin", "ce"),
}
"""Allowed words: of an argument of any class, or of one class alone."""
REAL = ("c", "kappa", "lam", "nsig", "scale")
"""Arguments that torchattacks declares with a whole number although any number fits."""


def plan(suite: Mapping[str, Any], epsilons: Sequence[float], norm: str = "Linf") -> list[PlannedAttack]:
    """Every attack of a suite at every radius, checked against the signatures of torchattacks; nothing is run.

    Args:
        suite: name → {``attack``: class of torchattacks, its arguments}. ``n_classes`` and ``seed`` are filled in where
            the class takes them, and its ``norm`` is that of the threat. An ``eps`` given here (in [0, 1] pixels, in
            the attack's own norm) replaces the radii, and the attack runs once. Ours are:
            ``alpha_ratio``: alpha = ratio·eps;
            ``target``: the class that an image is to be taken for, ``least_likely``, ``most_likely`` or ``random``; an
            image is broken as soon as it is not taken for its own class;
            ``within_radius``: of an attack without ``eps``, such as CW: an image counts as broken only within the ball,
            for an L∞ radius within the L2 ball that just holds it;
            ``repaired``: CW without the faults of torchattacks;
            ``source``: ``teacher`` computes the attack on the teacher, whose images are then shown to the network.
        epsilons: radii, in units of 1/255 for L∞ and of [0, 1] pixels for L2.
        norm: ``Linf`` or ``L2``.

    Returns:
        Attack by attack, each at the radii in their order.

    Raises:
        ConfigError: naming ``attacks.suite.<name>.<argument>`` and what is allowed.
        MissingPackageError: torchattacks is not installed.
    """
    if not suite:
        raise ConfigError("attacks.suite is empty; choose attacks=quick or attacks=paper, or name an attack.")
    if len({f"{epsilon:g}" for epsilon in epsilons}) < len(epsilons):
        raise ConfigError(f"attacks.epsilon={list(epsilons)} must hold each radius once.")
    planned: list[PlannedAttack] = []
    for name, entry in suite.items():
        per_radius = _check_entry(name, entry, norm)
        if per_radius and not epsilons:
            raise ConfigError(f"attacks.epsilon is empty, and attacks.suite.{name} needs at least one radius.")
        arguments = {key: value for key, value in entry.items() if key != "attack"}
        radii = [float(epsilon) for epsilon in epsilons] if per_radius else [None]
        planned += [PlannedAttack(name, entry["attack"], epsilon, arguments, norm) for epsilon in radii]
    return planned


def shipped_suite(name: str) -> dict[str, Any]:
    """A suite of ``configs/attacks`` by its name, for instance ``paper``.

    Raises:
        ConfigError: there is none of that name; the message lists them.
    """
    from omegaconf import OmegaConf

    from distill.compose import group_choices

    files = group_choices()["attacks"]
    if name not in files:
        raise ConfigError(f"There is no attack suite {name!r} in configs/attacks; there are: {', '.join(files)}.")
    content: Any = OmegaConf.to_container(OmegaConf.load(files[name]))
    return dict(content["suite"])


def _check_entry(name: str, entry: Any, norm: str) -> bool:
    """Check one attack of a suite; whether it runs once for each radius."""
    key = f"attacks.suite.{name}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("attack"), str):
        raise ConfigError(f"{key} must name a class of torchattacks, for instance {key}={{attack: PGD, steps: 20}}.")
    attack = entry["attack"]
    if attack not in library():
        raise ConfigError(f"{key}.attack={attack} is not one of: {', '.join(sorted(library()))}.")
    allowed = _allowed(attack)
    for argument in sorted(set(entry) - {"attack"}):
        if argument not in allowed:
            raise ConfigError(f"{key}.{argument} is no argument of {attack}, which takes: {', '.join(allowed)}.")
        _check_value(f"{key}.{argument}", entry[argument], allowed[argument], argument in REAL)
        choices = CHOICES.get(f"{attack}.{argument}", CHOICES.get(argument))
        if choices and entry[argument] not in choices:
            raise ConfigError(f"{key}.{argument}={entry[argument]} is not one of: {', '.join(choices)}.")
    if {"alpha", "alpha_ratio"} <= set(entry):
        raise ConfigError(f"{key} sets both alpha and alpha_ratio; give one of them.")
    radius = radius_argument(allowed)
    if radius is None:
        return bool(entry.get("within_radius"))
    if radius in entry:
        return False
    own = entry.get("norm", norm) if "norm" in allowed else norm_of(attack, entry)
    if own != norm:
        other = " PGDL2 is the L2 version of PGD." if attack == "PGD" else ""
        raise ConfigError(
            f"{key}.{radius} must be set, in [0, 1] pixels: attacks.epsilon holds {norm.replace('inf', '∞')} radii, "
            f"which do not fit this attack.{other}"
        )
    return True


def _allowed(attack: str) -> dict[str, Any]:
    """Arguments that a class takes in a suite, ours among them, with their defaults."""
    allowed = parameters(attack)
    if {"eps", "alpha"} <= set(allowed):
        allowed["alpha_ratio"] = OURS["alpha_ratio"]
    if attack in ("PGD", "CW", "MIFGSM"):
        allowed["target"] = OURS["target"]
    if radius_argument(allowed) is None:
        allowed["within_radius"] = OURS["within_radius"]
    if attack == "CW":
        allowed["repaired"] = OURS["repaired"]
    return {**allowed, "source": OURS["source"]}


def _check_value(key: str, value: Any, default: Any, real: bool) -> None:
    """Compare a value with the kind of the argument's default; None stands for a seed that is not set."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, str):
        fits, kind = isinstance(value, str), "a word"
    elif isinstance(default, tuple):
        fits, kind = isinstance(value, list | tuple), "a list"
    elif isinstance(default, float) or real:
        fits, kind = number and value >= 0, "a number of at least 0"
    else:
        low = 1 if default else 0
        fits, kind = number and isinstance(value, int) and value >= low, f"a whole number of at least {low}"
    if not fits:
        raise ConfigError(f"{key}={value!r} must be {kind}.")
