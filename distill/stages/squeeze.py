"""Squeeze: train the teacher on the real images with the regularised loss (paper §4.3-4.4; SPEC §1-2)."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config import Config
from distill.data.batch import Batch
from distill.data.loaders import test_loader, training_loader
from distill.errors import ArtifactError, ConfigError
from distill.files import save_tensors
from distill.models import Normalize, average_statistics, build_network, load_initial_weights, synchronise_batchnorm
from distill.models.teacher import WEIGHTS
from distill.randomness import seed_for
from distill.regularizers import Regularizer, Sampling, Surroundings, build_regularizer, functorch_only
from distill.regularizers.numerics import inference_mode_layers
from distill.robustness.runner import top_accuracy
from distill.run_folder import copy_artifact, read_manifest
from distill.stages.work import Work
from distill.training.checkpoint import Checkpoint
from distill.training.engine import Task, build_engine
from distill.training.loop import train
from distill.training.schedule import build_optimizer

OWN_TERMS = ("loss", "cross_entropy", "accuracy", "stage", "series", "step", "time", "epoch")
"""Keys of a line of metrics that no term of a regulariser may have."""


class SqueezeTask(Task):
    """The whole regularised loss of a batch in one forward pass: clean loss in train mode, then the penalty.

    Args:
        regularizer: adds the penalty, or replaces the training images.
        seed: seed of the run, for regularisers that draw.
        label_smoothing: of the clean loss.
        autocast: whether the clean pass runs in bf16; the penalty never does.
        frozen: the clean pass too reads running batch-norm statistics.
        sampling: the steps and images that pay for the penalty.
        functorch: see ``regularizer.gradients``.
    """

    def __init__(
        self,
        network: nn.Module,
        normalize: Normalize,
        regularizer: Regularizer,
        seed: int = 0,
        label_smoothing: float = 0.0,
        autocast: bool = False,
        frozen: bool = False,
        sampling: Sampling | None = None,
        functorch: bool = False,
    ):
        super().__init__()
        self.sampling, self.functorch = sampling or Sampling(), functorch
        self.network, self.normalize, self.regularizer = network, normalize, regularizer
        self.seed, self.label_smoothing, self.autocast, self.frozen = seed, label_smoothing, autocast, frozen

    def seeds(self, batch: Batch) -> list[int]:
        """A seed for each image, from (seed, epoch, index of the image)."""
        return [seed_for(self.seed, "regularizer", batch.epoch, index) for index in batch.indices.tolist()]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss", "cross_entropy", "accuracy", terms of the regulariser}``, scalars."""
        images = self.normalize(batch.images).contiguous(memory_format=torch.channels_last)
        with self._gradients():
            images = self.regularizer.training_images(
                self.network, images, batch.labels, functools.partial(self.seeds, batch)
            )

        # The clean pass comes first: it updates the running statistics that the penalty reads.
        with (
            inference_mode_layers(self.network) if self.frozen else contextlib.nullcontext(),
            torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast),
        ):
            logits = self.network(images)
        clean = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)
        penalty = {}
        if self.regularizer.has_penalty and self.sampling.at(batch.step):
            if not self.frozen:
                # Each rank has added its own images: the penalty is that of one network.
                average_statistics(self.network, batch.weight)
            with self._gradients():
                penalty = self.penalty(batch, images)

        accuracy = (logits.argmax(dim=1) == batch.labels).float().mean()
        loss = clean + penalty["penalty"] if penalty else clean
        return {"loss": loss, "cross_entropy": clean, **penalty, "accuracy": accuracy}

    def _gradients(self) -> contextlib.AbstractContextManager[None]:
        return functorch_only() if self.functorch else contextlib.nullcontext()

    def penalty(self, batch: Batch, images: Tensor) -> dict[str, Tensor]:
        """The regulariser's terms on the images that pay, weighed to the mean of the batch's."""
        taken, factor = self.sampling.choose(batch.step, batch.first, len(batch))
        labels = batch.labels
        if taken is not None:
            taken = taken.to(images.device)
            images, labels = images[taken].contiguous(memory_format=torch.channels_last), labels[taken]
        terms = self.regularizer(self.network, images, labels)
        if terms and ("penalty" not in terms or any(name in terms for name in OWN_TERMS)):
            raise ConfigError(
                f"The regulariser {type(self.regularizer).__name__} gives {', '.join(terms)}; one term must be called "
                f"penalty, which is added to the loss, and none {' or '.join(OWN_TERMS)}."
            )
        return {**terms, "penalty": factor * terms["penalty"]} if terms else {}


def run(work: Work) -> None:
    """Make ``teacher/``: weights and a manifest with the clean accuracy."""
    config, processes = work.config, work.processes
    if config.squeeze.reuse:
        if processes.main:
            _reuse(work, Path(config.squeeze.reuse))
        processes.barrier()
        return
    network = build_network(
        config.teacher, config.dataset.num_classes, config.dataset.image_size, config.seed, "teacher"
    )
    if config.squeeze.weights:
        indices = [info.imagenet_index for info in work.prepared.classes]
        load_initial_weights(network, config.squeeze.weights, config.teacher, indices)
    network = network.to(processes.device).to(memory_format=torch.channels_last)
    checkpoint = work.checkpoint()
    if config.squeeze.epochs:
        network = _train(work, network, checkpoint)

    if processes.main:
        normalize = Normalize(config.dataset.mean, config.dataset.std).to(processes.device)
        split = "validation" if config.dataset.validation_per_class else "test"
        loader = test_loader(
            config,
            work.prepared,
            split=split,
            batch_size=config.evaluate.test_batch_size,
            device=processes.device,
        )
        accuracy = top_accuracy(nn.Sequential(normalize, network), loader).as_json()
        save_tensors(work.folder / WEIGHTS, network.state_dict())
        work.artifact.finish(
            network=asdict(config.teacher),
            num_classes=config.dataset.num_classes,
            image_size=config.dataset.image_size,
            mean=config.dataset.mean,
            std=config.dataset.std,
            regularizer={key: value for key, value in asdict(config.regularizer).items() if value not in (None, {})},
            clean={**accuracy, "split": split},
        )
        checkpoint.remove()
        work.monitor.scalars(config.squeeze.epochs, accuracy, "test")
    processes.barrier()


def _train(work: Work, network: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    config, processes = work.config, work.processes
    if config.squeeze.batchnorm == "sync":
        network = synchronise_batchnorm(network)
    loader = training_loader(
        config, work.prepared, rank=processes.rank, world_size=processes.world_size, device=processes.device
    )
    steps = config.squeeze.epochs * len(loader)
    if config.regularizer.every > steps:
        raise ConfigError(
            f"regularizer.every={config.regularizer.every} is more than the {steps} steps of the training, which would "
            f"see no penalty; use at most {steps}."
        )
    optimizer, schedule = build_optimizer(network, config.squeeze, config.squeeze.epochs, len(loader))
    engine = build_engine(config.engine, processes)
    engine.prepare(
        build_task(config, network),
        optimizer,
        schedule,
        config.squeeze.accumulation,
        config.squeeze.ema,
        config.squeeze.batch_size,
    )
    train(
        engine,
        loader,
        config.squeeze.epochs,
        checkpoint,
        work.monitor,
        description="squeeze",
        every=config.monitor.every,
    )
    return engine.trained_network()


def build_task(config: Config, network: nn.Module) -> SqueezeTask:
    """The squeeze task of a configuration, on the device of the network."""
    device = next(network.parameters()).device
    normalize = Normalize(config.dataset.mean, config.dataset.std).to(device)
    surroundings = Surroundings(
        config.dataset.mean, config.dataset.std, config.squeeze.batch_size, config.dataset.image_size
    )
    return SqueezeTask(
        network.train(),
        normalize,
        build_regularizer(config.regularizer, surroundings),
        seed=config.seed,
        label_smoothing=config.squeeze.label_smoothing,
        autocast=config.squeeze.precision == "bf16",
        frozen=config.squeeze.batchnorm == "frozen",
        sampling=Sampling(config.regularizer.every, config.regularizer.fraction, config.seed),
        functorch=config.regularizer.gradients == "functorch",
    )


def _reuse(work: Work, run: Path) -> None:
    """Copy the finished teacher of another run, which must have been made from the same recipe."""
    manifest = read_manifest(run / "teacher", "teacher")
    texts = work.artifact.recipe.differences(manifest["recipe"])
    if texts:
        raise ArtifactError(
            f"The teacher of squeeze.reuse={run} is not the one wanted; these differ: {'; '.join(texts)}."
        )
    copy_artifact(run / "teacher", work.folder)
