"""The end of a search: in which order the finalists are measured again before one is recommended.

Rows in, the next restart out. Knows neither Ray nor Optuna; who is a finalist is for `report/finalists.py` to say.
"""

from __future__ import annotations

from collections.abc import Sequence

from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow
from raytune_autotuner.tune.reporter import may_run_again


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
