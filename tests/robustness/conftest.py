"""A tiny network, trained for seconds on real digits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distill.data.batch import Batch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a network is slower on several threads, much slower where others use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 scans: uint8 (N, 3, 16, 16), each pixel repeated; labels int64 (N,)."""
    scans, labels = load_digits(return_X_y=True)
    images = torch.tensor(scans * 255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1).contiguous(), torch.tensor(
        labels
    )


@pytest.fixture(scope="session")
def network(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """Trained on the first 1,297 digits; takes images in [0, 1]."""
    images, labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 10),
        )
        optimizer = torch.optim.AdamW(layers.parameters(), lr=3e-3)
        for _ in range(4):
            for chosen in torch.randperm(1297).split(64):
                loss = F.cross_entropy(layers(images[chosen] / 255), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return layers


@pytest.fixture(scope="session")
def batch(digits: tuple[Tensor, Tensor]) -> Batch:
    """120 test digits; their indices are their positions in the whole set."""
    images, labels = digits
    return Batch(images[1297:1417], labels[1297:1417], torch.arange(1297, 1417))
