"""The official order of the 1,000 ImageNet-1K classes: WordNet id → (index, name)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def imagenet_classes() -> dict[str, tuple[int, str]]:
    """WordNet id → (index in 0..999, English name), in index order.

    Source: the synsets of ILSVRC 2012; the names are those of torchvision's weights. ``imagenet1k.txt`` holds one
    line ``id<TAB>name`` for each class.
    """
    text = Path(__file__).with_name("imagenet1k.txt").read_text(encoding="utf-8")
    lines = (line.split("\t") for line in text.splitlines())
    return {wordnet_id: (index, name) for index, (wordnet_id, name) in enumerate(lines)}
