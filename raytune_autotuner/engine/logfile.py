"""The engine's log as it is written: what an engine prints, as stamped lines in a file of bounded size.

Each line becomes `2026-11-23T00:31:22.123Z [weights] ` (UTC, stage reached) and the line itself. Progress bars that
rewrite their line with carriage returns become one line per state; blank lines are left out.

A log keeps its head and its tail. The first half of the limit stays in `engine.log`; what follows goes to
`engine.tail.log`, which at a quarter of the limit becomes `engine.tail.1.log` in place of the one before it.
`log_parts` names the files in reading order. A disk that is full costs lines, never the engine. Secrets are masked.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from raytune_autotuner.engine.reading import LogReader, LogRules
from raytune_autotuner.study.masking import mask

_FIGURES_READ = "GET /metrics"
MAX_LINE_BYTES = 16_384
_MARGIN = 4_096
"""Bytes of a longer line that are kept until it is masked: half a secret is not known any more."""
_KEPT = MAX_LINE_BYTES + _MARGIN
PARTIAL_LINE_S = 1.0
"""After so long a line that has begun is written though it has not ended."""
_CHUNK = 65_536
_BREAKS = re.compile(rb"[\r\n]+")
# Whatever some reader takes for a line's end or a terminal for a command, tab and escape (colours) excepted.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1a\x1c-\x1f\x7f\x85\u2028\u2029]")


class LineSplitter:
    """Bytes in, whole lines out. A line beyond `MAX_LINE_BYTES` is cut, and says by how much."""

    def __init__(self) -> None:
        self._partial = b""
        self._cut = 0

    @property
    def pending(self) -> bool:
        """Whether a line has begun that has not ended yet."""
        return bool(self._partial)

    def feed(self, data: bytes) -> list[str]:
        """The lines that `data` completes."""
        *whole, self._partial = _BREAKS.split(self._partial + data)
        lines = [self._text(line) for line in whole if line.strip()]
        self._cut += max(len(self._partial) - _KEPT, 0)
        self._partial = self._partial[:_KEPT]
        return lines

    def flush(self) -> list[str]:
        """The line that has begun, as if it had ended."""
        return self.feed(b"\n")

    def _text(self, line: bytes) -> str:
        cut, self._cut = self._cut + max(len(line) - MAX_LINE_BYTES, 0), 0
        text = _CONTROL.sub("\ufffd", _shortened(line[:_KEPT]).decode(errors="replace"))
        return f"{text} [{cut} bytes cut]" if cut else text


def _shortened(line: bytes) -> bytes:
    """What is kept of a line, masked before it is cut; its end, which may be half a secret, goes in any case."""
    beyond = len(line) - MAX_LINE_BYTES
    if beyond <= 0:
        return line
    masked = mask(line.decode(errors="replace")).encode()
    return masked[: min(max(len(masked) - beyond, 0), MAX_LINE_BYTES)]


def stamp(epoch_s: float, stage: str) -> str:
    """The prefix of a line: `2026-11-23T00:31:22.123Z [weights] `."""
    seconds, millis = divmod(int(epoch_s * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{millis:03d}Z [{stage}] "


def _tails(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(f".tail.1{path.suffix}"), path.with_suffix(f".tail{path.suffix}")


def log_parts(path: Path) -> list[Path]:
    """The files of the log at `path` that exist, in reading order: head, older tail, newer tail."""
    return [part for part in (path, *_tails(path)) if part.exists()]


def read_log(path: Path) -> Iterator[str]:
    """The lines of all parts of the log at `path`, without their ends. A log that does not exist has none."""
    for part in log_parts(path):
        with part.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                yield line.rstrip("\n")


class StampedLog:
    """A log being written by file descriptor, bounded by `limit_bytes` over all its parts."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._head = path
        self._current = path
        self._limit = limit_bytes
        self._size = 0
        self._torn = False
        self._lost = 0
        self._fd: int | None = None
        self._open()

    def write(self, lines: Iterable[tuple[str, str]]) -> None:
        """Append (stage, line) pairs, stamped with the present time."""
        now, chunk = time.time(), bytearray()
        for stage, line in lines:
            entry = f"{stamp(now, stage)}{mask(line)}\n".encode()
            if self._size + len(chunk) + len(entry) > self._part_limit:
                self._append(chunk)
                chunk = bytearray()
                self._turn(stage)
            chunk += entry
        self._append(chunk)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def _part_limit(self) -> int:
        return self._limit // 2 if self._current == self._head else self._limit // 4

    def _open(self) -> None:
        try:
            self._fd = os.open(self._current, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = os.fstat(self._fd).st_size
        except OSError:
            self._size = 0

    def _turn(self, stage: str) -> None:
        older, newer = _tails(self._head)
        if self._current == self._head:
            note = f"[raytune_autotuner] the log limit is reached; the newest lines are in {newer.name}"
            self._append(f"{stamp(time.time(), stage)}{note}\n".encode())
        else:
            with suppress(OSError):
                newer.replace(older)
        self.close()
        self._current = newer
        self._open()

    def _append(self, data: bytes | bytearray) -> None:
        if not data:
            return
        done = self._write(self._note_of_loss() + bytes(data))
        self._lost = 0 if done else self._lost + data.count(b"\n")

    def _note_of_loss(self) -> bytes:
        line_end = b"\n" if self._torn else b""
        if not self._lost:
            return line_end
        note = f"[raytune_autotuner] about {self._lost} lines could not be written here"
        return line_end + f"{stamp(time.time(), '-')}{note}\n".encode()

    def _write(self, data: bytes) -> bool:
        if self._fd is None:
            self._open()
        done = 0
        try:
            while self._fd is not None and done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError:
            self._torn = self._torn or done > 0
        self._size += done
        complete = done == len(data)
        self._torn = self._torn and not complete
        return complete


class Pump:
    """The engine's output, from its pipe into its log, line by line through the reader that knows the stage."""

    def __init__(self, pipe: int, log: StampedLog, rules: LogRules) -> None:
        os.set_blocking(pipe, False)
        self.pipe = pipe
        self.open = True
        self.lines = 0
        self.reader = LogReader(rules)
        self._log = log
        self._splitter = LineSplitter()
        self._partial_since = 0.0

    @property
    def pending(self) -> bool:
        """Whether a line has begun that has not ended yet."""
        return self._splitter.pending

    def read(self) -> bool:
        """Move one chunk; whether there was one."""
        try:
            data = os.read(self.pipe, _CHUNK)
        except BlockingIOError:
            return False
        self.open = bool(data)
        begun = self._splitter.pending
        lines = self._splitter.feed(data)
        if lines or not begun:
            self._partial_since = time.monotonic()
        self._write(lines)
        return self.open

    def flush_old_partial(self, age_s: float = PARTIAL_LINE_S) -> None:
        """Write a line that has begun `age_s` ago and has not ended."""
        if self._splitter.pending and time.monotonic() - self._partial_since >= age_s:
            self._write(self._splitter.flush())

    def drain(self, limit_s: float = 1.0) -> None:
        """Write all that is there now, the unfinished line too; at most for `limit_s`, for a writer may go on."""
        until = time.monotonic() + limit_s
        while self.open and self.read() and time.monotonic() < until:
            pass
        self.flush_old_partial(0.0)

    def close(self) -> None:
        """Close pipe and log."""
        os.close(self.pipe)
        self._log.close()

    def _write(self, lines: list[str]) -> None:
        self._log.write(list(self._staged(lines)))

    def _staged(self, lines: list[str]) -> Iterator[tuple[str, str]]:
        for line in lines:
            self.reader.feed(line)
            # A front end goes on answering whoever reads its figures while the engine behind it hangs.
            self.lines += _FIGURES_READ not in line
            yield str(self.reader.stage), line
