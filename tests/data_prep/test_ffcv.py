"""format=ffcv: files that FFCV reads, the same bytes every time, and what happens when something goes wrong."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import prepare, verify
from data_prep.__main__ import main
from data_prep.checks import hash_file
from data_prep.formats import _beton_writer, _plan, _records, ffcv
from data_prep.formats._beton_writer import BetonWriter, page_size_for
from data_prep.formats._records import jpeg_records, stored_shape
from distill.data.augment import image_view
from distill.data.beton import BetonLayout, beton_file
from distill.data.decode import decode_square, read_image
from distill.errors import ConfigError, DataError
from launchers.graph import prepared as written

Reader = pytest.importorskip("ffcv.reader", reason="ffcv is not installed").Reader
cv2 = pytest.importorskip("cv2")
ROOT = Path(__file__).parents[2]
RAW = ["format=ffcv", "format.mode=raw", "dataset.stored_size=0"]
MIXED = [
    "format=ffcv",
    "format.mode=proportion",
    "format.jpeg_share=0.5",
    "format.resolution=150",
    "dataset.image_size=96",
]


@pytest.fixture
def photos(configure, photographs):
    """A function that composes a configuration of 27 photographs."""
    return lambda *more: configure(
        "dataset=imagenette", "dataset.num_classes=3", f"dataset.source={photographs}", *more
    )


def layout_of(config):
    return BetonLayout.of(config.format, config.dataset)


def convert(config):
    """Prepare; returns the prepared set and the folder of the .beton files."""
    prepared = prepare(config)
    return prepared, layout_of(config).folder(prepared)


def stored(path):
    """What FFCV's reader finds: for each record whether it is JPEG, its shape, its bytes; and the reader."""
    reader, content = Reader(str(path)), path.read_bytes()
    assert reader.field_names == ["image", "label"]
    assert reader.alloc_table["sample_id"].tolist() == list(range(reader.num_samples))
    assert reader.alloc_table["ptr"].tolist() == reader.metadata["f0"]["data_ptr"].tolist()
    first, last = reader.alloc_table["ptr"], reader.alloc_table["ptr"] + reader.alloc_table["size"] - 1
    assert (first // reader.page_size == last // reader.page_size).all(), "a record crosses no page"
    assert first[0] % reader.page_size == 0
    assert (first[1:] > last[:-1]).all()
    records = [
        (image["mode"] == 0, (int(image["height"]), int(image["width"])), content[ptr : ptr + size])
        for image, (_, ptr, size) in zip(reader.metadata["f0"], reader.alloc_table.tolist(), strict=True)
    ]
    return records, reader


def pixels(record):
    jpeg, shape, content = record
    if jpeg:
        return np.asarray(Image.open(io.BytesIO(content)))
    return np.frombuffer(content, dtype=np.uint8).reshape(*shape, 3)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion"])
def test_records_are_the_images_of_the_index(photos, mode):
    config = photos("format=ffcv", f"format.mode={mode}", *(["format.jpeg_share=0.5"] if mode == "proportion" else []))
    prepared, folder = convert(config)
    assert sorted(os.listdir(folder)) == ["manifest.json", "train.beton", "val.beton"]
    for split, name in (("train", "train.beton"), ("test", "val.beton")):
        index = prepared.index(split)
        path, entry = beton_file(prepared, layout_of(config), split)
        records, reader = stored(path)
        assert (path.name, len(records), path.stat().st_size) == (name, len(index), entry["bytes"])
        assert reader.metadata["f1"].tolist() == index.labels.tolist()
        assert (reader.header["version"], int(reader.header["alloc_table_ptr"])) == (2, entry["data_end"])
        assert [record[0] for record in records] == jpeg_records(len(index), layout_of(config)).tolist()
        for position, record in enumerate(records):
            expected = np.asarray(read_image(index.path(prepared.root, position)))
            assert record[1] == expected.shape[:2] == tuple(index.shapes[position])
            error = np.abs(pixels(record).astype(int) - expected).mean()
            assert error < 5 if record[0] else error == 0


def test_the_share_of_jpeg_is_counted(photos):
    layout = BetonLayout("proportion", 0.1, 90, "longest", 400)
    flags = jpeg_records(5000, layout)
    assert 400 < flags.sum() < 600
    assert jpeg_records(50, layout).tolist() == flags[:50].tolist()
    more = jpeg_records(5000, BetonLayout("proportion", 0.3, 90, "longest", 400))
    assert more[flags].all(), "a greater share adds to a smaller one"
    assert 1400 < more.sum() < 1600


def test_ffcvs_own_loader_reads_them(photos):
    """Squares with the simplest decoder; photographs of different shapes, half of them JPEG, with the central crop."""
    square, mixed = photos(*RAW, "dataset.image_size=48", "dataset.stored_size=64"), photos(*MIXED)
    prepared, squares = convert(square)
    code = """
import sys, numpy as np, torch
from ffcv.loader import Loader, OrderOption
from ffcv.fields.decoders import SimpleRGBImageDecoder, CenterCropRGBImageDecoder, IntDecoder
from ffcv.transforms import ToTensor
found = {}
for name, path, decoder in (
    ("simple", sys.argv[1], SimpleRGBImageDecoder()),
    ("centre", sys.argv[2], CenterCropRGBImageDecoder((48, 48), 224 / 256)),
):
    pipelines = {"image": [decoder, ToTensor()], "label": [IntDecoder(), ToTensor()]}
    options = {"num_workers": 1, "order": OrderOption.SEQUENTIAL, "drop_last": False}
    loader = Loader(path, batch_size=4, pipelines=pipelines, **options)
    images, labels = zip(*((images.clone(), labels.clone()) for images, labels in loader))
    found[name], found[name + "_labels"] = torch.cat(images).numpy(), torch.cat(labels).numpy()
np.savez(sys.argv[3], **found)
"""
    out = squares.parent / "read.npz"
    whole = convert(mixed)[1] / "val.beton"
    arguments = [sys.executable, "-c", code, squares / "val.beton", whole, out]
    subprocess.run(arguments, check=True, capture_output=True, cwd=ROOT)
    read, index = np.load(out), prepared.index("test")
    assert read["simple_labels"].ravel().tolist() == read["centre_labels"].ravel().tolist() == index.labels.tolist()
    for position, record in enumerate(stored(whole)[0]):
        path = index.path(prepared.root, position)
        assert (read["simple"][position] == decode_square(str(path), 64).transpose(1, 2, 0)).all()
        image, (height, width) = pixels(record), record[1]
        side = int(min(height, width) * 224 / 256)
        top, left = (height - side) // 2, (width - side) // 2
        crop = np.ascontiguousarray(image[top : top + side, left : left + side])
        error = np.abs(cv2.resize(crop, (48, 48), interpolation=cv2.INTER_AREA) - read["centre"][position].astype(int))
        assert error.mean() < 3 if record[0] else error.max() == 0


def test_sides(photos, tmp_path):
    """Longest and shortest side are limits and keep the aspect ratio; nothing is enlarged."""
    for side, pick in (("longest", max), ("shortest", min)):
        prepared, folder = convert(photos(*RAW, f"format.side={side}", "format.resolution=256"))
        for (_, shape, _), was in zip(stored(folder / "val.beton")[0], prepared.index("test").shapes, strict=True):
            assert pick(shape) == min(256, pick(was))
            assert abs(shape[0] / shape[1] - was[0] / was[1]) < 0.01
    assert stored_shape(3, 3000, BetonLayout("raw", 0, 0, "longest", 100)) == (1, 100)


def test_the_shortest_side_gives_the_view_of_the_folder_loader(photos):
    """At 256/224 of the image size."""
    prepared, folder = convert(photos(*RAW, "format.side=shortest", "format.resolution=128", "dataset.image_size=112"))
    for position, record in enumerate(stored(folder / "val.beton")[0]):
        image = read_image(prepared.index("test").path(prepared.root, position))
        ours, theirs = (image_view(each, 112, None, None) for each in (Image.fromarray(pixels(record)), image))
        assert (ours == theirs).all()


def test_unusual_images_become_rgb(own, tree, photographs):
    with zipfile.ZipFile(photographs) as archive:
        photo = Image.open(io.BytesIO(archive.read(archive.namelist()[0])))
    folder = tree / "train" / "ant"
    photo.convert("L").save(folder / "grey.jpg")
    photo.convert("CMYK").save(folder / "print.jpg")
    photo.save(folder / "png.jpg", format="PNG")
    photo.convert("P").save(folder / "palette.png")
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    prepared, beton = convert(own(tree, *RAW, "format.resolution=400"))
    index, seen = prepared.index("train"), 0
    for position, record in enumerate(stored(beton / "train.beton")[0]):
        assert (pixels(record) == np.asarray(read_image(index.path(prepared.root, position)))).all()
        seen += record[1] == photo.size[::-1]
    assert seen == 5


def test_a_jpeg_larger_than_its_pixels_gives_way(own, tree):
    _, folder = convert(own(tree, *RAW, "format.mode=jpg"))
    assert not any(jpeg for jpeg, _, _ in stored(folder / "train.beton")[0]), "8x8 scans"


def test_a_comment_of_the_source_is_not_stored(tmp_path):
    image = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 200, 3)))
    image.save(tmp_path / "x.jpg", comment=b"a long story", dpi=(72, 72))
    source = _records.Source(str(tmp_path / "x.jpg"), hash_file(str(tmp_path / "x.jpg")).checksum, True)
    record = _records.encode(source, BetonLayout("jpg", 1, 90, "longest", 100))
    assert record.jpeg
    assert b"story" not in record.content


def test_the_same_bytes_whoever_makes_them(photos, monkeypatch, tmp_path):
    expected = bytes_of(convert(photos(*MIXED))[1])
    for name, workers in (("again", 2), ("one", 1), ("none", 0)):
        monkeypatch.setattr(_plan, "processors", lambda workers=workers: workers)
        assert bytes_of(convert(photos(*MIXED, f"data_root={tmp_path / name}"))[1]) == expected


def test_what_is_complete_is_left_alone(photos, monkeypatch):
    prepared, folder = convert(photos(*MIXED))
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir(), *prepared.folder.iterdir()]}
    monkeypatch.setattr(BetonWriter, "add", None)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    prepare(photos(*MIXED))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert verify(prepared.folder) == 27, "FFCV is not needed to see what is there"


def test_a_set_without_test_images(own, scans, tmp_path):
    _, folder = convert(own(scans(tmp_path / "alone", {"train": 4}), *RAW))
    assert sorted(os.listdir(folder)) == ["manifest.json", "train.beton"]


def test_layouts_lie_beside_each_other(own, tree):
    first = convert(own(tree, *RAW))[1]
    second = convert(own(tree, *RAW, "format.resolution=100", "dataset.image_size=96"))[1]
    assert first != second
    assert first.is_dir()


def killed(config, records, replaces):
    """In a child process: prepare, and die by SIGKILL at a record, or before a change of name."""

    def run():
        def add(self, record, whole=BetonWriter.add):
            records[0] -= 1
            whole(self, record)
            if records[0] == 0:
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        def replace(old, new, whole=os.replace):
            replaces[0] -= 1
            if replaces[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            whole(old, new)

        BetonWriter.add, os.replace = add, replace
        prepare(config)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("records", "replaces", "left"),
    [
        (3, 0, []),
        (18, 0, []),
        (22, 0, ["manifest.json", "train.beton"]),
        (0, 1, []),
        (0, 2, ["train.beton"]),
        (0, 4, ["manifest.json", "train.beton", "val.beton"]),
    ],
)
def test_killed_at_any_moment(photos, tmp_path, records, replaces, left):
    prepare(photos())
    config = photos(*MIXED)
    expected = bytes_of(convert(photos(*MIXED, f"data_root={tmp_path / 'whole'}"))[1])
    killed(config, [records], [replaces])
    folder = layout_of(config).folder(prepare(photos()))
    assert sorted(name for name in os.listdir(folder) if name[0] != ".") == left
    assert [name for name in os.listdir(folder) if name.startswith(".")], "what was begun"
    assert not written(config), "guard launch has a job write the rest"
    kept = "manifest.json" in left and (folder / "train.beton").stat().st_mtime_ns
    assert bytes_of(convert(config)[1]) == expected
    assert written(config)
    assert not kept or (folder / "train.beton").stat().st_mtime_ns == kept


def test_other_images_are_refused(photos, own, tree, tmp_path):
    _, folder = convert(own(tree, *RAW))
    shutil.move(folder, tmp_path / "old")
    shutil.rmtree(folder.parent)
    shutil.copy(next((tree / "train" / "ant").iterdir()), tree / "train" / "ant" / "more.png")
    prepared = prepare(own(tree))
    shutil.move(tmp_path / "old", folder)
    with pytest.raises(DataError, match=rf"^{folder} was written from other images than .*; remove {folder} and run"):
        prepare(own(tree, *RAW))
    with pytest.raises(DataError, match="other images"):
        verify(prepared.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: os.truncate(f, f.stat().st_size - 5), r"train\.beton has .* bytes and was written with .*truncated"),
        (lambda f: f.unlink(), r"train\.beton does not exist"),
        (lambda f: flip(f, 2000), r"index of .*train\.beton is damaged"),
    ],
)
def test_a_damaged_file_is_refused(own, tree, change, message):
    prepared, folder = convert(own(tree, *RAW))
    change(folder / "train.beton")
    for again in (lambda: prepare(own(tree, *RAW)), lambda: verify(prepared.folder)):
        with pytest.raises(DataError, match=message + rf".*; remove {folder} and run guard prepare"):
            again()


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_verify_finds_a_flipped_byte(own, tree, capsys):
    prepared, folder = convert(own(tree, *RAW))
    assert main(["verify", str(prepared.folder)]) == 0
    flip(folder / "val.beton", beton_file(prepared, layout_of(own(tree, *RAW)), "test")[1]["data_start"] + 100)
    capsys.readouterr()
    assert main(["verify", str(prepared.folder)]) == 1
    assert f"data_prep: The images of {folder / 'val.beton'} have changed; remove" in capsys.readouterr().err
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "layout": {"mode": "raw"}}))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        verify(prepared.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:100]), "cannot be decoded"),
        (lambda f: f.unlink(), "does not exist"),
        (lambda f: Image.fromarray(np.asarray(Image.open(f)) ^ 1).save(f), "has changed since it was prepared"),
    ],
)
def test_a_damaged_image_is_named(own, tree, change, message):
    prepared = prepare(own(tree))
    victim = sorted((tree / "test" / "bee").iterdir())[1]
    change(victim)
    with pytest.raises(DataError, match=rf"^The image {victim} {message}"):
        prepare(own("", *RAW))
    folder = layout_of(own("", *RAW)).folder(prepared)
    assert sorted(os.listdir(folder)) == ["manifest.json", "train.beton"], "what is whole is kept"


def test_nothing_is_left_of_a_first_file_that_failed(own, tree):
    prepared = prepare(own(tree))
    next((tree / "train" / "bee").iterdir()).unlink()
    with pytest.raises(DataError, match="does not exist"):
        prepare(own("", *RAW))
    assert not list(prepared.folder.glob("ffcv-*"))


def die(source, layout):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told(photos, monkeypatch):
    """FFCV's own writer would wait for ever."""
    prepared = prepare(photos())
    monkeypatch.setattr(_plan, "encode", die)
    monkeypatch.setattr(_plan, "processors", lambda: 2)
    with pytest.raises(DataError, match="worker process that reads images was killed"):
        prepare(photos(*MIXED))
    assert not list(prepared.folder.glob("ffcv-*"))


def test_the_missing_package_is_named(own, tree, tmp_path):
    prepare(own(tree))
    options = ["dataset.name=own", "dataset.num_classes=3", f"data_root={tmp_path / 'data'}", *RAW]
    code = "import sys; sys.modules['ffcv'] = None; from data_prep.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "prepare", *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("data_prep: FFCV could not be imported")
    assert "apt-get install libopencv-dev" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "data" / "own").glob("ffcv-*"))


def test_pages():
    def shapes(*shape):
        return np.array([[8, 8], shape])

    assert page_size_for(shapes(8, 8)) == 1 << 21
    assert page_size_for(shapes(400, 400)) == 1 << 22
    assert page_size_for(shapes(9000, 9000)) == 1 << 31
    for shape in ((9500, 9500), (2, 66000)):
        with pytest.raises(ConfigError, match=rf"{shape[1]} x {shape[0]} pixels is too large .*format\.resolution"):
            page_size_for(shapes(*shape))


def test_many_pages(photos, monkeypatch):
    """Records are aligned on pages that only a few of them fit into."""
    monkeypatch.setattr(_beton_writer, "RECORDS_PER_PAGE", 1)
    monkeypatch.setattr(_beton_writer, "SMALLEST_PAGE", 1 << 10)
    _, folder = convert(photos(*RAW, "format.resolution=100", "dataset.image_size=96"))
    _, reader = stored(folder / "train.beton")
    assert reader.page_size == 1 << 15
    assert len(set(reader.alloc_table["ptr"] // reader.page_size)) == 18


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)  # An index may still be mapped into memory.


@pytest.fixture
def many(photographs, tmp_path):
    """The folder of the photographs."""
    with zipfile.ZipFile(photographs) as archive:
        archive.extractall(tmp_path / "many")
    return tmp_path / "many"


@pytest.mark.parametrize("told", ["before", "while writing", "while writing the manifest"])
def test_a_full_disk_is_told(own, many, small_disk, monkeypatch, told):
    """A quota is not seen beforehand: the disk then looks large."""
    config = own(many, *RAW, "format.resolution=400")
    prepared, ballast = prepare(own(many)), small_disk / "ballast"
    message = r"could not be written \(No space left on device\); make room there, or choose"
    if told == "before":
        message = (
            r"^The \.beton files need at least 0\.0\d+ GiB, and 0\.00\d+ GiB are free in .*; make room there, choose"
        )
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk)
    if told == "while writing the manifest":
        subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)

        def fill_and_write(path, content, whole=ffcv.write_json):
            with contextlib.suppress(OSError):
                ballast.write_bytes(bytes(20 << 20))
            whole(path, content)

        monkeypatch.setattr(ffcv, "write_json", fill_and_write)
    with pytest.raises(DataError, match=message) as caught:
        prepare(config)
    assert told != "while writing" or "train.beton could not" in str(caught.value)
    left = [path.name for path in prepared.folder.glob("ffcv-*/*")]
    assert left == (["train.beton"] if "manifest" in told else []), "unknown to the manifest, so it is made again"
    monkeypatch.undo()
    ballast.unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    convert(config)
    assert verify(prepared.folder) == 27


class Disk:
    free = 1 << 40


def test_a_disk_that_cannot_be_written(own, many, small_disk):
    config = own(many, *RAW, "format.resolution=400")
    prepared = prepare(own(many))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(DataError, match=r"ffcv-raw.* could not be written \(Read-only file system\); .*data_root"):
        ffcv.write(config, prepared)
