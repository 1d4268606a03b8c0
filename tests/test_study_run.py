"""Whole studies on the simulated engine, through the command line: what they print, leave behind and tell Optuna."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from optuna_dashboard import wsgi
from prometheus_client.parser import text_string_to_metric_families

from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.trial import State
from raytune_autotuner.tune.tell import CONSTRAINT
from tests.studies import actor_of, command, marks, only_run, optuna_trials, run_study, write_study
from tests.watched import Seen, run_watched

METRICS_PAGE = "metrics.txt"
HANGS = "hang@load:after=12"
FAULTS = {
    "oom@kv-cache": ("kv-cache", "out-of-memory"),
    "refuse@configuration": ("configuration", "invalid-config"),
    "killed@weights": ("weights", "out-of-memory"),
    "hang@initialization": ("initialization", "hung"),
    "crash@load:after=6": ("load", "engine-died"),
    HANGS: ("load", "hung"),
    "error500@load:share=0.5": ("warmup", "bad-responses"),
    "slow-start@compilation:seconds=60": ("compilation", "hung"),
    "zombie-print@initialization:every=0.5,slow-start@compilation:seconds=60": ("compilation", "deadline"),
}


HUB, STORE, OWN, URL = (f"canary-{name}-5b1d07f2" for name in ("hub", "store", "own", "url"))
"""Secrets without a known look."""
LOUD = "zombie-print@initialization:every=0.2:text=${}"


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], ResultsFolder, Seen]:
    """A study with successes, one enqueued failure and the whole way from `ray.init` to the verdict.

    It has secrets, which its engines print.
    """
    study = write_study(
        tmp_path_factory.mktemp("ordinary"),
        engine={
            "args": {"fault": ",".join(map(LOUD.format, ("HF_TOKEN", "OWN_API_KEY", "VLLM_PROXY")))},
            "env": {"OWN_API_KEY": OWN, "VLLM_PROXY": f"http://me:{URL}@127.0.0.1:9"},
        },
        search_space={"max-num-seqs": {"choice": [2, 8, 64, 256]}, "block-size": {"choice": [7, 16]}},
        search={"trials": 5, "points": [{"max-num-seqs": 2, "block-size": 7}]},
        workload={"rounds": 2},
    )
    return run_watched(study, {"HF_TOKEN": HUB, "AWS_SECRET_ACCESS_KEY": STORE})


@pytest.fixture(scope="module")
def ordinary(watched: tuple[Any, ResultsFolder, Seen]) -> tuple[Any, ResultsFolder]:
    return watched[:2]


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> ResultsFolder:
    """A study with a trial for each fault, after a baseline that works."""
    study = write_study(
        tmp_path_factory.mktemp("failing"),
        search_space={"fault": {"choice": ["none", *FAULTS]}},
        engine={"args": {"fault": "none"}},
        search={"trials": 1 + len(FAULTS), "points": [{"fault": fault} for fault in FAULTS]},
        trial={"timeout_s": 12, "hung_after_s": 5},
        resources={"max_concurrent": 1},  # in this order, so that the baseline is told first
    )
    done, folder = run_study(study, "--address", ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    (url,) = re.findall(r"metrics: (http://\S+)", folder.study_log.read_text())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as page:
        (folder.path / METRICS_PAGE).write_bytes(page.read())  # Ray forgets a gauge after twenty seconds
    return folder


def test_a_study_ends_with_a_winner_and_exit_code_0(ordinary: tuple[Any, ResultsFolder]) -> None:
    done, folder = ordinary
    assert done.returncode == 0, done.stdout + done.stderr
    rows = folder.read_rows()
    assert len(rows) == 5
    assert {row.state for row in rows} == {State.MEASURED, State.FAILED}
    assert rows[0].name == "baseline"
    assert rows[0].params == {}
    best = max(row.score for row in rows if row.score is not None)
    assert best >= (rows[0].score or math.inf)
    assert "serve it here:" in done.stdout
    assert "\x1b" not in done.stdout
    assert marks(folder.path.name) == {}


def test_everything_listens_on_this_machine_alone(watched: tuple[Any, ResultsFolder, Seen]) -> None:
    listening = watched[2].listening
    assert {"gcs_server", "raylet", "ray::DashboardAgent"} <= {name for name, _ in listening}
    assert len([name for name, _ in listening if name.startswith("python")]), "no engine was seen"
    assert not [(name, ip) for name, ip in listening if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]


def test_no_secret_stands_in_a_file_a_process_list_or_what_is_said(
    watched: tuple[subprocess.CompletedProcess[str], ResultsFolder, Seen],
) -> None:
    done, folder, seen = watched
    ray_token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    shown = {"said": done.stdout + done.stderr, **{line: line for line in seen.lines}}
    for path in folder.path.rglob("*"):
        if path.is_file():
            shown[str(path)] = path.read_bytes().decode(errors="replace")
        if path.suffix == ".parquet":
            shown[f"{path}: rows"] = pd.read_parquet(path).to_csv()
    for secret in (HUB, STORE, OWN, URL, ray_token):
        assert not [where for where, text in shown.items() if secret in text]
    log = folder.trial_dir(0, folder.read_rows()[0].trial_id) / "engine.log"
    printed = {line.partition("] ")[2] for line in log.read_text().splitlines()}
    assert {"***", "http://me:***@127.0.0.1:9"} <= printed


def test_optuna_holds_every_trial_complete_and_finite(ordinary: tuple[Any, ResultsFolder]) -> None:
    _, folder = ordinary
    rows = {row.number: row for row in folder.read_rows()}
    for trial in optuna_trials(folder):
        if trial.user_attrs["state"] == "known":
            continue
        assert trial.state is TrialState.COMPLETE
        assert trial.value is not None
        assert math.isfinite(trial.value)
        constraint = trial.constraints[CONSTRAINT]
        if trial.user_attrs["state"] == "refused":  # it would have failed as an earlier trial did
            assert 1 < constraint <= 2
            continue
        row = rows[trial.user_attrs["trial"]]
        assert constraint == row.violation
        assert (1 < constraint <= 2) if row.state is State.FAILED else (constraint <= 0 and trial.value == row.score)
    failed = rows[1]
    assert (failed.state, failed.score, failed.penalty) == (State.FAILED, None, failed.violation)


def asked_of_dashboard(journal: Path, path: str) -> Any:
    """What Optuna's dashboard answers from the journal, without a port of its own."""
    app = wsgi(JournalStorage(JournalFileBackend(str(journal))))
    environ: dict[str, Any] = {"PATH_INFO": path}
    setup_testing_defaults(environ)
    return json.loads(b"".join(app(environ, lambda status, headers, *_: None)))


def test_optunas_dashboard_opens_the_journal_as_it_is(ordinary: tuple[Any, ResultsFolder]) -> None:
    _, folder = ordinary
    (study,) = asked_of_dashboard(folder.optuna_log, "/api/studies")["study_summaries"]
    trials = asked_of_dashboard(folder.optuna_log, f"/api/studies/{study['study_id']}")["trials"]
    assert [trial["number"] for trial in trials] == [trial.number for trial in optuna_trials(folder)]
    said = [{one["key"]: one["value"] for one in trial["user_attrs"]} for trial in trials]
    failed = next(attributes for attributes in said if attributes["state"] == "failed")
    row = folder.read_rows()[int(failed["trial"])]
    assert row.result.failure is not None
    assert (failed["stage"], failed["kind"]) == (str(row.result.failure.stage), str(row.result.failure.kind))
    assert float(failed["penalty"]) == float(failed["violation"]) == row.penalty


def test_the_results_folder_holds_all_that_is_promised(ordinary: tuple[Any, ResultsFolder]) -> None:
    _, folder = ordinary
    names = {path.name for path in folder.path.iterdir()}
    promised = "study.yaml versions.json trials.parquet trials.csv optuna.log study.log best.yaml launch.sh"
    assert set(promised.split()) <= names
    for row in folder.read_rows():
        trial = {path.name for path in folder.trial_dir(row.number, row.trial_id).iterdir()}
        assert {"trial.log", "engine.log", "load.log", "command.json", "requests.parquet", "result.json"} <= trial
        assert any(name.startswith("events.out.tfevents") for name in trial)
    table = pd.read_parquet(folder.parquet_file)
    assert list(table["number"]) == [row.number for row in folder.read_rows()]
    requests = pd.read_parquet(folder.trial_dir(0, folder.read_rows()[0].trial_id) / "requests.parquet")
    assert (requests["phase"] == "measure").sum() == 2 * 16
    assert folder.load_study().search.trials == 5


def test_a_trial_of_two_rounds_reports_twice(ordinary: tuple[Any, ResultsFolder]) -> None:
    _, folder = ordinary
    log = (folder.trial_dir(0, folder.read_rows()[0].trial_id) / "trial.log").read_text()
    assert "round 1 of 2" in log
    assert "round 2 of 2" in log


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_told_with_its_stage_kind_and_a_finite_penalty(failing: ResultsFolder, fault: str) -> None:
    row = next(row for row in failing.read_rows() if row.params.get("fault") == fault)
    assert row.state is State.FAILED
    assert row.result.failure is not None
    assert (str(row.result.failure.stage), str(row.result.failure.kind)) == FAULTS[fault]
    trial = next(trial for trial in optuna_trials(failing) if trial.user_attrs["trial"] == row.number)
    assert trial.state is TrialState.COMPLETE
    assert trial.value is not None
    assert math.isfinite(trial.value)
    assert 1 < trial.constraints[CONSTRAINT] <= 2
    assert trial.user_attrs["kind"] == FAULTS[fault][1]


def test_the_requests_that_a_hung_engine_had_answered_are_kept(failing: ResultsFolder) -> None:
    row = next(row for row in failing.read_rows() if row.params.get("fault") == HANGS)
    kept = pd.read_parquet(failing.trial_dir(row.number, row.trial_id) / "requests.parquet")
    assert len(kept.query("phase == 'measure' and error.isna()")) > 4


def test_rays_metrics_have_the_studys_own_figures_for_prometheus(failing: ResultsFolder) -> None:
    page = (failing.path / METRICS_PAGE).read_text()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    own = [sample for sample in samples if sample.labels.get("run") == failing.path.name]
    names = ("trials", "trials_wanted", "best_score", "best_relative", "time_left_seconds", "failures_total")
    assert {sample.name for sample in own} == {f"ray_autotuner_{name}" for name in names}
    (measured,) = [s.value for s in own if (s.labels.get("state"), s.labels.get("part")) == ("measured", "search")]
    assert measured == 1
    first = [s.value for s in own if (s.labels.get("stage"), s.labels.get("kind")) == FAULTS["oom@kv-cache"]]
    assert first == [1]


def test_later_failures_cost_less(failing: ResultsFolder) -> None:
    rows = [row for row in failing.read_rows() if row.result.failure is not None]
    by_progress = sorted(rows, key=lambda row: row.result.failure.progress if row.result.failure else 0.0)
    penalties = [row.penalty for row in by_progress]
    assert penalties == sorted(penalties, key=lambda penalty: -(penalty or 0.0))


def test_nothing_of_a_failed_trial_is_left_running(failing: ResultsFolder) -> None:
    assert marks(failing.path.name) == {}


def test_a_wrong_model_ends_the_study_after_one_trial(tmp_path: Path, ray_address: str) -> None:
    study = write_study(
        tmp_path, engine={"args": {"fault": "model-not-found@configuration"}}, resources={"max_concurrent": 1}
    )
    done, folder = run_study(study, "--address", ray_address)
    assert done.returncode == 1
    assert len(folder.read_rows()) == 1
    assert "model-not-found" in done.stdout


def wait_for(condition: Any, timeout_s: float = 60.0) -> Any:
    """The first true value of `condition`; fails after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def actor_under_load(study: Path, number: int) -> int:
    """The process id of trial `number`'s actor, once the trial is under load."""

    def find() -> int | None:
        for folder in ResultsFolder.runs(study.parent / "results"):
            for log in folder.trials_dir.glob(f"{number}-*/trial.log"):
                if "[load] reached" in log.read_text():
                    return actor_of(folder.path.name, log.parent.name.split("-", 1)[1])
        return None

    return int(wait_for(find))


SLOW = {"traffic": "D(32,400)", "concurrency": 4, "requests": 40, "warmup_requests": 0}


@pytest.mark.parametrize(("retries", "states"), [(1, ["lost", "measured"]), (0, ["failed"])])
def test_a_killed_actor_is_run_again_or_graded(
    tmp_path: Path, ray_address: str, retries: int, states: list[str]
) -> None:
    study = write_study(tmp_path, search={"trials": 1}, trial={"retries": retries}, workload=SLOW)
    with subprocess.Popen(command(study, "--address", ray_address), stdout=subprocess.PIPE, text=True) as driver:
        os.kill(actor_under_load(study, 0), signal.SIGKILL)
        driver.communicate(timeout=120)
    rows = only_run(study).read_rows()
    assert [str(row.state) for row in rows] == states
    told = [trial.state for trial in optuna_trials(only_run(study))]
    assert told == ([TrialState.FAIL, TrialState.COMPLETE] if retries else [TrialState.COMPLETE])
    if retries:
        assert rows[1].retry_of == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, ray_address: str, number: int) -> None:
    study = write_study(tmp_path, search={"trials": 3}, workload=SLOW, resources={"max_concurrent": 1})
    with subprocess.Popen(command(study, "--address", ray_address), stdout=subprocess.PIPE, text=True) as driver:
        actor_under_load(study, 1)
        driver.send_signal(number)
        said, _ = driver.communicate(timeout=60)
    folder = only_run(study)
    assert driver.returncode == 130, said
    assert [str(row.state) for row in folder.read_rows()] == ["measured", "interrupted"]
    assert marks(folder.path.name) == {}
    assert json.loads(folder.status_file.read_text())["phase"] == "interrupted"
    assert "Interrupted" in said


def test_the_penalty_is_never_in_the_score_column(failing: ResultsFolder) -> None:
    table = pd.read_csv(failing.csv_file)
    failed = table[table["state"] == "failed"]
    assert failed["score"].isna().all()
    assert failed["penalty"].notna().all()
    assert table[table["state"] == "measured"]["penalty"].isna().all()
