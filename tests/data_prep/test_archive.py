import io
import os
import stat
import tarfile
import zipfile

import pytest

from data_prep import prepare
from data_prep.archive import archive_signature
from distill.errors import DataError


def hostile_tar(path, content, name, link=""):
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo(name)
        if link:
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            archive.addfile(entry)
        else:
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def scan(tree):
    return next((tree / "train" / "ant").iterdir()).read_bytes()


@pytest.mark.parametrize("name", ["../escaped.png", "train/../../escaped.png", "/tmp/escaped.png", "..\\escaped.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_outside_are_refused(own, scan, tmp_path, name, kind):
    path = tmp_path / "hostile"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train/ant/0.png", scan)
            archive.writestr(name, scan)
    else:
        hostile_tar(path, scan, name)
    with pytest.raises(DataError, match="leads outside of its folder"):
        prepare(own(path))
    assert not list(tmp_path.rglob("escaped.png"))
    assert not os.path.exists("/tmp/escaped.png")
    assert not (tmp_path / "data" / "own" / "images").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_links_are_refused(own, tmp_path, kind):
    path = tmp_path / "linked"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            entry = zipfile.ZipInfo("train/ant/0.png")
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc/passwd")
    else:
        hostile_tar(path, b"", "train/ant/0.png", link="/etc/passwd")
    with pytest.raises(DataError, match=r"train/ant/0\.png as a link"):
        prepare(own(path))


def test_damaged_and_empty_archives_are_told(own, tree, pack, tmp_path):
    path = pack(tree, tmp_path / "tree.zip")
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tree\.zip is damaged"):
        prepare(own(path))
    with tarfile.open(tmp_path / "tree.tar.gz", "w:gz") as archive:
        archive.add(tree, ".")
    (tmp_path / "short.tar.gz").write_bytes((tmp_path / "tree.tar.gz").read_bytes()[:-300])
    with pytest.raises(DataError, match=r"short\.tar\.gz is damaged"):
        prepare(own(tmp_path / "short.tar.gz"))
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("train/ant/0.png", b"one")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("train/ant/0.png", b"two")
    with pytest.raises(DataError, match="twice"):
        prepare(own(tmp_path / "twice.zip"))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("README", b"nothing")
    with pytest.raises(DataError, match="holds no images"):
        prepare(own(tmp_path / "empty.zip"))


def test_the_signature_sees_one_changed_image(tree, pack, tmp_path):
    first = archive_signature(pack(tree, tmp_path / "first.zip"))
    file = next((tree / "train" / "ant").iterdir())
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    changed = pack(tree, tmp_path / "second.zip")
    assert changed.stat().st_size == (tmp_path / "first.zip").stat().st_size
    assert archive_signature(changed) != first
    assert archive_signature(changed.rename(tmp_path / "moved.zip")) != first


def test_the_signature_of_a_large_file_reads_part_of_it(tmp_path):
    path = tmp_path / "large.tar"
    with open(path, "wb") as file:
        file.truncate(1 << 34)
    first = archive_signature(path)
    with open(path, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"?")
    assert archive_signature(path) != first
