"""From metrics to scores and violation."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.score.grades import progress_violation
from raytune_autotuner.score.objective import (
    Assessment,
    assess,
    assess_failure,
    softened,
    trial_metrics,
)
from raytune_autotuner.score.slo import constraint_value
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import Direction, Study
from raytune_autotuner.study.trial import TrialResult

SLO = {"ttft_ms": {"p99": 500.0}, "tpot_ms": {"mean": 50.0}}
LATENCIES = st.floats(0.001, 1e7)
SCORES = st.floats(1e-3, 1e9)
STAGES = st.sampled_from(list(Stage))
WAYS = st.sampled_from(["maximize", "minimize"])


def study(
    direction: str = "maximize", slo: dict[str, Any] | None = None, grade: str = "progress", **more: Any
) -> Study:
    return parse_study(
        {
            "study": "s",
            "model": "m",
            "search_space": {"max-num-seqs": {"int": [1, 8]}},
            "objective": {direction: "x", "slo": SLO if slo is None else slo},
            "penalty": {"grade": grade},
            "trial": {"timeout_s": 600},
            **more,
        }
    )


def failed(stage: Stage = Stage.KV_CACHE, share: float = 0.0) -> Failure:
    return Failure(stage, Kind.OUT_OF_MEMORY, Blame.PARAMETERS, "CUDA out of memory", "use less", share)


def measured(x: float, ttft: float = 1.0, tpot: float = 1.0) -> TrialResult:
    return TrialResult({"x": x, "ttft_ms_p99": ttft, "tpot_ms_mean": tpot})


def rank_key(assessment: Assessment, direction: Direction) -> tuple[float, float]:
    """The order that docs/house.md promises: feasible by score, then missed SLOs by how far, then failures."""
    violation = math.inf if assessment.violation is None else max(assessment.violation, 0.0)
    score = assessment.score
    if score is None:
        return (violation, math.inf)
    return (violation, -score if direction == "maximize" else score)


def better(left: Assessment, right: Assessment, direction: Direction) -> bool:
    return rank_key(left, direction) < rank_key(right, direction)


@given(LATENCIES, STAGES, st.floats(0, 1))
def test_missing_an_slo_is_better_than_failing(ttft: float, stage: Stage, share: float) -> None:
    missed = constraint_value({"ttft_ms_p99": ttft}, study().objective)
    assert 0 < missed < progress_violation(failed(stage, share))


@given(SCORES, LATENCIES, LATENCIES, STAGES, st.floats(0, 1), WAYS)
def test_any_success_is_better_than_any_failure_in_both_directions_and_any_unit(
    score: float, ttft: float, tpot: float, stage: Stage, share: float, direction: Direction
) -> None:
    asked = study(direction)
    success = assess(asked, measured(score, ttft, tpot))
    assert better(success, assess_failure(asked, failed(stage, share)), direction)


@given(SCORES, SCORES, st.floats(0, 500), st.floats(500.01, 1e7), WAYS)
def test_meeting_an_slo_is_better_than_missing_it_whatever_the_score(
    score: float, other: float, met: float, missed: float, direction: Direction
) -> None:
    asked = study(direction)
    assert better(assess(asked, measured(score, met)), assess(asked, measured(other, missed)), direction)


@given(SCORES, st.floats(1.001, 1e3), WAYS)
def test_among_feasible_trials_the_score_decides_with_the_right_sign(
    score: float, times: float, direction: Direction
) -> None:
    asked = study(direction)
    low, high = assess(asked, measured(score)), assess(asked, measured(score * times))
    assert better(high, low, direction) is (direction == "maximize")


@given(SCORES, LATENCIES, st.floats(1, 1e3), WAYS)
def test_a_score_never_improves_when_one_latency_worsens(
    score: float, ttft: float, times: float, direction: Direction
) -> None:
    asked = study(direction)
    before, after = assess(asked, measured(score, ttft)), assess(asked, measured(score, ttft * times))
    assert rank_key(before, direction) <= rank_key(after, direction) or (before.feasible and after.feasible)


def test_a_latency_of_5000_ms_does_not_lose_to_a_crash() -> None:
    asked = study("minimize", slo={})
    assert better(assess(asked, measured(5000.0)), assess_failure(asked, failed()), "minimize")


def test_a_measured_trial_has_a_score_and_no_penalty() -> None:
    worth = assess(study(), measured(7.0))
    assert (worth.score, worth.penalty, worth.failure, worth.feasible) == (7.0, None, None, True)


def test_a_score_is_kept_where_an_slo_is_missed() -> None:
    worth = assess(study(), measured(7.0, ttft=1000.0))
    assert (worth.score, worth.feasible) == (7.0, False)
    assert worth.violation == pytest.approx(0.5)


def test_a_failed_trial_has_a_penalty_and_no_score_even_with_metrics() -> None:
    worth = assess(study(), TrialResult({"x": 9.0}, failed(), {"total": 60.0}))
    assert (worth.score, worth.scores, worth.violation, worth.penalty) == (None, (), 1.45, 1.45)


@pytest.mark.parametrize("metrics", [{}, {"x": math.nan}, {"x": math.inf}, {"X": 1.0}])
def test_an_objective_without_a_measurement_is_a_failure_and_never_0(metrics: dict[str, float]) -> None:
    worth = assess(study(slo={}), TrialResult(metrics))
    assert worth.score is None
    assert worth.failure is not None
    assert worth.failure.stage is Stage.LOAD
    assert "'x'" in worth.failure.evidence
    assert worth.violation is not None
    assert 1 < worth.violation < 1.1


def test_a_score_of_0_is_a_score() -> None:
    assert assess(study(slo={}), TrialResult({"x": 0.0})).scores == (0.0,)


def test_the_elapsed_grade_takes_the_trials_own_seconds() -> None:
    result = TrialResult({}, failed(), {"start": 20.0, "total": 300.0})
    worth = assess(study(grade="elapsed"), result)
    assert (worth.penalty, worth.violation) == (-750, None)


def test_the_infinite_grade_has_no_number_to_show() -> None:
    worth = assess(study(grade="infinite"), TrialResult({}, failed()))
    assert (worth.score, worth.penalty, worth.violation) == (None, None, None)


@pytest.mark.parametrize("grade", ["elapsed", "infinite", "ignore"])
def test_the_violation_of_a_measured_trial_does_not_depend_on_the_grade(grade: str) -> None:
    result = measured(7.0, ttft=1000.0)
    assert assess(study(grade=grade), result) == assess(study(), result)


def test_the_environments_fault_has_neither_violation_nor_penalty() -> None:
    lost = Failure(Stage.LOAD, Kind.WORKER_LOST, Blame.ENVIRONMENT, "node lost", "")
    worth = assess(study(), TrialResult({}, lost))
    assert (worth.score, worth.violation, worth.penalty, worth.failure) == (None, None, None, lost)


@given(SCORES, st.floats(0, 0.99), st.floats(0, 0.99), WAYS)
def test_a_softened_score_is_worse_the_further_the_slo_is_missed(
    score: float, little: float, much: float, direction: Direction
) -> None:
    low, high = sorted([little, much])
    near, far = softened(score, low, direction), softened(score, high, direction)
    assert near >= far if direction == "maximize" else near <= far
    assert softened(score, -0.3, direction) == score


def test_failures_without_a_violation_rank_last() -> None:
    lost = Assessment((), None)
    assert better(assess_failure(study(), failed(Stage.ARGUMENTS)), lost, "maximize")


def level(
    ttft: float = 100.0, tokens: float = 600.0, seconds: float = 10.0, requests: float = 300.0
) -> dict[str, float]:
    """Metrics of one load level."""
    return {
        "ttft_ms_p99": ttft,
        "output_throughput_tok_s": tokens / seconds,
        "tokens_out": tokens,
        "duration_s": seconds,
        "requests": requests,
        "requests_failed": 0.0,
    }


LEVELS: dict[str, Any] = {"workload": {"concurrency": [16, 4], "requests": 300}}
TTFT_SLO = {"ttft_ms": {"p99": 500.0}}
THROUGHPUT = {"maximize": "output_throughput_tok_s", "slo": TTFT_SLO}
SCAN = {"maximize": "max_load_under_slo", "slo": TTFT_SLO}


def worth_of(asked: Study, levels: dict[str, dict[str, float]]) -> Assessment:
    return assess(asked, TrialResult(trial_metrics(asked, levels)))


def test_several_objectives_have_a_score_each_in_their_order() -> None:
    asked = study(objective={"maximize": ["b", "a"], "minimize": "c"})
    worth = assess(asked, TrialResult({"a": 1.0, "b": 2.0, "c": 3.0}))
    assert (worth.scores, worth.score) == ((2.0, 1.0, 3.0), 2.0)


@pytest.mark.parametrize("lacking", ["a", "b", "c"])
def test_each_objective_needs_a_measurement(lacking: str) -> None:
    asked = study(objective={"maximize": ["b", "a"], "minimize": "c"})
    worth = assess(asked, TrialResult({name: 1.0 for name in "abc" if name != lacking}))
    assert worth.scores == ()
    assert worth.failure is not None
    assert f"metric '{lacking}' is missing" in worth.failure.evidence


def test_an_slo_that_one_load_level_misses_is_missed_whatever_the_mean() -> None:
    asked = study(objective=THROUGHPUT, **LEVELS)
    worth = worth_of(asked, {"c4": level(100.0), "c16": level(600.0)})
    assert worth.violation == pytest.approx(0.2 / 1.2)
    assert worth_of(asked, {"c4": level(100.0), "c16": level(500.0)}).feasible


def test_a_level_that_is_not_there_leaves_the_trial_without_a_score() -> None:
    worth = worth_of(study(objective=THROUGHPUT, **LEVELS), {"c4": level()})
    assert worth.failure is not None
    assert "'output_throughput_tok_s' is missing" in worth.failure.evidence


@pytest.mark.parametrize(
    ("levels", "highest", "violation"),
    [
        ({"c4": level(250.0), "c16": level(400.0)}, 16.0, -0.5),
        ({"c4": level(250.0), "c16": level(900.0)}, 4.0, -0.5),
        ({"c4": level(250.0)}, 4.0, -0.5),
        ({"c4": level(750.0)}, 0.0, 0.5 / 1.5),
        ({"c4": level(750.0), "c16": level(100.0)}, 0.0, 0.5 / 1.5),
    ],
)
def test_the_highest_load_is_a_score_and_its_violation_is_that_of_the_lowest_level(
    levels: dict[str, dict[str, float]], highest: float, violation: float
) -> None:
    worth = worth_of(study(objective=SCAN, **LEVELS), levels)
    assert worth.scores == (highest,)
    assert worth.violation == pytest.approx(violation)
    assert worth.feasible is (highest > 0)


def test_attainment_decides_a_scan_too() -> None:
    asked = study(objective=SCAN | {"attainment": 0.9}, **LEVELS)
    attained = {"c4": level(9000.0) | {"slo_attainment": 0.95}, "c16": level(1.0) | {"slo_attainment": 0.5}}
    assert worth_of(asked, attained).scores == (4.0,)


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        (THROUGHPUT, "300 requests were completed at c16, but ttft_ms_p99 needs 299"),
        ({"minimize": "ttft_ms_p99"}, "completed at c16"),
        ({"minimize": "ttft_ms_p99@c16"}, "completed at c16"),
    ],
)
def test_too_few_completed_requests_for_a_percentile_are_a_failure(objective: dict[str, Any], names: str) -> None:
    asked = study(objective=objective, **LEVELS)
    few = level() | {"requests_failed": 2.0}
    assert worth_of(asked, {"c4": level(), "c16": level() | {"requests_failed": 1.0}}).failure is None
    worth = worth_of(asked, {"c4": level(), "c16": few})
    assert worth.failure is not None
    assert (worth.failure.kind, worth.failure.blame) == (Kind.BAD_RESPONSES, Blame.PARAMETERS)
    assert names.replace("300 ", "298 ") in worth.failure.evidence
    assert worth.violation is not None
    assert 1 < worth.violation < 1.1


@pytest.mark.parametrize(
    ("latency", "evidence"), [("tpot", "28 answers had two tokens or more at c16"), ("itl", "28 gaps between chunks")]
)
def test_what_not_every_request_has_is_counted_by_itself(latency: str, evidence: str) -> None:
    asked = study(objective={"minimize": f"{latency}_ms_p90@c16"}, **LEVELS)
    told = {f"{latency}_ms_p90": 5.0}
    of_an_earlier_version, enough, few = dict[str, float](), {f"{latency}_samples": 29.0}, {f"{latency}_samples": 28.0}
    for counted in (of_an_earlier_version, enough):
        assert worth_of(asked, {"c4": level(), "c16": level() | told | counted}).failure is None
    worth = worth_of(asked, {"c4": level(), "c16": level() | told | few})
    assert worth.failure is not None
    assert evidence in worth.failure.evidence


def test_a_percentile_at_one_level_needs_no_samples_at_another() -> None:
    asked = study(objective={"minimize": "ttft_ms_p99@c16"}, **LEVELS)
    assert worth_of(asked, {"c4": level(requests=10), "c16": level()}).failure is None


def test_a_scan_counts_a_level_with_too_few_samples_as_missed_and_fails_without_the_lowest() -> None:
    asked = study(objective=SCAN, **LEVELS)
    assert worth_of(asked, {"c4": level(), "c16": level(requests=10)}).scores == (4.0,)
    assert worth_of(asked, {"c4": level(requests=10), "c16": level()}).failure is not None
    assert worth_of(asked, {"c4": level(requests=10)}).failure is not None


def test_attainment_needs_no_number_of_samples() -> None:
    asked = study(objective=SCAN | {"attainment": 0.5}, **LEVELS)
    assert worth_of(asked, {"c4": level(requests=10) | {"slo_attainment": 0.6}}).scores == (4.0,)


def test_one_level_is_judged_with_or_without_its_label() -> None:
    asked = study(objective=THROUGHPUT, workload={"concurrency": 4})
    for metrics in (trial_metrics(asked, {"c4": level(750.0)}), level(750.0)):
        assert assess(asked, TrialResult(metrics)).violation == pytest.approx(0.5 / 1.5)
    few = assess(asked, TrialResult(level(requests=298.0))).failure
    assert few is not None
    assert few.evidence == "298 requests were completed, but ttft_ms_p99 needs 299"


def test_a_trial_costs_what_its_machine_costs_over_all_its_tokens() -> None:
    asked = study(objective=THROUGHPUT, resources={"price_per_hour": 3.6}, **LEVELS)
    levels = {"c4": level(tokens=1000.0, seconds=100.0), "c16": level(tokens=9000.0, seconds=100.0)}
    for gpus, held in ((0.0, 1), (0.5, 1), (2.0, 2)):
        metrics = trial_metrics(asked, levels, gpus)
        assert metrics["cost_per_million_tokens@c4"] == pytest.approx(held * 0.1 / 1000 * 1e6)
        assert metrics["cost_per_million_tokens"] == pytest.approx(held * 0.2 / 10_000 * 1e6)
    assert "cost_per_million_tokens" not in trial_metrics(study(**LEVELS), levels)


def test_the_highest_load_is_known_where_there_are_an_slo_and_several_levels() -> None:
    levels = {"c4": level(), "c16": level(900.0)}
    assert trial_metrics(study(objective=THROUGHPUT, **LEVELS), levels)["max_load_under_slo"] == 4.0
    assert "max_load_under_slo" not in trial_metrics(study(slo={}, **LEVELS), levels)
    assert "max_load_under_slo" not in trial_metrics(study(), {"c8": level()})


@given(st.floats(1, 499), st.floats(501, 1e6))
def test_a_setting_that_holds_a_higher_load_is_better(met: float, missed: float) -> None:
    asked = study(objective=SCAN, **LEVELS)
    holds = {"c4": level(met), "c16": level(met)}
    one, none = {"c4": level(met), "c16": level(missed)}, {"c4": level(missed)}
    three = [worth_of(asked, levels) for levels in (holds, one, none)]
    assert better(three[0], three[1], "maximize")
    assert better(three[1], three[2], "maximize")
    assert better(three[2], assess_failure(asked, failed()), "maximize")
