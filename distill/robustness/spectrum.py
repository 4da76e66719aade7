"""The curvature of the loss around single images, and its true maximum in a ball: the two sides of Eq. 6."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

from distill.errors import ConfigError, GuardError, NonFiniteError
from distill.progress import Progress
from distill.randomness import generator
from distill.regularizers.input_gradient import Loss, cross_entropy
from distill.regularizers.numerics import ieee_float32, inference_mode_layers
from distill.robustness.bound import Array, Spectrum

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Residual at which an eigenvector is taken, relative to the Hessian's norm; its eigenvalue is off by the square."""
RESTARTS = 300
ASCENT_STEPS = 20
"""Steps of the search for the largest loss in a ball."""


def top_eigenvalues(
    network: nn.Module, images: Tensor, labels: Tensor, k: int = 1, *, loss: Loss = cross_entropy, seed: int = 0
) -> Tensor:
    """The largest algebraic eigenvalues of ∇²_x ℓ(f(x), y), by Lanczos on Hessian-vector products (paper Fig. 2).

    Each image is computed by itself, from a start that is a function of ``seed`` alone: neither the order of the images
    nor their number matters, to the last bit. Runs in eval mode and in IEEE precision, whatever surrounds it, and
    leaves the network and every random generator as they were.

    Args:
        network: its parameters have the dtype of the images.
        images: normalised (N, C, H, W), float32 or float64.
        labels: whatever ``loss`` takes, int64 (N,) for cross-entropy.
        k: how many, at most the values of one image.
        loss: (outputs (N, …) in float64, labels) → losses (N,).

    Returns:
        float64 (N, k) on the CPU, each row descending.

    Raises:
        ConfigError: ``k``, shapes or dtypes do not fit.
        NonFiniteError: a derivative is NaN or infinite.
        GuardError: Lanczos did not converge.
    """
    _check(network, images, labels, k, ())
    rows = []
    with _frozen(network) as device:
        for number in range(len(images)):
            point = _Point(network, images[number].to(device), labels[number : number + 1].to(device), loss, number)
            rows.append(_largest(point, k, seed)[0])
    return torch.from_numpy(np.array(rows).reshape(len(images), k))


def input_spectrum(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    k: int = 1,
    radii: Sequence[float] = (),
    *,
    loss: Loss = cross_entropy,
    indices: Tensor | None = None,
    seed: int = 0,
    description: str = "spectrum",
    quiet: bool = True,
) -> Spectrum:
    """Everything that Eq. 6 is about, for each image: λ₁ … λ_k, |cos(∇ℓ, v₁)|, ‖∇ℓ‖, ℓ, and the largest loss nearby.

    The largest loss with ‖v‖₂ ≤ ρ is sought by ascent from ρ∇ℓ/‖∇ℓ‖ and from ρv₁, in normalised pixels and without
    regard to what pixels can be, as in the theory. What is found for a smaller ρ counts for every larger one. Further
    arguments, precision and errors are those of ``top_eigenvalues``.

    Args:
        radii: ρ, L2 lengths in normalised pixels, positive and ascending.
        indices: int64 (N,), to be kept beside the figures; positions when None.
        description, quiet: of the progress that is shown.
    """
    _check(network, images, labels, k, radii)
    kept = np.arange(len(images)) if indices is None else indices.cpu().numpy().astype(np.int64)
    rows: list[tuple[Array, float, float, float, Array]] = []
    with _frozen(network) as device, Progress(len(images), description, "image", quiet=quiet) as progress:
        for number in range(len(images)):
            point = _Point(network, images[number].to(device), labels[number : number + 1].to(device), loss, number)
            values, vector = _largest(point, k, seed)
            norm, size = float(np.linalg.norm(point.gradient)), float(np.linalg.norm(vector))
            along = float(point.gradient @ vector)
            cosine = min(abs(along) / (norm * size), 1.0) if norm * size > 0 else float("nan")
            # Of v₁ and -v₁ the one that climbs.
            starts = [point.gradient / norm] if norm > 0 else []
            starts += [-vector if along < 0 else vector] if size > 0 else []
            found = _largest_losses(point, starts, radii)
            rows.append((values, cosine, norm, point.value, found))
            progress.update()
    eigenvalues, cosines, norms, losses, adversarial = zip(*rows, strict=True)
    return Spectrum(
        np.array(eigenvalues),
        np.array(cosines),
        np.array(norms),
        np.array(losses),
        kept,
        np.array(radii, dtype=np.float64),
        np.array(adversarial).reshape(len(rows), len(radii)),
    )


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[torch.device]:
    """The network in eval mode, its parameters fixed, deterministic kernels without TF32 or autocast; gives its device.

    All is put back at the end.
    """
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    device = next(network.parameters(), torch.empty(0)).device
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        for parameter in wanted:
            parameter.requires_grad_(False)
        with (
            inference_mode_layers(network),
            ieee_float32(device.type),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield device
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        for parameter in wanted:
            parameter.requires_grad_(True)


def _check(network: nn.Module, images: Tensor, labels: Tensor, k: int, radii: Sequence[float]) -> None:
    parameter = next(network.parameters(), None)
    if images.dtype not in TOLERANCE or images.dim() < 2 or not len(images):
        raise ConfigError(
            f"A spectrum needs normalised images (N, C, H, W) in float32 or float64, at least one, not "
            f"{tuple(images.shape)} in {str(images.dtype).removeprefix('torch.')}."
        )
    if parameter is not None and parameter.dtype != images.dtype:
        raise ConfigError(f"The images are {images.dtype} and the network is {parameter.dtype}; convert one of them.")
    if len(labels) != len(images):
        raise ConfigError(f"There are {len(images)} images and {len(labels)} labels.")
    if not 1 <= k <= images[0].numel():
        raise ConfigError(f"k={k} must be at least 1 and at most the {images[0].numel()} values of an image.")
    check_radii(radii)


def check_radii(radii: Sequence[float]) -> None:
    """Raises ConfigError unless the radii are positive, finite and ascending."""
    pairs = zip([0.0, *radii], radii, strict=False)
    if not all(smaller < larger < float("inf") for smaller, larger in pairs):
        raise ConfigError(f"radii={','.join(f'{radius:g}' for radius in radii)} must be positive and ascending.")


@dataclass
class _Point:
    """The loss at one image and its derivatives.

    The gradient's graph is made once, and each product is one pass back through it: two to four times faster on a
    ResNet than the forward derivative of the gradient (``torch.func.jvp``), which goes both ways anew every time. The
    loss is computed from the outputs in float64, for where an answer is almost certain its curvature p(1 - p) is far
    below what float32 can tell from 0.
    """

    network: nn.Module
    image: Tensor
    labels: Tensor
    loss: Loss
    number: int

    def __post_init__(self) -> None:
        self.input = self.image[None].detach().clone().requires_grad_()
        losses = self.losses(self.input, self.labels)
        if losses.shape != (1,):
            raise ConfigError(
                f"The loss of one image has the shape {tuple(losses.shape)}; it must give one value each."
            )
        self.value = float(losses.detach())
        (self.graph,) = torch.autograd.grad(losses.sum(), self.input, create_graph=True)
        self.gradient = self._flat(self.graph.detach())

    def losses(self, images: Tensor, labels: Tensor) -> Tensor:
        """float64 (N,)."""
        result: Tensor = self.loss(self.network(images).double(), labels)
        if not result.isfinite().all():
            raise NonFiniteError(
                f"The loss at image {self.number} is NaN or infinite; the network's weights are broken."
            )
        return result

    def product(self, vector: Array) -> Array:
        """∇²ℓ · vector, both float64 (C·H·W,)."""
        if not self.graph.requires_grad:
            return np.zeros_like(self.gradient)
        direction = torch.from_numpy(vector.reshape(-1)).to(self.graph).reshape(self.graph.shape)
        (change,) = torch.autograd.grad(self.graph, self.input, direction, retain_graph=True, allow_unused=True)
        return np.zeros_like(self.gradient) if change is None else self._flat(change)

    def _flat(self, derivative: Tensor) -> Array:
        values: Array = derivative.detach().double().cpu().numpy().reshape(-1)
        if not np.isfinite(values).all():
            raise NonFiniteError(f"A derivative of the loss at image {self.number} is NaN or infinite.")
        return values


def _largest(point: _Point, k: int, seed: int) -> tuple[Array, Array]:
    """The k largest algebraic eigenvalues (k,), descending, and a unit eigenvector of the first, 0 where ∇²ℓ is 0."""
    size = len(point.gradient)
    held = max(2 * k + 1, 20)
    if size <= held:
        whole = np.stack([point.product(row) for row in np.eye(size)])
        if not whole.any():
            return np.zeros(k), np.zeros(size)
        values, vectors = np.linalg.eigh((whole + whole.T) / 2)
        return values[::-1][:k], vectors[:, -1]
    start = generator(seed, "spectrum").standard_normal(size)
    second = _unit(point.product(_unit(start)))
    scale = float(np.linalg.norm(point.product(second)))
    if scale == 0:
        return np.zeros(k), np.zeros(size)
    # Scaled and shifted, for ARPACK's tolerance is relative to the eigenvalue: of many that are 0 none would converge.
    # Lanczos itself is blind to both.
    operator = LinearOperator(
        (size, size), matvec=lambda vector: point.product(vector) / scale + 2 * vector.reshape(-1), dtype=np.float64
    )
    arguments: dict[str, Any] = {"which": "LA", "v0": start, "ncv": held, "maxiter": RESTARTS}
    if "rng" in inspect.signature(eigsh).parameters:
        arguments["rng"] = generator(seed, "spectrum-restart")
    try:
        values, vectors = eigsh(operator, k, tol=TOLERANCE[point.input.dtype], **arguments)
    except ArpackNoConvergence as error:
        raise GuardError(
            f"Of the {k} largest eigenvalues at image {point.number} only {len(error.eigenvalues)} converged in "
            f"{RESTARTS} restarts of Lanczos; ask for fewer, or compute in float64."
        ) from error
    order = np.argsort(values)[::-1]
    return scale * (values[order] - 2), vectors[:, order[0]]


def _unit(vector: Array) -> Array:
    norm = np.linalg.norm(vector)
    return vector / norm if norm > 0 else vector


def _largest_losses(point: _Point, starts: Sequence[Array], radii: Sequence[float]) -> Array:
    """The largest loss found within each radius, (R,): never below ℓ(x), and ascending."""
    if not starts or not len(radii):
        return np.full(len(radii), point.value)
    device, shape = point.input.device, (-1, *[1] * point.image.dim())
    limit = torch.tensor(radii, dtype=torch.float64, device=device).repeat_interleave(len(starts)).view(shape)
    directions = torch.from_numpy(np.stack(starts)).to(device).reshape(len(starts), *point.image.shape)
    labels = point.labels.expand(len(limit), *point.labels.shape[1:])
    steps = limit * directions.repeat(len(radii), *[1] * point.image.dim())
    best = torch.full((len(limit),), point.value, dtype=torch.float64, device=device)
    for number in range(ASCENT_STEPS + 1):
        inputs = (point.image.double() + steps).to(point.image.dtype).requires_grad_()
        losses = point.losses(inputs, labels)
        best = torch.maximum(best, losses.detach())
        if number == ASCENT_STEPS:
            break
        (uphill,) = torch.autograd.grad(losses.sum(), inputs)
        if not uphill.isfinite().all():
            raise NonFiniteError(f"A gradient of the loss near image {point.number} is NaN or infinite.")
        moved = steps + limit * (1 - number / ASCENT_STEPS) * _units(uphill.double())
        steps = moved * (limit / _norms(moved).clamp_min(1e-300)).clamp(max=1)
    within: NDArray[np.float64] = best.view(len(radii), len(starts)).amax(1).cpu().numpy()
    return np.maximum.accumulate(within)


def _norms(values: Tensor) -> Tensor:
    """L2 norm of each row (N, …), with as many dimensions."""
    return values.flatten(1).norm(dim=1).view(-1, *[1] * (values.dim() - 1))


def _units(values: Tensor) -> Tensor:
    return values / _norms(values).clamp_min(1e-300)
