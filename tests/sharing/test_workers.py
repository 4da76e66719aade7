"""Workers that race, die, sleep and disagree: every unit is published once, and the set is that of one worker."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from distill.files import write_atomic
from distill.sharing import artifact_state, units_left
from distill.sharing.status import describe
from distill.sharing.verify import verify
from tests.sharing.crew import Crew, end, kill
from tests.sharing.driver import KIND, artifact, content, names
from tests.sharing.without_links import UNAVAILABLE

SPANS = [(2, 24, 3), (4, 40, 6), (1, 7, 2)]
"""(workers, units, kills)"""


def alone(folder: Path, count: int) -> bytes:
    """The manifest that one worker makes."""
    with Crew(folder, count) as crew:
        code, said = end(crew.start())
        assert code == 0, said
        crew.check()
    return (folder / KIND / "manifest.json").read_bytes()


def disturbed(run: Path, workers: int, count: int, kills: int, rng: random.Random) -> Crew:
    """Workers that are killed at random moments, each replaced by a new one a little later."""
    with Crew(run, count) as crew:
        crew_now = [crew.start("seconds=0.03") for _ in range(workers)]
        crew.wait_for(f"{KIND}/.units.json")
        for _ in range(kills):
            time.sleep(rng.uniform(0, 0.25))
            victim = rng.randrange(workers)
            if crew_now[victim].poll() is None:
                kill(crew_now[victim])
            if rng.random() < 0.7:
                crew_now[victim] = crew.start("seconds=0.01")
        for process in [*crew_now, crew.start()]:
            code, said = end(process)
            assert code in (0, -signal.SIGKILL), said
        assert crew.processes[-1].returncode == 0
    return crew


@pytest.mark.parametrize(("workers", "count", "kills"), SPANS)
def test_killed_at_random_moments(tmp_path: Path, workers: int, count: int, kills: int) -> None:
    manifest = alone(tmp_path / "alone", count)
    disturbed(tmp_path / "run", workers, count, kills, random.Random(workers)).check()
    assert (tmp_path / "run" / KIND / "manifest.json").read_bytes() == manifest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_very_many_random_moments(tmp_path: Path) -> None:
    for number in range(60):
        rng = random.Random(number)
        workers, count, kills = rng.randint(1, 6), rng.randint(1, 60), rng.randint(1, 10)
        manifest = alone(tmp_path / f"alone{number}", count)
        disturbed(tmp_path / f"run{number}", workers, count, kills, rng).check()
        assert (tmp_path / f"run{number}" / KIND / "manifest.json").read_bytes() == manifest


def test_claims_that_are_raced_for(tmp_path: Path) -> None:
    """Eight workers on units that take no time: nothing is made twice."""
    with Crew(tmp_path, 150) as crew:
        for process in [crew.start() for _ in range(8)]:
            code, said = end(process)
            assert (code, said) == (0, "")
        crew.check()
        assert crew.made() == names(150)
        assert crew.made("equal") == crew.made("dropped") == []
        assert len({record["worker"] for record in crew.records()}) == 8


@pytest.mark.parametrize(("count", "seconds"), [(16, 0.8), pytest.param(40, 1.0, marks=pytest.mark.slow)])
def test_four_workers_stay_busy(tmp_path: Path, count: int, seconds: float) -> None:
    """Nobody waits, or leaves, until no unit is left that could be taken.

    A machine that is busy with other things keeps workers waiting too: what it disturbs is measured again.
    """
    for attempt in map(str, range(4)):
        with Crew(tmp_path / attempt, count) as crew:
            for process in [crew.start(f"seconds={seconds}", "wait=0") for _ in range(4)]:
                assert end(process)[0] == 0
            crew.check()
        shares = [worker.busy for worker in artifact_state(tmp_path / attempt, KIND).workers]
        print("busy:", " ".join(f"{100 * share:.1f} %" for share in shares))
        assert len(shares) == 4
        if min(shares) >= 0.95:
            return
    pytest.fail("some worker was busy for less than 95 % of its time, again and again")


def test_a_worker_leaves_when_the_rest_is_in_living_hands(tmp_path: Path) -> None:
    with Crew(tmp_path, 3) as crew:
        slow = crew.start("seconds=0.2", "stop=1")
        crew.suspended(slow)
        assert end(crew.start("wait=0"))[0] == 0
        assert slow.poll() is None, "nobody waits for it"
        state = artifact_state(tmp_path, KIND)
        assert (state.state, state.total, state.done, state.making, state.left) == ("in progress", 3, 2, 1, 0)
        assert [worker.state for worker in state.workers] == ["alive", "ended"]
        assert state.workers[0].unit == names(3)[1]
        assert state.workers[0].busy > 0.9, "what it is making counts"
        assert "has 2 of 3 units; other workers are making 1: " in units_left(tmp_path, artifact(tmp_path, 3))
        kill(slow)
        assert "no worker is alive: the same command continues" in describe(tmp_path)
        deserted = "has 2 of 3 units; no worker is alive: the same command continues: "
        assert deserted in units_left(tmp_path, artifact(tmp_path, 3))
        lines, faults = verify(tmp_path)
        assert "not complete, what is there can be read" in lines[2]
        assert faults == []
        assert end(crew.start())[0] == 0
        crew.check()
        dead, left, _ = artifact_state(tmp_path, KIND).workers
        assert dead.busy > 0.9, "its time ends with it"
        assert left.busy < 0.5, "it left before the last unit was begun"


def test_a_slow_finisher_comes_too_late(tmp_path: Path) -> None:
    """It is taken for dead with the manifest written and not yet published; others finish, and sweep that."""
    with Crew(tmp_path, 3) as crew:
        slow = crew.start("lease=1", f"stop={KIND}/manifest.json")
        crew.suspended(slow)
        assert list((tmp_path / KIND).glob(".manifest.json.*.tmp"))
        assert end(crew.start("lease=1")) == (0, "")
        assert crew.records()[0]["ended"] is None
        os.kill(slow.pid, signal.SIGCONT)
        assert end(slow) == (0, "")
        crew.check()


def test_what_a_dead_finisher_has_not_made_beside_the_manifest_is_made(tmp_path: Path) -> None:
    """The manifest is there, and claimed by the dead one: the next worker waited for ever."""
    with Crew(tmp_path, 3) as crew:
        finisher = crew.start("beside=results", "stop=results")
        crew.suspended(finisher)
        assert (tmp_path / KIND / "manifest.json").exists()
        kill(finisher)
        assert len(list(tmp_path.glob(".results.*"))) == 1
        assert end(crew.start("beside=results")) == (0, "")
        assert (tmp_path / "results").read_text() == "made beside it"
        assert not list(tmp_path.glob(".results.*")), "what the dead one was writing"
        crew.check()


def test_a_worker_that_just_begins_is_left_alone(tmp_path: Path) -> None:
    """Others finish while its first record is written and not yet published."""
    with Crew(tmp_path, 3) as crew:
        young = crew.start("stop=workers/*.json")
        crew.suspended(young)
        assert list((tmp_path / "workers").glob(f".{KIND}-*.tmp"))
        old = tmp_path / "workers" / f".{KIND}-long-ago.json.1.tmp"
        old.touch()
        os.utime(old, (1, 1))
        assert end(crew.start()) == (0, "")
        assert not old.exists()
        os.kill(young.pid, signal.SIGCONT)
        assert end(young) == (0, "")
        crew.check()
        assert len(crew.records()) == 2


def test_a_sleeping_worker_is_replaced_and_harms_nobody_when_it_wakes_up(tmp_path: Path) -> None:
    with Crew(tmp_path, 6) as crew:
        sleeper = crew.start("lease=1", "stop=3")
        crew.suspended(sleeper)
        assert (tmp_path / KIND / names(6)[2]).exists()
        assert end(crew.start("lease=1"))[0] == 0
        crew.check()
        os.kill(sleeper.pid, signal.SIGCONT)
        assert end(sleeper) == (0, "")
        crew.check()
        assert crew.made("equal") == [names(6)[3]]


def test_a_differing_duplicate_is_told_and_dropped(tmp_path: Path) -> None:
    """A worker on other hardware comes too late with other bytes: the first stay."""
    with Crew(tmp_path, 4) as crew:
        other = crew.start("lease=1", "stop=0", "key=other", "hardware=Other GPU")
        crew.suspended(other)
        crew.start("lease=1", "hardware=This GPU")
        assert end(crew.processes[1])[0] == 0
        os.kill(other.pid, signal.SIGCONT)
        code, said = end(other)
        assert code == 0
        assert said.count("\n") == 1
        assert said.startswith(f"guard: {names(4)[0]} differs from the one that ")
        assert "(This GPU) published first, which stays" in said
        assert "(Other GPU) drops its own" in said
        crew.check()
        (dropped,) = [each for record in crew.records() for each in record["units"] if each["result"] == "dropped"]
        assert "This GPU" in dropped["first"]


def test_without_hard_links(tmp_path: Path) -> None:
    with Crew(tmp_path, 60) as crew:
        first = [crew.start("seconds=0.02", module="tests.sharing.without_links") for _ in range(3)]
        crew.wait_for(f"{KIND}/{names(60)[10]}")
        kill(first.pop())
        codes = [end(process) for process in first]
        if codes[0][0] == UNAVAILABLE:
            pytest.skip("this kernel does not let a process refuse itself links")
        assert codes == [(0, "")] * 2
        crew.check()


def test_a_dead_worker_of_another_machine(tmp_path: Path) -> None:
    """It has process ids of its own, so that only its silence tells that it is dead."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("unshare cannot make a name space of process ids here")
    with Crew(tmp_path, 5) as crew:
        stranger = crew.start("lease=1.5", "seconds=30", before=unshare)
        crew.wait_for(f"{KIND}/.claims/*.0")
        kill(stranger)
        (sign,), (claim,) = (tmp_path / "workers").glob("*.json"), (tmp_path / KIND / ".claims").glob("*.0")
        seen = sign.stat().st_mtime
        assert end(crew.start("lease=1.5"))[0] == 0
        crew.check()
        dead, other = crew.records()
        assert dead["pid"] < 10
        (taken,) = [each for each in other["units"] if each["unit"] == claim.stem]
        # Clocks of files count in hundredths.
        assert other["began"] + taken["at"] - seen > 1.5 - 0.02


SKEW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += 86400;
    return result;
}
"""


def test_clocks_that_differ_by_a_day(tmp_path: Path) -> None:
    """Neither takes the other for dead, for the file server's clock alone is asked."""
    if not shutil.which("gcc"):
        pytest.skip("gcc, which makes the clock that is wrong, is not installed")
    write_atomic(tmp_path / "skew.c", SKEW)
    library = tmp_path / "skew.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "skew.c", "-ldl"], check=True)
    with Crew(tmp_path / "run", 30) as crew:
        ahead = crew.start("seconds=0.05", "lease=30", "stop=3", LD_PRELOAD=str(library))
        crew.suspended(ahead)
        here = crew.start("seconds=0.05", "lease=30")
        crew.wait_for(f"{KIND}/{names(30)[6]}")
        shown = {worker.unit: worker.since for worker in artifact_state(tmp_path / "run", KIND).workers}
        assert 0 < shown[names(30)[3]] < 600
        os.kill(ahead.pid, signal.SIGCONT)
        assert end(ahead) == (0, "")
        assert end(here) == (0, "")
        crew.check()
        assert crew.made() == names(30)
        days = sorted(record["started"][:10] for record in crew.records())
        assert days[0] < days[1]
        assert all(0.1 < worker.busy <= 1 for worker in artifact_state(tmp_path / "run", KIND).workers)


def test_a_unit_of_another_recipe_is_not_published(tmp_path: Path) -> None:
    """The folder was removed and begun anew with other options while a worker slept."""
    with Crew(tmp_path, 4) as crew:
        sleeper = crew.start("lease=1", "stop=1", "key=old")
        crew.suspended(sleeper)
        assert (tmp_path / KIND / names(4)[0]).exists()
        shutil.rmtree(tmp_path / KIND)
        artifact(tmp_path, 3).begin(alone=False)
        os.kill(sleeper.pid, signal.SIGCONT)
        code, said = end(sleeper)
        assert code == 1
        assert said.startswith("guard: ")
        assert "these differ: units (was 3, now 4)" in said
        assert list((tmp_path / KIND).glob("unit_*")) == []


def test_strangers_and_removed_units(tmp_path: Path) -> None:
    with Crew(tmp_path, 4) as crew:
        made = artifact(tmp_path, 4)
        made.begin(alone=False)
        write_atomic(made.folder / "notes.txt", "mine")
        code, said = end(crew.start("seconds=0.05"))
        assert code == 1
        assert "notes.txt is no part of" in said
        (before,) = artifact_state(tmp_path, KIND).workers
        (made.folder / "notes.txt").unlink()
        (made.folder / names(4)[2]).unlink()
        assert end(crew.start())[0] == 0
        crew.check(twice=1)
        assert [record["error"] for record in crew.records()] == ["ArtifactError", None]
        assert artifact_state(tmp_path, KIND).workers[0].busy > 0.6 * before.busy, "an error ends its time"


def test_many_begin_at_once_and_none_takes_the_others_for_strangers(tmp_path: Path) -> None:
    made = artifact(tmp_path, 1)
    made.begin(alone=False)
    (made.folder / "recipe.json").unlink()
    write_atomic(made.folder / names(1)[0], content(0))
    with Crew(tmp_path, 1) as crew:
        code, said = end(crew.start())
        assert code == 1
        assert "is of unknown origin" in said
        shutil.rmtree(made.folder)
        for process in [crew.start() for _ in range(6)]:
            assert end(process) == (0, "")
        crew.check()
