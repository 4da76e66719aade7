"""What has become of jobs, read from the files that their shells and logs leave."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from distill.errors import ArtifactError
from distill.sharing.host import process_start
from launchers.ledger import ATTEMPTS, Entry, Launch, latest_launch, launches, new_folder, read_launch, submitting
from launchers.states import nodes, tail
from launchers.status import describe, logs


def written(run: Path, **files: str) -> Launch:
    """A launch of two jobs on this machine, with what its shells have noted."""
    when, host = "2026-01-01T00:00:00+00:00", socket.gethostname()
    launch = Launch(new_folder(run), "local", "local", "guard launch", when, host, "running")
    launch.driver = [os.getpid(), process_start(os.getpid()) or 0]
    launch.jobs = [
        Entry("squeeze", "squeeze", str(run), [], "squeeze", "1 job", ["7"]),
        Entry("recover", "recover", str(run), ["squeeze"], "recover", "2 jobs", []),
    ]
    launch.write()
    (launch.folder / "squeeze").mkdir()
    for name, content in files.items():
        (launch.folder / "squeeze" / f"7_{name}").write_text(content)
    return launch


def states(launch: Launch) -> dict[str, str]:
    return {node.entry.key: node.state for node in nodes(launch)[0]}


def test_a_job_that_was_tried_again_and_succeeded_is_done(tmp_path: Path) -> None:
    launch = written(tmp_path, **{ATTEMPTS: "1 start 0 n1\n2 exit 137\n2 start 0 n1\n3 exit 0\n"})
    assert states(launch) == {"squeeze": "done", "recover": "pending"}
    assert nodes(launch)[0][0].tasks[0].tries == 2


def test_a_failure_is_told_with_its_reason_and_log_and_ends_what_waits_for_it(tmp_path: Path) -> None:
    log = "guard: The loss is not finite at step 12.\nsrun: error: n1: task 0: Exited with exit code 1\n"
    launch = written(tmp_path, **{ATTEMPTS: "1 start 0 n1\n2 exit 1\n", "0_log.out": log})
    assert states(launch) == {"squeeze": "failed", "recover": "cancelled"}
    text = describe(tmp_path)
    assert f"The loss is not finite at step 12. ({launch.folder / 'squeeze' / '7_0_log.out'})" in text
    assert "it needs squeeze, which has failed" in text


def test_a_job_that_was_stopped_is_no_failure(tmp_path: Path) -> None:
    launch = written(tmp_path, **{ATTEMPTS: "1 start 0 n1\n2 exit 75\n"})
    assert nodes(launch)[0][0].tasks[0].state == "stopped"


def test_what_a_killed_launch_has_not_begun_waits_no_more(tmp_path: Path) -> None:
    launch = written(tmp_path, **{ATTEMPTS: "1 start 0 n1\n2 exit 0\n"})
    launch.driver[1] += 1
    assert states(launch) == {"squeeze": "done", "recover": "cancelled"}
    assert nodes(launch)[0][1].why == "it was not submitted"


def test_what_a_killed_launch_was_at_does_not_run_for_ever(tmp_path: Path) -> None:
    launch, job = written(tmp_path), subprocess.Popen(["sleep", "100"])
    launch.driver[1] += 1
    launch.jobs[0].ids = [str(job.pid)]
    launch.write()
    (launch.folder / "squeeze" / f"{job.pid}_{ATTEMPTS}").write_text("1 start 0 n1\n")
    assert states(launch) == {"squeeze": "running", "recover": "cancelled"}, "its process goes on without the launch"
    job.kill()
    job.wait()
    assert states(launch) == {"squeeze": "failed", "recover": "cancelled"}
    text = describe(tmp_path)
    assert text.splitlines()[0].endswith("ended without a word")
    assert f"job {job.pid} ended without a word" in text


def test_logs_show_the_end_of_what_is_drawn_over_itself(tmp_path: Path) -> None:
    written(tmp_path, **{"0_log.out": "begin\n\nsqueeze: 1/9\rsqueeze: 9/9\nend\n"})
    assert logs(tmp_path, None, 2).splitlines()[1:3] == ["squeeze: 9/9", "end"]
    assert "recover: no log yet" in logs(tmp_path, "recover", 5)
    with pytest.raises(ArtifactError, match="which has: squeeze, recover"):
        logs(tmp_path, "squeez", 5)


def test_the_tail_of_a_long_log_is_its_end(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert tail(tmp_path / "log", 3) == ["line 99997", "line 99998", "line 99999"]
    assert len(tail(tmp_path / "log", 2000)) == 2000


def test_launches_are_numbered_and_found_from_an_arm(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    first, second = written(run), written(run)
    assert [path.name for path in launches(run)] == ["0001", "0002"]
    assert read_launch(first.folder) == first
    second.jobs[0].run = str(run / "guard")
    second.write()
    found = latest_launch(run / "guard")
    assert found is not None
    assert found.folder == second.folder
    assert latest_launch(run / "other") is None


def test_one_process_submits_at_a_time(tmp_path: Path) -> None:
    """Record locks are those of a process, so that the other one is another process."""
    import subprocess
    import sys

    code = "import sys\nfrom pathlib import Path\nfrom launchers.ledger import submitting\n"
    code += "with submitting(Path(sys.argv[1])): pass"
    with submitting(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "Another guard launch is submitting" in done.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    launch = written(tmp_path)
    (launch.folder / "launch.json").write_text('{"format": "other"}')
    with pytest.raises(ArtifactError, match=r"launch\.json is no launch of this version"):
        describe(tmp_path)
