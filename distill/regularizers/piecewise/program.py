"""A network as a list of pieces, with each batch norm folded into the convolution before it."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.models.unaltered import unaltered
from distill.regularizers.piecewise.kernels import Convolution, Linear, WeightedPiece
from distill.regularizers.piecewise.pieces import AveragePool, Flatten, MaxPool, Piece, Rectifier, Sum


class UnknownPieceError(Exception):
    """The network holds something that is not a known piece."""


@dataclass
class Layer:
    """A convolution or linear layer, and the batch norm that follows it."""

    module: nn.Conv2d | nn.Linear
    piece: WeightedPiece
    norm: _BatchNorm | None = None

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, a factor of each of its rows, and bias: what is left when the running statistics are folded in."""
        weight: Tensor = self.module.weight
        bias: Tensor | None = self.module.bias
        norm = self.norm
        if norm is None:
            return weight, None, bias
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.affine:
            scale = norm.weight * scale
        shift = (-norm.running_mean if bias is None else bias - norm.running_mean) * scale
        return weight, scale, norm.bias + shift if norm.affine else shift


@dataclass(frozen=True)
class Step:
    """What is done next: values are numbered, the images are 0.

    Attributes:
        inputs: numbers of the values that it reads.
        output: number of the value that it makes.
        piece: what is done, or
        layer: the number of the weighted layer that does it.
        in_place: whether the network overwrites the first input.
    """

    inputs: tuple[int, ...]
    output: int
    piece: Piece = Piece()
    layer: int = -1
    in_place: bool = False


class Program:
    """The pieces of a network, in the order in which they run.

    Raises:
        UnknownPieceError: when it cannot be made of known pieces.
    """

    def __init__(self, network: nn.Module):
        self.layers: list[Layer] = []
        self.steps: list[Step] = []
        self._numbers: dict[fx.Node, int] = {}
        graph = _trace(network)
        modules = dict(network.named_modules())
        for node in graph.nodes:
            if node.op == "placeholder":
                if self._numbers:
                    raise UnknownPieceError("a second input")
                self._numbers[node] = 0
            elif node.op == "output":
                self.result = self._number(node.args[0])
            elif node.op == "call_module":
                self._add_module(node, modules[str(node.target)])
            elif node.op in ("call_function", "call_method"):
                self._add_function(node)
            else:
                raise UnknownPieceError(str(node))
        self._pool_first()
        reads = Counter(number for step in self.steps for number in step.inputs)
        if any(step.in_place and reads[step.inputs[0]] > 1 for step in self.steps):
            raise UnknownPieceError("a value that is overwritten and read again")
        if any(step.output != self.result and not reads[step.output] for step in self.steps):
            raise UnknownPieceError("a value that is never read")
        readers = {number: place for place, step in enumerate(self.steps) for number in step.inputs}
        self.last_reads = [
            [n for n in set(step.inputs) if readers[n] == place] for place, step in enumerate(self.steps)
        ]
        """Of each step, the values that no later step reads."""

    def _pool_first(self) -> None:
        """Exchange a ReLU and the max-pool after it, which changes nothing but the size that the ReLU sees."""
        reads = Counter(number for step in self.steps for number in step.inputs)
        for place, (step, later) in enumerate(itertools.pairwise(self.steps)):
            pooled = isinstance(later.piece, MaxPool) and later.inputs == (step.output,)
            if pooled and isinstance(step.piece, Rectifier) and reads[step.output] == 1:
                self.steps[place] = replace(step, piece=later.piece)
                self.steps[place + 1] = replace(later, piece=step.piece, in_place=False)

    def _number(self, node: Any) -> int:
        if not isinstance(node, fx.Node):
            raise UnknownPieceError(f"{node} among the values")
        return self._numbers[node]

    def _add(self, node: fx.Node, *inputs: Any, **what: Any) -> None:
        numbers = tuple(self._number(each) for each in inputs)
        self._numbers[node] = len(self.steps) + 1
        self.steps.append(Step(numbers, len(self.steps) + 1, **what))

    def _add_module(self, node: fx.Node, module: nn.Module) -> None:
        if len(node.args) != 1 or node.kwargs:
            raise UnknownPieceError(f"{node.target} with several arguments")
        source = node.args[0]
        piece = _piece(module)
        if piece is not None:
            self._add(node, source, piece=piece, in_place=getattr(module, "inplace", False))
        elif type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d):
            self._numbers[node] = self._number(source)
        elif isinstance(module, _BatchNorm):
            self._fold(node, source, module)
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            stride, padding, dilation = ((a, b) for a, b in (module.stride, module.padding, module.dilation))
            self._add_layer(node, module, Convolution(stride, padding, dilation, module.groups))
        elif type(module) is nn.Linear:
            self._add_layer(node, module, Linear())
        else:
            raise UnknownPieceError(f"{node.target}, a {type(module).__name__}")

    def _add_layer(self, node: fx.Node, module: nn.Conv2d | nn.Linear, piece: WeightedPiece) -> None:
        self.layers.append(Layer(module, piece))
        self._add(node, node.args[0], layer=len(self.layers) - 1)

    def _fold(self, node: fx.Node, source: Any, norm: _BatchNorm) -> None:
        """Give a batch norm to the convolution whose output it alone reads."""
        number = self._number(source)
        made_by = self.steps[number - 1].layer if number else -1
        layer = self.layers[made_by] if made_by >= 0 else None
        if layer is None or layer.norm is not None or len(source.users) > 1 or not isinstance(layer.piece, Convolution):
            raise UnknownPieceError(f"{node.target}, a batch norm that follows no convolution")
        if norm.running_mean is None:
            raise UnknownPieceError(f"{node.target}, a batch norm without running statistics")
        layer.norm = norm
        self._numbers[node] = number

    def _add_function(self, node: fx.Node) -> None:
        if node.target in (operator.add, operator.iadd, torch.add, "add", "add_") and not node.kwargs:
            self._add(node, *node.args, piece=Sum(), in_place=node.target in (operator.iadd, "add_"))
        elif node.target in (F.relu, torch.relu, "relu", "relu_"):
            in_place = bool(node.target == "relu_" or node.kwargs.get("inplace") or node.args[1:])
            self._add(node, node.args[0], piece=Rectifier(), in_place=in_place)
        elif node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs:
            self._add(node, node.args[0], piece=Flatten())
        else:
            raise UnknownPieceError(f"{node.target}")


def _piece(module: nn.Module) -> Piece | None:
    if type(module) is nn.ReLU:
        return Rectifier()
    if type(module) is nn.MaxPool2d and not module.return_indices:
        return MaxPool.of(module)
    if type(module) is nn.AdaptiveAvgPool2d:
        return AveragePool(module.output_size)
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return Flatten()
    return None


class _Tracer(fx.Tracer):
    """Follows a network, and refuses what a list of pieces would leave out."""

    def __init__(self, parameters: Iterator[nn.Parameter]):
        super().__init__()
        self.known = {id(parameter) for parameter in parameters}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Batch norm over ranks is one piece too, though it is not torch's."""
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # torch.func.functional_call lends other tensors while a module runs.
        if any(id(parameter) not in self.known for parameter in m.parameters(recurse=False)):
            raise UnknownPieceError("a module with lent parameters")
        return super().call_module(m, forward, args, kwargs)


def _trace(network: nn.Module) -> fx.Graph:
    try:
        return _Tracer(network.parameters()).trace(network)
    except UnknownPieceError:
        raise
    except Exception as error:  # whatever a forward does with a value that is none
        raise UnknownPieceError(f"it cannot be traced ({error})") from error


SETTINGS = (
    *("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "ceil_mode", "output_size"),
    *("return_indices", "inplace", "start_dim", "end_dim", "affine"),
)
"""Attributes of layers that a program goes by."""


_Layers = list[tuple[nn.Module, tuple[Any, ...]]]
_programs: WeakKeyDictionary[nn.Module, tuple[_Layers, Program | None]] = WeakKeyDictionary()
"""Of each network its inner layers and their settings, and the program that was read from them."""


def known_program(network: nn.Module) -> Program | None:
    """The program of a network in eval mode; None when it is not made of known pieces, or torch.func transforms it.

    It is read once, and again when layers are exchanged or set otherwise. What else a ``forward`` goes by, such as a
    flag of its own, must not change later.
    """
    modules = list(network.modules())
    # What torch.func transforms wrap is not for an autograd function of ours.
    if any(module.training for module in modules) or torch._C._are_functorch_transforms_active():
        return None
    layers = [(module, tuple(vars(module).get(name) for name in SETTINGS)) for module in modules[1:]]
    known, program = _programs.get(network, (None, None))
    if known != layers:
        try:
            program = Program(network)
        except UnknownPieceError:
            program = None
        _programs[network] = (layers, program)
    return program if all(map(unaltered, modules)) else None
