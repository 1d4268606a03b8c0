"""Whether a trial that has measured a part of its loads can still beat the best one so far. Pure.

What is compared is an interval and not a point: the bound is what the trial would come to if everything measured were
low by three times its uncertainty, and everything not measured yet were as good as the best ever seen there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from raytune_autotuner.score.metrics import METRICS, samples_needed
from raytune_autotuner.study.study import Direction, Study

Values: TypeAlias = Mapping[str, Sequence[float]]
"""Load level to the objective's value in each round that was measured there."""

WIDTH = 3.0
"""Standard errors: wider than 99.7 % of normal noise."""
USUAL_NOISE = 0.05
"""Relative spread between rounds that is taken for granted until enough of it was seen."""
ENOUGH_PAIRS = 5


def can_be_judged(study: Study) -> bool:
    """Whether a part of a trial tells about the whole: one objective, a mean over several loads.

    A percentile of several rounds is none: it is taken of all their requests, and those of one round may be its worst.
    """
    metric, rounds = METRICS.get(study.objective.metric), study.workload.rounds
    several = rounds > 1 or len(study.workload.concurrency + study.workload.request_rate_rps) > 1
    pooled = rounds > 1 and samples_needed(study.objective.metric) > 0
    one = several and not pooled and len(study.objective.targets) == 1
    return one and metric is not None and metric.across == "mean"


class Seen:
    """What the trials that are measured in full have shown: how good each load can be, and how much rounds differ."""

    def __init__(self, direction: Direction, trials: Iterable[Values] = ()) -> None:
        self._sign = 1.0 if direction == "maximize" else -1.0
        self._pick: Callable[[float, float], float] = max if direction == "maximize" else min
        self._best: dict[str, float] = {}
        self._freedom, self._squares = 0, 0.0
        for trial in trials:
            self.add(trial)

    def add(self, trial: Values) -> None:
        """One more trial."""
        freedom, squares = _scatter(trial)
        self._freedom, self._squares = self._freedom + freedom, self._squares + squares
        for level, values in trial.items():
            if values:
                mean = statistics.fmean(values)
                self._best[level] = self._pick(mean, self._best.get(level, mean))

    def bound(self, so_far: Values, levels: Sequence[str]) -> float | None:
        """The best that a trial can still come to; None where that is open.

        It is where one of all `levels` was never measured by anybody, and where a value to maximise is 0 so far: a
        share of nothing is no uncertainty, and one request that meets its limits makes it any number.
        """
        noise = self.noise(so_far)
        best = [self._best_at(level, so_far, noise) for level in levels]
        known = [value for value in best if value is not None]
        return sum(known) / len(known) if known and len(known) == len(levels) else None

    def noise(self, so_far: Values) -> float:
        """Relative standard deviation between the rounds of one trial at one level, pooled over all and `so_far`."""
        freedom, squares = _scatter(so_far)
        freedom += self._freedom
        return USUAL_NOISE if freedom < ENOUGH_PAIRS else math.sqrt((squares + self._squares) / freedom)

    def _best_at(self, level: str, so_far: Values, noise: float) -> float | None:
        values = so_far.get(level)
        mean = statistics.fmean(values) if values else self._best.get(level)
        if mean is None or (self._sign > 0 and mean == 0):
            return None
        return mean * math.exp(self._sign * WIDTH * noise / math.sqrt(len(values or (mean,))))


def _scatter(trial: Values) -> tuple[int, float]:
    """Degrees of freedom and the sum of squares of the logarithms, within the levels."""
    groups = [[math.log(v) for v in values if v > 0] for values in trial.values()]
    groups = [group for group in groups if len(group) > 1]
    return sum(len(group) - 1 for group in groups), sum(statistics.variance(g) * (len(g) - 1) for g in groups)
