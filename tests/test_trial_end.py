"""A trial's end: SIGTERM first, late results kept, shut-down lines no failure, a lost monitor survived."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_autotuner.engine.gpus import GpuMemory
from raytune_autotuner.engine.processes import MARK_VARIABLE, descendants, free_shared_memory, make_mark, sweep
from raytune_autotuner.engine.protocol import Cause
from raytune_autotuner.engine.reading import VLLM_RULES
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.failure import Kind
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.trial import State
from raytune_autotuner.tune.reporter import TrialReporter
from raytune_autotuner.tune.standing import Standing
from raytune_autotuner.tune.versions import code_state
from tests.studies import command, marks, only_run, run_study, write_study
from tests.test_study_run import wait_for

LOGS = Path(__file__).parent / "engine_logs"


@pytest.mark.slow
def test_a_result_from_before_the_deadline_is_kept_though_the_engines_end_takes_longer(
    tmp_path: Path, ray_address: str
) -> None:
    study = write_study(
        tmp_path,
        engine={"args": {"fault": "ignore-term@ready"}},
        search={"trials": 1},
        trial={"timeout_s": 8, "hung_after_s": 8},
    )
    done, folder = run_study(study, "--address", ray_address)
    assert done.returncode == 0, done.stdout
    (row,) = folder.read_rows()
    assert row.state is State.MEASURED
    # It was asked with SIGTERM, and the deadline passed while it was waited for.
    assert "(deadline, exit code -9); 1 killed; no process left" in (folder.find_trial_dir(0) / "trial.log").read_text()


@pytest.mark.slow
def test_the_engines_shut_down_is_no_failure(tmp_path: Path, ray_address: str) -> None:
    study = write_study(tmp_path, search={"trials": 1})
    done, folder = run_study(study, "--address", ray_address)
    assert done.returncode == 0, done.stdout
    (row,) = folder.read_rows()
    assert (row.state, row.result.failure) == (State.MEASURED, None)
    assert "Shutting down" in (folder.find_trial_dir(0) / "engine.log").read_text()
    assert "engine ended (stopped, exit code 0); 0 killed" in (folder.find_trial_dir(0) / "trial.log").read_text()


@pytest.mark.parametrize(
    ("cause", "state"), [(Cause.OWNER_ENDED, State.LOST), (Cause.STOPPED, State.LOST), (Cause.EXITED, State.FAILED)]
)
def test_what_an_engine_prints_while_it_is_ended_is_not_why_its_trial_ended(
    tmp_path: Path, cause: Cause, state: State
) -> None:
    study = load_study(write_study(tmp_path))
    folder = ResultsFolder.create(tmp_path / "results", study)
    reporter = TrialReporter(study, folder, VLLM_RULES, standing_of=lambda trial_id: Standing(started_at=1.0))
    reporter.suggested("abc", {}, {})
    reporter.started("abc")
    trial_dir = folder.trial_dir(0, "abc")
    log = "termload.log" if cause is not Cause.EXITED else "kvsmall.log"
    (trial_dir / "engine.log").write_bytes((LOGS / log).read_bytes())
    (trial_dir / "process.json").write_text(json.dumps({"cause": cause}))
    assert reporter.ended("abc", None).state is state


def test_a_trial_lost_with_its_node_is_not_its_settings_fault_and_run_again_until_three_nodes_are_gone(
    tmp_path: Path,
) -> None:
    study = load_study(write_study(tmp_path, trial={"retries": 0}))
    folder = ResultsFolder.create(tmp_path / "results", study)
    standing = Standing(started_at=1.0, node_id="gone", node="node2", ended_by=Kind.HUNG)
    reporter = TrialReporter(
        study, folder, VLLM_RULES, standing_of=lambda _: standing, node_answers=lambda node_id: node_id != "gone"
    )
    again = []
    for trial_id in ("a", "b", "c"):
        reporter.suggested(trial_id, {}, {})
        row = reporter.ended(trial_id, None)
        assert row.result.failure is not None
        assert (row.state, row.result.failure.kind, row.result.node) == (State.LOST, Kind.NODE_LOST, "node2")
        again.append(reporter.to_retry(row))
    assert again == [True, True, False]


def test_a_trial_that_cannot_begin_on_code_that_has_changed_ends_the_study_for_now_and_says_so(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    folder = ResultsFolder.create(tmp_path / "results", study)
    package = tmp_path / "package"
    package.mkdir()
    (package / "module.py").write_text("first = 1")
    reporter = TrialReporter(
        study, folder, VLLM_RULES, standing_of=lambda _: Standing(), code=lambda: code_state(package)
    )
    reporter.suggested("before", {}, {})
    assert reporter.ended("before", None).state is State.LOST
    (package / "module.py").write_text("first = 1\nsecond = 2")
    reporter.suggested("after", {}, {})
    assert reporter.ended("after", None).state is State.INTERRUPTED
    assert not reporter.wanted
    assert reporter.ending is not None
    assert "has changed on this machine since the study began" in reporter.ending


@pytest.mark.slow
def test_a_study_survives_the_death_of_its_monitor(tmp_path: Path, ray_address: str) -> None:
    study = write_study(
        tmp_path,
        engine={"args": {"fault": "zombie-print@initialization,slow-start@compilation:seconds=60"}},
        search_space={"fault": {"choice": ["none"]}},
        search={"trials": 2, "points": [{"fault": "none"}]},
        trial={"timeout_s": 8, "hung_after_s": 8},
        resources={"max_concurrent": 1},
    )
    before = monitors()
    with subprocess.Popen(command(study, "--address", ray_address), stdout=subprocess.PIPE, text=True) as driver:
        wait_for(lambda: list(study.parent.glob("results/*/trials/0-*/engine.log")))
        (monitor,) = monitors() - before
        os.kill(monitor, signal.SIGKILL)
        said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    folder = only_run(study)
    first, second = folder.read_rows()
    assert first.result.failure is not None
    assert (first.state, str(first.result.failure.kind)) == (State.FAILED, "deadline")
    assert second.state is State.MEASURED
    assert marks(folder.path.name) == {}


def monitors() -> set[int]:
    """The processes of the monitors of this session's Ray; other studies on the machine have theirs."""
    pids = [process.pid for process in descendants(os.getpid())]
    return {pid for pid in pids if is_monitor(Path("/proc", str(pid), "cmdline"))}


def is_monitor(cmdline: Path) -> bool:
    try:
        return cmdline.read_bytes().startswith(b"ray::TrialMonitor")
    except OSError:
        return False


SEGMENT = """
import sys, time
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(name=sys.argv[1] or None, create=not sys.argv[1], size=4096)
resource_tracker.unregister(segment._name, "shared_memory")  # as when its keeper is killed too
print(segment.name, flush=True)
time.sleep(60)
"""


def user_of_shared_memory(name: str = "", mark: str = "") -> tuple[subprocess.Popen[str], Path]:
    """A process that has a segment mapped (a new one without `name`), and the segment."""
    env = {**os.environ, MARK_VARIABLE: mark}
    process = subprocess.Popen([sys.executable, "-c", SEGMENT, name], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path("/dev/shm", process.stdout.readline().strip())


def test_shared_memory_of_the_killed_is_given_back_but_not_while_another_uses_it() -> None:
    mark = make_mark("test", "shared-memory")
    owner, segment = user_of_shared_memory(mark=mark)
    other, _ = user_of_shared_memory(segment.name)
    with owner, other:
        sweep(mark)
        assert owner.wait() == -signal.SIGKILL
        assert segment.exists()
        other.kill()
        other.wait()
        assert free_shared_memory({segment}) == 4096
        assert not segment.exists()


def test_a_gpu_that_nvml_does_not_know_is_not_watched() -> None:
    memory = GpuMemory(["no such GPU"])
    memory.remember()
    memory.await_return()
    assert (memory.levels, memory.held) == ({}, ())
