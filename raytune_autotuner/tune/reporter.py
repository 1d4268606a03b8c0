"""The book of a study's trials: what was suggested, how it ended, what it is worth.

The one place where an ended trial gets its result, its score or its penalty; searcher, table, TensorBoard and the
results folder take them from here. Knows neither Ray's nor Optuna's objects.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytune_autotuner.engine.logfile import read_log
from raytune_autotuner.engine.protocol import Cause
from raytune_autotuner.engine.reading import LogRules, diagnose
from raytune_autotuner.engine.server import LOG_NAME, read_end
from raytune_autotuner.report.results import QUALITY, ResultsFolder, read_result
from raytune_autotuner.score.objective import judged
from raytune_autotuner.score.quality import Quality
from raytune_autotuner.score.slo import NO_SLO_VALUE
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.space import Params, setting_key
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from raytune_autotuner.tune.book import Book
from raytune_autotuner.tune.standing import Standing

SCORE = "score"
"""The metric's name in Ray Tune's results."""
RESULT = "trial_result"
"""Key of the whole `TrialResult` in a trial's last report to Ray Tune: as JSON, for Ray Tune takes mappings apart."""
ROUND = "round_metrics"
"""Key of the metrics so far in its other reports: as JSON, for Ray Tune keeps 2 KB of statistics of every number."""
_OTHER_CODE = (
    "raytune_autotuner itself has changed on this machine since the study began, and its trials cannot be started any "
    "more. Go on with --resume, on the code as it is now."
)
MAX_NODES_LOST = 3
"""A setting that was lost with so many nodes is not run again: it may be what ends them."""


class TrialReporter:
    """All trials of a study, by Ray's trial id."""

    def __init__(
        self,
        study: Study,
        folder: ResultsFolder,
        rules: LogRules,
        *,
        standing_of: Callable[[str], Standing],
        node_answers: Callable[[str], bool] = lambda node_id: True,
        bring_files: Callable[[Path, str], None] = lambda trial_dir, node_id: None,
        on_change: Callable[[TrialRow], None] = lambda row: None,
        code: Callable[[], str] = lambda: "",
    ) -> None:
        """`code` tells the code that trials' processes load from what it is after a change."""
        self._study = study
        self._folder = folder
        self._rules = rules
        self._standing_of = standing_of
        self._node_answers = node_answers
        self._bring_files = bring_files
        self._on_change = on_change
        self._code = code
        self._code_at_first = code()
        self._book = Book(study.objective.direction)
        self._stopped: dict[str, float] = {}
        self._any_began = False
        self.interrupted = False
        self.ending: str | None = None
        """Why the search ends before its trials are used up."""

    @property
    def rows(self) -> list[TrialRow]:
        """All trials by number."""
        return self._book.rows

    def row(self, trial_id: str) -> TrialRow:
        """The trial as it stands now."""
        return self._book[trial_id]

    @property
    def live(self) -> Collection[TrialRow]:
        """The trials that have not ended."""
        return self._book.live.values()

    @property
    def counted(self) -> int:
        """Trials that use up the budget: measured or graded, not answered by an earlier run."""
        return self._book.counted

    @property
    def searched(self) -> list[TrialRow]:
        """The trials of the search: all but those that measure a setting again for the verdict."""
        return self._book.searched

    @property
    def best(self) -> TrialRow | None:
        """The feasible trial of the search with the best score, of the first objective."""
        return self._book.best

    @property
    def complete(self) -> bool:
        """Whether no further trial is to be started."""
        over = self.ending is not None or self.interrupted or self.verifies_only
        return over or self.counted >= self._study.search.trials

    @property
    def verifies_only(self) -> bool:
        """Whether nothing is searched: an earlier run's settings are measured again."""
        return self._book.verifies_only

    @property
    def wanted(self) -> bool:
        """Whether one more trial is to be started now."""
        return not self.complete and self.counted + len(self.live) < self._study.search.trials

    @property
    def baseline(self) -> TrialRow | None:
        """The measured baseline, once there is one; where nothing is searched, its first restart."""
        return self._book.baseline

    @property
    def at_fault(self) -> bool:
        """Whether a trial failed in a way that no setting can mend."""
        return self._book.at_fault

    @property
    def reference(self) -> Quality | None:
        """What the baseline's engine answered; None without `quality`, or before a baseline that did has ended."""
        asked = self._book.reference
        if self._study.quality is None or asked is None:
            return None
        return Quality(asked.result.metrics["perplexity"], asked.result.answers)

    def end_search(self, reason: str) -> None:
        """No new trials from now on; `reason` is for people."""
        self.ending = self.ending or reason

    def known(self, filled: Params) -> TrialRow | None:
        """The trial that measures, has measured or graded the same setting, defaults filled in."""
        return self._book.known(setting_key(filled))

    def suggested(self, trial_id: str, params: Params, filled: Params, **more: Any) -> TrialRow:
        """A new trial, waiting for its resources; `more` are further fields of its row.

        Numbers are not Optuna's: it also counts suggestions that were never started.
        """
        row = TrialRow(self._book.next_number, trial_id, params=dict(params), **{"name": "", **more})
        self._folder.add_suggestion(row)
        self._book.add(row, setting_key(filled))
        self._on_change(row)
        return row

    def take(
        self, params: Params, filled: Params, source: str, name: str = "", result: TrialResult | None = None
    ) -> TrialRow:
        """Put down a setting of an earlier run with what it came to there, or (None) to be measured by restarts."""
        number = self._book.next_number
        row = TrialRow(number, f"earlier_{number}", name, dict(params), State.EARLIER, taken_from=source)
        if result is not None:
            row = self._judged(row, result, Standing())
        self._book.add(row, setting_key(filled))
        self._folder.add_row(row)
        self._on_change(row)
        return row

    def restore(self, rows: Sequence[TrialRow], defaults: Params) -> list[TrialRow]:
        """Take over the trials of an interrupted run; returns those whose settings are to be run again."""
        for row in rows:
            if not row.state.finished:
                left = row.result.metrics or row.result.failure
                row = self._judged(row, row.result, Standing()) if left else replace(row, state=State.INTERRUPTED)
            self._book.add(row, setting_key({**defaults, **row.params}))
        self._folder.write_rows(self.rows)
        again = {row.retry_of for row in self.rows}
        return [row for row in self.searched if row.state is State.INTERRUPTED and row.number not in again]

    def started(self, trial_id: str) -> None:
        """The trial's actor is being started."""
        self._put(replace(self.row(trial_id), state=State.RUNNING))

    def stop(self, trial_id: str, bound: float) -> None:
        """The trial is being ended between two loads; `bound` is the best that it could have come to."""
        self._stopped[trial_id] = bound

    def ended(self, trial_id: str, report: Mapping[str, Any] | None) -> TrialRow:
        """The trial's final row; `report` is its last report to Ray Tune, None where its actor died.

        Idempotent: the first call decides.
        """
        row = self.row(trial_id)
        if row.state.finished:
            return row
        standing = self._standing_of(trial_id)
        self._any_began = self._any_began or standing.started_at > 0
        asked = standing.node_ids if report is None else standing.others
        gone = [node_id for node_id in asked if not self._node_answers(node_id)]
        if report is None and gone:
            standing = replace(standing, ended_by=Kind.NODE_LOST)
        else:
            for node_id in (one for one in standing.node_ids if one not in gone):
                self._bring_files(self._folder.trial_dir(row.number, trial_id), node_id)
        result = self._result(row, report, standing)
        row = self._judged(row, result, standing)
        self._put(row)
        if row.at_fault and result.failure:
            mend = f"{result.failure.remedy} Once that is done, --resume goes on."
            self.end_search(f"{str(result.failure).removesuffix('.')}. {mend}")
        self._folder.add_row(row)
        return row

    def to_retry(self, row: TrialRow) -> bool:
        """Whether a lost trial's setting is to be queued again."""
        lost = self._book.lost(row.trial_id)
        wanted = row.state is State.LOST and row.verifies is None and not self.interrupted
        return wanted and may_run_again(lost, self._study.trial.retries)

    def _put(self, row: TrialRow) -> None:
        self._book.put(row)
        self._on_change(row)

    def _result(self, row: TrialRow, report: Mapping[str, Any] | None, standing: Standing) -> TrialResult:
        if report is not None and RESULT in report:
            return TrialResult.from_dict(json.loads(report[RESULT]))
        seconds = {"total": standing.elapsed_s}
        bare = TrialResult(seconds=seconds, node=standing.node, hardware=standing.hardware)
        if row.trial_id in self._stopped:
            return replace(bare, metrics=round_metrics(report or {}))
        # The actor died. A result that it had written before counts: its last second does not take it away.
        trial_dir = self._folder.trial_dir(row.number, row.trial_id)
        if (written := read_result(trial_dir)) is not None:
            return written
        asked = read_result(trial_dir, QUALITY) or bare
        return replace(bare, metrics=asked.metrics, failure=self._cause(row, standing), answers=asked.answers)

    def _cause(self, row: TrialRow, standing: Standing) -> Failure:
        """Why a trial failed whose actor is dead."""
        if standing.ended_by is Kind.NODE_LOST:
            return _lost_with_node(standing)
        if standing.ended_by is not None:
            return self._timed_out(standing)
        by_themselves = [one for one in self._book.lost(row.trial_id) if not _is_node_lost(one)]
        repeated = len(by_themselves) >= self._study.trial.retries
        if not standing.started_at:
            self._look_for_other_code()
            return _never_began(Blame.STUDY if repeated and not self._any_began else Blame.ENVIRONMENT)
        trial_dir = self._folder.trial_dir(row.number, row.trial_id)
        # What an engine prints while it is being ended is not why it ended.
        ended_by_us = read_end(trial_dir) is not Cause.EXITED
        found = diagnose(read_log(trial_dir / LOG_NAME), rules=self._rules, ended_by_us=ended_by_us).failure
        if found is not None and found.blame is Blame.PARAMETERS and found.kind is not Kind.UNKNOWN:
            return found
        return Failure(
            standing.stage,
            Kind.WORKER_LOST,
            # A loss that repeats for the same start of a setting is the setting's own.
            Blame.PARAMETERS if repeated else Blame.ENVIRONMENT,
            "the trial's actor died",
            "Look into trial.log; if other trials die too, the machine is short of memory or the node was lost.",
            standing.share,
        )

    def _look_for_other_code(self) -> None:
        """No further trial can begin where the package is not any more what the driver has loaded: the study stops."""
        if self._code() != self._code_at_first:
            self.interrupted = True
            self.end_search(_OTHER_CODE)

    def _timed_out(self, standing: Standing) -> Failure:
        limits = self._study.trial
        if standing.ended_by is Kind.HUNG:
            silent = (standing.ended_at or time.time()) - standing.moved_at
            evidence = f"no log line and no finished request for {silent:.0f} seconds"
            remedy = "The engine stopped answering at this setting; if it is only slow there, raise trial.hung_after_s."
        else:
            evidence = f"timed out after {limits.timeout_s:g} seconds"
            remedy = "Raise trial.timeout_s, or lower workload.requests or rounds."
        return Failure(
            standing.stage, standing.ended_by or Kind.DEADLINE, Blame.PARAMETERS, evidence, remedy, standing.share
        )

    def _judged(self, row: TrialRow, result: TrialResult, standing: Standing) -> TrialRow:
        """The row with state, score or penalty, and its place against the baseline."""
        if row.trial_id in self._stopped:
            bound = self._stopped[row.trial_id]
            return replace(row, state=State.STOPPED, result=result, bound=bound, violation=NO_SLO_VALUE)
        if self.interrupted and result.failure is not None and standing.ended_by is None:
            return replace(row, state=State.INTERRUPTED, result=replace(result, failure=None))
        if result.failure is not None and result.failure.blame is Blame.ENVIRONMENT:
            return replace(row, state=State.LOST, result=result)
        row = judged(self._study, row, result)
        baseline = row if row.name else self.baseline
        if row.score is None or baseline is None or not baseline.score:
            return row
        return replace(row, relative=row.score / baseline.score)


def may_run_again(lost: Sequence[TrialRow], retries: int) -> bool:
    """Whether a setting is run once more after the trials `lost`, which failed by no fault of its own."""
    with_nodes = sum(_is_node_lost(row) for row in lost)
    return with_nodes < MAX_NODES_LOST and len(lost) - with_nodes <= retries


def _is_node_lost(row: TrialRow) -> bool:
    return row.result.failure is not None and row.result.failure.kind is Kind.NODE_LOST


def _lost_with_node(standing: Standing) -> Failure:
    evidence = "the trial's node died, or cannot be reached any more"
    remedy = "See what became of the machine; the setting is run again on another one."
    return Failure(standing.stage, Kind.NODE_LOST, Blame.ENVIRONMENT, evidence, remedy, standing.share)


def round_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """What the trial's loads so far came to, from its report to Ray Tune after one of them."""
    found: dict[str, float] = json.loads(report.get(ROUND, "{}"))
    return found


def _never_began(blame: Blame) -> Failure:
    evidence = "the trial's actor could not be started"
    remedy = "Ray's own words are in the trial's error.txt: mostly a node without this package or its dependencies."
    return Failure(Stage.ARGUMENTS, Kind.WORKER_LOST, blame, evidence, remedy)
