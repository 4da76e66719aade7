"""The code that jobs run: a copy made when they are submitted, so that editing the checkout does not change them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from distill.compose import config_folder
from distill.errors import GuardError
from distill.files import write_json
from distill.provenance import SNAPSHOT, commit

PACKAGES = ("distill", "data_prep", "launchers")


def take(folder: Path) -> Path:
    """Copy the packages and the shipped configurations into a folder; returns it.

    ``snapshot.json`` in it names the commit and a digest of all files; jobs take both over into their provenance.
    """
    here = Path(__file__).resolve().parent.parent
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for package in PACKAGES:
        shutil.copytree(here / package, folder / package, ignore=ignore, dirs_exist_ok=True)
    configs = config_folder()
    if configs.parent == here:
        shutil.copytree(configs, folder / configs.name, ignore=ignore, dirs_exist_ok=True)
    write_json(folder / SNAPSHOT, {"commit": commit(), "sha256": _digest(folder)})
    return folder


def check_code(folder: Path) -> None:
    """Raises GuardError when this process does not run the code of a snapshot."""
    used = Path(__file__).resolve().parent.parent
    if used != folder.resolve():
        raise GuardError(
            f"This job runs the code in {used} and not the copy that was submitted, {folder}; is that folder visible "
            f"on this node, and does cluster.setup leave PYTHONPATH as it is?"
        )


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SNAPSHOT:
            total.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
