"""What a report rests on: everything that a results folder holds, read once.

Also of a study that runs or was killed. What is missing is empty, never made up; secrets are masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raytune_autotuner.report.finalists import Contender, contenders, started
from raytune_autotuner.report.recheck import Recheck, answer_of, written_verdict
from raytune_autotuner.report.recount import recount, verdict_note
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.status import Standing, StudyStatus, read_status, standing_of
from raytune_autotuner.report.verdict import Verdict, baseline_of, defaults_of
from raytune_autotuner.report.wording import format_duration
from raytune_autotuner.score.metrics import METRICS
from raytune_autotuner.study.masking import mask_values
from raytune_autotuner.study.space import format_value
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialRow


@dataclass(frozen=True)
class Evidence:
    """One study as its folder tells it."""

    folder: ResultsFolder
    study: Study
    rows: tuple[TrialRow, ...]
    """By number."""
    versions: Mapping[str, Any]
    status: StudyStatus | None
    answer: Verdict
    counted: int = 0
    """So many trials' figures were computed again from their requests."""
    notes: tuple[str, ...] = ()
    """Where the run's files do not agree with those figures, a line each."""

    @cached_property
    def searched(self) -> list[TrialRow]:
        """The trials of the search."""
        return [row for row in self.rows if row.verifies is None]

    @cached_property
    def contenders(self) -> list[Contender]:
        """What was measured again, the defaults first."""
        return contenders(self.rows, self.study.objective.targets)

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The values in force in the baseline, as far as the engine has told them."""
        return defaults_of(self.study, self.versions)

    def before(self, parameter: str) -> str:
        """A parameter's value in the baseline, for people, as far as the engine has told it."""
        if parameter in self.study.fixed:
            return format_value(self.study.fixed[parameter])
        known = parameter in self.defaults
        return f"{format_value(self.defaults[parameter])} (engine's default)" if known else "engine's default"

    @cached_property
    def baseline(self) -> TrialRow | None:
        """The engine's defaults with the fixed arguments."""
        return baseline_of(self.rows)

    @property
    def recheck(self) -> Recheck | None:
        """Of a run that verifies an earlier one: what that claimed, and what is different now."""
        return self.answer if isinstance(self.answer, Recheck) else None

    @property
    def standing(self) -> Standing:
        """Where the run is."""
        return standing_of(self.status)

    @property
    def elapsed(self) -> str:
        """For how long the study ran, for people; empty where nobody knows."""
        return "" if self.status is None else format_duration(self.status.elapsed_s)

    def trial_dir(self, row: TrialRow) -> Path:
        """The trial's folder, which need not be there."""
        return self.folder.trial_dir(row.number, row.trial_id)

    def command(self, row: TrialRow) -> Mapping[str, Any]:
        """How the row's engine was started (`command.json`); empty where that was not written, or on dummy weights."""
        dummy = self.study.engine.search_weights == "dummy"
        places = [one for one in (started(row, self.rows), row) if one.verifies is not None or not dummy]
        return dict(mask_values(next(filter(None, map(self.folder.read_command, places)), {})))


def gather(folder: ResultsFolder) -> Evidence:
    """Read the whole folder, its trials' figures from their requests.

    Raises `ConfigError` where its study file is broken.
    """
    study, status, versions = folder.load_study(), read_status(folder), dict(mask_values(folder.read_versions()))
    rows = [TrialRow.from_dict(mask_values(row.to_dict())) for row in folder.read_rows()]
    found = recount(folder, study, rows)
    answer = answer_of(folder, study, found.rows, versions)
    note = verdict_note(written_verdict(folder), answer.to_dict())
    notes = (*found.notes, *([note] if note else []))
    return Evidence(folder, study, found.rows, versions, status, answer, found.counted, notes)


def unit_of(metric: str) -> str:
    """The unit of a metric, at whatever load level; empty for a bare number."""
    known = METRICS.get(metric.partition("@")[0])
    return "" if known is None or known.unit == "1" else known.unit
