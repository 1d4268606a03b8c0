"""What a trial's loads have come to so far: its requests, and the metrics that are made of them.

In: each load as it ends. Out: metrics, and the trial's files of requests and of the engine's own samples. It sends
nothing, and knows no engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from raytune_autotuner.load.engine_metrics import Sample, write_series
from raytune_autotuner.load.engine_metrics import summarize as summarize_engine
from raytune_autotuner.load.parquet import write_records
from raytune_autotuner.load.workload import Level
from raytune_autotuner.report.course import REQUESTS, SAMPLES
from raytune_autotuner.score import slo
from raytune_autotuner.score.metrics import energy_metrics, summarize
from raytune_autotuner.score.objective import trial_metrics
from raytune_autotuner.score.records import RequestRecord, duration_s, measured
from raytune_autotuner.study.study import Study


class Measured:
    """The loads of one trial that holds `paid_for` GPUs, or machines without any."""

    def __init__(self, study: Study, paid_for: float) -> None:
        self._study = study
        self._paid_for = paid_for
        self.records: list[RequestRecord] = []
        """Of all requests, in the order of their ends; those of warm-ups and of loads that failed are among them."""
        self.values: dict[str, list[float]] = defaultdict(list)
        """Load level to the objective's value in each round there; a load alone may have none."""
        self.quality: dict[str, float] = {}
        self._joules: dict[str, list[float | None]] = defaultdict(list)
        self._samples: dict[tuple[str, int], tuple[Sample, ...]] = {}

    def add(self, level: Level, number: int, joules: float | None, samples: Sequence[Sample]) -> None:
        """Count round `number` at `level`, whose requests are among the records."""
        self._joules[level.label].append(joules)
        self._samples[level.label, number] = tuple(samples)
        sent = [record for record in measured(self.records)[level.label] if record.round == number]
        value = summarize(sent, duration_s(sent), self._study.objective.slo).get(self._study.objective.metric)
        if value is not None:
            self.values[level.label].append(value)

    def metrics(self) -> dict[str, float]:
        """What all loads so far come to, the samples of all rounds pooled."""
        of_levels = {label: self._of_level(label, found) for label, found in measured(self.records).items()}
        return trial_metrics(self._study, of_levels, self._paid_for) | self.quality

    def meets(self, level: Level) -> bool:
        """Whether a level that was measured keeps every SLO."""
        return slo.meets(self._of_level(level.label, measured(self.records)[level.label]), self._study.objective)

    def seconds(self, level: Level) -> float:
        """How long a level was under load so far, its warm-up included."""
        sent = [record for record in self.records if record.level == level.label]
        return sum(duration_s(record for record in sent if record.phase == phase) for phase in ("warmup", "measure"))

    def write(self, folder: Path, more: Sequence[RequestRecord] = ()) -> None:
        """Write the files of requests, `more` of which are still to be counted, and of samples; raises `OSError`."""
        write_records(folder / REQUESTS, [*self.records, *more])
        write_series(folder / SAMPLES, self._samples)

    def _of_level(self, label: str, records: Sequence[RequestRecord]) -> dict[str, float]:
        metrics = summarize(records, duration_s(records), self._study.objective.slo)
        spent = [joules for joules in self._joules[label] if joules is not None]
        all_of_it = sum(spent) if len(spent) == len(self._joules[label]) else None
        engines = summarize_engine(samples for (level, _), samples in self._samples.items() if level == label)
        return metrics | energy_metrics(all_of_it, metrics["tokens_out"]) | engines
