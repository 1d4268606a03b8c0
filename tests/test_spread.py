"""One load by several client processes, against a simulated engine: nothing is lost, sent twice or left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.load import trouble
from raytune_autotuner.load.client import LoadRun
from raytune_autotuner.load.parquet import read_records
from raytune_autotuner.load.spread import ClientLost, Clients
from raytune_autotuner.load.trouble import processes_wanted
from raytune_autotuner.load.workload import Level, Request
from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.failure import Blame, Kind, Stage
from tests.simulated_server import Server
from tests.test_evaluate import evaluation, play, run_through

C7, OPEN = Level("c7", concurrency=7), Level("r100", rate_rps=100)
ENDLESS = 1_000_000
LONG = 1900
"""Tokens of an answer that takes some seconds."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("engine")).wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Clients]:
    with Clients() as clients:
        yield clients


def requests(count: int, tokens_out: int = 4) -> list[Request]:
    return [Request(index, [1000 + index] * 8, tokens_out, index / 100) for index in range(count)]


def send(clients: Clients, engine: Server, sent: list[Request], level: Level = C7, **options: Any) -> LoadRun:
    options = {"processes": 3, "deadline": time.monotonic() + 20, **options}
    return clients.measure(engine.base_url, "m", sent, level, **options)


def answered(engine: Server) -> float:
    """How many requests the engine itself has answered so far."""
    text = engine.request("GET", "/metrics")[1].decode()
    return sum(float(value) for value in re.findall(r"^vllm:request_success_total\S* (\S+)$", text, re.M))


def children(parent: int) -> set[int]:
    """The client processes of `parent` that live."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            ppid = int(stat.read_text().rpartition(")")[2].split()[1])
            line = stat.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if ppid == parent and b"load.spread" in line:
            found.add(int(stat.parent.name))
    return found


def most_in_flight(records: tuple[RequestRecord, ...]) -> int:
    moves = sorted([(record.sent_s, 1) for record in records] + [(record.token_times_s[-1], -1) for record in records])
    in_flight = most = 0
    for _, change in moves:
        in_flight += change
        most = max(most, in_flight)
    return most


@pytest.mark.parametrize(("level", "processes"), [(C7, 3), (OPEN, 3), (Level("c2", 2), 2), (Level("c1", 1), 1)])
def test_every_request_is_answered_once_and_recorded_on_one_clock(
    engine: Server, shared: Clients, level: Level, processes: int
) -> None:
    before, begun, seen = answered(engine), time.monotonic(), list[tuple[int, int, int]]()
    kept: list[RequestRecord] = []
    run = send(shared, engine, requests(40), level, on_progress=lambda *counts: seen.append(counts), keep=kept)
    assert (run.complete, run.requests, run.processes) == (True, 40, processes)
    assert [record.index for record in run.records] == list(range(40))
    assert sorted(kept, key=lambda record: record.index) == list(run.records)
    assert answered(engine) - before == 40
    assert seen[-1] == (40, 40, 0)
    assert abs(run.started_at - time.time()) < 60
    assert run.duration_s < time.monotonic() - begun
    for record in run.records:
        assert (record.error, record.tokens_out, record.level) == (None, 4, level.label)
        assert 0 <= record.scheduled_s <= record.sent_s < record.token_times_s[0] <= record.end_s
        assert not level.open_loop or record.scheduled_s == record.index / 100
    assert level.open_loop or most_in_flight(run.records) <= (level.concurrency or 0)


@pytest.mark.slow
def test_at_the_deadline_partial_records_come_back(engine: Server, shared: Clients) -> None:
    sent = [*requests(6), *(Request(index, [1000] * 8, LONG) for index in range(6, 20))]
    run = send(shared, engine, sent, deadline=time.monotonic() + 2.5)
    assert not run.complete
    assert [(record.index, record.error) for record in run.records] == [
        *((index, None) for index in range(6)),
        *((index, "deadline") for index in range(6, 13)),
    ]
    assert all(record.first_token_s is not None for record in run.records)


@pytest.mark.slow
def test_a_request_timeout_holds_in_every_process(engine: Server, shared: Clients) -> None:
    run = send(shared, engine, requests(6, tokens_out=LONG), request_timeout_s=0.3)
    assert run.complete
    assert all("request timeout" in (record.error or "") for record in run.records)


READER = """
import sys
from raytune_autotuner.load.spread import _next_places
print("up", flush=True)
sys.stdin.readline()
print(*_next_places(int(sys.argv[1])))
"""


def test_processes_that_take_requests_as_fast_as_they_can_never_take_one_twice() -> None:
    places, queue = range(100_000), os.memfd_create("places")
    os.write(queue, array("I", places).tobytes())
    os.lseek(queue, 0, os.SEEK_SET)
    command, pipe = [sys.executable, "-c", READER, str(queue)], subprocess.PIPE
    readers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=[queue]) for _ in range(2)]
    assert [reader.stdout and reader.stdout.readline() for reader in readers] == ["up\n"] * 2
    for reader in readers:
        assert reader.stdin is not None
        print("go", file=reader.stdin, flush=True)
    taken = [int(place) for reader in readers for place in reader.communicate()[0].split()]
    os.close(queue)
    assert sorted(taken) == list(places)


@pytest.mark.slow
def test_a_process_for_which_there_was_nothing_left_is_not_a_busy_one(engine: Server, shared: Clients) -> None:
    run = send(shared, engine, requests(3, tokens_out=150))  # the first process has room for all three
    assert (run.complete, run.processes, len(run.records)) == (True, 3, 3)
    assert run.client_cpu_share < 0.5


class EngineGone(Exception):
    pass


def three_short_ones_first() -> list[Request]:
    return [*requests(3), *(Request(index, [1000] * 8, LONG) for index in range(3, 20))]


@pytest.mark.slow
def test_what_check_raises_aborts_the_load_and_leaves_its_records(engine: Server) -> None:
    kept: list[RequestRecord] = []
    seen = [0]

    def check() -> None:
        if seen[-1] == 3:
            raise EngineGone

    others, sent = children(os.getpid()), three_short_ones_first()
    with Clients() as clients, pytest.raises(EngineGone):
        send(clients, engine, sent, check=check, on_progress=lambda done, *_: seen.append(done), keep=kept)
    assert children(os.getpid()) <= others
    short, long = [(index, None) for index in range(3)], [(index, "aborted") for index in range(3, 10)]
    assert sorted((record.index, record.error) for record in kept) == [*short, *long]


@pytest.mark.slow
def test_a_client_that_is_killed_is_told_and_the_records_of_the_others_are_kept(engine: Server) -> None:
    kept: list[RequestRecord] = []
    others = children(os.getpid())

    def kill_one(done: int, *_: int) -> None:
        if done == 3:
            os.kill(min(children(os.getpid()) - others), signal.SIGKILL)

    with Clients() as clients:
        with pytest.raises(ClientLost, match="a load client ended with exit code -9"):
            send(clients, engine, three_short_ones_first(), on_progress=kill_one, keep=kept)
        assert len(kept) < 10
        assert "aborted" in {record.error for record in kept} <= {None, "aborted"}
        assert send(clients, engine, requests(10)).complete  # by new ones


@pytest.mark.slow
def test_of_a_client_that_died_between_two_loads_no_record_is_kept_twice(engine: Server) -> None:
    kept: list[RequestRecord] = []
    others = children(os.getpid())
    with Clients() as clients:
        send(clients, engine, requests(6))
        first = min(children(os.getpid()) - others)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(ClientLost):
            send(clients, engine, requests(6), keep=kept)
    assert kept == []


PARENT = """
import sys, time
from raytune_autotuner.load.spread import Clients
from raytune_autotuner.load.workload import Level, Request
with Clients() as clients:
    sent = [Request(index, [1000] * 8, 1900) for index in range(8)]
    clients.measure(sys.argv[1], "m", sent, Level("c8", 8), processes=2, deadline=time.monotonic() + 60,
                    on_progress=lambda *_: print("under way", flush=True))
"""


@pytest.mark.slow
def test_clients_end_with_the_process_that_started_them(engine: Server) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, engine.base_url], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        pids = children(parent.pid)
        assert len(pids) == 2
        parent.kill()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_client_process_imports_nothing_heavy() -> None:
    asked = "import sys; from raytune_autotuner.load.spread import work; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"ray", "optuna", "pandas", "pyarrow", "torch"}


@pytest.mark.parametrize(
    ("share", "processes", "wanted"), [(0.7, 1, 1), (0.71, 1, 3), (1.0, 1, 3), (0.6, 4, 4), (0.9, 3, 8)]
)
def test_a_busy_client_wants_so_many_processes_that_half_of_each_would_do(
    share: float, processes: int, wanted: int
) -> None:
    assert processes_wanted(share, processes, 1.0) == wanted
    assert processes_wanted(share, processes, 0.9) == processes  # too short to tell


@pytest.fixture
def busy() -> Iterator[None]:
    """The process of the trial has something else to do all the time, which its load client has to wait for."""
    over = threading.Event()

    def turn() -> None:
        while not over.is_set():
            pass

    thread = threading.Thread(target=turn)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no room for a second client")
@pytest.mark.usefixtures("busy")
def test_a_load_that_leaves_its_client_no_cpu_is_sent_once_more_by_more_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trouble, "MAX_CPU_SHARE", 0.15)  # so that others on this machine may have their share
    monkeypatch.setattr(trouble, "MIN_LOOKS", ENDLESS)
    monkeypatch.setattr(trouble, "MIN_BUSY_S", 0.0)
    workload = {"rounds": 2, "requests": 12, "concurrency": [4], "warmup_requests": 0}
    played = play(tmp_path, {"engine": {"args": {"speed": 0.3}}, "workload": workload})
    assert played.result.failure is None, played.result.failure
    records = read_records(played.folder / "requests.parquet")
    measured = sorted((record.round, record.index) for record in records if record.phase == "measure")
    assert measured == [(number, index) for number in range(2) for index in range(12)]
    assert len(played.steps) == 2
    assert played.result.metrics["requests"] == 24
    log = (played.folder / "load.log").read_text()
    used = [int(count) for count in re.findall(r"c4 round \d: client processes: (\d+)", log)]
    assert used[0] == 1  # the load that did not count
    assert used[1:] in ([2, 2], [3, 3], [4, 4])
    assert f"from now on {used[1]} client processes" in (played.folder / "trial.log").read_text()


@pytest.mark.slow
def test_a_load_whose_clients_are_still_too_busy_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trouble, "MAX_CPU_SHARE", 0.0001)
    monkeypatch.setattr(trouble, "MIN_BUSY_S", 0.0)
    failure = play(tmp_path, {"workload": {"concurrency": [2], "requests": 4, "client_processes": 2}}).result.failure
    assert failure is not None
    assert (failure.kind, failure.blame, failure.stage) == (Kind.CLIENT_LIMITED, Blame.STUDY, Stage.LOAD)
    assert failure.evidence.startswith("the busiest of 2 load clients used")
    assert "workload.client_processes" in failure.remedy


@pytest.mark.slow
def test_a_trial_whose_client_is_killed_fails_by_its_environment(tmp_path: Path) -> None:
    workload = {"concurrency": [4], "requests": 400, "client_processes": 2, "traffic": "D(8,400)"}
    others = children(os.getpid())

    def kill_one(stage: Stage, share: float) -> None:
        if stage is Stage.LOAD and (found := children(os.getpid()) - others):
            os.kill(min(found), signal.SIGKILL)

    _, result = run_through(evaluation(tmp_path, {"workload": workload}, {}, on_progress=kill_one))
    assert result.failure is not None
    assert result.failure.blame is Blame.ENVIRONMENT
    assert "a load client ended with exit code -9" in result.failure.evidence
    assert children(os.getpid()) <= others
