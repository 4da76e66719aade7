"""Views: pure functions of (seed, epoch, image index), with the laws of SRe²L's augmentation."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from distill.config import RelabelConfig
from distill.data import Views


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.from_numpy(data.images[:60] * 255 / 16).to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1).repeat_interleave(4, -1).repeat_interleave(4, -2).contiguous()
    return images, torch.from_numpy(data.target[:60].astype(np.int64))


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_a_view_depends_on_its_own_index_alone(digits, mix, crop):
    views = Views(*digits, RelabelConfig(mix=mix, crop=crop), seed=3)
    whole = views.batch(2, range(60))
    mixed = views.batch(2, [41, 7, 12])
    for name in ("images", "share", "partners", "labels", "partner_labels"):
        assert torch.equal(getattr(mixed, name), getattr(whole, name)[[41, 7, 12]]), name
    again = Views(*digits, RelabelConfig(mix=mix, crop=crop), seed=3).batch(2, range(60))
    assert torch.equal(again.images, whole.images)
    if crop != "none" or mix != "none":
        assert not torch.equal(views.batch(1, range(60)).images, whole.images)
    assert whole.images.dtype == torch.float32
    assert 0 <= whole.images.min() <= whole.images.max() <= 1 + 1e-6


def test_without_augmentation_a_view_is_the_image(digits):
    images, labels = digits
    views = Views(images, labels, RelabelConfig(mix="none", crop="none", flip=False), seed=0)
    torch.testing.assert_close(views.batch(5, range(60)).images, images / 255, rtol=0, atol=1e-6)


def test_cutmix_pastes_a_box_of_the_partners_view(digits):
    images, labels = digits
    plain = RelabelConfig(mix="none", crop="none", flip=False)
    own = Views(images, labels, plain, 0).batch(0, range(60))
    batch = Views(images, labels, RelabelConfig(mix="cutmix", crop="none", flip=False), 0).batch(0, range(60))
    other = own.images[batch.partners]
    from_own = torch.isclose(batch.images, own.images, atol=1e-6).all(1)
    from_other = torch.isclose(batch.images, other, atol=1e-6).all(1)
    assert (from_own | from_other).all()
    # Where the two differ, the part that is the partner's is what the share says.
    differ = ~torch.isclose(own.images, other, atol=1e-6).all(1)
    pasted = (differ & ~from_own).float().mean((1, 2))
    assert (pasted <= 1 - batch.share + 1e-6).all()
    assert sorted(batch.partners.tolist()) == list(range(60))
    assert torch.equal(batch.partner_labels, labels[batch.partners])


def test_mixing_shares_follow_the_beta_law(digits):
    """Mixup λ ~ Beta(α, α): mean ½ and variance 1 / (4 (2α + 1)), over many epochs."""
    for alpha in (1.0, 0.8):
        views = Views(*digits, RelabelConfig(mix="mixup", mix_alpha=alpha, crop="none"), seed=0)
        shares = torch.cat([views.batch(epoch, range(60)).share for epoch in range(40)]).double()
        deviation = 1 / (4 * (2 * alpha + 1))
        assert abs(shares.mean() - 0.5) < 5 * (deviation / len(shares)) ** 0.5
        assert abs(shares.var() - deviation) < 0.01
