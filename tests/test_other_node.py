"""Trials on another node that shares no path with the driver's: their files come back, also of those that were killed,
and of a node that is lost as far as they had been written some seconds before.

The other node is a second Ray node on this machine, in a mount namespace of its own, where an empty file system lies
over the folder of the results.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.study.trial import State
from tests.studies import command, only_run, write_study

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
# A cluster that a study starts listens on loopback alone: no other node can join it.
_HEAD = """
import sys, ray
ray.init(address="local", num_cpus=0, include_dashboard=False, object_store_memory=128 * 1024**2)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
_NODE = 'mount -t tmpfs none "$0" && exec "$1" -m ray.scripts.scripts start --address="$2" --num-cpus=2 --block'


def can_make_namespaces() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class FarNode:
    """A node that holds all CPUs of its cluster and does not see the results folder."""

    address: str
    process: subprocess.Popen[str]
    home: Path

    def study(self, name: str, **changes: Any) -> Path:
        """A study file in a folder of its own."""
        (self.home / name).mkdir()
        return write_study(self.home / name, **changes)

    def lose(self) -> None:
        """End it, with all that is in its namespace, and all that was written there."""
        self.process.kill()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarNode]:
    """A cluster whose only CPUs are on a node that does not see `home`, where its studies and results are."""
    if not can_make_namespaces():
        pytest.skip("mount namespaces cannot be made here (unshare --mount)")
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    with subprocess.Popen(
        [sys.executable, "-c", _HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as head:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        before = os.environ.get("RAY_AUTH_MODE")
        os.environ["RAY_AUTH_MODE"] = "token"
        node = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--kill-child",
                "--pid",
                "--fork",
                "--mount-proc",
                "bash",
                "-c",
                _NODE,
                str(home),
                sys.executable,
                address,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert node.stdout is not None
            said: list[str] = []
            while (line := node.stdout.readline()) and "Ray runtime started" not in line:
                said.append(line)
            assert node.poll() is None, "".join(said)
            yield FarNode(address, node, home)
        finally:
            node.kill()  # and, by --kill-child, all that is in its namespace
            node.communicate(timeout=30)
            Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # by which others would join it
            head.communicate()
            if before is None:  # else it is the session's, for its own Ray
                del os.environ["RAY_AUTH_MODE"]


def test_files_come_back_from_another_node_also_of_a_killed_trial(far: FarNode) -> None:
    study = far.study(
        "killed",
        search_space={"fault": {"choice": ["none", "hang@initialization"]}},
        engine={"args": {"fault": "none"}},
        search={"trials": 2, "points": [{"fault": "hang@initialization"}]},
        trial={"timeout_s": 20, "hung_after_s": 3},
    )
    done = subprocess.run(
        command(study, "--address", far.address), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only_run(study)
    rows = folder.read_rows()
    assert [row.state for row in rows] == [State.MEASURED, State.FAILED]
    for row, last in zip(rows, ("measured in", "initialization"), strict=True):
        there = folder.trial_dir(row.number, row.trial_id)
        assert {"trial.log", "engine.log", "command.json"} <= {path.name for path in there.iterdir()}
        assert last in (there / "trial.log").read_text()
    assert (folder.find_trial_dir(0) / "requests.parquet").is_file()


def test_logs_come_while_a_trial_runs_and_stay_when_its_node_is_lost(far: FarNode) -> None:
    study = far.study(  # the last test here, as no node is left after it
        "lost",
        engine={"args": {"fault": "hang@initialization"}},
        trial={"timeout_s": 300, "hung_after_s": 200},
    )
    with subprocess.Popen(command(study, "--address", far.address), stdout=subprocess.DEVNULL) as driver:
        try:
            log = await_log(study.parent / "results", "[initialization]")
            far.lose()
            driver.send_signal(signal.SIGINT)
            driver.wait(timeout=100)
        finally:
            driver.kill()
    (row,) = only_run(study).read_rows()
    assert row.state is not State.MEASURED
    assert "[initialization]" in log.read_text()
    assert {"trial.log", "engine.log", "command.json"} <= {path.name for path in log.parent.iterdir()}


def await_log(results: Path, text: str) -> Path:
    """The engine's log of trial 0, once it has come with `text` in it: while the trial runs, as it hangs there."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        for log in results.glob("*/trials/0-*/engine.log"):
            if text in log.read_text():
                return log
        time.sleep(0.2)
    raise AssertionError("no such log within 100 s")
