"""Random numbers of an attack that belong to an image, not to the batch that it happens to be in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distill.randomness import seed_for

FILLED: dict[Any, str] = {
    torch.Tensor.uniform_: "uniform_",
    torch.Tensor.normal_: "normal_",
    torch.Tensor.bernoulli_: "bernoulli_",
    torch.Tensor.random_: "random_",
}
"""Methods that fill a tensor."""
ALIKE: dict[Any, Any] = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
"""Functions that make a tensor like another, and those that take a shape."""


class PerImage(TorchFunctionMode):
    """While it is on, random tensors with a row for each image are drawn image by image, each from its own numbers.

    An attack of torchattacks draws one tensor for its whole batch, so that what an image gets depends on its place
    there. Here a row is a function of (seed, purpose, index of the image, number of the draw). A tensor of images of
    which only some are left has the same row for all, and anything else (a window's position, a coin) is drawn once
    for the attack: both from (seed, purpose, number of the draw).

    Args:
        indices: of the images, one for each row; rows beyond them are left zero.
        rows: rows of a whole batch, at least 2, so that a single number is not taken for a row.
    """

    def __init__(self, seed: int, purpose: str, indices: Sequence[int], rows: int):
        super().__init__()
        self.seed, self.purpose, self.indices, self.rows, self.draws = seed, purpose, indices, rows, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in FILLED:
            target, rest = args[0], args[1:]

            def fill(row: Tensor, generator: torch.Generator) -> Tensor:
                filled: Tensor = getattr(row, FILLED[func])(*rest, **kwargs, generator=generator)
                return filled

            with torch.no_grad():
                target.copy_(self._drawn(target.shape, target.dtype, fill))
            return target
        if func in ALIKE:
            like = args[0]
            made = self._made(ALIKE[func], like.shape, kwargs.pop("dtype", None) or like.dtype, ())
            return made.to(kwargs.pop("device", None) or like.device)
        if func in (torch.rand, torch.randn):
            shape = args[0] if args and isinstance(args[0], list | tuple) else args or kwargs.pop("size")
            return self._placed(self._made(func, shape, kwargs.pop("dtype", None), ()), kwargs)
        if func is torch.randint:
            *limits, shape = args if "size" not in kwargs else (*args, kwargs.pop("size"))
            bounds = tuple(limits) + tuple(kwargs.pop(name) for name in ("low", "high") if name in kwargs)
            return self._placed(self._made(func, shape, kwargs.pop("dtype", None), bounds), kwargs)
        return func(*args, **kwargs)

    def _made(self, func: Any, shape: Sequence[int], dtype: torch.dtype | None, limits: tuple[int, ...]) -> Tensor:
        def make(row: Tensor, generator: torch.Generator) -> Tensor:
            made: Tensor = func(*limits, tuple(row.shape), dtype=row.dtype, generator=generator)
            return made

        kind = dtype or (torch.int64 if func is torch.randint else torch.get_default_dtype())
        return self._drawn(shape, kind, make)

    @staticmethod
    def _placed(made: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return made.to(kwargs["device"]) if kwargs.get("device") is not None else made

    def _drawn(
        self, shape: Sequence[int], dtype: torch.dtype, draw: Callable[[Tensor, torch.Generator], Tensor]
    ) -> Tensor:
        """On the CPU, whatever the device: the same numbers everywhere."""
        number, shape = self.draws, tuple(int(side) for side in shape)
        self.draws += 1
        if shape and shape[0] == self.rows:
            whole = torch.zeros(shape, dtype=dtype)
            for row, index in zip(whole, self.indices, strict=False):
                row.copy_(draw(torch.empty(shape[1:], dtype=dtype), self._generator(number, index)))
            return whole
        if len(shape) == 4:
            one = draw(torch.empty(shape[1:], dtype=dtype), self._generator(number))
            return one.expand(shape).clone()
        return draw(torch.empty(shape, dtype=dtype), self._generator(number))

    def _generator(self, number: int, *index: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_for(self.seed, f"{self.purpose}:draw{number}", *index))
