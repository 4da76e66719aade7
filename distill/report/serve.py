"""``guard tensorboard``: TensorBoard on a run, or on several of one folder, while workers go on."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from distill.errors import ArtifactError, ConfigError
from distill.report.runs import run_folders
from distill.run_folder import TENSORBOARD
from distill.training.worker_events import show_workers

REFRESH = 15.0
"""Seconds between two looks at the records of the workers."""


def serve(folder: Path, host: str, port: int | None = None) -> None:
    """Show TensorBoard's page until Ctrl-C; its address is printed.

    Args:
        folder: a run folder, or one that holds some.
        host: address of the interface on which the page is served.
        port: None: 6006, or the next that is free.

    Raises:
        ArtifactError: there is no run, or none that has events.
        ConfigError: the page cannot be served there.
    """
    from tensorboard import program

    runs = _refreshed(folder)
    if not runs:
        raise ArtifactError(
            f"{folder} holds no events for TensorBoard; "
            "they come with the first stage, unless it runs with monitor.tensorboard=false."
        )
    server = program.TensorBoard()
    logdir = folder / TENSORBOARD if runs == [folder] else folder
    wanted = ["tensorboard", "--logdir", str(logdir), "--host", host, *([] if port is None else ["--port", str(port)])]
    try:
        server.configure(wanted)
        address = server.launch()
    except (program.TensorBoardServerException, ValueError) as error:
        raise ConfigError(f"TensorBoard cannot be served there: {' '.join(str(error).split())}") from error
    print(f"TensorBoard of {folder}: {address} (Ctrl-C ends it)", flush=True)
    # The page is served by a thread until this one ends.
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(REFRESH)
            # A run that is removed or begun anew meanwhile is no reason to stop.
            with contextlib.suppress(ArtifactError):
                _refreshed(folder)


def _refreshed(folder: Path) -> list[Path]:
    """The runs that have events, with what their workers have made by now."""
    runs = [run for run in run_folders([folder]) if any((run / TENSORBOARD).rglob("*tfevents*"))]
    for run in runs:
        # Where this user may only read, the page shows what is there.
        with contextlib.suppress(OSError):
            show_workers(run)
    return runs
