"""One engine's processes, from the start of the first to the end of the last.

A small script beside the trial (standard library only, so that it runs within milliseconds). `EngineServer` starts it
forked twice and in a session of its own, so that nobody takes it for a child of the trial's process, and speaks with
it as `protocol` says.

It is the subreaper of everything below it, so `waitpid` saying "no child" proves that the tree is gone, those that
called `setsid` and daemons included. It kills the tree when the owner ends by any means, when the deadline passes,
when the engine's root process ends, on `kill`, and on its own SIGTERM; on `stop` it asks with SIGTERM first.
GPU locks are taken before the engine starts and given back when the tree is gone.

Should it be killed itself, the engine's root goes with it (parent-death signal) and the owner sweeps by mark.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from raytune_autotuner.engine.gpus import GpuMemory
from raytune_autotuner.engine.logfile import Pump, StampedLog
from raytune_autotuner.engine.processes import (
    FileLock,
    Process,
    descendants,
    free_shared_memory,
    is_free,
    marked,
    open_pidfd,
    shared_memory,
    sweep,
    sweep_orphans,
)
from raytune_autotuner.engine.protocol import ASIDE_S, SETTLE_S, STUCK_S, Aftermath, Cause, Channel, Spec
from raytune_autotuner.engine.scratch import Scratch
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.masking import learn, mask_values, secrets_in

_TICK_S = 0.5
_BUSY_TICK_S = 0.1
_LOCK_TICK_S = 0.05
_KILL_TICK_S = 0.02
_PROGRESS_EVERY_S = 0.2
_CHUNK = 65_536
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SUPERVISOR_OOM_SCORE_ADJ = -500


class Supervisor:
    """Runs one `Spec`: locks, start, watch, end, report."""

    def __init__(self, spec: Spec, channel: Channel) -> None:
        self._spec = spec
        self._channel = channel
        self._selector = selectors.DefaultSelector()
        self._locks: list[FileLock] = []
        self._pump: Pump | None = None
        self._root: Process | None = None
        self._exit_code: int | None = None
        self._cause: Cause | None = None
        self._childless = True
        self._grace_s = 0.0
        self._told_lines = 0
        self._told_at = 0.0
        self._started_at = time.time()
        self._killed: set[Process] = set()
        self._segments: set[Path] = set()
        self._noted_at: Stage | None = None
        self._scratch = Scratch(spec.env)
        self._owners = [process for process in (spec.owner, spec.raylet) if process is not None]
        self._unwatched: set[Process] = set()
        learn(secrets_in(spec.env))
        self._gpus = GpuMemory(lock.removeprefix("gpu-") for lock in spec.locks if lock.startswith("gpu-"))

    def run(self) -> None:
        """The life of the engine; returns when nothing of it is left."""
        self._watch_signals()
        self._watch_owner()
        self._channel.send("hello", pid=os.getpid())
        self._on_command()  # What came along with the spec.
        try:
            if self._take_locks() and self._start():
                self._until(lambda: self._cause is not None)
            if self._cause is Cause.STOPPED:
                self._ask_to_end()
            if self._exit_code is not None:
                self._settle()
        finally:
            self._end_tree()
            self._scratch.remove()
        self._report()
        self._set_aside()

    # Watching

    def _watch_signals(self) -> None:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # Handlers that do nothing, rather than SIG_IGN, which the engine would inherit.
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._end_for(Cause.TERMINATED))
        self._selector.register(reader, selectors.EVENT_READ, lambda: self._on_signal(reader))

    def _watch_owner(self) -> None:
        self._selector.register(self._channel.sock, selectors.EVENT_READ, self._on_command)
        for process in self._owners:
            handle = open_pidfd(process.pid)
            if handle is not None:
                self._selector.register(handle, selectors.EVENT_READ, partial(self._on_owner_end, handle))
            self._unwatched |= set() if handle is not None else {process}
        if not all(process.alive for process in self._owners):
            self._end_for(Cause.OWNER_ENDED)

    def _until(self, done: Callable[[], bool], tick_s: float = _TICK_S) -> None:
        while not done():
            self._wait(tick_s)

    def _wait(self, tick_s: float) -> None:
        """One round: what has arrived is dealt with, within `tick_s` also when nothing arrives."""
        busy = self._pump is not None and (self._pump.pending or self._pump.lines != self._told_lines)
        tick_s = min(tick_s, _BUSY_TICK_S) if busy else tick_s
        if self._spec.deadline_s is not None and self._cause in (None, Cause.STOPPED):
            tick_s = min(tick_s, max(self._spec.deadline_s - time.monotonic(), 0.0))
        for key, _ in self._selector.select(tick_s):
            key.data()
        self._reap()
        self._on_tick()

    def _on_tick(self) -> None:
        if self._spec.deadline_s is not None and time.monotonic() >= self._spec.deadline_s:
            self._end_for(Cause.DEADLINE)
        if not all(process.alive for process in self._unwatched):
            self._end_for(Cause.OWNER_ENDED)
        self._channel.flush()
        if self._pump is not None:
            self._pump.flush_old_partial()
            self._tell_progress(self._pump)

    def _end_for(self, cause: Cause) -> None:
        """The first cause counts, but a soft stop gives way to a hard one."""
        if self._cause in (None, Cause.STOPPED):
            self._cause = cause

    def _on_signal(self, reader: int) -> None:
        os.read(reader, _CHUNK)

    def _on_owner_end(self, handle: int) -> None:
        self._selector.unregister(handle)
        self._end_for(Cause.OWNER_ENDED)

    def _on_command(self) -> None:
        for command in self._channel.commands():
            if command["do"] == "kill":
                self._end_for(Cause.KILLED)
            elif self._cause is None:
                self._grace_s = float(command["grace_s"])
                self._cause = Cause.STOPPED
        if self._channel.closed:
            self._selector.unregister(self._channel.sock)
            self._end_for(Cause.OWNER_ENDED)

    def _on_output(self, pump: Pump) -> None:
        pump.read()
        if not pump.open:
            self._selector.unregister(pump.pipe)

    def _tell_progress(self, pump: Pump) -> None:
        now = time.monotonic()
        if pump.lines != self._told_lines and now - self._told_at >= _PROGRESS_EVERY_S:
            self._told_lines, self._told_at = pump.lines, now
            self._note_segments(pump)
            self._channel.send("progress", droppable=True, **self._reached(pump))

    def _note_segments(self, pump: Pump) -> None:
        """At each new stage, since a process that ends by itself can no longer be asked which ones it used."""
        if pump.reader.stage is not self._noted_at:
            self._noted_at = pump.reader.stage
            self._segments |= shared_memory([process.pid for process in descendants(os.getpid())])

    def _reached(self, pump: Pump) -> dict[str, Any]:
        reader = pump.reader
        return {"stage": str(reader.stage), "share": reader.share, "serving": reader.serving, "lines": pump.lines}

    # Beginning

    def _take_locks(self) -> bool:
        """In one order for all, so that two trials cannot wait for each other."""
        for name in sorted(set(self._spec.locks)):
            lock = FileLock(name)
            self._locks.append(lock)
            self._await(lock, name)
        if self._locks and self._cause is None:
            sweep_orphans()
            self._gpus.remember()
        return self._cause is None

    def _await(self, lock: FileLock, name: str) -> None:
        if self._cause is None and not lock.acquire():
            self._channel.send("waiting-for-lock", lock=name)
            self._until(lambda: self._cause is not None or lock.acquire(), _LOCK_TICK_S)

    def _start(self) -> bool:
        oom_score_adj = _read_oom_score_adj()
        _protect()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self._pump = pump = Pump(reader, self._log(), self._spec.log_rules)
        self._scratch.make()
        try:
            self._spawn(writer, oom_score_adj)
        except OSError as error:
            self._cause = Cause.REFUSED
            program = self._spec.argv[0]
            said = f"{error.strerror}: {error.filename or program}"
            self._channel.send("refused", error=said, by_program=error.filename == program)
        finally:
            os.close(writer)
        self._selector.register(reader, selectors.EVENT_READ, lambda: self._on_output(pump))
        return self._root is not None

    def _log(self) -> StampedLog:
        return StampedLog(Path(self._spec.log_path), self._spec.log_limit_bytes)

    def _spawn(self, output: int, oom_score_adj: int) -> None:
        supervisor, libc = os.getpid(), ctypes.CDLL(None)

        def prepare() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != supervisor:
                os._exit(1)
            _write_oom_score_adj(oom_score_adj)
            if self._spec.cores:
                os.sched_setaffinity(0, self._spec.cores)

        process = subprocess.Popen(
            self._spec.argv,
            env={**self._spec.env, **self._scratch.variables},
            cwd=self._spec.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=prepare,
        )
        process.returncode = 0  # It is reaped here, with all others, and not by the Popen object.
        self._childless = False
        self._root = Process.of(process.pid)
        self._channel.send("started", pid=process.pid)
        self._write_record(None)

    # Ending

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._childless = True
                return
            if pid == 0:
                self._childless = False
                return
            if self._root is not None and pid == self._root.pid and self._exit_code is None:
                self._on_exit(os.waitstatus_to_exitcode(status))

    def _on_exit(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._cause = self._cause or Cause.EXITED
        if self._pump is not None:
            self._pump.drain(limit_s=0.2)
            self._channel.send("progress", **self._reached(self._pump))
        self._channel.send("exited", exit_code=exit_code, cause=self._cause)

    def _ask_to_end(self) -> None:
        """SIGTERM to the engine's root; then time for it."""
        if self._root is None or not self._root.send(signal.SIGTERM):
            return
        until = time.monotonic() + self._grace_s
        self._until(lambda: self._exit_code is not None or self._hurried(until), _BUSY_TICK_S)

    def _settle(self) -> None:
        """A moment for what the root started: Python's resource tracker, for one, clears away what the others left."""
        until = time.monotonic() + SETTLE_S
        self._until(lambda: self._childless or self._hurried(until), _BUSY_TICK_S)

    def _hurried(self, until: float) -> bool:
        return self._cause not in (Cause.STOPPED, Cause.EXITED) or time.monotonic() >= until

    def _end_tree(self) -> None:
        stuck_at = time.monotonic() + STUCK_S
        self._reap()
        while not self._childless:
            left = descendants(os.getpid())
            if not self._killed:  # Once, for it takes milliseconds.
                self._segments |= shared_memory([process.pid for process in left])
            self._killed.update(process for process in left if process.kill())
            if time.monotonic() >= stuck_at:
                self._channel.send("stuck", survivors=[process.pid for process in left])
                stuck_at = float("inf")
            self._wait(_KILL_TICK_S)
        strays = marked(self._spec.mark)
        if strays:
            sweep(self._spec.mark)
        self._killed.update(strays)

    def _report(self) -> None:
        if self._pump is not None:
            self._pump.drain()
            self._pump.close()
        aftermath = self._verify()
        self._note(str(aftermath))
        if not self._gpus.held:
            self._release_locks()
        self._write_record(asdict(aftermath))
        self._channel.send("gone", **asdict(aftermath))
        until = time.monotonic() + 1.0
        while not self._channel.flush() and time.monotonic() < until:
            time.sleep(_KILL_TICK_S)

    def _verify(self) -> Aftermath:
        """What is to be said of the end; waits a moment for the GPUs' memory."""
        self._gpus.await_return()
        return Aftermath(
            cause=self._cause,
            exit_code=self._exit_code,
            killed=len(self._killed),
            survivors=tuple(process.pid for process in marked(self._spec.mark)),
            port=self._spec.port,
            port_free=is_free(self._spec.port),
            shared_memory_bytes=free_shared_memory(self._segments),
            gpu_mib=self._gpus.levels,
            held_gpus=self._gpus.held,
        )

    def _note(self, text: str) -> None:
        """A line in the trial's log, which its owner, where it lives, writes too."""
        stage = "arguments" if self._pump is None else str(self._pump.reader.stage)
        log = StampedLog(Path(self._spec.trial_log_path), sys.maxsize)
        log.write([(stage, text)])
        log.close()

    def _set_aside(self) -> None:
        """Keep the locks of GPUs whose memory did not come back, until it has, so that no trial starts there."""
        until = time.monotonic() + ASIDE_S
        while self._gpus.held and time.monotonic() < until:
            time.sleep(_TICK_S)
            self._gpus.measure()
        if time.monotonic() < until:
            self._release_locks()

    def _release_locks(self) -> None:
        for lock in self._locks:
            lock.release()

    def _write_record(self, end: dict[str, Any] | None) -> None:
        """`process.json`, for when the owner is dead. A full disk must not stand in the way of the killing."""
        record = {
            "mark": self._spec.mark,
            "argv": self._spec.argv,
            "supervisor": os.getpid(),
            "engine": None if self._root is None else self._root.pid,
            "started": self._started_at,
            "ended": None if end is None else time.time(),
            **(end or {}),
        }
        path = Path(self._spec.record_path)
        draft = path.with_suffix(".tmp")
        with suppress(OSError):
            draft.write_text(json.dumps(mask_values(record), indent=1) + "\n")
            draft.replace(path)


def _read_oom_score_adj() -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())


def _write_oom_score_adj(value: int) -> bool:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(value))
    except OSError:
        return False
    return True


def _protect() -> None:
    """Ordinary priority for supervisor and engine; for the supervisor alone, to be the last that memory's end takes.

    The engine keeps the owner's `oom_score_adj`. Ray gives its workers 1000; with less than that the kernel would end
    the trial's process for the memory that the engine took, and the setting would never be blamed.
    """
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    if not _write_oom_score_adj(_SUPERVISOR_OOM_SCORE_ADJ):
        _write_oom_score_adj(0)


def main() -> None:
    """Run as a script: the argument is the inherited socket's descriptor; the first fork was done by our caller."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    channel = Channel(socket.socket(fileno=int(sys.argv[-1])))
    line = channel.read_line()
    if line:
        Supervisor(Spec.from_json(line), channel).run()
