"""Export of a distilled set in the formats of other programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.errors import ConfigError
from distill.exchange.contents import Contents
from distill.exchange.encode import encoded
from distill.exchange.folder import write_folder
from distill.exchange.parquet import library, write_parquet
from distill.exchange.placing import place
from distill.exchange.torch_file import write_torch_file

QUALITY = 95
"""Of JPEG, when nothing is said."""
BetonWriter = Callable[[Path, Iterable[bytes], NDArray[np.int64], int, bool], None]
"""(file, content of every record, int64 labels (N,), height and width, whether records are JPEG)"""


@dataclass(frozen=True)
class Format:
    """A format: the name of its file or folder in ``RUN/export``, and how it can store images, the usual way first."""

    name: str
    images: tuple[str, ...]


FORMATS = {
    "folder": Format("folder", ("jpeg", "png")),
    "pt": Format("distilled.pt", ("float32", "uint8")),
    "beton": Format("distilled.beton", ("raw", "jpeg")),
    "parquet": Format("parquet", ("png", "jpeg")),
}


def export(
    run: Path,
    form: str,
    target: Path | None = None,
    images: str | None = None,
    quality: int | None = None,
    *,
    write_beton: BetonWriter,
) -> str:
    """Export the distilled set of a run.

    Args:
        run: the run folder.
        form: "folder" (SRe²L's names), "pt" (the DC and MTT line), "beton" (FFCV), "parquet" (Hugging Face).
        target: file or folder to make; inside ``run/export`` when not given.
        images: how images are stored, one of ``FORMATS[form].images``; the first when not given.
        quality: of JPEG, 1 to 100; ``QUALITY`` when not given.
        write_beton: writes .beton files; it belongs to ``data_prep``.

    Returns:
        One line for people.

    Raises:
        ConfigError: an option that does not fit the format.
        ArtifactError: the set is not complete or damaged, or something else is at the target.
        MissingPackageError: FFCV or pyarrow is needed and not installed.
    """
    images = images or FORMATS[form].images[0]
    if images not in FORMATS[form].images:
        raise ConfigError(f"--images {images} does not go with --format {form}; choose {_either(form)}.")
    if quality is not None and images != "jpeg":
        way_out = "add --images jpeg" if "jpeg" in FORMATS[form].images else "leave it out"
        raise ConfigError(f"--quality is for JPEG, and --format {form} stores {images} here; {way_out}.")
    if quality is not None and not 1 <= quality <= 100:
        raise ConfigError(f"--quality {quality} must be from 1 to 100.")
    jpeg_quality = quality or QUALITY
    target = target or run / "export" / FORMATS[form].name
    if form == "parquet":
        library()  # Told before any work when it is not installed.
    contents = Contents.of(run)
    distilled = contents.distilled

    def make(path: Path) -> None:
        if form == "folder":
            write_folder(path, distilled.images, distilled.labels, len(distilled.class_names), images, jpeg_quality)
        elif form == "pt":
            write_torch_file(path, contents, images)
        elif form == "beton":
            records = encoded(distilled.images, images, jpeg_quality)
            write_beton(path, records, distilled.labels.numpy(), distilled.images.shape[-1], images == "jpeg")
        else:
            write_parquet(path, contents, images, jpeg_quality)

    new = place(target, make)
    stored = f"{images} of quality {jpeg_quality}" if images == "jpeg" else images
    return f"{target}: {len(distilled)} images ({stored}){'' if new else ', there already'}."


def _either(form: str) -> str:
    return " or ".join(FORMATS[form].images)
