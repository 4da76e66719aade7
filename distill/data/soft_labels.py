"""Soft labels on disk: the teacher's logits on every view, one shard an epoch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distill.errors import ArtifactError
from distill.run_folder import load_tensors, save_tensors


class SoftLabelStore:
    """The folder ``labels/`` of a run; ``epoch_0007.safetensors`` holds ``logits``, float16 (images, classes)."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, epoch: int) -> Path:
        """The shard of one epoch."""
        return self.folder / f"epoch_{epoch:04d}.safetensors"

    def write(self, epoch: int, logits: Tensor) -> None:
        """Write one epoch: logits (images, classes)."""
        save_tensors(self.path(epoch), {"logits": logits.to(torch.float16)})

    def read(self, epoch: int, count: int) -> Tensor:
        """The logits of one epoch, float16 (count, classes). Raises ArtifactError when the shard is damaged."""
        tensors = load_tensors(self.path(epoch))
        if "logits" not in tensors or len(tensors["logits"]) != count:
            raise ArtifactError(f"{self.path(epoch)} does not hold the logits of {count} images; delete labels/.")
        return tensors["logits"]
