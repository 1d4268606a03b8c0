"""Ray Tune's scheduler that ends a trial as soon as it cannot beat the best one so far; see `score/hopeless.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from raytune_autotuner.load.workload import levels
from raytune_autotuner.score.hopeless import Seen, Values, can_be_judged
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
        row: Callable[[str], TrialRow],
        best: Callable[[], TrialRow | None],
        stop: Callable[[str, float], None],
    ) -> None:
        """`row` gives a trial by its id, `best` the best one; `stop` is told id and bound before a trial is ended."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._study = study
        self._row = row
        self._best = best
        self._stop = stop
        self._values: dict[str, Values] = {}
        self._seen = Seen(study.objective.direction)
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
        self._take_in_the_ended()
        row, best = self._row(trial_id), self._best()
        goes_on = row.name or row.verifies is not None
        reached = None if goes_on else self._seen.bound(so_far, self._labels)
        if reached is None or best is None or best.score is None:
            return None
        worse = reached < best.score if self._study.objective.direction == "maximize" else reached > best.score
        return reached if worse else None

    def _take_in_the_ended(self) -> None:
        """What trials of the search have shown that were measured in full."""
        for row in [row for row in map(self._row, self._values) if row.state.finished]:
            values = self._values.pop(row.trial_id)
            if row.score is not None and row.verifies is None:
                self._seen.add(values)


def _values(result: Mapping[str, Any]) -> Values:
    """What the trial has measured, from a report that Ray Tune has flattened."""
    return {name.removeprefix(f"{LOADS}/"): value for name, value in result.items() if name.startswith(f"{LOADS}/")}
