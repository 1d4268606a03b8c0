"""Runs in a store: found, fetched, followed, and gone on with on whichever machine knows them best."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_autotuner.report.logs import read_log
from raytune_autotuner.report.mirror import Mirror
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.runs import create_run, keep_fresh, kept_in, open_run, runs_at
from raytune_autotuner.report.status import StudyStatus, read_status, write_status
from raytune_autotuner.report.store import Store
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.trial import State, TrialRow
from raytune_autotuner.tune.resume import kept_rows, unfinished_run
from tests.report_samples import make_study
from tests.studies import write_study

Machine = Callable[[str], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Be on another machine from now on: of a name, with a home of its own."""

    def be_on(name: str) -> None:
        for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            monkeypatch.setenv(variable, str(tmp_path / name / variable.lower()))

    be_on("driver")
    return be_on


@pytest.fixture
def store(tmp_path: Path, machine: Machine) -> Store:
    return Store((tmp_path / "shared").as_uri())


def bring(run: ResultsFolder) -> Store:
    """What a mirror does from a study's start to its end."""
    assert run.store is not None
    with Mirror(run.path, run.store, pytest.fail):
        pass
    return run.store


def test_a_new_runs_name_is_none_that_the_store_has(store: Store, machine: Machine) -> None:
    first = create_run(store, make_study())
    bring(first)
    machine("another")
    second = create_run(store, make_study())
    assert second.store != first.store
    assert second.path == kept_in(store) / second.path.name


def test_only_what_has_changed_is_fetched_again(store: Store) -> None:
    run = create_run(store, make_study())
    (run.trial_dir(0, "a")).mkdir()
    (run.trial_dir(0, "a") / "trial.log").write_text("a line\n")
    there = bring(run)
    copy = open_run(there)
    assert copy.path != run.path
    assert copy.place == str(there)
    assert (copy.find_trial_dir(0) / "trial.log").read_text() == "a line\n"
    before = copy.study_file.stat().st_ino
    rows = [TrialRow(0, "a", "", {}, State.MEASURED, score=1.0)]
    run.write_rows(rows)
    there.write("trials.jsonl", run.rows_file.read_bytes())
    assert open_run(there).read_rows() == rows
    assert copy.study_file.stat().st_ino == before


def test_of_the_trials_only_those_asked_for_are_fetched(store: Store) -> None:
    run = create_run(store, make_study())
    for number in (1, 10):
        run.trial_dir(number, "a").mkdir()
        (run.trial_dir(number, "a") / "trial.log").write_text("a line\n")
    there = bring(run)
    assert not open_run(there, trials="").trials_dir.exists()
    assert [path.name for path in open_run(there, trials="1-*").trials_dir.iterdir()] == ["1-a"]


def test_the_runs_of_a_study_are_found_oldest_first(store: Store) -> None:
    runs = [create_run(store, make_study()) for _ in range(3)]
    places = [bring(run) for run in reversed(runs)]
    assert [run.store for run in runs_at(store, "sample")] == places[::-1]
    assert runs_at(store, "other") == []
    with pytest.raises(ConfigError, match=f"not a results folder.*{runs[-1].path.name}"):
        open_run(store)


def test_a_log_in_a_store_is_followed_line_by_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytune_autotuner.report.runs.FRESH_S", 0.0)
    run = create_run(store, make_study())
    status = StudyStatus.begin(1)
    write_status(run, status)
    run.study_log.write_text("one\n")
    lines = read_log(open_run(bring(run)), follow=True)
    seen = [next(lines)]
    for text in ("two", "three"):
        with run.study_log.open("a") as log:
            log.write(f"{text}\n")
        bring(run)
        seen.append(next(lines))
    write_status(run, replace(status, phase="finished"))
    bring(run)
    assert [*seen, *lines] == ["one", "two", "three"]


def test_a_log_that_is_not_in_the_store_is_named_by_its_uri(store: Store) -> None:
    there = bring(create_run(store, make_study()))
    with pytest.raises(ConfigError, match=re.escape(f"{there}/study.log: there is no such log")):
        next(read_log(open_run(there)))


def test_a_copy_that_is_fresh_enough_is_not_fetched_again(store: Store) -> None:
    run = create_run(store, make_study())
    copy = open_run(bring(run))
    run.study_log.write_text("one\n")
    bring(run)
    keep_fresh(copy, "")()
    assert not copy.study_log.exists()


def interrupted_run(tmp_path: Path, store: Store) -> ResultsFolder:
    run = create_run(store, load_study(write_study(tmp_path)))
    hear(run, 100.0)
    run.trial_dir(0, "a").mkdir()
    (run.trial_dir(0, "a") / "trial.json").write_text(json.dumps(TrialRow(0, "a", "", {}).to_dict()))
    return run


def hear(run: ResultsFolder, at: float) -> None:
    status = replace(StudyStatus.begin(1), phase="interrupted", updated_at=at, host="another", pid=1)
    write_status(run, status)


def test_a_study_goes_on_on_another_machine(tmp_path: Path, store: Store, machine: Machine) -> None:
    run = interrupted_run(tmp_path, store)
    bring(run)
    machine("another")
    study = load_study(write_study(tmp_path))
    found = unfinished_run(study, store)
    assert (found.path, found.store) == (kept_in(store) / run.path.name, run.store)
    assert found.path != run.path
    assert [row.number for row in kept_rows(found, study)] == [0]


def test_a_machine_that_knows_more_than_the_store_goes_on_from_that(tmp_path: Path, store: Store) -> None:
    run = interrupted_run(tmp_path, store)
    bring(run)
    hear(run, 200.0)
    run.trial_dir(1, "b").mkdir()
    assert unfinished_run(load_study(write_study(tmp_path)), store) == run
    assert len(list(run.trials_dir.iterdir())) == 2


def test_a_run_that_never_came_to_its_store_goes_on_too(tmp_path: Path, store: Store) -> None:
    run = interrupted_run(tmp_path, store)
    assert unfinished_run(load_study(write_study(tmp_path)), store) == run


def test_what_a_machine_knew_before_another_went_on_is_put_aside(
    tmp_path: Path, store: Store, machine: Machine
) -> None:
    run = interrupted_run(tmp_path, store)
    bring(run)
    run.trial_dir(1, "never-came").mkdir()
    machine("another")
    elsewhere = unfinished_run(load_study(write_study(tmp_path)), store)
    hear(elsewhere, 300.0)
    bring(elsewhere)
    machine("driver")
    found = unfinished_run(load_study(write_study(tmp_path)), store)
    status = read_status(found)
    assert status is not None
    assert status.updated_at == 300.0
    assert [path.name for path in found.trials_dir.iterdir()] == ["0-a"]
    assert list(kept_in(store).glob("*.outdated/trials/1-never-came"))
