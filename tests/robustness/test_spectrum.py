"""Curvature spectra against dense Hessians, closed forms and the exact maximum of a quadratic in a ball."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn

from distill.config import NetworkConfig
from distill.errors import ConfigError, GuardError, NonFiniteError
from distill.models import Normalize, build_network
from distill.robustness import input_spectrum, top_eigenvalues
from distill.robustness import spectrum as spectrum_module

RADII = (0.1, 0.5, 1.0, 3.0)
Digits = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def smooth(digits: Digits) -> nn.Module:
    """A softplus network in float64, trained for a second: its Hessian is more than that of the softmax."""
    images, labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.Softplus(beta=3),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.Softplus(beta=3),
            nn.Flatten(),
            nn.Linear(8 * 4, 10),
        ).double()
        optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
        for chosen in torch.randperm(1297).repeat(2).split(64):
            optimizer.zero_grad()
            F.cross_entropy(layers(small(images[chosen])), labels[chosen]).backward()
            optimizer.step()
    return layers


def small(images: Tensor) -> Tensor:
    """Digits of 8x8 in float64, normalised."""
    return images[:, :, ::2, ::2].double() / 127.5 - 1


def dense_hessian(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """∇²ℓ (n, n) by autograd's own double loop, the network in eval mode."""

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(network(flat.view(1, *image.shape)), label[None])

    result: Tensor = torch.autograd.functional.hessian(loss, image.flatten())
    return result


def test_equals_the_dense_hessian(smooth: nn.Module, digits: Digits) -> None:
    images, labels = small(digits[0][1300:1306]), digits[1][1300:1306]
    # Wrong labels too: there the loss is not convex.
    labels = torch.cat([labels[:3], (labels[3:] + 1) % 10])
    found = top_eigenvalues(smooth, images, labels, k=4)
    whole = [
        torch.linalg.eigvalsh(dense_hessian(copy.deepcopy(smooth).eval(), *each))
        for each in zip(images, labels, strict=True)
    ]
    wanted = torch.stack([values.flip(0)[:4] for values in whole])
    assert found.shape == (6, 4)
    assert found.dtype == torch.float64
    assert any(-values[0] > 0.05 * values[-1] for values in whole), "the test needs indefinite Hessians"
    assert ((found - wanted).abs() / wanted[:, :1]).max() < 1e-6
    assert ((found[:, 0] - wanted[:, 0]).abs() / wanted[:, 0]).max() < 1e-6
    assert torch.equal(top_eigenvalues(smooth, images, labels)[:, 0].argsort(), wanted[:, 0].argsort())


def test_algebraic_not_by_magnitude(smooth: nn.Module, digits: Digits) -> None:
    """Of ℓ and of -ℓ, one has its eigenvalue of largest magnitude at the lower end: that is never the answer."""
    images, labels = small(digits[0][1300:1303]), (digits[1][1300:1303] + 1) % 10
    up = top_eigenvalues(smooth, images, labels)
    down = top_eigenvalues(smooth, images, labels, loss=lambda x, y: -F.cross_entropy(x, y, reduction="none"))
    for largest, smallest, image, label in zip(up[:, 0], -down[:, 0], images, labels, strict=True):
        whole = torch.linalg.eigvalsh(dense_hessian(copy.deepcopy(smooth).eval(), image, label))
        assert float(largest) == pytest.approx(float(whole[-1]), rel=1e-6)
        assert float(smallest) == pytest.approx(float(whole[0]), rel=1e-6)


@pytest.mark.parametrize("size", [12, 60])
def test_negative_definite(size: int) -> None:
    matrix, _, loss = quadratic(size, eigenvalues=np.linspace(-9, -0.5, size))
    found = top_eigenvalues(nn.Identity(), torch.zeros(1, size, dtype=torch.float64), torch.zeros(1), 3, loss=loss)
    wanted = np.linalg.eigvalsh(matrix)[::-1][:3]
    assert found[0].numpy() == pytest.approx(wanted, abs=1e-8)


def quadratic(
    size: int, eigenvalues: np.ndarray, along: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, Callable[[Tensor, Tensor], Tensor]]:
    """A, b and ℓ(x) = ½xᵀAx + bᵀx for rows x; ``along`` puts b on the eigenvector of that rank from the top."""
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(draw.standard_normal((size, size)))[0]
    order = np.argsort(eigenvalues)[::-1]
    matrix = (basis * eigenvalues) @ basis.T
    slope = draw.standard_normal(size) if along is None else 1.7 * basis[:, order[along]]
    a, b = torch.from_numpy(matrix), torch.from_numpy(slope)
    return matrix, slope, lambda x, _: ((x @ a) * x).sum(1) / 2 + x @ b


def exact_maximum(matrix: np.ndarray, slope: np.ndarray, radius: float) -> float:
    """max ½vᵀAv + bᵀv over ‖v‖ ≤ ρ, from the secular equation: v = (μ - A)⁻¹b with μ ≥ λ₁ and ‖v‖ = ρ."""
    values, vectors = np.linalg.eigh(matrix)
    part = vectors.T @ slope
    step = part / -values if values[-1] < 0 else None
    if step is None or np.linalg.norm(step) > radius:
        low = max(values[-1], 0) * (1 + 1e-12)
        mu = brentq(lambda m: np.linalg.norm(part / (m - values)) - radius, low + 1e-12, low + 1e6)
        step = part / (mu - values)
    return float(step @ (values * step) / 2 + part @ step)


def test_the_bound_is_tight_where_the_gradient_is_the_first_eigenvector() -> None:
    _, _, loss = quadratic(60, np.r_[np.linspace(-3, 2, 59), 5.0], along=0)
    at = torch.zeros(1, 60, dtype=torch.float64)
    found = input_spectrum(nn.Identity(), at, torch.zeros(1), 2, RADII, loss=loss)
    assert found.cosine[0] == pytest.approx(1, abs=1e-9)
    assert found.eigenvalues[0] == pytest.approx([5, 2], abs=1e-8)
    assert found.gradient_norm[0] == pytest.approx(1.7, rel=1e-12)
    for line in found.bounds():
        rho = line["radius"]
        assert line["sum"] == pytest.approx(1.7 * rho + 2.5 * rho**2, rel=1e-9)
        assert line["adversarial_loss"] == pytest.approx(line["sum"], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "eigenvalues", "along"),
    [
        ("convex", np.linspace(0, 4, 60), None),
        ("indefinite", np.linspace(-6, 4, 60), None),
        ("negative", np.linspace(-6, -1, 60), None),
        ("across", np.r_[np.zeros(58), 1.0, 4.0], 1),
    ],
)
def test_the_bound_holds_and_the_maximum_is_found(name: str, eigenvalues: np.ndarray, along: int | None) -> None:
    """Among them a gradient at a right angle to v₁, from which only the start along v₁ finds the maximum."""
    for seed in range(4):
        matrix, slope, loss = quadratic(60, eigenvalues, along, seed)
        found = input_spectrum(
            nn.Identity(), torch.zeros(1, 60, dtype=torch.float64), torch.zeros(1), 1, RADII, loss=loss
        )
        for line in found.bounds():
            exact = exact_maximum(matrix, slope, line["radius"]) if along is None else None
            assert line["adversarial_loss"] <= line["sum"] * (1 + 1e-12)
            if exact is not None:
                assert line["adversarial_loss"] <= exact * (1 + 1e-9)
                assert line["adversarial_loss"] >= exact * (1 - 0.02)
            else:
                # max over the ball of 2a² + ½b² + 1.7b on a² + b² = ρ²: b = min(ρ, 1.7 / 3).
                b = min(line["radius"], 1.7 / 3)
                value = 2 * (line["radius"] ** 2 - b**2) + b**2 / 2 + 1.7 * b
                assert line["adversarial_loss"] == pytest.approx(value, rel=0.02)
        if name == "across":
            assert found.cosine[0] < 1e-6


def test_the_largest_loss_grows_with_the_radius(network: nn.Module, digits: Digits) -> None:
    images, labels = digits[0][1300:1306].float() / 255, digits[1][1300:1306]
    radii = (0.01, 0.02, 0.1, 0.5, 1.0, 2.0)
    found = input_spectrum(network, images, labels, 1, radii, indices=torch.arange(1300, 1306))
    assert found.indices.tolist() == list(range(1300, 1306))
    assert found.adversarial_loss.shape == (6, 6)
    ladder = np.concatenate([found.loss[:, None], found.adversarial_loss], axis=1)
    assert (np.diff(ladder, axis=1) >= 0).all()
    # At a small radius the quadratic is all there is.
    first = found.bounds()[0]
    assert found.loss.mean() + 0.99 * first["gradient"] < first["adversarial_loss"] < first["sum"] * 1.01
    # And a plain attack of many steps finds no more.
    for radius, best in zip(radii, found.adversarial_loss.mean(axis=0), strict=True):
        assert plain_attack(network, images, labels, radius) <= best * 1.02


def plain_attack(network: nn.Module, images: Tensor, labels: Tensor, radius: float) -> float:
    """Mean loss after 100 small normalised L2 steps without clamping of pixels."""
    network.eval()
    step = torch.zeros_like(images)
    for _ in range(100):
        at = (images + step).requires_grad_()
        (uphill,) = torch.autograd.grad(F.cross_entropy(network(at), labels, reduction="sum"), at)
        step = step + radius / 10 * F.normalize(uphill.flatten(1)).view_as(images)
        step = step * (radius / step.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp(max=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        return float(F.cross_entropy(network(images + step), labels))


def test_order_and_company_do_not_matter(network: nn.Module, digits: Digits) -> None:
    images, labels = digits[0][1300:1308].float() / 255, digits[1][1300:1308]
    turned = torch.arange(7, -1, -1)
    whole = input_spectrum(network, images, labels, 2, (0.1, 1.0))
    back = input_spectrum(network, images[turned], labels[turned], 2, (0.1, 1.0))
    alone = input_spectrum(network, images[3:4], labels[3:4], 2, (0.1, 1.0))
    for name in ("eigenvalues", "cosine", "gradient_norm", "loss", "adversarial_loss"):
        assert np.array_equal(getattr(whole, name), getattr(back, name)[::-1]), name
        assert np.array_equal(getattr(whole, name)[3:4], getattr(alone, name)), name
    assert np.array_equal(whole.eigenvalues, top_eigenvalues(network, images, labels, 2).numpy())
    other = top_eigenvalues(network, images, labels, 2, seed=1).numpy()
    assert other == pytest.approx(whole.eigenvalues, rel=1e-3)
    assert not np.array_equal(other, whole.eigenvalues), "the start is drawn from the seed"


def test_leaves_everything_as_it_was(network: nn.Module, digits: Digits) -> None:
    images, labels = digits[0][1300:1302].float() / 255, digits[1][1300:1302]
    mine = copy.deepcopy(network).train()
    mine[1].eval()
    mine[0].weight.requires_grad_(False)
    modes = [module.training for module in mine.modules()]
    wanted = [parameter.requires_grad for parameter in mine.parameters()]
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.no_grad():
        found = top_eigenvalues(mine, images, labels)
    with torch.inference_mode():
        again = top_eigenvalues(mine, images * 1, labels)
    assert torch.equal(found, again)
    assert [module.training for module in mine.modules()] == modes
    assert [parameter.requires_grad for parameter in mine.parameters()] == wanted
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())
    assert all(parameter.grad is None for parameter in mine.parameters())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert torch.equal(found, top_eigenvalues(mine.eval(), images, labels))


def test_of_a_relu_network_only_the_softmax_curves(network: nn.Module, digits: Digits) -> None:
    """∇²ℓ = Jᵀ(diag p - ppᵀ)J almost everywhere, J the Jacobian of the logits: at most C - 1 directions curve."""
    images, labels = digits[0][1300:1304].double() / 255, digits[1][1300:1304]
    exact = copy.deepcopy(network).double().eval()
    found = top_eigenvalues(exact, images, labels, k=12)
    for values, image in zip(found, images, strict=True):
        jacobian = torch.func.jacrev(lambda x: exact(x[None])[0])(image).flatten(1).detach()
        p = exact(image[None])[0].softmax(0).detach()
        gauss_newton = jacobian.T @ (torch.diag(p) - p[:, None] * p) @ jacobian
        wanted = torch.linalg.eigvalsh(gauss_newton).flip(0)[:12]
        assert values.numpy() == pytest.approx(wanted.numpy(), abs=1e-6 * float(wanted[0]))
        assert float(values[0]) == pytest.approx(float(wanted[0]), rel=1e-8)
        assert (values[9:].abs() < 1e-8 * values[0]).all()


def test_float32_sees_certain_answers(network: nn.Module, digits: Digits) -> None:
    """Where p is within 1e-12 of 1, the curvature of float32 agrees with that of float64."""
    images, labels = digits[0][1300:1306].float() / 255, digits[1][1300:1306]
    sure = copy.deepcopy(network).eval()
    with torch.no_grad():
        margin = sure(images).topk(2).values
        sure[-1].weight *= 30 / float((margin[:, 0] - margin[:, 1]).min())
    assert (sure(images).argmax(1) == labels).all()
    single = top_eigenvalues(sure, images, labels)
    double = top_eigenvalues(copy.deepcopy(sure).double(), images.double(), labels)
    assert 0 < float(double.min()) < 1e-9
    assert single.numpy() == pytest.approx(double.numpy(), rel=1e-3)


def test_residual_network_of_the_project(digits: Digits) -> None:
    """float32 and float64 agree on a ResNet with batch norm, at the resolution that runs use."""
    images, labels = digits[0][1300:1302].float(), digits[1][1300:1302]
    images = Normalize([0.5] * 3, [0.5] * 3)(F.interpolate(images, 32) / 255)
    resnet = build_network(NetworkConfig("resnet10", "stride2", 8), 10, 32, 0, "teacher")
    single = input_spectrum(resnet, images, labels, 1, (0.1, 0.5))
    double = input_spectrum(copy.deepcopy(resnet).double(), images.double(), labels, 1, (0.1, 0.5))
    for name in ("eigenvalues", "cosine", "gradient_norm", "loss", "adversarial_loss"):
        assert getattr(single, name) == pytest.approx(getattr(double, name), rel=1e-4), name


def test_no_curvature_is_no_failure() -> None:
    at = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    slope = torch.arange(40.0).double()
    flat = input_spectrum(nn.Identity(), at, torch.zeros(2), 3, (1.0,), loss=lambda x, _: x @ slope)
    assert (flat.eigenvalues == 0).all()
    assert np.isnan(flat.cosine).all()
    assert flat.mean_cosine is None
    assert flat.adversarial_loss[:, 0] == pytest.approx(flat.loss + float(slope.norm()), rel=1e-6)
    top = input_spectrum(nn.Identity(), 0 * at, torch.zeros(2), 1, (1.0, 2.0), loss=lambda x, _: 1.5 * (x * x).sum(1))
    assert top.eigenvalues[:, 0] == pytest.approx([3, 3])
    assert (top.gradient_norm == 0).all()
    assert top.adversarial_loss == pytest.approx(np.array([[1.5, 6.0]] * 2), rel=1e-6)
    still = input_spectrum(nn.Identity(), at, torch.zeros(2), 1, (1.0,), loss=lambda x, _: 0 * x.sum(1))
    assert np.array_equal(still.adversarial_loss[:, 0], still.loss)


def test_tiny_inputs() -> None:
    for size in (1, 2, 21):
        matrix, _, loss = quadratic(size, np.linspace(-1, 2, size))
        at = torch.zeros(1, size, dtype=torch.float64)
        found = top_eigenvalues(nn.Identity(), at, torch.zeros(1), size, loss=loss)
        assert found[0].numpy() == pytest.approx(np.linalg.eigvalsh(matrix)[::-1], abs=1e-10)


def test_what_does_not_fit_is_told(network: nn.Module, digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits[0][1300:1302].float() / 255, digits[1][1300:1302]
    with pytest.raises(ConfigError, match="k=0 must be at least 1 and at most the 768 values"):
        top_eigenvalues(network, images, labels, 0)
    with pytest.raises(ConfigError, match="k=769"):
        top_eigenvalues(network, images, labels, 769)
    with pytest.raises(ConfigError, match=r"in uint8"):
        top_eigenvalues(network, digits[0][:2], labels)
    with pytest.raises(ConfigError, match=r"images are torch.float64 and the network is torch.float32"):
        top_eigenvalues(network, images.double(), labels)
    with pytest.raises(ConfigError, match="2 images and 1 labels"):
        top_eigenvalues(network, images, labels[:1])
    for radii in ((0.5, 0.1), (0.0, 1.0), (1.0, float("inf")), (float("nan"),)):
        with pytest.raises(ConfigError, match="must be positive and ascending"):
            input_spectrum(network, images, labels, 1, radii)
    with pytest.raises(ConfigError, match="must give one value each"):
        top_eigenvalues(network, images, labels, loss=F.cross_entropy)
    with pytest.raises(NonFiniteError, match="image 1 is NaN"):
        top_eigenvalues(network, torch.stack([images[0], images[1] * float("nan")]), labels)
    monkeypatch.setattr(spectrum_module, "RESTARTS", 1)
    _, _, loss = quadratic(400, np.linspace(0, 1, 400))
    with pytest.raises(GuardError, match=r"only . converged in 1 restarts of Lanczos; ask for fewer"):
        top_eigenvalues(nn.Identity(), torch.zeros(1, 400, dtype=torch.float64), torch.zeros(1), 3, loss=loss)
