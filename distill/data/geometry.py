"""The geometry of the views of ``augment``, image by image in numbers, for decoders that crop and resize themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from distill.data.augment import Augment
from distill.data.crops import padded_boxes, resized_boxes
from distill.data.decode import EVALUATION_MARGIN


@dataclass(frozen=True)
class Cut:
    """Cut a box out of each image: int64 (N, 4), top, left, height, width in pixels. Zero outside the image."""

    boxes: NDArray[np.int64]


@dataclass(frozen=True)
class Resize:
    """Resize each image bilinearly: int64 (N, 2), height and width in pixels."""

    sizes: NDArray[np.int64]
    antialias: bool = True


def view_steps(
    shapes: NDArray[np.int64],
    size: int,
    augment: Augment | None,
    uniform: NDArray[np.float64] | None,
    stored_size: int = 0,
) -> list[Cut | Resize]:
    """What makes the view of each image, in this order, all but the flip. Kinds and number of steps do not depend on
    the images.

    Args:
        shapes: int64 (N, 2), height and width of each image in pixels.
        size: side of the view.
        augment: None for the view of evaluation.
        uniform: (N, UNIFORMS) numbers of these images, for training.
        stored_size: as in ``Reading``: at least ``size``, or 0.
    """
    steps: list[Cut | Resize] = []
    margin = round(size * EVALUATION_MARGIN)
    if stored_size:
        steps = _central_square(shapes, stored_size, stored_size)
        shapes = np.full_like(shapes, stored_size)
        margin = min(margin, stored_size)
    if augment is not None and uniform is not None and augment.crop == "resized":
        boxes = resized_boxes(uniform, shapes[:, 0], shapes[:, 1], augment.crop_scale)
        # Views of stored squares are taken without antialias, like ``batch_view``.
        return [*steps, Cut(boxes), Resize(np.full_like(shapes, size), antialias=not stored_size)]
    if margin != stored_size:
        steps += _central_square(shapes, margin, size)
    elif size != stored_size:
        steps += _central_square(shapes, margin, size)[1:]
    if augment is not None and uniform is not None and augment.crop == "padded":
        steps.append(Cut(padded_boxes(uniform, size, augment.padding)))
    return steps


def take_steps(image: Tensor, steps: Sequence[Cut | Resize], number: int) -> Tensor:
    """What the steps make of image ``number``: uint8 (3, H, W) on the CPU, before and after."""
    for step in steps:
        if isinstance(step, Resize):
            height, width = step.sizes[number].tolist()
            image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=step.antialias)[0]
        else:
            top, left, height, width = step.boxes[number].tolist()
            # Negative padding cuts.
            image = F.pad(image, (-left, left + width - image.shape[2], -top, top + height - image.shape[1]))
    return image


def _central_square(shapes: NDArray[np.int64], shorter: int, size: int) -> list[Cut | Resize]:
    """``decode.central_square``."""
    short = shapes.min(axis=1, keepdims=True)
    sizes = np.where(shapes == short, shorter, (shorter * shapes / short).astype(np.int64))
    corners = np.round((sizes - size) / 2).astype(np.int64)
    return [Resize(sizes), Cut(np.concatenate([corners, np.full_like(corners, size)], axis=1))]
