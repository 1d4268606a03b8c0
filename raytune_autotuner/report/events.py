"""What happened since one last looked: from two states of a study to a line an event.

The lines are those of the terminal without a table, and of the study's aggregate log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from raytune_autotuner.report.status import LiveTrial
from raytune_autotuner.report.verdict import best_with
from raytune_autotuner.report.wording import describe_params, format_number, verification_of
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.masking import mask
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one trial."""

    trial: int
    stage: Stage | None
    text: str

    def __str__(self) -> str:
        return f"trial {self.trial} {self.text}"


class Events:
    """Remembers what was told already; `since` tells the rest, each event once."""

    def __init__(self, study: Study, verbose: bool = False) -> None:
        self._study = study
        self._verbose = verbose
        self._started: set[int] = set()
        self._ended: set[int] = set()
        self._stages: dict[int, Stage] = {}
        self._best: TrialRow | None = None
        self._told = 0

    def since(self, rows: Sequence[TrialRow], live: Mapping[int, LiveTrial]) -> list[Event]:
        """The events between the last call and now, by trial; `rows` are all trials by number."""
        events = [event for row in rows[self._told :] for event in self._of(row, live)]
        while self._told < len(rows) and rows[self._told].number in self._ended:
            self._told += 1
        return events

    def _of(self, row: TrialRow, live: Mapping[int, LiveTrial]) -> Iterator[Event]:
        number = row.number
        if row.state is State.PENDING or number in self._ended:
            return
        if row.taken_from is not None:
            self._ended.add(number)
            yield Event(number, None, self._taken(row))
            return
        if number not in self._started:
            self._started.add(number)
            yield Event(number, None, self._start(row))
        if number in live and not row.state.finished:
            yield from self._progress(live[number])
        if row.state.finished:
            self._ended.add(number)
            yield from self._ready_before_end(row)
            yield self._end(row)

    def _start(self, row: TrialRow) -> str:
        again = "" if row.retry_of is None else f" again (was trial {row.retry_of})"
        if purpose := verification_of(row, self._study.verify.restarts):
            return f"started{again}: {purpose}"
        if row.name:
            return f"started{again}: {row.name}, the engine's defaults and the fixed arguments"
        return f"started{again} {describe_params(row.params)}"

    def _taken(self, row: TrialRow) -> str:
        setting = describe_params(row.params) if row.params else "the engine's defaults and the fixed arguments"
        if row.state is State.EARLIER:
            return f"is {row.taken_from}, to be measured again: {setting}"
        return f"is known from {row.taken_from}, {setting}: {self._end(row).text}"

    def _progress(self, trial: LiveTrial) -> Iterator[Event]:
        known = self._stages.get(trial.number)
        before = known or Stage.ARGUMENTS
        self._stages[trial.number] = max(before, trial.stage, key=lambda stage: stage.order)
        if trial.stage.order <= before.order:
            return
        if before.order < Stage.READY.order <= trial.stage.order:
            # Seen for the first time and ready already: since when is not known.
            yield Event(trial.number, Stage.READY, f"ready in {trial.elapsed_s:.1f} s" if known else "ready")
        elif self._verbose:
            yield Event(trial.number, trial.stage, f"reached {trial.stage} after {trial.elapsed_s:.1f} s")

    def _ready_before_end(self, row: TrialRow) -> Iterator[Event]:
        """A trial that was ready and over between two looks."""
        known = self._stages.get(row.number, Stage.ARGUMENTS)
        if "start" in row.result.seconds and known.order < Stage.READY.order and row.state is State.MEASURED:
            yield Event(row.number, Stage.READY, f"ready in {row.result.seconds['start']:.1f} s")

    def _end(self, row: TrialRow) -> Event:
        failure = row.result.failure
        if row.state is State.MEASURED:
            return Event(row.number, Stage.LOAD, self._measured(row))
        if row.bound is not None:
            return Event(row.number, Stage.LOAD, self._stopped(row))
        if failure is None:
            return Event(row.number, None, f"{row.state} after {row.result.seconds.get('total', 0.0):.1f} s")
        return Event(row.number, failure.stage, self._failed(row))

    def _measured(self, row: TrialRow) -> str:
        values = zip(self._study.objective.targets, scores_of(row), strict=False)
        parts = ["measured " + ", ".join(f"{metric} {format_number(score)}" for (metric, _), score in values)]
        if purpose := verification_of(row, self._study.verify.restarts):
            parts[0] += f" ({purpose})"
        elif row.name:
            parts[0] += f" ({row.name})"
        elif row.relative is not None:
            parts[0] += f" (x{row.relative:.2f} of baseline)"
        if not row.feasible:
            parts.append(f"misses an SLO (violation {format_number(row.violation or 0.0)})")
        before, self._best = self._best, best_with(self._best, row, self._study.objective.direction)
        if self._best is not before:
            parts.append("best so far" if len(self._study.objective.targets) == 1 else "best so far in the first")
        if self._verbose:
            parts += [f"{name} {format_number(value)}" for name, value in shown_metrics(self._study, [row]).items()]
        return ", ".join(parts)

    def _stopped(self, row: TrialRow) -> str:
        after, metric = row.result.seconds.get("total", 0.0), self._study.objective.metric
        return f"stopped after {after:.1f} s: {metric} could come to {format_number(row.bound or 0.0)} at best"

    def _failed(self, row: TrialRow) -> str:
        failure = row.result.failure
        assert failure is not None
        what = "failed" if row.state is State.FAILED else str(row.state)
        penalty = "" if row.penalty is None else f", penalty {format_number(row.penalty)}"
        elapsed = f"elapsed {row.result.seconds.get('total', 0.0):.1f} s / {self._study.trial.timeout_s:g} s"
        purpose = verification_of(row, self._study.verify.restarts)
        what = f"{what} ({purpose})" if purpose else what
        line = f"{what} at {failure.stage}: {failure.kind}{penalty}, {elapsed}: {mask(failure.evidence)}"
        return f"{line} | {failure.remedy}" if self._verbose and failure.remedy else line


_USUAL = (
    "output_throughput_tok_s",
    "ttft_ms_p90",
    "tpot_ms_p90",
    "e2el_ms_p90",
    "request_throughput_rps",
    "goodput_rps",
)


def promised_metrics(study: Study) -> list[str]:
    """The names worth a column: the objectives, those with an SLO, then the usual ones."""
    slos = [f"{metric}_{statistic}" for metric, limits in study.objective.slo.items() for statistic in limits]
    objectives = [metric for metric, _ in study.objective.targets]
    return list(dict.fromkeys((*objectives, *slos, *_USUAL)))


def shown_metrics(study: Study, rows: Sequence[TrialRow]) -> dict[str, float]:
    """The metrics worth a column beside the score that any of `rows` has, each with the value of the last one."""
    names = promised_metrics(study)[1:]
    found = {name: row.result.metrics[name] for row in rows for name in names if name in row.result.metrics}
    return {name: found[name] for name in names if name in found}
