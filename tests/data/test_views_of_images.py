"""The pixels: decoding, and agreement with torchvision's transforms on the same files."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as V
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from distill.data.augment import Augment, batch_view, image_view, memory_base
from distill.data.crops import UNIFORMS, flips, padded_boxes, resized_boxes
from distill.data.decode import decode_square, read_image
from distill.errors import DataError
from distill.randomness import uniforms


def pixels(image):
    return np.asarray(image).transpose(2, 0, 1)


def test_evaluation_is_resize_and_centre_crop(photographs):
    for path, size in ((photographs.samples("test").path(0), 96), (photographs.samples("test").path(7), 224)):
        image = Image.open(path).convert("RGB").crop((0, 0, 201, 170))
        expected = V.center_crop(V.resize(image, round(size * 256 / 224)), [size, size])
        np.testing.assert_array_equal(image_view(image, size, None, None), pixels(expected))


def test_training_is_resized_crop_and_flip(photographs):
    image = read_image(photographs.samples("train").path(0)).crop((0, 0, 224, 150))
    numbers = uniforms(0, "augment", 0, range(20), UNIFORMS)
    for row in numbers:
        top, left, height, width = resized_boxes(row[None], 150, 224)[0].tolist()
        expected = V.resized_crop(image, top, left, height, width, [64, 64], antialias=True)
        expected = V.hflip(expected) if flips(row[None])[0] else expected
        np.testing.assert_array_equal(image_view(image, 64, Augment(), row[None]), pixels(expected))
    assert 0 < flips(numbers).sum() < 20


def test_the_crop_law_is_that_of_torchvision():
    torch.manual_seed(0)
    count, image = 4000, torch.empty(3, 150, 224)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    ours = resized_boxes(uniforms(0, "augment", 0, range(count), UNIFORMS), 150, 224)

    def statistics(boxes):
        top, left, height, width = boxes.astype(float).T
        area, aspect = height * width / (150 * 224), np.log(width / height)
        place = np.stack([top / np.maximum(150 - height, 1), left / np.maximum(224 - width, 1)])
        values = np.stack([area, aspect, area**2, aspect**2, area * aspect, *place, *place**2])
        return values.mean(1), values.std(1) / np.sqrt(count)

    (mean, error), (other_mean, other_error) = statistics(ours), statistics(theirs)
    assert np.all(np.abs(mean - other_mean) < 4 * np.hypot(error, other_error))


def test_stored_digits_are_upsampled_bilinearly(digits):
    path = digits.samples("train").path(0)
    small = torch.from_numpy(np.asarray(Image.open(path)).copy()).float()[None, None]
    expected = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")[0, 0]
    square = torch.from_numpy(decode_square(str(path), 32)).float()
    assert square.shape == (3, 32, 32)
    assert (square - expected).abs().max() <= 1


def test_a_batch_from_memory_has_the_views_of_its_images(photographs):
    """Where boxes are enlarged, antialiasing changes nothing, and both ways of augmenting are the same crop."""
    squares = torch.stack([torch.from_numpy(decode_square(str(p), 64)) for p in photographs.samples("train").paths])
    numbers = uniforms(0, "augment", 0, range(len(squares)), UNIFORMS)
    views = batch_view(squares, 64, Augment(), numbers)
    for square, row, view in zip(squares, numbers, views, strict=True):
        image = Image.fromarray(square.permute(1, 2, 0).numpy())
        alone = torch.from_numpy(image_view(image, 64, Augment(), row[None]).copy())
        assert (view.int() - alone.int()).abs().max() <= 2


def test_padded_crops_move_pixels_exactly(digits):
    squares = torch.stack([torch.from_numpy(decode_square(str(p), 32)) for p in digits.samples("train").paths[:40]])
    numbers = uniforms(0, "augment", 0, range(40), UNIFORMS)
    views = batch_view(squares, 32, Augment(crop="padded", padding=4, flip=True), numbers)
    padded = torch.nn.functional.pad(squares, (4, 4, 4, 4))
    corners = padded_boxes(numbers, 32, 4)[:, :2] + 4
    for view, whole, (top, left), flip in zip(views, padded, corners, flips(numbers), strict=True):
        expected = whole[:, top : top + 32, left : left + 32]
        assert torch.equal(view, expected.flip(2) if flip else expected)
    assert {0, 8} <= set(corners.flatten().tolist())


def test_without_a_crop_the_stored_images_are_only_flipped(digits):
    squares = torch.stack([torch.from_numpy(decode_square(str(p), 32)) for p in digits.samples("train").paths[:20]])
    numbers = uniforms(0, "augment", 0, range(20), UNIFORMS)
    views = batch_view(squares, 32, Augment(crop="none"), numbers)
    flip = torch.from_numpy(flips(numbers))
    assert torch.equal(views[flip], squares[flip].flip(3))
    assert torch.equal(views[~flip], squares[~flip])
    assert torch.equal(batch_view(squares, 32, Augment(crop="none", flip=False), numbers), squares)


def test_larger_stored_squares_are_cut_as_in_evaluation(photographs):
    path = str(photographs.samples("test").path(0))
    squares = torch.from_numpy(decode_square(path, 224))[None]
    assert torch.equal(memory_base(squares, 224, None), squares)
    assert torch.equal(memory_base(squares, 200, None), squares[:, :, 12:212, 12:212])
    base = memory_base(squares, 64, None)[0]
    alone = torch.from_numpy(image_view(read_image(path), 64, None, None).copy())
    assert (base.int() - alone.int()).abs().max() <= 2
    assert torch.equal(memory_base(squares, 64, Augment()), squares)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "YCbCr"])
def test_every_mode_becomes_rgb(digits, tmp_path, mode):
    scan = Image.open(digits.samples("train").path(0))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(scan).astype(np.uint16) * 257)
    else:
        options = {"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}
        image = scan.convert("RGB").convert(mode, **options)
    path = tmp_path / ("scan.tif" if mode in ("CMYK", "YCbCr") else "scan.png")
    image.save(path)
    decoded = read_image(path)
    assert decoded.mode == "RGB"
    if mode != "1":
        difference = np.asarray(decoded).astype(int) - np.asarray(scan).astype(int)[:, :, None]
        assert np.abs(difference).max() <= 2


def test_unreadable_files_are_named(digits, photographs, tmp_path):
    png, jpeg = digits.samples("train").path(0).read_bytes(), photographs.samples("train").path(0).read_bytes()
    for name, content in (
        ("short.png", png[:-30]),
        ("short.jpg", jpeg[: len(jpeg) // 2]),
        ("empty.jpg", b""),
        ("text.jpg", b"this is no image"),
        ("broken.png", png[:20] + b"\xff" * 8 + png[28:]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"The image .*{name} (cannot be decoded|is in no image format)"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.jpg does not exist"):
        read_image(tmp_path / "gone.jpg")
