"""One load sent by several client processes, for engines that make more tokens than one process can read.

In: what `client.run` takes, and how many processes. Out: one `LoadRun`, as of a single client; its records are on one
clock, since Linux has one monotonic clock for all processes. In closed loop the processes share the level's concurrency
and take the next request from one queue, so that together they send as one would; in open loop each sends every n-th
request, when it is due.

A client process (`work`) talks to the one that started it over a socket, and ends when that ends:

    client -> parent   READY
    parent -> client   for each load its `Part`; when it has said READY again, the start on the monotonic clock; or STOP
    client -> parent   `_Counts` twice a second; at the end its `LoadRun`, or, where it was told to stop, its records
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeAlias

from raytune_autotuner.load import client
from raytune_autotuner.load.client import PLAIN, Load, LoadRun, OnProgress
from raytune_autotuner.load.dialect import Dialect
from raytune_autotuner.load.workload import Level, Request
from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.errors import AutotunerError

READY, STOP = "ready", "stop"
_LOOK_S = 0.5
HEAD_START_S = 0.1
"""From the moment at which all are ready to the load's start, so that none is late for it."""
START_S = 120.0
"""A client process that has not come up until then never will; it takes half a second."""
GRACE_S = 20.0
"""After the deadline, or after it was told to stop, a client that says nothing for so long is given up."""
_PLACE = struct.Struct("=I")
_WORK = "import sys; from raytune_autotuner.load.spread import work; work(*map(int, sys.argv[1:]))"


class _Counts(NamedTuple):
    done: int = 0
    failed: int = 0


NONE_YET = _Counts()
Look: TypeAlias = Callable[[_Counts], None]


class ClientLost(AutotunerError):
    """A client process ended, or did not answer, before it had handed over its records; the text says how."""


def most_processes(level: Level, requests: int) -> int:
    """Between how many processes a load can be divided: each has a request, and in closed loop one in flight."""
    return min(requests, level.concurrency or requests)


class Clients:
    """Client processes, started when there is need of them and kept for the next load; they end with the block."""

    def __init__(self) -> None:
        self._all: list[_Client] = []
        # The places of a closed loop's requests. Its readers share one offset, so that each place is read once.
        self._queue = os.fdopen(os.memfd_create("requests"), "r+b")

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._queue.close()

    def start(self, count: int) -> None:
        """Have what `count` clients need running, so that no load waits for it. Raises `ClientLost`.

        One client needs nothing: it is no process of its own.
        """
        while count > 1 and len(self._all) < count:
            self._all.append(_Client(self._queue.fileno()))
        _Talk(self._all, time.monotonic() + START_S).until(lambda one: one.said.ready)

    def measure(
        self,
        base_url: str,
        model: str,
        requests: Sequence[Request],
        level: Level,
        *,
        processes: int,
        deadline: float,
        on_progress: OnProgress | None = None,
        check: Callable[[], None] | None = None,
        request_timeout_s: float | None = None,
        keep: list[RequestRecord] | None = None,
        dialect: Dialect = PLAIN,
    ) -> LoadRun:
        """One load by `processes` client processes, or fewer where there is not so much to divide.

        What is not said here is as `client.run` has it. Raises `ClientLost`.
        """
        options: dict[str, Any] = {"deadline": deadline, "request_timeout_s": request_timeout_s, "dialect": dialect}
        count = min(processes, most_processes(level, len(requests)))
        if count <= 1:
            return client.measure(
                base_url, model, requests, level, on_progress=on_progress, check=check, keep=keep, **options
            )

        def look(counts: _Counts) -> None:
            if on_progress:
                on_progress(counts.done, len(requests), counts.failed)
            if check:
                check()

        parts = _parts(Part(base_url, model, requests, level, **options), count)
        return _joined(self._send(parts, len(requests), look, [] if keep is None else keep), len(requests))

    def _send(self, parts: Sequence[Part], total: int, look: Look, keep: list[RequestRecord]) -> list[LoadRun]:
        """Have the load sent, looking twice a second; what it has come to is kept, also where it is aborted."""
        self.start(len(parts))
        self._fill_queue(total)
        clients = self._all[: len(parts)]
        talk = _Talk(clients, parts[0].deadline + GRACE_S, look)
        for one in clients:  # all of them first: of the last load nothing may be taken for this one's
            one.said = _Said()
        try:
            for one, part in zip(clients, parts, strict=True):
                one.tell(part)
            talk.until(lambda one: one.said.ready)
            talk.tell(time.monotonic() + HEAD_START_S)
            talk.until(lambda one: one.said.ended)
            look(talk.counts)
        except BaseException:  # Ctrl-C too: what has been sent is handed over before anybody hears of it
            talk.stop()
            raise
        finally:
            if any(one.said.run is None for one in clients):
                self._end()
            records = [record for one in clients for record in one.said.records]
            keep.extend(sorted(records, key=lambda record: record.end_s))
        return [one.said.run for one in clients if one.said.run is not None]

    def _fill_queue(self, places: int) -> None:
        self._queue.seek(0)
        self._queue.truncate()
        self._queue.write(b"".join(map(_PLACE.pack, range(places))))
        self._queue.seek(0)

    def _end(self) -> None:
        while self._all:
            self._all.pop().end()


@dataclass(frozen=True, slots=True)
class Part:
    """What one client process is to send."""

    base_url: str
    model: str
    requests: Sequence[Request]
    """In open loop those of this process; in closed loop all, of which it takes the next one in the queue."""
    level: Level
    """With its part of the concurrency."""
    deadline: float
    request_timeout_s: float | None
    dialect: Dialect


def _parts(whole: Part, count: int) -> list[Part]:
    if whole.level.concurrency is None:
        return [replace(whole, requests=whole.requests[place::count]) for place in range(count)]
    share, rest = divmod(whole.level.concurrency, count)
    levels = [replace(whole.level, concurrency=share + (place < rest)) for place in range(count)]
    return [replace(whole, level=level) for level in levels]


def _joined(runs: Sequence[LoadRun], requests: int) -> LoadRun:
    """The parts as one load. The limit of CPU is a core's, so the busiest process counts; looks are pooled.

    Its share is one of the whole load: a process that finds the queue empty already was busy for an instant only.
    """
    busiest_s = max(run.client_cpu_share * run.duration_s for run in runs)
    duration_s = max(run.duration_s for run in runs)
    return LoadRun(
        tuple(sorted((record for run in runs for record in run.records), key=lambda record: record.index)),
        requests,
        all(run.complete for run in runs),
        runs[0].started_at,
        busiest_s / duration_s if duration_s else 0.0,
        tuple(lag for run in runs for lag in run.loop_lags_ms),
        max((run.clock_jump_s for run in runs), key=abs),
        len(runs),
    )


@dataclass
class _Said:
    """What a client has said of a load."""

    ready: bool = False
    ended: bool = False
    counts: _Counts = NONE_YET
    run: LoadRun | None = None
    records: Sequence[RequestRecord] = ()


class _Client:
    """A client process, and what it has said of the load."""

    def __init__(self, queue: int) -> None:
        self.connection, there = Pipe()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _WORK, str(there.fileno()), str(queue)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno(), queue],
                start_new_session=True,  # Ctrl-C is for the parent, which then asks for the records
            )
        self.said = _Said()

    def tell(self, word: Any) -> None:
        """Raises `ClientLost`."""
        with self._lost():
            self.connection.send(word)

    def hear(self) -> None:
        """Take in one message; raises `ClientLost`."""
        with self._lost():
            word = self.connection.recv()
        if word == READY:
            self.said.ready = True
        elif isinstance(word, _Counts):
            self.said.counts = word
        elif isinstance(word, LoadRun):
            self.said = replace(self.said, ended=True, run=word, records=word.records)
        else:
            self.said = replace(self.said, ended=True, records=word)

    def end(self) -> None:
        """End it, and wait until it has."""
        self.connection.close()
        self._process.kill()
        self._process.wait()

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.said.ended = True
            how = f"ended with exit code {self._process.wait()}"
            raise ClientLost(f"a load client {how} before it had handed over its records") from error


class _Talk:
    """What is said and heard of the clients of one load, until a moment of the monotonic clock."""

    def __init__(self, clients: Sequence[_Client], until: float, look: Look = lambda counts: None) -> None:
        self._clients = clients
        self._until = until
        self._look = look
        self._looked = time.monotonic()

    @property
    def counts(self) -> _Counts:
        """Of all clients together."""
        return _Counts(*map(sum, zip(*(one.said.counts for one in self._clients), strict=True)))

    def tell(self, word: Any) -> None:
        """Tell all of them."""
        for one in self._clients:
            one.tell(word)

    def until(self, done: Callable[[_Client], bool]) -> None:
        """Listen, looking twice a second, until `done` holds of all; raises `ClientLost`, and what a look raises."""
        while waiting := [one for one in self._clients if not done(one)]:
            self._hear(waiting)
            if time.monotonic() >= self._looked + _LOOK_S:
                self._looked = time.monotonic()
                self._look(self.counts)

    def stop(self) -> None:
        """Have those that are still at it hand over what they have; why the load has ended is known already."""
        self._until = time.monotonic() + GRACE_S
        at_it = [one for one in self._clients if not one.said.ended]
        for one in at_it:
            with suppress(ClientLost):
                one.tell(STOP)
        while waiting := [one for one in at_it if not one.said.ended]:
            with suppress(ClientLost):
                self._hear(waiting)

    def _hear(self, waiting: Sequence[_Client]) -> None:
        """Take in what is said within half a second; raises `ClientLost`, also where nothing is said for too long."""
        heard = wait([one.connection for one in waiting], _LOOK_S)
        if not heard and time.monotonic() > self._until:
            for one in waiting:
                one.said.ended = True
            raise ClientLost("a load client did not answer in time")
        for one in waiting:
            if one.connection in heard:
                one.hear()


class _Stopped(Exception):
    """The parent says so."""


def work(socket: int, queue: int) -> None:
    """Be a client process, with a socket to its parent and the file of a closed loop's places."""
    parent = Connection(socket)
    with suppress(EOFError, ConnectionError):  # the parent has ended
        parent.send(READY)
        for part in iter(parent.recv, STOP):
            parent.send(_sent(part, queue, parent))


def _sent(part: Part, queue: int, parent: Connection) -> LoadRun | list[RequestRecord]:
    """Send a part of a load; it as it went, or the records that there are once the parent says stop."""
    kept: list[RequestRecord] = []
    load = Load(part.base_url, part.model, part.requests, part.level, part.request_timeout_s, kept, part.dialect)
    parent.send(READY)
    start = parent.recv()
    if start == STOP:
        return kept

    def tell(done: int, _: int, failed: int) -> None:
        parent.send(_Counts(done, failed))

    def check() -> None:
        if parent.poll():
            parent.recv()
            raise _Stopped

    turns = None if part.level.open_loop else _next_places(queue)
    try:
        return asyncio.run(load.run(part.deadline, tell, check, start=start, turns=turns))
    except _Stopped:
        return kept


def _next_places(queue: int) -> Iterator[int]:
    while place := _read_alone(queue, _PLACE.size):
        yield _PLACE.unpack(place)[0]


def _read_alone(file: int, size: int) -> bytes:
    """Read while no other process does: the kernel moves the common offset of a memory file without a lock."""
    fcntl.lockf(file, fcntl.LOCK_EX)
    try:
        return os.read(file, size)
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN)
