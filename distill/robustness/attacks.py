"""An attack from plain data: which torchattacks class, with which arguments, at which radius; and its repairs.

The only file that imports torchattacks, and only when an attack is planned. What torchattacks 3.5.1 gets wrong is put
right here, on its own parts:

- AutoAttack runs 10 steps where the official one takes 100 (its issue 196): ``steps`` is an argument here, and the
  ensemble is run part by part, target by target, each on the images that are left.
- ``n_classes`` becomes n_classes − 1 targets, 999 on ImageNet: here at most the official nine, unless asked.
- CW (``repaired: true``): the objective takes a masked 0 for a logit, wrong where logits are negative (its issue 184);
  it stops early on the cost summed over the batch; pixels at exactly 0 or 1 have no finite start and never move.
- APGDT with norm L2 takes the step size of the first image for all: here APGD runs, on the targeted loss.
- APGD, APGDT, FAB and Square seed the global generators: ``drawing.PerImage`` answers instead, and they are put back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import ConfigError, MissingPackageError
from distill.randomness import uniforms
from distill.robustness.threat import Threat

REMARKS = {
    "AutoAttack": "with steps=10, as torchattacks has it, where the official one takes 100 (its issue 196)",
    "CW": "torchattacks' own version: its objective is wrong where logits are negative (its issue 184), it stops "
    "early, and pixels at exactly 0 or 1 never move",
}
"""What a reader of a result must know about an attack as torchattacks 3.5.1 has it; a part of its specification."""
TOGETHER = frozenset(
    {
        *("APGD", "APGDT", "BIM", "DIFGSM", "EOTPGD", "FAB", "FFGSM", "FGSM", "Jitter", "MIFGSM", "NIFGSM", "PGD"),
        *("PGDL2", "PIFGSM", "RandomNoise", "RepairedCW", "RFGSM", "SINIFGSM", "Square", "TIFGSM", "TPGD", "UPGD"),
        *("VMIFGSM", "VNIFGSM"),
    }
)
"""Classes that treat the images of a batch each on its own; a test holds that. Any other gets one image at a time."""
MEMORYLESS = frozenset({"BIM", "PGD", "TPGD"})
"""Classes that make the next image from the present one, the clean one and the label alone, by steps of one size: where
an image comes back, the rest repeats what was. A test holds that."""
SEARCHING = ("CW", "DeepFool", "EADEN", "EADL1", "FAB", "JSMA", "OnePixel", "Pixle", "RepairedCW", "SparseFool")
"""Classes that look for a near image and may end outside the ball, where an image is not broken. Others must stay."""
OFFICIAL_TARGETS = 9
OURS: dict[str, Any] = {"alpha_ratio": 1.0, "target": "", "within_radius": False, "repaired": False, "source": ""}
"""Arguments of ours in a suite, with their defaults; ``distill.robustness.suite.plan`` says what they mean."""
Attack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PlannedAttack:
    """One attack at one radius.

    Attributes:
        name: its name in the suite.
        attack: class of torchattacks.
        epsilon: radius of the ball, in 1/255 for L∞ and in [0, 1] pixels for L2; None where the attack has none or sets
            its own ``eps``.
        arguments: as the suite gives them.
        norm: of the ball, ``Linf`` or ``L2``.
    """

    name: str
    attack: str
    epsilon: float | None
    arguments: Mapping[str, Any]
    norm: str = "Linf"

    @property
    def label(self) -> str:
        """``pgd20@16``, ``pgd20@L2-0.5``, or the bare name where there is no radius."""
        if self.epsilon is None:
            return self.name
        return f"{self.name}@{'L2-' if self.norm == 'L2' else ''}{self.epsilon:g}"

    @property
    def radius(self) -> float | None:
        """The radius in [0, 1] pixels, if the attack has one from the list."""
        if self.epsilon is None:
            return None
        return self.epsilon if self.norm == "L2" else self.epsilon / 255


@dataclass(frozen=True)
class Stage:
    """A part of an attack: one object of torchattacks, run once on the images that are left.

    Attributes:
        key: names its random numbers among those of the attack.
        searching: whether it may end outside the ball.
        memoryless: whether it makes the next image from the present one alone.
        start: (model, indices of the images) → what turns images and labels into adversarial images.
    """

    key: str
    searching: bool
    memoryless: bool
    start: Callable[[nn.Module, Sequence[int]], Attack]


@dataclass(frozen=True)
class BuiltAttack:
    """An attack that is ready to run.

    Attributes:
        stages: run one after the other, each on the images that no earlier one broke.
        threat: what breaks an image.
        together: whether images are attacked together; else one at a time.
        seed: of its random numbers.
        specification: class, every argument with the defaults that are really used, library version, the attacks that
            an ensemble consists of, the threat, and known faults.
    """

    stages: list[Stage]
    threat: Threat
    together: bool
    seed: int
    specification: dict[str, Any]


def build(planned: PlannedAttack, num_classes: int, seed: int, values: int) -> BuiltAttack:
    """What one attack does, exactly.

    Args:
        planned: made by ``distill.robustness.suite.plan``, which has checked its arguments.
        num_classes: of the model.
        seed: of attacks that are given none.
        values: numbers of an image, 3·H·W.

    Raises:
        ConfigError: see ``check_classes``.
    """
    given = {key: value for key, value in planned.arguments.items() if key not in OURS}
    own = {**OURS, **{key: value for key, value in planned.arguments.items() if key in OURS}}
    name = "RepairedCW" if own["repaired"] else planned.attack
    used = {**parameters(name), **given}
    if (radius := radius_argument(used)) and planned.radius is not None:
        used[radius] = planned.radius
    if "norm" in used:
        used["norm"] = given.get("norm", planned.norm)
    if own["alpha_ratio"] != OURS["alpha_ratio"] or "alpha_ratio" in planned.arguments:
        used["alpha"] = own["alpha_ratio"] * used["eps"]
    if "n_classes" in used:
        used["n_classes"] = given.get("n_classes", min(num_classes, OFFICIAL_TARGETS + 1))
    if "seed" in used:
        used["seed"] = seed if used["seed"] is None or "seed" not in given else given["seed"]
    check_classes(planned, num_classes)
    threat = _threat(planned, name, used, bool(own["within_radius"]), values)
    parts = _ensemble(used) if planned.attack == "AutoAttack" else [(name, used)]
    stages = [stage for attack, arguments in parts for stage in _stages(attack, arguments, own["target"], seed)]
    specification: dict[str, Any] = {
        "attack": name,
        "arguments": used,
        "library": f"torchattacks {metadata.version('torchattacks')}",
        "threat": {"norm": threat.norm, "radius": threat.radius},
    }
    specification |= {key: own[key] for key in ("target", "source") if own[key]}
    if planned.attack == "AutoAttack":
        specification["ensemble"] = [{"attack": attack, "arguments": arguments} for attack, arguments in parts]
    if name in REMARKS and not (name == "AutoAttack" and used["steps"] >= 100):
        specification["remark"] = REMARKS[name]
    used_seed = int(used.get("seed", seed))
    together = all(attack in TOGETHER for attack, _ in parts)
    return BuiltAttack(stages, threat, together, used_seed, specification)


def check_classes(planned: PlannedAttack, num_classes: int) -> None:
    """Whether an attack works for a model of so many classes.

    Raises:
        ConfigError: naming ``attacks.suite.<name>``.
    """
    key, attack, arguments = f"attacks.suite.{planned.name}", planned.attack, planned.arguments
    # The loss DLR divides by a difference that involves the third largest logit, its targeted version the fourth.
    needed = 4 if attack in ("APGDT", "AutoAttack") else 3 if arguments.get("loss") == "dlr" else 0
    if num_classes < needed:
        what = attack if needed == 4 else f"{attack} with loss=dlr"
        raise ConfigError(f"{key}: {what} needs at least {needed} classes and the model has {num_classes}.")
    if arguments.get("n_classes", 0) > num_classes:
        raise ConfigError(
            f"{key}.n_classes={arguments['n_classes']} must not exceed the model's {num_classes} classes."
        )


@functools.cache
def library() -> dict[str, Any]:
    """The classes of torchattacks that need nothing but a model, by name, with ours in the place of those repaired.

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
    own = {name: cls for name, cls in vars(torchattacks).items() if inspect.isclass(cls) and _needs_only_a_model(cls)}
    return {**own, **_ours(torchattacks)}


def parameters(attack: str) -> dict[str, Any]:
    """Arguments of a class and their defaults; of AutoAttack also those of its parts."""
    signature = inspect.signature(library()[attack])
    found = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    return {**found, "steps": 10, "n_queries": 5000} if attack == "AutoAttack" else found


def norm_of(attack: str, arguments: Mapping[str, Any]) -> str:
    """The norm that an attack's ``eps``, or what it minimises, is measured in."""
    if attack in ("PGDL2", "PGDRSL2", "CW", "RepairedCW", "DeepFool"):
        return "L2"
    return str(arguments.get("norm", parameters(attack).get("norm", "Linf")))


def radius_argument(arguments: Container[str]) -> str | None:
    """Which argument of an attack is the radius of its ball; None for one without a ball."""
    return next((name for name in ("eps", "max_epsilon") if name in arguments), None)


def _threat(planned: PlannedAttack, name: str, used: Mapping[str, Any], within: bool, values: int) -> Threat:
    if within:
        assert planned.radius is not None, "checked by plan"
        # The L2 ball that just holds the L∞ ball: a corner of it has this length.
        return Threat("L2", planned.radius * (1 if planned.norm == "L2" else values**0.5))
    radius = radius_argument(used)
    return Threat(norm_of(name, used), used[radius] if radius else None)


def _needs_only_a_model(cls: type) -> bool:
    signature = inspect.signature(cls)
    return [p.name for p in signature.parameters.values() if p.default is p.empty] == ["model"]


def _ensemble(used: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The attacks of a version of AutoAttack in their order (Croce and Hein, ICML 2020)."""

    def part(attack: str, **more: Any) -> tuple[str, dict[str, Any]]:
        shared = {key: used[key] for key in ("norm", "eps", "seed", "steps", "n_queries", "n_classes")}
        known = parameters(attack)
        return attack, {**known, **{key: value for key, value in shared.items() if key in known}, **more}

    targeted = [part("APGDT"), part("FAB", multi_targeted=True), part("Square")]
    if used["version"] == "standard":
        return [part("APGD", loss="ce"), *targeted]
    if used["version"] == "plus":
        first = [part("APGD", loss="ce", n_restarts=5), part("APGD", loss="dlr", n_restarts=5)]
        return [*first, part("FAB", n_restarts=5), targeted[2], *targeted[:2]]
    return [part("APGD", loss=loss, eot_iter=20) for loss in ("ce", "dlr")]


def _stages(attack: str, arguments: Mapping[str, Any], target: str, seed: int) -> list[Stage]:
    """One stage for each target class and restart of an attack."""
    targeted = attack == "APGDT" or (attack == "FAB" and arguments["multi_targeted"])
    ranks = range(2, arguments["n_classes"] + 1) if targeted else [0]
    restarts = arguments.get("n_restarts", 1)

    def start(model: nn.Module, indices: Sequence[int], rank: int, restart: int) -> Attack:
        made = library()[attack](model, **{**arguments, **({"n_restarts": 1} if "n_restarts" in arguments else {})})
        if target:
            choose = functools.partial(_targets, made, target, seed, indices)
            made.set_mode_targeted_by_function(choose, quiet=True)
        if attack in ("APGDT", "FAB"):
            made.begin(rank, restart)
        run: Attack = made
        return run

    return [
        Stage(
            f"{attack}{rank}.{restart}",
            searching=attack in SEARCHING,
            memoryless=attack in MEMORYLESS,
            start=functools.partial(start, rank=rank, restart=restart),
        )
        for rank in ranks
        for restart in range(restarts)
    ]


def _targets(attack: Any, kind: str, seed: int, indices: Sequence[int], images: Tensor, labels: Tensor) -> Tensor:
    """int64 (N,): the class that each image is to be taken for; never its own."""
    with torch.no_grad():
        logits: Tensor = attack.get_logits(images)
    own = F.one_hot(labels, logits.shape[1]).bool()
    if kind == "most_likely":
        return logits.masked_fill(own, -torch.inf).argmax(1)
    if kind == "least_likely":
        return logits.masked_fill(own, torch.inf).argmin(1)
    drawn = torch.zeros(len(labels), dtype=torch.int64)
    numbers = uniforms(seed, "attack:target", 0, list(indices), 1)[:, 0]
    drawn[: len(indices)] = 1 + torch.as_tensor(numbers * (logits.shape[1] - 1)).long()
    return (labels + drawn.clamp(1, logits.shape[1] - 1).to(labels.device)) % logits.shape[1]


def _ours(torchattacks: Any) -> dict[str, Any]:
    """Classes of torchattacks with their faults repaired, and one of ours."""

    class APGD(torchattacks.APGD):
        """One run from one start, on images that are all right when clean."""

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            found: Tensor = self.attack_single_run(images, labels)[3]
            return found

    class APGDT(APGD):
        """APGD on the targeted DLR loss, towards the class of one rank."""

        def __init__(self, model: nn.Module, *, n_classes: int = 10, **arguments: Any):
            super().__init__(model, **arguments, loss="dlr")
            self.n_target_classes = n_classes - 1

        def begin(self, rank: int, restart: int) -> None:
            self.rank = rank

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                logits = self.get_logits(images)
            # With the own class in front, the second is the likeliest of the others.
            ranked = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), torch.inf).sort(dim=1).indices
            # torchattacks compares what is assigned with all it has seen, which tensors cannot bear.
            object.__setattr__(self, "chosen", ranked[:, -self.rank])
            return super().forward(images, labels)

        def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
            largest, rows = x.sort(dim=1).values, torch.arange(len(x))
            spread = largest[:, -1] - (largest[:, -3] + largest[:, -4]) / 2
            return -(x[rows, y] - x[rows, self.chosen]) / (spread + 1e-12)

    class FAB(torchattacks.FAB):
        """One run, towards one class or the nearest; every restart but the first begins at random."""

        def begin(self, rank: int, restart: int) -> None:
            self.target_class, self.restart = rank, restart

        def _get_predicted_label(self, x: Tensor) -> Tensor:
            if self.right:
                # The clean images, all of which are right. Asked again, rows that only fill up would be left out.
                return self.right.pop()
            predicted: Tensor = super()._get_predicted_label(x)
            return predicted

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            object.__setattr__(self, "right", [labels])
            run = self.attack_single_run_targeted if self.multi_targeted else self.attack_single_run
            found: Tensor = run(images, labels, use_rand_start=self.restart > 0)
            return found

    class Square(torchattacks.Square):
        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            self.init_hyperparam(images)
            found: Tensor = self.attack_single_run(images, labels)[1]
            return found

    class RepairedCW(torchattacks.CW):
        """The nearest adversarial image of each image over all steps (Carlini and Wagner, 2017, with one constant)."""

        def f(self, outputs: Tensor, labels: Tensor) -> Tensor:
            own = F.one_hot(labels, outputs.shape[1]).bool()
            margin = outputs[own] - outputs.masked_fill(own, -torch.inf).amax(1)
            return (-margin if self.targeted else margin).clamp_min(-self.kappa)

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            wanted = self.get_target_label(images, labels) if self.targeted else labels
            w = torch.atanh((2 * images - 1) * (1 - 1e-6)).requires_grad_(True)
            optimizer = torch.optim.Adam([w], lr=self.lr)
            nearest, best = torch.full_like(images[:, 0, 0, 0], torch.inf), images.clone()
            for _ in range(self.steps):
                moved = (torch.tanh(w) + 1) / 2
                distance = (moved - images).square().flatten(1).sum(1)
                outputs = self.get_logits(moved)
                (w.grad,) = torch.autograd.grad((distance + self.c * self.f(outputs, wanted)).sum(), w)
                optimizer.step()
                with torch.no_grad():
                    hit = (outputs.argmax(1) == wanted) == self.targeted
                    hit &= distance < nearest
                    nearest, best = distance.where(hit, nearest), moved.where(hit[:, None, None, None], best)
            return best.detach()

    class RandomNoise(torchattacks.attack.Attack):
        """A random corner of the L∞ ball, or a random point of the L2 sphere: noise as strong as an attack may be."""

        def __init__(self, model: nn.Module, norm: str = "Linf", eps: float = 8 / 255):
            super().__init__("RandomNoise", model)
            self.norm, self.eps = norm, eps

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            noise = torch.randn(images.shape).to(images.device)
            if self.norm == "Linf":
                return (images + self.eps * noise.sign()).clamp(0, 1)
            length = noise.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
            return (images + self.eps * noise / length).clamp(0, 1)

    # Their arguments are read from the signature, which a class without its own would hide.
    APGDT.__signature__ = inspect.signature(torchattacks.APGDT)
    classes = (APGD, APGDT, FAB, Square, RepairedCW, RandomNoise)
    return {cls.__name__: cls for cls in classes}
