"""How ranks meet at a store that outlives them, and how they find out that another one is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from distill.errors import LOST_ANOTHER
from distill.training import meeting
from distill.training.meeting import Lifeline, agree_on_name

LOST = "guard: Another process of this run has ended; the same command continues from what is saved.\n"


def join(rank: int, what: str, told: Connection, output: Path) -> None:
    """A rank in a process of its own: there for a moment, then it leaves in one way or another."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    meeting.PATIENCE = 1.0

    def tell(value: object) -> object:
        if rank:
            return told.recv()
        told.send(value)
        return value

    with meeting.Lifeline(rank, 2, "127.0.0.1", tell):
        if rank == 0:
            # Where the other one leaves without a goodbye, it does not come to the end of this.
            time.sleep(100 if what in ("error", "killed") else 3)
        elif what == "error":
            raise ValueError("its own")
        elif what == "interrupt":
            raise KeyboardInterrupt
        elif what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "forked":
            # Its child holds the connection until this process has ended, which must not wait for it.
            end, open_until_then = os.pipe()
            if os.fork() == 0:
                os.close(open_until_then)
                os.read(end, 1)
                os._exit(0)


@pytest.fixture
def server() -> TCPStore:
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
    ("what", "codes", "said"),
    [
        ("nothing", [0, 0], ""),
        ("forked", [0, 0], ""),
        ("interrupt", [0, 1], ""),
        ("error", [LOST_ANOTHER, 1], LOST),
        ("killed", [LOST_ANOTHER, -signal.SIGKILL], LOST),
    ],
)
def test_a_rank_ends_when_another_one_has_left_without_a_goodbye(
    tmp_path: Path, what: str, codes: list[int], said: str
) -> None:
    """Its own training may wait on a GPU, where nothing tells it."""
    context = multiprocessing.get_context("fork")
    ends = context.Pipe()
    both = [context.Process(target=join, args=(rank, what, ends[rank], tmp_path / f"{rank}")) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    found = [each.exitcode for each in both]
    for each in both:
        each.kill()
    assert found == codes
    assert (tmp_path / "0").read_text() == said


def test_strangers_are_not_taken_for_ranks() -> None:
    """Somebody who scans ports connects first, says something else, and the rank comes after."""
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
