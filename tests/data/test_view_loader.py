"""A student's batches of views: which images, how many at a time, from any position on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.config import RelabelConfig
from distill.data import Views
from distill.data.view_loader import ViewLoader
from distill.randomness import permutation


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(10, 3, [3, 3, 4]), (11, 3, [3, 3, 3, 2]), (10, 5, [5, 5]), (10, 9, [10]), (10, 100, [10]), (3, 1, [1, 1, 1])],
)
def test_a_single_image_that_is_left_over_joins_the_batch_before(count: int, batch_size: int, sizes: list[int]) -> None:
    config = RelabelConfig()
    views = Views(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), config, seed=5)
    answered: list[int] = []

    def teacher(images: Tensor) -> Tensor:
        answered.append(len(images))
        return torch.zeros(len(images), 10)

    loader = ViewLoader(views, batch_size, seed=1, teacher=teacher)
    batches = [batch.indices.tolist() for batch in loader]
    assert [len(batch) for batch in batches] == answered == sizes
    assert len(loader) == len(sizes)
    assert loader.largest_batch == max(sizes)
    assert [index for batch in batches for index in batch] == permutation(1, "order:student", 0, count).tolist()
    assert loader.state_dict() == {"epoch": 0, "position": len(sizes)}
    for position in range(len(sizes) + 1):
        loader.load_state_dict({"epoch": 0, "position": position})
        assert [batch.indices.tolist() for batch in loader] == batches[position:]
