"""The views of a distilled set that teacher and student see: crop, flip, and CutMix or mixup with a partner.

A view is a pure function of (seed, epoch, image index). It is drawn again where it is needed and never stored, so it
does not depend on batch size, number of workers or number of GPUs (SPEC §4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor

from distill.config import RelabelConfig
from distill.data.crops import UNIFORMS, flips, padded_boxes, resized_boxes, take_boxes
from distill.randomness import permutation, uniforms


@dataclass(frozen=True)
class ViewBatch:
    """Views on the device.

    Attributes:
        images: float32 (N, 3, H, W) in [0, 1].
        indices: int64 (N,), which distilled images they show.
        partners: int64 (N,), the images mixed in.
        share: float32 (N,), the part λ of the own image; 1 without mixing.
        labels: int64 (N,) of the own images; empty when not asked for.
        partner_labels: int64 (N,).
        logits: the teacher's answers, float32 (N, classes), or None.
        weight: see ``Batch``.
    """

    images: Tensor
    indices: Tensor
    partners: Tensor
    share: Tensor
    labels: Tensor
    partner_labels: Tensor
    logits: Tensor | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.images)


class Views:
    """The views of ``images``.

    Args:
        images: uint8 (N, 3, H, W), the distilled images.
        labels: int64 (N,).
        config: crop, flip and mixing.
        seed: seed of the run; every student sees the same views.
    """

    def __init__(self, images: Tensor, labels: Tensor, config: RelabelConfig, seed: int):
        self.images, self.labels, self.config, self.seed = images, labels, config, seed

    def batch(self, epoch: int, indices: Sequence[int]) -> ViewBatch:
        """The views of some images in one epoch."""
        uniform = self._uniforms(epoch, indices)
        partners = permutation(self.seed, "view:partner", epoch, len(self.images))[np.asarray(indices)]
        own = self._augmented(indices, uniform)
        share = np.ones(len(indices))
        if self.config.mix != "none":
            other = self._augmented(partners, self._uniforms(epoch, partners))
            strength = betaincinv(self.config.mix_alpha, self.config.mix_alpha, uniform[:, UNIFORMS])
            if self.config.mix == "cutmix":
                own, share = _cutmix(own, other, strength, uniform[:, UNIFORMS + 1 :])
            else:
                share = strength
                own = torch.lerp(other, own, torch.as_tensor(share).to(own).view(-1, 1, 1, 1))
        device = self.images.device
        position, partner = (
            torch.as_tensor(np.asarray(indices), device=device),
            torch.as_tensor(partners, device=device),
        )
        return ViewBatch(
            images=own,
            indices=position,
            partners=partner,
            share=torch.as_tensor(share, dtype=torch.float32, device=device),
            labels=self.labels[position],
            partner_labels=self.labels[partner],
        )

    def _uniforms(self, epoch: int, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        return uniforms(self.seed, "view", epoch, list(indices), UNIFORMS + 3)

    def _augmented(self, indices: Sequence[int] | NDArray[np.int64], uniform: NDArray[np.float64]) -> Tensor:
        """Crop and flip: float32 (N, 3, H, W) in [0, 1]."""
        images = self.images[torch.as_tensor(np.asarray(indices), device=self.images.device)].float() / 255
        size, crop = images.shape[-1], uniform[:, :UNIFORMS]
        flip = flips(crop) if self.config.flip else np.zeros(len(crop), dtype=bool)
        if self.config.crop == "resized":
            low, high = self.config.crop_scale
            boxes = resized_boxes(crop, size, size, (low, high))
        else:
            boxes = padded_boxes(crop, size, self.config.padding if self.config.crop == "padded" else 0)
        return take_boxes(images, boxes, flip, size)


def _cutmix(
    own: Tensor, other: Tensor, strength: NDArray[np.float64], centre: NDArray[np.float64]
) -> tuple[Tensor, NDArray[np.float64]]:
    """Paste a box of area 1 − λ of the partner's view, clipped at the border (CutMix, Yun et al., 2019).

    Returns:
        The mixed views, and the part of each that is still the own image.
    """
    size = own.shape[-1]
    half = np.floor(size * np.sqrt(1 - strength)).astype(np.int64)[:, None] // 2
    middle = np.floor(centre * size).astype(np.int64)
    low, high = np.clip(middle - half, 0, size), np.clip(middle + half, 0, size)
    grid = np.arange(size)
    rows = (grid >= low[:, :1]) & (grid < high[:, :1])
    columns = (grid >= low[:, 1:]) & (grid < high[:, 1:])
    box = torch.as_tensor(rows[:, None, :, None] & columns[:, None, None, :], device=own.device)
    return torch.where(box, other, own), 1 - (high - low).prod(axis=1) / size**2
