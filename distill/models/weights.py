"""Initial weights from a safetensors file or from torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models

from distill.config import NetworkConfig
from distill.errors import ConfigError, DataError
from distill.files import file_digest, load_tensors


def load_initial_weights(
    network: nn.Module, source: str, config: NetworkConfig, imagenet_indices: Sequence[int | None]
) -> None:
    """Load ``source`` into ``network``, every tensor of it.

    Args:
        source: path of a .safetensors file, or ``torchvision:NAME`` (``torchvision:IMAGENET1K_V1``).
        imagenet_indices: the ImageNet-1K index of every class. Where all are known, a 1000-class output layer is
            reduced to the rows of these classes.

    Raises:
        ConfigError, DataError: when the weights are missing or do not fit.
    """
    state = _torchvision_weights(source, config) if source.startswith("torchvision:") else _file_weights(source)
    target = network.state_dict()
    known = [index for index in imagenet_indices if index is not None]
    for name in ("fc.weight", "fc.bias"):
        if name in state and name in target and len(state[name]) == 1000 != len(target[name]):
            if len(known) != len(target[name]):
                raise ConfigError(
                    f"squeeze.weights={source} has 1000 classes and the data set has {len(target[name])}, "
                    f"not all of which are ImageNet classes."
                )
            state[name] = state[name][torch.tensor(known)]
    wrong = [
        name
        for name in sorted({*state, *target})
        if name not in state or name not in target or state[name].shape != target[name].shape
    ]
    if wrong:
        raise ConfigError(
            f"squeeze.weights={source} does not fit {config.network} (stem {config.stem}, width {config.width}): "
            f"{len(wrong)} tensors differ, the first is {wrong[0]}."
        )
    network.load_state_dict(state)


def weights_fingerprint(source: str) -> str:
    """What the recipe of a teacher holds of its initial weights: the content of a file, not its path.

    Raises:
        ConfigError: when the file does not exist.
    """
    if source.startswith("torchvision:"):
        return source
    if not Path(source).is_file():
        raise ConfigError(f"squeeze.weights={source} does not exist.")
    return file_digest(Path(source))


def _file_weights(source: str) -> dict[str, Tensor]:
    path = Path(source)
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"squeeze.weights={source} is not a .safetensors file; other formats can run code when they are read."
        )
    return load_tensors(path)


def _torchvision_weights(source: str, config: NetworkConfig) -> dict[str, Tensor]:
    name = source.removeprefix("torchvision:")
    try:
        weights = models.get_model_weights(config.network)[name]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"torchvision has no weights {name} for {config.network}.") from error
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (URLError, OSError, RuntimeError) as error:
        raise DataError(
            f"torchvision's weights {name} could not be had ({error}); "
            f"save them as .safetensors elsewhere and pass their path in squeeze.weights."
        ) from error
