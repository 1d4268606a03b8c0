"""Nothing outlives its trial: one nasty process tree, ended in every way that there is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine.contract import Launch
from raytune_autotuner.engine.logfile import read_log
from raytune_autotuner.engine.processes import FileLock, Process, make_mark, marked, sweep, sweep_orphans
from raytune_autotuner.engine.reading import VLLM_RULES
from raytune_autotuner.engine.server import EngineServer
from raytune_autotuner.study.errors import TrialFailed
from raytune_autotuner.study.failure import Blame, Kind
from tests import process_tree

OWNER = """
import os, sys, time
from pathlib import Path
import test_supervisor as t
folder, how, lasting = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with t.serve(folder, deadline_s=lasting):
    t.wait_until(lambda: t.process_tree.is_complete(folder))
    print("up", flush=True)
    if how == "exit":
        os._exit(7)
    if how == "raise":
        raise RuntimeError("as a trial may")
    if how == "block":
        time.sleep(60)
"""


def wait_until(condition: Callable[[], Any], limit_s: float = 20.0) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def tree(folder: Path, root: str = "wait") -> Launch:
    return Launch((sys.executable, "-S", process_tree.__file__, str(folder), "--root", root), {})


def serve(folder: Path, root: str = "wait", *, deadline_s: float = 60.0, **options: Any) -> EngineServer:
    folder.mkdir(exist_ok=True)
    mark = make_mark("test", folder.name)
    (folder / "mark").write_text(mark)
    deadline = time.monotonic() + deadline_s
    options = {"grace_s": 0.2, **options}
    return EngineServer(
        tree(folder, root), 1, folder, rules=VLLM_RULES, mark=mark, deadline=deadline, timeout_s=deadline_s, **options
    )


def wait_up(folder: Path) -> None:
    wait_until(lambda: process_tree.is_complete(folder))


def assert_gone(folder: Path, within_s: float = 20.0) -> None:
    """By what the processes wrote of themselves, by the mark, and by the supervisor's own end."""
    wait_until(lambda: not process_tree.survivors(folder), within_s)
    assert marked((folder / "mark").read_text()) == []


def record(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "process.json").read_text())
    return values


def wait_ended(folder: Path) -> None:
    wait_until((folder / "process.json").exists)
    wait_until(lambda: record(folder)["ended"])


def supervisor_of(folder: Path) -> int:
    wait_until((folder / "process.json").exists)
    return int(record(folder)["supervisor"])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "trial-3"
    path.mkdir()
    yield path
    if (path / "mark").exists():
        sweep((path / "mark").read_text())


@contextmanager
def start_owner(folder: Path, how: str, deadline_s: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """An owner in a process of its own, with its tree up."""
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}"}
    command = [sys.executable, "-c", OWNER, str(folder), how, str(deadline_s)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "up\n"
            yield owner
        finally:
            owner.kill()


@pytest.mark.parametrize("root", ["finish", "crash"])
def test_nothing_is_left_when_the_engine_ends_by_itself(folder: Path, root: str) -> None:
    with serve(folder, root) as server:
        wait_ended(folder)
        assert_gone(folder, within_s=2)
        with pytest.raises(TrialFailed):
            server.check()
    assert server.stop().exit_code == {"finish": 0, "crash": 3}[root]
    assert server.stop().survivors == 0


@pytest.mark.parametrize(("how", "exit_code"), [("return", 0), ("raise", 1), ("exit", 7)])
def test_nothing_is_left_when_the_owner_ends(folder: Path, how: str, exit_code: int) -> None:
    with start_owner(folder, how) as owner:
        assert owner.wait() == exit_code
    assert_gone(folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_when_the_owner_is_ended_by_a_signal(folder: Path, number: signal.Signals) -> None:
    with start_owner(folder, "block") as owner:
        owner.send_signal(number)
    assert_gone(folder)
    wait_ended(folder)
    assert record(folder)["survivors"] == []


def test_nothing_is_left_when_the_deadline_passes_with_the_owner_blocked(folder: Path) -> None:
    with start_owner(folder, "block", deadline_s=1.0) as owner:
        assert_gone(folder)
        assert owner.poll() is None
        wait_ended(folder)
        assert record(folder)["cause"] == "deadline"


def test_nothing_is_left_when_it_is_stopped(folder: Path) -> None:
    with serve(folder) as server:
        wait_up(folder)
        report = server.stop()
    assert_gone(folder, within_s=0)
    assert report.exit_code == -signal.SIGTERM
    assert report.survivors == 0
    assert report.killed >= 2


def test_nothing_is_left_when_it_is_killed(folder: Path) -> None:
    with serve(folder) as server:
        wait_up(folder)
        report = server.kill()
    assert_gone(folder, within_s=0)
    assert (report.exit_code, report.survivors, report.killed) == (-signal.SIGKILL, 0, len(process_tree.ROLES))


def test_nothing_is_left_when_the_supervisor_is_killed(folder: Path) -> None:
    with serve(folder) as server:
        wait_up(folder)
        os.kill(supervisor_of(folder), signal.SIGKILL)
        assert_gone(folder, within_s=2)
        wait_until(lambda: server.lost)
        with pytest.raises(TrialFailed) as failed:
            server.check()
    assert failed.value.failure.kind is Kind.ENGINE_DIED
    assert failed.value.failure.blame is Blame.ENVIRONMENT


def test_nothing_is_left_when_the_supervisor_is_told_to_end(folder: Path) -> None:
    with serve(folder) as server:
        wait_up(folder)
        os.kill(supervisor_of(folder), signal.SIGTERM)
        assert_gone(folder, within_s=2)
        wait_ended(folder)
        with pytest.raises(TrialFailed, match="told to end"):
            server.check()


def test_what_supervisor_and_owner_leave_when_both_are_killed_is_found_as_orphaned(folder: Path) -> None:
    with start_owner(folder, "block") as owner:
        supervisor = supervisor_of(folder)
        mark = (folder / "mark").read_text()
        os.kill(supervisor, signal.SIGSTOP)  # So that it cannot do its work between the two kills.
        owner.kill()
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: "root" not in process_tree.survivors(folder))  # By its parent-death signal.
    # The chatty one may end by itself: nobody reads what it prints any more.
    assert set(process_tree.ROLES) - set(process_tree.survivors(folder)) <= {"root", "chatty"}
    assert marked(mark)
    assert mark in {swept for _, swept in sweep_orphans()}
    assert_gone(folder, within_s=0)


def test_the_orphans_of_a_living_owner_stay(folder: Path, tmp_path: Path) -> None:
    neighbour = tmp_path / "trial-4"
    with serve(folder), serve(neighbour):
        wait_up(folder)
        wait_up(neighbour)
        sweep_orphans()
        sweep((folder / "mark").read_text())
        assert_gone(folder)
        assert len(process_tree.survivors(neighbour)) == len(process_tree.ROLES)
    assert_gone(neighbour)


def test_the_end_of_one_owner_is_nothing_to_another(folder: Path, tmp_path: Path) -> None:
    neighbour = tmp_path / "trial-of-another-study"
    with start_owner(folder, "block") as first, start_owner(neighbour, "block"):
        first.kill()
        assert_gone(folder)
        sweep_orphans()
        assert len(process_tree.survivors(neighbour)) == len(process_tree.ROLES)
    assert_gone(neighbour)


def test_the_engine_is_asked_before_it_is_killed(folder: Path) -> None:
    with serve(folder, "polite", grace_s=10) as server:
        wait_up(folder)
        report = server.stop()
    assert report.exit_code == 0
    assert any(line.endswith("shut down in order") for line in read_log(server.log_path))


def test_a_late_line_of_a_trial_is_never_in_the_next_ones_log(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with serve(first):
        wait_up(first)
        with serve(second):
            wait_up(second)
            time.sleep(0.2)
    for ours, theirs in ((first, second), (second, first)):
        log = (ours / "engine.log").read_text()
        assert f"I of {ours.name}" in log
        assert f"I of {theirs.name}" not in log


def test_a_gpu_is_not_given_on_before_the_tree_that_held_it_is_gone(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    name = f"test-{os.getpid()}"
    with serve(first, locks=[name]) as holder:
        wait_up(first)
        with serve(second, locks=[name]) as waiter:
            wait_until(lambda: waiter.waiting_for == name)
            assert waiter.pid is None
            holder.stop()
            wait_until(lambda: waiter.pid is not None)
            assert process_tree.survivors(first) == []
    lock = FileLock(name)
    assert lock.acquire()
    lock.release()


def test_a_deadline_passed_in_waiting_for_a_gpu_is_not_the_settings_fault(folder: Path) -> None:
    lock = FileLock(f"test-{os.getpid()}-held")
    assert lock.acquire()
    with serve(folder, deadline_s=0.5, locks=[lock.path.stem]) as server, pytest.raises(TrialFailed) as failed:
        server.wait_ready(lambda: False)
    lock.release()
    assert failed.value.failure.kind is Kind.DEVICE_BUSY
    assert failed.value.failure.blame is Blame.ENVIRONMENT


def test_the_supervisor_is_not_below_its_owner(folder: Path) -> None:
    with serve(folder):
        wait_up(folder)
        supervisor = Process.of(supervisor_of(folder))
        assert supervisor is not None
        assert os.getsid(supervisor.pid) != os.getsid(0)
        parent = int(Path(f"/proc/{supervisor.pid}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent != os.getpid()
