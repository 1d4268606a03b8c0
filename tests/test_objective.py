"""From metrics to score and violation."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.score.grades import Direction, progress_violation
from raytune_autotuner.score.objective import (
    NO_SLO_VALUE,
    UNMEASURED_EXCESS,
    Assessment,
    assess,
    assess_failure,
    constraint_value,
    rank_key,
    softened,
    total_violation,
)
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.study import Study, parse_study
from raytune_autotuner.study.trial import TrialResult

SLO = {"ttft_ms": {"p99": 500.0}, "tpot_ms": {"mean": 50.0}}
LATENCIES = st.floats(0.001, 1e7)
SCORES = st.floats(1e-3, 1e9)
STAGES = st.sampled_from(list(Stage))
WAYS = st.sampled_from(["maximize", "minimize"])


def study(direction: str = "maximize", slo: dict[str, Any] | None = None, grade: str = "progress") -> Study:
    return parse_study(
        {
            "study": "s",
            "model": "m",
            "search_space": {"max-num-seqs": {"int": [1, 8]}},
            "objective": {direction: "x", "slo": SLO if slo is None else slo},
            "penalty": {"grade": grade},
            "trial": {"timeout_s": 600},
        }
    )


def failed(stage: Stage = Stage.KV_CACHE, share: float = 0.0) -> Failure:
    return Failure(stage, Kind.OUT_OF_MEMORY, Blame.PARAMETERS, "CUDA out of memory", "use less", share)


def measured(x: float, ttft: float = 1.0, tpot: float = 1.0) -> TrialResult:
    return TrialResult({"x": x, "ttft_ms_p99": ttft, "tpot_ms_mean": tpot})


def better(left: Assessment, right: Assessment, direction: Direction) -> bool:
    return rank_key(left, direction) < rank_key(right, direction)


def test_the_violation_is_the_sum_of_the_relative_misses() -> None:
    assert total_violation({"ttft_ms_p99": 750.0, "tpot_ms_mean": 60.0}, SLO) == pytest.approx(0.5 + 0.2)


def test_a_limit_that_is_met_exactly_is_met() -> None:
    assert total_violation({"ttft_ms_p99": 500.0, "tpot_ms_mean": 50.0}, SLO) == 0
    assert constraint_value({"ttft_ms_p99": 500.0, "tpot_ms_mean": 50.0}, SLO) == 0


def test_a_met_limit_does_not_make_up_for_a_missed_one() -> None:
    assert total_violation({"ttft_ms_p99": 1.0, "tpot_ms_mean": 60.0}, SLO) == pytest.approx(0.2)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_an_slo_without_a_measurement_is_missed(value: float | None) -> None:
    metrics = {"tpot_ms_mean": 1.0} | ({} if value is None else {"ttft_ms_p99": value})
    assert total_violation(metrics, SLO) == UNMEASURED_EXCESS
    assert 0.99 < constraint_value(metrics, SLO) < 1


def test_without_an_slo_every_measured_trial_is_feasible() -> None:
    assert constraint_value({}, {}) == NO_SLO_VALUE < 0


def test_the_margin_is_that_of_the_tightest_limit() -> None:
    assert constraint_value({"ttft_ms_p99": 250.0, "tpot_ms_mean": 40.0}, SLO) == pytest.approx(-0.2)


@given(st.floats(1e-3, 1e6))
def test_the_violation_is_continuous_at_the_threshold(limit: float) -> None:
    slo = {"ttft_ms": {"p99": limit}}
    just_over = constraint_value({"ttft_ms_p99": math.nextafter(limit, math.inf)}, slo)
    assert 0 < just_over < 1e-9
    assert constraint_value({"ttft_ms_p99": limit * (1 + 1e-6)}, slo) < 2e-6


@given(LATENCIES, LATENCIES, LATENCIES)
def test_missing_by_less_is_never_worse(ttft: float, other: float, tpot: float) -> None:
    low, high = sorted([ttft, other])
    values = [constraint_value({"ttft_ms_p99": value, "tpot_ms_mean": tpot}, SLO) for value in (low, high)]
    assert values[0] <= values[1]
    assert all(value <= 0 or 0 < value < 1 for value in values)


@given(st.floats(500.01, 1e6), st.floats(1.001, 10))
def test_missing_by_clearly_more_is_worse(ttft: float, times: float) -> None:
    slo = {"ttft_ms": {"p99": 500.0}}
    assert constraint_value({"ttft_ms_p99": ttft}, slo) < constraint_value({"ttft_ms_p99": ttft * times}, slo)


@given(LATENCIES, STAGES, st.floats(0, 1))
def test_missing_an_slo_is_better_than_failing(ttft: float, stage: Stage, share: float) -> None:
    missed = constraint_value({"ttft_ms_p99": ttft}, SLO)
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
