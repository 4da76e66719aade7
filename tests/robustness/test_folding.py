"""What attacks are lent answers as the network does, whether batch norm could be folded or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.models import Normalize
from distill.models.convnet import ConvNet
from distill.models.resnet import BLOCKS, ResNet
from distill.robustness import attack_accuracy
from distill.robustness.folding import folded


def _settled(network: nn.Module) -> nn.Module:
    """With statistics and factors of batch norm as far from 0 and 1 as after training."""
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.5, generator=generator)
            layer.running_var.uniform_(0.2, 3, generator=generator)
            nn.init.uniform_(layer.weight, 0.2, 2, generator=generator)
            nn.init.uniform_(layer.bias, -1, 1, generator=generator)
    return network.eval()


def _batch_norms(network: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


def _behind(network: nn.Module) -> nn.Sequential:
    return nn.Sequential(Normalize([0.5] * 3, [0.25] * 3), network)


@pytest.mark.parametrize("name", BLOCKS)
def test_logits_and_gradients_are_those_of_the_network(name: str) -> None:
    torch.manual_seed(0)
    model = _settled(_behind(ResNet(name, 10, "stride2", 16)))
    other = folded(model)
    assert (_batch_norms(model) > 9, _batch_norms(other)) == (True, 0)
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    answers = [network(images) for network in (model, other)]
    assert (answers[0] - answers[1]).abs().max() < 1e-5 * answers[0].abs().max()
    gradients = [torch.autograd.grad(answer.logsumexp(1).sum(), images)[0] for answer in answers]
    assert torch.linalg.vector_norm(gradients[0] - gradients[1]) < 1e-4 * torch.linalg.vector_norm(gradients[0])


class _Decides(nn.Module):
    """Does one thing or another, as its images are; following it without values would fail or keep one of the two."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits if images.mean() > 0.4 else -logits


def _hooked() -> nn.Module:
    network = ResNet("resnet10", 10, "stride2", 8)
    network.layer1.register_forward_hook(lambda layer, inputs, output: output * 2)
    return network


def _patched() -> nn.Module:
    network = ResNet("resnet10", 10, "stride2", 8)
    network.layer1.forward = lambda images: images * 2
    return network


def _twice() -> nn.Module:
    layers = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    return nn.Sequential(*layers, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    "make",
    [
        *(_hooked, _patched, _twice, lambda: _Decides(ResNet("resnet10", 10, "stride2", 8))),
        *(lambda: ConvNet(10, 32, 8), lambda: ResNet("resnet10", 10, "stride2", 8).double()),
    ],
    ids=["hooked", "patched", "twice", "decides", "no-batch-norm", "float64"],
)
def test_any_other_network_is_taken_as_it_is(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = _settled(make())
    assert folded(network) is network
    model = _behind(network)
    assert folded(model) is model


def test_accuracies_are_those_of_the_network(network: nn.Module, batch: Batch) -> None:
    """The network of these tests is folded; behind a module of no known class it is not, and nothing else differs."""
    assert _batch_norms(folded(network.eval())) == 0 < _batch_norms(network)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(images)
            return logits

    pgd = {"attack": "PGD", "steps": 20, "alpha_ratio": 0.25}
    mine, plain = (attack_accuracy(each, [batch], pgd, epsilon=[8, 16], quiet=True) for each in (network, Plain()))
    assert torch.equal(mine.clean.correct, plain.clean.correct)
    for one, two in zip(mine.attacks, plain.attacks, strict=True):
        assert 0 < one.robust.sum() < len(batch)
        assert (one.robust != two.robust).sum() <= 1, "an image may lie on the boundary"
