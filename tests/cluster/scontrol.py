"""What scontrol prints, taken apart."""

from __future__ import annotations

from collections.abc import Mapping

WHOLE = "4294967294"
"""The number of all tasks of an array that was ended before one of them began."""


def facts_of(line: str) -> dict[str, str]:
    """What scontrol says in one line; of values with spaces the first word."""
    return dict(word.split("=", 1) for word in line.split(" ") if "=" in word)


def name_of_job(facts: dict[str, str]) -> str:
    """What users call the job."""
    if "ArrayJobId" not in facts:
        return facts["JobId"]
    task = facts["ArrayTaskId"].partition("%")[0]
    return f"{facts['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"


def holds(tasks: str, number: int) -> bool:
    """Whether a list such as ``0-3,7%2`` holds a number."""
    if tasks == WHOLE:
        return True
    for part in tasks.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if int(first) <= number <= int(last or first):
            return True
    return False


def state_of(job: str, jobs: Mapping[str, Mapping[str, str]]) -> str:
    """The state of a job or of one task of an array, from what scontrol says of all jobs; UNKNOWN without it."""
    if job in jobs:
        return jobs[job]["JobState"]
    array, _, task = job.partition("_")
    for facts in jobs.values():
        if facts.get("ArrayJobId") == array and task and holds(facts["ArrayTaskId"], int(task)):
            return facts["JobState"]
    return "UNKNOWN"
