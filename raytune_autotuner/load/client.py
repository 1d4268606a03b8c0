"""Load on a running server: requests in, one record per request out, failed ones included.

`run` (or `measure`, its blocking form) sends requests to an OpenAI-compatible `/v1/completions` and takes down when
each token arrived. It knows a base URL and a model name; nothing of engines, parameters, metrics or scores.

The client watches itself: `LoadRun.client_limited` says that its own CPU share was so high that latencies are partly
its own, and `max_loop_lag_ms` for how long it looked away at worst.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from itertools import count
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import aiohttp

from raytune_autotuner.load.workload import Level, Request
from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.errors import AutotunerError

MAX_CPU_SHARE = 0.7
"""Above this share of one core in use, tokens wait for the client: the measurement is not the engine's any more."""

_PULSE_S = 0.05
_BEATS_A_LOOK = 10
# Under load aiohttp pauses a socket whose buffer is full; its default of 64 KiB does so in the middle of answers.
_READ_BUFFER_BYTES = 2**21
# Shorter than servers keep an idle connection, so that none is reused in the moment in which the server closes it.
_KEEPALIVE_S = 2.0
_MAX_EVENT_BYTES = 2**20
_MAX_ERROR_CHARS = 200
_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}

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
    """CPU seconds of this process per second of load."""
    max_loop_lag_ms: float
    """The longest time for which the client was too busy to look at its sockets."""

    @property
    def duration_s(self) -> float:
        """Seconds from the load's start to its last request's end."""
        return max((record.end_s for record in self.records), default=0.0)

    @property
    def client_limited(self) -> bool:
        """Whether the client itself was the bottleneck: what it measured says little about the engine."""
        return self.client_cpu_share > MAX_CPU_SHARE


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
) -> LoadRun:
    """Send `requests` at `level` and wait for their answers, until `deadline` on `time.monotonic()`'s clock.

    A request that fails is a record with its error; one that is unfinished at the deadline has the error `deadline`.
    `check` and `on_progress` are called twice a second, between arrivals, so they must be quick; what `check` raises
    aborts the load and is raised here. The records made until then are also in `keep`, in the order of their ends.
    """
    bodies = [_body(model, request) for request in requests]
    async with _session(request_timeout_s) as session:
        load = _Load(session, base_url, level, [] if keep is None else keep)
        return await load.run(list(zip(requests, bodies, strict=True)), deadline, on_progress, check)


def blocking(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """The same function for a plain thread: it brings its own event loop."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return asyncio.run(function(*args, **kwargs))

    return call


measure = blocking(run)


async def completion_error(base_url: str, model: str, timeout_s: float) -> str | None:
    """Ask for one token and say what went wrong, or None where a full answer came back."""
    request = Request(0, [1000, 1001, 1002, 1003], 1)
    outcome = await run(base_url, model, [request], Level("c1", 1), deadline=time.monotonic() + timeout_s)
    return outcome.records[0].error if outcome.records else "deadline"


def completion_probe(base_url: str, model: str, timeout_s: float) -> bool:
    """Whether a real completion came back within `timeout_s`: only then is an engine ready."""
    return blocking(completion_error)(base_url, model, timeout_s) is None


def _body(model: str, request: Request) -> bytes:
    body = {
        "model": model,
        "prompt": request.prompt_token_ids,
        "max_tokens": request.tokens_out,
        "min_tokens": request.tokens_out,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body, separators=(",", ":")).encode()


def _session(request_timeout_s: float | None) -> aiohttp.ClientSession:
    """A session that opens as many connections as there are requests, and ignores proxies of the environment."""
    tracing = aiohttp.TraceConfig()
    tracing.on_request_headers_sent.append(_note_sending)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=request_timeout_s, sock_connect=request_timeout_s),
        read_bufsize=_READ_BUFFER_BYTES,
        headers=_HEADERS,
        trace_configs=[tracing],
        trust_env=False,
    )


async def _note_sending(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    """A request goes out: until then it had waited for the client, of which the engine knows nothing."""
    context.trace_request_ctx.append(time.monotonic())


class BadAnswer(AutotunerError):
    """The server answered something else than a stream of tokens; the text says what."""


class TokenStream:
    """Reads an answer's server-sent events: when tokens arrived, and the server's own counts.

    Cheap per token: an event with text in it is known by its bytes and not parsed. That is safe, since a quote inside
    JSON text is escaped, so that the marker cannot be part of what the model said. All other events are parsed.
    """

    __slots__ = ("_rest", "done", "times_s", "tokens_in", "tokens_out")

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.tokens_in: int | None = None
        self.tokens_out: int | None = None
        self.done = False
        self._rest = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Take in bytes as they came from the socket, cut anywhere; raises `BadAnswer`."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if _is_plain_token(event):
                self.times_s.append(now_s)
            else:
                self._parse(event, now_s)
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise BadAnswer(f"no event in {len(self._rest):,} bytes: {_short(self._rest)}")

    def close(self, tokens_wanted: int) -> None:
        """The answer has ended: raises `BadAnswer` where it is not a full one."""
        if self._rest.strip():
            raise BadAnswer(f"answer cut short after {_short(self._rest)!r}")
        if self.tokens_out is None:
            raise BadAnswer(f"answer cut short: no usage after {len(self.times_s)} chunks")
        if self.tokens_out != tokens_wanted:
            raise BadAnswer(f"{tokens_wanted} output tokens wanted, {self.tokens_out} answered")
        if not self.times_s:
            raise BadAnswer("no token arrived")

    def _parse(self, event: bytes, now_s: float) -> None:
        lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
        data = b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))
        if data == b"[DONE]":
            self.done = True
        elif data:
            self._take(data, now_s)
        elif lines:
            raise BadAnswer(f"not an event: {_short(event)!r}")

    def _take(self, data: bytes, now_s: float) -> None:
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise BadAnswer(f"not JSON: {_short(data)!r}") from error
        if not isinstance(chunk, dict):
            raise BadAnswer(f"not a chunk: {_short(data)!r}")
        if chunk.get("error"):
            raise BadAnswer(f"error in the stream: {_message(chunk)}")
        if chunk.get("choices"):
            self.times_s.append(now_s)
        if isinstance(usage := chunk.get("usage"), dict):
            self.tokens_in, self.tokens_out = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")


def _is_plain_token(event: bytes) -> bool:
    if b'"choices":[{' in event:
        return b'"usage":{' not in event
    return b'"choices": [{' in event and b'"usage": {' not in event


class _Load:
    """One load while it runs."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, level: Level, keep: list[RequestRecord]) -> None:
        self._session = session
        self._url = f"{base_url.rstrip('/')}/v1/completions"
        self._level = level
        self._keep = keep
        self._records: list[RequestRecord] = []
        self._failed = 0
        self._ended_by = "aborted"
        self._start = time.monotonic()

    async def run(
        self,
        pairs: Sequence[tuple[Request, bytes]],
        deadline: float,
        on_progress: OnProgress | None,
        check: Callable[[], None] | None,
    ) -> LoadRun:
        """Send everything; see the module's `run`."""

        def look() -> None:
            if on_progress:
                on_progress(len(self._records), len(pairs), self._failed)
            if check:
                check()

        pulse = _Pulse(look)
        started_at, cpu_s = time.time(), time.process_time()
        self._start = time.monotonic()
        complete = time.monotonic() < deadline and await self._drive(self._sender(pairs), pulse, deadline)
        cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - self._start
        if on_progress:
            on_progress(len(self._records), len(pairs), self._failed)
        records = tuple(sorted(self._records, key=lambda record: record.index))
        return LoadRun(records, len(pairs), complete, started_at, cpu_s / wall_s, pulse.max_lag_s * 1e3)

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

    def _sender(self, pairs: Sequence[tuple[Request, bytes]]) -> Coroutine[Any, Any, None]:
        return self._closed_loop(pairs) if self._level.rate_rps is None else self._open_loop(pairs)

    async def _closed_loop(self, pairs: Sequence[tuple[Request, bytes]]) -> None:
        queue = iter(pairs)

        async def send_in_turn() -> None:
            for request, body in queue:
                await self._send(request, body)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._level.concurrency or 1, len(pairs))):
                group.create_task(send_in_turn())

    async def _open_loop(self, pairs: Sequence[tuple[Request, bytes]]) -> None:
        async with asyncio.TaskGroup() as group:
            for request, body in pairs:
                await asyncio.sleep(max(request.scheduled_s - self._now(), 0.0))
                group.create_task(self._send(request, body, request.scheduled_s))

    def _now(self) -> float:
        return time.monotonic() - self._start

    async def _send(self, request: Request, body: bytes, scheduled_s: float | None = None) -> None:
        """Send one request, due now or since `scheduled_s`, and keep its record, whatever becomes of it."""
        stream = TokenStream()
        sendings = [time.monotonic()]
        error: str | None = self._ended_by
        try:
            error = await self._answer(request, body, stream, sendings)
        except asyncio.CancelledError:
            error = self._ended_by
            raise
        except TimeoutError:
            error = f"request timeout after {time.monotonic() - sendings[0]:.1f} s"
        except (aiohttp.ClientError, OSError) as problem:
            error = _short(f"{type(problem).__name__}: {problem}")
        finally:
            sent_s = sendings[-1] - self._start
            self._record(request, stream, sent_s if scheduled_s is None else scheduled_s, sent_s, error)

    async def _answer(self, request: Request, body: bytes, stream: TokenStream, sendings: list[float]) -> str | None:
        """Read the whole answer into `stream`, the sending's time into `sendings`; returns what is wrong with it."""
        async with self._session.post(self._url, data=body, trace_request_ctx=sendings) as response:
            if response.status != 200:
                return f"HTTP {response.status}: {_message_in(await response.content.read(65_536))}"
            read, feed, now = response.content.readany, stream.feed, time.monotonic
            try:
                while data := await read():
                    feed(data, now() - self._start)
                stream.close(request.tokens_out)
            except BadAnswer as problem:
                response.close()
                return _short(str(problem))
        return None

    def _record(
        self, request: Request, stream: TokenStream, scheduled_s: float, sent_s: float, error: str | None
    ) -> None:
        record = RequestRecord(
            index=request.index,
            level=self._level.label,
            round=request.round,
            phase=request.phase,
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            first_token_s=stream.times_s[0] if stream.times_s else None,
            end_s=self._now(),
            token_times_s=tuple(stream.times_s),
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
        self.max_lag_s = 0.0

    async def run(self) -> None:
        """Beat until cancelled; raises what `look` raises."""
        now = time.monotonic()
        for beat in count(1):
            due = now + _PULSE_S
            await asyncio.sleep(due - time.monotonic())
            now = time.monotonic()
            self.max_lag_s = max(self.max_lag_s, now - due)
            if beat % _BEATS_A_LOOK == 0:
                self._look()


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel and wait until they are gone; a task's own exception stays in it."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) else None


def _message_in(body: bytes) -> str:
    """What a refusal says: the error message in its JSON, else its text."""
    with suppress(ValueError):
        parsed = json.loads(body)
        if isinstance(parsed, dict):
            return _message(parsed)
    return _short(body)


def _message(chunk: dict[str, Any]) -> str:
    error = chunk.get("error", chunk)
    return _short(str(error.get("message", error) if isinstance(error, dict) else error))


def _short(text: bytes | str) -> str:
    """One line of at most 200 characters."""
    shown = text[: 4 * _MAX_ERROR_CHARS].decode(errors="replace") if isinstance(text, bytes) else text
    return " ".join(shown.split())[:_MAX_ERROR_CHARS]
