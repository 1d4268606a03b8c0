"""Metrics of a load: from request records to named figures.

In: the records of one load level, pooled over its rounds. Out: flat names with their units, such as `ttft_ms_p90`.
What cannot be computed is absent, never 0 or NaN. Definitions are those of the field (vLLM's `bench serve`), so that
figures can be compared; `METRICS` states each in a line. Pure: no clock, file or process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.errors import AutotunerError

SLO = Mapping[str, Mapping[str, float]]
"""Latency metric to statistic to upper limit in ms: `{"ttft_ms": {"p99": 500}}`."""

_PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
STATISTICS = ("mean", *_PERCENTILES)
LATENCIES: Mapping[str, str] = MappingProxyType(
    {
        "ttft_ms": "time from a request's scheduled sending to its first token",
        "tpot_ms": "time per output token after the first: (E2EL - TTFT) / (output tokens - 1), one value a request",
        "itl_ms": "inter-token latency: the gap between two chunks of an answer, all gaps of all requests pooled",
        "e2el_ms": "end-to-end latency: from a request's scheduled sending to its last token",
    }
)
"""Latency metrics, each with all `STATISTICS`; also the keys that an SLO may name."""
REQUEST_LATENCIES = ("ttft_ms", "tpot_ms", "e2el_ms")
"""Those with one value a request, which goodput can judge."""


class EmptySample(AutotunerError):
    """There is nothing to compute a metric from."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's name, unit, good direction (None: a count, no objective) and definition in one line."""

    name: str
    unit: str
    better: Literal["higher", "lower"] | None
    definition: str

    @property
    def is_total(self) -> bool:
        """Summed over load levels, where others are averaged."""
        return self.better is None


def _latency_table() -> list[Metric]:
    return [
        Metric(f"{name}_{statistic}", "ms", "lower", f"{statistic} of {definition}")
        for name, definition in LATENCIES.items()
        for statistic in STATISTICS
    ]


_TABLE = [
    Metric("output_throughput_tok_s", "tokens/s", "higher", "output tokens of all completed requests per second"),
    Metric("input_throughput_tok_s", "tokens/s", "higher", "prompt tokens of all completed requests per second"),
    Metric("total_throughput_tok_s", "tokens/s", "higher", "prompt and output tokens of completed requests per second"),
    Metric("request_throughput_rps", "requests/s", "higher", "completed requests per second"),
    Metric("goodput_rps", "requests/s", "higher", "requests per second that met every SLO; a failed request met none"),
    Metric("slo_attainment", "share", "higher", "share of all requests that met every SLO; a failed request met none"),
    Metric("failed_share", "share", "lower", "share of requests without a full answer"),
    *_latency_table(),
    Metric("requests", "requests", None, "requests sent, failed ones included"),
    Metric("requests_failed", "requests", None, "requests without a full answer"),
    Metric("tokens_in", "tokens", None, "prompt tokens of completed requests, by the server's count"),
    Metric("tokens_out", "tokens", None, "output tokens of completed requests, by the server's count"),
    Metric("duration_s", "s", None, "seconds under load, from a round's start to its last request's end"),
]
METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _TABLE})
"""Every metric that a trial may have, by name."""


def is_metric(name: str, levels: Collection[str] = ()) -> bool:
    """Whether `name` is in `METRICS`, alone or at one of the load `levels`: `ttft_ms_p90@c16`."""
    base, at, level = name.partition("@")
    return base in METRICS and (not at or level in levels)


def summarize(records: Sequence[RequestRecord], duration_s: float, slo: SLO | None = None) -> dict[str, float]:
    """The metrics of one load level over `duration_s` seconds, the measured durations of its rounds summed.

    Goodput and attainment are absent without an SLO on a metric that a single request has. Raises `EmptySample` where
    no request was completed.
    """
    completed = _completed(records)
    if duration_s <= 0:
        raise EmptySample(f"`duration_s > 0` must hold, but got ({duration_s=}).")
    return {
        **_throughput(completed, duration_s),
        **_goodput(records, duration_s, slo or {}),
        **_latencies(completed),
        "failed_share": 1 - len(completed) / len(records),
        "requests": float(len(records)),
        "requests_failed": float(len(records) - len(completed)),
        "duration_s": duration_s,
    }


def combine(levels: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """A trial's metrics from those of its load levels, plus each level's own as `name@level`.

    Every level counts: a metric that one of them lacks is absent. Totals are summed, all else is averaged. Raises
    `EmptySample` without a level.
    """
    if not levels:
        raise EmptySample("No load level was measured.")
    first, *others = levels.values()
    common = [name for name in first if all(name in other for other in others)]
    combined = {name: _over_levels(name, [level[name] for level in levels.values()]) for name in common}
    for label, level in levels.items():
        combined |= {f"{name}@{label}": value for name, value in level.items()}
    return combined


def _completed(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    completed = [record for record in records if record.ok]
    if not records:
        raise EmptySample("No request was sent.")
    if not completed:
        error, count = Counter(record.error for record in records).most_common(1)[0]
        raise EmptySample(f"None of {len(records)} requests was completed; {count} of them: {error}.")
    return completed


def _throughput(completed: Sequence[RequestRecord], duration_s: float) -> dict[str, float]:
    tokens_in = sum(record.tokens_in or 0 for record in completed)
    tokens_out = sum(record.tokens_out or 0 for record in completed)
    return {
        "output_throughput_tok_s": tokens_out / duration_s,
        "input_throughput_tok_s": tokens_in / duration_s,
        "total_throughput_tok_s": (tokens_in + tokens_out) / duration_s,
        "request_throughput_rps": len(completed) / duration_s,
        "tokens_in": float(tokens_in),
        "tokens_out": float(tokens_out),
    }


def _goodput(records: Sequence[RequestRecord], duration_s: float, slo: SLO) -> dict[str, float]:
    limits = [(name, min(slo[name].values())) for name in REQUEST_LATENCIES if slo.get(name)]
    if not limits:
        return {}
    good = sum(_meets(record, limits) for record in records)
    return {"goodput_rps": good / duration_s, "slo_attainment": good / len(records)}


def _meets(record: RequestRecord, limits: Iterable[tuple[str, float]]) -> bool:
    return record.ok and all(_within(record, name, limit) for name, limit in limits)


def _within(record: RequestRecord, name: str, limit_ms: float) -> bool:
    """Whether one latency keeps its limit; a one-token answer has no TPOT to miss, all else unmeasured is missed."""
    value: float | None = getattr(record, name)
    if value is None:
        return name == "tpot_ms" and record.tokens_out == 1
    return value <= limit_ms


def _latencies(completed: Sequence[RequestRecord]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in LATENCIES:
        sample = _sample(completed, name)
        if sample:
            metrics |= {f"{name}_{statistic}": value for statistic, value in _statistics(sample).items()}
    return metrics


def _sample(completed: Sequence[RequestRecord], name: str) -> list[float]:
    if name == "itl_ms":
        return [gap for record in completed for gap in record.itl_ms]
    return [value for record in completed if (value := getattr(record, name)) is not None]


def _statistics(sample: Sequence[float]) -> dict[str, float]:
    """The mean and the percentiles, by linear interpolation between the nearest ranks."""
    values = np.asarray(sample, dtype=np.float64)
    percentiles = np.percentile(values, list(_PERCENTILES.values()))
    return {"mean": float(values.mean()), **dict(zip(_PERCENTILES, percentiles.tolist(), strict=True))}


def _over_levels(name: str, values: Sequence[float]) -> float:
    return sum(values) if METRICS[name].is_total else sum(values) / len(values)
