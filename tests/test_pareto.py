"""The Pareto front, and which of its members is recommended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.score.pareto import dominates, knee, pareto_front, scores_of
from raytune_autotuner.study.study import Direction
from raytune_autotuner.study.trial import State, TrialRow

WAYS: tuple[Direction, ...] = ("maximize", "minimize")
POINTS = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=1, max_size=12)


def rows_of(points: Sequence[tuple[float, ...]]) -> list[TrialRow]:
    return [
        TrialRow(number, str(number), "", {}, State.MEASURED, score=point[0], violation=-1.0, scores=point)
        for number, point in enumerate(points)
    ]


def numbers(rows: Sequence[TrialRow]) -> list[int]:
    return [row.number for row in rows]


def test_the_front_holds_what_is_nowhere_beaten() -> None:
    rows = rows_of([(100.0, 50.0), (90.0, 60.0), (120.0, 80.0), (120.0, 90.0), (80.0, 10.0)])
    assert numbers(pareto_front(rows, WAYS)) == [0, 2, 4]


def test_only_feasible_trials_of_the_search_are_on_the_front() -> None:
    good, missed, failed, restart = rows_of([(1.0, 9.0), (9.0, 1.0), (9.0, 1.0), (9.0, 1.0)])
    rows = [
        good,
        replace(missed, violation=0.2),
        replace(failed, state=State.FAILED, score=None, scores=(), violation=1.2),
        replace(restart, verifies=0, restart=0),
    ]
    assert pareto_front(rows, WAYS) == [good]
    assert pareto_front(rows[1:], WAYS) == []


def test_equals_are_both_on_the_front() -> None:
    assert numbers(pareto_front(rows_of([(1.0, 1.0), (1.0, 1.0)]), WAYS)) == [0, 1]


def test_with_one_objective_the_front_is_the_best_score() -> None:
    rows = [replace(row, scores=()) for row in rows_of([(5.0,), (7.0,), (6.0,)])]
    assert numbers(pareto_front(rows, ["maximize"])) == [1]
    assert numbers(pareto_front(rows, ["minimize"])) == [0]


@given(POINTS)
def test_no_member_dominates_another_and_all_others_are_dominated_by_one(points: list[tuple[float, float]]) -> None:
    rows = rows_of(points)
    front = pareto_front(rows, WAYS)
    assert front
    for row in rows:
        beaten = any(dominates(scores_of(member), scores_of(row), WAYS) for member in front)
        assert beaten is (row not in front)


@given(POINTS, POINTS)
def test_a_larger_search_has_a_front_at_least_as_good(
    points: list[tuple[float, float]], more: list[tuple[float, float]]
) -> None:
    after = pareto_front(rows_of([*points, *more]), WAYS)
    for row in pareto_front(rows_of(points), WAYS):
        scores = scores_of(row)
        assert any(scores_of(other) == scores or dominates(scores_of(other), scores, WAYS) for other in after)


@given(POINTS, st.sampled_from([0.25, 2.0, 1024.0]))
def test_neither_the_unit_nor_the_sign_of_an_objective_changes_front_or_knee(
    points: list[tuple[float, float]], unit: float
) -> None:
    front = pareto_front(rows_of(points), WAYS)
    scaled = pareto_front(rows_of([(a * unit, -b) for a, b in points]), ["maximize", "maximize"])
    assert numbers(front) == numbers(scaled)
    chosen, again = knee(front, WAYS), knee(scaled, ["maximize", "maximize"])
    assert chosen is not None
    assert again is not None
    assert chosen.number == again.number


def test_the_knee_is_the_member_nearest_to_the_best_of_everything() -> None:
    rows = rows_of([(100.0, 9000.0), (95.0, 2000.0), (50.0, 1000.0)])
    assert knee(rows, WAYS) == rows[1]


def test_of_equally_near_members_the_first_objective_decides_then_the_earlier_trial() -> None:
    rows = rows_of([(50.0, 1.0), (100.0, 2.0), (100.0, 2.0)])
    assert knee(rows, WAYS) == rows[1]


def test_an_objective_that_is_the_same_for_all_does_not_count() -> None:
    rows = rows_of([(50.0, 1.0), (100.0, 1.0)])
    assert knee(rows, WAYS) == rows[1]


@given(POINTS)
def test_the_knee_is_on_the_front(points: list[tuple[float, float]]) -> None:
    front = pareto_front(rows_of(points), WAYS)
    assert knee(front, WAYS) in front


def test_an_empty_front_has_no_knee() -> None:
    assert knee([], WAYS) is None


def test_scores_without_their_directions_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        dominates((1.0, 2.0), (1.0, 2.0), ["maximize"])
