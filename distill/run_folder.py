"""The artifacts of a run folder: whole or resumable, known by their fingerprints.

An artifact is a folder. ``recipe.json`` is written when work on it begins and says what it is made from;
``manifest.json`` is written last, so a folder with a manifest is complete and one without is resumed. Every file is
written to a temporary name, synchronised and renamed. Names that begin with a dot are passing and belong to no one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import ArtifactError
from distill.files import digest, file_digest, read_json, remove, write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """What an artifact is made from: the options that change it and the fingerprints of its inputs."""

    options: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps({"options": self.options, "inputs": self.inputs}))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """One text for every key in which a stored recipe differs from this one."""
        mine, texts = self.as_json(), []
        for part, name in (("options", "{}"), ("inputs", "the {} it was made from")):
            old, new = other.get(part, {}), mine[part]
            for key in sorted({*old, *new}):
                if key not in old or key not in new or old[key] != new[key]:
                    change = f" (was {old.get(key)!r}, now {new.get(key)!r})" if part == "options" else ""
                    texts.append(name.format(key) + change)
        return texts


class Artifact:
    """A folder of a run, made by one stage.

    Args:
        folder: where it lies.
        kind: what it is, for messages: "teacher", "distilled", ….
        recipe: what the present configuration makes it from.
    """

    def __init__(self, folder: Path, kind: str, recipe: Recipe):
        self.folder, self.kind, self.recipe = folder, kind, recipe

    @property
    def complete(self) -> bool:
        """Whether it is whole and made from this recipe.

        Raises:
            ArtifactError: when it was made, or begun, from another recipe: the message names the keys; or when a
                file is missing or has another size than the manifest says.
        """
        for name in ("manifest.json", "recipe.json"):
            file = self.folder / name
            if file.is_file():
                stored = read_json(file)
                self._check_recipe(stored.get("recipe", {}))
                if name == "manifest.json":
                    self._check_files(stored)
                    return True
        return False

    def begin(self) -> None:
        """Make the folder and write down the recipe; what was made from it already is kept and resumed.

        Raises:
            ArtifactError: when files without a recipe lie there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove(self.folder.glob(".*.tmp"))
        if not (self.folder / "recipe.json").is_file():
            unknown = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and not self._passing(path)]
            if unknown:
                raise ArtifactError(f"{unknown[0]} is of unknown origin; remove {self.folder} and run it again.")
            write_json(self.folder / "recipe.json", {"kind": self.kind, "recipe": self.recipe.as_json()})

    def finish(self, **content: Any) -> None:
        """Write the manifest with the checksum of every file; from then on the artifact is complete."""
        files = {
            str(path.relative_to(self.folder)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not self._passing(path)
        }
        body = {
            "format": f"guard-{self.kind}",
            "version": FORMAT_VERSION,
            "recipe": self.recipe.as_json(),
            "files": files,
            **content,
        }
        write_json(self.folder / "manifest.json", {**body, "fingerprint": digest(body)})

    def sweep(self) -> None:
        """Remove checkpoints that a kill has left behind in a complete artifact."""
        remove(self.folder.glob(".*"))

    def _passing(self, path: Path) -> bool:
        """Whether a file is not a part of the artifact: recipe, manifest, checkpoints and temporary files."""
        parts = path.relative_to(self.folder).parts
        return parts[0] in ("recipe.json", "manifest.json") or any(part.startswith(".") for part in parts)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of a complete artifact."""
        return read_manifest(self.folder, self.kind)

    @property
    def fingerprint(self) -> str:
        """Changes with the recipe and with every byte of the files."""
        return str(self.manifest["fingerprint"])

    def _check_recipe(self, stored: Mapping[str, Any]) -> None:
        texts = self.recipe.differences(stored)
        if texts:
            raise ArtifactError(
                f"{self.folder} was made with another configuration; these differ: {'; '.join(texts)}. "
                f"Choose another run with name=…, or remove that folder."
            )

    def _check_files(self, manifest: Mapping[str, Any]) -> None:
        for name, entry in manifest["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
                raise ArtifactError(
                    f"{path} {state}; remove it and {self.folder / 'manifest.json'}, and run the same command again."
                )


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a complete artifact of one kind. Raises ArtifactError when there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no complete {kind}: {path.name} is missing.")
    manifest = read_json(path)
    if manifest.get("format") != f"guard-{kind}" or manifest.get("version") != FORMAT_VERSION:
        raise ArtifactError(f"{folder} is not a {kind} of format version {FORMAT_VERSION}.")
    return dict(manifest)


def copy_artifact(source: Path, target: Path) -> None:
    """Copy a complete artifact; the copy appears whole or not at all.

    Raises:
        ArtifactError: when a file of the source is not what its manifest says.
    """
    remove(target.parent.glob(f".{target.name}.*.tmp"))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copytree(source, temporary)
    for name, entry in read_json(temporary / "manifest.json")["files"].items():
        if not (temporary / name).is_file() or file_digest(temporary / name) != entry["sha256"]:
            shutil.rmtree(temporary)
            raise ArtifactError(f"{source / name} is damaged: it is not what {source / 'manifest.json'} says.")
        with open(temporary / name, "rb") as file:
            os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
