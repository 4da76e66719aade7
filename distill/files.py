"""Files that are written whole or not at all, and read with a sentence when they are damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from distill.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""What file systems without hard links answer to a link."""
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""


def write_atomic(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a file so that its name never stands for half of it. OSError (a full disk) leaves the old file.

    Args:
        durable: wait until it is on disk; else a crash of the machine may leave an empty file.
    """
    with _temporary(path, content, durable) as temporary:
        os.replace(temporary, path)


def write_first(path: Path, content: bytes | str) -> bool:
    """Write a file unless it is there: the first of several processes wins. Returns whether this one has."""
    with _temporary(path, content, durable=True) as temporary:
        first = place_first(temporary, path)
        temporary.unlink(missing_ok=True)
        return first


def place_first(source: Path, target: Path) -> bool:
    """Give a file of the same folder tree its name unless that is taken; ``source`` is to be removed afterwards.

    A link is exclusive on every file system that has links, NFS included. Where there are none, two processes that
    come within the same moment both rename, and the file is that of the second, whole.

    Returns:
        Whether ``target`` is this file.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        # NFS: the answer to a link that was made may be lost, and the question asked again.
        return os.path.samefile(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if target.exists():
            return False
        os.rename(source, target)
    return True


def listed(folder: Path) -> set[str]:
    """The names in a folder, none when it is missing; on NFS what other machines have written is among them."""
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


@contextlib.contextmanager
def _temporary(path: Path, content: bytes | str, durable: bool) -> Iterator[Path]:
    """A file beside ``path`` with this content, under a name that no other process of any machine takes.

    Whoever asks for it moves or removes it; after an error it is removed here.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with _created(temporary) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        yield temporary
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def _created(path: Path) -> BinaryIO:
    try:
        return open(path, "wb")
    except FileNotFoundError:
        # Only now: a shared folder is asked once for each file that is written.
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "wb")


def printable(name: str) -> str:
    """A file name as UTF-8 can hold it."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def json_text(content: Any) -> str:
    """JSON with sorted keys, so that equal content is equal bytes."""
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, keys sorted."""
    write_atomic(path, json_text(content))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ArtifactError when the file is damaged."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it and run the same command again.") from error
    return content


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


def tensor_entries(path: Path) -> tuple[int, dict[str, Any]]:
    """What the header of a safetensors file says, without its data; format: huggingface.co/docs/safetensors.

    Returns:
        Where the data begins, in bytes, and tensor name → its ``dtype``, ``shape`` and ``data_offsets`` from there.

    Raises:
        ValueError: the header is damaged, or the file has another length than it says.
    """
    with open(path, "rb") as file:
        length, size = int.from_bytes(file.read(LENGTH_BYTES), "little"), os.fstat(file.fileno()).st_size
        if length > size - LENGTH_BYTES:
            raise ValueError("its header is cut off")
        entries = json.loads(file.read(length))
    begin = LENGTH_BYTES + length
    try:
        entries.pop("__metadata__", None)
        end = begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError("its header describes no tensors") from error
    if size < end:
        raise ValueError(f"it is truncated: {size} bytes of {end}")
    if size > end:
        raise ValueError(f"it has {size} bytes, and its header tells of {end}")
    return begin, entries


def digest(content: Any) -> str:
    """SHA-256 of JSON content, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path, held: str = "", patience: float = 0.0) -> Iterator[None]:
    """Hold a run folder; a record lock, which is not inherited by worker processes and ends with this process.

    Args:
        held: what to say when another process holds it.
        patience: how long to wait for another process to let go of it, in seconds.

    Raises:
        ArtifactError: when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError) as error:
                if time.monotonic() < until:
                    time.sleep(min(patience, 1.0))
                    continue
                held = held or f"Another process is working on {folder}; wait for it, or stop it."
                raise ArtifactError(held) from error
            except OSError as error:
                # A file system without locks: nothing can be said about other processes.
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                break
        yield


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders; one that is gone already is no error."""
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
