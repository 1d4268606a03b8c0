"""Studies that were interrupted go on: nothing measured is lost or measured twice, and what changed is named."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.report.results import ResultsFolder, write_result
from raytune_autotuner.report.status import StudyStatus, read_status, write_status
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from raytune_autotuner.tune.resume import check_versions, kept_rows, unfinished_run
from tests.ray_nodes import OBJECT_STORE_BYTES, RAY_START, START_S, environment
from tests.studies import command, marks, only_run, optuna_trials, run_study, write_study
from tests.test_study_run import wait_for


def begun(folder: Path, phase: str = "interrupted", **changes: Any) -> tuple[Study, ResultsFolder]:
    study = load_study(write_study(folder, **changes))
    run = ResultsFolder.create(folder / "results", study)
    status = StudyStatus.begin(1)
    write_status(run, StudyStatus(phase, status.started_at, status.updated_at, 1, 0, status.host))  # type: ignore[arg-type]
    return study, run


def test_the_newest_unfinished_run_is_taken(tmp_path: Path) -> None:
    begun(tmp_path)
    study, newest = begun(tmp_path)
    begun(tmp_path, phase="finished")
    assert unfinished_run(study, tmp_path / "results") == newest


def test_without_an_unfinished_run_there_is_nothing_to_resume(tmp_path: Path) -> None:
    study, _ = begun(tmp_path, phase="finished")
    with pytest.raises(ConfigError, match="there is no unfinished run of test"):
        unfinished_run(study, tmp_path / "results")


def test_a_study_that_still_runs_is_left_alone(tmp_path: Path) -> None:
    study, run = begun(tmp_path)
    write_status(run, StudyStatus.begin(1))
    with pytest.raises(ConfigError, match="still runs"):
        unfinished_run(study, tmp_path / "results")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"workload": {"concurrency": 4}}, r"workload.concurrency was \[8\] .* is \[4\] now"),
        ({"model": "other"}, "model was 'simulated-model' .* is 'other' now"),
        ({"search_space": {"max-num-seqs": {"choice": [2, 8]}}}, "search_space.* was"),
        ({"objective": {"slo": {"ttft_ms": {"mean": 5.0}}}}, "objective.slo.* was"),
        ({"resources": {"price_per_hour": 2.0}}, "resources.price_per_hour was"),
    ],
)
def test_a_change_in_what_is_measured_is_refused_and_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    begun(tmp_path)
    with pytest.raises(ConfigError, match=named):
        unfinished_run(load_study(write_study(tmp_path, **changes)), tmp_path / "results")


def test_more_trials_and_a_longer_budget_are_no_such_change(tmp_path: Path) -> None:
    _, run = begun(tmp_path)
    more = load_study(write_study(tmp_path, search={"trials": 40, "time_budget": "2h"}, verify={"top": 3}))
    assert unfinished_run(more, tmp_path / "results") == run


def test_a_result_that_the_driver_did_not_live_to_see_is_kept(tmp_path: Path) -> None:
    study, run = begun(tmp_path)
    run.write_rows([TrialRow(0, "a", "baseline", {}, State.MEASURED, score=1.0)])
    for number, trial_id in ((0, "a"), (1, "b"), (2, "c")):
        run.add_suggestion(TrialRow(number, trial_id, "", {"max-num-seqs": 2}))
    (run.trial_dir(1, "b") / "result.json").write_text(json.dumps({"metrics": {"drift": 0.5}, "failure": None}))
    rows = kept_rows(run, study)
    assert [(row.number, row.state) for row in rows] == [
        (0, State.MEASURED),
        (1, State.RUNNING),
        (2, State.PENDING),
    ]
    assert rows[1].result.metrics == {"drift": 0.5}


def test_a_folder_with_broken_files_goes_on_without_them(tmp_path: Path) -> None:
    study, run = begun(tmp_path)
    for number in range(3):
        run.add_suggestion(TrialRow(number, "t", "", {"max-num-seqs": 2}))
    for path in (run.status_file, run.versions_file, run.trial_dir(0, "t") / "trial.json"):
        path.write_text("{broken")
    (run.trial_dir(1, "t") / "result.json").write_text('{"metr')
    assert unfinished_run(study, tmp_path / "results") == run
    check_versions(run, {"vllm": "0.32.0"})
    assert [(row.number, row.state) for row in kept_rows(run, study)] == [(1, State.PENDING), (2, State.PENDING)]
    run.study_file.write_text("study: [")
    with pytest.raises(ConfigError, match=r"study\.yaml: is broken"):
        unfinished_run(study, tmp_path / "results")


def test_a_trial_that_failed_by_the_studys_fault_says_nothing_and_is_run_again(tmp_path: Path) -> None:
    study, run = begun(tmp_path, phase="at fault")
    fault = Failure(Stage.WEIGHTS, Kind.MODEL_NOT_FOUND, Blame.STUDY, "no such folder", "Put it there.")
    own = replace(fault, kind=Kind.OUT_OF_MEMORY, blame=Blame.PARAMETERS)
    run.write_rows([_failed(0, fault), _failed(1, own), _failed(2, fault)])
    assert unfinished_run(study, tmp_path / "results") == run
    run.add_suggestion(TrialRow(3, "t3", "", {}))  # the driver did not live to see its end
    write_result(run.trial_dir(3, "t3"), TrialResult(failure=fault))
    states = [(row.state, row.result.failure, row.penalty) for row in kept_rows(run, study)]
    gone = (State.INTERRUPTED, None, None)
    assert states == [gone, (State.FAILED, own, 1.5), gone, gone]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"verify": {"restarts": 9}}, State.MEASURED),
        ({"verify": {"top": 3}}, State.INTERRUPTED),
        ({"search": {"trials": 9}}, State.INTERRUPTED),
    ],
)
def test_restarts_are_measured_again_side_by_side_where_there_may_be_other_finalists(
    tmp_path: Path, changes: dict[str, Any], state: State
) -> None:
    _, run = begun(tmp_path)
    row = TrialRow(0, "a", "baseline", {}, State.MEASURED, score=1.0)
    again = replace(row, number=1, trial_id="b", name="", verifies=0, restart=0)
    run.write_rows([row, again])
    run.add_suggestion(replace(again, number=2, trial_id="c", state=State.PENDING))
    write_result(run.trial_dir(2, "c"), TrialResult({"drift": 0.5}))
    kept = kept_rows(run, load_study(write_study(tmp_path, **changes)))
    ended = State.RUNNING if state is State.MEASURED else state
    assert [one.state for one in kept] == [State.MEASURED, state, ended]


def _failed(number: int, failure: Failure) -> TrialRow:
    result = TrialResult(failure=failure)
    return TrialRow(number, f"t{number}", "", {}, State.FAILED, result, violation=1.5, penalty=1.5)


@pytest.mark.slow
def test_a_study_goes_on_once_the_fault_that_ended_it_is_mended(tmp_path: Path) -> None:
    fault = f"model-not-found@weights:once={tmp_path / 'mended'}"
    path = write_study(tmp_path, engine={"args": {"fault": fault}}, search={"trials": 1})
    ended, folder = run_study(path)
    assert ended.returncode == 1
    assert "Once that is done, --resume goes on." in ended.stdout
    assert read_status(folder).phase == "at fault"  # type: ignore[union-attr]
    done, folder = run_study(path, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = folder.read_rows()
    assert [(row.state, row.retry_of) for row in rows] == [(State.INTERRUPTED, None), (State.MEASURED, 0)]
    assert [trial.state.name for trial in optuna_trials(folder)] == ["FAIL", "COMPLETE"]
    assert read_status(folder).phase == "finished"  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_study_whose_driver_is_killed_again_and_again_loses_no_trial_and_measures_none_twice(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"search": {"trials": 6, "sampler": "tpe"}, "resources": {"cpus": 1, "max_concurrent": 2}}
    path = write_study(tmp_path, **changes)
    finished: dict[int, Any] = {}
    for kill in range(2):
        with subprocess.Popen(command(path, *["--resume"][:kill]), stdout=subprocess.DEVNULL) as driver:
            _await_a_trial(path, len(finished))
            time.sleep(random.Random(kill).uniform(0, 2))
            driver.kill()
        rows = only_run(path).read_rows()
        finished |= {row.number: row for row in rows if row.state.teaches}
    done = subprocess.run(command(path, "--resume"), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only_run(path)
    rows = folder.read_rows()
    assert [row.number for row in rows] == list(range(len(rows)))
    assert all(rows[number] == row for number, row in finished.items())
    counted = [row for row in rows if row.state.teaches]
    assert len(counted) == 6
    assert len({json.dumps(dict(row.params), sort_keys=True) for row in counted}) == 6
    assert all(trial.state.is_finished() for trial in optuna_trials(folder))
    assert marks(folder.path.name) == {}


@pytest.mark.cluster
@pytest.mark.slow
def test_a_study_whose_head_is_killed_says_so_and_goes_on_at_another_address(tmp_path: Path, ray_address: str) -> None:
    path = write_study(tmp_path, search={"trials": 3}, resources={"cpus": 1, "max_concurrent": 1})
    with a_head() as (head, address):
        quick = {**environment(), "RAY_gcs_rpc_server_reconnect_timeout_s": "12"}
        words = command(path, "--address", address)
        with subprocess.Popen(words, env=quick, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
            _await_a_trial(path, 0)
            os.killpg(head.pid, signal.SIGKILL)
            said, _ = driver.communicate(timeout=100)
    assert driver.returncode not in (0, None)
    assert f"Ray's head at {address} does not answer any more" in said
    kept = [row for row in only_run(path).read_rows() if row.state.teaches]
    done = subprocess.run(
        command(path, "--address", ray_address, "--resume"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = only_run(path).read_rows()
    assert kept
    assert [row for row in rows if row in kept] == kept
    assert len({json.dumps(dict(row.params), sort_keys=True) for row in rows if row.state.teaches}) == 3
    assert marks(only_run(path).path.name) == {}


@contextmanager
def a_head() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A cluster of one node on this machine, as `ray start` makes it, in a process group of its own; its address."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder, Path(folder, "said").open("wb") as said:
        options = ["--head", "--port=0", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--include-dashboard=false"]
        words = [*RAY_START, *options, f"--temp-dir={folder}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        head = subprocess.Popen(words, env=environment(), stdout=said, stderr=said, start_new_session=True)
        try:
            wait_for(lambda: "Ray runtime started" in Path(folder, "said").read_text(), timeout_s=START_S)
            yield head, Path(folder, "ray_current_cluster").read_text().strip()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def _await_a_trial(path: Path, known: int) -> None:
    """Wait until more trials have ended than were `known`."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        runs = ResultsFolder.runs(path.parent / "results")
        if runs and sum(row.state.teaches for row in runs[-1].read_rows()) > known:
            return
        time.sleep(0.2)
    raise AssertionError("no further trial has ended within two minutes")
