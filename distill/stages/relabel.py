"""Relabel: the teacher's logits on every view of the distilled images (SPEC §2 and §4)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data import DistilledSet, SoftLabelStore, Views
from distill.data.labels import build_codec, epochs_stored
from distill.models import Inference, Normalize, load_teacher
from distill.progress import Progress
from distill.stages.work import Work
from distill.training.monitor import SHOWN
from distill.training.processes import deterministic


def run(work: Work) -> None:
    """Make ``labels/``: one shard of encoded logits an epoch. Workers share the epochs."""
    config, processes = work.config, work.processes
    distilled = DistilledSet.open(work.run, processes.device)
    views = Views(distilled.images, distilled.labels, config.relabel, config.seed)
    normalize = Normalize(distilled.mean, distilled.std).to(processes.device)
    teacher = Inference(
        load_teacher(work.run / "teacher", processes.device),
        normalize,
        precision=config.relabel.precision,
        compiled=config.relabel.compile,
        batch_size=min(config.relabel.batch_size, len(distilled)),
    )
    store = SoftLabelStore(work.folder, build_codec(config.relabel, config.dataset.num_classes))

    def make(epoch: int, path: Path, progress: Progress) -> None:
        with deterministic(processes.device):
            logits = epoch_logits(teacher, views, epoch, config.relabel.batch_size)
        SoftLabelStore(path.parent, store.codec).write(epoch, logits)
        progress.update()

    def finish() -> None:
        _finish(work, store, distilled)
        work.monitor.images(0, "views", views.batch(0, views.order(0)[:SHOWN]).images)

    files = [store.path(epoch).name for epoch in range(epochs_stored(config.relabel))]
    work.share(files, make, finish, "relabel", "epoch")


def epoch_logits(teacher: Inference, views: Views, epoch: int, batch_size: int) -> Tensor:
    """float32 (images, classes) on the CPU, always in the same batches, whoever makes the epoch."""
    order = views.order(epoch)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = torch.cat([teacher(views.batch(epoch, batch).images) for batch in batches]).cpu()
    return answers[torch.from_numpy(np.argsort(order))]


def _finish(work: Work, store: SoftLabelStore, distilled: DistilledSet) -> None:
    config, codec, stored = work.config, store.codec, epochs_stored(work.config.relabel)
    for epoch in range(stored):
        store.open(epoch, len(distilled))
    size = sum(store.path(epoch).stat().st_size for epoch in range(stored))
    work.artifact.finish(
        epochs=config.relabel.epochs,
        stored_epochs=stored,
        count=len(distilled),
        classes=config.dataset.num_classes,
        codec={"name": codec.name, **codec.parameters},
        bytes_per_image=codec.bytes_per_image,
        bytes=size,
        seed=config.seed,
        views=dataclasses.asdict(config.relabel),
    )
    work.monitor.scalars(config.relabel.epochs, {"bytes": size})
