"""A study run at a moment, from its files alone: for `status`, as text and as JSON, and for the end of a run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from raytune_autotuner.report.progress import progress, time_left_text, times_left_s
from raytune_autotuner.report.recheck import said
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.status import LiveTrial, Standing, StudyStatus, read_status, standing_of
from raytune_autotuner.report.verdict import best_so_far
from raytune_autotuner.report.wording import describe_params, format_duration, format_number, verification_of
from raytune_autotuner.study.failure import Failure
from raytune_autotuner.study.masking import mask_values
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow


@dataclass(frozen=True)
class Summary:
    """How far a study is, what runs, the best so far, what failed."""

    folder: ResultsFolder
    study: Study
    rows: tuple[TrialRow, ...]
    """Those that run included."""
    status: StudyStatus | None

    @property
    def standing(self) -> Standing:
        """Where the run is."""
        return standing_of(self.status)

    @cached_property
    def live(self) -> Mapping[int, LiveTrial]:
        """What runs now, by number."""
        return {trial.number: trial for trial in self.status.live} if self.status and self.standing == "running" else {}

    @cached_property
    def states(self) -> Mapping[State, int]:
        """How many trials of the search are in each state, in the order of a trial's life."""
        found = Counter(row.state for row in self.rows if row.verifies is None)
        return {state: found[state] for state in State if found[state]}

    @property
    def counted(self) -> int:
        """Trials that used up the budget."""
        return sum(row.counts for row in self.rows)

    @property
    def times_left_s(self) -> tuple[float, ...]:
        """Of a study that runs, the likely one first; empty where it is not known yet."""
        if self.status is None or self.standing != "running":
            return ()
        return times_left_s(self.study, self.rows, self.live, self.status.concurrency, self.status.elapsed_s)

    @property
    def best(self) -> TrialRow | None:
        """The best trial so far that meets every SLO."""
        return best_so_far(self.rows, self.study.objective.direction)

    @property
    def answer(self) -> str | None:
        """The verdict as it was written at the end; of a study that was killed, as its rows say; else None."""
        if self.standing in ("running", "not started"):
            return None
        answer = said(self.folder, self.study, self.rows)
        return " ".join(filter(None, (answer.sentence, answer.warning)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, secrets masked."""
        states = {str(state): count for state, count in self.states.items()}
        found = {
            "study": self.study.study,
            "results": self.folder.place,
            "standing": self.standing,
            "elapsed_s": None if self.status is None else self.status.elapsed_s,
            "time_left_s": next(iter(self.times_left_s), None),
            "trials": {"wanted": self.study.search.trials, "counted": self.counted} | states,
            "progress": progress(self.study, self.rows),
            "running": [asdict(trial) for trial in self.live.values()],
            "best": None if self.best is None else _brief(self.study, self.best),
            "failures": [_failed(failures) for failures in by_kind(self.rows)],
            "verdict": self.answer,
        }
        return dict(mask_values(found))


def summarize(folder: ResultsFolder) -> Summary:
    """The study as its files tell it now; raises `ConfigError` where its study file is broken."""
    status = read_status(folder)
    live = {trial.number for trial in status.live} if status is not None else set()
    rows = (
        replace(row, state=State.RUNNING) if row.number in live and not row.state.finished else row
        for row in folder.read_rows()
    )
    return Summary(folder, folder.load_study(), tuple(rows), status)


def render_status(summary: Summary) -> str:
    """A few lines for people."""
    study, rows = summary.study, summary.rows
    lines = [f"study {study.study} in {summary.folder.place}", _phase_line(summary)]
    lines += [_live_line(trial, rows, study.verify.restarts) for trial in summary.live.values()]
    lines.append(summary.answer or _best_line(study, summary.best))
    return "\n".join([*lines, *failure_lines(rows)])


def by_kind(rows: Sequence[TrialRow]) -> list[list[tuple[TrialRow, Failure]]]:
    """The failed trials by kind of failure, the most frequent kind first."""
    failed = [(row, row.result.failure) for row in rows if row.result.failure is not None]
    kinds = Counter(failure.kind for _, failure in failed)
    return [[(row, failure) for row, failure in failed if failure.kind is kind] for kind, _ in kinds.most_common()]


def failure_lines(rows: Sequence[TrialRow]) -> list[str]:
    """A line for each kind of failure: how often, in which trials, and its remedy."""
    lines = []
    for of_kind in by_kind(rows):
        count, (_, last) = len(of_kind), of_kind[-1]
        numbers = ", ".join(str(row.number) for row, _ in of_kind[:8]) + (", ..." if count > 8 else "")
        trials = f"trial {numbers}" if count == 1 else f"trials {numbers}"
        lines.append(f"{last.kind} x{count} ({trials}): {last.remedy}")
    return lines


def _failed(of_kind: Sequence[tuple[TrialRow, Failure]]) -> dict[str, Any]:
    last = of_kind[-1][1]
    trials = [{"number": row.number, "stage": str(failure.stage)} for row, failure in of_kind]
    return {"kind": str(last.kind), "trials": trials, "remedy": last.remedy}


def _brief(study: Study, row: TrialRow) -> dict[str, Any]:
    values = {"number": row.number, "name": row.name, "params": dict(row.params)}
    return {**values, "metric": study.objective.metric, "score": row.score, "relative": row.relative}


def _phase_line(summary: Summary) -> str:
    study, status = summary.study, summary.status
    counts = ", ".join(f"{count} {state}" for state, count in summary.states.items()) or "no trial yet"
    done = progress(study, summary.rows, f" ({counts})")
    if status is None:
        return f"{summary.standing}: {done}"
    if summary.standing != "running":
        return f"{summary.standing} after {format_duration(status.elapsed_s)}: {done}"
    left = summary.times_left_s
    estimate = f", {time_left_text(left)}" if left else ""
    return f"running for {format_duration(time.time() - status.started_at)}: {done}{estimate}"


def _live_line(trial: LiveTrial, rows: Sequence[TrialRow], restarts: int) -> str:
    row = next(row for row in rows if row.number == trial.number)
    share = f" {trial.share:.0%}" if trial.share else ""
    clock = f"{trial.elapsed_s:.1f} s / {trial.timeout_s:g} s"
    what = describe_params(row.params) if row.params else "baseline"
    if purpose := verification_of(row, restarts):
        what = f"{purpose}, {what}"
    return f"trial {trial.number} at {trial.stage}{share}, {clock} {what}"


def _best_line(study: Study, best: TrialRow | None) -> str:
    if best is None or best.score is None:
        return "best so far: none measured that meets every SLO"
    relative = f" (x{best.relative:.2f} of the baseline)" if best.relative is not None else ""
    who = f"trial {best.number}{' (baseline)' if best.name else ''}"
    return f"best so far: {who} with {study.objective.metric} {format_number(best.score)}{relative}"
