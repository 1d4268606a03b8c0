"""Trials on another node that shares no path with the driver's: their files come back, also of those that were killed.

The other node is a second Ray node on this machine, in a mount namespace of its own, where an empty file system lies
over the results folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def far_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster whose only CPUs are on a node that does not see `tmp_path`/results."""
    if not can_make_namespaces():
        pytest.skip("mount namespaces cannot be made here (unshare --mount)")
    results = tmp_path / "results"
    results.mkdir()
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    with subprocess.Popen(
        [sys.executable, "-c", _HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as head:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
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
                str(results),
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
            yield address
        finally:
            node.kill()  # and, by --kill-child, all that is in its namespace
            node.communicate(timeout=30)
            Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # by which others would join it
            head.communicate()


def test_files_come_back_from_another_node_also_of_a_killed_trial(tmp_path: Path, far_address: str) -> None:
    study = write_study(
        tmp_path,
        search_space={"fault": {"choice": ["none", "hang@initialization"]}},
        engine={"args": {"fault": "none"}},
        search={"trials": 2, "points": [{"fault": "hang@initialization"}]},
        trial={"timeout_s": 20, "hung_after_s": 3},
    )
    done = subprocess.run(
        command(study, "--address", far_address), capture_output=True, text=True, timeout=200, check=False
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
