"""Relabel: the teacher's logits on every view of the distilled images (SPEC §2 and §4)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from distill.data import DistilledSet, SoftLabelStore, Views
from distill.models import Normalize, load_teacher
from distill.progress import Progress
from distill.stages.work import Work
from distill.training.processes import deterministic


def run(work: Work) -> None:
    """Make ``labels/``: one shard of float16 logits an epoch. Ranks share the epochs."""
    config, processes = work.config, work.processes
    distilled = DistilledSet.open(work.run, processes.device)
    views = Views(distilled.images, distilled.labels, config.relabel, config.seed)
    normalize = Normalize(distilled.mean, distilled.std).to(processes.device)
    teacher = nn.Sequential(normalize, load_teacher(work.run / "teacher", processes.device))
    store = SoftLabelStore(work.folder)
    mine = processes.share(config.relabel.epochs)
    left = [epoch for epoch in mine if not store.path(epoch).is_file()]
    done = len(mine) - len(left)
    with Progress(len(mine), "relabel", "epoch", done=done, quiet=not processes.main) as progress:
        for epoch in left:
            with deterministic(processes.device):
                store.write(epoch, _logits(teacher, views, epoch, config.relabel.batch_size))
            progress.update()
    processes.barrier()
    if processes.main:
        _finish(work, store, distilled)
    processes.barrier()


@torch.no_grad()
def _logits(teacher: nn.Module, views: Views, epoch: int, batch_size: int) -> Tensor:
    """float32 (images, classes), always in the same batches, whoever makes the epoch."""
    count = len(views.images)
    starts = range(0, count, batch_size)
    return torch.cat(
        [teacher(views.batch(epoch, range(start, min(start + batch_size, count))).images) for start in starts]
    )


def _finish(work: Work, store: SoftLabelStore, distilled: DistilledSet) -> None:
    config = work.config
    for epoch in range(config.relabel.epochs):
        store.read(epoch, len(distilled))
    work.artifact.finish(
        epochs=config.relabel.epochs,
        count=len(distilled),
        classes=config.dataset.num_classes,
        dtype="float16",
        seed=config.seed,
        views=dataclasses.asdict(config.relabel),
    )
    size = sum(path.stat().st_size for path in work.folder.glob("epoch_*.safetensors"))
    work.monitor.scalars(config.relabel.epochs, {"bytes": size})
