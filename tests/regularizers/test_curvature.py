"""Eq. 11 against closed forms, finite differences and itself."""

import pytest
import torch
from torch import backends, nn

from distill.regularizers import curvature_penalty
from distill.regularizers.input_gradient import cross_entropy
from distill.regularizers.numerics import SWITCHES, unit_direction


class SmoothNetwork(nn.Module):
    """Convolution, batch norm, softplus, linear: everything is twice differentiable."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.to(dtype)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, images):
        return self.linear(nn.functional.softplus(self.norm(self.conv(images))).mean(dim=(2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SmoothNetwork()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1])


def test_quadratic_loss_gives_hAz():
    torch.manual_seed(0)
    n, d, h = 6, 7, 1.7
    root = torch.randn(d, d, dtype=torch.float64)
    matrix, offset = root + root.T, torch.randn(d, dtype=torch.float64)
    images = torch.randn(n, d, dtype=torch.float64)

    def quadratic(x, labels):
        return (x @ matrix * x).sum(1) / 2 + x @ offset

    penalty = curvature_penalty(nn.Identity(), images, torch.zeros(n), h, loss=quadratic)
    gradient = images @ matrix + offset
    z = gradient / gradient.norm(dim=1, keepdim=True)
    expected = (h * z @ matrix).square().sum(1)
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)


def test_gradcheck_with_the_direction_held(network, batch):
    images, labels = batch
    z = unit_direction(torch.randn_like(images))
    names, parameters = zip(*network.named_parameters(), strict=True)

    class Bound(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = dict(zip(names, values, strict=True))

        def forward(self, x):
            return torch.func.functional_call(network, self.values, (x,))

    network.eval()
    inputs = [p.detach().clone().requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(
        lambda *values: curvature_penalty(Bound(values), images, labels, 0.9, direction=z), inputs, atol=1e-6
    )


def test_no_gradient_flows_through_the_direction(network, batch):
    """The gradient with z computed inside equals the one with the same z given as a constant."""
    images, labels = batch
    network.eval()
    probe = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(network(probe), labels).sum(), probe)
    gradients = []
    for direction in (None, gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)):
        penalty = curvature_penalty(network, images, labels, 0.9, direction=direction).mean()
        gradients.append(torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True))
    used = 0
    for inside, given in zip(*gradients, strict=True):
        if inside is not None:
            torch.testing.assert_close(inside, given, rtol=1e-9, atol=1e-14)
            used += bool(inside.abs().max() > 1e-8)
    assert used >= 4

    # A direction that does carry a gradient gives another result, so the test above can fail.
    parameters = list(network.parameters())
    (live,) = torch.autograd.grad(cross_entropy(network(probe), labels).sum(), probe, create_graph=True)
    live = live / live.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    leaking = curvature_penalty(network, images, labels, 0.9, direction=live).mean()
    other = torch.autograd.grad(leaking, parameters, allow_unused=True)[0]
    assert (other - gradients[0][0]).norm() > 1e-3 * gradients[0][0].norm()


def test_samples_do_not_mix(network, batch):
    images, labels = batch
    together = curvature_penalty(network, images, labels, 1.5)
    alone = torch.cat([curvature_penalty(network, images[i : i + 1], labels[i : i + 1], 1.5) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-16)


def test_zero_gradient_gives_zero(network, batch):
    images, labels = batch
    with torch.no_grad():
        network.linear.weight.zero_()
    penalty = curvature_penalty(network, images, labels, 1.5)
    assert torch.equal(penalty, torch.zeros(5, dtype=torch.float64))
    penalty.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_statistics_and_modes_stay(network, batch):
    images, labels = batch
    network.train()
    network.conv.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    curvature_penalty(network, images, labels, 1.5).mean().backward()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.norm.training
    assert not network.conv.training


def test_float32_runs_under_autocast(batch):
    """bf16 around it does not reach it."""
    images, labels = batch
    torch.manual_seed(0)
    network = SmoothNetwork(torch.float32)
    plain = curvature_penalty(network, images.float(), labels, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = curvature_penalty(network, images.float(), labels, 1.5)
    assert torch.equal(plain, inside)


def test_backward_runs_without_tf32(network, batch):
    """The switches are off in the backward pass of the penalty and back on after it."""
    images, labels = batch
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return gradient

    saved = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        weight = Probe.apply(network.conv.weight)
        values = {**dict(network.named_parameters()), "conv.weight": weight}

        class Bound(nn.Module):
            def forward(self, x):
                return torch.func.functional_call(network, values, (x,))

        network.eval()
        clean = cross_entropy(network(images), labels).mean()
        (clean + curvature_penalty(Bound(), images, labels, 1.5).mean()).backward()
        assert seen
        assert set(seen) == {(False, False)}
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (True, True)
        # Two penalties in one backward pass leave the switches as they were too.
        sum(curvature_penalty(Bound(), images, labels, h).mean() for h in (1.0, 2.0)).backward()
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (True, True)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = saved


SET = {
    "matmul": lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions": lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
    "all": lambda: setattr(backends, "fp32_precision", "tf32"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}


def precisions():
    """All that torch tells of its precision in float32, by new names and old ones; some it may refuse to tell."""
    told = [switch.fp32_precision for switch in SWITCHES]
    for ask in (
        torch.get_float32_matmul_precision,
        lambda: backends.cudnn.allow_tf32,
        lambda: backends.cuda.matmul.allow_tf32,
    ):
        try:
            told.append(ask())
        except RuntimeError:
            told.append("refused")
    return told


@pytest.fixture
def precision():
    saved = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32, precisions()
    yield
    backends.fp32_precision = "none"
    torch.set_float32_matmul_precision(saved[0])
    backends.cudnn.allow_tf32 = saved[1]
    for switch, before in zip(SWITCHES, saved[2], strict=False):
        switch.fp32_precision = before
    assert precisions() == saved[2]


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("how", SET)
def test_runs_in_ieee_float32_however_torch_was_told_otherwise(network, batch, how):
    """By its switches or by their older names, and it leaves both as they were."""
    seen = []

    def watching(logits, labels):
        seen.extend(switch.fp32_precision for switch in SWITCHES)
        return cross_entropy(logits, labels)

    SET[how]()
    before = precisions()
    penalty = curvature_penalty(network, *batch, 1.5, watching).mean()
    assert set(seen) == {"ieee"}
    assert precisions() == before
    penalty.backward()
    assert precisions() == before
