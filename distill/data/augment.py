"""The views of training and evaluation, of one decoded image or of a whole batch in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distill.data.crops import flips, padded_boxes, resized_boxes, take_boxes
from distill.data.decode import EVALUATION_MARGIN, box_of, central_square


@dataclass(frozen=True)
class Augment:
    """How training images are cropped and flipped.

    Attributes:
        crop: "resized" is a random resized crop; "padded" a random crop after zero padding; "none" the central square.
        crop_scale: area of the crop relative to the image, for "resized".
        padding: pixels, for "padded".
        flip: whether half of the images are flipped left to right.
    """

    crop: str = "resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    padding: int = 4
    flip: bool = True


def image_view(
    image: Image.Image,
    size: int,
    augment: Augment | None,
    uniform: NDArray[np.float64] | None,
    box: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """The view of one decoded image; numpy and Pillow only, for worker processes.

    Args:
        augment: None gives the view of evaluation: the shorter side resized to size · 256/224, the central square.
        uniform: (1, UNIFORMS) numbers of this image, for training.
        box: (4,) of ``resized_boxes`` from these numbers, where it was drawn for many images at once.

    Returns:
        uint8 (3, size, size).
    """
    if augment is None or uniform is None:
        return central_square(image, round(size * EVALUATION_MARGIN), size)
    if augment.crop == "resized":
        if box is None:
            box = resized_boxes(uniform, image.height, image.width, augment.crop_scale)[0]
        view = box_of(image, box, size)
    else:
        view = central_square(image, round(size * EVALUATION_MARGIN), size)
        if augment.crop == "padded":
            top, left = padded_boxes(uniform, size, augment.padding)[0, :2] + augment.padding
            border = (augment.padding, augment.padding)
            view = np.pad(view, ((0, 0), border, border))[:, top : top + size, left : left + size]
    return view[:, :, ::-1] if augment.flip and flips(uniform)[0] else view


def memory_base(squares: Tensor, size: int, augment: Augment | None) -> Tensor:
    """What stays in memory of the stored squares (N, 3, S, S): all of it for random resized crops, otherwise the view
    of evaluation (N, 3, size, size)."""
    stored = squares.shape[-1]
    if stored == size or (augment is not None and augment.crop == "resized"):
        return squares
    shorter = min(stored, round(size * EVALUATION_MARGIN))
    start = round((shorter - size) / 2)
    base = torch.empty((len(squares), 3, size, size), dtype=torch.uint8)
    for part, out in zip(squares.split(512), base.split(512), strict=True):
        if shorter != stored:
            resized = F.interpolate(part.float(), (shorter, shorter), mode="bilinear", antialias=True)
            part = resized.round_().clamp_(0, 255).to(torch.uint8)
        out.copy_(part[:, :, start : start + size, start : start + size])
    return base


def batch_view(images: Tensor, size: int, augment: Augment, uniform: NDArray[np.float64]) -> Tensor:
    """Training views of a batch from memory, a crop for each image.

    Args:
        images: uint8 (N, 3, S, S) of ``memory_base``, on any device.
        uniform: (N, UNIFORMS) numbers of these images.

    Returns:
        uint8 (N, 3, size, size) on the same device.
    """
    flip = flips(uniform) if augment.flip else np.zeros(len(uniform), dtype=bool)
    if augment.crop == "none":
        chosen = torch.as_tensor(flip, device=images.device)[:, None, None, None]
        return torch.where(chosen, images.flip(3), images)
    if augment.crop == "padded":
        boxes = padded_boxes(uniform, size, augment.padding)
    else:
        boxes = resized_boxes(uniform, images.shape[2], images.shape[3], augment.crop_scale)
    return take_boxes(images.float(), boxes, flip, size).round_().clamp_(0, 255).to(torch.uint8)
