"""Runs one stage of a run, or all: what is not complete, alone or beside other workers."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from distill.config import Config
from distill.data.catalogue import PreparedSet
from distill.environment import detect
from distill.errors import GuardError
from distill.files import digest, locked, write_atomic
from distill.graph import STAGES, Stage, artifact_of, beside, other_teachers, stores_labels
from distill.preflight import preflight
from distill.provenance import Provenance
from distill.run_folder import Artifact
from distill.sharing import Sharing, Worker, units_left
from distill.training.monitor import Monitor, open_monitor
from distill.training.preemption import preemptible
from distill.training.processes import Processes, processes

LEAVING = ("recover", "relabel")
"""Commands whose workers leave as soon as what is left is in the hands of others; the other commands need all of it."""


def run_folder(config: Config) -> Path:
    """``run_root/name``."""
    return Path(config.run_root) / config.name


def experiment_folder(config: Config) -> Path:
    """What the arms and controls of an experiment lie in; without them the run's own folder."""
    folder = run_folder(config)
    return folder.parent if config.arms or config.controls else folder


def run(
    configs: Sequence[Config],
    command: str = "run",
    prepare: Callable[[Config], object] | None = None,
    patience: float = 0.0,
    stay: bool = False,
) -> None:
    """Run one stage, or all, of each configuration; what is complete is left alone.

    Args:
        command: ``run``, or the command of a stage.
        prepare: called on rank 0 when the options have been checked, once for each data set.
        patience: how long to wait for another process that trains in the same run, in seconds.
        stay: do not leave before every unit is made, though all that are left are in the hands of others.

    Raises:
        GuardError: one sentence; what is finished is kept.
        Preempted: after SIGTERM, SIGUSR1 or SIGUSR2; the same call continues.
    """
    with preemptible():
        _run(configs, command, prepare, patience, stay)


def _run(
    configs: Sequence[Config],
    command: str,
    prepare: Callable[[Config], object] | None,
    patience: float,
    stay: bool,
) -> None:
    first, rank = configs[0], detect().rank
    for config in configs:
        preflight(config, command)
    if prepare is not None and rank == 0:
        # The other ranks wait in the process group, which is joined when the data is there.
        for config in {(str(each.dataset), str(each.format)): each for each in configs}.values():
            prepare(config)
    with processes(first.device, first.threads) as group:
        left = [(config, *each) for config in configs for each in _run_one(config, command, group, patience, stay)]
        if command in LEAVING:
            # Only now does a rank wait for the others, which may be at work on their last units.
            group.barrier()
        for config, stage, artifact in left:
            _say(group, config, stage, units_left(run_folder(config), artifact))


def _run_one(
    config: Config, command: str, group: Processes, patience: float, stay: bool
) -> list[tuple[Stage, Artifact]]:
    """Returns the shared artifacts that are not complete because others are at work on what is left of them."""
    left: list[tuple[Stage, Artifact]] = []
    folder, wait = run_folder(config), stay or command not in LEAVING
    prepared = PreparedSet.open(Path(config.data_root) / config.dataset.name)
    for split in {"train", config.evaluate.split}:
        prepared.samples(
            split,
            max_per_class=config.dataset.max_per_class,
            validation_per_class=config.dataset.validation_per_class,
            seed=config.dataset.validation_seed,
        )
    if command in ("run", "recover") and not config.recover.images:
        # What is wrong with other teachers is told before one is trained.
        other_teachers(config, prepared)
    # Ready images first: what is wrong with them is told before a teacher is trained.
    for stage in sorted(STAGES, key=lambda stage: not (stage.makes == "distilled" and config.recover.images)):
        if command not in ("run", stage.command):
            continue
        if stage.makes == "labels" and not stores_labels(config):
            _say(group, config, stage, "not needed")
            continue
        artifact, shared = artifact_of(stage, config, folder, prepared), stage.shared(config)
        files = beside(stage, folder)
        complete = artifact.complete and all(path.is_file() for path in files)
        if not shared:
            # Ranks that work together go in together; workers on what is shared come and go as they like.
            complete = group.tell(complete)
        if complete:
            if group.main:
                artifact.sweep()
        elif not shared:
            _work(stage, artifact, config, folder, prepared, group, patience)
        elif not _share(stage, artifact, config, folder, prepared, group, wait=wait, beside=files):
            left.append((stage, artifact))
            continue
        _say(group, config, stage, "complete")
    return left


def _work(
    stage: Stage,
    artifact: Artifact,
    config: Config,
    folder: Path,
    prepared: PreparedSet,
    group: Processes,
    patience: float,
) -> None:
    # torch and everything that a stage needs are loaded when the stage starts.
    module = importlib.import_module(f"distill.stages.{stage.module}")
    from distill.stages.work import Work

    def work() -> None:
        monitor = open_monitor(folder, stage.makes, main=group.main, tensorboard=config.monitor.tensorboard)
        try:
            module.run(Work(config, folder, artifact, prepared, group, monitor))
        finally:
            monitor.close()

    if not group.main:
        if not group.tell(False):
            group.barrier()
            work()
        return
    with locked(folder, patience=patience):
        # The process that was waited for may have finished it.
        if group.tell(artifact.complete):
            return
        _write_config(config, folder)
        artifact.begin()
        group.barrier()
        try:
            with Provenance(folder / "provenance.json").record(stage.makes, engine=config.engine.choice):
                work()
        except GuardError:
            artifact.withdraw()
            raise


def _share(
    stage: Stage,
    artifact: Artifact,
    config: Config,
    folder: Path,
    prepared: PreparedSet,
    group: Processes,
    *,
    wait: bool,
    beside: Sequence[Path],
) -> bool:
    """One worker's part in a shared stage. Returns whether the artifact is complete."""
    module = importlib.import_module(f"distill.stages.{stage.module}")
    from distill.stages.work import Work

    if group.main:
        _write_config(config, folder)
    artifact.begin(alone=False)
    recipe, engine = digest(artifact.recipe.as_json()), config.engine.choice
    monitor = Monitor(folder, stage.makes, config.monitor.tensorboard, anew=True)
    with (
        contextlib.closing(monitor),
        Worker(
            folder, stage.makes, recipe, lease=config.sharing.lease, hardware=group.hardware, engine=engine
        ) as worker,
    ):
        sharing = Sharing(folder, artifact, worker, wait=wait, quiet=not group.main, beside=beside)
        module.run(Work(config, folder, artifact, prepared, group, monitor, sharing))
    return sharing.finished()


def _write_config(config: Config, folder: Path) -> None:
    content, path = OmegaConf.to_yaml(OmegaConf.structured(config)), folder / "config.yaml"
    # Many workers bring the same one.
    if not path.is_file() or path.read_bytes() != content.encode():
        write_atomic(path, content)


def _say(group: Processes, config: Config, stage: Stage, state: str) -> None:
    if group.main:
        print(f"{config.name}: {stage.command} ({stage.makes}) {state}")
        sys.stdout.flush()
