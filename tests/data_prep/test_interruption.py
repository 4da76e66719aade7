"""Real processes that are killed while they prepare; the next start must end as if nothing had happened."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from data_prep import prepare, verify
from distill.data.catalogue import PreparedSet
from distill.errors import DataError
from launchers.torchrun import children
from tests.running import Standstill, guard, start

ARCHIVE = Path(__file__).parents[2].parent / "shared" / "data" / "imagenette_224.zip"


def prepare_until(step, config):
    """In a child process: prepare, but kill itself before (even) or after (odd) the step-th change of a name."""
    left = [step]

    def deadly(change):
        def changed(*names, **options):
            for act in (None, change):
                result = act(*names, **options) if act else None
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
            return result

        return changed

    os.replace, os.rename, os.sync = deadly(os.replace), deadly(os.rename), deadly(os.sync)
    prepare(config)


def run_child(step, config):
    child = multiprocessing.get_context("fork").Process(target=prepare_until, args=(step, config))
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("form", ["archive", "copy"])
def test_killed_between_any_two_steps(own, tree, pack, tmp_path, form):
    source, *options = (pack(tree, tmp_path / "tree.zip"),) if form == "archive" else (tree, "dataset.copy=true")
    expected = prepare(own(source, *options, f"data_root={tmp_path / 'whole'}"))
    content = {file.name: file.read_bytes() for file in expected.folder.glob("*.*")}
    for step in range(100):
        root = tmp_path / str(step)
        config = own(source, *options, f"data_root={root}")
        code = run_child(step, config)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        with contextlib.suppress(DataError):
            assert PreparedSet.open(root / "own").fingerprint == expected.fingerprint
        prepared = prepare(config)
        assert {file.name: file.read_bytes() for file in prepared.folder.glob("*.*")} == content
        assert verify(prepared.folder) == 27
    assert step == 12, "source.json, images, sync, two indices and the manifest: before and after each"


def test_what_was_begun_from_another_source_is_not_used(own, tree, scans, pack, tmp_path):
    first, second = (
        pack(folder, tmp_path / name)
        for folder, name in (
            (tree, "first.zip"),
            (scans(tmp_path / "more", {"train": 8, "test": 4}, start=30), "second.zip"),
        )
    )
    assert run_child(5, own(first)) == -signal.SIGKILL
    assert (tmp_path / "data" / "own" / "images").is_dir()
    assert not (tmp_path / "data" / "own" / "manifest.json").exists()
    assert prepare(own(second)).manifest["splits"]["train"]["per_class"] == [8, 8, 8]


def died_within(seconds, group):
    """Whether no process of a group is left after some time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not ARCHIVE.is_file(), reason="../shared/data/imagenette_224.zip is not there")
def test_killed_while_workers_check_images(tmp_path):
    """Nothing half done is taken for whole, what was extracted is used again, and no worker outlives its parent."""
    folder, source = tmp_path / "imagenette", tmp_path / "part.zip"
    with zipfile.ZipFile(ARCHIVE) as whole, zipfile.ZipFile(source, "w") as part:
        images = [name for name in sorted(whole.namelist()) if name.endswith(".JPEG")]
        for name in images[::5]:
            part.writestr(name, whole.read(name))
    command = [sys.executable, "-m", "data_prep", "prepare", "dataset=imagenette"]
    command += [f"dataset.source={source}", f"data_root={tmp_path}"]
    limit = Standstill(tmp_path)
    limit.before("imagenette/images")
    process = start(command, new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **limit.variables)
    limit.reached(process)
    # An image that is never read to its end, so that the workers are there however late the kill comes.
    endless = max(folder.rglob("*.JPEG"))
    content = endless.read_bytes()
    endless.unlink()
    os.mkfifo(endless)
    limit.go_on()
    while not ((folder / "images").is_dir() and children(process.pid)):
        assert process.poll() is None, "it ended before its workers were there"
        time.sleep(0.005)
    process.kill()
    process.wait()
    with pytest.raises(DataError):
        PreparedSet.open(folder)
    assert died_within(100, process.pid)
    (endless,) = (path for path in folder.rglob(endless.name) if path.is_fifo())
    endless.unlink()
    endless.write_bytes(content)
    extracted = (folder / "images").stat().st_mtime_ns
    done = guard(command)
    assert done.returncode == 0, done.stderr
    assert "10 classes, 1894 train, 785 test images." in done.stdout
    assert "extract" not in done.stderr
    assert (folder / "images").stat().st_mtime_ns == extracted
