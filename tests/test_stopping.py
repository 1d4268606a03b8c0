"""When a search ends before its trials are used up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow
from raytune_autotuner.tune.stopping import enough
from tests.studies import BASE, merged


def study(**search: Any) -> Study:
    return parse_study(merged(BASE, {"search": search}))


def rows(*scores: float | None, violation: float = -1.0) -> list[TrialRow]:
    """Measured trials with these scores; None failed."""
    states = [State.FAILED if score is None else State.MEASURED for score in scores]
    return [
        TrialRow(number, str(number), "", {}, state, score=score, violation=violation)
        for number, (score, state) in enumerate(zip(scores, states, strict=True))
    ]


@pytest.mark.parametrize(
    ("search", "scores", "reason"),
    [
        ({}, [1, 2, 3], None),
        ({"target": 10.0}, [1, 9.9], None),
        ({"target": 10.0}, [1, 10.0], "the target is reached: output_throughput_tok_s at least 10"),
        ({"plateau": 2}, [5, 4], None),
        ({"plateau": 2}, [5, 4, 3], "2 trials in a row found nothing better (search.plateau)"),
        ({"plateau": 2}, [5, 4, 6, None], None),
        ({"plateau": 2}, [None, None, None], None),
        ({"max_failures_in_a_row": 3}, [None, None], None),
        ({"max_failures_in_a_row": 3}, [None, 1, None, None], None),
        ({"max_failures_in_a_row": 3}, [1, None, None, None], "3 trials in a row failed"),
    ],
)
def test_a_search_ends_with_its_reason(search: dict[str, Any], scores: list[float | None], reason: str | None) -> None:
    assert (enough(study(**search), rows(*scores)) or "").startswith(reason or "")
    assert (enough(study(**search), rows(*scores)) is None) == (reason is None)


def test_a_score_that_misses_an_slo_reaches_no_target_and_ends_no_plateau() -> None:
    assert enough(study(target=10.0), rows(20, violation=0.5)) is None
    assert enough(study(plateau=1), rows(20, 30, violation=0.5)) is None


def test_with_several_objectives_a_plateau_ends_where_no_earlier_trial_is_as_good() -> None:
    both = parse_study(merged(BASE, {"search": {"plateau": 2}, "objective": {"minimize": "ttft_ms_mean"}}))

    def of(*scores: tuple[float, float]) -> list[TrialRow]:
        pairs = zip(rows(*(first for first, _ in scores)), scores, strict=True)
        return [replace(row, scores=both) for row, both in pairs]

    assert enough(both, of((100, 50), (90, 40), (80, 30), (70, 20))) is None
    assert enough(both, of((100, 50), (90, 40), (90, 45), (100, 50))) is not None


def test_interrupted_trials_break_no_row_of_failures_and_lost_ones_count() -> None:
    failed = rows(None, None, None)
    interrupted, lost = (TrialRow(3, "3", "", {}, state) for state in (State.INTERRUPTED, State.LOST))
    assert enough(study(max_failures_in_a_row=3), [*failed[:2], interrupted, failed[2]]) is not None
    assert "or were lost" in str(enough(study(max_failures_in_a_row=3), [*failed[:2], lost]))
    assert enough(study(max_failures_in_a_row=3), [lost, lost, *rows(1.0), lost, lost]) is None
