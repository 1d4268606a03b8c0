"""An engine server from outside: ready, crashed, late, stopped; on real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine.contract import Launch
from raytune_autotuner.engine.logfile import read_log
from raytune_autotuner.engine.processes import (
    MARK_VARIABLE,
    FileLock,
    descendants,
    free_cores,
    free_port,
    make_mark,
    marked,
    oom_kills,
)
from raytune_autotuner.engine.reading import SIMULATED_RULES, split_stamp
from raytune_autotuner.engine.server import EngineServer, engine_environment
from raytune_autotuner.study.errors import TrialFailed
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage

SIMULATED = ("-m", "raytune_autotuner.engine.simulated", "--model", "m", "--startup-s", "0.2")
PACKAGE_PARENT = Path(__file__).parent.parent


class Bench:
    """Engine servers of one test, in folders of their own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    def start(self, arguments: Sequence[str], *, deadline_s: float = 30.0, **options: Any) -> EngineServer:
        """This Python with `arguments`, `{port}` filled in."""
        port = self._stack.enter_context(free_port())
        argv = (sys.executable, *(argument.replace("{port}", str(port)) for argument in arguments))
        argv = options.pop("argv", argv)
        options = {"grace_s": 5.0, "timeout_s": deadline_s, "rules": SIMULATED_RULES, "env": {}, **options}
        launch = Launch(argv, {"PYTHONPATH": str(PACKAGE_PARENT), **options.pop("env")})
        mark = make_mark("test", self.folder.name)
        deadline = time.monotonic() + deadline_s
        server = EngineServer(launch, port, self.folder / "trial", mark=mark, deadline=deadline, **options)
        return self._stack.enter_context(server)

    def run(self, code: str, **options: Any) -> EngineServer:
        """A small Python program in place of an engine."""
        return self.start(("-S", "-c", code), **options)

    def simulated(self, *arguments: str, **options: Any) -> EngineServer:
        return self.start((*SIMULATED, "--port", "{port}", *arguments), **options)


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def never() -> bool:
    return False


def failure_of(server: EngineServer) -> Failure:
    with pytest.raises(TrialFailed) as failed:
        server.wait_ready(never)
    return failed.value.failure


def check_until_it_fails(server: EngineServer) -> None:
    while True:
        server.check()
        time.sleep(0.01)


def lines_of(server: EngineServer) -> list[str]:
    return [split_stamp(line) for line in read_log(server.log_path)]


def test_an_engine_gets_ready_serves_and_stops_in_order(bench: Bench) -> None:
    server = bench.simulated()
    server.wait_ready()
    server.check()
    report = server.stop()
    assert (report.exit_code, report.killed, report.survivors) == (0, 0, 0)
    assert server.stage is Stage.READY


def test_progress_is_told_stage_by_stage(bench: Bench) -> None:
    told: list[tuple[Stage, float]] = []
    server = bench.simulated("--startup-s", "2", on_progress=lambda stage, share: told.append((stage, share)))
    server.wait_ready()
    orders = [stage.order for stage, _ in told]
    assert orders == sorted(orders)
    assert {Stage.INITIALIZATION, Stage.WEIGHTS} <= {stage for stage, _ in told}
    assert all(0 <= share <= 1 for _, share in told)


def test_a_crash_in_the_start_is_raised_with_the_logs_cause(bench: Bench) -> None:
    server = bench.simulated("--fault", "oom@kv-cache")
    failure = failure_of(server)
    assert failure.kind is Kind.OUT_OF_MEMORY
    assert failure.stage is Stage.KV_CACHE
    assert failure.blame is Blame.PARAMETERS


def test_a_crash_after_it_had_served_is_one_in_the_load(bench: Bench) -> None:
    server = bench.run("import time; time.sleep(0.5); raise SystemExit(5)")
    server.wait_ready(lambda: True)
    with pytest.raises(TrialFailed) as failed:
        check_until_it_fails(server)
    assert failed.value.failure.stage is Stage.LOAD
    assert "exit code 5" in failed.value.failure.evidence


def test_a_crash_is_seen_while_the_port_answers_nothing(bench: Bench) -> None:
    code = """
import socket, sys, time, threading, os
listening = socket.create_server(("127.0.0.1", {port}))
threading.Timer(0.5, lambda: os._exit(9)).start()
time.sleep(60)
"""
    server = bench.run(code)
    with pytest.raises(TrialFailed, match="exit code 9"):
        server.wait_ready()


def test_the_deadline_ends_the_start_in_the_stage_reached(bench: Bench) -> None:
    server = bench.simulated("--fault", "hang@weights", deadline_s=2.0)
    failure = failure_of(server)
    assert failure.kind is Kind.DEADLINE
    assert failure.evidence == "timed out after 2 seconds"
    assert failure.stage is Stage.WEIGHTS


def test_the_limit_in_the_evidence_is_the_one_that_was_asked_for(bench: Bench) -> None:
    server = bench.run("import time; time.sleep(60)", deadline_s=0.3, timeout_s=600)
    assert failure_of(server).evidence == "timed out after 600 seconds"


def test_a_command_that_does_not_exist_is_the_studys_fault(bench: Bench, tmp_path: Path) -> None:
    launch = Launch((str(tmp_path / "no-such-engine"),), {})
    options: dict[str, Any] = {"rules": SIMULATED_RULES, "deadline": time.monotonic() + 30, "timeout_s": 30}
    with EngineServer(launch, 1, tmp_path, mark=make_mark("test", "none"), **options) as server:
        failure = failure_of(server)
    assert failure.blame is Blame.STUDY
    assert "no-such-engine" in failure.evidence


def test_the_check_is_good_from_another_thread(bench: Bench) -> None:
    server = bench.run("import time; time.sleep(0.3); raise SystemExit(4)")
    seen: list[Exception] = []

    def watch() -> None:
        try:
            check_until_it_fails(server)
        except TrialFailed as failed:
            seen.append(failed)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join(20)
    assert "exit code 4" in str(seen[0])


def test_waiting_ends_when_another_thread_stops_the_engine(bench: Bench) -> None:
    server = bench.run("import time; time.sleep(60)")
    threading.Timer(0.3, server.kill).start()
    assert failure_of(server).evidence == "was stopped before it served"


def test_an_engine_that_ignores_sigterm_is_killed_after_its_grace(bench: Bench) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    server = bench.run(code, grace_s=0.3)
    server.wait_ready(server.log_path.exists)
    report = server.stop()
    assert report.survivors == 0
    assert report.exit_code in (-9, -15)


def test_stopping_twice_gives_the_same_report(bench: Bench) -> None:
    server = bench.run("import time; time.sleep(60)")
    assert server.stop() is server.stop()
    assert server.kill() is server.stop()


def test_an_engine_stopped_before_it_had_started_leaves_nothing(bench: Bench) -> None:
    server = bench.run("import time; time.sleep(60)")
    report = server.stop()
    assert report.survivors == 0


def test_an_engine_gets_no_signal_ignored_or_blocked_and_a_clean_terminal(bench: Bench) -> None:
    code = """
import os, re, signal
status = open("/proc/self/status").read()
print("ignored", int(re.search(r"SigIgn:\\s*(\\w+)", status)[1], 16) & ((1 << 14) | (1 << 16) | 3))
print("blocked", int(re.search(r"SigBlk:\\s*(\\w+)", status)[1], 16))
print("session", os.getsid(0) == os.getpid(), "input", os.read(0, 1))
print("descriptors", sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:3], len(os.listdir("/proc/self/fd")))
"""
    server = bench.run(code)
    failure_of(server)
    said = lines_of(server)
    assert said[:3] == ["ignored 0", "blocked 0", "session True input b''"]
    assert said[3] == "descriptors [0, 1, 2] 4"  # The fourth is the folder being listed.


def test_the_environment_is_ours_less_what_ray_added_for_its_workers() -> None:
    base = {"HOME": "/h", "RAY_JOB_ID": "1", "RAY_RAYLET_PID": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    env = engine_environment(Launch((), {"VLLM_X": "2"}), "the-mark", {**base, "PYTHONPATH": "/p"})
    assert env.keys() >= {"HOME", "PYTHONPATH", "VLLM_X"}
    assert not {name for name in env if name.startswith("RAY_")}
    assert env[MARK_VARIABLE] == "the-mark"
    assert ("OMP_NUM_THREADS" in env) == (b"\0OMP_NUM_THREADS=" in Path("/proc/self/environ").read_bytes())


@pytest.mark.parametrize("base", [{"OMP_NUM_THREADS": "3"}, {"RAY_RAYLET_PID": "0", "OMP_NUM_THREADS": "1"}])
def test_threads_that_the_study_or_the_user_set_stay(base: dict[str, str]) -> None:
    launch = Launch((), {} if "RAY_RAYLET_PID" not in base else {"OMP_NUM_THREADS": "3"})
    assert engine_environment(launch, "mark", base)["OMP_NUM_THREADS"] == "3"


def test_a_process_that_renames_itself_keeps_its_mark(bench: Bench) -> None:
    pytest.importorskip("setproctitle", reason="setproctitle comes with the engine")
    code = "import time, setproctitle; setproctitle.setproctitle('VLLM::EngineCore' * 9); print('up'); time.sleep(60)"
    server = bench.start(("-c", code))
    server.wait_ready(lambda: server.log_path.exists() and "up" in server.log_path.read_text())
    assert [process.pid for process in marked(make_mark("test", bench.folder.name))] == [server.pid]


def test_the_log_has_time_and_stage_on_every_line_and_the_engines_own_words(bench: Bench) -> None:
    code = r"""
import sys
write = sys.stdout.buffer.write
write("plain ü\r\n".encode())
write(b"\r 10%\r 50%\r100%\n\n")
write(b"rub\xff\xfebish\x00\x07\n")
write(b"x" * 100_000 + b"\n")
write(b"no end")
"""
    server = bench.run(code)
    failure_of(server)
    raw = list(read_log(server.log_path))
    assert all(line.startswith("20") and "Z [arguments] " in line for line in raw)
    said = lines_of(server)
    assert said[:4] == ["plain ü", " 10%", " 50%", "100%"]
    assert said[4] == "rub\ufffd\ufffdbish\ufffd\ufffd"
    assert said[5].startswith("xxx")
    assert said[5].endswith(" bytes cut]")
    assert said[6] == "no end"


def test_a_line_without_an_end_is_written_all_the_same(bench: Bench) -> None:
    server = bench.run("import time; print('Loading', end='', flush=True); time.sleep(60)")
    server.wait_ready(lambda: "Loading" in "".join(lines_of(server)))


def test_a_log_that_cannot_be_written_does_not_end_the_engine(bench: Bench) -> None:
    (bench.folder / "trial").mkdir()
    (bench.folder / "trial" / "engine.log").symlink_to("/dev/full")
    seen = threading.Event()
    server = bench.run(
        "import time\nfor i in range(50): print('line', i, flush=True); time.sleep(0.01)\ntime.sleep(60)",
        on_progress=lambda stage, share: seen.set(),
    )
    assert seen.wait(20)
    time.sleep(0.6)
    server.check()


def test_a_log_beyond_its_limit_keeps_head_and_tail(bench: Bench) -> None:
    server = bench.run("for i in range(20_000): print('line', i)", log_limit_mb=0.1)
    failure_of(server)
    said = lines_of(server)
    assert said[0] == "line 0"
    assert said[-1] == "line 19999"
    assert sum(file.stat().st_size for file in server.log_path.parent.glob("engine*.log")) <= 100_000 + 200


_TRIAL_IN_A_CGROUP = """
import os, sys, time
from pathlib import Path
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from raytune_autotuner.engine.contract import Launch
from raytune_autotuner.engine.processes import free_port, make_mark
from raytune_autotuner.engine.reading import SIMULATED_RULES
from raytune_autotuner.engine.server import EngineServer
from raytune_autotuner.study.errors import TrialFailed
work = "held = bytearray(400_000_000)"
code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {work!r}]); sys.exit(1)"
with free_port() as port:
    options = {"rules": SIMULATED_RULES, "mark": make_mark("test", "cgroup"), "deadline": time.monotonic() + 30}
    launch = Launch((sys.executable, "-S", "-c", code), {})
    with EngineServer(launch, port, Path(sys.argv[2]), timeout_s=30, **options) as server:
        try:
            server.wait_ready()
        except TrialFailed as failed:
            print(failed.failure.kind, failed.failure.blame, failed.failure.evidence)
"""


@pytest.fixture
def small_cgroup(tmp_path: Path) -> Iterator[Path]:
    """A memory cgroup that holds 200 MB."""
    own = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line]
    folder = Path("/sys/fs/cgroup/memory") / own[0][2].lstrip("/") / tmp_path.name if own else tmp_path / "none"
    folder = folder if folder.parent.is_dir() else Path("/sys/fs/cgroup/memory") / tmp_path.name
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text("200000000")
    except OSError as error:
        pytest.skip(f"memory cgroups (version 1) cannot be made here: {error}")
    yield folder
    until = time.monotonic() + 10
    while (folder / "cgroup.procs").read_text() and time.monotonic() < until:
        time.sleep(0.05)  # what the kernel has ended is still being buried
    folder.rmdir()


def test_a_worker_that_the_kernel_ended_for_memory_is_told_as_out_of_memory(tmp_path: Path, small_cgroup: Path) -> None:
    command = [sys.executable, "-c", _TRIAL_IN_A_CGROUP, str(small_cgroup), str(tmp_path / "trial")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    if "oom_kill 0" in (small_cgroup / "memory.oom_control").read_text():
        pytest.skip("this kernel does not end processes for their cgroup's limit")
    assert done.stdout.startswith("out-of-memory parameters the kernel ended a process for want of memory")


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.events": "low 0\noom 3\noom_kill 2\n"}, 2),
        ({"proc/self/cgroup": "4:memory:/x\n", "sys/fs/cgroup/memory/memory.oom_control": "oom_kill 1\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "proc/vmstat": "nr_free_pages 7\noom_kill 5\n"}, 5),
        ({"proc/vmstat": "nr_free_pages 7\n"}, None),
    ],
    ids=["cgroup 2", "cgroup 1 seen from a container", "the machine", "nowhere"],
)
def test_kills_for_memory_are_counted_where_the_kernel_counts_them(
    tmp_path: Path, files: dict[str, str], count: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == count


def test_an_engine_that_gets_cores_of_its_own_has_them_and_all_below_it(bench: Bench) -> None:
    core = min(os.sched_getaffinity(0))
    server = bench.run("import subprocess; subprocess.run(['sleep', '30'])", cores=(core,))
    while not server.pid or not (children := descendants(server.pid)):
        time.sleep(0.05)
    assert {os.sched_getaffinity(pid) == {core} for pid in (server.pid, *(child.pid for child in children))} == {True}


def test_two_trials_do_not_share_cores_and_one_that_finds_too_few_is_not_bound() -> None:
    count = len(os.sched_getaffinity(0))
    with free_cores(1) as first, free_cores(max(count - 1, 1)) as second:
        assert len(first) == 1
        assert not set(first) & set(second)
        with free_cores(count) as third:
            assert third == ()
    with free_cores(count) as all_of_them:
        assert len(all_of_them) == count


def test_a_command_that_is_not_there_is_the_studys_fault(bench: Bench) -> None:
    server = bench.start((), argv=("/nowhere/python",))
    failure = failure_of(server)
    assert (failure.stage, failure.blame) == (Stage.ARGUMENTS, Blame.STUDY)
    assert failure.evidence == "could not be started: No such file or directory: /nowhere/python"


def test_a_trials_folder_that_is_gone_is_the_machines_fault(bench: Bench, tmp_path: Path) -> None:
    held = FileLock("gpu-test-folder")
    assert held.acquire()
    server = bench.run("", locks=["gpu-test-folder"])
    shutil.rmtree(tmp_path / "trial")
    (tmp_path / "trial").write_text("")
    held.release()
    failure = failure_of(server)
    assert (failure.kind, failure.blame) == (Kind.ENGINE_DIED, Blame.ENVIRONMENT)
    assert "Not a directory" in failure.evidence
