"""Whether a layer is what its class says, so that something else can compute in its place."""

from __future__ import annotations

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def unaltered(layer: nn.Module) -> bool:
    """Whether a layer does what its class says and nothing more: no hooks, and no ``forward`` of its own."""
    return "forward" not in vars(layer) and not any(getattr(layer, name) for name in HOOKS)
