"""Networks, normalisation and weights."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from distill.compose import compose
from distill.config import NetworkConfig
from distill.errors import ArtifactError, ConfigError
from distill.models import Normalize, build_network, load_initial_weights


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_imagenet_stem_is_torchvisions_network(name):
    mine = build_network(NetworkConfig(name), 1000, 224, 0, "test").state_dict()
    theirs = getattr(torchvision.models, name)().state_dict()
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize(("stem", "size"), [("stride1", 64), ("stride2", 32), ("stride2_pad3", 34), ("imagenet", 16)])
def test_stems_and_widths(stem, size):
    network = build_network(NetworkConfig("resnet10", stem, 24), 7, 64, 0, "test").eval()
    shapes = []
    network.layer1.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert shapes == [(2, 24, size, size)]
    assert network.fc.in_features == 192


def test_convnet():
    network = build_network(NetworkConfig("convnet", width=16), 10, 32, 0, "test")
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_initial_weights_are_a_function_of_seed_and_purpose():
    config = NetworkConfig("resnet10", "stride1", 8)

    def weight(seed, purpose):
        torch.rand(3)
        return build_network(config, 10, 32, seed, purpose).conv1.weight

    assert torch.equal(weight(0, "teacher"), weight(0, "teacher"))
    assert not torch.equal(weight(0, "teacher"), weight(1, "teacher"))
    assert not torch.equal(weight(0, "teacher"), weight(0, "student0"))


def test_normalize_round_trip_and_clamp():
    normalize = Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.1])
    bytes_ = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    normalized = normalize(bytes_)
    assert torch.equal((normalize.pixels(normalized) * 255).round().to(torch.uint8), bytes_)
    torch.testing.assert_close(normalize(bytes_ / 255), normalized)
    wild = 10 * torch.randn(4, 3, 5, 5)
    pixels = normalize.pixels(normalize.clamp_(wild))
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6


def test_weights_of_a_thousand_classes_are_reduced_to_the_data_sets(tmp_path):
    config = NetworkConfig("resnet10", "stride1", 8)
    big = build_network(config, 1000, 32, 0, "big")
    save_file(big.state_dict(), tmp_path / "big.safetensors")
    small = build_network(config, 3, 32, 1, "small")
    load_initial_weights(small, str(tmp_path / "big.safetensors"), config, [0, 217, 701])
    assert torch.equal(small.fc.weight, big.fc.weight[[0, 217, 701]])
    assert torch.equal(small.conv1.weight, big.conv1.weight)
    with pytest.raises(ConfigError, match="not all of which are ImageNet classes"):
        load_initial_weights(small, str(tmp_path / "big.safetensors"), config, [0, None, 701])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    config = NetworkConfig("resnet10", "stride1", 8)
    network = build_network(config, 10, 32, 0, "test")
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match="does not fit resnet10"):
        load_initial_weights(network, str(tmp_path / "wrong.safetensors"), config, [])
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "wrong.safetensors").read_bytes()[:20])
    with pytest.raises(ArtifactError, match="truncated"):
        load_initial_weights(network, str(tmp_path / "short.safetensors"), config, [])
    with pytest.raises(ConfigError, match="can run code"):
        load_initial_weights(network, "model.pth", config, [])
    with pytest.raises(ConfigError, match="no weights NOPE"):
        load_initial_weights(network, "torchvision:NOPE", NetworkConfig("resnet18"), [])


def test_students_default_to_the_teachers_architecture():
    config = compose(["teacher.network=resnet34", "teacher.stem=stride1", "student.width=32"])
    assert (config.student.network, config.student.stem, config.student.width) == ("resnet34", "stride1", 32)
