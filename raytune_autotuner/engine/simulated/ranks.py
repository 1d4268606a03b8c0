"""The simulated engine on several nodes: rank 0 serves, the others follow it, and none goes on without all of them.

Rank 0 awaits a connection of each other one, and sends a byte along it for every request that arrives, as a real one
sends its workers every step; a byte the other way says that a rank is ready. Who closes a connection is gone.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from raytune_autotuner.engine.simulated import log

_TRY_AGAIN_S = 0.05


class Followers:
    """The other ranks, as rank 0 has them: none for an engine on one node."""

    def __init__(self, meeting: tuple[str, int] | None = None, count: int = 0) -> None:
        """Wait at `meeting` until `count` of them have come."""
        self._connections: list[socket.socket] = []
        self._ready = threading.Semaphore(0)
        if meeting is None:
            return
        with socket.create_server(meeting) as listener:
            while len(self._connections) < count:
                self._connections.append(listener.accept()[0])
        log.say(log.WORKER, f"world_size={count + 1} rank=0 distributed_init_method=tcp://{meeting[0]}:{meeting[1]}")
        for connection in self._connections:
            threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def await_ready(self) -> None:
        """Wait until all of them can serve."""
        for _ in self._connections:
            self._ready.acquire()

    def step(self) -> None:
        """A request has arrived."""
        for connection in self._connections:
            with suppress(OSError):
                connection.sendall(b".")

    def _hear(self, connection: socket.socket) -> None:
        peer = "{}:{}".format(*connection.getpeername()[:2])
        with suppress(OSError):
            while connection.recv(1):
                self._ready.release()
        _end_without(peer)


class Head:
    """Rank 0, as another rank has it."""

    def __init__(self, meeting: tuple[str, int]) -> None:
        """Wait until it can be reached at `meeting`."""
        while True:
            with suppress(OSError):
                self._connection = socket.create_connection(meeting)
                return
            time.sleep(_TRY_AGAIN_S)

    def follow(self, act: Callable[[int], object]) -> None:
        """Be ready; call `act` with the number of each request, counted from 0, until rank 0 is gone."""
        index = 0
        with suppress(OSError):
            self._connection.sendall(b".")
            while self._connection.recv(1):
                act(index)
                index += 1


def _end_without(peer: str) -> None:
    """What a collective operation comes to when one of its ranks is gone: it says by whom it was left, and not why."""
    log.core_died(f"RuntimeError: [pair.cc:553] Connection closed by peer [{peer}]")
    sys.stdout.flush()
    os._exit(1)
