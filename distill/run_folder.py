"""The artifacts of a run folder: whole or resumable, known by their fingerprints.

An artifact is a folder. ``recipe.json`` is written when work on it begins and says what it is made from;
``manifest.json`` is written last, so a folder with a manifest is complete and one without is resumed. Every file is
written to a temporary name, synchronised and renamed. Names that begin with a dot are passing and belong to no one.
Recipe and manifest are written once: of several processes the first wins, and the others agree with it or stop.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import ArtifactError
from distill.files import digest, file_digest, json_text, listed, read_json, remove, write_atomic, write_first

FORMAT_VERSION = 1
STAGES = ("teacher", "distilled", "labels", "student", "outcomes")
"""Artifacts of a run in the order in which they are made."""
SPECTRUM, SPECTRUM_SUMMARY = "spectrum", "spectrum.json"
"""An artifact that a run has when it is asked for by a command of its own, and its file of numbers to read."""
RESULTS = "results.json"
"""What a run comes to, beside its artifacts; made from the outcomes, and there when they are told."""
METRICS, METRICS_OF_WORKERS = "metrics.jsonl", "metrics"
"""The numbers of a run while it is made: a file, and a folder of files that have a writer each."""
TENSORBOARD = "tensorboard"
"""The folder of event files in a run."""


def numbered(stage: str) -> str:
    """What TensorBoard calls a stage, so that names are sorted as the stages follow: for instance 1_teacher."""
    return f"{STAGES.index(stage) + 1}_{stage}"


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
                    was = f"was {old[key]!r}" if key in old else "did not count"
                    now = f"now {new[key]!r}" if key in new else "does not count now"
                    texts.append(name.format(key) + (f" ({was}, {now})" if part == "options" else ""))
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
        present = listed(self.folder)
        for name in ("manifest.json", "recipe.json"):
            if name in present:
                stored = read_json(self.folder / name)
                self._check_recipe(stored.get("recipe", {}))
                if name == "manifest.json":
                    self._check_files(stored)
                    return True
        return False

    def begin(self, *, alone: bool = True) -> None:
        """Make the folder and write down the recipe; what was made from it already is kept and resumed.

        Args:
            alone: no other process works on it: temporary files are what a kill has left, and are removed.

        Raises:
            ArtifactError: when files without a recipe lie there, or another process has begun it from another recipe.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if alone:
            remove(self.folder.glob(".*.tmp"))
        if "recipe.json" not in listed(self.folder):
            files = self.files()
            # Another process writes its files after the recipe: where they are seen, it is seen too.
            if files and "recipe.json" not in listed(self.folder):
                raise ArtifactError(f"{files[0]} is of unknown origin; remove {self.folder} and run it again.")
            content = {"kind": self.kind, "recipe": self.recipe.as_json()}
            # Others that begin, finish and sweep in this moment may take the temporary file with them.
            with contextlib.suppress(FileNotFoundError):
                write_first(self.folder / "recipe.json", json_text(content))
        self.check_begun()

    def withdraw(self) -> None:
        """Take the recipe back where nothing has been made from it, so that the corrected command is not refused."""
        if listed(self.folder) == {"recipe.json"}:
            remove([self.folder / "recipe.json"])

    def check_begun(self) -> None:
        """Raises ArtifactError when the folder is not, or no longer, being made from this recipe."""
        path = self.folder / "recipe.json"
        if not path.is_file():
            raise ArtifactError(f"{path} is gone while work went on; remove {self.folder} and run the command again.")
        self._check_recipe(read_json(path).get("recipe", {}))

    def files(self) -> list[Path]:
        """Every file that is a part of it, sorted."""
        return parts_of(self.folder)

    def finish(self, **content: Any) -> None:
        """Write the manifest with the checksum of every file; from then on the artifact is complete."""
        files = {
            str(path.relative_to(self.folder)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in self.files()
        }
        body = {
            "format": f"guard-{self.kind}",
            "version": FORMAT_VERSION,
            "recipe": self.recipe.as_json(),
            "files": files,
            **content,
        }
        write_first(self.folder / "manifest.json", json_text({**body, "fingerprint": digest(body)}))

    def sweep(self) -> None:
        """Remove what has served its time in a complete artifact: checkpoints after a kill, claims of workers."""
        # Renamed first: a worker that wakes up finds its claims whole or not at all.
        for path in list(self.folder.glob(".*")):
            gone = path.with_name(f".gone-{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):
                path.rename(gone)
                remove([gone])

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


def parts_of(folder: Path) -> list[Path]:
    """The files of an artifact, sorted: all but recipe, manifest, checkpoints and temporary files."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        passing = {"recipe.json", "manifest.json"} if Path(place) == folder else set()
        found += [Path(place, name) for name in names if not name.startswith(".") and name not in passing]
    return sorted(found)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a complete artifact of one kind. Raises ArtifactError when there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no complete {kind}: {path.name} is missing.")
    manifest = read_json(path)
    if manifest.get("format") != f"guard-{kind}" or manifest.get("version") != FORMAT_VERSION:
        raise ArtifactError(f"{folder} is not a {kind} of format version {FORMAT_VERSION}.")
    return dict(manifest)


def made_from(folder: Path) -> Any:
    """The stored recipe of an artifact that is complete or begun; None where it is neither.

    Raises:
        ArtifactError: a file is damaged.
    """
    name = next((name for name in ("manifest.json", "recipe.json") if name in listed(folder)), None)
    return read_json(folder / name).get("recipe") if name else None


def fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of a complete artifact; None where there is none that can be read."""
    try:
        return str(read_json(folder / "manifest.json")["fingerprint"])
    except (OSError, KeyError, TypeError, ArtifactError):
        return None


def changed_inputs(run: Path, inputs: Mapping[str, str]) -> list[str]:
    """Those of a recipe's inputs that are artifacts of this run and are other ones now, or not complete."""
    return [name for name, value in inputs.items() if name in STAGES and value != fingerprint_of(run / name)]


def of_other_outcomes(run: Path, fingerprint: str | None) -> bool:
    """Whether results of this fingerprint tell of other outcomes than those that the run has or has begun.

    Raises:
        ArtifactError: manifest or recipe of the outcomes are damaged.
    """
    recipe = made_from(run / "outcomes")
    return recipe is not None and fingerprint != digest(recipe)


def copy_artifact(source: Path, target: Path) -> None:
    """Copy a complete artifact; the copy appears whole or not at all.

    Raises:
        ArtifactError: when a file of the source is not what its manifest says.
        OSError: a full disk; nothing of the copy is left.
    """
    remove(target.parent.glob(f".{target.name}.*.tmp"))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for name, entry in read_json(source / "manifest.json")["files"].items():
            content = (source / name).read_bytes() if (source / name).is_file() else b""
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise ArtifactError(f"{source / name} is damaged: it is not what {source / 'manifest.json'} says.")
            write_atomic(temporary / name, content)
        for name in ("recipe.json", "manifest.json"):
            write_atomic(temporary / name, (source / name).read_bytes())
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except BaseException:
        remove([temporary])
        raise
