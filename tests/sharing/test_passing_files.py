"""Files that are written whole or not at all leave nothing beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.files import listed, write_atomic, write_first


def test_folders_that_are_missing_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a/b/file"
    write_atomic(path, "one")
    write_atomic(path, "two", durable=False)
    assert path.read_text() == "two"
    assert listed(path.parent) == {"file"}
    assert write_first(tmp_path / "c/file", "one")
    assert listed(tmp_path / "c") == {"file"}


def test_the_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert write_first(path, "one")
    assert not write_first(path, "two")
    assert path.read_text() == "one"
    assert listed(tmp_path) == {"file"}


def test_an_error_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken/inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "taken", "text")
    assert listed(tmp_path) == {"taken"}
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(NotADirectoryError) as caught:
        write_atomic(blocked / "below", "text")
    assert str(blocked) in str(caught.value)
    assert listed(tmp_path) == {"taken", "file"}
