"""A study run in a few lines of text, from its files alone: for `status`, and for the end of a run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from raytune_autotuner.report.recheck import answer_of
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.status import (
    LiveTrial,
    StudyStatus,
    format_duration,
    progress,
    read_status,
    time_left_s,
)
from raytune_autotuner.report.verdict import best_so_far
from raytune_autotuner.report.wording import describe_params, format_number, verification_of
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow


def render_status(folder: ResultsFolder) -> str:
    """A few lines: how far the study is, what runs, the best so far, what failed."""
    study, status = folder.load_study(), read_status(folder)
    rows = _as_they_stand(folder.read_rows(), status)
    lines = [f"study {study.study} in {folder.place}", _phase_line(study, rows, status)]
    if status is not None and status.driver_alive:
        lines += [_live_line(trial, rows, study.verify.restarts) for trial in status.live]
    lines.append(_best_line(study, rows) if status is None or status.driver_alive else _answer(folder, study, rows))
    return "\n".join([*lines, *failure_lines(rows)])


def _as_they_stand(rows: Sequence[TrialRow], status: StudyStatus | None) -> list[TrialRow]:
    """The rows, of which those that run say so."""
    live = {trial.number for trial in status.live} if status is not None else set()
    return [replace(row, state=State.RUNNING) if row.number in live else row for row in rows]


def failure_lines(rows: Sequence[TrialRow]) -> list[str]:
    """A line for each kind of failure: how often, in which trials, and its remedy."""
    failed = [(row, row.result.failure) for row in rows if row.result.failure is not None]
    kinds = Counter(failure.kind for _, failure in failed)
    lines = []
    for kind, count in kinds.most_common():
        of_kind = [(row, failure) for row, failure in failed if failure.kind is kind]
        numbers = ", ".join(str(row.number) for row, _ in of_kind[:8]) + (", ..." if count > 8 else "")
        trials = f"trial {numbers}" if count == 1 else f"trials {numbers}"
        lines.append(f"{kind} x{count} ({trials}): {of_kind[-1][1].remedy}")
    return lines


def _phase_line(study: Study, rows: Sequence[TrialRow], status: StudyStatus | None) -> str:
    searched = [row for row in rows if row.verifies is None]
    states = Counter(row.state for row in searched)
    counts = ", ".join(f"{states[state]} {state}" for state in State if states[state]) or "no trial yet"
    done = progress(study, rows, f" ({counts})")
    if status is None:
        return f"not started: {done}"
    if status.phase != "running":
        return f"{status.phase} after {format_duration(status.elapsed_s)}: {done}"
    if not status.driver_alive:
        return f"killed after {format_duration(status.elapsed_s)}: {done}"
    live = {trial.number: trial for trial in status.live}
    left = time_left_s(study, rows, live, status.concurrency, status.elapsed_s)
    estimate = "" if left is None else f", about {format_duration(left)} left"
    return f"running for {format_duration(time.time() - status.started_at)}: {done}{estimate}"


def _live_line(trial: LiveTrial, rows: Sequence[TrialRow], restarts: int) -> str:
    row = next((row for row in rows if row.number == trial.number), None)
    share = f" {trial.share:.0%}" if trial.share else ""
    clock = f"{trial.elapsed_s:.1f} s / {trial.timeout_s:g} s"
    what = "baseline" if row is None or not row.params else describe_params(row.params)
    if row is not None and (purpose := verification_of(row, restarts)):
        what = f"{purpose}, {what}"
    return f"trial {trial.number} at {trial.stage}{share}, {clock} {what}"


def _answer(folder: ResultsFolder, study: Study, rows: Sequence[TrialRow]) -> str:
    """The verdict as it was written at the end; of a study that was killed, as its rows say."""
    status, written = read_status(folder), folder.read_verdict()
    if written is not None and status is not None and status.phase != "running":
        return " ".join(filter(None, (written["sentence"], written["warning"])))
    answer = answer_of(folder, study, rows)
    return " ".join(filter(None, (answer.sentence, answer.warning)))


def _best_line(study: Study, rows: Sequence[TrialRow]) -> str:
    direction, metric = study.objective.direction, study.objective.metric
    best = best_so_far(rows, direction)
    if best is None or best.score is None:
        return "best so far: none measured that meets every SLO"
    relative = f" (x{best.relative:.2f} of the baseline)" if best.relative is not None else ""
    who = f"trial {best.number}{' (baseline)' if best.name else ''}"
    return f"best so far: {who} with {metric} {format_number(best.score)}{relative}"
