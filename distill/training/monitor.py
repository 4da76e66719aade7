"""What a person can watch: ``metrics.jsonl`` and TensorBoard.

Every file has one writer. What one process tells at a time, the only one or the one that finishes, is in
``metrics.jsonl``; a series that many workers tell of at the same time has files of its own, ``metrics/*.jsonl``. In all
of them the later line counts where stage, series and step are the same.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from distill.run_folder import METRICS, METRICS_OF_WORKERS, TENSORBOARD, numbered

SHOWN = 20
"""So many images tell what a stage works on."""


class NullMonitor:
    """Says nothing; for the ranks other than 0."""

    def resumed(self, step: int) -> None:
        """Before anything is told: what was told of later steps than this one before a kill counts no more."""

    def scalars(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Record named numbers of one step."""

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Show images uint8 (N, 3, H, W) as a grid, or one picture (3, H, W)."""

    def text(self, name: str, markdown: str) -> None:
        """Show a table or another text."""

    def close(self) -> None:
        """Write out everything."""


class Monitor(NullMonitor):
    """Writes the numbers of one stage; files are opened when something is told.

    Args:
        run: the run folder.
        stage: the artifact that the stage makes; it leads every tag, with its number.
        tensorboard: also write event files, under ``run/tensorboard/<stage>[/<series>]``.
        series: one of several of the stage that are told by different processes.
        writer: name of this process among all that tell of that series.
        anew: everything of the stage is told; what is there is of a process that was killed while it did so.
    """

    def __init__(
        self,
        run: Path,
        stage: str,
        tensorboard: bool = True,
        *,
        series: str = "",
        writer: str = "",
        anew: bool = False,
    ):
        self.stage, self.series, self.label = stage, series, numbered(stage)
        self.metrics = run / METRICS_OF_WORKERS / f"{stage}-{series}-{writer}.jsonl" if series else run / METRICS
        self.folder = run / TENSORBOARD / self.label / series if tensorboard else None
        self.first = 0 if anew else None

    def resumed(self, step: int) -> None:
        self.first = step + 1 if step else 0

    def scalars(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        series = self.series or prefix
        line = {"stage": self.stage, "series": series, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar("/".join(filter(None, (self.label, prefix, name))), value, step)

    def images(self, step: int, name: str, images: Tensor) -> None:
        if self._events is not None:
            picture = images if images.dim() == 3 else _grid(images)
            self._events.add_image(f"{self.label}/{name}", picture, step)

    def text(self, name: str, markdown: str) -> None:
        if self._events is not None:
            self._events.add_text(f"{self.label}/{name}", markdown, 0)

    def close(self) -> None:
        if "_file" in self.__dict__:
            self._file.close()
        if self.__dict__.get("_events") is not None:
            self._events.close()

    @functools.cached_property
    def _file(self) -> TextIO:
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.metrics, "a+", buffering=1)  # noqa: SIM115
        # A run that was killed may have left half a line.
        if file.tell() and not _ends_a_line(self.metrics):
            file.write("\n")
        return file

    @functools.cached_property
    def _events(self) -> Any:
        if self.folder is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what it has read of this step and later ones.
        return SummaryWriter(str(self.folder), purge_step=self.first)


def open_monitor(run: Path, stage: str, *, main: bool, tensorboard: bool = True) -> NullMonitor:
    """The monitor of rank 0, or a silent one."""
    return Monitor(run, stage, tensorboard) if main else NullMonitor()


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _grid(images: Tensor, columns: int = 10) -> Tensor:
    from torchvision.utils import make_grid

    scale = max(1, 64 // images.shape[-1])
    enlarged = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    return make_grid(enlarged.cpu(), nrow=min(columns, len(images)), pad_value=255).to(torch.uint8)
