"""The one training loop. It knows no method: a task returns its loss, an engine makes the step."""

from __future__ import annotations

import time
from typing import Any

from distill.data.batch import Loader
from distill.errors import Preempted
from distill.progress import Progress
from distill.training.checkpoint import Checkpoint
from distill.training.engine import Engine
from distill.training.health import Health, short
from distill.training.monitor import SHOWN, NullMonitor
from distill.training.preemption import deferred


def train(
    engine: Engine,
    loader: Loader[Any],
    epochs: int,
    checkpoint: Checkpoint,
    monitor: NullMonitor,
    *,
    description: str,
    every: int = 20,
) -> None:
    """Train to the end, from the latest checkpoint if there is one.

    A signal that asks to stop is answered after a step, the same on every rank, with a checkpoint of it.

    Args:
        engine: prepared with a task.
        loader: gives the batches of one epoch.
        description: name on the progress bar.
        every: steps between two records.

    Raises:
        Preempted: after a signal, on all ranks.
        Overtaken: another worker has made the checkpoint's result.
    """
    processes = checkpoint.processes
    with deferred() as told:
        checkpoint.restore(engine, loader)
        monitor.resumed(engine.step_count)
        first = int(loader.state_dict()["epoch"])
        total = epochs * len(loader)
        with Progress(total, description, "step", done=engine.step_count, quiet=not processes.main) as progress:
            health = Health(processes)
            for epoch in range(first, epochs):
                if epoch != first:
                    loader.set_epoch(epoch)
                asked = time.monotonic()
                for batch in loader:
                    health.count(len(batch), time.monotonic() - asked)
                    if engine.step_count == 0:
                        monitor.images(0, "images", batch.images[:SHOWN])
                    last = loader.state_dict()["position"] == len(loader)
                    answer = processes.agree(told(), checkpoint.due(epoch_ends=last))
                    rate = engine.learning_rate
                    terms = engine.step(batch)
                    if engine.step_count % every == 0 or engine.step_count == total:
                        values = {**health.record(terms, rate), "epoch": engine.step_count / len(loader)}
                        monitor.scalars(engine.step_count, values)
                        progress.update(0, **short(values))
                    progress.update()
                    stop, due = answer()
                    if stop or due:
                        checkpoint.save(engine, loader)
                    if stop:
                        raise Preempted
                    if due:
                        checkpoint.check_wanted()
                    asked = time.monotonic()
        checkpoint.save(engine, loader)
