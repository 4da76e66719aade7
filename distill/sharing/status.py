"""``guard status``: the stages of a run, and the workers on those that are shared, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.files import listed, read_json
from distill.run_folder import RESULTS, STAGES, of_other_outcomes
from distill.sharing.progress import DESERTED, ArtifactState, WorkerState, artifact_state

COLUMNS = ("worker", "hardware", "state", "units", "twice", "busy", "working on")


def describe(run: Path, trainings: Mapping[str, str] | None = None) -> str:
    """How far every stage of a run is; of those that are shared also who does what.

    Args:
        trainings: artifact → where its training is; told of those that are not complete.

    Raises:
        ArtifactError: a JSON file of the run is damaged.
    """
    states = [artifact_state(run, name) for name in STAGES]
    lines = [str(run)]
    for state in states:
        training = (trainings or {}).get(state.name, "") if state.state == "in progress" else ""
        lines.append(f"  {state.name:10}{', '.join(filter(None, (_summary(state), training)))}")
        lines += _table(state.workers)
    lines.append(f"  results   {_results(run)}")
    return "\n".join(lines)


def _results(run: Path) -> str:
    if RESULTS not in listed(run):
        return "not there"
    other = of_other_outcomes(run, read_json(run / RESULTS).get("fingerprint"))
    return "only those of earlier outcomes" if other else "complete"


def duration(seconds: float) -> str:
    """For instance 31 s, 12 min, 3.4 h, 2.1 d."""
    for limit, unit, length in ((90, "s", 1), (90 * 60, "min", 60), (36 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def _summary(state: ArtifactState) -> str:
    if state.state == "complete":
        return f"complete, {state.total} units" if state.total else "complete"
    if not state.total:
        return state.state if state.step is None else f"{state.state}, last checkpoint at step {state.step}"
    parts = [f"{state.done} of {state.total} units done", f"{state.making} in progress", f"{state.left} left"]
    seconds = state.seconds_left
    if seconds is not None:
        parts += [f"{state.rate:.4g} units an hour", f"about {duration(seconds)} to go"]
    elif not any(worker.state == "alive" for worker in state.workers):
        parts.append(DESERTED)
    return ", ".join(parts)


def _table(workers: Sequence[WorkerState]) -> list[str]:
    if not workers:
        return []
    rows = [COLUMNS, *(_row(worker) for worker in workers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return [
        "    " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _row(worker: WorkerState) -> tuple[str, ...]:
    busy = f"{100 * worker.busy:.0f} %" if worker.busy == worker.busy else "-"
    at = f"{worker.unit} for {duration(worker.since)}" if worker.unit else "-"
    return (worker.worker, worker.hardware, worker.state, str(worker.made), str(worker.double), busy, at)
