"""Where the ranks of one start meet, and what tells a rank that another one's machine is gone without a word."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from distill.environment import Environment
from distill.errors import LOST_ANOTHER, Preempted

SILENCE = 60
"""Seconds without a sign of life from another machine after which a rank gives it up; a shorter cut is waited out."""
PATIENCE = 60.0
"""Seconds that a rank has to end on its own after another one has ended with an error."""
JOIN = 300.0
"""Seconds in which all ranks, which are all there, connect to rank 0."""
POLL = 0.1
GOODBYE = b"\0"
SECRET = 32


def open_store(who: Environment, timeout: timedelta) -> Store:
    """The store of the process group: its keys are those of this start of the ranks and of no earlier one.

    torchrun's agents keep one store for all restarts, where the addresses of ranks that were killed would be found.
    """
    assert who.master_address is not None
    assert who.master_port is not None
    host, port = who.master_address, who.master_port
    if who.kind == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = TCPStore(host, port, is_master=False, timeout=timeout)
        return PrefixStore(agree_on_name(store, who.rank, who.world_size), store)
    return TCPStore(host, port, who.world_size, who.rank == 0, timeout=timeout, multi_tenant=True)


def agree_on_name(store: Store, rank: int, world_size: int) -> str:
    """A name that no earlier start has used, the same on every rank that is there now.

    Rank 0 invents it. The others may find the one of an earlier rank 0 first: nobody answers them there.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        store.set("guard/name", own)
        for other in range(1, world_size):
            store.set(f"guard/{own}/answer/{other}", store.get(f"guard/{own}/{other}").decode())
        return own
    while True:
        name = store.get("guard/name").decode()
        store.set(f"guard/{name}/{rank}", own)
        answer = f"guard/{name}/answer/{rank}"
        while store.get("guard/name").decode() == name:
            if store.check([answer]) and store.get(answer).decode() == own:
                return name
            time.sleep(POLL)


class Lifeline:
    """A connection between rank 0 and every other rank that nothing is sent through; a context manager.

    When the machine at the other end is gone, or the network between, the kernel finds out after ``SILENCE`` seconds.
    A collective would wait for ever: it only reads. Then this process ends, as it would when the other one had closed
    its connections, with exit code 76; torchrun and Slurm start it again.

    Args:
        address: where the others reach rank 0.
        tell: gives what rank 0 passes to it to every rank.
        silence: see ``SILENCE``.
    """

    def __init__(
        self, rank: int, world_size: int, address: str, tell: Callable[[Any], Any], silence: float = SILENCE
    ) -> None:
        self.rank, self.silence = rank, silence
        self.peers: dict[socket.socket, str] = {}
        self.deadline = float("inf")
        if rank == 0:
            with _server() as server:
                secret = tell((server.getsockname()[1], secrets.token_hex(SECRET // 2)))[1]
                self._accept(server, secret, world_size - 1)
        else:
            port, secret = tell(None)
            peer = socket.create_connection((address, port), timeout=JOIN)
            peer.sendall(secret.encode())
            self._keep(peer, "rank 0")
        self.ended, self.wake = socket.socketpair()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="lifeline")
        self.thread.start()

    def __enter__(self) -> Lifeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(goodbye=kind is None or issubclass(kind, (Preempted, KeyboardInterrupt)))

    def close(self, *, goodbye: bool) -> None:
        """Leave the others: with a goodbye they go on, without it they end too."""
        # Forked loader workers may still hold the other end: closing it would not be seen.
        self.wake.send(GOODBYE)
        self.thread.join()
        self.wake.close()
        self.ended.close()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                if goodbye:
                    peer.sendall(GOODBYE)
            peer.close()

    def _accept(self, server: socket.socket, secret: str, count: int) -> None:
        deadline = time.monotonic() + JOIN
        while len(self.peers) < count:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            peer, where = server.accept()
            peer.settimeout(10)
            with contextlib.suppress(OSError):
                if secrets.compare_digest(peer.recv(SECRET, socket.MSG_WAITALL), secret.encode()):
                    self._keep(peer, f"a rank on {where[0].removeprefix('::ffff:')}")
                    continue
            # Somebody else, who scans ports.
            peer.close()

    def _keep(self, peer: socket.socket, name: str) -> None:
        interval = max(1, round(self.silence / 12))
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, round(self.silence / interval) - 1))
        peer.settimeout(None)
        self.peers[peer] = name

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.ended, selectors.EVENT_READ)
            for peer in self.peers:
                selector.register(peer, selectors.EVENT_READ)
            while True:
                ready = selector.select(None if self.deadline == float("inf") else self.deadline - time.monotonic())
                for key, _ in ready:
                    if key.fileobj is self.ended:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    selector.unregister(key.fileobj)
                    self._heard(key.fileobj)
                if time.monotonic() >= self.deadline:
                    _give_up("Another process of this run has ended")

    def _heard(self, peer: socket.socket) -> None:
        try:
            said = peer.recv(1)
        except OSError as error:
            if error.errno != errno.ECONNRESET:
                _give_up(f"Nothing was heard from {self.peers[peer]} for {self.silence:g} seconds")
            said = b""
        if said != GOODBYE:
            # The collectives tell the main thread, which may have more to say; one on a GPU may not.
            self.deadline = min(self.deadline, time.monotonic() + PATIENCE)


def _give_up(why: str) -> None:
    os.write(2, f"guard: {why}; the same command continues from what is saved.\n".encode())
    os._exit(LOST_ANOTHER)


def _server() -> socket.socket:
    """Listens on a free port of every address of this machine."""
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    except (OSError, ValueError):
        # No IPv6 here.
        return socket.create_server(("", 0), backlog=1024)
