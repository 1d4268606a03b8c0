"""The end of a search: which settings are measured again before one is recommended, and in which order.

Rows in, the next restart out. Knows neither Ray nor Optuna, and no statistics: `score/comparison.py` has those.
"""

from __future__ import annotations

from collections.abc import Sequence

from raytune_autotuner.report.verdict import changes
from raytune_autotuner.score.pareto import knee, pareto_front
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, State, TrialRow
from raytune_autotuner.tune.reporter import may_run_again


def finalists(study: Study, rows: Sequence[TrialRow], defaults: Params) -> list[TrialRow]:
    """The trials whose settings are worth measuring again, the baseline first; empty where there is nothing to decide.

    A setting that is worse than the baseline on first sight is no finalist: the defaults are kept in any case. The
    settings of an earlier run that is verified are all there is.
    """
    if taken := [row for row in rows if row.state is State.EARLIER]:
        return taken
    found = [row for row in rows if row.verifies is None and row.state is State.MEASURED]
    baseline = next((row for row in reversed(found) if row.name == BASELINE), None)
    best = _best_first(study, [row for row in found if row.feasible], defaults)
    if baseline in best and len(study.objective.targets) == 1:
        best = best[: best.index(baseline)]
    top = [row for row in best if row.name != BASELINE][: study.verify.top]
    return ([] if baseline is None else [baseline]) + top if top else []


def _best_first(study: Study, rows: Sequence[TrialRow], defaults: Params) -> list[TrialRow]:
    """By score, of equal ones the baseline first; with several objectives the Pareto front from its knee on."""
    if len(study.objective.targets) > 1:
        return _from_the_knee(study, rows)
    sign = -1.0 if study.objective.direction == "maximize" else 1.0

    def key(row: TrialRow) -> tuple[float, bool, int]:
        return (sign * (row.score or 0.0), row.name != BASELINE, len(changes(row.params, defaults)))

    return sorted(rows, key=key)


def _from_the_knee(study: Study, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The front's members: its knee, then the knee of the others, and so on."""
    directions = [direction for _, direction in study.objective.targets]
    front, ordered = pareto_front(rows, directions), list[TrialRow]()
    while (best := knee(front, directions)) is not None:
        ordered.append(best)
        front = [row for row in front if row is not best]
    return ordered


def next_restart(study: Study, rows: Sequence[TrialRow], chosen: Sequence[TrialRow]) -> tuple[TrialRow, int] | None:
    """The setting to start next and the number of its restart; None where all have begun or are given up.

    All settings have their restart i before one has its restart i + 1, and each round begins with another one, so
    that what drifts on the machine touches all alike.
    """
    again = [row for row in rows if row.verifies is not None]
    for restart in range(study.verify.restarts):
        turn = restart % len(chosen) if chosen else 0
        for row in [*chosen[turn:], *chosen[:turn]]:
            if _due(study, again, row, restart):
                return row, restart
    return None


def _due(study: Study, again: Sequence[TrialRow], chosen: TrialRow, restart: int) -> bool:
    tried = [row for row in again if row.verifies == chosen.number]
    if any(row.state is State.FAILED for row in tried):
        return False  # one failure is enough: it is out
    same = [row for row in tried if row.restart == restart]
    lost = [row for row in same if row.state is State.LOST]
    ended_or_running = any(row.state in (State.PENDING, State.RUNNING, State.MEASURED) for row in same)
    return not ended_or_running and may_run_again(lost, study.trial.retries)
