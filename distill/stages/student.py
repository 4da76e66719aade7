"""Evaluate, first half: train fresh students on the views of the distilled images (SPEC §2)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config import Config
from distill.data import DistilledSet, SoftLabelStore, ViewBatch, Views
from distill.data.labels import build_codec
from distill.data.view_loader import Teacher, ViewLoader
from distill.files import load_tensors, save_tensors
from distill.losses import soft_label_kl
from distill.models import Inference, Normalize, build_network, load_teacher
from distill.progress import Progress
from distill.randomness import seed_for
from distill.stages.work import Work
from distill.training.checkpoint import Overtaken
from distill.training.engine import Task
from distill.training.loop import train
from distill.training.schedule import build_optimizer
from distill.training.torch_engine import TorchEngine


class StudentTask(Task):
    """KL to the teacher's soft labels; with hard labels the cross-entropy of the mixed classes.

    Args:
        temperature: T of the KL term.
    """

    def __init__(self, network: nn.Module, normalize: Normalize, temperature: float):
        super().__init__()
        self.network, self.normalize, self.temperature = network, normalize, temperature

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """``{"loss", "accuracy"}``; accuracy counts the class of the own image."""
        logits = self.network(self.normalize(batch.images).contiguous(memory_format=torch.channels_last))
        if batch.logits is not None:
            loss = soft_label_kl(logits, batch.logits, self.temperature)
        else:
            own, partner = (
                F.cross_entropy(logits, labels, reduction="none") for labels in (batch.labels, batch.partner_labels)
            )
            loss = (batch.share * own + (1 - batch.share) * partner).mean()
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == batch.labels).float().mean()}


def run(work: Work) -> None:
    """Make ``student/``: the weights of one student for each seed. Workers share the seeds."""
    config, seeds = work.config, work.config.evaluate.seeds

    @functools.cache
    def distilled() -> DistilledSet:
        # A worker that finds no seed needs none.
        return DistilledSet.open(work.run, work.processes.device)

    def make(number: int, path: Path, progress: Progress) -> None:
        try:
            save_tensors(path, _train(work, distilled(), seeds[number]).state_dict())
        except Overtaken:
            # This worker was suspended, and the one that went on from its checkpoint has published.
            shutil.copyfile(work.folder / weights_file(seeds[number]), path)
        progress.update()

    def finish() -> None:
        for seed in seeds:
            load_student(work, seed)
        work.artifact.finish(network=dataclasses.asdict(config.student), seeds=seeds)

    work.share([weights_file(seed) for seed in seeds], make, finish, "students", "student", quiet=True)


def weights_file(seed: int) -> str:
    """Name of a student's weights in ``student/``."""
    return f"seed{seed}.safetensors"


def load_student(work: Work, seed: int) -> nn.Module:
    """A trained student in eval mode, without gradients for its parameters."""
    network = _fresh(work.config, seed)
    network.load_state_dict(load_tensors(work.run / "student" / weights_file(seed)))
    return network.to(work.processes.device).eval().requires_grad_(False)


def _fresh(config: Config, seed: int) -> nn.Module:
    return build_network(
        config.student, config.dataset.num_classes, config.dataset.image_size, config.seed, f"student{seed}"
    )


def _online_teacher(work: Work, normalize: Normalize, batch_size: int) -> Teacher:
    network, relabel = load_teacher(work.run / "teacher", work.processes.device), work.config.relabel
    if relabel.teacher_mode == "train":
        return nn.Sequential(normalize, network.train())
    return Inference(network, normalize, precision=relabel.precision, compiled=relabel.compile, batch_size=batch_size)


def _train(work: Work, distilled: DistilledSet, seed: int) -> nn.Module:
    """One student; trained by this process alone, whatever others do."""
    config, device = work.config, work.processes.device
    processes = dataclasses.replace(work.processes, rank=0, world_size=1)
    normalize = Normalize(distilled.mean, distilled.std).to(device)
    views = Views(distilled.images, distilled.labels, config.relabel, config.seed)
    loader = ViewLoader(views, config.evaluate.batch_size, seed_for(config.seed, "student", seed))
    if config.evaluate.labels == "soft" and config.relabel.mode == "stored":
        loader.labels = SoftLabelStore(work.run / "labels", build_codec(config.relabel, config.dataset.num_classes))
    elif config.evaluate.labels == "soft":
        loader.teacher = _online_teacher(work, normalize, loader.largest_batch)

    network = _fresh(config, seed).to(device).to(memory_format=torch.channels_last)
    optimizer, schedule = build_optimizer(network, config.evaluate, config.relabel.epochs, len(loader))
    engine = TorchEngine(processes)
    engine.prepare(StudentTask(network.train(), normalize, config.evaluate.temperature), optimizer, schedule)
    checkpoint = work.checkpoint(f"-seed{seed}", processes, work.folder / weights_file(seed))
    with contextlib.closing(work.series(f"seed{seed}")) as monitor:
        train(
            engine,
            loader,
            config.relabel.epochs,
            checkpoint,
            monitor,
            description=f"student {seed}",
            every=config.monitor.every,
        )
    return engine.trained_network()
