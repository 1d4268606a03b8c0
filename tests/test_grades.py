"""What failures cost, on each scale."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.score.grades import elapsed_conflict, elapsed_penalty, penalty, progress_violation
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.study import Direction, Grade

STAGES = st.sampled_from(list(Stage))
SHARES = st.floats(0, 1)
BOTH: tuple[Direction, ...] = ("maximize", "minimize")


def failure(stage: Stage = Stage.KV_CACHE, share: float = 0.0, evidence: str = "it broke") -> Failure:
    return Failure(stage, Kind.UNKNOWN, Blame.PARAMETERS, evidence, "mend it", share)


PUBLISHED = [
    (30, "Failed to deploy the service", -1200),
    (90, "deploy: pod did not start", -1200),
    (90, "Model not found", -1200),
    (240, "the benchmark failed", -500),
    (300, "CUDA OOM", -750),
    (300, "out of memory", -750),
    (480, "the benchmark failed", -200),
    (600, "timed out after 600 seconds", -100),
    (600, "timeout", -80),
    (600, "Connection reset by peer", -80),
    (0, "Segmentation fault", -1000),
    (0.5, "", -1000),
    (119.9, "x", -1000),
    (120, "x", -500),
    (359.9, "x", -500),
    (360, "x", -200),
    (569.9, "x", -200),
    (570, "x", -100),
]


@pytest.mark.parametrize(("elapsed_s", "message", "expected"), PUBLISHED)
def test_the_elapsed_scale_is_the_published_one(elapsed_s: float, message: str, expected: float) -> None:
    assert elapsed_penalty(elapsed_s, 600, message, "maximize") == pytest.approx(expected, abs=1e-9)
    assert elapsed_penalty(elapsed_s, 600, message, "minimize") == pytest.approx(-expected, abs=1e-9)


@pytest.mark.parametrize(
    ("message", "factor"),
    [
        ("deploy: out of memory", 1.2),
        ("connection lost: OOM killed", 1.5),
        ("bloom-7b crashed", 1.5),
        ("TIMEOUT", 0.8),
        ("timed out", 1.0),
    ],
)
def test_the_first_row_of_words_decides_and_words_match_anywhere(message: str, factor: float) -> None:
    assert elapsed_penalty(600, 600, message, "minimize") == pytest.approx(100 * factor)


@pytest.mark.parametrize(("elapsed_s", "timeout_s"), [(5000, 600), (600, 0), (0, 0), (1, -5)])
def test_the_elapsed_share_is_capped_and_a_limit_of_0_is_used_up(elapsed_s: float, timeout_s: float) -> None:
    assert elapsed_penalty(elapsed_s, timeout_s, "x", "maximize") == -100


def test_a_clock_that_went_backwards_counts_as_no_time() -> None:
    assert elapsed_penalty(-3, 600, "x", "maximize") == -1000


def test_a_deadline_has_one_message_whatever_the_log_said_last() -> None:
    late = replace(failure(Stage.LOAD, evidence="memory pressure, connection lost"), kind=Kind.DEADLINE)
    assert penalty("elapsed", late, 600, 600, "maximize") == -100
    assert penalty("elapsed", replace(late, kind=Kind.HUNG), 600, 600, "maximize") == pytest.approx(-150)


@pytest.mark.parametrize("direction", BOTH)
def test_the_proving_line_is_the_message_of_the_elapsed_scale(direction: Direction) -> None:
    sign = -1 if direction == "maximize" else 1
    assert penalty("elapsed", failure(evidence="CUDA out of memory"), 300, 600, direction) == sign * 750


@given(STAGES, SHARES, st.floats(0, 1e6), st.floats(0, 1e6), st.sampled_from(BOTH))
def test_every_penalty_of_progress_is_finite_and_in_its_interval(
    stage: Stage, share: float, elapsed_s: float, timeout_s: float, direction: Direction
) -> None:
    value = penalty("progress", failure(stage, share), elapsed_s, timeout_s, direction)
    assert value is not None
    assert 1 < value <= 2


@given(STAGES, SHARES, STAGES, SHARES)
def test_a_later_failure_is_never_worse(stage: Stage, share: float, other: Stage, other_share: float) -> None:
    ordered = sorted([(stage.order, share), (other.order, other_share)])
    early, late = (failure(list(Stage)[order], share) for order, share in ordered)
    assert progress_violation(late) <= progress_violation(early)


def test_start_up_failures_of_different_stages_cost_different_amounts() -> None:
    starts = [s for s in Stage if s.order < Stage.WARMUP.order]
    assert all(progress_violation(failure(a)) > progress_violation(failure(b)) for a, b in pairwise(starts))


def test_a_hang_is_worth_what_it_had_reached() -> None:
    hung = replace(failure(Stage.WEIGHTS, 0.5), kind=Kind.HUNG)
    assert progress_violation(hung) == progress_violation(failure(Stage.WEIGHTS, 0.5))
    assert progress_violation(hung) > progress_violation(failure(Stage.KV_CACHE))


@pytest.mark.parametrize("grade", ["progress", "elapsed", "infinite", "ignore"])
def test_the_environments_fault_costs_nothing(grade: Grade) -> None:
    lost = replace(failure(), blame=Blame.ENVIRONMENT)
    assert penalty(grade, lost, 10, 600, "maximize") is None


def test_ignore_costs_nothing_and_infinite_is_on_the_bad_side() -> None:
    assert penalty("ignore", failure(), 10, 600, "maximize") is None
    assert penalty("infinite", failure(), 10, 600, "maximize") == -math.inf
    assert penalty("infinite", failure(), 10, 600, "minimize") == math.inf


def test_the_elapsed_scale_warns_where_a_failure_outranks_a_measurement() -> None:
    warning = elapsed_conflict([1000.0, 80.0], [5000.0], "minimize")
    assert warning is not None
    assert "5000" in warning
    assert elapsed_conflict([1000.0, 500.0], [120.0], "minimize") is None
    assert elapsed_conflict([-1000.0, -80.0], [3.0], "maximize") is None
    assert elapsed_conflict([-80.0], [-90.0], "maximize") is not None


def test_the_elapsed_scale_does_not_warn_before_it_has_both() -> None:
    assert elapsed_conflict([], [5000.0], "minimize") is None
    assert elapsed_conflict([80.0], [], "minimize") is None
