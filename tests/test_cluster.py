"""A study over several Ray nodes that share no path, of which one dies and another one joins while it runs.

What was lost is run again elsewhere, and all files come back; of what was lost, those from before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

import raytune_autotuner
from raytune_autotuner.report.results import ResultsFolder
from tests.ray_nodes import Network, RayNode, environment, why_not
from tests.studies import command, marks, only_run, optuna_trials, write_study
from tests.test_study_run import SLOW, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
PACKAGE = Path(raytune_autotuner.__file__).parent
HUNG = "hang@initialization"


@pytest.fixture
def network() -> Iterator[Network]:
    if why := why_not():
        pytest.skip(why)
    with Network() as network:
        yield network


def test_a_study_goes_on_while_nodes_die_and_join_and_their_files_come_back(tmp_path: Path, network: Network) -> None:
    (tmp_path / "results").mkdir()
    # The package is on the head alone, as are the results; and the head's own CPU is not of the zone that is wanted.
    apart = [tmp_path / "results", PACKAGE]
    head = network.start_head("--num-cpus=1", "--include-dashboard=true")
    first = network.start_node("--labels=zone=far", hide=apart)
    study = write_study(
        tmp_path,
        engine={"args": {"fault": "none", "max-num-seqs": 64, "speed": 1}},
        search_space={"fault": {"choice": ["none", HUNG]}, "max-num-seqs": {"choice": [8, 64]}},
        search={"trials": 3, "points": [{"fault": HUNG}, {"fault": "none", "max-num-seqs": 8}]},
        workload={**SLOW, "requests": 20},
        trial={"timeout_s": 40, "hung_after_s": 4},
        resources={"cpus": 1, "node_labels": {"zone": "far"}},
    )
    driver = subprocess.Popen(
        head.inside(command(study, "--address", "auto")), env=environment(), stdout=subprocess.PIPE, text=True
    )
    with driver:
        wait_for(lambda: any(log.stat().st_size for log in study.parent.glob("results/*/trials/2-*/engine.log")))
        assert any(mark.endswith(trial_id(study, 2)) for mark in marks_of(study).values())  # it still runs
        first.kill()
        second = network.start_node("--labels=zone=far", hide=apart)
        said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    folder = only_run(study)
    assert actors(head) == {
        ("TrialMonitor", f"{folder.path.name} monitor"),
        *(("EngineTrial", f"{folder.path.name} trial {number}") for number in range(4)),
        *(("FileReader", f"{folder.path.name} files on {node.name}") for node in (first, second)),
        *(("EngineHost", f"test engine on {node.name}") for node in (first, second)),
    }
    rows = folder.read_rows()
    assert [(str(row.state), row.result.node) for row in rows] == [
        ("measured", first.name),
        ("failed", first.name),
        ("lost", first.name),
        ("measured", second.name),
    ]
    assert rows[2].result.failure is not None
    assert (str(rows[2].result.failure.kind), rows[3].retry_of) == ("node-lost", 2)
    told = [trial.state for trial in optuna_trials(folder)]
    assert told == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    for row, last in zip(rows, ("measured in", "initialization", "", "measured in"), strict=True):
        there = folder.trial_dir(row.number, row.trial_id)
        assert {"trial.log", "engine.log", "command.json"} <= {path.name for path in there.iterdir()}
        assert last in (there / "trial.log").read_text()
    assert (folder.find_trial_dir(0) / "requests.parquet").is_file()
    assert marks_of(study) == {}


def actors(head: RayNode) -> set[tuple[str, str]]:
    """Class and name of each actor that the cluster has seen, as Ray's dashboard shows them."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "list", "actors", "--detail", "--format=json"]
    said = subprocess.run(head.inside(words), env=environment(), capture_output=True, text=True, check=True)
    return {(actor["class_name"], actor["repr_name"]) for actor in json.loads(said.stdout)}


def trial_id(study: Path, number: int) -> str:
    """The id of the study's trial, as marks end with it; no mark ends with that of one that was not begun."""
    begun = [*study.parent.glob(f"results/*/trials/{number}-*/trial.json")]
    return f":{begun[0].parent.name.partition('-')[2]}" if begun else "not begun"


def marks_of(study: Path) -> dict[int, str]:
    """The processes of the study's trials, on all nodes."""
    runs = ResultsFolder.runs(study.parent / "results")
    return {pid: mark for run in runs for pid, mark in marks(run.path.name).items()}


def test_a_trial_over_two_nodes_is_measured_and_the_end_of_one_is_the_end_of_both(
    tmp_path: Path, network: Network
) -> None:
    crash = "crash@load:after=8:rank=1"
    (tmp_path / "results").mkdir()
    head = network.start_head()
    nodes = [network.start_node(hide=[tmp_path / "results"], wait=False) for _ in range(2)]
    for node in nodes:
        node.await_start()
    study = write_study(
        tmp_path,
        engine={"args": {"pipeline-parallel-size": 2, "fault": "none"}},
        search_space={"fault": {"choice": ["none", crash]}},
        search={"trials": 2, "points": [{"fault": crash}]},
        workload={**SLOW, "concurrency": 1, "requests": 10},
        resources={"cpus": 1, "nodes": 2},
    )
    done = subprocess.run(
        head.inside(command(study, "--address", "auto")),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only_run(study)
    ended = [row for row in folder.read_rows() if str(row.state) != "lost"]  # by the load's client, on a busy machine
    measured, crashed = sorted(ended, key=lambda row: str(row.params.get("fault", "")))
    assert (str(measured.state), measured.result.hardware[:9]) == ("measured", "2 nodes: ")
    assert crashed.result.failure is not None
    assert crashed.result.failure.evidence.startswith("rank 1 on node")
    assert "the engine broke down (a simulated fault)" in crashed.result.failure.evidence
    for row in (measured, crashed):
        there = folder.trial_dir(row.number, row.trial_id)
        assert {"trial.log", "engine.log", "engine-1.log", "process-1.json"} <= {path.name for path in there.iterdir()}
        assert "no process left" in (there / "trial-1.log").read_text()
    assert marks_of(study) == {}
    assert not any("raytune_autotuner.engine" in command_of(pid) for node in nodes for pid in node.processes)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
