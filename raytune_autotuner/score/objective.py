"""From the metrics of a trial's load levels to its scores, and how far it is from keeping its SLOs.

No constants are mixed in. Three layers, best first, kept apart by one constraint value v that every trial gets:

- feasible, v <= 0: every SLO is met at every load level (where `max_load_under_slo` is looked for: at the lowest),
  v is minus the margin of the tightest one;
- an SLO missed, 0 < v < 1: v = t / (1 + t), where t is the total relative violation;
- failed, 1 < v <= 2: see `score.grades`.

Within a layer of measured trials the scores decide, each in its metric's own unit and direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from raytune_autotuner.score import slo
from raytune_autotuner.score.grades import penalty, progress_violation
from raytune_autotuner.score.metrics import ENGINE_METRICS, combine, cost_metrics, samples_needed, summarize
from raytune_autotuner.score.records import RequestRecord, duration_s
from raytune_autotuner.score.slo import constraint_value, max_load_under_slo, measured
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.study import Direction, Study
from raytune_autotuner.study.trial import State, TrialResult, TrialRow

_SEEN = {"tpot_ms": "answers had two tokens or more", "itl_ms": "gaps between chunks were seen"}
_MORE_SAMPLES = "Raise workload.requests or rounds, so that some may fail or be short; load.log says what failed."


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
    """The failure, also the one found here: an objective without a measurement, too few samples for a percentile."""

    @property
    def score(self) -> float | None:
        """The first objective's value, or None."""
        return self.scores[0] if self.scores else None

    @property
    def feasible(self) -> bool:
        """Measured, with every SLO met."""
        return bool(self.scores) and self.violation is not None and self.violation <= 0


def trial_metrics(study: Study, levels: Mapping[str, Mapping[str, float]], gpus: float = 0.0) -> dict[str, float]:
    """A trial's metrics from those of its load levels by label, cost and highest load included.

    Levels that the study does not name were tried between two others, to find the highest load. `gpus` is what the
    trial holds. Raises `EmptySample` without a level.
    """
    price, loads = study.resources.price_per_hour, slo.loads(study.workload)
    asked = {label: level for label, level in levels.items() if label in loads or not loads}
    priced = {label: {**level, **cost_metrics(level, price, gpus)} for label, level in asked.items()}
    metrics = combine(priced, loads)
    if study.objective.slo and len(loads) > 1:
        between = [float(label[1:]) for label in levels.keys() - asked if slo.meets(levels[label], study.objective)]
        metrics[slo.MAX_LOAD] = max([max_load_under_slo(asked, loads, study.objective), *between])
    return metrics


def metrics_of_requests(
    study: Study, requests: Mapping[str, Sequence[RequestRecord]], paid_for: float | None
) -> dict[str, float]:
    """A trial's metrics from its requests by load level, as far as requests tell them.

    Raises `EmptySample` where at one of the levels no request was completed.
    """
    levels = {label: summarize(found, duration_s(found), study.objective.slo) for label, found in requests.items()}
    return trial_metrics(study, levels, paid_for or 0.0)


def violation(study: Study, metrics: Mapping[str, float]) -> float:
    """The constraint's value of a measured trial, over the load levels at which its SLOs must hold."""
    return constraint_value(metrics, study.objective, judged_levels(study))


def assess(study: Study, result: TrialResult) -> Assessment:
    """The worth of one trial's result.

    A result that lacks an objective, or the requests that a percentile needs, is a failure of the load, never a 0:
    `Assessment.failure` has it.
    """
    failure = result.failure or _unmeasured(study, result.metrics) or _too_few(study, result.metrics)
    if failure is not None:
        return assess_failure(study, failure, result.seconds.get("total", 0.0))
    scores = tuple(result.metrics[name] for name, _ in study.objective.targets)
    return Assessment(scores, violation(study, result.metrics))


def judged(study: Study, row: TrialRow, result: TrialResult) -> TrialRow:
    """`row` with its result and what that is worth: state, score or penalty, also a failure that is found here."""
    worth = assess(study, result)
    return replace(
        row,
        state=State.MEASURED if worth.score is not None else State.FAILED,
        result=replace(result, failure=worth.failure),
        score=worth.score,
        scores=worth.scores,
        violation=worth.violation,
        penalty=worth.penalty,
    )


@dataclass(frozen=True, slots=True)
class Promise:
    """One limit of the study's SLOs, and what was measured."""

    name: str
    """The metric's flat name, with the load level where there are several: `ttft_ms_p90@c16`."""
    limit: float
    at_least: bool
    """Whether the value must reach the limit (a share of requests); else it must not exceed it."""
    value: float | None
    """None where nothing was measured, which is a promise broken."""

    @property
    def kept(self) -> bool:
        """Whether it is met."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def promises(study: Study, metrics: Mapping[str, float]) -> list[Promise]:
    """Every limit at every load level at which it must hold."""
    objective = study.objective
    limits = slo.slo_metrics(objective)
    if objective.slo and objective.attainment is not None:
        limits = {slo.ATTAINMENT: objective.attainment}
    places = [f"@{level}" for level in judged_levels(study)] or [""]
    return [
        Promise(f"{name}{at}", limit, name == slo.ATTAINMENT, measured(metrics, f"{name}{at}"))
        for name, limit in limits.items()
        for at in places
    ]


def assess_failure(study: Study, failure: Failure, elapsed_s: float = 0.0) -> Assessment:
    """The worth of a failed trial; also of one whose actor died, and of a suggestion refused before any start."""
    grade = study.penalty.grade
    graded = grade == "progress" and failure.blame is not Blame.ENVIRONMENT
    cost = penalty(grade, failure, elapsed_s, study.trial.timeout_s, study.objective.direction)
    shown = cost if cost is not None and math.isfinite(cost) else None
    return Assessment((), progress_violation(failure) if graded else None, shown, failure)


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


def judged_levels(study: Study) -> list[str]:
    """The labels of the load levels at which every SLO must hold; none where there is one level, named or not."""
    levels = [*slo.loads(study.workload)]
    if len(levels) < 2:
        return []
    return levels[:1] if slo.scans_loads(study.objective) else levels


def _unmeasured(study: Study, metrics: Mapping[str, float]) -> Failure | None:
    name = next((name for name, _ in study.objective.targets if measured(metrics, name) is None), None)
    if name is None:
        return None
    state = f"is {metrics[name]}" if name in metrics else "is missing"
    evidence = f"the objective's metric {name!r} {state} among {len(metrics)} metrics"
    told = (
        "whether the engine tells it on its /metrics page" if name.partition("@")[0] in ENGINE_METRICS else "load.log"
    )
    return _bad_load(evidence, f"Check the name in objective, and {told}.")


def _too_few(study: Study, metrics: Mapping[str, float]) -> Failure | None:
    """A percentile that decides something, and that rests on too few samples."""
    for name, at in _decisive(study):
        if slo.lacks_samples(metrics, name, at):
            seen = _SEEN.get(name.rpartition("_")[0], "requests were completed")
            where = f" at {at[1:]}" if at else ""
            needed = samples_needed(name)
            evidence = f"{slo.samples(metrics, name, at):g} {seen}{where}, but {name} needs {needed}"
            return _bad_load(evidence, _MORE_SAMPLES)
    return None


def _decisive(study: Study) -> Iterator[tuple[str, str]]:
    """The metrics that objectives and SLOs rest on, and where: `@c16`, or nothing where there is one load level."""
    levels = slo.loads(study.workload)
    everywhere = [f"@{level}" for level in levels] if len(levels) > 1 else [""]
    for name, _ in study.objective.targets:
        base, at, level = name.partition("@")
        yield from ((base, place) for place in ([f"@{level}"] if at else everywhere))
    judged = [f"@{level}" for level in judged_levels(study)] or [""]
    yield from ((name, place) for name in slo.slo_metrics(study.objective) for place in judged)


def _bad_load(evidence: str, remedy: str) -> Failure:
    return Failure(Stage.LOAD, Kind.BAD_RESPONSES, Blame.PARAMETERS, evidence, remedy, share=1.0)
