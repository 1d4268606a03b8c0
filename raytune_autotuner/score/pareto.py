"""The Pareto front of several objectives, and which of its members to recommend.

Rows of the results table and the objectives' directions go in (`ObjectiveSpec.targets` has them in the order of
`TrialRow.scores`), rows come out. With one objective the front is the best score, and whatever equals it. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from raytune_autotuner.study.study import Direction
from raytune_autotuner.study.trial import TrialRow


def scores_of(row: TrialRow) -> tuple[float, ...]:
    """The value of every objective; a row written when there was only one has just that."""
    return row.scores or (() if row.score is None else (row.score,))


def cost(score: float, direction: Direction) -> float:
    """The score turned so that smaller is better."""
    return -score if direction == "maximize" else score


def dominates(left: Sequence[float], right: Sequence[float], directions: Sequence[Direction]) -> bool:
    """Whether the scores `left` are nowhere worse than `right`, and somewhere better.

    >>> dominates((120.0, 80.0), (100.0, 80.0), ("maximize", "minimize"))
    True
    """
    costs = list(zip(_costs(left, directions), _costs(right, directions), strict=True))
    return all(a <= b for a, b in costs) and any(a < b for a, b in costs)


def pareto_front(rows: Iterable[TrialRow], directions: Sequence[Direction]) -> list[TrialRow]:
    """The feasible trials of the search that no other one dominates, in their order; of equals all.

    Restarts for the verdict measure a setting again, and are no part of it.
    """
    found = [row for row in rows if row.feasible and row.verifies is None and scores_of(row)]
    return [row for row in found if not any(dominates(scores_of(other), scores_of(row), directions) for other in found)]


def knee(front: Sequence[TrialRow], directions: Sequence[Direction]) -> TrialRow | None:
    """The member of a front nearest to its ideal point, which has the best of each objective; None of an empty one.

    Each objective counts by its range over the front, so units do not matter. Of equally near ones the better in the
    first objective is taken (then the second, and so on), then the earlier.
    """
    if not front:
        return None
    costs = {row.number: _costs(scores_of(row), directions) for row in front}
    columns = list(zip(*costs.values(), strict=True))
    return min(front, key=lambda row: (_distance(costs[row.number], columns), costs[row.number], row.number))


def _distance(costs: Sequence[float], columns: Sequence[Sequence[float]]) -> float:
    """From the ideal point, in ranges; rounded, as a last digit must not decide between equals."""
    return round(math.hypot(*(_scaled(cost, column) for cost, column in zip(costs, columns, strict=True))), 9)


def _scaled(cost: float, column: Sequence[float]) -> float:
    """0 for the best of the front, 1 for the worst."""
    best, worst = min(column), max(column)
    return (cost - best) / (worst - best) if worst > best else 0.0


def _costs(scores: Sequence[float], directions: Sequence[Direction]) -> tuple[float, ...]:
    return tuple(cost(score, direction) for score, direction in zip(scores, directions, strict=True))
