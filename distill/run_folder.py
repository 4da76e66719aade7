"""The run folder: artifacts that are whole or resumable, fingerprints, provenance.

An artifact is a folder. ``recipe.json`` is written when work on it begins and says what it is made from;
``manifest.json`` is written last, so a folder with a manifest is complete and one without is resumed. Every file is
written to a temporary name, synchronised and renamed. Names that begin with a dot are passing and belong to no one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that its name never stands for half of it. OSError (a full disk) leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, keys sorted, so that equal content is equal bytes."""
    write_atomic(path, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises ArtifactError when the file is damaged."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it and run the same command again.") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **information: str) -> None:
    """Write tensors as one safetensors file, atomically."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(contiguous, metadata=information or None))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ArtifactError when it is missing, truncated or not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ArtifactError(f"{path} does not exist.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is truncated or no safetensors file ({error}); delete it and run the same command again."
        ) from error


def digest(content: Any) -> str:
    """SHA-256 of JSON content, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        _remove(self.folder.glob(".*.tmp"))
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
        _remove(self.folder.glob(".*"))

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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder; a record lock, which is not inherited by worker processes and ends with this process.

    Raises:
        ArtifactError: when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ArtifactError(f"Another process is working on {folder}; wait for it, or stop it.") from error
        except OSError as error:
            # A file system without locks: nothing can be said about other processes.
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def copy_artifact(source: Path, target: Path) -> None:
    """Copy a complete artifact; the copy appears whole or not at all.

    Raises:
        ArtifactError: when a file of the source is not what its manifest says.
    """
    _remove(target.parent.glob(f".{target.name}.*.tmp"))
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


class Provenance:
    """``provenance.json``: for each stage which command, code, versions and hardware made it, and how long it took."""

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def record(self, stage: str, **details: Any) -> Iterator[dict[str, Any]]:
        """Record one piece of work on a stage; interrupted ones stay in the list without an end."""
        entry: dict[str, Any] = {"started": _now(), **environment(), **details}
        content = read_json(self.path) if self.path.is_file() else {}
        content.setdefault(stage, []).append(entry)
        write_json(self.path, content)
        began = datetime.datetime.now()
        yield entry
        entry["finished"] = _now()
        entry["seconds"] = round((datetime.datetime.now() - began).total_seconds(), 3)
        write_json(self.path, content)


def environment() -> dict[str, Any]:
    """Command, code, versions and hardware of this process."""
    versions = {}
    for package in ("guard-distill", "torch", "torchvision", "torchattacks", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    facts: dict[str, Any] = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }
    if "torch" in sys.modules:
        import torch

        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str | None:
    """The commit of the code, with ``+changes`` when the checkout has some; None outside a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
