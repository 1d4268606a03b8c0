"""The scheduler that ends a trial between two of its loads: which it ends, and which never."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler

from raytune_autotuner.report.verdict import best_so_far
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, State, TrialRow
from raytune_autotuner.tune.early_stop import LAST, LOADED, LOADS, StopHopeless
from tests.studies import BASE, merged, optuna_trials, run_study, write_study

CONTINUE, STOP = FIFOScheduler.CONTINUE, FIFOScheduler.STOP


@dataclass(frozen=True)
class RayTrial:
    """All that a scheduler asks of one of Ray Tune's trials here."""

    trial_id: str


def report(last: bool = False, loaded: bool = False, **loads: list[float]) -> dict[str, Any]:
    """A trial's report after a load, as Ray Tune has flattened it."""
    values = {f"{LOADS}/{label}": values for label, values in loads.items()}
    return {**values, LOADED: loaded, LAST: last, "training_iteration": 1}


class Search:
    """A study's trials beside its scheduler; both are the real ones."""

    def __init__(self, direction: str = "maximize", **changes: Any) -> None:
        self.study = make_study(direction, **changes)
        self.rows: dict[str, TrialRow] = {}
        self.stopped: dict[str, float] = {}
        self.scheduler = StopHopeless(self.study, self.rows.__getitem__, self._best, self.stopped.__setitem__)

    def _best(self) -> TrialRow | None:
        return best_so_far(self.rows.values(), self.study.objective.direction)

    def begins(self, trial_id: str, name: str = "", verifies: int | None = None) -> None:
        self.rows[trial_id] = TrialRow(len(self.rows), trial_id, name, {}, State.RUNNING, verifies=verifies)

    def says(self, trial_id: str, last: bool = False, loaded: bool = False, **loads: list[float]) -> str:
        return self.scheduler.on_trial_result(None, RayTrial(trial_id), report(last, loaded, **loads))

    def measured(self, trial_id: str, score: float, violation: float = -1.0, **loads: list[float]) -> None:
        """A trial that went through all its loads."""
        self.begins(trial_id)
        assert self.says(trial_id, False, True, **loads) == CONTINUE
        assert self.says(trial_id, True, True, **loads) == CONTINUE
        row = replace(self.rows[trial_id], state=State.MEASURED, score=score, violation=violation)
        self.rows[trial_id] = row


def make_study(direction: str, **changes: Any) -> Study:
    metric = "output_throughput_tok_s" if direction == "maximize" else "e2el_ms_mean"
    given = {
        "workload": {"concurrency": 8, "rounds": 3},
        "objective": {direction: metric},
        "search": {"stop_early": True},
    }
    raw = merged(merged(BASE, given), changes)
    raw["objective"] = {**changes.get("objective", {}), direction: metric}
    return parse_study(raw)


@pytest.mark.parametrize(("direction", "best", "far"), [("maximize", 100.0, 50.0), ("minimize", 100.0, 200.0)])
def test_a_trial_that_cannot_beat_the_best_is_ended_with_its_bound(direction: str, best: float, far: float) -> None:
    search = Search(direction)
    search.measured("a", best, c8=[best, best, best])
    search.begins("b")
    assert search.says("b", c8=[far]) == STOP
    bound = search.stopped["b"]
    assert far < bound < best if direction == "maximize" else best < bound < far


def test_a_trial_within_the_noise_of_the_best_goes_on() -> None:
    search = Search()
    search.measured("a", 100.0, c8=[100.0, 100.0, 100.0])
    search.begins("b")
    assert search.says("b", c8=[90.0]) == CONTINUE
    assert search.stopped == {}


def test_what_is_noise_is_learned_from_the_trials() -> None:
    search = Search()
    for number in range(3):
        search.measured(f"loud-{number}", 100.0, c8=[60.0, 100.0, 140.0])
    search.begins("b")
    assert search.says("b", c8=[50.0]) == CONTINUE
    quiet = Search()
    for number in range(3):
        quiet.measured(f"quiet-{number}", 100.0, c8=[99.9, 100.0, 100.1])
    quiet.begins("b")
    assert quiet.says("b", c8=[90.0]) == STOP


def test_nothing_is_ended_before_a_first_trial_was_measured() -> None:
    search = Search()
    search.begins("a")
    assert search.says("a", c8=[0.001]) == CONTINUE


def test_a_score_that_misses_an_slo_ends_nobody() -> None:
    search = Search(objective={"slo": {"ttft_ms": {"p50": 100}}})
    search.measured("a", 100.0, violation=0.5, c8=[100.0, 100.0, 100.0])
    search.begins("b")
    assert search.says("b", c8=[1.0]) == CONTINUE


def test_the_baseline_goes_through_all_its_loads() -> None:
    search = Search()
    search.measured("a", 100.0, c8=[100.0, 100.0, 100.0])
    search.begins("b", BASELINE)
    assert search.says("b", c8=[1.0]) == CONTINUE


def test_a_trial_that_is_no_part_of_the_search_is_left_alone() -> None:
    search = Search()
    search.measured("a", 100.0, c8=[100.0, 100.0, 100.0])
    search.begins("restart-of-a", verifies=0)
    assert search.says("restart-of-a", c8=[1.0]) == CONTINUE


def test_a_trial_whose_loads_are_all_measured_keeps_its_result() -> None:
    search = Search()
    search.measured("a", 100.0, c8=[100.0, 100.0, 100.0])
    search.begins("b")
    assert search.says("b", loaded=True, c8=[1.0, 1.0]) == CONTINUE  # one of its loads came to no value
    assert search.says("b", last=True, c8=[1.0, 1.0, 1.0]) == CONTINUE


def test_a_level_to_come_counts_as_the_best_measured_there_before_a_trial_is_ended() -> None:
    search = Search(workload={"concurrency": [8, 32], "rounds": 1})
    search.measured("a", 150.0, c8=[100.0], c32=[200.0])
    search.begins("b")
    assert search.says("b", c8=[60.0]) == CONTINUE
    search.begins("c")
    assert search.says("c", c8=[5.0]) == STOP


def test_a_level_that_only_unfinished_trials_have_measured_decides_nothing() -> None:
    search = Search(workload={"concurrency": [8, 32], "rounds": 1})
    search.begins("running")
    assert search.says("running", c8=[100.0], c32=[100.0]) == CONTINUE
    search.rows["a"] = TrialRow(1, "a", "", {}, State.MEASURED, score=1e6, violation=-1.0)  # of an interrupted run
    search.begins("b")
    assert search.says("b", c8=[0.001]) == CONTINUE


@pytest.mark.parametrize(
    "changes",
    [{"search": {"stop_early": False}}, {"workload": {"rounds": 1}}, {"objective": {"minimize": "ttft_ms_mean"}}],
)
def test_studies_that_ask_for_it_or_cannot_be_judged_end_nobody(changes: dict[str, Any]) -> None:
    search = Search(**changes)
    search.measured("a", 100.0, c8=[100.0, 100.0, 100.0])
    search.begins("b")
    assert search.says("b", c8=[0.001]) == CONTINUE


def test_a_report_without_loads_is_passed_over() -> None:
    search = Search()
    search.measured("a", 100.0, c8=[100.0, 100.0, 100.0])
    search.begins("b")
    assert search.says("b") == CONTINUE


def test_ray_can_pickle_the_scheduler_without_the_study_around_it() -> None:
    search = Search()
    assert isinstance(pickle.loads(pickle.dumps(search.scheduler)), StopHopeless)


@pytest.mark.slow
def test_a_hopeless_trial_of_a_real_study_is_ended_told_by_its_bound_and_its_engine_stopped(
    tmp_path: Path, ray_address: str
) -> None:
    study = write_study(
        tmp_path,
        search_space={"max-num-seqs": {"choice": [1, 256]}},
        workload={"rounds": 3},
        search={"trials": 3, "points": [{"max-num-seqs": 256}, {"max-num-seqs": 1}], "stop_early": True},
    )
    done, folder = run_study(study, "--address", ray_address)
    assert done.returncode == 0, done.stderr
    slow = next(row for row in folder.read_rows() if row.params.get("max-num-seqs") == 1)
    best = max(row.score or 0.0 for row in folder.read_rows())
    assert slow.state is State.STOPPED
    assert slow.bound is not None
    assert slow.bound < best
    assert slow.score is None
    assert any(trial.values == [slow.bound] for trial in optuna_trials(folder))
    assert (
        "it cannot beat the best trial any more"
        in (folder.trial_dir(slow.number, slow.trial_id) / "trial.log").read_text()
    )
