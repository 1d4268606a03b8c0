"""Settings that earlier runs have measured already: their answers stand in for trials (`search.cache`).

Results folders in, answers by setting out. An answer is only taken from a run that measured in every respect as this
study does; what that is beyond the fingerprint of `warm_start` stands here. Knows neither Ray nor Optuna.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.runs import runs_at
from raytune_autotuner.report.store import Store
from raytune_autotuner.score.slo import ends_at_first_miss
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Blame
from raytune_autotuner.study.masking import mask_values
from raytune_autotuner.study.space import Params, setting_key
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from raytune_autotuner.tune.bench import ENDING
from raytune_autotuner.tune.warm_start import fingerprint


@dataclass(frozen=True, slots=True)
class Answer:
    """What a trial of an earlier run came to."""

    result: TrialResult
    source: str
    """`trial 7 of RUN`."""


@dataclass(frozen=True)
class Cache:
    """Answers by setting, the defaults filled in."""

    answers: Mapping[str, Answer]

    def find(self, filled: Params) -> Answer | None:
        """The answer for a setting whose defaults are filled in; None where no run has one."""
        return self.answers.get(setting_key(filled))

    def __str__(self) -> str:
        runs = len({answer.source.rpartition(" of ")[2] for answer in self.answers.values()})
        return f"{len(self.answers)} settings are known from {runs} earlier run{'' if runs == 1 else 's'}"


EMPTY = Cache({})


def read_cache(study: Study, versions: Mapping[str, Any], parent: Path | Store, defaults: Params) -> Cache:
    """The answers that the runs under `parent` have for `study`; none unless its `search.cache` is on.

    `versions` are this study's own, the cluster included; `defaults` the values in force at the baseline. Of several
    answers for one setting the newest counts.
    """
    if not study.search.cache:
        return EMPTY
    now = mask_values(_conditions(study, versions))
    answers = {}
    for run in runs_at(parent):
        for row in _comparable_rows(run, now):
            if row.params.keys() <= study.space.by_name.keys() and _answers(study, row):
                source = f"trial {row.number} of {run.path.name}"
                answers[setting_key({**defaults, **row.params})] = Answer(row.result, source)
    return Cache(answers)


def _conditions(study: Study, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What must be alike for an answer to be the same trial's: also what decides when a trial ends or fails."""
    return {
        **fingerprint(study, versions),
        "the cluster": versions.get("cluster"),
        "trial": study.trial.model_dump(mode="json", exclude={"retries", "log_limit_mb"}),
        "quality": None if study.quality is None else study.quality.model_dump(mode="json"),
        "objective.slo": study.objective.slo,
        "objective.attainment": study.objective.attainment,
        "a scan": ends_at_first_miss(study.objective),
        "resources.max_concurrent": study.resources.max_concurrent,
        "resources.price_per_hour": study.resources.price_per_hour,
    }


def _comparable_rows(run: ResultsFolder, now: Mapping[str, Any]) -> list[TrialRow]:
    """The trials of a run that measured as this study does; none of a folder that cannot be read as a run any more."""
    try:
        study = run.load_study()
        by_hand = run.path.name.startswith(f"{study.study}{ENDING}-")  # which may have another restart's seeds
        alike = not by_hand and mask_values(_conditions(study, run.read_versions())) == now
        return run.read_rows() if alike else []
    except ConfigError:
        return []


def _answers(study: Study, row: TrialRow) -> bool:
    """Whether the row is a measurement of its own that has what this study optimises, or the setting's own failure."""
    if row.verifies is not None or row.taken_from is not None:
        return False
    if row.state is State.FAILED:
        return row.result.failure is not None and row.result.failure.blame is Blame.PARAMETERS
    targets = (metric for metric, _ in study.objective.targets)
    return row.state is State.MEASURED and all(metric in row.result.metrics for metric in targets)
