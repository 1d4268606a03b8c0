"""Load on a running server: requests in, one record per request out, failed ones included.

`run` (or `measure`, its blocking form) sends requests to an OpenAI-compatible server and takes down when each token
arrived. It knows a base URL and a model name; nothing of engines, parameters, metrics or scores. It is one process;
`spread` has several of them send one load.

The client watches itself: `LoadRun.trouble` says why a load is no measurement, though all of its requests may have been
answered: the client had no time for its sockets, or the clock jumped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from typing import Any, ParamSpec, TypeVar

from raytune_autotuner.load.connection import Pool
from raytune_autotuner.load.dialect import Dialect
from raytune_autotuner.load.stream import BadAnswer, TokenStream, short
from raytune_autotuner.load.trouble import LOOK_S, Clocks, Trouble, find_trouble
from raytune_autotuner.load.workload import Level, Request
from raytune_autotuner.score.records import RequestRecord

PLAIN = Dialect()
_BEATS_A_LOOK = 10

OnProgress = Callable[[int, int, int], None]
"""Called with (requests done, requests in all, requests failed)."""
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadRun:
    """One load as it went."""

    records: tuple[RequestRecord, ...] = field(repr=False)  # Python 3.11's asyncio.run makes the repr of every result
    """By request index; those that were never sent, because the deadline came first, are left out."""
    requests: int
    """How many requests the load had."""
    complete: bool
    """Whether all requests ended before the deadline."""
    started_at: float
    """When the records' clock started, in seconds since the epoch."""
    client_cpu_share: float
    """CPU seconds of the client per second of load; of several processes, those of the busiest."""
    loop_lags_ms: tuple[float, ...] = field(default=(), repr=False)
    """How late the client looked at its sockets, asked every 50 ms; empty where the client does not tell."""
    clock_jump_s: float = 0.0
    """How much further the wall clock went than the monotonic one, from the load's start to its end."""
    processes: int = 1
    """How many client processes sent it."""

    @property
    def duration_s(self) -> float:
        """Seconds from the load's start to its last request's end."""
        return max((record.end_s for record in self.records), default=0.0)

    @property
    def trouble(self) -> Trouble | None:
        """Why this load says little about the engine, or None."""
        return find_trouble(self.records, self.client_cpu_share, self.loop_lags_ms, self.clock_jump_s, self.processes)


async def run(
    base_url: str,
    model: str,
    requests: Sequence[Request],
    level: Level,
    *,
    deadline: float,
    on_progress: OnProgress | None = None,
    check: Callable[[], None] | None = None,
    request_timeout_s: float | None = None,
    keep: list[RequestRecord] | None = None,
    dialect: Dialect = PLAIN,
) -> LoadRun:
    """Send `requests` at `level` and wait for their answers, until `deadline` on `time.monotonic()`'s clock.

    A request that fails is a record with its error; one that is unfinished at the deadline has the error `deadline`.
    `check` and `on_progress` are called twice a second, between arrivals, so they must be quick; what `check` raises
    aborts the load and is raised here. The records made until then are also in `keep`, in the order of their ends.
    """
    load = Load(base_url, model, requests, level, request_timeout_s, keep, dialect)
    return await load.run(deadline, on_progress, check)


def blocking(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """The same function for a plain thread: it brings its own event loop."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return asyncio.run(function(*args, **kwargs))

    return call


measure = blocking(run)


async def _completion_error(base_url: str, model: str, timeout_s: float, dialect: Dialect = PLAIN) -> str | None:
    """Ask for one token and say what went wrong, or None where a full answer came back."""
    request, until = Request(0, [1000, 1001, 1002, 1003], 1), time.monotonic() + timeout_s
    outcome = await run(base_url, model, [request], Level("c1", 1), deadline=until, dialect=dialect)
    return outcome.records[0].error if outcome.records else "deadline"


completion_error = blocking(_completion_error)


class Load:
    """One load, its requests made and not yet sent; `run` sends them, once."""

    def __init__(
        self,
        base_url: str,
        model: str,
        requests: Sequence[Request],
        level: Level,
        request_timeout_s: float | None = None,
        keep: list[RequestRecord] | None = None,
        dialect: Dialect = PLAIN,
    ) -> None:
        self._pool = Pool(base_url)
        self._pairs = [
            (request, self._pool.request(dialect.path, dialect.body(model, request))) for request in requests
        ]
        self._level = level
        self._timeout_s = request_timeout_s
        self._keep = [] if keep is None else keep
        self._dialect = dialect
        self._records: list[RequestRecord] = []
        self._failed = 0
        self._ended_by = "aborted"
        self._start = 0.0

    async def run(
        self,
        deadline: float,
        on_progress: OnProgress | None = None,
        check: Callable[[], None] | None = None,
        *,
        start: float | None = None,
        turns: Iterable[int] | None = None,
    ) -> LoadRun:
        """Send everything; see the module's `run`.

        The load begins at `start` on `time.monotonic()`'s clock, or at once. In closed loop `turns` says which request
        is the next, as a place among the requests; it is asked whenever there is room for one.
        """

        def look() -> None:
            if on_progress:
                on_progress(len(self._records), len(self._pairs), self._failed)
            if check:
                check()

        if start is not None:
            await asyncio.sleep(max(start - time.monotonic(), 0.0))
        pulse = _Pulse(look)
        clocks, cpu_s, begun = Clocks.now(), time.process_time(), time.monotonic()
        self._start = begun if start is None else start
        try:
            complete = begun < deadline and await self._drive(self._sender(turns), pulse, deadline)
            cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - begun
        finally:
            await self._pool.close()
        if on_progress:
            on_progress(len(self._records), len(self._pairs), self._failed)
        return LoadRun(
            tuple(sorted(self._records, key=lambda record: record.index)),
            len(self._pairs),
            complete,
            clocks.wall_s + self._start - clocks.monotonic_s,
            cpu_s / wall_s,
            tuple(pulse.lags_ms),
            clocks.jump_s(Clocks.now()),
        )

    async def _drive(self, sender: Coroutine[Any, Any, None], pulse: _Pulse, deadline: float) -> bool:
        """Run the sender beside the pulse until one ends or the deadline comes; whether all was sent and answered."""
        sending, beating = asyncio.create_task(sender), asyncio.create_task(pulse.run())
        try:
            timeout_s = max(deadline - time.monotonic(), 0.0)
            await asyncio.wait({sending, beating}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            complete = sending.done()
            if not complete and not beating.done():
                self._ended_by = "deadline"
        finally:
            await _cancel(sending, beating)
        for task in (beating, sending):
            if not task.cancelled() and (error := task.exception()):
                raise error
        return complete

    def _sender(self, turns: Iterable[int] | None) -> Coroutine[Any, Any, None]:
        if self._level.open_loop:
            return self._open_loop()
        return self._closed_loop(iter(range(len(self._pairs)) if turns is None else turns))

    async def _closed_loop(self, turns: Iterator[int]) -> None:
        async def send_in_turn() -> None:
            for place in turns:
                await self._send(*self._pairs[place])

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._level.concurrency or 1, len(self._pairs))):
                group.create_task(send_in_turn())

    async def _open_loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            for request, data in self._pairs:
                if (early_s := request.scheduled_s - self._now()) > 0:
                    await asyncio.sleep(early_s)
                group.create_task(self._send(request, data, request.scheduled_s))

    def _now(self) -> float:
        return time.monotonic() - self._start

    async def _send(self, request: Request, data: bytes, scheduled_s: float | None = None) -> None:
        """Send one request, due since `scheduled_s` or just now, and keep its record, whatever becomes of it."""
        stream = TokenStream()
        sendings = [time.monotonic()]
        error: str | None = self._ended_by
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._answer(data, stream, sendings)
            stream.close(request.tokens_out, self._dialect.exact, self._dialect.tokens_sent(request))
            error = None
        except asyncio.CancelledError:
            error = self._ended_by
            raise
        except TimeoutError:
            error = f"request timeout after {time.monotonic() - sendings[0]:.1f} s"
        except OSError as problem:
            error = short(f"{type(problem).__name__}: {problem}")
        except BadAnswer as problem:
            error = short(str(problem))
        finally:
            due_s = sendings[0] - self._start if scheduled_s is None else scheduled_s
            self._record(request, stream, due_s, sendings[-1] - self._start, error)

    async def _answer(self, data: bytes, stream: TokenStream, sendings: list[float]) -> None:
        """Read the whole answer into `stream`.

        Its sending is noted in `sendings` once there is a connection: until then the request waits for the client, of
        which the engine knows nothing.
        """
        connection = await self._pool.connection()
        try:
            sendings.append(time.monotonic())
            await connection.ask(data, stream.feed)
        finally:
            self._pool.give_back(connection)

    def _record(
        self, request: Request, stream: TokenStream, scheduled_s: float, sent_s: float, error: str | None
    ) -> None:
        times_s = tuple(time_s - self._start for time_s in stream.times_s)
        record = RequestRecord(
            index=request.index,
            level=self._level.label,
            round=request.round,
            phase=request.phase,
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            first_token_s=times_s[0] if times_s else None,
            end_s=self._now(),
            token_times_s=times_s,
            tokens_in=stream.tokens_in,
            tokens_out=stream.tokens_out,
            tokens_out_wanted=request.tokens_out,
            error=error,
        )
        self._failed += error is not None
        self._records.append(record)
        self._keep.append(record)


class _Pulse:
    """A steady beat in the event loop: how late it comes is the client's lag; every half second it calls `look`."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self.lags_ms: list[float] = []

    async def run(self) -> None:
        """Beat until cancelled; raises what `look` raises."""
        now = time.monotonic()
        for beat in count(1):
            due = now + LOOK_S
            await asyncio.sleep(due - time.monotonic())
            now = time.monotonic()
            self.lags_ms.append(max(now - due, 0.0) * 1e3)
            if beat % _BEATS_A_LOOK == 0:
                self._look()


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel and wait until they are gone; a task's own exception stays in it."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
