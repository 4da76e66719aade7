"""``guard verify``: every byte of a run against its manifests, and the manifests against each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill.errors import ArtifactError
from distill.files import digest, file_digest, listed, read_json, tensor_entries
from distill.run_folder import RESULTS, SPECTRUM, STAGES, changed_inputs, of_other_outcomes, parts_of
from distill.sharing.search import MANIFEST

AGAIN = "run the same command again"


def verify(run: Path) -> tuple[list[str], list[str]]:
    """Check every artifact of a run.

    Returns:
        One line for each artifact, and one sentence for everything that is wrong.
    """
    lines, faults = [], []
    for name in (*STAGES, *([SPECTRUM] if listed(run / SPECTRUM) else [])):
        folder = run / name
        if not listed(folder):
            lines.append(f"{folder}: not begun")
            continue
        complete = MANIFEST in listed(folder)
        wrong = list(_complete(run, name) if complete else _incomplete(folder))
        faults += wrong
        files = parts_of(folder)
        size = sum(path.stat().st_size for path in files)
        verdict = (
            f"{len(wrong)} faults" if wrong else "whole" if complete else "not complete, what is there can be read"
        )
        lines.append(f"{folder}: {len(files)} files, {size:,} bytes, {verdict}")
    wrong = list(_results(run))
    return lines, faults + wrong


def _complete(run: Path, name: str) -> Iterator[str]:
    folder = run / name
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        files, inputs = manifest["files"], manifest["recipe"]["inputs"]
    except ArtifactError as error:
        yield str(error)
        return
    except (KeyError, TypeError):
        yield f"{path} is no manifest; remove {folder} and {AGAIN}."
        return
    body = {key: value for key, value in manifest.items() if key != "fingerprint"}
    if digest(body) != manifest.get("fingerprint"):
        yield f"{path} is not what its own fingerprint says; remove it and {AGAIN}."
    for file, entry in files.items():
        if not (folder / file).is_file():
            yield f"{folder / file} is missing; remove {path} and {AGAIN}."
        elif file_digest(folder / file) != entry["sha256"]:
            yield f"{folder / file} is not what {path} says; remove both and {AGAIN}."
    for stranger in sorted({str(each.relative_to(folder)) for each in parts_of(folder)} - set(files)):
        yield f"{folder / stranger} is no part of {folder}, which {MANIFEST} would name; remove it."
    for source in changed_inputs(run, inputs):
        state = "is another one now" if MANIFEST in listed(run / source) else "is not complete"
        yield (
            f"{folder} was made from the {source} of fingerprint {inputs[source][:12]}, and {run / source} {state}; "
            f"remove {folder} and {AGAIN}."
        )


def _incomplete(folder: Path) -> Iterator[str]:
    """Without a manifest nothing says what the bytes are; but each file must be one that can be read."""
    for path in parts_of(folder):
        if path.suffix == ".safetensors":
            try:
                tensor_entries(path)
            except (OSError, ValueError) as error:
                yield f"{path} is truncated or no safetensors file ({error}); remove it and {AGAIN}."


def _results(run: Path) -> Iterator[str]:
    """The results belong to the outcomes beside them, complete or not."""
    path = run / RESULTS
    if not path.is_file():
        return
    try:
        if of_other_outcomes(run, read_json(path)["fingerprint"]):
            yield f"{path} was not made from {run / 'outcomes'}; remove it and {AGAIN}."
    except ArtifactError as error:
        yield str(error)
    except (KeyError, TypeError):
        yield f"{path} is no results of a run; remove it and {AGAIN}."
