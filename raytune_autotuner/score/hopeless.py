"""Whether a trial that has measured a part of its loads can still beat the best one so far. Pure.

What is compared is an interval and not a point: the bound is what the trial would come to if everything measured were
low by three times its uncertainty, and everything not measured yet were as good as the best ever seen there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from raytune_autotuner.score.metrics import METRICS
from raytune_autotuner.study.study import Direction, Study

Values: TypeAlias = Mapping[str, Sequence[float]]
"""Load level to the objective's value in each round that was measured there."""

WIDTH = 3.0
"""Standard errors: wider than 99.7 % of normal noise."""
USUAL_NOISE = 0.05
"""Relative spread between rounds that is taken for granted until enough of it was seen."""
ENOUGH_PAIRS = 5


def can_be_judged(study: Study) -> bool:
    """Whether a part of a trial tells about the whole: one objective, a mean over several loads."""
    metric = METRICS.get(study.objective.metric)
    several = study.workload.rounds > 1 or len(study.workload.concurrency + study.workload.request_rate_rps) > 1
    return several and len(study.objective.targets) == 1 and metric is not None and metric.across == "mean"


def bound(so_far: Values, others: Sequence[Values], levels: Sequence[str], direction: Direction) -> float | None:
    """The best that a trial can still come to; None where a level was never measured by anybody.

    `others` are the trials that are measured in full, `levels` all load levels.
    """
    noise = spread([*others, so_far])
    best = [_best_at(level, so_far, others, noise, direction) for level in levels]
    known = [value for value in best if value is not None]
    return sum(known) / len(known) if known and len(known) == len(levels) else None


def spread(trials: Iterable[Values]) -> float:
    """Relative standard deviation between the rounds of one trial at one level, pooled over all."""
    groups = [[math.log(v) for v in values if v > 0] for trial in trials for values in trial.values()]
    groups = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if freedom < ENOUGH_PAIRS:
        return USUAL_NOISE
    return math.sqrt(sum(statistics.variance(group) * (len(group) - 1) for group in groups) / freedom)


def _best_at(level: str, so_far: Values, others: Sequence[Values], noise: float, way: Direction) -> float | None:
    sign = 1.0 if way == "maximize" else -1.0
    if values := so_far.get(level):
        return statistics.fmean(values) * math.exp(sign * WIDTH * noise / math.sqrt(len(values)))
    seen = [statistics.fmean(values) for other in others if (values := other.get(level))]
    pick = max if way == "maximize" else min
    return pick(seen) * math.exp(sign * WIDTH * noise) if seen else None
