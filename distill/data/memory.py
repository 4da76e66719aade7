"""Decoded squares of all images in memory, and their cache on disk."""

from __future__ import annotations

import hashlib
import os
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distill.data.decode import decode_square
from distill.data.samples import Samples
from distill.data.workers import locked, spread
from distill.errors import ConfigError, GuardError
from distill.files import load_tensors, save_tensors
from distill.progress import Progress


def stored_squares(
    samples: Samples, size: int, *, workers: int = 0, cache: Path | None = None, quiet: bool = False
) -> Tensor:
    """Every image with its shorter side resized to ``size``, the central square: uint8 (N, 3, size, size).

    Args:
        workers: processes that decode.
        cache: folder of a cache file, which is named by split, size and content. A damaged one is made again.
        quiet: show no progress (ranks other than 0).

    Raises:
        DataError: naming the first file that cannot be decoded.
        ConfigError: when this machine has not enough memory.
    """
    _check_memory(len(samples), size)
    if cache is None:
        return _decode(samples, size, workers, quiet)
    squares: Tensor | None = None
    name = f"decoded-{samples.split}-{size}-{samples.fingerprint[:16]}"
    try:
        # The ranks of one machine wait here for the first of them, and then share its file's pages.
        with locked(cache / f".{name}.lock"):
            for stale in cache.glob(f".{name}.*.tmp"):
                stale.unlink()
            squares = _load(cache / f"{name}.safetensors", (len(samples), 3, size, size))
            if squares is None:
                squares = _decode(samples, size, workers, quiet)
                save_tensors(cache / f"{name}.safetensors", {"images": squares, "sha256": _checksum(squares)})
    except OSError as error:  # A read-only folder or a full disk: the images are in memory all the same.
        warnings.warn(f"The decoded images are not kept in {cache} ({error.strerror}).", stacklevel=2)
    return _decode(samples, size, workers, quiet) if squares is None else squares


def _decode(samples: Samples, size: int, workers: int, quiet: bool) -> Tensor:
    squares = torch.empty((len(samples), 3, size, size), dtype=torch.uint8)
    paths = [str(path) for path in samples.paths]
    with Progress(len(paths), f"decode {samples.split}", "image", quiet=quiet) as progress:
        for row, square in zip(squares.numpy(), spread(partial(decode_square, size=size), paths, workers), strict=True):
            row[:] = square
            progress.update()
    return squares


def _load(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The cached squares, or None when they must be decoded."""
    try:
        tensors = load_tensors(path)
    except GuardError:
        return None
    squares, checksum = tensors.get("images"), tensors.get("sha256")
    if squares is None or checksum is None or squares.shape != shape or squares.dtype != torch.uint8:
        return None
    return squares if torch.equal(_checksum(squares), checksum) else None


def _checksum(squares: Tensor) -> Tensor:
    content = hashlib.sha256(squares.numpy()).digest()  # type: ignore[arg-type]
    return torch.tensor(list(content), dtype=torch.uint8)


def _check_memory(count: int, size: int) -> None:
    needed, present = count * 3 * size * size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * present:
        raise ConfigError(
            f"dataset.stored_size={size} would keep {needed / 2**30:.0f} GiB of images in memory, and this machine has "
            f"{present / 2**30:.0f} GiB; dataset.stored_size=0 decodes them each time."
        )
