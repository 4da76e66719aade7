"""Soft labels on disk: the teacher's logits on every view, one shard an epoch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distill.errors import ArtifactError, NonFiniteError
from distill.files import load_tensors, save_tensors


class SoftLabelStore:
    """The folder ``labels/`` of a run; ``epoch_0007.safetensors`` holds ``logits``, float16 (images, classes)."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, epoch: int) -> Path:
        """The shard of one epoch."""
        return self.folder / f"epoch_{epoch:04d}.safetensors"

    def write(self, epoch: int, logits: Tensor) -> None:
        """Write one epoch: logits (images, classes). Raises NonFiniteError when float16 cannot hold them."""
        stored = logits.to(torch.float16)
        if not stored.isfinite().all():
            raise NonFiniteError(
                f"The teacher's logits of epoch {epoch} are NaN or beyond float16 (largest {logits.abs().max():.3g}); "
                f"the teacher is broken, train another one."
            )
        save_tensors(self.path(epoch), {"logits": stored})

    def read(self, epoch: int, count: int) -> Tensor:
        """The logits of one epoch, float16 (count, classes). Raises ArtifactError when the shard is damaged."""
        logits = load_tensors(self.path(epoch)).get("logits")
        if logits is None or len(logits) != count or logits.dtype != torch.float16:
            raise ArtifactError(
                f"{self.path(epoch)} does not hold float16 logits of {count} images; delete {self.folder} and relabel."
            )
        return logits
