"""A real vLLM, ended in four ways of which each left processes with gigabytes in other tools: nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from raytune_autotuner.engine.processes import Process, shared_memory
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.trial import State
from tests.studies import actor_of, command, marks, only_run, write_study
from tests.test_study_run import wait_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

START_S = 150.0


@dataclass
class Running:
    """A study with a vLLM in its only trial."""

    driver: subprocess.Popen[str]
    study: Path

    @property
    def folder(self) -> ResultsFolder:
        return only_run(self.study)

    @property
    def trial(self) -> Path:
        return next(self.folder.trials_dir.glob("0-*"))

    def engine(self, parts: int = 3) -> list[Process]:
        """The processes of its vLLM, once it has `parts` of them: API server, EngineCore and Worker."""
        if not ResultsFolder.runs(self.study.parent / "results"):
            return []
        found = [process for pid in marks(self.folder.path.name) if (process := Process.of(pid)) is not None]
        named = [process for process in found if b"vllm" in _command(process).lower()]
        return found if len(named) >= parts else []

    def await_load(self) -> None:
        wait_for(lambda: "[load] reached" in (self.trial / "trial.log").read_text(), START_S)

    def await_nothing_left(self, processes: list[Process]) -> None:
        wait_for(lambda: not any(process.alive for process in processes), 20)
        assert marks(self.folder.path.name) == {}


def _command(process: Process) -> bytes:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def running(folder: Path, address: str | None, timeout_s: float = 300) -> Iterator[Running]:
    """A study of one trial, without a second try, under a load that lasts."""
    study = write_study(
        folder,
        model="bundled:smollm2-135m-instruct",
        engine={
            "kind": "vllm",
            "args": {"max-model-len": 512, "enforce-eager": True},
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        },
        search_space={"max-num-seqs": {"choice": [4, 16]}},
        workload={"traffic": "D(32,400)", "concurrency": 4, "requests": 400, "warmup_requests": 0},
        search={"trials": 1},
        trial={"timeout_s": timeout_s, "hung_after_s": timeout_s, "retries": 0},
        resources={"cpus": 2},
    )
    options = ["--address", address] if address else []
    with subprocess.Popen(command(study, *options), stdout=subprocess.PIPE, text=True) as driver:
        try:
            yield Running(driver, study)
        finally:
            driver.kill()


def test_a_deadline_during_start_up(tmp_path: Path, ray_address: str) -> None:
    with running(tmp_path, ray_address, timeout_s=50) as vllm:
        parts = wait_for(lambda: vllm.engine(2), START_S)
        vllm.driver.communicate(timeout=120)
        vllm.await_nothing_left(parts)
    (row,) = vllm.folder.read_rows()
    assert row.state is State.FAILED
    assert row.result.failure is not None
    assert str(row.result.failure.kind) in ("deadline", "hung")


def test_its_actor_is_killed_under_load(tmp_path: Path, ray_address: str) -> None:
    with running(tmp_path, ray_address) as vllm:
        parts = wait_for(vllm.engine, START_S)
        vllm.await_load()
        segments = shared_memory(process.pid for process in parts)
        os.kill(actor_of(vllm.folder.path.name, vllm.trial.name.split("-", 1)[1]) or 0, signal.SIGKILL)
        vllm.await_nothing_left(parts)
        vllm.driver.communicate(timeout=60)
    assert segments
    wait_for(lambda: not any(segment.exists() for segment in segments), 5)
    log = (vllm.trial / "trial.log").read_text()
    assert re.search(r"engine ended \(owner-ended, exit code -9\).*no process left.*MB of shared memory removed", log)


def test_its_driver_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, None) as vllm:
        parts = wait_for(vllm.engine, START_S)
        vllm.driver.kill()
        vllm.driver.wait()
        vllm.await_nothing_left(parts)


def test_its_api_server_is_killed(tmp_path: Path, ray_address: str) -> None:
    with running(tmp_path, ray_address) as vllm:
        parts = wait_for(vllm.engine, START_S)
        os.kill(json.loads((vllm.trial / "process.json").read_text())["engine"], signal.SIGKILL)
        vllm.await_nothing_left(parts)
        vllm.driver.communicate(timeout=60)
    (row,) = vllm.folder.read_rows()
    assert row.state is State.FAILED
