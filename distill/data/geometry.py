"""The geometry of the views of ``augment``, image by image in numbers, for decoders that crop and resize themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class Views:
    """What is done with the images of one batch.

    Attributes:
        share: int64 (N,), their positions.
        steps: of ``view_steps``.
        flip: bool (N,), whether the result is flipped left to right.
    """

    share: NDArray[np.int64]
    steps: list[Cut | Resize]
    flip: NDArray[np.bool_]


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


def take_view(image: NDArray[np.uint8], views: Views, number: int) -> NDArray[np.uint8]:
    """View ``number`` of a batch, from its image (H, W, 3): uint8 (3, size, size)."""
    for step in views.steps:
        if isinstance(step, Cut):
            image = _cut(image, *step.boxes[number].tolist())
        elif image.shape[:2] != (size := tuple(step.sizes[number].tolist())):
            # Torch's kernel for bytes rounds like Pillow and is as fast as OpenCV's. It gives channels first.
            whole = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
            resized = F.interpolate(whole, size, mode="bilinear", antialias=step.antialias)
            image = resized[0].permute(1, 2, 0).numpy()
    view = image.transpose(2, 0, 1)
    return view[:, :, ::-1] if views.flip[number] else view


def _cut(image: NDArray[np.uint8], top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
    bottom, right = top + height, left + width
    inside = image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if inside.shape[:2] == (height, width):
        return inside
    rows, columns = max(-top, 0), max(-left, 0)
    border = (rows, height - rows - inside.shape[0]), (columns, width - columns - inside.shape[1]), (0, 0)
    return np.pad(inside, border)


def _central_square(shapes: NDArray[np.int64], shorter: int, size: int) -> list[Cut | Resize]:
    """``decode.central_square``."""
    short = shapes.min(axis=1, keepdims=True)
    sizes = np.where(shapes == short, shorter, (shorter * shapes / short).astype(np.int64))
    corners = np.round((sizes - size) / 2).astype(np.int64)
    return [Resize(sizes), Cut(np.concatenate([corners, np.full_like(corners, size)], axis=1))]
