"""The figures of a run's trials once more, from the requests that they left: what the table of trials should say.

In: a results folder, its study and its rows. Out: the rows with every figure that requests tell computed again, score
and SLOs with it, and a line for each trial of which the table says otherwise, or whose requests are gone. What requests
do not tell (the engine's own counters, quality, energy) is the row's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_autotuner.report.course import requests_of
from raytune_autotuner.report.results import QUALITY, RESULT, SUGGESTION, ResultsFolder, read_result, read_suggestion
from raytune_autotuner.report.status import read_status
from raytune_autotuner.report.wording import format_number
from raytune_autotuner.report.writing import read_json
from raytune_autotuner.score.metrics import SAMPLES, EmptySample, told_by_requests
from raytune_autotuner.score.objective import judged, metrics_of_requests
from raytune_autotuner.study.failure import Blame
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow

_LAST_DIGITS = 1e-9
"""Sums of many figures in another order differ by less, relatively."""
_NAMED = 3
_IN_VERDICT = ("winner", "gain", "interval", "noise")


@dataclass(frozen=True)
class Recount:
    """A run's rows as their requests tell them."""

    rows: tuple[TrialRow, ...]
    counted: int = 0
    """So many trials' figures were computed from their requests."""
    notes: tuple[str, ...] = ()
    """What does not agree, or could not be computed, a line each."""


def recount(folder: ResultsFolder, study: Study, rows: Sequence[TrialRow]) -> Recount:
    """`rows` with the figures that their requests give."""
    rows = [row if row.state.finished else _ended(folder, study, row) for row in rows]
    with_figures = [row for row in rows if _has_figures(row)]
    again = {row.number: new for row in with_figures if (new := _again(folder, study, row)) is not None}
    gone = [row.number for row in with_figures if row.number not in again]
    found = _related([again.get(row.number, row) for row in rows])
    differences = [note for row, other in zip(rows, found, strict=True) if (note := _difference(row, other))]
    lost = [*([_gone(gone)] if gone else []), *map(_broken, broken_files(folder))]
    return Recount(tuple(found), len(again), (*differences, *lost))


def verdict_note(written: Mapping[str, Any] | None, told: Mapping[str, Any]) -> str | None:
    """That `verdict.json` does not say what the figures do; None where it does, or is not there."""
    if written is None or all(_same(written.get(name), told[name]) for name in _IN_VERDICT):
        return None
    return f"verdict.json says otherwise than the figures do: {written.get('sentence')}"


def _has_figures(row: TrialRow) -> bool:
    """Whether it has figures that are its own: those of an earlier run rest on requests that lie there."""
    return row.state in (State.MEASURED, State.STOPPED) and bool(row.result.metrics) and row.taken_from is None


def _ended(folder: ResultsFolder, study: Study, row: TrialRow) -> TrialRow:
    """A trial that the table does not know of to have ended (its driver was killed), by the result that it left."""
    result = read_result(folder.trial_dir(row.number, row.trial_id))
    if result is None or (result.failure is not None and result.failure.blame is Blame.ENVIRONMENT):
        return row
    return judged(study, row, result)


def _again(folder: ResultsFolder, study: Study, row: TrialRow) -> TrialRow | None:
    """None where its requests are gone."""
    requests = requests_of(folder.trial_dir(row.number, row.trial_id))
    try:
        told = metrics_of_requests(study, requests, row.result.paid_for)
    except EmptySample:
        return None
    kept = {name: value for name, value in row.result.metrics.items() if not told_by_requests(name)}
    if row.result.paid_for is None:  # of an earlier version: nobody knows what was paid for
        kept |= {name: value for name, value in row.result.metrics.items() if name.startswith("cost_")}
    result = replace(row.result, metrics={**told, **kept})
    return replace(row, result=result) if row.state is State.STOPPED else judged(study, row, result)


def _related(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The rows, each with its place against the baseline's score."""
    earlier = {row.number for row in rows if row.state is State.EARLIER and row.name}
    baseline = next((r for r in rows if r.state is State.MEASURED and (r.name or r.verifies in earlier)), None)
    if baseline is None or not baseline.score:
        return list(rows)
    return [row if row.score is None else replace(row, relative=row.score / baseline.score) for row in rows]


def _gone(numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:_NAMED])) + (f" and {len(numbers) - _NAMED} more" if numbers[_NAMED:] else "")
    trials = f"trial {named}" if len(numbers) == 1 else f"trials {named}"
    return f"No requests that can be read (requests.parquet) are left of {trials}: these figures are the table's."


def broken_files(folder: ResultsFolder) -> list[str]:
    """Those of a run's JSON files that are there and cannot be read: all else is told without them."""
    found = [
        (folder.verdict_file, folder.read_verdict()),
        (folder.status_file, read_status(folder)),
        (folder.versions_file, read_json(folder.versions_file)),
        *((path, read_suggestion(path)) for path in _of_trials(folder, SUGGESTION)),
        *((path, read_result(path.parent, name)) for name in (QUALITY, RESULT) for path in _of_trials(folder, name)),
    ]
    return [str(path.relative_to(folder.path)) for path, read in found if read is None and path.is_file()]


def _of_trials(folder: ResultsFolder, name: str) -> list[Path]:
    return sorted(folder.trials_dir.glob(f"*/{name}"))


def _broken(name: str) -> str:
    return f"{name} is broken: all of this is told without it."


def _difference(row: TrialRow, again: TrialRow) -> str | None:
    """What the table says of a trial that its requests do not, or the reverse."""
    then, now = _figures(row), _figures(again)
    names = [name for name in {**now, **then} if not _same(then.get(name), now.get(name)) and not _new(name, then)]
    if not names:
        return None
    told = [f"{name} {_text(then.get(name))}, not {_text(now.get(name))}" for name in names[:_NAMED]]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"Trial {row.number}: the table (trials.jsonl) says {'; '.join(told)}{more}; its requests are believed."


def _new(name: str, then: Mapping[str, object]) -> bool:
    """Whether a count of samples is missing in a table that is older than these counts."""
    return name not in then and name.partition("@")[0] in SAMPLES.values()


def _figures(row: TrialRow) -> dict[str, float | None]:
    """All numbers of a row by name, the score first."""
    own = {"score": row.score, "violation": row.violation}
    return own | {f"score {i + 1}": score for i, score in enumerate(row.scores)} | dict(row.result.metrics)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_LAST_DIGITS, abs_tol=1e-12)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _text(value: float | None) -> str:
    return "nothing" if value is None else format_number(value)
