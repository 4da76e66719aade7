"""A finished teacher, frozen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from distill.config import NetworkConfig
from distill.files import load_tensors
from distill.models.networks import build_network
from distill.run_folder import read_manifest

WEIGHTS = "weights.safetensors"


def load_teacher(folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The teacher of a run, in eval mode, without gradients for its parameters.

    Args:
        folder: ``runs/NAME/teacher``.

    Raises:
        ArtifactError: when the folder holds no complete teacher.
    """
    manifest = read_manifest(folder, "teacher")
    architecture = NetworkConfig(**manifest["network"])
    network = build_network(architecture, manifest["num_classes"], manifest["image_size"], 0, "teacher")
    network.load_state_dict(load_tensors(folder / WEIGHTS))
    return network.to(device).eval().requires_grad_(False)
