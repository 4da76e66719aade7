"""The report in TensorBoard: the table as text, the drawings as images."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from distill.files import remove
from distill.report.charts import accuracy_plots, read_all_spectra, spectrum_plots
from distill.report.comparison import compare_groups
from distill.report.groups import Group, group_runs
from distill.report.page import inputs_digest
from distill.report.plots import png
from distill.report.runs import find_runs

MADE_OF = "inputs"
"""A file beside the events that says what they were made of."""


def show_report(folder: Path, runs: Sequence[Path]) -> bool:
    """Write the events of a report under ``folder/tensorboard/report``, in the place of those of an older one.

    Args:
        folder: of the experiment; the run's own where there is but one.
        runs: run folders. Where none has events of its own (``monitor.tensorboard=false``), none are written.

    Returns:
        Whether events were written; not where they would be the same again.
    """
    finished, incomplete = find_runs(runs)
    target = folder / "tensorboard" / "report"
    inputs = inputs_digest(finished, incomplete)
    stamp = target / MADE_OF
    if not finished or not any((run.path / "tensorboard").is_dir() for run in finished):
        return False
    if stamp.is_file() and stamp.read_text() == inputs:
        return False
    fresh = target.with_name(f".report.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        _write(fresh, group_runs(finished))
        (fresh / MADE_OF).write_text(inputs)
        remove([target])
        # Of several workers that come to the end together the first one's stay.
        with contextlib.suppress(FileExistsError):
            _rename(fresh, target)
    finally:
        remove([fresh])
    return True


def _rename(source: Path, target: Path) -> None:
    """Raises FileExistsError where ``target`` is there, whichever way the file system says so."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(error.errno, error.strerror, str(target)) from error
        raise


def _write(folder: Path, groups: Sequence[Group]) -> None:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    plots = [*accuracy_plots(groups), *spectrum_plots(groups, read_all_spectra(groups))]
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("report/table", compare_groups(groups).markdown(), 0)
        for plot in plots:
            picture = np.asarray(Image.open(io.BytesIO(png(plot))).convert("RGB"))
            writer.add_image(f"report/{plot.key}", picture, 0, dataformats="HWC")
