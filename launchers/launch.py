"""``guard launch``: what is not complete goes to the cluster, as one graph of jobs that needs nobody to wait for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from distill.compose import names_of
from distill.config import Config
from distill.errors import ArtifactError, GuardError
from distill.pipeline import experiment_folder, run_folder
from distill.preflight import check_batches, preflight
from distill.say import say
from launchers import snapshot
from launchers.graph import Job, build_graph, prepared
from launchers.job import StageJob
from launchers.ledger import CODE, FOLDER, Entry, Launch, latest_launch, new_folder, now, submitting

FEW = 8
"""Images of a rank below which its batch-norm statistics are poor."""


def launch(configs: Sequence[Config], command: Sequence[str], *, dry_run: bool = False) -> None:
    """Submit every stage that is not complete; with the local executor run them.

    Args:
        configs: the runs of one experiment.
        command: the words of the command line.
        dry_run: print the graph, the resources and the scripts instead; nothing is written.

    Raises:
        ConfigError: before anything is written.
        ArtifactError: another launch of the run is at work, or something complete was made otherwise.
        GuardError: Slurm refuses a job; those before it have been cancelled.
    """
    cluster, place = configs[0].cluster, experiment_folder(configs[0])
    for config in configs:
        preflight(config, "run")
        check_batches(config, cluster.squeeze.nodes * cluster.squeeze.tasks)
    _warn(configs[0])
    _check_sources(configs)
    if cluster.executor == "local":
        from launchers.local import check_gpus

        check_gpus(build_graph(configs))
    if dry_run:
        print(_plan(build_graph(configs), _record(configs, command, place / FOLDER / "NEXT")))
        return
    if cluster.executor == "slurm":
        from launchers.slurm import check_there

        check_there()
    with submitting(place):
        _check_free(place)
        jobs = build_graph(configs)
        if not jobs:
            print(f"{place}: everything is complete.")
            return
        record = _record(configs, command, new_folder(place))
        _fill(record, jobs)
        record.write()
        snapshot.take(record.folder / CODE)
        works = {job.key: _work(job, record, command) for job in jobs}
        if cluster.executor == "slurm":
            _submit(jobs, works, record)
            print(f"{place}: submitted {', '.join(_named(entry) for entry in record.jobs)}")
            print(f"guard status {place} shows how far it is, guard cancel {place} stops it.")
            return
    from launchers.local import run_graph

    run_graph(jobs, works, record)


def _warn(config: Config) -> None:
    """Say on stderr what is allowed and hardly meant."""
    squeeze = config.cluster.squeeze
    ranks = squeeze.nodes * squeeze.tasks
    if ranks > 1 and config.squeeze.batch_size < FEW * ranks and config.squeeze.batchnorm == "local":
        say(
            f"guard: squeeze.batch_size={config.squeeze.batch_size} over {ranks} ranks leaves each "
            f"{config.squeeze.batch_size // ranks}, and batch norm takes the statistics of a rank's images; use a "
            f"larger batch, fewer ranks (cluster.squeeze.nodes, cluster.squeeze.tasks), or squeeze.batchnorm=sync."
        )


def _check_sources(configs: Sequence[Config]) -> None:
    """What is wrong with images that are prepared already is told before anything is submitted."""
    from data_prep import prepare

    for config in {(str(each.dataset), str(each.format), each.data_root): each for each in configs}.values():
        if prepared(config):
            prepare(config)


def _check_free(place: Path) -> None:
    """Raises ArtifactError when jobs of an earlier launch are pending or at work."""
    record = latest_launch(place)
    if record is None:
        return
    if record.executor == "slurm":
        from launchers.slurm import queue

        left = sorted(queue(record.label))
        if left:
            raise ArtifactError(
                f"{place} has been launched already, and these jobs are left: {_some(left)}; guard status {place} "
                f"shows them, guard cancel {place} ends them."
            )
    elif record.alive:
        raise ArtifactError(
            f"{place} is being run by process {record.driver[0]} of this machine; guard cancel {place} ends it."
        )


def _record(configs: Sequence[Config], command: Sequence[str], folder: Path) -> Launch:
    from distill.sharing.host import process_start

    cluster = configs[0].cluster
    driver = [os.getpid(), process_start(os.getpid()) or 0] if cluster.executor == "local" else []
    return Launch(folder, cluster.executor, cluster.name, " ".join(command), now(), socket.gethostname(), driver=driver)


def _fill(record: Launch, jobs: Sequence[Job]) -> None:
    for job in jobs:
        run = run_folder(job.configs[0]) if len(job.configs) == 1 else experiment_folder(job.configs[0])
        logs = job.key.replace("/", ".")
        record.jobs.append(Entry(job.key, job.stage, str(run), list(job.after), logs, shape(job)))


def _work(job: Job, record: Launch, command: Sequence[str]) -> StageJob:
    cluster, config = job.configs[0].cluster, job.configs[0]
    options = [word for word in command[2:] if "cluster" not in names_of(word)]
    words = ["guard", job.stage if job.stage != "report" else "run", *options]
    if len(job.configs) == 1 and (config.arms or config.controls):
        words = [word for word in words if not word.startswith("arm=")] + [f"arm={config.name.rpartition('/')[2]}"]
    return StageJob(
        stage=job.stage,
        configs=job.configs,
        command=words,
        place=Path.cwd(),
        code=(record.folder / CODE).resolve(),
        joined=job.joined,
        requeues=cluster.requeues,
    )


def _submit(jobs: Sequence[Job], works: dict[str, StageJob], record: Launch) -> None:
    from launchers.slurm import cancel, submit

    try:
        for job in jobs:
            record.entry(job.key).ids = submit(job, works[job.key], record)
            record.write()
    except GuardError as error:
        record.state = "failed"
        record.write()
        cancelled = cancel(record.label)
        rest = f" The jobs before it ({_some(cancelled)}) have been cancelled." if cancelled else ""
        raise GuardError(f"{error}{rest}") from error
    record.state = "submitted"
    record.write()


def _plan(jobs: Sequence[Job], record: Launch) -> str:
    """What would be submitted, for people."""
    if not jobs:
        return f"{record.folder.parent.parent}: everything is complete."
    _fill(record, jobs)
    lines = [f"{record.folder.parent.parent} on {record.cluster} ({record.executor}):"]
    wide, long = max(len(job.key) for job in jobs), max(len(shape(job)) for job in jobs)
    for job in jobs:
        after = f"after {', '.join(job.after)}" if job.after else "at once"
        lines.append(f"  {job.key:{wide}}  {shape(job):{long}}  {after}")
    if record.executor == "slurm":
        from launchers.slurm import script

        for job in jobs:
            waits = (
                f"# --dependency=afterok:{':'.join(job.after)} is added when these have a number" if job.after else ""
            )
            lines += ["", f"==== {job.key} ====", *([waits] if waits else []), script(job, record)]
    return "\n".join(lines)


def shape(job: Job) -> str:
    """What a job asks for, in words: 4 nodes x 8 processes, 8 GPUs a node, 24 h."""
    asked = job.resources
    parts = [f"{job.workers} jobs" if job.workers > 1 else "1 job"]
    if job.joined:
        parts.append(f"{job.nodes} x {job.tasks} processes")
    parts += [f"{asked.gpus} GPUs a node"] if asked.gpus else []
    parts += [f"{asked.cpus} CPUs"]
    parts += [f"{asked.memory:g} GiB"] if asked.memory else []
    hours, minutes = divmod(asked.minutes, 60)
    return ", ".join([*parts, f"{hours}:{minutes:02d} h"])


def _named(entry: Entry) -> str:
    first = entry.ids[0].split("_")[0]
    return f"{entry.key} ({first}{f', {len(entry.ids)} jobs' if len(entry.ids) > 1 else ''})"


def _some(ids: Sequence[str]) -> str:
    return ", ".join([*ids[:8], *(["…"] if len(ids) > 8 else [])])
