"""The options that a run was made with, as its ``config.yaml`` holds them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from distill.errors import ArtifactError

CONFIG = "config.yaml"


def read_options(folder: Path) -> dict[str, Any]:
    """The options of a run by their full key, from ``config.yaml``; empty where there is none.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        return dict(_parsed(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {' '.join(str(error).split())}.") from error


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> dict[str, Any]:
    """The options in a YAML text by their full key; it is read for several tables of a page. Raises ValueError."""
    import yaml

    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(error) from error
    if not isinstance(tree, dict):
        raise ValueError("it holds no options")
    return dict(_flat(tree))


def _flat(tree: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{above}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return found
