"""Word that the cluster's head is gone, while there is time to say what to do.

Ray waits a minute for its head, and then ends the driver wherever that is, with a line of its own. In: the head's
address, from Ray. Out: one line to whoever watches the study. It knows nothing of the study, and ends nothing.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

EVERY_S = 2.0
ANSWER_S = 3.0
TRIES = 3
"""So many in a row must fail: a head that is busy is not gone."""


@contextmanager
def watched_head(say: Callable[[str], None]) -> Iterator[None]:
    """Within, `say` is told, from another thread, when the head stops answering, and when it answers again."""
    address, over = ray.get_runtime_context().gcs_address, threading.Event()
    thread = threading.Thread(target=_watch, args=(address, say, over), name="head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(address: str, say: Callable[[str], None], over: threading.Event) -> None:
    missed = 0
    while not over.wait(EVERY_S):
        if _answers(address):
            if missed >= TRIES:
                say(f"Ray's head at {address} answers again")
            missed = 0
            continue
        missed += 1
        if missed == TRIES:
            say(
                f"Ray's head at {address} does not answer any more; if it stays away, Ray ends this driver within a "
                "minute. What was measured is kept. Start a cluster again, there or elsewhere, and go on with --resume."
            )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True
