"""The logs of a study run: written line by line, read back in order.

A line is `2026-11-23T00:31:22.123Z [stage] text`; in the study's aggregate log `... trial 3 [stage] text`, and
`... study text` where no trial is meant. `LogWriter` writes by file descriptor, each line in one append, so that
several processes may share a file. `read_log` gives history first, then what comes, every line once.
"""

from __future__ import annotations

import heapq
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from pathlib import Path
from typing import Literal

from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.runs import folders_of, keep_fresh
from raytune_autotuner.report.status import read_status
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.masking import mask

Which = Literal["trial", "engine", "load"]
POLL_S = 0.2
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def stamp(at: datetime | None = None) -> str:
    """UTC with milliseconds: `2026-11-23T00:31:22.123Z`; now unless given."""
    at = (at or datetime.now(UTC)).astimezone(UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03d}Z"


class LogWriter:
    """Appends stamped lines to one log file; close it, or use it as a context manager.

    A disk that is full costs lines, never a trial or a study.
    """

    def __init__(self, path: Path) -> None:
        self._file = -1
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, stage: Stage | None, text: str, trial: int | None = None) -> None:
        """Append `text`, every line of it stamped; in the aggregate log with the number of its `trial`."""
        who = "" if trial is None else f"trial {trial} "
        where = f"[{stage}] " if stage else ""
        self._append(f"{who}{where}", text)

    def write_study(self, text: str) -> None:
        """Append a line that is about no trial in particular."""
        self._append("study ", text)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, prefix: str, text: str) -> None:
        head = f"{stamp()} {prefix}"
        lines = mask(text).splitlines() or [""]
        with suppress(OSError):
            os.write(self._file, "".join(f"{head}{line}\n" for line in lines).encode("utf-8", "replace"))


def read_log(
    folder: ResultsFolder,
    trial: int | None = None,
    which: Which = "trial",
    *,
    since: datetime | str | None = None,
    follow: bool = False,
) -> Iterator[str]:
    """Lines of the study's log, or of one of a trial's logs, without line ends; `follow` until the study has ended.

    Of an engine over several nodes those of all its ranks, each line with its rank.
    `since` is a time, or text that `parse_since` reads. Raises `ConfigError` where there is no such trial or log.
    """
    path = _log_path(folder, trial, which)
    if not follow and not path.is_file():
        raise ConfigError(_missing(folder, path))
    lines = follow_lines(path, _study_ended(folder, trial)) if follow else _history(path)
    since = parse_since(since) if isinstance(since, str) else since
    return (mask(line) for line in _after(lines, since))


def parse_since(text: str, now: datetime | None = None) -> datetime:
    """A point in time from `10m` (before now) or ISO text (UTC unless it says otherwise); raises `ConfigError`."""
    if ago := _AGO.fullmatch(text.strip()):
        return (now or datetime.now(UTC)) - timedelta(seconds=float(ago[1]) * _SECONDS[ago[2]])
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise ConfigError(f"--since {text!r}: write 90s, 10m, 2h, 1d or a time such as 2026-11-23T00:31.") from error
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def follow_lines(path: Path, ended: Callable[[], bool]) -> Iterator[str]:
    """Lines that are there, then those that come, until `ended` says so; what was written before that is still read."""
    with closing(_Ranks(path)) as tail:
        over = False
        while not over:
            over = ended()
            yield from tail.read(last=over)
            if not over:
                time.sleep(POLL_S)


def _history(path: Path) -> Iterator[str]:
    with closing(_Ranks(path)) as tail:
        yield from tail.read(last=True)


def _part_names(path: Path) -> tuple[Path, ...]:
    """The files that may make up a log, oldest lines first: its head, and where it outgrew its limit, its tail."""
    return path, path.with_suffix(f".tail.1{path.suffix}"), path.with_suffix(f".tail{path.suffix}")


class _Part:
    """One file of a log, open from its first reading on: so a rename or a removal loses nothing of it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.inode = os.fstat(self._file.fileno()).st_ino
        self._rest = b""

    def lines(self, last: bool) -> Iterator[str]:
        """The lines that are new and whole; the `last` time also one without a line end."""
        for chunk in self._file:
            self._rest += chunk
            if self._rest.endswith(b"\n"):
                line, self._rest = self._rest, b""
                yield _text(line)
        if last and self._rest:
            line, self._rest = self._rest, b""
            yield _text(line)

    def close(self) -> None:
        self._file.close()


class _Tail:
    """A growing, turning log, read from where the last reading ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: list[_Part] = []

    def read(self, last: bool = False) -> Iterator[str]:
        """The lines that are new, in the order in which they were written."""
        before, self._parts = self._parts, self._reopen()
        for part in before:
            if part not in self._parts:  # turned away since: what is left of it comes first
                yield from part.lines(last=True)
                part.close()
        for part in self._parts:
            yield from part.lines(last=last or part is not self._parts[-1])

    def close(self) -> None:
        for part in self._parts:
            part.close()
        self._parts = []

    def _reopen(self) -> list[_Part]:
        """The present parts, oldest first; one that was open before stays as it is."""
        known = {part.inode: part for part in self._parts}
        found: dict[int, _Part] = {}
        for path in reversed(_part_names(self._path)):  # newest first, so that a turn meanwhile hides none
            with suppress(FileNotFoundError):
                part = _Part(path)
                if part.inode in known or part.inode in found:
                    part.close()
                found.setdefault(part.inode, known.get(part.inode, part))
        return list(reversed(found.values()))


class _Ranks:
    """A log and those beside it of an engine's further ranks (`engine-1.log`), as one, in the order of time.

    Where there are several, each line says whose it is, after its stamp.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tails = {0: _Tail(path)}

    def read(self, last: bool = False) -> Iterator[str]:
        """The lines that are new."""
        for number, path in _further_ranks(self._path):
            if number not in self._tails:
                self._tails[number] = _Tail(path)
        if len(self._tails) == 1:
            return self._tails[0].read(last)
        parts = [_stamped(tail.read(last), f"rank {number} ") for number, tail in sorted(self._tails.items())]
        return (line for _, line in heapq.merge(*parts, key=itemgetter(0)))

    def close(self) -> None:
        for tail in self._tails.values():
            tail.close()


def _further_ranks(path: Path) -> Iterator[tuple[int, Path]]:
    name = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    for entry in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        if found := name.fullmatch(entry.name):
            yield int(found[1]), entry


def _stamped(lines: Iterator[str], who: str) -> Iterator[tuple[str, str]]:
    """Each line with its stamp, or that of the line before it, and with `who` after its own."""
    at = ""
    for line in lines:
        found = _STAMP.match(line)
        at = found[0] if found else at
        yield at, f"{at} {who}{line[len(at) :].lstrip()}" if found else f"{who}{line}"


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r\n")


def _log_path(folder: ResultsFolder, trial: int | None, which: Which) -> Path:
    if trial is not None:
        return folder.find_trial_dir(trial) / f"{which}.log"
    if which != "trial":
        raise ConfigError(f"--{which} is a trial's log: name the trial too, such as `logs {folder.place} 3 --{which}`.")
    return folder.study_log


def _missing(folder: ResultsFolder, path: Path) -> str:
    there = sorted(entry.name for entry in path.parent.glob("*.log"))
    name = path if folder.store is None else folder.store / str(path.relative_to(folder.path))
    return f"{name}: there is no such log (yet). There: {', '.join(there) or 'no log at all'}."


def _study_ended(folder: ResultsFolder, trial: int | None) -> Callable[[], bool]:
    refresh = keep_fresh(folder, folders_of(trial))

    def ended() -> bool:
        refresh()
        status = read_status(folder)
        return status is not None and not status.driver_alive

    return ended


def _after(lines: Iterator[str], since: datetime | None) -> Iterator[str]:
    """The lines stamped at `since` or later; one without a stamp belongs to the line before it."""
    first = "" if since is None else stamp(since)
    shown = since is None
    for line in lines:
        if found := _STAMP.match(line):
            shown = found[0] >= first
        if shown:
            yield line
