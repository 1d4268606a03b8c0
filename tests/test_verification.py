"""Which settings are measured again before one is recommended, in which order, and a whole study that does so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.report.finalists import finalists
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, State, TrialRow
from raytune_autotuner.tune.verification import next_restart
from tests.studies import BASE, merged, optuna_trials, run_study, write_study


def study(**changes: Any) -> Study:
    return parse_study(merged({**BASE, "verify": {"top": 2, "restarts": 3}}, changes))


def row(number: int, score: float | None, violation: float = -1.0, **more: Any) -> TrialRow:
    state = State.FAILED if score is None else State.MEASURED
    name = BASELINE if number == 0 else ""
    return TrialRow(
        number, f"id{number}", name, {"max-num-seqs": number}, state, score=score, violation=violation, **more
    )


def numbers(rows: list[TrialRow]) -> list[int]:
    return [one.number for one in rows]


def test_the_finalists_are_the_best_that_beat_the_baseline_which_comes_first() -> None:
    rows = [row(0, 100), row(1, 120), row(2, 90), row(3, 140), row(4, 130), row(5, None)]
    assert numbers(finalists(study(), rows, {})) == [0, 3, 4]


def test_of_latencies_the_smallest_are_the_best() -> None:
    rows = [row(0, 100), row(1, 120), row(2, 90), row(3, 40)]
    assert numbers(finalists(study(objective={"maximize": None, "minimize": "ttft_ms_mean"}), rows, {})) == [0, 3, 2]


def test_a_setting_that_misses_an_slo_is_no_finalist_but_may_stand_against_a_baseline_that_does() -> None:
    assert numbers(finalists(study(), [row(0, 100), row(1, 120, violation=0.2)], {})) == []
    assert numbers(finalists(study(), [row(0, 100, violation=0.2), row(1, 80)], {})) == [0, 1]


def test_where_the_baseline_failed_the_best_are_measured_without_it() -> None:
    assert numbers(finalists(study(), [row(0, None), row(1, 120), row(2, 90)], {})) == [1, 2]


def test_a_baseline_that_was_lost_by_no_fault_of_its_own_has_another_chance() -> None:
    lost = [replace(row(number, None), name=BASELINE, state=State.LOST) for number in (0, 2)]
    assert numbers(finalists(study(), [lost[0], row(1, 120), lost[1], row(3, 90)], {})) == [2, 1, 3]
    assert numbers(finalists(study(), [lost[0], row(1, 120), replace(row(2, 110), name=BASELINE)], {})) == [2, 1]


@pytest.mark.parametrize("rows", [[], [row(0, 100)], [row(0, 100), row(1, 90)], [row(0, None), row(1, None)]])
def test_where_nothing_beats_the_baseline_nothing_is_measured_again(rows: list[TrialRow]) -> None:
    assert finalists(study(), rows, {}) == []


def play(chosen: list[TrialRow], fail: dict[int, State] | None = None, limit: int = 50) -> list[tuple[int, int]]:
    """The order in which restarts are begun; `fail` says how the n-th of them ends."""
    rows, order = list(chosen), []
    for n in range(limit):
        due = next_restart(study(), rows, chosen)
        if due is None:
            break
        again, restart = due
        order.append((again.number, restart))
        state = (fail or {}).get(n, State.MEASURED)
        rows.append(replace(row(len(rows), 1.0), state=state, verifies=again.number, restart=restart))
    return order


def test_restarts_are_interleaved_and_each_round_begins_with_another_setting() -> None:
    order = play([row(0, 100), row(1, 120), row(2, 110)])
    assert order == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (0, 1), (2, 2), (0, 2), (1, 2)]


def test_a_finalist_that_failed_once_is_not_started_again() -> None:
    assert [restart for number, restart in play([row(0, 100), row(1, 120)], {1: State.FAILED}) if number == 1] == [0]


def test_a_restart_that_was_lost_is_begun_again_as_often_as_trials_are_retried() -> None:
    assert play([row(0, 100), row(1, 120)], {0: State.LOST})[:3] == [(0, 0), (0, 0), (1, 0)]
    assert play([row(0, 100), row(1, 120)], {0: State.LOST, 1: State.LOST})[:3] == [(0, 0), (0, 0), (1, 0)]


@pytest.mark.slow
def test_a_study_searches_on_dummy_weights_and_measures_its_finalists_again_on_real_ones_outside_of_the_search(
    tmp_path: Path, ray_address: str
) -> None:
    path = write_study(
        tmp_path,
        engine={"search_weights": "dummy", "args": {"max-num-seqs": 2}},  # defaults that are easily beaten
        search_space={"max-num-seqs": {"choice": [16, 64]}, "block-size": {"choice": [16, 32]}},
        workload={"traffic": "D(32,32)"},
        search={"trials": 4},
        verify={"top": 1, "restarts": 2},
    )
    done, folder = run_study(path, "--address", ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = folder.read_rows()
    again = [one for one in rows if one.verifies is not None]
    assert len(rows) - len(again) == 4
    assert sorted((one.verifies, one.restart) for one in again)[:2] == [(0, 0), (0, 1)]
    assert len(again) == 4
    assert len({one.verifies for one in again}) == 2
    told = [trial.user_attrs["trial"] for trial in optuna_trials(folder) if "trial" in trial.user_attrs]
    assert not {one.number for one in again} & set(told)
    started = {one.number: folder.trial_dir(one.number, one.trial_id) / "command.json" for one in rows}
    on_dummies = {number for number, file in started.items() if "--load-format" in json.loads(file.read_text())["argv"]}
    assert on_dummies == {one.number for one in rows if one.verifies is None}
    assert "load-format" not in folder.launch_file.read_text()
    assert "load-format dummy" not in (folder.path / "report.html").read_text()
