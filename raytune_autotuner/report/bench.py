"""What `bench` tells of the one setting that it measures: a line an event while it runs, then every figure.

In: where the trial is, and its row once it has ended. It measures and judges nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from raytune_autotuner.report.events import Events
from raytune_autotuner.report.logs import LogWriter
from raytune_autotuner.report.status import LiveTrial
from raytune_autotuner.report.wording import describe_params, format_number
from raytune_autotuner.score.metrics import METRICS
from raytune_autotuner.score.objective import Promise, promises
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.masking import mask
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialRow

_LEVEL = "@"
_QUARTERS = 4


class Progress:
    """Says what happens to the trial, on standard error and in the study's log; from any thread."""

    def __init__(self, study: Study, row: TrialRow, log: Path, stream: TextIO | None = None) -> None:
        self._metric = study.objective.metric
        self._row = row
        self._log = LogWriter(log)
        self._stream = stream or sys.stderr
        self._events = Events(study, verbose=True)
        self._begun = time.monotonic()
        self._quarters = 0
        self._told: dict[str, int] = {}
        self._one_at_a_time = threading.Lock()

    def say(self, text: str, stage: Stage | None = None) -> None:
        """One line."""
        print(mask(text), file=self._stream, flush=True)
        self._log.write(stage, text, self._row.number)

    def moved(self, stage: Stage, share: float) -> None:
        """The trial is at `share` of `stage`: tells a stage when it is reached, and quarters of the load."""
        with self._one_at_a_time:
            live = LiveTrial(self._row.number, stage, share, time.monotonic() - self._begun)
            for event in self._events.since([self._row], {self._row.number: live}):
                self.say(event.text, event.stage)
            quarters = int(_QUARTERS * share) if stage is Stage.LOAD else 0
            if self._quarters < quarters < _QUARTERS:
                self._quarters = quarters
                self.say(f"{quarters / _QUARTERS:.0%} of the load", stage)

    def loaded(self, values: Mapping[str, Sequence[float]]) -> None:
        """A load is over; `values` are the objective's so far, by load level."""
        for label, found in values.items():
            for value in found[self._told.get(label, 0) :]:
                self.say(f"{label}: {self._metric} {format_number(value)}", Stage.LOAD)
            self._told[label] = len(found)

    def close(self) -> None:
        """Close the log."""
        self._log.close()


def render(study: Study, row: TrialRow, launch: str | None, folder: Path | None) -> str:
    """For people: score, SLOs and every figure with its unit; of a failure the evidence and the remedy."""
    lines = [*_head(study, row), *(_failed(row) if row.result.failure else _measured(study, row))]
    if launch is not None:
        lines.append(_line("launch", launch))
    if folder is not None:
        lines.append(_line("files", str(folder)))
        whose = " --engine" if launch is not None else ""
        lines.append(_line("its log", f"python -m raytune_autotuner logs {folder} {row.number}{whose}"))
    return "\n".join(lines)


def as_values(study: Study, row: TrialRow, launch: str | None, folder: Path | None) -> dict[str, Any]:
    """For programs: the row of the results table, the SLOs, the launch line, the folder."""
    kept = [
        {"metric": one.name, "limit": one.limit, "at_least": one.at_least, "value": one.value, "met": one.kept}
        for one in promises(study, row.result.metrics)
        if row.result.failure is None
    ]
    found = {"study": study.study, "slo": kept, "launch": launch, "folder": None if folder is None else str(folder)}
    return {**found, **row.to_dict()}


def _head(study: Study, row: TrialRow) -> Iterator[str]:
    yield f"{study.study}: {study.model} on {study.engine.kind}"
    as_it_is = "the server as it runs" if study.engine.kind == "running" else "the baseline: defaults, fixed arguments"
    yield _line("setting", describe_params(row.params) if row.params else as_it_is)
    seconds = row.result.seconds
    if "total" in seconds:
        parts = ", ".join(f"{phase} {spent:.1f}" for phase, spent in seconds.items() if phase != "total")
        yield _line("seconds", f"{seconds['total']:.1f}" + (f": {parts}" if parts else ""))


def _failed(row: TrialRow) -> Iterator[str]:
    failure = row.result.failure
    assert failure is not None
    before = "" if row.result.seconds else "refused before any start, "
    yield _line("failed", f"{before}at {failure.stage}: {failure.kind}; whose fault: {failure.blame}")
    yield _line("evidence", mask(failure.evidence))
    yield _line("remedy", failure.remedy)
    if row.penalty is not None:
        yield _line("penalty", f"{format_number(row.penalty)} in a search")


def _measured(study: Study, row: TrialRow) -> Iterator[str]:
    for (metric, direction), score in zip(study.objective.targets, scores_of(row), strict=False):
        better = "higher" if direction == "maximize" else "lower"
        unit = METRICS[metric.partition(_LEVEL)[0]].unit
        yield _line("score", f"{metric} {format_number(score)} {unit}, {better} is better")
    for promise in promises(study, row.result.metrics):
        yield _line("SLO", _told(promise))
    yield ""
    yield from _table(row.result.metrics)
    yield ""


def _told(promise: Promise) -> str:
    value = "not measured" if promise.value is None else format_number(promise.value)
    sign = ">=" if promise.at_least else "<="
    return f"{'met   ' if promise.kept else 'MISSED'}  {promise.name} {sign} {promise.limit:g}: {value}"


def _table(metrics: Mapping[str, float]) -> Iterator[str]:
    """A line a metric, a column for the trial and for each load level."""
    levels = list(dict.fromkeys(name.partition(_LEVEL)[2] for name in metrics if _LEVEL in name))
    names = [name for name in METRICS if any(f"{name}{at}" in metrics for at in ("", *(f"@{one}" for one in levels)))]
    rows = [["metric", "all" if levels else "value", *levels, "unit"]]
    for name in names:
        found = (metrics.get(f"{name}{at}") for at in ("", *(f"@{level}" for level in levels)))
        rows.append([name, *("-" if one is None else format_number(one) for one in found), METRICS[name].unit])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, unit in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells, unit]).rstrip()


def _line(name: str, text: str) -> str:
    return f"{name:<9} {text}"
