"""How ranks meet at a store that outlives them, and how they find out that another one is gone."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from distill.errors import LOST_ANOTHER
from distill.training.meeting import Lifeline, agree_on_name
from tests.running import environment

ALONE = """
import sys, time
from distill.training import meeting
meeting.PATIENCE = 1.0
rank, port, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", port, 2, False)
def tell(value):
    if rank == 0: store.set("told", repr(value))
    return eval(store.get("told"))
with meeting.Lifeline(rank, 2, "127.0.0.1", tell):
    print("there", flush=True)
    if rank == 1 and what == "error": raise ValueError("its own")
    if rank == 1 and what == "interrupt": raise KeyboardInterrupt
    if rank == 1 and what == "killed": sys.stdout.flush(); __import__("os").kill(__import__("os").getpid(), 9)
    if rank == 0: time.sleep(4)
    print("done", flush=True)
"""


@pytest.fixture
def server() -> Iterator[TCPStore]:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def test_ranks_agree_on_a_name_that_no_earlier_start_has_used(server: TCPStore) -> None:
    """The store keeps what the ranks of earlier starts have written, as torchrun's agents do."""

    def join(rank: int, world_size: int) -> str:
        store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=60))
        return agree_on_name(store, rank, world_size)

    used: set[str] = set()
    with ThreadPoolExecutor(3) as pool:
        for world_size, order in ((2, [0, 1]), (2, [1, 0]), (3, [2, 1, 0]), (2, [1, 0]), (3, [1, 0, 2])):
            joining = []
            for rank in order:
                joining.append(pool.submit(join, rank, world_size))
                # What comes first finds the name of the start before.
                threading.Event().wait(0.3)
            names = {each.result(timeout=60) for each in joining}
            assert len(names) == 1
            assert not names & used
            used |= names


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("nothing", 0, "done"),
        ("interrupt", 0, "done"),
        ("error", LOST_ANOTHER, "guard: Another process of this run has ended; the same command continues"),
        ("killed", LOST_ANOTHER, "guard: Another process of this run has ended; the same command continues"),
    ],
)
def test_a_rank_ends_when_another_one_has_left_without_a_goodbye(
    server: TCPStore, what: str, code: int, said: str
) -> None:
    """Its own training may wait on a GPU, where nothing tells it."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, str(rank), str(server.port), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        for rank in range(2)
    ]
    output = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert ranks[0].returncode == code, output
    assert output[0].splitlines()[0] == "there"
    assert said in output[0].splitlines()[1]


def test_strangers_are_not_taken_for_ranks() -> None:
    """Somebody who scans ports connects first, says something else, and the rank comes after."""
    import socket

    ready = threading.Event()
    told: list[tuple[int, str]] = []

    def tell(value: tuple[int, str] | None) -> tuple[int, str]:
        if value is not None:
            told.append(value)
            ready.set()
        ready.wait(20)
        return told[0]

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(Lifeline, 0, 2, "127.0.0.1", tell)
        ready.wait(20)
        with socket.create_connection(("127.0.0.1", told[0][0])) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n".ljust(32))
            second = Lifeline(1, 2, "127.0.0.1", tell)
            main = first.result(timeout=20)
            assert stranger.recv(1) == b""
    assert list(main.peers.values()) == ["a rank on 127.0.0.1"]
    (peer,) = main.peers
    assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    second.close(goodbye=True)
    main.close(goodbye=True)
