"""How far a study run is: `status.json`, which its driver keeps fresh, and the time that is left.

Works from the files alone, for a study that runs, has ended or was killed.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.writing import write_json
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, State, TrialRow

Phase = Literal["running", "finished", "interrupted"]
Standing = Literal["not started", "running", "killed", "finished", "interrupted"]
STALE_S = 60.0
"""A driver on another machine that was silent for so long is taken for dead."""


@dataclass(frozen=True, slots=True)
class LiveTrial:
    """Where a running trial is."""

    number: int
    stage: Stage
    share: float = 0.0
    """How much of `stage` is done, in [0, 1]."""
    elapsed_s: float = 0.0
    timeout_s: float = 0.0
    metrics_now: Mapping[str, float] = field(default_factory=dict)
    """What its rounds so far measured."""


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """What a study's driver said last about itself. `begin` makes the first one."""

    phase: Phase
    started_at: float
    """Epoch seconds."""
    updated_at: float
    pid: int
    pid_started: int
    """The driver's start in clock ticks since boot: tells it from a later process of the same id."""
    host: str
    concurrency: int = 1
    live: tuple[LiveTrial, ...] = ()

    @classmethod
    def begin(cls, concurrency: int, elapsed_s: float = 0.0) -> StudyStatus:
        """The status of a study that this process starts to drive now; it has run for `elapsed_s` before."""
        now, pid = time.time(), os.getpid()
        return cls("running", now - elapsed_s, now, pid, _started(pid) or 0, socket.gethostname(), concurrency)

    @property
    def elapsed_s(self) -> float:
        """Seconds from the study's start until it was last heard of."""
        return self.updated_at - self.started_at

    @property
    def driver_alive(self) -> bool:
        """Whether the study still runs; False also for a driver that was killed."""
        if self.phase != "running":
            return False
        if self.host != socket.gethostname():
            return time.time() - self.updated_at < STALE_S
        return _started(self.pid) == self.pid_started


def write_status(folder: ResultsFolder, status: StudyStatus) -> None:
    """Replace `status.json`; call it about once a second while a study runs, and at its end."""
    write_json(folder.status_file, asdict(status))


def read_status(folder: ResultsFolder) -> StudyStatus | None:
    """What `write_status` wrote last; None where the study never began."""
    try:
        values: dict[str, Any] = json.loads(folder.status_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    live = tuple(LiveTrial(**{**trial, "stage": Stage(trial["stage"])}) for trial in values.pop("live"))
    return StudyStatus(**values, live=live)


def standing_of(status: StudyStatus | None) -> Standing:
    """Where a study run is, from what its driver said last."""
    if status is None:
        return "not started"
    return "killed" if status.phase == "running" and not status.driver_alive else status.phase


def time_left_s(
    study: Study, rows: Sequence[TrialRow], live: Mapping[int, LiveTrial], concurrency: int, elapsed_s: float
) -> float | None:
    """Seconds until the last restart's end, from the trials so far; None before the first has ended.

    A trial to come takes what the later half of the search's trials took in the mean, failed ones included: a search
    learns to fail less. A restart takes what the best settings and the defaults took. To each comes the time for
    which slots stood idle between trials.
    """
    ended = [row for row in rows if row.state.teaches and "total" in row.result.seconds]
    if not ended:
        return None
    usual = _seconds([row for row in ended if row.verifies is None] or ended)
    usual = usual[len(usual) // 2 :]
    idle_s = _idle_s(rows, live, concurrency, elapsed_s)
    restart_s = statistics.fmean(_seconds(finalists_so_far(study, ended) or ended)) + idle_s
    restarts = verifications_left(study, rows)
    running = [_rest_s(usual, trial.elapsed_s) for trial in live.values()]
    if any(row.verifies is not None for row in rows):
        left = _phase_s(running, restarts, restart_s, concurrency)
    else:
        trials = max(study.search.trials - sum(row.counts for row in ended) - len(live), 0)
        left = _phase_s(running, trials, statistics.fmean(usual) + idle_s, concurrency)
        left += _phase_s([], restarts, restart_s, concurrency)
    budget = study.search.time_budget
    return left if budget is None else min(left, max(budget - elapsed_s, 0.0) + statistics.fmean(usual))


def _phase_s(running: Sequence[float], waiting: float, each_s: float, concurrency: int) -> float:
    """Until all of a phase have ended, several at a time: the last ones do not end together."""
    loose_s = each_s * (concurrency - 1) / (2 * concurrency) if waiting else 0.0
    return max((sum(running) + waiting * each_s) / concurrency + loose_s, max(running, default=0.0))


def _seconds(rows: Sequence[TrialRow]) -> list[float]:
    return [row.result.seconds["total"] for row in rows]


def _idle_s(rows: Sequence[TrialRow], live: Mapping[int, LiveTrial], concurrency: int, elapsed_s: float) -> float:
    """For how long a slot stood idle before a trial, in the mean."""
    busy = [row.result.seconds["total"] for row in rows if "total" in row.result.seconds]
    busy += [trial.elapsed_s for trial in live.values()]
    return max(elapsed_s * concurrency - sum(busy), 0.0) / len(busy)


def _rest_s(usual: Sequence[float], elapsed_s: float) -> float:
    """What is left of a trial that runs: in the mean what those had left that took longer than it has until now."""
    longer = [seconds for seconds in usual if seconds > elapsed_s]
    return statistics.fmean(longer) - elapsed_s if longer else 0.0


def finalists_so_far(study: Study, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The baseline and the settings that would be measured again if the search ended now; empty where none beats it."""
    baseline = next((row for row in rows if row.name == BASELINE and row.score is not None), None)
    if baseline is None:
        return []
    sign = -1.0 if study.objective.direction == "maximize" else 1.0

    def key(row: TrialRow) -> float:
        return sign * (row.score or 0.0)

    several = len(study.objective.targets) > 1
    found = [row for row in rows if row.feasible and row.verifies is None and row.name != BASELINE]
    best = sorted((row for row in found if several or key(row) < key(baseline)), key=key)[: study.verify.top]
    return [baseline, *best] if best else []


def verifications_left(study: Study, rows: Sequence[TrialRow]) -> float:
    """How many engine starts of the finalists and the baseline are still to begin; while the search runs, expected."""
    again = [row for row in rows if row.verifies is not None]
    # Once a second round has begun, all settings have had their first start.
    known = any((row.restart or 0) > 0 for row in again)
    settings = len({row.verifies for row in again}) if known else _settings_to_verify(study, rows)
    out = {row.verifies for row in again if row.state is State.FAILED}
    begun = sum(row.state.teaches or not row.state.finished for row in again if row.verifies not in out)
    return max((settings - len(out)) * study.verify.restarts - begun, 0)


def _settings_to_verify(study: Study, rows: Sequence[TrialRow]) -> float:
    """As many as the trials to come will leave, if they beat the baseline as often as those before: Laplace's rule."""
    if taken := sum(row.state is State.EARLIER for row in rows):
        return taken
    counted = [row for row in rows if row.counts]
    left = 0 if any(row.verifies is not None for row in rows) else max(study.search.trials - len(counted), 0)
    better = max(len(finalists_so_far(study, counted)) - 1, 0)
    expected = min(better + left * (better + 1) / (len(counted) + 1), study.verify.top)
    return expected + min(expected, 1.0)


def progress(study: Study, rows: Sequence[TrialRow], detail: str = "") -> str:
    """`5 of 20 trials`, then `6 of 15 restarts to verify`; `detail` stands behind the trials.

    A run that verifies an earlier one has no trials of a search.
    """
    verification = verification_progress(study, rows)
    if any(row.state is State.EARLIER for row in rows):
        return verification or f"0 of {study.verify.starts} restarts to verify"
    done = sum(row.counts for row in rows)
    return ", ".join(filter(None, (f"{done} of {study.search.trials} trials{detail}", verification)))


def verification_progress(study: Study, rows: Sequence[TrialRow]) -> str:
    """`6 of 15 restarts to verify`; empty before the first one."""
    if all(row.verifies is None for row in rows):
        return ""
    done = sum(row.state.teaches for row in rows if row.verifies is not None)
    running = sum(not row.state.finished for row in rows if row.verifies is not None)
    return f"{done} of {done + running + round(verifications_left(study, rows))} restarts to verify"


def format_duration(seconds: float) -> str:
    """Short text for people.

    >>> format_duration(7.4), format_duration(125), format_duration(7300)
    ('7 s', '2:05', '2:01:40')
    """
    whole = int(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{whole} s"


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
