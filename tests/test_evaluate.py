"""One trial by hand, without Ray and Optuna: which loads are sent, what is held against the baseline, what is left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.load.parquet import read_records
from raytune_autotuner.load.trouble import Clocks
from raytune_autotuner.load.workload import Level, between, between_all
from raytune_autotuner.report.course import SAMPLES
from raytune_autotuner.report.results import QUALITY, read_result
from raytune_autotuner.score.metrics import ENGINE_METRICS
from raytune_autotuner.score.objective import metrics_of_requests
from raytune_autotuner.score.quality import Quality
from raytune_autotuner.score.records import measured
from raytune_autotuner.study.failure import Blame, Kind, Stage
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.trial import TrialResult
from raytune_autotuner.tune.evaluate import Evaluation
from tests.studies import BASE, merged

SCAN: dict[str, Any] = {
    "workload": {"concurrency": [64, 4, 16], "requests": 32},
    "objective": {"maximize": "max_load_under_slo", "slo": {"e2el_ms": {"p90": 60}}},
}


@dataclass
class Played:
    """A trial that ran to its end."""

    result: TrialResult
    steps: Sequence[Mapping[str, float]]
    folder: Path

    @property
    def sent(self) -> list[str]:
        """The measured load levels in the order in which they were sent."""
        return self.levels("measure")

    def levels(self, phase: str) -> list[str]:
        """The load levels of a phase in the order in which they were sent."""
        records = pd.read_parquet(self.folder / "requests.parquet")
        return list(dict.fromkeys(records[records["phase"] == phase]["level"]))


def evaluation(folder: Path, changes: Mapping[str, Any], params: Mapping[str, Any], **options: Any) -> Evaluation:
    study = parse_study(merged(merged(BASE, {"engine": {"args": {"speed": 4}}}), dict(changes)))
    return Evaluation(study, make_engine(study), dict(params), folder / "trial", "run", "trial", **options)


def play(folder: Path, changes: Mapping[str, Any], params: Mapping[str, Any] | None = None, **options: Any) -> Played:
    steps, result = run_through(evaluation(folder, changes, params or {}, **options))
    return Played(result, steps, folder / "trial")


def run_through(trial: Evaluation) -> tuple[list[Mapping[str, float]], TrialResult]:
    """The metrics after each load, and what the trial came to."""
    rounds, steps = trial.run(), list[Mapping[str, float]]()
    while True:
        try:
            steps.append(next(rounds))
        except StopIteration as stop:
            return steps, stop.value


def test_every_level_is_sent_in_every_round_and_each_load_is_a_step(tmp_path: Path) -> None:
    played = play(tmp_path, {"workload": {"concurrency": [2, 8], "rounds": 2, "requests": 8}})
    assert played.result.failure is None
    assert len(played.steps) == 4
    assert played.sent == ["c2", "c8"]
    assert "output_throughput_tok_s" not in played.steps[0]
    assert "output_throughput_tok_s@c2" in played.steps[0]
    assert "output_throughput_tok_s" in played.steps[1]
    assert "drift" in played.result.metrics


def test_a_scan_goes_up_and_ends_at_the_first_level_that_misses(tmp_path: Path) -> None:
    slow = play(tmp_path, merged(SCAN, {"objective": {"slo": {"e2el_ms": {"p90": 0.001}}}}))
    assert slow.sent == slow.levels("warmup") == ["c4"]
    assert slow.result.metrics["max_load_under_slo"] == 0
    easy = play(tmp_path / "easy", merged(SCAN, {"objective": {"slo": {"e2el_ms": {"p90": 60000}}}}))
    assert easy.sent == ["c4", "c16", "c64"]
    assert easy.result.metrics["max_load_under_slo"] == 64


def test_a_finalists_scan_is_refined_between_the_last_that_held_and_the_first_that_missed(tmp_path: Path) -> None:
    params = {"max-num-seqs": 2}  # what waits for its turn misses
    found = play(tmp_path, SCAN, params, restart=0)
    assert found.result.failure is None, found.result.failure
    highest = int(found.result.metrics["max_load_under_slo"])
    tried = sorted(int(level[1:]) for level in found.sent)
    held, missed = [load for load in tried if load <= highest], [load for load in tried if load > highest]
    assert len(tried) > 3 or highest in (0, 64)
    assert held or highest == 0  # on a machine that is too busy for the lowest load
    assert not missed or not held or missed[0] - highest <= max(1, 0.05 * highest) or len(tried) >= 7


def test_a_finalists_highest_load_is_refined_too_where_other_objectives_want_all_levels(tmp_path: Path) -> None:
    changes = {
        "engine": {"args": {"speed": 0.2}},
        "workload": {"concurrency": [8, 1], "requests": 8, "traffic": "D(8,6)"},
        "objective": {
            "maximize": ["max_load_under_slo", "output_throughput_tok_s"],
            "slo": {"e2el_ms": {"mean": 250}},  # one at a time takes 80 ms
        },
    }
    found = play(tmp_path, changes, {"max-num-seqs": 1}, restart=0)
    highest = found.result.metrics["max_load_under_slo"]
    assert found.sent[:2] == ["c8", "c1"]
    assert found.sent[2:3] == ["c4"] or highest == 0  # on a machine that is too busy for the lowest load
    assert highest < 8
    assert "output_throughput_tok_s@c4" not in found.result.metrics


def test_a_highest_load_that_cannot_be_refined_in_time_is_a_coarser_result(tmp_path: Path) -> None:
    changes = {
        "engine": {"args": {"speed": 0.1}},
        "workload": {"concurrency": [1, 8], "requests": 16, "traffic": "D(8,4)", "warmup_requests": 0},
        "objective": {"maximize": "max_load_under_slo", "slo": {"e2el_ms": {"mean": 400}}},
    }
    found = play(tmp_path, changes, {"max-num-seqs": 1}, restart=0, time_up=time.monotonic())
    assert found.result.failure is None, found.result.failure
    assert found.sent in (["c1", "c8"], ["c1"])  # on a machine that is too busy for the lowest load
    log = (found.folder / "trial.log").read_text()
    assert found.sent == ["c1"] or "not refined further: c4 may take" in log


@pytest.mark.parametrize(
    ("held", "missed", "label"),
    [
        (Level("c4", 4), Level("c16", 16), "c10"),
        (Level("c4", 4), Level("c5", 5), None),
        (Level("c100", 100), Level("c104", 104), None),
        (Level("r1", rate_rps=1.0), Level("r4", rate_rps=4.0), "r2"),
        (Level("r1", rate_rps=1.0), Level("r1.04", rate_rps=1.04), None),
    ],
)
def test_the_step_between_two_loads_is_halved_until_it_is_small(held: Level, missed: Level, label: str | None) -> None:
    found = between(held, missed)
    assert (found and found.label) == label
    assert {level.label for level in between_all([held, missed])} >= ({label} if label else set())


def test_the_baseline_keeps_its_answers_and_a_setting_that_loses_too_much_fails_before_any_load(tmp_path: Path) -> None:
    changes = {"quality": {"max_perplexity_rise": 0.001, "max_answer_change": 0.0}, "search_space": SPACE}
    baseline = play(tmp_path, changes)
    assert baseline.result.failure is None
    assert baseline.result.answers
    reference = Quality(baseline.result.metrics["perplexity"], baseline.result.answers)
    same = play(tmp_path / "same", changes, {"max-num-seqs": 8}, reference=reference)
    assert same.result.failure is None
    assert same.result.metrics["perplexity_rise"] == 0
    worse = play(tmp_path / "worse", changes, {"kv-cache-dtype": "fp8"}, reference=reference)
    failure = worse.result.failure
    assert failure is not None
    assert (failure.kind, failure.blame, failure.stage) == (Kind.QUALITY_LOSS, Blame.PARAMETERS, Stage.READY)
    assert worse.result.metrics["perplexity_rise"] > 0.001
    assert worse.steps == []
    for trial in (baseline, same, worse):  # what is known of one that is ended under load
        asked = read_result(trial.folder, QUALITY)
        assert asked is not None
        assert asked.answers == trial.result.answers
        assert asked.metrics.items() <= trial.result.metrics.items()


SPACE = {"max-num-seqs": {"choice": [2, 8]}, "kv-cache-dtype": {"choice": ["auto", "fp8"]}}


def test_restarts_have_loads_of_their_own_and_the_same_restart_has_the_same(tmp_path: Path) -> None:
    def tokens(name: str, restart: int | None) -> list[int]:
        workload = {"traffic": "U(8,64)/(4,16)", "requests": 16}
        folder = play(tmp_path / name, {"workload": workload}, restart=restart).folder
        records = pd.read_parquet(folder / "requests.parquet")
        return list(records[records["phase"] == "measure"].sort_values("index")["tokens_in"])

    assert tokens("a", 0) == tokens("b", 0)
    assert tokens("c", None) != tokens("d", 1) != tokens("a2", 0)


def test_a_trial_that_is_ended_between_two_loads_keeps_what_it_measured_and_leaves_no_engine(tmp_path: Path) -> None:
    trial = evaluation(tmp_path, {"workload": {"rounds": 3}}, {})
    rounds = trial.run()
    next(rounds)
    rounds.close()
    folder = tmp_path / "trial"
    assert len(pd.read_parquet(folder / "requests.parquet").query("phase == 'measure'")) == 16
    assert "ended between two loads" in (folder / "trial.log").read_text()
    assert "no process left" in (folder / "trial.log").read_text()
    assert list(trial.values) == ["c8"]
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize(("answered", "stage"), [(3, Stage.WARMUP), (21, Stage.LOAD)])
def test_an_engine_that_dies_under_load_has_got_as_far_as_its_trial(
    tmp_path: Path, answered: int, stage: Stage
) -> None:
    fault = f"crash@load:after={answered}"  # a probe, two to warm up, and two levels of 12
    load = {"concurrency": [1, 2], "requests": 12, "warmup_requests": 4, "traffic": "D(8,4)"}
    failure = play(tmp_path, {"engine": {"args": {"fault": fault}}, "workload": load}).result.failure
    assert failure is not None
    assert (failure.stage, failure.kind) == (stage, Kind.ENGINE_DIED)
    assert stage is Stage.WARMUP or 0.5 <= failure.share < 0.9  # what failed with the engine is no progress


def test_requests_that_fail_as_the_clock_jumps_are_not_the_engines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clocks, "jump_s", lambda *_: 60.0)
    changes = {"engine": {"args": {"fault": "disconnect@load:after=1"}}, "workload": {"requests": 8, "concurrency": 4}}
    failure = play(tmp_path, changes).result.failure
    assert failure is not None
    assert (failure.kind, failure.blame) == (Kind.CLOCK_JUMPED, Blame.ENVIRONMENT)


def test_a_load_whose_trial_is_about_to_be_ended_writes_down_what_it_has_measured(tmp_path: Path) -> None:
    kept = tmp_path / "trial" / "requests.parquet"
    written: list[int] = []

    def look(stage: Stage, share: float) -> None:
        if stage is Stage.LOAD and kept.exists():
            written.append(len(pd.read_parquet(kept).query("phase == 'measure'")))

    load = {"concurrency": 1, "requests": 16, "traffic": "D(8,8)", "warmup_requests": 0}
    changes = {"engine": {"args": {"speed": 0.2}}, "workload": load}
    trial = evaluation(tmp_path, changes, {}, time_up=time.monotonic(), on_progress=look)
    run_through(trial)
    assert 0 < written[0] < 16
    assert len(pd.read_parquet(kept).query("phase == 'measure'")) == 16


def test_the_engines_own_figures_lie_beside_the_requests(tmp_path: Path) -> None:
    played = play(tmp_path, {"engine": {"args": {"speed": 0.05}}, "workload": {"requests": 32}})
    assert (played.folder / SAMPLES).is_file()
    assert played.result.metrics["preemptions"] == 0


def test_every_figure_of_the_load_comes_again_from_the_requests_that_were_kept(tmp_path: Path) -> None:
    changes = {"workload": {"concurrency": [2, 8], "rounds": 2, "requests": 16}, "resources": {"price_per_hour": 3.0}}
    played = play(tmp_path, changes)
    study = parse_study(merged(BASE, changes))
    levels = measured(read_records(played.folder / "requests.parquet"))
    metrics = metrics_of_requests(study, levels, played.result.paid_for)
    engines_own = {name for name in played.result.metrics if name.partition("@")[0] in ENGINE_METRICS}
    assert metrics.keys() == played.result.metrics.keys() - engines_own
    assert metrics == pytest.approx({name: played.result.metrics[name] for name in metrics})
