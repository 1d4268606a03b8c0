"""From the metrics of a trial to its score, and how far it is from keeping its SLOs. No constants are mixed in.

Three layers, best first, kept apart by one constraint value v that every trial gets:

- feasible, v <= 0: every SLO is met, v is minus the margin of the tightest one;
- an SLO missed, 0 < v < 1: v = t / (1 + t), where t is the total relative violation;
- failed, 1 < v <= 2: see `score.grades`.

Within a layer of measured trials the score decides, in the metric's own unit and direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from raytune_autotuner.score.grades import Direction, penalty, progress_violation
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialResult

SLO: TypeAlias = Mapping[str, Mapping[str, float]]
"""Metric to statistic to upper limit: `{ttft_ms: {p99: 500}}`."""

UNMEASURED_EXCESS = 1_000.0
"""Relative violation of an SLO that has no finite measurement: as if its limit were missed a thousand times over."""
MAX_EXCESS = 1e6
"""A limit is never counted as missed by more, so that sums stay finite."""
NO_SLO_VALUE = -1.0
"""Constraint value of a measured trial in a study without SLOs: the margin of a latency of nothing."""
_BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Assessment:
    """What a trial's result is worth. Score and penalty exclude each other."""

    scores: tuple[float, ...]
    """The value of each objective, in its metric's own unit; empty where there is none."""
    violation: float | None
    """The constraint's value; None for a failure that no constraint is told for (its grade, or the environment)."""
    penalty: float | None = None
    """What the failure costs under the study's grade; never a measurement. None under `infinite`: no number to show."""
    failure: Failure | None = None
    """The failure, also the one found here: an objective without a measurement."""

    @property
    def score(self) -> float | None:
        """The first objective's value, or None."""
        return self.scores[0] if self.scores else None

    @property
    def feasible(self) -> bool:
        """Measured, with every SLO met."""
        return bool(self.scores) and self.violation is not None and self.violation <= 0


def slo_metric(metric: str, statistic: str) -> str:
    """The flat name under which a trial's metrics hold an SLO's measurement.

    >>> slo_metric("ttft_ms", "p99")
    'ttft_ms_p99'
    """
    return f"{metric}_{statistic}"


def measured(metrics: Mapping[str, float], name: str) -> float | None:
    """The finite value of a metric; None where it is absent, NaN or infinite: no value is not a value."""
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def excesses(metrics: Mapping[str, float], slo: SLO) -> Iterator[float]:
    """For each SLO limit (value - limit) / limit: below 0 the margin, above 0 the miss."""
    for metric, limits in slo.items():
        for statistic, limit in limits.items():
            value = measured(metrics, slo_metric(metric, statistic))
            yield UNMEASURED_EXCESS if value is None else min((value - limit) / limit, MAX_EXCESS)


def total_violation(metrics: Mapping[str, float], slo: SLO) -> float:
    """Sum over all SLO limits of the relative miss: 0 when all are met, continuous there, growing with each miss.

    >>> total_violation({"ttft_ms_p99": 750.0}, {"ttft_ms": {"p99": 500.0}})
    0.5
    """
    return sum(max(0.0, excess) for excess in excesses(metrics, slo))


def constraint_value(metrics: Mapping[str, float], slo: SLO) -> float:
    """The constraint's value of a measured trial: at most 0 when every SLO is met, else in (0, 1).

    >>> constraint_value({"ttft_ms_p99": 400.0}, {"ttft_ms": {"p99": 500.0}})
    -0.2
    """
    total = total_violation(metrics, slo)
    if total > 0:
        return min(total / (1.0 + total), _BELOW_ONE)
    return max(excesses(metrics, slo), default=NO_SLO_VALUE)


def assess(study: Study, result: TrialResult) -> Assessment:
    """The worth of one trial's result.

    A result whose objective was not measured is a failure of the load, never a 0: `Assessment.failure` has it.
    """
    score = measured(result.metrics, study.objective.metric)
    failure = result.failure
    if failure is None and score is not None:
        return Assessment((score,), constraint_value(result.metrics, study.objective.slo))
    return assess_failure(study, failure or _unmeasured(study, result), result.seconds.get("total", 0.0))


def assess_failure(study: Study, failure: Failure, elapsed_s: float = 0.0) -> Assessment:
    """The worth of a failed trial; also of one whose actor died, and of a suggestion refused before any start."""
    grade = study.penalty.grade
    graded = grade == "progress" and failure.blame is not Blame.ENVIRONMENT
    cost = penalty(grade, failure, elapsed_s, study.trial.timeout_s, study.objective.direction)
    shown = cost if cost is not None and math.isfinite(cost) else None
    return Assessment((), progress_violation(failure) if graded else None, shown, failure)


def rank_key(assessment: Assessment, direction: Direction) -> tuple[float, float]:
    """Sorts assessments best first: feasible by score, then missed SLOs by how far, then failures by how far they got.

    Failures without a violation come last.
    """
    violation = math.inf if assessment.violation is None else max(assessment.violation, 0.0)
    score = assessment.score
    if score is None:
        return (violation, math.inf)
    return (violation, -score if direction == "maximize" else score)


def softened(score: float, violation: float, direction: Direction) -> float:
    """The score worsened by a missed SLO, for grades that tell values only; continuous where the SLO is just met.

    Of a positive score the share `violation` is taken off when maximising; minimising, it is divided by the rest.

    >>> softened(100.0, 0.2, "maximize"), softened(100.0, 0.2, "minimize")
    (80.0, 125.0)
    """
    share = max(violation, 0.0)
    if direction == "maximize":
        return score - abs(score) * share
    return score + abs(score) * share / (1.0 - share)


def _unmeasured(study: Study, result: TrialResult) -> Failure:
    name = study.objective.metric
    state = f"is {result.metrics[name]}" if name in result.metrics else "is missing"
    return Failure(
        Stage.LOAD,
        Kind.BAD_RESPONSES,
        Blame.PARAMETERS,
        f"the objective's metric {name!r} {state} among {len(result.metrics)} metrics",
        "Check the name in objective, and load.log for requests that failed.",
        share=1.0,
    )
