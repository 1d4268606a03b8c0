"""When a search has found enough, or will find nothing: rules over the trials so far. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from raytune_autotuner.score.pareto import dominates, scores_of
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow


def enough(study: Study, searched: Sequence[TrialRow]) -> str | None:
    """Why the search ends now, before its trials are used up; None where it goes on.

    `searched` are the trials of the search by number; those that still run or were interrupted do not count, lost ones
    only as failures in a row. One that an earlier run has answered may be the best, but is none in a row.
    """
    ended = [row for row in searched if row.state.teaches]
    over = [row for row in searched if row.counts or row.state is State.LOST]
    search, wanted = study.search, _wanted(study)
    if (target := search.target) is not None and any(_reaches(study, row, target) for row in ended):
        return f"the target is reached: {wanted} {target:g}"
    if search.plateau is not None and (stale := _since_better(study, ended)) >= search.plateau:
        return f"{stale} trials in a row found nothing better (search.plateau)"
    failures = len(list(takewhile(lambda row: row.state in (State.FAILED, State.LOST), reversed(over))))
    if failures >= search.max_failures_in_a_row:
        return f"{failures} trials in a row failed{_how_lost(over[-failures:])} (search.max_failures_in_a_row)"
    return None


def _how_lost(failures: Sequence[TrialRow]) -> str:
    """How many of them were no setting's fault: where it is the machine's, its trials are lost without end."""
    lost = [row for row in failures if row.state is State.LOST]
    return f" or were lost, the last one by {lost[-1].result.failure}" if lost else ""


def _wanted(study: Study) -> str:
    return f"{study.objective.metric} {'at least' if study.objective.direction == 'maximize' else 'at most'}"


def _reaches(study: Study, row: TrialRow, target: float) -> bool:
    return row.feasible and row.score is not None and not _better(study, target, row.score)


def _better(study: Study, score: float, than: float) -> bool:
    return score > than if study.objective.direction == "maximize" else score < than


def _since_better(study: Study, ended: Sequence[TrialRow]) -> int:
    """How many of the last trials are no better than all before them; 0 before anything was feasible.

    With several objectives one is better that no earlier one dominates or equals.
    """
    directions = [direction for _, direction in study.objective.targets]
    best: list[tuple[float, ...]] = []  # none of which dominates another
    stale = 0
    for row in ended:
        scores = scores_of(row) if row.feasible else ()
        if scores and not any(known == scores or dominates(known, scores, directions) for known in best):
            best = [*(known for known in best if not dominates(scores, known, directions)), scores]
            stale = 0
        elif best and row.counts:
            stale += 1
    return stale
