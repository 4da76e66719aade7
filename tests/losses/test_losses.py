"""The losses of recovery and student training against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.losses import batchnorm_matching, soft_label_kl
from distill.models.resnet import ResNet


def test_batchnorm_matching_by_hand():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval()
    network[0].running_mean.normal_()
    network[3].running_var.uniform_(0.5, 2)
    images = torch.randn(4, 3, 8, 8)
    with batchnorm_matching(network, first_multiplier=10) as matching:
        network(images)
        found = matching.pop()
    expected, x = 0.0, images
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            flat = x.transpose(0, 1).flatten(1)
            distance = (flat.mean(1) - layer.running_mean).norm() + (
                flat.var(1, correction=0) - layer.running_var
            ).norm()
            expected += distance * (10 if layer is network[0] else 1)
        x = layer(x)
    torch.testing.assert_close(found, expected)


def test_batchnorm_matching_has_an_image_gradient_and_removes_its_hooks():
    network = ResNet("resnet10", 10, "stride1", 8).eval().requires_grad_(False)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    with batchnorm_matching(network) as matching:
        network(images)
        first = matching.pop()
        network(images)
        assert torch.equal(first, matching.pop())
        first.backward()
    assert images.grad.abs().sum() > 0
    assert not any(module._forward_pre_hooks for module in network.modules())
    with pytest.raises(RuntimeError, match="no forward pass"):
        matching.pop()


def test_batchnorm_matching_needs_batch_norm():
    with pytest.raises(ValueError, match="no BatchNorm2d"), batchnorm_matching(nn.Linear(2, 2)):
        pass


def test_soft_label_kl_is_the_divergence():
    torch.manual_seed(0)
    student, teacher, temperature = torch.randn(6, 10), 5 * torch.randn(6, 10), 20.0
    p, q = (F.softmax(logits / temperature, 1) for logits in (teacher, student))
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_label_kl(student, teacher, temperature), expected, rtol=1e-4, atol=1e-8)
    assert soft_label_kl(teacher, teacher, temperature).abs() < 1e-7
