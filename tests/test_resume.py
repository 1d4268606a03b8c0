"""Studies that were interrupted go on: nothing measured is lost or measured twice, and what changed is named."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.status import StudyStatus, write_status
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow
from raytune_autotuner.tune.resume import kept_rows, unfinished_run
from tests.studies import command, marks, only_run, optuna_trials, write_study


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
    _, run = begun(tmp_path)
    run.write_rows([TrialRow(0, "a", "baseline", {}, State.MEASURED, score=1.0)])
    for number, trial_id in ((0, "a"), (1, "b"), (2, "c")):
        run.add_suggestion(TrialRow(number, trial_id, "", {"max-num-seqs": 2}))
    (run.trial_dir(1, "b") / "result.json").write_text(json.dumps({"metrics": {"drift": 0.5}, "failure": None}))
    rows = kept_rows(run)
    assert [(row.number, row.state) for row in rows] == [
        (0, State.MEASURED),
        (1, State.RUNNING),
        (2, State.PENDING),
    ]
    assert rows[1].result.metrics == {"drift": 0.5}


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


def _await_a_trial(path: Path, known: int) -> None:
    """Wait until more trials have ended than were `known`."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        runs = ResultsFolder.runs(path.parent / "results")
        if runs and sum(row.state.teaches for row in runs[-1].read_rows()) > known:
            return
        time.sleep(0.2)
    raise AssertionError("no further trial has ended within two minutes")
