"""A study's own figures among Ray's metrics, at the Prometheus endpoint of the driver's node.

Ray puts `ray_` before the names and drops a gauge that was not set for some twenty seconds, so the driver sets all of
them as often as it refreshes what people look at. Every series says which study and which run it is of.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from ray.util import metrics

from raytune_autotuner.report.verdict import best_so_far
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow

PREFIX = "autotuner_"
_RUN = ("study", "run")


class Gauges:
    """Sets a study's figures; `show` does so as often as it is called."""

    def __init__(self, study: Study, run_id: str) -> None:
        self._study = study
        self._run = {"study": study.study, "run": run_id}
        self._trials = _gauge("trials", "trials in a state", "state", "part")
        self._wanted = _gauge("trials_wanted", "trials that the search has at most")
        self._best = _gauge("best_score", "the best score so far that keeps every SLO", "metric")
        self._relative = _gauge("best_relative", "the best score over the baseline's", "metric")
        self._left = _gauge("time_left_seconds", "seconds until the study's end, estimated")
        self._failures = metrics.Counter(f"{PREFIX}failures", "failed trials", (*_RUN, "stage", "kind"))
        self._counted: set[int] = set()

    def show(self, rows: Sequence[TrialRow], time_left_s: float | None) -> None:
        """Set everything as it is now; what is not known is not set."""
        self._wanted.set(self._study.search.trials, self._run)
        self._left.set(time_left_s, self._run)
        counts = Counter((row.state, "search" if row.verifies is None else "verification") for row in rows)
        for state, part in itertools.product(State, ("search", "verification")):
            self._trials.set(counts[state, part], {**self._run, "state": str(state), "part": part})
        best = best_so_far(rows, self._study.objective.direction)
        if best is not None:
            of_metric = {**self._run, "metric": self._study.objective.metric}
            self._best.set(best.score, of_metric)
            self._relative.set(best.relative, of_metric)
        self._count_failures(rows)

    def _count_failures(self, rows: Sequence[TrialRow]) -> None:
        for row in rows:
            failure = row.result.failure
            if failure is not None and row.number not in self._counted:
                self._counted.add(row.number)
                self._failures.inc(1, {**self._run, "stage": str(failure.stage), "kind": str(failure.kind)})


def _gauge(name: str, description: str, *tags: str) -> metrics.Gauge:
    return metrics.Gauge(f"{PREFIX}{name}", description, (*_RUN, *tags))
