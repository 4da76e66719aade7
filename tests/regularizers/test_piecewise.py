"""First-order input gradients against torch.func's double backward, on every network that a teacher can be."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from distill.config import NetworkConfig
from distill.models import build_network
from distill.regularizers import curvature_penalty, functorch_only
from distill.regularizers.input_gradient import cross_entropy, input_gradient
from distill.regularizers.piecewise import known_program
from distill.regularizers.piecewise.kernels import Convolution, FewChannelConvolution, SmallMapConvolution


class Branches(nn.Module):
    """Functions for modules, groups, dilation, biases, a layer used twice, a frozen weight, batch norm not affine."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 5, stride=3, padding=2)
        self.grouped = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False)
        self.twice = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.drop, self.linear, self.last = nn.Dropout(), nn.Linear(36, 7), nn.Linear(7, 10, bias=False)
        self.first.weight.requires_grad_(False)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.add(self.twice(x), F.relu(self.grouped(x)))
        return self.last(self.drop(F.relu(self.linear(torch.flatten(self.twice(x), 1)), inplace=True)))


def small_vgg():
    """A Sequential whose maps go down to 1x1."""
    layers = []
    for channels, width in ((3, 6), (6, 8), (8, 8), (8, 10)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Conv2d(10, 10, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 10)
    )


def residual(name, stem, size):
    return lambda: build_network(NetworkConfig(name, stem, 8), 10, size, 0, "test"), size


NETWORKS = {
    "resnet18": residual("resnet18", "imagenet", 64),
    "resnet18 of small maps": residual("resnet18", "imagenet", 32),
    "resnet10 stride1": residual("resnet10", "stride1", 16),
    "resnet10 stride2": residual("resnet10", "stride2", 24),
    "resnet10 stride2_pad3": residual("resnet10", "stride2_pad3", 20),
    "resnet50": residual("resnet50", "imagenet", 64),
    "branches": (Branches, 9),
    "vgg": (small_vgg, 16),
}


def make(name, dtype=torch.float64):
    """A network in eval mode with statistics of its own, images in channels_last, labels."""
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    network = build().to(dtype).to(memory_format=torch.channels_last).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    images = torch.randn(6, 3, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return network, images, torch.tensor([0, 1, 2, 3, 1, 4])


def gradients(network, images, labels, functorch, **options):
    """R(x) of each image, and the gradient of its mean in every parameter."""
    options = {"h": 0.9} | options
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with functorch_only() if functorch else torch.enable_grad():
        values = curvature_penalty(network, images, labels, **options)
        found = torch.autograd.grad(values.mean(), parameters, allow_unused=True, materialize_grads=True)
    return values.detach(), torch.cat([gradient.flatten() for gradient in found])


def assert_equal(network, images, labels, **options):
    values, gradient = gradients(network, images, labels, False, **options)
    expected, reference = gradients(network, images, labels, True, **options)
    assert known_program(network) is not None
    assert reference.norm() > 0
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=0)
    assert (gradient - reference).norm() < 1e-10 * reference.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_double_backward(name):
    network, images, labels = make(name)
    assert_equal(network, images, labels)
    assert_equal(network, images.contiguous(), labels, direction=torch.randn_like(images))


@pytest.mark.parametrize("stem", ["imagenet", "stride1", "stride2", "stride2_pad3"])
@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet34", "resnet50"])
def test_every_teacher_is_known(name, stem):
    assert known_program(build_network(NetworkConfig(name, stem, 8), 10, 64, 0, "test").eval()) is not None


def test_any_loss_of_the_logits():
    network, images, labels = make("vgg")

    def smooth(logits, labels):
        return (torch.sin(logits) * logits.softmax(1)).sum(1) + logits.gather(1, labels[:, None])[:, 0] ** 3

    assert_equal(network, images, labels, loss=smooth)
    # A linear loss does not curve, and neither does the network: R is zero where no ReLU turns.
    values, gradient = gradients(network, images, labels, False, h=1e-9, loss=lambda logits, labels: logits[:, 0])
    assert (values.abs().max(), gradient.abs().max()) == (0, 0)


def trained_on_digits():
    """A ResNet after 30 steps, in float32, and a batch."""
    digits = load_digits()
    images = torch.from_numpy(digits.images[:256, None] / 8 - 1).float().expand(-1, 3, -1, -1)
    images = images.repeat_interleave(4, -1).repeat_interleave(4, -2).contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(digits.target[:256].astype(np.int64))
    torch.manual_seed(0)
    network = build_network(NetworkConfig("resnet10", "imagenet", 16), 10, 32, 0, "test").train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(30):
        rows = torch.arange(32) + 32 * (step % 8)
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
    return network.eval(), images[:64], labels[:64]


def test_float32_is_as_right_as_double_backward():
    """Against float64, on a trained network: the error is at most twice that of plain autograd."""
    network, images, labels = trained_on_digits()
    exact = gradients(copy.deepcopy(network).double(), images.double(), labels, True)[1]
    errors = [
        ((gradients(network, images, labels, functorch)[1].double() - exact).norm() / exact.norm()).item()
        for functorch in (False, True)
    ]
    assert errors[0] <= 2 * errors[1] < 1e-3


def test_kernels_of_their_own_are_used_and_exact():
    """On a CPU: the stem of a ResNet and its last maps; against the gradients of the convolution itself."""
    if torch.cuda.is_available():
        pytest.skip("these are for CPUs")
    weights = torch.randn(5, 3, 7, 7), torch.randn(5, 6, 3, 3)
    stem = Convolution((2, 2), (3, 3), (1, 1), 1).specialised(weights[0], torch.Size([2, 3, 32, 32]))
    assert isinstance(stem, FewChannelConvolution)
    same = Convolution((1, 1), (1, 1), (1, 1), 1)
    assert isinstance(same.specialised(weights[1], torch.Size([2, 6, 2, 2])), SmallMapConvolution)
    assert same.specialised(weights[1], torch.Size([2, 6, 3, 2])) is same


def agrees(channels, kernel, stride, padding, height, width):
    """Whether the piece for such a convolution is its transpose and its weight gradient; which piece it is."""
    torch.manual_seed(0)
    values = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, channels, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64)
    output = F.conv2d(values, weight, bias, stride, padding)
    delta = torch.randn_like(output)
    expected = torch.autograd.grad(output, [values, weight], delta)
    values, weight, output = values.detach(), weight.detach(), output.detach()
    layer = Convolution((stride, stride), (padding, padding), (1, 1), 1).specialised(weight, values.shape)
    prepared = layer.prepared(weight)
    torch.testing.assert_close(layer.apply(values, prepared, bias), output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.transpose(delta, prepared, values.shape), expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.weight_gradient(delta, values, weight), expected[1], rtol=1e-10, atol=1e-12)
    return type(layer)


def test_pieces_of_every_geometry():
    pieces = [
        agrees(channels, kernel, stride, padding, height, width)
        for channels in (3, 6)
        for kernel in (1, 2, 3, 5, 7)
        for stride in (1, 2, 3)
        for padding in range(0, 4)
        for height, width in ((16, 13), (9, 8), (7, 7), (3, 2), (2, 2), (1, 1))
        if min(height, width) + 2 * padding >= kernel
    ]
    assert {pieces.count(kind) > 20 for kind in (Convolution, FewChannelConvolution, SmallMapConvolution)} == {True}


class Overwrites(nn.Module):
    """Reads a value after ReLU has overwritten it."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.linear = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 10)

    def forward(self, x):
        x = self.conv(x)
        return self.linear((x + self.relu(x)).mean((2, 3)))


class Borrows(nn.Module):
    """Runs its network with other parameters."""

    def __init__(self, inner, parameters):
        super().__init__()
        self.inner, self.lent = inner, parameters

    def forward(self, x):
        return torch.func.functional_call(self.inner, self.lent, (x,))


def test_what_is_not_known_takes_the_other_way():
    network, images, labels = make("vgg")
    lent = {name: (2 * value).requires_grad_() for name, value in network.state_dict().items() if "weight" in name}
    unknown = {
        "instance norm": build_network(NetworkConfig("convnet", width=8), 10, 16, 0, "test").double().eval(),
        "overwrites": Overwrites().double().eval(),
        "borrows": Borrows(network, lent).eval(),
        "softplus": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(784, 10)).double().eval(),
    }
    for name, other in unknown.items():
        assert known_program(other) is None, name
        values = [gradients(other, images, labels, functorch)[0] for functorch in (False, True)]
        assert torch.equal(*values), name
    # Lent parameters are what gets the gradient.
    curvature_penalty(unknown["borrows"], images, labels, 0.9).sum().backward()
    assert all(value.grad is not None for value in lent.values())


def test_a_network_that_changes_is_read_again():
    network, images, labels = make("vgg")
    before = gradients(network, images, labels, False)[0]
    network[0] = nn.Conv2d(3, 6, 3, padding=1).double().eval()
    assert_equal(network, images, labels)
    assert not torch.equal(before, gradients(network, images, labels, False)[0])
    network[1].forward = torch.tanh
    assert known_program(network) is None
    del network[1].forward
    assert known_program(network) is not None
    with network[0].register_forward_hook(lambda module, inputs, output: 2 * output):
        assert known_program(network) is None
        assert torch.equal(*(gradients(network, images, labels, functorch)[0] for functorch in (False, True)))
    assert known_program(network.train()) is None


def test_a_layer_that_is_set_otherwise_is_read_again():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)]
    network, images, labels = (
        nn.Sequential(*layers).double().eval(),
        torch.randn(4, 3, 16, 16).double(),
        torch.arange(4),
    )
    values = [gradients(network, images, labels, False)[0]]
    for name, value in (("stride", (2, 2)), ("padding", (1, 1)), ("dilation", (2, 2))):
        setattr(network[0], name, value)
        assert known_program(network) is not None
        assert_equal(network, images, labels)
        values.append(gradients(network, images, labels, False)[0])
    assert len({tuple(each.tolist()) for each in values}) == 4


def test_images_that_need_a_gradient_get_one():
    network, images, labels = make("vgg")
    images.requires_grad_()
    curvature_penalty(network, images, labels, 0.9).sum().backward()
    assert images.grad.norm() > 0


def test_backward_again_needs_the_graph_kept():
    network, images, labels = make("vgg")
    penalty = curvature_penalty(network, images, labels, 0.9).mean()
    weight = network[0].weight
    (first,) = torch.autograd.grad(penalty, weight, retain_graph=True)
    (second,) = torch.autograd.grad(penalty, weight)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(penalty, weight)


def test_one_evaluation_is_enough():
    """What gradient_norm asks: the derivative of one gradient, not of a difference."""
    network, images, labels = make("resnet18")
    norms = []
    for functorch in (False, True):
        with functorch_only() if functorch else torch.enable_grad():
            norm = input_gradient(network, labels)(images).flatten(1).norm(dim=1).sum()
            norms.append(torch.cat([g.flatten() for g in torch.autograd.grad(norm, list(network.parameters()))]))
    assert (norms[0] - norms[1]).norm() < 1e-10 * norms[1].norm()


def test_backward_runs_in_ieee_float32():
    """No TF32 and no autocast when the loss is differentiated a second time, whatever surrounds it."""
    network, images, labels = make("vgg", torch.float32)
    switches = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    seen = []

    def watching(logits, labels):
        seen.append((torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"), logits.dtype))
        return cross_entropy(logits, labels)

    plain = gradients(network, images, labels, False)[1]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            inside = gradients(network, images, labels, False, loss=watching)[1]
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = switches
    assert seen == [(False, False, torch.float32)] * 4
    assert torch.equal(plain, inside)
