"""Processes of this machine: who lives, who descends from whom, who carries a trial's mark; locks between studies.

Clean-up goes by mark, never by name: each process of a trial carries `RAYTUNE_AUTOTUNER_MARK` in its environment, and
the mark says which process owns the trial. A process of a living owner is never touched by `sweep_orphans`.
Standard library only, Linux only: the supervisor imports this in milliseconds. Knows nothing of engines.

Limit: a process that was started with an emptied environment carries no mark. The supervisor, which goes by descent,
still ends it; only after the supervisor's own violent death would it stay.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from raytune_autotuner.engine.scratch import remove_orphans
from raytune_autotuner.study.errors import ConfigError, TrialFailed
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage

MARK_VARIABLE = "RAYTUNE_AUTOTUNER_MARK"
PORTS = range(20_000, 30_000)
"""Below Linux's range for outgoing connections, and clear of Ray's worker ports."""
SWEEP_LIMIT_S = 10.0
_SWEEP_PAUSE_S = 0.01
_PORT_TRIES = 500
# What Python, torch and NCCL make there; a model that somebody keeps in /dev/shm is none of it.
_SEGMENT = re.compile(r" (/dev/shm/(?:psm_|sem\.mp-|torch_|nccl-)[^/\s]+)$")
_PIDFD = hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")


class _Stat(NamedTuple):
    state: str
    parent: int
    start_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return _Stat(fields[0].decode(), int(fields[1]), int(fields[19])) if len(fields) > 19 else None


@dataclass(frozen=True, slots=True)
class Process:
    """A process for good: its pid and the clock tick (since boot) at which it started, so a reused pid is another."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has `pid` now; None where there is none."""
        found = _stat(pid)
        return None if found is None else cls(pid, found.start_ticks)

    @classmethod
    def current(cls) -> Process:
        """The calling process."""
        found = cls.of(os.getpid())
        if found is None:
            raise ConfigError("/proc is not readable, but the autotuner needs it to watch over engine processes.")
        return found

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        found = _stat(self.pid)
        return found is not None and found.start_ticks == self.start_ticks and found.state not in "ZX"

    def send(self, number: int) -> bool:
        """Signal this process and no later one with its pid; False where it is gone or not ours to signal."""
        handle = open_pidfd(self.pid)
        try:
            if not self.alive:
                return False
            if handle is None:
                os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(handle, number)
        except (ProcessLookupError, PermissionError):
            return False
        finally:
            if handle is not None:
                os.close(handle)
        return True

    def kill(self) -> bool:
        """SIGKILL; False where it is gone already."""
        return self.send(signal.SIGKILL)


def open_pidfd(pid: int) -> int | None:
    """A descriptor that turns readable when `pid` ends; None where it ended or this Python or kernel has no such."""
    if not _PIDFD:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(pid: int) -> list[Process]:
    """Living processes below `pid`, nearest first; `pid` itself is not among them."""
    children: dict[int, list[tuple[Process, str]]] = {}
    for child in _pids():
        found = _stat(child)
        if found is not None:
            children.setdefault(found.parent, []).append((Process(child, found.start_ticks), found.state))
    below, frontier = [], [pid]
    for parent in frontier:
        for process, state in children.get(parent, ()):
            frontier.append(process.pid)
            if state not in "ZX":
                below.append(process)
    return below


# Marks


def _namespace() -> str:
    """The pid namespace: pids in a mark mean nothing outside it, as when a host sees the processes of a container."""
    return str(os.stat("/proc/self/ns/pid").st_ino)


def make_mark(run_id: str, trial_id: str, owner: Process | None = None) -> str:
    """The mark of a trial's processes; `owner` (default: the calling process) is who has to live for them to live.

    `pid namespace:owner's pid:owner's start tick:run:trial`
    """
    owner = owner or Process.current()
    text = f"{_namespace()}:{owner.pid}:{owner.start_ticks}:{run_id}:{trial_id}"
    return re.sub(r"[^\x21-\x7e]", "_", text)


def _is_orphaned(mark: str) -> bool:
    parts = mark.split(":")
    if len(parts) < 5 or parts[0] != _namespace() or not (parts[1].isdigit() and parts[2].isdigit()):
        return False
    return not Process(int(parts[1]), int(parts[2])).alive


def _mark_of(pid: int) -> str | None:
    prefix = MARK_VARIABLE.encode() + b"="
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return None
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return None
    return next((entry[len(prefix) :].decode(errors="replace") for entry in entries if entry.startswith(prefix)), None)


def _find(wanted: Callable[[str], bool]) -> list[tuple[Process, str]]:
    found = []
    for pid in _pids():
        process = Process.of(pid)
        mark = None if process is None or pid == os.getpid() else _mark_of(pid)
        if process is not None and mark is not None and wanted(mark) and process.alive:
            found.append((process, mark))
    return found


def _sweep(wanted: Callable[[str], bool]) -> list[tuple[int, str]]:
    killed: dict[Process, str] = {}
    segments: set[Path] = set()
    until = time.monotonic() + SWEEP_LIMIT_S
    while (found := _find(wanted)) and time.monotonic() < until:
        segments |= shared_memory([process.pid for process, _ in found])
        killed.update({process: mark for process, mark in found if process.kill()})
        time.sleep(_SWEEP_PAUSE_S)
    free_shared_memory(segments)
    return [(process.pid, mark) for process, mark in killed.items()]


def marked(mark: str) -> list[Process]:
    """Living processes of this user that carry exactly `mark`; the calling process is never among them."""
    return [process for process, _ in _find(mark.__eq__)]


def sweep(mark: str) -> list[int]:
    """SIGKILL every process that carries exactly `mark`, until none is found (at most `SWEEP_LIMIT_S`); their pids."""
    return [pid for pid, _ in _sweep(mark.__eq__)]


def sweep_orphans() -> list[tuple[int, str]]:
    """SIGKILL this user's marked processes whose owner no longer lives; (pid, mark) of each. Their files go, too.

    Called at a trial's start, at the study's end and by `clean`. What belongs to a living owner stays.
    """
    ended = _sweep(_is_orphaned)
    remove_orphans(os.environ)
    return ended


# Shared memory


def shared_memory(pids: Iterable[int]) -> set[Path]:
    """The named shared memory segments and semaphores that the processes `pids` have in use."""
    return {path for pid in pids for path in _mapped(pid)}


def _mapped(pid: int) -> set[Path]:
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            return {Path(found[1]) for line in maps if (found := _SEGMENT.search(line))}
    except OSError:
        return set()


def free_shared_memory(segments: set[Path]) -> int:
    """Remove those of `segments` that no living process uses any more; the bytes that this gave back.

    Whoever is ended by SIGKILL does not remove its segments, and they hold memory until the machine's next start.
    """
    left = {path for path in segments if path.exists()}
    left -= shared_memory(_pids()) if left else set()
    freed = 0
    for path in left:
        with suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    return freed


# Locks


def state_dir() -> Path:
    """Where this user's locks are, one folder for the whole machine.

    It is fixed, not taken from the environment: two studies must meet at the same locks also when one runs in a login
    session and the other under cron, and the folder of a login session goes away at logout.
    """
    path = Path("/tmp") / f"raytune_autotuner-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ConfigError(f"{path} must be a folder of the user that runs the study, but it is another's. Remove it.")
    return path


class FileLock:
    """An exclusive lock among this user's processes on this machine; the kernel frees it when its holder ends.

    The file is removed on release, so a lock counts only while its file is still the one at the path.
    """

    def __init__(self, name: str) -> None:
        folder = state_dir() / "locks"
        folder.mkdir(mode=0o700, exist_ok=True)
        self.path = folder / (re.sub(r"[^A-Za-z0-9._-]", "_", name) + ".lock")
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free, without waiting."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_current(fd):
                raise BlockingIOError
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._fd is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether nobody listens on `port` now."""
    with socket.socket() as probe:
        # As engines do: the last connections of a server that has ended are in the way of nobody.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


@contextmanager
def free_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A free port that no other trial of this user takes while the block runs.

    Raises:
        TrialFailed: none was found; the environment's fault.
    """
    lock, port = _reserve_port(host)
    try:
        yield port
    finally:
        lock.release()


def _reserve_port(host: str) -> tuple[FileLock, int]:
    for port in random.SystemRandom().sample(PORTS, _PORT_TRIES):
        lock = FileLock(f"port-{port}")
        if lock.acquire():
            if is_free(port, host):
                return lock, port
            lock.release()
    raise TrialFailed(
        Failure(
            stage=Stage.ARGUMENTS,
            kind=Kind.PORT_IN_USE,
            blame=Blame.ENVIRONMENT,
            evidence=f"no free port was found in {PORTS.start}-{PORTS.stop - 1} in {_PORT_TRIES} tries",
            remedy="See what listens there with `ss -ltnp`.",
        )
    )


@contextmanager
def free_cores(count: int) -> Iterator[tuple[int, ...]]:
    """`count` of this process's cores that no other trial of this user takes while the block runs.

    Empty where so many are not free: then the trial shares all cores with whoever holds the others.
    """
    locks: dict[int, FileLock] = {}
    try:
        for core in sorted(os.sched_getaffinity(0)):
            if len(locks) < count and (lock := FileLock(f"core-{core}")).acquire():
                locks[core] = lock
        yield tuple(locks) if len(locks) == count else ()
    finally:
        for lock in locks.values():
            lock.release()


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes the kernel has ended for want of memory so far; None where it does not say.

    Counted in this process's own memory cgroup (version 2, then 1), else on the whole machine. `root` is `/`, or
    what stands for it.
    """
    for path, key in [*_cgroup_counters(root), (root / "proc/vmstat", "oom_kill")]:
        try:
            counters = dict(line.split() for line in path.read_text().splitlines())
            return int(counters[key])
        except (OSError, KeyError, ValueError):
            continue
    return None


def _cgroup_counters(root: Path) -> Iterator[tuple[Path, str]]:
    """The files that count the kills of this process's cgroup, and the counter's name in them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield root / "sys/fs/cgroup" / path.lstrip("/") / "memory.events", "oom_kill"
        elif "memory" in controllers.split(","):
            for folder in (path.lstrip("/"), ""):  # in a container its own cgroup is mounted as the root
                yield root / "sys/fs/cgroup/memory" / folder / "memory.oom_control", "oom_kill"
