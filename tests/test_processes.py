"""Marks, descent, locks and ports, on this machine's real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from raytune_autotuner.engine import processes
from raytune_autotuner.engine.processes import (
    MARK_VARIABLE,
    FileLock,
    Process,
    descendants,
    free_port,
    is_free,
    make_mark,
    marked,
    sweep,
    sweep_orphans,
)


@contextmanager
def sleeper(mark: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    env = {**os.environ, **({} if mark is None else {MARK_VARIABLE: mark})}
    with subprocess.Popen(["sleep", "60"], env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def dead_process() -> Process:
    with sleeper() as process:
        found = Process.of(process.pid)
    assert found is not None
    return found


def test_a_process_is_alive_until_it_ends() -> None:
    with sleeper() as process:
        found = Process.of(process.pid)
        assert found is not None
        assert found.alive


def test_a_zombie_is_not_alive() -> None:
    with sleeper() as process:
        found = Process.of(process.pid)
        assert found is not None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not found.alive
        assert not found.kill()


def test_a_process_that_took_the_pid_later_is_another_one() -> None:
    with sleeper() as process:
        found = Process.of(process.pid)
        assert found is not None
        earlier = Process(found.pid, found.start_ticks - 1)
        assert not earlier.alive
        assert not earlier.kill()
        assert found.alive


def test_a_sweep_takes_exactly_the_mark() -> None:
    mark = make_mark("run", "trial-1")
    with sleeper(mark) as ours, sleeper(mark + "0") as other, sleeper() as plain:
        assert [process.pid for process in marked(mark)] == [ours.pid]
        assert sweep(mark) == [ours.pid]
        assert ours.wait() == -9
        assert (other.poll(), plain.poll()) == (None, None)


def test_a_sweep_of_orphans_leaves_what_has_a_living_owner() -> None:
    orphaned = make_mark("run", "trial-1", owner=dead_process())
    with sleeper(orphaned) as orphan, sleeper(make_mark("run", "trial-2")) as owned, sleeper("odd:mark") as odd:
        assert (orphan.pid, orphaned) in sweep_orphans()
        assert (owned.poll(), odd.poll()) == (None, None)


def test_a_mark_of_another_pid_namespace_is_not_ours_to_judge() -> None:
    _, rest = make_mark("run", "trial-1", owner=dead_process()).split(":", 1)
    with sleeper(f"1:{rest}") as foreign:
        sweep_orphans()
        assert foreign.poll() is None


def test_a_mark_is_plain_text_of_one_word() -> None:
    mark = make_mark("a study\nwith ü", "x")
    assert mark.isascii()
    assert mark.split() == [mark]


def test_descendants_are_found_at_every_depth() -> None:
    code = "import subprocess, sys; subprocess.run(['sleep', '60'], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as parent:
        while len(below := descendants(parent.pid)) < 1:
            pass
        assert {process.pid for process in [*below]} < {process.pid for process in descendants(os.getpid())}
        for process in below:
            process.kill()


def test_a_lock_is_exclusive_until_it_is_released() -> None:
    first, second = FileLock(f"test-{os.getpid()}"), FileLock(f"test-{os.getpid()}")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()
    assert not first.path.exists()


def test_a_lock_goes_with_the_process_that_held_it() -> None:
    lock = FileLock(f"test-{os.getpid()}-of-another")
    code = (
        "import sys, time; from raytune_autotuner.engine.processes import FileLock;"
        f"print(FileLock({lock.path.stem!r}).acquire(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not lock.acquire()
        holder.kill()
    assert lock.acquire()
    lock.release()


@pytest.mark.parametrize("name", ["gpu-0", "GPU-8f6d/../../x", "MIG a:b"])
def test_a_locks_file_stays_in_its_folder(name: str) -> None:
    assert FileLock(name).path.parent == processes.state_dir() / "locks"


def test_ports_held_at_once_are_different_and_free() -> None:
    with ExitStack() as stack:
        ports = [stack.enter_context(free_port()) for _ in range(50)]
        assert len(set(ports)) == 50
        assert all(is_free(port) for port in ports)


def test_a_port_that_is_listened_on_is_not_free() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        assert not is_free(server.getsockname()[1])


def test_the_state_folder_is_private() -> None:
    found = processes.state_dir().stat()
    assert (found.st_mode & 0o777, found.st_uid) == (0o700, os.geteuid())
