"""What earlier studies have measured already, for a search to begin with.

Only figures of the same model, engine, fixed arguments, hardware and workload are taken: others say nothing about this
study. Results folders in, judged rows out. Knows neither Ray nor Optuna.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.runs import open_run
from raytune_autotuner.report.store import place
from raytune_autotuner.report.verdict import best_so_far
from raytune_autotuner.score.metrics import AGAINST_BASELINE
from raytune_autotuner.score.objective import judged, promises
from raytune_autotuner.score.quality import QualityLoss, judge
from raytune_autotuner.score.slo import measured as is_measured
from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.failure import Kind
from raytune_autotuner.study.masking import mask_values
from raytune_autotuner.study.study import ObjectiveSpec, Study
from raytune_autotuner.study.trial import State, TrialRow

_OF_ANY = {"command", "api", "request", "exact_lengths"}
"""Keys of `engine` that say what is started and what is asked of it, where the engine is not known."""


@dataclass(frozen=True)
class Learned:
    """The trials of one earlier study that this one can learn from."""

    source: ResultsFolder
    rows: tuple[TrialRow, ...]
    """Judged by this study's objective and SLOs."""
    outside: int
    """Trials left out, as their settings lie outside of this study's search space."""

    def __str__(self) -> str:
        left_out = f", {self.outside} outside of the search space left out" if self.outside else ""
        return f"{len(self.rows)} trials of {self.source.path.name}{left_out}"


def learn_from_earlier(study: Study, versions: Mapping[str, Any]) -> list[Learned]:
    """What `search.warm_start` names; `versions` are this study's own.

    Raises `ConfigError` for a folder that is none, or whose study differs in what makes figures comparable.
    """
    return [
        _learn(study, versions, open_run(place(text, in_study=True), trials="")) for text in study.search.warm_start
    ]


def _learn(study: Study, versions: Mapping[str, Any], earlier: ResultsFolder) -> Learned:
    before = earlier.load_study()
    then = {**fingerprint(before, earlier.read_versions()), **_scored_by(before, study.objective)}
    now = {**fingerprint(study, versions), **_scored_by(study, study.objective)}
    _check_same(then, mask_values(now), earlier.place)
    ended = [row for row in earlier.read_rows() if row.state.teaches and row.verifies is None and not row.at_fault]
    inside = [row for row in ended if _is_inside(study, row.params)]
    told = [row for row in inside if _tells(study, row) and _is_judged_alike(study, row)]
    return Learned(
        earlier,
        tuple(judged(study, replace(row, name="", retry_of=None), row.result) for row in told),
        len(ended) - len(inside),
    )


def fingerprint(study: Study, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What must be alike for figures to be comparable, by the name that people know it under."""
    return {
        "model": study.model,
        "engine.kind": study.engine.kind,
        "engine.args": study.engine.args,
        "engine.env": study.engine.env,
        "engine.search_weights": study.engine.search_weights,
        **{f"engine.{name}": value for name, value in study.engine.model_dump(mode="json", include=_OF_ANY).items()},
        "workload": study.workload.model_dump(mode="json"),
        "resources": study.resources.model_dump(mode="json", exclude={"max_concurrent", "price_per_hour"}),
        "the engine's version": versions.get("engine"),
        "the machine": versions.get("machine"),
        "the autotuner's version": dict(versions.get("packages") or {}).get("raytune_autotuner"),
    }


def _scored_by(study: Study, objective: ObjectiveSpec) -> dict[str, Any]:
    """What beyond the fingerprint the figures of `study` rest on that `objective` looks at, by key."""
    keys = {*objective.in_scores, *(("slo",) if objective.attainment is not None else ())}
    found = {f"objective.{key}": getattr(study.objective, key) for key in sorted(keys)}
    if any(metric.startswith("cost_") for metric, _ in objective.targets):
        found["resources.price_per_hour"] = study.resources.price_per_hour
    return found


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any], path: str) -> None:
    different = [name for name in now if then[name] != now[name]]
    if different:
        details = "\n".join(f"{name} was {shown(then[name])} and is {shown(now[name])}." for name in different)
        raise ConfigError(f"search.warm_start: {path} does not compare with this study:\n{details}\nLeave it out.")


def _is_inside(study: Study, params: Mapping[str, Any]) -> bool:
    known = study.space.by_name
    if not params.keys() <= known.keys() or study.space.violated(params, study.fixed):
        return False
    return all(known[name].distribution.contains(value) for name, value in params.items())


def _tells(study: Study, row: TrialRow) -> bool:
    """Whether the row has all that this study asks for, or failed: one that was stopped early, say, has not."""
    if row.state is State.FAILED:
        return True
    metrics = row.result.metrics
    asked = [*(metric for metric, _ in study.objective.targets), *(one.name for one in promises(study, metrics))]
    return row.state is State.MEASURED and all(is_measured(metrics, name) is not None for name in asked)


def _is_judged_alike(study: Study, row: TrialRow) -> bool:
    """Whether this study would say the same of what the setting lost in quality, as far as that was asked."""
    failure, metrics = row.result.failure, row.result.metrics
    too_much = failure is not None and failure.kind is Kind.QUALITY_LOSS
    if study.quality is None or not all(name in metrics for name in AGAINST_BASELINE):
        return not too_much
    lost = QualityLoss(*(metrics[name] for name in AGAINST_BASELINE))
    return too_much == (judge(lost, study.quality) is not None)


def best_of(study: Study, learned: Sequence[Learned]) -> TrialRow | None:
    """The feasible setting with the best score, worth measuring in this study too."""
    return best_so_far((row for part in learned for row in part.rows if row.params), study.objective.direction)
