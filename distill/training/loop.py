"""The one training loop. It knows no method: a task returns its loss, an engine makes the step."""

from __future__ import annotations

import time
from typing import Any

from distill.data.batch import Loader
from distill.progress import Progress
from distill.training.checkpoint import Checkpoint
from distill.training.engine import Engine
from distill.training.monitor import NullMonitor


def train(
    engine: Engine,
    loader: Loader[Any],
    epochs: int,
    checkpoint: Checkpoint,
    monitor: NullMonitor,
    *,
    description: str,
    series: str = "",
    every: int = 20,
) -> None:
    """Train to the end, from the latest checkpoint if there is one.

    Args:
        engine: prepared with a task.
        loader: gives the batches of one epoch.
        description: name on the progress bar.
        series: leads the names of the recorded numbers.
        every: steps between two records.
    """
    checkpoint.restore(engine, loader)
    first = int(loader.state_dict()["epoch"])
    total = epochs * len(loader)
    quiet = not checkpoint.processes.main
    with Progress(total, description, "step", done=engine.step_count, quiet=quiet) as progress:
        images, waited, began = 0, 0.0, time.monotonic()
        for epoch in range(first, epochs):
            if epoch != first:
                loader.set_epoch(epoch)
            asked = time.monotonic()
            for batch in loader:
                waited += time.monotonic() - asked
                terms = engine.step(batch)
                images += len(batch) * checkpoint.processes.world_size
                if engine.step_count % every == 0 or engine.step_count == total:
                    elapsed = time.monotonic() - began
                    values = {name: term.item() for name, term in terms.items()}
                    rates = {"images_per_second": images / elapsed, "data_wait": waited / elapsed}
                    monitor.scalars(
                        engine.step_count, {**values, "learning_rate": engine.learning_rate, **rates}, series
                    )
                    progress.update(0, loss=f"{values['loss']:.4g}")
                    images, waited, began = 0, 0.0, time.monotonic()
                progress.update()
                if checkpoint.due():
                    checkpoint.save(engine, loader)
                asked = time.monotonic()
    checkpoint.save(engine, loader)
