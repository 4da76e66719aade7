"""What is exported: a distilled set that has been checked, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill.data.distilled_set import DistilledSet
from distill.errors import ArtifactError
from distill.files import file_digest, read_json
from distill.run_folder import read_manifest


@dataclass(frozen=True)
class Contents:
    """A distilled set to export.

    Attributes:
        distilled: the images with their labels.
        manifest: of the folder ``distilled/``.
        config: the run's resolved configuration, keys to values; empty when the run has none.
        provenance: what is known of the last process that worked on the set.
    """

    distilled: DistilledSet
    manifest: dict[str, Any]
    config: dict[str, Any]
    provenance: dict[str, Any]

    @classmethod
    def of(cls, run: Path) -> Contents:
        """Raises ArtifactError when the run holds no complete distilled set, or a file of it is damaged."""
        if not run.is_dir():
            raise ArtifactError(f"The run folder {run} does not exist.")
        folder = run / "distilled"
        manifest = read_manifest(folder, "distilled")
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file() or file_digest(path) != entry["sha256"]:
                state = "has changed since it was written" if path.is_file() else "is missing"
                raise ArtifactError(f"{path} {state}; remove {folder} and run guard recover again.")
        entries = read_json(run / "provenance.json").get("distilled", []) if (run / "provenance.json").is_file() else []
        return cls(
            DistilledSet.open(run),
            manifest,
            _options(run / "config.yaml"),
            entries[-1] if entries else {},
        )

    def option(self, key: str) -> Any:
        """A value of the configuration, for instance ``teacher.network``; None where it is not known."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def _options(path: Path) -> dict[str, Any]:
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
        return dict(content)
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ArtifactError(f"{path} is damaged; the command that made the run writes it again.") from error
