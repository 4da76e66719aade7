"""What scontrol prints, taken apart."""

from __future__ import annotations


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
    for part in tasks.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if int(first) <= number <= int(last or first):
            return True
    return False
