"""An attack from plain data: which torchattacks class, with which arguments, at which radius.

The only file that imports torchattacks, and only when an attack is planned.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from torch import nn

from distill.errors import ConfigError, MissingPackageError

REMARKS = {
    "AutoAttack": "torchattacks' own version: 10 steps where the official one takes 100 (its issue 196)",
    "CW": "torchattacks' own version: its objective is wrong where logits are negative (its issue 184), it stops early "
    "on the cost summed over the batch, and pixels at exactly 0 or 1 never move",
}
"""What a reader of a result must know about a class of torchattacks 3.5.1; a part of the attack's specification."""


@dataclass(frozen=True)
class PlannedAttack:
    """One attack at one radius.

    Attributes:
        name: its name in the suite.
        attack: class of torchattacks.
        epsilon: radius of the L∞ ball in units of 1/255; None where the attack has none or sets its own ``eps``.
        arguments: as the suite gives them.
    """

    name: str
    attack: str
    epsilon: float | None
    arguments: Mapping[str, Any]

    @property
    def label(self) -> str:
        """``pgd20@16``, or the bare name where there is no radius."""
        return self.name if self.epsilon is None else f"{self.name}@{self.epsilon:g}"


def build(planned: PlannedAttack, model: nn.Module, num_classes: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """Construct the torchattacks object and say exactly what it is.

    Args:
        planned: made by ``distill.robustness.suite.plan``, which has checked its arguments.
        model: takes images in [0, 1], gives logits (N, num_classes).
        seed: for classes that take one and are given none.

    Returns:
        The attack, called with images and labels; and its specification: class, every argument with the defaults that
        are really used, library version, the attacks that an ensemble consists of, and known faults.

    Raises:
        ConfigError: the attack does not work for so few classes.
    """
    given = dict(planned.arguments)
    ratio = given.pop("alpha_ratio", None)
    used = {**parameters(planned.attack), **given}
    if planned.epsilon is not None:
        used["eps"] = planned.epsilon / 255
    if ratio is not None:
        used["alpha"] = ratio * used["eps"]
    if "n_classes" in used and "n_classes" not in given:
        # Targeted attacks take n_classes - 1 targets: the library's own nine, never one for each class of ImageNet.
        used["n_classes"] = min(num_classes, used["n_classes"])
    if "seed" in used and "seed" not in given:
        used["seed"] = seed
    _check_classes(planned, used.get("n_classes"), num_classes)
    attack = library()[planned.attack](model, **used)
    specification: dict[str, Any] = {
        "attack": planned.attack,
        "arguments": used,
        "library": f"torchattacks {metadata.version('torchattacks')}",
    }
    if planned.attack == "AutoAttack":
        specification["ensemble"] = [_describe(part) for part in attack._autoattack.attacks]
    if planned.attack in REMARKS:
        specification["remark"] = REMARKS[planned.attack]
    return attack, specification


@functools.cache
def library() -> dict[str, Any]:
    """The classes of torchattacks that need nothing but a model, by name.

    Raises:
        MissingPackageError: torchattacks is not installed.
    """
    try:
        import torchattacks
    except ImportError as error:
        raise MissingPackageError(
            f"Attacks need torchattacks, which could not be imported ({error}); install it with: "
            "pip install --no-deps torchattacks==3.5.1"
        ) from error
    return {name: cls for name, cls in vars(torchattacks).items() if inspect.isclass(cls) and _needs_only_a_model(cls)}


def parameters(attack: str) -> dict[str, Any]:
    """Arguments of a class and their defaults."""
    signature = inspect.signature(library()[attack])
    return {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}


def is_linf(attack: str, arguments: Mapping[str, Any]) -> bool:
    """Whether ``eps`` of an attack is the radius of an L∞ ball."""
    known = parameters(attack)
    norm = arguments.get("norm", known.get("norm", "Linf"))
    return "eps" in known and attack not in ("PGDL2", "PGDRSL2") and norm == "Linf"


def _needs_only_a_model(cls: type) -> bool:
    signature = inspect.signature(cls)
    return [p.name for p in signature.parameters.values() if p.default is p.empty] == ["model"]


def _check_classes(planned: PlannedAttack, n_classes: int | None, num_classes: int) -> None:
    key = f"attacks.suite.{planned.name}"
    # Their targeted loss divides by a difference that involves the fourth largest logit.
    if planned.attack in ("APGDT", "AutoAttack") and num_classes < 4:
        raise ConfigError(f"{key}: {planned.attack} needs at least 4 classes and the model has {num_classes}.")
    if n_classes is not None and n_classes > num_classes:
        raise ConfigError(f"{key}.n_classes={n_classes} must not exceed the model's {num_classes} classes.")


def _describe(part: Any) -> dict[str, Any]:
    """Class and settings of one attack of an ensemble, as the object holds them."""
    base = {"attack", "model_name", "attack_mode", "targeted", "verbose"}
    settings = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str)}
    return {
        "attack": type(part).__name__,
        "arguments": {key: value for key, value in settings.items() if key not in base and not key.startswith("_")},
    }
