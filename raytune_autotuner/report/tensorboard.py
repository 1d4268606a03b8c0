"""TensorBoard's event files of a study: scalars over a trial's seconds, its rounds and the study's trials.

A trial's events lie in the trial's own folder, which makes it a run of that name; the study's folder is a run too, over
trial numbers. Steps are seconds of the load under `over_time/`, rounds and trial numbers elsewhere. What the HParams
table shows is stated once for the study, so that a trial that failed before it had any metric stands in it beside the
others. The course of a load is read from what the trial left in its folder, so it is there once the trial has ended.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_autotuner.report.events import promised_metrics
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.verdict import Verdict, best_with
from raytune_autotuner.report.wording import contender_cells, verification_of
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.failure import Failure, Stage
from raytune_autotuner.study.masking import mask, mask_values
from raytune_autotuner.study.space import Choice, Parameter, format_value
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow

if TYPE_CHECKING:
    from raytune_autotuner.report.course import Course

_PLUGIN = "hparams"
_GROUPS = (
    ("latency", ("ttft_", "tpot_", "itl_", "e2el_")),
    ("throughput", ("output_throughput", "input_throughput", "total_throughput", "request_throughput")),
    ("goodput", ("goodput", "slo_attainment")),
)
_OUTCOMES = ("score", "relative", "penalty", "violation", "stage")


def tag(metric: str) -> str:
    """The metric's name under its group.

    >>> tag("ttft_ms_p90@c16")
    'latency/ttft_ms_p90@c16'
    """
    return f"{next((group for group, prefixes in _GROUPS if metric.startswith(prefixes)), 'requests')}/{metric}"


class TensorBoardWriter:
    """Writes a study's event files as its trials go on."""

    def __init__(self, folder: ResultsFolder, study: Study) -> None:
        self._folder = folder
        self._study = study
        self._best: TrialRow | None = None
        self._trials: dict[int, _EventFile] = {}
        self._root = _EventFile(folder.path)
        self._root.add(_experiment(study))
        self._root.flush()

    def round(self, row: TrialRow, number: int, metrics: Mapping[str, float]) -> None:
        """A running trial has finished its round `number`: what was measured in it."""
        writer = self._trial(row)
        for name, value in metrics.items():
            writer.add_scalar(tag(name), value, number)
        writer.flush()

    def ended(self, row: TrialRow) -> None:
        """A trial has ended, however it did."""
        from raytune_autotuner.report.course import course

        writer = self._trial(row)
        rounds = self._study.workload.rounds
        for name, value in _final_scalars(self._study, row):
            writer.add_scalar(name, value, rounds)
        if (found := course(self._folder.trial_dir(row.number, row.trial_id))) is not None:
            _add_course(writer, found, row.result.seconds.get("stop", 0.0))
        if row.result.failure is not None:
            writer.add(_text("failure", mask(_failure(row.result.failure))))
        writer.add(_session_end(row.state is State.MEASURED))
        del self._trials[row.number]
        writer.flush()
        self._over_trials(row)

    def verdict(self, answer: Verdict) -> None:
        """The study's answer, as text beside its curves."""
        text = "\n\n".join(filter(None, (answer.sentence, answer.warning, _markdown(answer))))
        self._root.add(_text("verdict", mask(text)))
        self._root.flush()

    def _trial(self, row: TrialRow) -> _EventFile:
        if row.number not in self._trials:
            writer = _EventFile(self._folder.trial_dir(row.number, row.trial_id))
            writer.add(_session_start(self._study, row))
            self._trials[row.number] = writer
        return self._trials[row.number]

    def _over_trials(self, row: TrialRow) -> None:
        """The study's own curves, whose steps are trial numbers; those of what was measured again are by restart."""
        if row.verifies is not None:
            for name, value in _scores(self._study, row):
                self._root.add_scalar(f"verification/{name}/trial_{row.verifies}", value, row.restart or 0)
            self._root.flush()
            return
        for name, value in _outcome(row):
            self._root.add_scalar(f"study/{name}", value, row.number)
        self._best = best_with(self._best, row, self._study.objective.direction)
        if self._best is not None and self._best.score is not None:
            self._root.add_scalar("study/best_score", self._best.score, row.number)
        self._root.flush()


class _EventFile:
    """The events of one run, in TensorBoard's own format.

    Kept until `flush` adds them to the file, which is open for no longer: TensorBoard's own writer holds a file and a
    thread for each run, and a study may have a thousand at once. A disk that is full costs curves, never a study.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._waiting = io.BytesIO()
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_scalar(self, name: str, value: float, step: int, at: float | None = None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.add(Summary(value=[Summary.Value(tag=name, simple_value=value)]), step, at)

    def add(self, summary: Any, step: int = 0, at: float | None = None) -> None:
        """Add an event that happened `at` epoch seconds; now, if that is left out."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._add(Event(wall_time=at or time.time(), step=step, summary=summary))

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, io.BytesIO()
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(waiting.getvalue())

    def _add(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._waiting).write(event.SerializeToString())


def _outcome(row: TrialRow) -> Iterator[tuple[str, float]]:
    """Score or penalty, never both; the stage as its place in a trial's life, from 0."""
    for name in ("score", "relative", "penalty", "violation"):
        value = getattr(row, name)
        if value is not None:
            yield name, float(value)
    failure = row.result.failure
    if failure is not None or row.state is State.MEASURED:
        yield "stage", float((failure.stage if failure else Stage.LOAD).order)


def _scores(study: Study, row: TrialRow) -> Iterator[tuple[str, float]]:
    """Each objective's metric and value."""
    for (metric, _), score in zip(study.objective.targets, scores_of(row), strict=False):
        yield metric, score


def _final_scalars(study: Study, row: TrialRow) -> Iterator[tuple[str, float]]:
    yield from ((f"outcome/{name}", value) for name, value in _outcome(row))
    if len(row.scores) > 1:
        yield from ((f"outcome/score:{metric}", value) for metric, value in _scores(study, row))
    yield from ((tag(name), value) for name, value in row.result.metrics.items())
    yield from ((f"seconds/{phase}", value) for phase, value in row.result.seconds.items())


def _add_course(writer: _EventFile, found: Course, stop_s: float) -> None:
    """What happened under load, second by second, each at the wall time at which it did; `stop_s` came after it."""
    begun_at = found.ended_at - stop_s - found.seconds
    for name, points in found.lines.items():
        for seconds, value in points:
            writer.add_scalar(f"over_time/{name}", value, int(seconds), begun_at + seconds)


def _failure(failure: Failure) -> str:
    return f"**{failure.kind}** at {failure.stage}: {failure.evidence}\n\n{failure.remedy}"


def _session_start(study: Study, row: TrialRow) -> Any:
    """The trial's parameters, as its line in the HParams table; the baseline's where the study fixes them."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    start = SessionStartInfo()
    values = mask_values({**study.fixed, **row.params})
    for parameter in study.space.parameters:
        if parameter.name in values:
            _set(start.hparams[parameter.name], _kind(parameter), values[parameter.name])
    what = verification_of(row, study.verify.restarts) or row.name
    start.hparams["trial"].string_value = f"{row.number} {what}".strip()
    return _summary("_hparams_/session_start_info", HParamsPluginData(session_start_info=start, version=0))


def _session_end(success: bool) -> Any:
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    status = Status.Value("STATUS_SUCCESS" if success else "STATUS_FAILURE")
    end = SessionEndInfo(status=status)
    return _summary("_hparams_/session_end_info", HParamsPluginData(session_end_info=end, version=0))


def _experiment(study: Study) -> Any:
    """The columns of the HParams table."""
    from tensorboard.plugins.hparams.api_pb2 import DataType, Experiment, HParamInfo, MetricInfo, MetricName
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    columns = {"trial": "STRING", **{parameter.name: _kind(parameter) for parameter in study.space.parameters}}
    hparams = [
        HParamInfo(name=name, type=DataType.Value(f"DATA_TYPE_{kind}"), differs=True) for name, kind in columns.items()
    ]
    tags = {f"outcome/{name}": name for name in _OUTCOMES} | {tag(name): name for name in promised_metrics(study)}
    metrics = [MetricInfo(name=MetricName(tag=name), display_name=shown) for name, shown in tags.items()]
    experiment = Experiment(name=study.study, hparam_infos=hparams, metric_infos=metrics)
    return _summary("_hparams_/experiment", HParamsPluginData(experiment=experiment, version=0))


def _kind(parameter: Parameter) -> str:
    """How the table takes a parameter's values: numbers to filter by range, else text."""
    distribution = parameter.distribution
    if not isinstance(distribution, Choice) or distribution.ordered:
        return "FLOAT64"
    return "BOOL" if all(isinstance(value, bool) for value in distribution.values) else "STRING"


def _set(cell: Any, kind: str, value: Any) -> None:
    if kind == "FLOAT64" and isinstance(value, (int, float)):
        cell.number_value = float(value)
    elif kind == "BOOL" and isinstance(value, bool):
        cell.bool_value = value
    else:
        cell.string_value = format_value(value)


def _markdown(answer: Verdict) -> str:
    """What was measured again, as a table."""
    if not answer.contenders:
        return ""
    head, *lines = contender_cells(answer.contenders, answer.targets)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def _text(name: str, text: str) -> Any:
    """A line of TensorBoard's Text tab, which reads Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[text.encode()])
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary(value=[Summary.Value(tag=name, metadata=metadata, tensor=tensor)])


def _summary(name: str, content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    plugin = SummaryMetadata.PluginData(plugin_name=_PLUGIN, content=content.SerializeToString())
    return Summary(value=[Summary.Value(tag=name, metadata=SummaryMetadata(plugin_data=plugin))])
