"""Attacks against the truth: on a linear model the nearest adversarial image of every image is known.

Ten classes, of which two can be reached: the other eight logits are constant and far below. An image then stays right
in a ball of radius ε exactly where its margin is larger than ε times the dual norm of the difference of the two rows of
weights: L1 for an L∞ ball, L2 for an L2 ball. The images are kept so far inside the pixel range that no ball leaves it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.robustness.runner import run_attack, top_accuracy
from distill.robustness.suite import plan

LINF = [0.25, 1.5, 3.0, 4.0, 5.0]
"""Radii in 1/255."""
L2 = [0.01, 0.05, 0.1, 0.14, 0.18]
"""Radii in [0, 1] pixels."""
HALF_A_POINT = 0.005
ROUNDING = 2e-6
"""In [0, 1] pixels: how near its analytic radius an image may be broken by a hair less, in float32."""
EVEN, ODD = 3, 7


class TwoOfTen(nn.Module):
    """Logits of ``EVEN`` and ``ODD`` are linear in the image; those of the others are −1000."""

    def __init__(self, weights: Tensor, biases: Tensor):
        super().__init__()
        self.linear = nn.Linear(weights.shape[1], 2)
        self.linear.weight.data, self.linear.bias.data = weights, biases

    def forward(self, images: Tensor) -> Tensor:
        logits = images.new_full((len(images), 10), -1000.0)
        columns = torch.tensor([EVEN, ODD], device=images.device)
        return logits.index_copy(1, columns, self.linear(images.flatten(1)))


@dataclass(frozen=True)
class Linear:
    """The model, its images, and the length of the shortest way across the boundary from each (0 where wrong)."""

    model: TwoOfTen
    batch: Batch
    right: Tensor
    radii: dict[str, Tensor]

    def run(self, norm: str, epsilon: float, entry: dict[str, object]) -> Tensor:
        """bool (N,): which images the attack leaves standing."""
        (planned,) = plan({"attack": entry}, [epsilon], norm)
        return run_attack(
            *(self.model, self.batch, self.right, planned),
            num_classes=10,
            batch_size=1024,
            forward_batch=512,
            quiet=True,
        ).robust

    def truth(self, norm: str, epsilon: float) -> Tensor:
        """bool (N,): which images no attack can break."""
        return self.radii[norm] > (epsilon / 255 if norm == "Linf" else epsilon)


@pytest.fixture(scope="module")
def linear() -> Linear:
    """A logistic regression that tells even from odd digits, and 1000 digits that it has not seen."""
    from sklearn.datasets import load_digits

    scans, digits = load_digits(return_X_y=True)
    # Between 0.44 and 0.56, as bytes; three equal channels of 8x8.
    images = torch.tensor(112 + scans * 2).round().to(torch.uint8).reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    images, odd = images.contiguous(), torch.tensor(digits % 2).long()
    fitted = LogisticRegression(C=5, max_iter=2000).fit(images[1000:, 0].flatten(1).numpy() / 255, odd[1000:].numpy())
    slope = torch.tensor(fitted.coef_[0]).reshape(1, 64)
    # Unequal shares for the channels, and a part that moves both logits alike.
    slope = (torch.tensor([[0.5], [0.3], [0.2]], dtype=torch.float64) * slope).reshape(1, -1)
    shared = torch.randn(1, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * slope.abs().mean()
    weights = torch.cat([shared - slope / 2, shared + slope / 2])
    biases = torch.tensor([-0.5, 0.5], dtype=torch.float64) * float(fitted.intercept_[0])
    model = TwoOfTen(weights.float(), biases.float())
    batch = Batch(images[:1000], torch.where(odd[:1000] == 1, ODD, EVEN), torch.arange(1000))
    signs = 2.0 * odd[:1000].double() - 1
    flat = batch.images.flatten(1).double() / 255
    difference = (model.linear.weight[1] - model.linear.weight[0]).detach().double()
    margin = signs * (flat @ difference + (model.linear.bias[1] - model.linear.bias[0]).detach().double())
    right = top_accuracy(model, [batch], quiet=True).correct
    assert torch.equal(right, margin > 0)
    radii = {"Linf": margin / difference.abs().sum(), "L2": margin / difference.norm()}
    return Linear(model, batch, right, radii)


def share(robust: Tensor) -> float:
    return robust.double().mean().item()


def assert_sound(linear: Linear, norm: str, epsilon: float, robust: Tensor) -> None:
    """No attack breaks what cannot be broken."""
    radius = epsilon / 255 if norm == "Linf" else epsilon
    assert not (~robust & (linear.radii[norm] > radius + ROUNDING)).any()


def test_the_radii_span_the_whole_curve_and_no_ball_is_cut(linear: Linear) -> None:
    for norm, epsilons in (("Linf", LINF), ("L2", L2)):
        curve = [share(linear.truth(norm, epsilon)) for epsilon in epsilons]
        assert curve == sorted(curve, reverse=True)
        assert curve[0] > 0.85
        assert curve[-1] < 0.15
    inside = min(linear.batch.images.min() / 255, 1 - linear.batch.images.max() / 255)
    assert inside >= max(max(LINF) / 255, max(L2))
    assert linear.truth("Linf", 0).equal(linear.right)


@pytest.mark.parametrize(
    ("norm", "entry"),
    [
        ("Linf", {"attack": "PGD", "steps": 100, "alpha_ratio": 0.25}),
        ("Linf", {"attack": "MIFGSM", "steps": 20, "alpha_ratio": 1.0, "decay": 1.0}),
        ("Linf", {"attack": "APGD", "steps": 40}),
        ("Linf", {"attack": "APGDT", "steps": 40, "n_classes": 2}),
        ("Linf", {"attack": "FAB", "steps": 10}),
        ("Linf", {"attack": "FAB", "steps": 10, "multi_targeted": True, "n_classes": 3}),
        ("L2", {"attack": "PGDL2", "steps": 100, "alpha_ratio": 0.25}),
        ("L2", {"attack": "APGD", "steps": 40}),
        ("L2", {"attack": "FAB", "steps": 10}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(each) for each in value.values()),
)
def test_attacks_with_gradients_find_the_truth(
    linear: Linear, norm: str, entry: dict[str, object], record_property: Callable[[str, object], None]
) -> None:
    """PGD, MIM and APGD exactly; FAB ends up to half a percent beyond the boundary, where it needs its overshoot."""
    for epsilon in LINF if norm == "Linf" else L2:
        robust = linear.run(norm, epsilon, entry)
        gap = share(robust) - share(linear.truth(norm, epsilon))
        record_property(f"gap at {epsilon:g}", round(100 * gap, 2))
        assert abs(gap) <= (HALF_A_POINT if entry["attack"] == "FAB" else 0.001), (epsilon, gap)
        assert_sound(linear, norm, epsilon, robust)


@pytest.mark.parametrize(
    ("norm", "entry", "most"),
    [
        ("Linf", {"attack": "Square", "n_queries": 300}, 0.25),
        ("L2", {"attack": "Square", "n_queries": 100}, 0.6),
        ("L2", {"attack": "CW", "repaired": True, "within_radius": True, "c": 1.0, "steps": 100}, 0.1),
        ("L2", {"attack": "CW", "repaired": True, "within_radius": True, "c": 0.1, "lr": 0.001, "steps": 200}, 0.02),
        pytest.param("Linf", {"attack": "Square", "n_queries": 5000}, 0.1, marks=pytest.mark.slow),
        pytest.param("L2", {"attack": "Square", "n_queries": 5000}, 0.3, marks=pytest.mark.slow),
    ],
    ids=["square-linf", "square-l2", "cw", "cw-slowly", "square-linf-5000", "square-l2-5000"],
)
def test_attacks_that_search_break_nothing_robust(
    linear: Linear,
    norm: str,
    entry: dict[str, object],
    most: float,
    record_property: Callable[[str, object], None],
) -> None:
    """Square and CW may miss images, and the gap is written down, but never break one that is robust."""
    for epsilon in (LINF if norm == "Linf" else L2)[1::2]:
        robust = linear.run(norm, epsilon, entry)
        gap = share(robust) - share(linear.truth(norm, epsilon))
        record_property(f"gap at {epsilon:g}", round(100 * gap, 2))
        print(f"{entry} {norm} {epsilon:g}: {100 * gap:.2f} points above the truth")
        assert_sound(linear, norm, epsilon, robust)
        assert -0.001 <= gap <= most
        assert share(robust) < share(linear.right) - 0.02, "it does break some"


def test_cw_within_an_l2_ball_that_holds_the_linf_ball(linear: Linear) -> None:
    """At an L∞ radius CW counts within the L2 ball around it, ε·√(3·H·W) long; images robust there stay."""
    entry: dict[str, object] = {"attack": "CW", "repaired": True, "within_radius": True, "c": 1.0, "steps": 100}
    robust = linear.run("Linf", 1.0, entry)
    length = 192**0.5 / 255
    assert 0.2 < share(linear.truth("L2", length)) < share(linear.truth("Linf", 1.0))
    assert_sound(linear, "L2", length, robust)
    assert share(robust) < share(linear.truth("L2", length)) + 0.1
