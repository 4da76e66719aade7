"""What holds for every regulariser: it acts on the parameters, and leaves everything else alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from distill.compose import compose, group_choices
from distill.data.batch import Batch
from distill.errors import ConfigError
from distill.models import Normalize, build_network
from distill.regularizers import Regularizer, Surroundings, build_regularizer
from distill.stages.squeeze import SqueezeTask

NAMES = sorted(group_choices()["regularizer"])


@pytest.fixture(scope="module")
def batch():
    digits = load_digits()
    images = torch.from_numpy(digits.images[:16] * 255 / 16).to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1).repeat_interleave(2, -1).repeat_interleave(2, -2).contiguous()
    return Batch(images, torch.from_numpy(digits.target[:16].astype(np.int64)), torch.arange(16))


def make(name, *overrides):
    config = compose([f"regularizer={name}", "teacher.network=resnet10", "teacher.width=8", "teacher.stem=stride1"])
    for override in overrides:
        key, value = override
        setattr(config.regularizer, key, value)
    dataset = config.dataset
    regularizer = build_regularizer(config.regularizer, Surroundings(dataset.mean, dataset.std, 16, 16))
    network = build_network(config.teacher, 10, 16, 0, "test")
    return SqueezeTask(network.train(), Normalize(dataset.mean, dataset.std), regularizer), network


def gradients(name, batch, *overrides):
    task, network = make(name, *overrides)
    terms = task(batch)
    terms["loss"].backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()]), terms, network


@pytest.mark.parametrize("name", NAMES)
def test_changes_the_parameter_gradient(name, batch):
    plain, _, _ = gradients("none", batch)
    # β = 1e-4 of the released code is below float32's resolution of one gradient; the size is not what is tested.
    strength = [("weight", 1.0)] if name == "loss_difference" else []
    regularized, terms, _ = gradients(name, batch, *strength)
    assert regularized.isfinite().all()
    changed = (regularized - plain).norm() / plain.norm()
    assert changed == 0 if name == "none" else changed > 1e-4
    if "penalty" in terms:
        assert terms["loss"] == terms["cross_entropy"] + terms["penalty"]


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_clean_pass(name, batch):
    """The penalty touches no running statistics; only adversarial shows the clean pass other images."""
    if name == "adversarial":
        pytest.skip("the clean pass sees the attacked images by definition")
    _, _, with_penalty = gradients(name, batch)
    _, _, plain = gradients("none", batch)
    for (key, mine), (_, other) in zip(with_penalty.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(mine, other), key


@pytest.mark.parametrize("name", ["curvature", "gradient_norm"])
def test_per_sample_penalties_do_not_mix(name, batch):
    """The mean over a batch is the mean of the penalties of its samples alone."""
    task, network = make(name)
    images = task.normalize(batch.images)
    whole = task.regularizer(network, images, batch.labels)["penalty"]
    parts = [task.regularizer(network, images[i : i + 4], batch.labels[i : i + 4])["penalty"] for i in range(0, 16, 4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gradient_gives_zero(name, batch):
    task, network = make(name)
    with torch.no_grad():
        network.fc.weight.zero_()
    penalty = task.regularizer(network, task.normalize(batch.images), batch.labels)
    total = sum(value for value in penalty.values())
    assert total == 0
    if penalty:
        penalty["penalty"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_curvature_norm_is_of_the_batch_mean_loss(batch):
    """Its gradients are 1/N of the per-sample ones."""
    task, network = make("curvature_norm", ("h", 1.5), ("weight", 1.0))
    per_sample, _ = make("curvature", ("h", 1.5), ("weight", 1.0))
    images = task.normalize(batch.images[:1])
    squared = per_sample.regularizer(network, images, batch.labels[:1])["penalty"]
    norm = task.regularizer(network, images, batch.labels[:1])["penalty"]
    torch.testing.assert_close(norm, squared.sqrt() / 16, rtol=1e-4, atol=0)


def test_loss_difference_is_what_it_says(batch):
    task, network = make("loss_difference", ("h", 0.5), ("weight", 2.0))
    network.eval()
    images = task.normalize(batch.images).requires_grad_()
    loss = F.cross_entropy(network(images), batch.labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    z = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = F.cross_entropy(network(images + 0.5 * z), batch.labels)
    found = task.regularizer(network, images.detach(), batch.labels)["penalty"]
    torch.testing.assert_close(found, 2 * (moved - loss.mean()).abs(), rtol=1e-3, atol=1e-7)


def test_adversarial_examples_are_worse_and_within_the_ball(batch):
    task, network = make("adversarial", ("epsilon", 8.0), ("step_size", 2.0))
    network.eval()
    images = task.normalize(batch.images)
    attacked = task.regularizer.training_images(network, images, batch.labels, lambda: list(range(16)))
    moved = (task.normalize.pixels(attacked) - task.normalize.pixels(images)).abs().max() * 255
    assert 7.9 < moved < 8.001
    assert F.cross_entropy(network(attacked), batch.labels) > F.cross_entropy(network(images), batch.labels)
    half = task.regularizer.training_images(network, images[8:], batch.labels[8:], lambda: list(range(8, 16)))
    torch.testing.assert_close(half, attacked[8:], rtol=0, atol=1e-5)


def test_unknown_names_and_options_are_refused():
    config = compose(["regularizer=curvature"])
    surroundings = Surroundings([0.5] * 3, [0.2] * 3, 4, 8)
    config.regularizer.options["typo"] = 1
    with pytest.raises(ConfigError, match="typo"):
        build_regularizer(config.regularizer, surroundings)
    config.regularizer.name = "missing"
    with pytest.raises(ConfigError, match=r"distill/regularizers/missing\.py"):
        build_regularizer(config.regularizer, surroundings)


@pytest.mark.parametrize("name", ["curvature", "curvature_norm", "loss_difference"])
def test_the_step_per_value_is_the_same_at_every_resolution(name, batch):
    """h = 3 at 32 pixels is h = 1.5 on the 16-pixel images here, unless h_scaling is off."""
    _, expected, _ = gradients(name, batch, ("h", 1.5), ("h_scaling", False))
    config = compose([f"regularizer={name}", "teacher.network=resnet10", "teacher.width=8", "teacher.stem=stride1"])
    config.regularizer.h = 3.0
    task, _ = make(name)
    task.regularizer = build_regularizer(config.regularizer, Surroundings([0.5] * 3, [0.5] * 3, 16, 32))
    torch.testing.assert_close(task(batch)[name], expected[name], rtol=1e-6, atol=0)
    task.regularizer.h_scaling = False
    assert task(batch)[name] > 1.1 * expected[name]


@pytest.mark.parametrize("names", [["mine"], ["penalty", "loss"], ["penalty", "step"]])
def test_terms_that_would_be_taken_for_others_are_refused(names, batch):
    class Mine(Regularizer):
        def __call__(self, network, images, labels):
            return {name: images.mean() for name in names}

    task, _ = make("none")
    task.regularizer = Mine()
    with pytest.raises(ConfigError, match=f"The regulariser Mine gives {', '.join(names)}; one term must be called"):
        task(batch)
