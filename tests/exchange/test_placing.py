"""Exports appear whole or not at all, beside others that go to the same place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from distill.errors import ArtifactError
from distill.exchange.placing import place
from tests.exchange.moving import write
from tests.running import environment


def test_something_else_at_the_place_stays(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "set/thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(
        ArtifactError, match="set exists and is another thing; remove it, or choose another place with --to"
    ):
        write(run, "folder", precious.parent)
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert len(list(write(run, "folder", tmp_path / "empty").iterdir())) == 10


def test_a_killed_export_leaves_nothing_half(run: Path, tmp_path: Path) -> None:
    """Killed in the middle of writing: there is nothing under the name, and the next export is whole."""
    code = (
        "import itertools, sys, time\nfrom pathlib import Path\nimport distill.exchange.folder as folder\n"
        "from distill.exchange import export\n"
        "write, count = folder.write_file, itertools.count()\n"
        "def stopping(path, content):\n    if next(count) == 12:\n        print('there', flush=True)\n"
        "        time.sleep(600)\n    write(path, content)\n"
        "folder.write_file = stopping\n"
        "export(Path(sys.argv[1]), 'folder', Path(sys.argv[2]), write_beton=None)\n"
    )
    target = tmp_path / "set"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run), str(target)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".set.")
    assert len(list(left.rglob("*.jpg"))) == 12
    # It may be an export under way, until nothing was written for a day.
    assert len(ImageFolder(write(run, "folder", target))) == 30
    assert left.exists()
    for path in (left, *left.rglob("*")):
        os.utime(path, (0, time.time() - 25 * 3600))
    write(run, "folder", target)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def file_of(content: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_text(content)

    return make


def folder_of(content: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "a").write_text(content)

    return make


@pytest.mark.parametrize("kind", [file_of, folder_of])
def test_of_two_exports_at_once_the_first_to_end_wins(
    tmp_path: Path, kind: Callable[[str], Callable[[Path], None]]
) -> None:
    """The second begins and ends while the first is under way."""
    for content in ("same", "other"):
        target = tmp_path / content

        def slow(path: Path, target: Path = target, content: str = content) -> None:
            kind("same")(path)
            assert place(target, kind(content))
            assert path.exists(), "the second export has removed what the first was writing"

        if content == "same":
            assert not place(target, slow)
        else:
            with pytest.raises(ArtifactError, match="other exists and is another thing"):
                place(target, slow)
        file = target / "a" if target.is_dir() else target
        assert file.read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "same"]


def test_the_file_that_failed_is_named(tmp_path: Path) -> None:
    """Not the place of the export, unless it is that one, whose temporary name nobody knows."""
    target = tmp_path / "set"
    for make, name in [
        (lambda path: (tmp_path / "missing").read_bytes(), tmp_path / "missing"),
        (lambda path: (path / "new000").mkdir(), target),
    ]:
        with pytest.raises(FileNotFoundError) as caught:
            place(target, make)
        assert caught.value.filename == str(name)
    assert list(tmp_path.iterdir()) == []


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="empty exists and is another thing"):
        place(tmp_path / "empty", file_of("content"))
    assert (tmp_path / "empty").is_dir()
