"""HTTP/1.1 connections for many short requests with streamed answers: written out of hand where time is measured.

A general HTTP client wakes a coroutine for every piece that comes in, which costs more than the rest of reading a
token. Here a piece goes from the socket straight to the reader of the answer, with the time of its arrival. Only what
a load needs is understood: a POST, an answer with a length, in chunks, or until the connection closes. Proxies,
redirects and compression are not; whatever else comes in is a `BadAnswer`.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias, cast
from urllib.parse import urlsplit

from raytune_autotuner.load.stream import BadAnswer, message_in, short

_BUFFER_BYTES = 2**16
_MAX_SOCKETS = 2**16
_MAX_HEAD_BYTES = 2**16
_MAX_CHUNK_BYTES = 2**22
_MAX_SIZE_LINE_BYTES = 2**10
# Shorter than servers keep an idle connection, so that none is reused in the moment in which the server closes it.
_MAX_IDLE_S = 2.0

Feed: TypeAlias = Callable[[bytes, float], None]
"""Takes a piece of the answer's body and its arrival on `time.monotonic()`'s clock; may raise `BadAnswer`."""


class Pool:
    """Connections to one server, as many as there are requests at once, kept for the next request."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._tls = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._tls else 80)
        self._prefix, self._netloc = parts.path.rstrip("/"), parts.netloc.rpartition("@")[2]
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        _allow_sockets()

    def request(self, path: str, body: bytes) -> bytes:
        """A POST of JSON, ready to be sent."""
        lines = (
            f"POST {self._prefix}{path} HTTP/1.1",
            f"Host: {self._netloc}",
            "Accept: text/event-stream",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    async def connection(self) -> Connection:
        """An idle connection or a new one; raises `OSError`."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_fresh():
                return connection
            self._drop(connection)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self._buffer), self._host, self._port, ssl=self._tls or None
        )
        self._all.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keep it for another request, or close it where its answer was not read to the end."""
        if connection.reusable:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            self._drop(connection)

    async def close(self) -> None:
        """Close all connections, and wait until they are."""
        for connection in self._all:
            connection.abort()
        await asyncio.gather(*(connection.closed for connection in self._all))

    def _drop(self, connection: Connection) -> None:
        connection.abort()
        self._all.discard(connection)


class Connection(asyncio.BufferedProtocol):
    """One connection: a request out, its answer in. What is received lies in `buffer` for a moment only."""

    def __init__(self, buffer: memoryview) -> None:
        self.reusable = False
        """Whether the last answer was read to its end, on a connection that stays."""
        self.idle_since = 0.0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[None] | None = None
        self._buffer = buffer
        self._rest = b""
        self._take: Callable[[bytes, float], bytes] = self._take_head

    async def ask(self, request: bytes, feed: Feed) -> None:
        """Send `request` and hand the body of its answer to `feed`, piece by piece as it comes.

        Raises `BadAnswer` for any status but 200 and what is not HTTP, and what `feed` raises; `ConnectionError` where
        the connection ends before the answer.
        """
        self.reusable, self._rest = False, b""
        self._feed, self._take = feed, self._take_head
        self._refusal: tuple[int, list[bytes]] | None = None
        self._left = 0
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._ended
        finally:
            self._ended = None
        if self._refusal:
            raise BadAnswer(f"HTTP {self._refusal[0]}: {message_in(b''.join(self._refusal[1]))}")

    def is_fresh(self) -> bool:
        """Whether it can be used again without the risk that the server is just closing it."""
        return not self._transport.is_closing() and time.monotonic() - self.idle_since < _MAX_IDLE_S

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked by isinstance: the transports of uvloop, which Ray's workers run on, are of a class of their own.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, problem: Exception | None) -> None:
        if problem is None and self._take == self._take_all:
            self._end()
        self.reusable = False
        self._end(problem or ConnectionResetError("the server closed the connection before its answer was complete"))
        if not self.closed.done():
            self.closed.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came in."""
        now = time.monotonic()
        data = self._rest + self._buffer[:nbytes] if self._rest else bytes(self._buffer[:nbytes])
        if self._ended is None:
            self.abort()  # nothing was asked
            return
        try:
            self._rest = self._take(data, now)
        except BadAnswer as problem:
            self._end(problem)

    def _end(self, problem: Exception | None = None) -> None:
        if self._ended is None or self._ended.done():
            return
        if problem is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(problem)

    def _take_head(self, data: bytes, now: float) -> bytes:
        if not b"HTTP/1.".startswith(data[:7]):
            raise BadAnswer(f"not HTTP: {short(data)!r}")
        head, separator, body = data.partition(b"\r\n\r\n")
        if not separator:
            if len(data) > _MAX_HEAD_BYTES:
                raise BadAnswer(f"no end of the headers in {len(data):,} bytes")
            return data
        status, headers = _parse_head(head)
        self._keep_alive = head.startswith(b"HTTP/1.1") and headers.get(b"connection") != b"close"
        if status != 200:
            pieces: list[bytes] = []
            self._refusal, self._feed = (status, pieces), lambda piece, _: pieces.append(piece)
        self._take = self._take_length if status in (204, 304) else self._body_reader(headers)
        return self._take(body, now)

    def _body_reader(self, headers: Mapping[bytes, bytes]) -> Callable[[bytes, float], bytes]:
        if headers.get(b"transfer-encoding", b"").endswith(b"chunked"):
            return self._take_chunks
        length = headers.get(b"content-length")
        if length is None:
            return self._take_all
        if not length.isdigit():
            raise BadAnswer(f"not a length: {short(length)!r}")
        self._left = int(length)
        return self._take_length

    def _take_chunks(self, data: bytes, now: float) -> bytes:
        start = 0
        while (line_end := data.find(b"\r\n", start)) >= 0:
            size = _chunk_size(data[start:line_end])
            body, end = line_end + 2, line_end + 2 + size
            if len(data) < end + 2:
                break
            if data[end : end + 2] != b"\r\n":
                raise BadAnswer(f"not a chunk: {short(data[start : end + 2])!r}")
            if size == 0:
                self.reusable = self._keep_alive
                self._end()
                return b""
            self._feed(data[body:end], now)
            start = end + 2
        if line_end < 0 and len(data) - start > _MAX_SIZE_LINE_BYTES:
            raise BadAnswer(f"not the size of a chunk: {short(data[start:])!r}")
        return data[start:]

    def _take_length(self, data: bytes, now: float) -> bytes:
        self._left -= len(data)
        self._feed(data, now)
        if self._left <= 0:
            self.reusable = self._keep_alive and self._left == 0
            self._end()
        return b""

    def _take_all(self, data: bytes, now: float) -> bytes:
        self._feed(data, now)
        return b""


def _allow_sockets() -> None:
    """Let this process open as many sockets as it may; the usual soft limit of 1,024 is for those who use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_SOCKETS if hard == resource.RLIM_INFINITY else min(hard, _MAX_SOCKETS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _parse_head(head: bytes) -> tuple[int, dict[bytes, bytes]]:
    """(status, headers in lower case)."""
    first, *lines = head.lower().split(b"\r\n")
    words = first.split(None, 2)
    if len(words) < 2 or not words[1].isdigit():
        raise BadAnswer(f"not HTTP: {short(first)!r}")
    pairs = (line.partition(b":") for line in lines)
    return int(words[1]), {name.strip(): value.strip() for name, _, value in pairs}


def _chunk_size(line: bytes) -> int:
    try:
        size = int(line.partition(b";")[0], 16)
    except ValueError as error:
        raise BadAnswer(f"not the size of a chunk: {short(line)!r}") from error
    if not 0 <= size <= _MAX_CHUNK_BYTES:
        raise BadAnswer(f"a chunk of {size:,} bytes")
    return size
