"""Ten minutes of epochs: memory stays flat and nothing leaks. ``make soak``; GUARD_SOAK_SECONDS shortens it."""

import json
import os
import shutil
import sys

import pytest

from data_prep import prepare
from distill.compose import compose
from tests.data.conftest import SHARED
from tests.data.reading import configure
from tests.running import guard

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]
KINDS = ("files with workers", "ffcv raw", "ffcv quasi-random", "dali")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """128 photographs of ImageNet as they are, a class each."""
    if not (SHARED / "imagenet_samples.zip").is_file():
        pytest.skip("../shared/data/imagenet_samples.zip is not there")
    folder = tmp_path_factory.mktemp("samples")
    shutil.unpack_archive(SHARED / "imagenet_samples.zip", folder / "images")
    classes = len(list((folder / "images/train").iterdir()))
    options = [f"dataset.source={folder / 'images'}", f"dataset.num_classes={classes}", f"data_root={folder / 'data'}"]
    return prepare(compose(["dataset=imagenette", *options]))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_flat_and_nothing_leaks(samples, kind):
    configure(samples, kind, "dataset.image_size=224")
    seconds = float(os.environ.get("GUARD_SOAK_SECONDS", "600")) / len(KINDS)
    done = guard([sys.executable, "-m", "tests.data.soak", kind, str(samples.folder), str(seconds)], fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    (_, second, _, last) = found["peaks"]
    assert last[0] <= 1.03 * second[0], "memory in KiB"
    assert last[1] <= second[1], "threads"
    assert last[2] <= second[2], "file descriptors"
