"""The stages of one or several runs as a graph of jobs: what is not complete, and what each job waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.config import Config
from distill.config_cluster import JobConfig, RanksConfig
from distill.data.catalogue import PreparedSet
from distill.graph import DATASET, STAGES, artifact_of, beside, stores_labels
from distill.pipeline import run_folder

PREPARE, REPORT = "prepare", "report"


@dataclass(frozen=True)
class Job:
    """One node of the graph: a job, or an array of jobs that share their units.

    Attributes:
        key: its name in the graph: the stage, with the arm of an experiment before it.
        stage: ``prepare``, the command of a stage, or ``report``.
        configs: what it works on: one run, or all of them for the report.
        workers: jobs of the array; 1 is a single job.
        resources: what each of them asks for.
        after: keys of the jobs that must have succeeded before.
    """

    key: str
    stage: str
    configs: tuple[Config, ...]
    workers: int
    resources: JobConfig
    after: tuple[str, ...]

    @property
    def nodes(self) -> int:
        """Nodes of one job."""
        return self.resources.nodes if isinstance(self.resources, RanksConfig) else 1

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.resources.tasks if isinstance(self.resources, RanksConfig) else 1

    @property
    def joined(self) -> bool:
        """Whether its processes are ranks of one process group."""
        return isinstance(self.resources, RanksConfig)


def build_graph(configs: Sequence[Config]) -> list[Job]:
    """Every job that is still to do, in an order in which each comes after those that it waits for.

    Raises:
        ArtifactError: an artifact was made from another configuration, or is damaged.
    """
    jobs: list[Job] = []
    runs = {run_folder(config).resolve(): _prefix(config, configs) for config in configs}
    left = {_prefix(config, configs): commands_left(config) for config in configs}
    preparing: dict[tuple[str, str, str], str] = {}
    for config in configs:
        prefix = _prefix(config, configs)
        prepare: list[str] = []
        if left[prefix] and not prepared(config):
            data = (config.data_root, str(config.dataset), str(config.format))
            if data not in preparing:
                preparing[data] = PREPARE if not preparing else f"{PREPARE}{len(preparing) + 1}"
                jobs.append(Job(preparing[data], PREPARE, (config,), 1, config.cluster.prepare, ()))
            prepare = [preparing[data]]
        for command in left[prefix]:
            own = [f"{prefix}{other}" for other in _commands_before(config, command) if other in left[prefix]]
            others = [
                f"{runs[run]}squeeze"
                for run in _other_teachers(config, command)
                if "squeeze" in left.get(runs.get(run, "-"), [])
            ]
            after = tuple(dict.fromkeys([*own, *others])) or tuple(prepare)
            resources: JobConfig = getattr(config.cluster, command)
            jobs.append(Job(f"{prefix}{command}", command, (config,), workers(config, command), resources, after))
    if jobs:
        waited = {key for job in jobs for key in job.after}
        ends = tuple(job.key for job in jobs if job.key not in waited)
        jobs.append(Job(REPORT, REPORT, tuple(configs), 1, configs[0].cluster.report, ends))
    return jobs


def prepared(config: Config) -> bool:
    """Whether the images are imported, and written in the format that is asked for."""
    folder = Path(config.data_root) / config.dataset.name
    if not (folder / "manifest.json").is_file():
        return False
    if config.format.name == "folder":
        return True
    from distill.data.beton import BetonLayout, read_beton_manifest

    images, layout = PreparedSet.open(folder), BetonLayout.of(config.format, config.dataset)
    written = layout.folder(images)
    if not (written / "manifest.json").is_file():
        return False
    # After each split it is written anew.
    return set(images.splits) <= set(read_beton_manifest(written)["files"])


def commands_left(config: Config) -> list[str]:
    """The commands of the stages that are not complete, in order."""
    folder, complete, left = run_folder(config), {DATASET}, []
    images = Path(config.data_root) / config.dataset.name
    known = PreparedSet.open(images) if (images / "manifest.json").is_file() else None
    for stage in STAGES:
        if stage.makes == "labels" and not stores_labels(config):
            continue
        done = known is not None and complete.issuperset(stage.inputs(config))
        if done and known is not None:
            done = artifact_of(stage, config, folder, known).complete
        if done and all(path.is_file() for path in beside(stage, folder)):
            complete.add(stage.makes)
        elif stage.command not in left:
            left.append(stage.command)
    return left


def workers(config: Config, command: str) -> int:
    """How many jobs an array has: as many as were asked for, but not more than there are units."""
    cluster = config.cluster
    if command == "recover":
        from distill.data.distilled_set import plan_units

        recover = config.recover
        if recover.images:
            return 1
        units = plan_units(recover.ipc, recover.images_per_class, config.dataset.num_classes, recover.classes_per_unit)
        return min(cluster.recover.workers, len(units))
    if command == "relabel":
        from distill.data.labels import epochs_stored

        return min(cluster.relabel.workers, epochs_stored(config.relabel))
    if command == "evaluate":
        return cluster.evaluate.workers or len(config.evaluate.seeds)
    return 1


def _commands_before(config: Config, command: str) -> list[str]:
    """The commands whose artifacts a command reads."""
    needed = {name for stage in STAGES if stage.command == command for name in stage.inputs(config)}
    return [
        stage.command
        for stage in STAGES
        if stage.makes in needed and stage.command != command and (stage.makes != "labels" or stores_labels(config))
    ]


def _other_teachers(config: Config, command: str) -> list[Path]:
    """The runs whose teachers a command reads."""
    paths = {"squeeze": [config.squeeze.reuse] if config.squeeze.reuse else [], "recover": config.recover.teachers}
    return [Path(path).resolve() for path in paths.get(command, [])]


def _prefix(config: Config, configs: Sequence[Config]) -> str:
    """Leads the keys of a run's jobs: the arm of an experiment."""
    several = len(configs) > 1 or config.arms or config.controls
    return f"{config.name.rpartition('/')[2]}/" if several else ""
