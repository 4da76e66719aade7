"""Exports hold the images that were exported, as the programs read them that they are for."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from distill import cli, command_line
from distill.data import DistilledSet
from distill.errors import ArtifactError, ConfigError, MissingPackageError
from distill.exchange import FORMATS
from distill.exchange.exports import QUALITY
from distill.exchange.folder import file_names
from distill.exchange.parquet import unique_names
from distill.exchange.torch_file import normalised, pixels
from tests.exchange.moving import write
from tests.running import environment


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def by_class(distilled: DistilledSet) -> tuple[Tensor, Tensor]:
    order = distilled.labels.argsort(stable=True)
    return distilled.images[order], distilled.labels[order]


def test_a_folder_of_png_files_is_an_image_folder(exported: Path, distilled: DistilledSet) -> None:
    names = sorted(str(path.relative_to(exported)) for path in exported.rglob("*.*"))
    assert names[:2] == ["new000/class000_id000.png", "new000/class000_id001.png"]
    read = ImageFolder(exported)
    images, labels = by_class(distilled)
    assert read.targets == labels.tolist()
    assert torch.equal(torch.stack([tensor(image) for image, _ in read]), images)


def test_the_error_of_jpeg_is_small_and_known(run: Path, distilled: DistilledSet, tmp_path: Path) -> None:
    images, labels = by_class(distilled)
    errors = {}
    for quality in (75, 95):
        read = ImageFolder(write(run, "folder", tmp_path / str(quality), quality=quality))
        assert read.targets == labels.tolist()
        decoded = torch.stack([tensor(image) for image, _ in read])
        errors[quality] = (decoded.float() - images.float()).abs().mean().item()
    print("mean absolute error of JPEG in grey levels:", {q: round(error, 2) for q, error in errors.items()})
    assert 0 < errors[95] < 4 < errors[75]
    half_chroma = []
    for image in images:
        file, array = io.BytesIO(), image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(file, "JPEG", quality=95)
        half_chroma.append((tensor(Image.open(file)).float() - image.float()).abs().mean())
    print("with half the colour resolution, as is usual:", round(float(torch.stack(half_chroma).mean()), 2))
    assert torch.stack(half_chroma).mean() > 2 * errors[95]


def test_names_sort_by_class_and_position() -> None:
    labels = torch.arange(1500).repeat(2)
    names = file_names(labels, 1500, "png")
    assert names[3] == ("new0003", "class0003_id0000.png")
    assert sorted({folder for folder, _ in names}) == [folder for folder, _ in names[:1500]]
    assert file_names(torch.tensor([7, 7]), 10, "jpeg")[1] == ("new007", "class007_id001.jpg")


@pytest.mark.parametrize("images", ["float32", "uint8"])
def test_a_torch_file_has_images_and_labels(run: Path, distilled: DistilledSet, tmp_path: Path, images: str) -> None:
    content = torch.load(write(run, "pt", tmp_path / "set.pt", images=images), weights_only=True)
    assert torch.equal(content["labels"], distilled.labels)
    assert str(content["images"].dtype) == f"torch.{images}"
    assert content["class_names"] == distilled.class_names
    if images == "float32":
        mean, std = (torch.tensor(content[name]).view(3, 1, 1) for name in ("mean", "std"))
        restored = ((content["images"] * std + mean) * 255).round()
        assert torch.equal(restored, distilled.images.float())
    else:
        assert torch.equal(content["images"], distilled.images)


def test_every_pixel_value_survives_normalisation() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mean = torch.rand(3, generator=generator).tolist()
        std = (0.01 + torch.rand(3, generator=generator)).tolist()
        restored, clamped = pixels(normalised(values, mean, std), mean, std)
        assert torch.equal(restored, values)
        assert clamped == 0


@pytest.mark.parametrize("images", ["raw", "jpeg"])
def test_ffcv_reads_a_beton_file(run: Path, distilled: DistilledSet, tmp_path: Path, images: str) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    from distill.data.ffcv_loader import library

    ffcv = library()
    file = write(run, "beton", tmp_path / "set.beton", images=images)
    reader = ffcv.Reader(str(file))
    field, labels = (reader.metadata[name] for name in reader.metadata.dtype.names)
    assert labels.tolist() == distilled.labels.tolist()
    content = np.fromfile(file, dtype=np.uint8)
    sizes = dict(zip(reader.alloc_table["sample_id"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    for number, (record, image) in enumerate(zip(field, distilled.images, strict=True)):
        stored = content[int(record["data_ptr"]) : int(record["data_ptr"]) + sizes[number]]
        expected = image.permute(1, 2, 0).contiguous().numpy()
        if images == "raw":
            assert np.array_equal(stored.reshape(record["height"], record["width"], 3), expected)
        else:
            decoded = np.empty_like(expected)
            assert ffcv.imdecode(stored, decoded, 32, 32, 32, 32) == 0
            assert abs(decoded.astype(float) - expected).mean() < 4


@pytest.mark.slow
def test_ffcv_s_own_loader_gives_the_same_pixels(run: Path, distilled: DistilledSet, tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    file = write(run, "beton", tmp_path / "set.beton")
    code = """
import sys, numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
loader = Loader(sys.argv[1], batch_size=30, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
for images, labels in loader:
    np.savez(sys.argv[2], images=images, labels=labels.ravel())
"""
    out = tmp_path / "read.npz"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(out)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
    )
    assert out.is_file(), done.stderr
    read = np.load(out)
    assert np.array_equal(read["images"].transpose(0, 3, 1, 2), distilled.images.numpy())
    assert read["labels"].tolist() == distilled.labels.tolist()


@pytest.mark.parametrize("images", ["png", "jpeg"])
def test_hugging_face_reads_parquet(run: Path, distilled: DistilledSet, tmp_path: Path, images: str) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    folder = write(run, "parquet", tmp_path / "set", images=images)
    # With the card and without: the features stand in both.
    for name in ("card", "bare"):
        if name == "bare":
            (folder / "README.md").unlink()
        read = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / name))
        assert read.features == datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=distilled.class_names)}
        )
        assert list(read["label"]) == distilled.labels.tolist()
        assert read.features["label"].int2str(3) == distilled.class_names[3]
        decoded = torch.stack([tensor(image) for image in read["image"]])
        if images == "png":
            assert torch.equal(decoded, distilled.images)
        else:
            assert 0 < (decoded.float() - distilled.images.float()).abs().mean() < 4


def test_the_card_says_what_the_set_is(run: Path, distilled: DistilledSet, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    text = (write(run, "parquet", tmp_path / "set") / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    information = yaml.safe_load(head)
    assert information["task_categories"] == ["image-classification"]
    assert information["dataset_info"]["splits"][0]["num_examples"] == len(distilled)
    fingerprint = json.loads((run / "distilled/manifest.json").read_text())["fingerprint"]
    for words in ("digits", "sre2l", "resnet10", "| images per class | 3 |", "32 x 32", fingerprint, "torch "):
        assert words in body
    assert str(run.parent) not in text, "a card is published: no paths of this machine"


def test_equal_class_names_are_told_apart() -> None:
    assert unique_names(["crane", "tench", "crane"]) == ["crane (0)", "tench", "crane (2)"]


def test_the_command_knows_the_formats() -> None:
    assert {name: form.images for name, form in FORMATS.items()} == {
        name: f for name, (f, _) in command_line.EXPORTS.items()
    }
    assert command_line.EXPORT_QUALITY == QUALITY


def test_the_command_exports_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), "--format", "pt"]) == 0
    assert capsys.readouterr().out == f"{run / 'export/distilled.pt'}: 30 images (float32).\n"
    assert cli.main(["export", str(run), "--format", "pt"]) == 0
    assert "there already" in capsys.readouterr().out
    assert cli.main(["export", str(run), "--format", "pt", "--images", "uint8"]) == 1
    assert "distilled.pt exists and is another thing; remove it, or choose" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "options", "words"),
    [
        ("folder", {"images": "raw"}, "--images raw does not go with --format folder; choose jpeg or png."),
        ("pt", {"quality": 90}, "--quality is for JPEG, and --format pt stores float32 here; leave it out."),
        ("parquet", {"quality": 90}, "--quality is for JPEG, and --format parquet stores png here; add --images jpeg."),
        ("folder", {"quality": 0}, "--quality 0 must be from 1 to 100."),
    ],
)
def test_options_that_do_nothing_are_refused(run: Path, tmp_path: Path, form: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        write(run, form, tmp_path / "x", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_whole_is_not_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        write(tmp_path / "nowhere", "folder", tmp_path / "x")
    shutil.copytree(run / "distilled", tmp_path / "run/distilled")
    (tmp_path / "run/config.yaml").write_text("seed: [")
    with pytest.raises(ArtifactError, match=r"config\.yaml is damaged"):
        write(tmp_path / "run", "folder", tmp_path / "x")
    (tmp_path / "run/config.yaml").unlink()
    shard = tmp_path / "run/distilled/unit_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        ArtifactError, match=r"unit_00001\.safetensors has changed since it was written; remove .* recover"
    ):
        write(tmp_path / "run", "folder", tmp_path / "x")
    (tmp_path / "run/distilled/manifest.json").unlink()
    with pytest.raises(ArtifactError, match="holds no complete distilled"):
        write(tmp_path / "run", "folder", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_pyarrow_is_asked_for(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=re.escape("pip install 'guard-distill[export]'")):
        write(run, "parquet", tmp_path / "x")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("form", list(FORMATS))
def test_a_full_disk_is_one_sentence(
    run: Path, small_disk: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "beton":
        pytest.importorskip("ffcv", reason="FFCV is not installed")
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    target = small_disk / "set"
    assert cli.main(["export", str(run), "--format", form, "--to", str(target)]) == 1
    told = capsys.readouterr().err
    assert told == f"guard: No space is left on the device at {target}; free some and run the same command again.\n"
    assert list(small_disk.iterdir()) == []
