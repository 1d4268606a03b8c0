"""Ray Tune's scheduler that ends a trial as soon as it cannot beat the best one so far; see `score/hopeless.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from raytune_autotuner.load.workload import levels
from raytune_autotuner.report.verdict import best_so_far
from raytune_autotuner.score.hopeless import Values, bound, can_be_judged
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialRow

LOADS = "loads"
"""Key of `Values` in a trial's report to Ray Tune after each of its loads."""
LOADED = "loaded"
"""Key that says whether all of its loads are behind it."""
LAST = "done"


class StopHopeless(FIFOScheduler):
    """Compares a trial with the incumbent after every load but its last."""

    def __init__(
        self,
        study: Study,
        searched: Callable[[], Sequence[TrialRow]],
        stop: Callable[[str, float], None],
    ) -> None:
        """`searched` gives the trials of the search; `stop` is told a trial's id and the bound before it is ended."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._study = study
        self._searched = searched
        self._stop = stop
        self._values: dict[str, Values] = {}
        self._labels = [level.label for level in levels(study.workload)]
        self._judges = study.search.stop_early and can_be_judged(study)

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its parts; what is worth keeping stands in the results folder.
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """After each load: whether the trial goes on."""
        values = _values(result)
        if not self._judges or not values or result.get(LAST):
            return str(self.CONTINUE)
        self._values[trial.trial_id] = values
        reached = None if result.get(LOADED) else self._bound_of_hopeless(trial.trial_id, values)
        if reached is None:
            return str(self.CONTINUE)
        self._stop(trial.trial_id, reached)
        return str(self.STOP)

    def _bound_of_hopeless(self, trial_id: str, so_far: Values) -> float | None:
        """What the trial could at best come to, where that is not enough; None where it goes on."""
        rows = {row.trial_id: row for row in self._searched()}
        direction = self._study.objective.direction
        row, best = rows.get(trial_id), best_so_far(rows.values(), direction)
        if row is None or row.name or best is None or best.score is None:
            return None
        others = [self._values[i] for i, other in rows.items() if other.score is not None and i in self._values]
        reached = bound(so_far, others, self._labels, direction)
        if reached is None:
            return None
        worse = reached < best.score if direction == "maximize" else reached > best.score
        return reached if worse else None


def _values(result: Mapping[str, Any]) -> Values:
    """What the trial has measured, from a report that Ray Tune has flattened."""
    return {name.removeprefix(f"{LOADS}/"): value for name, value in result.items() if name.startswith(f"{LOADS}/")}
