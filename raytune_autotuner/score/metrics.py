"""Metrics of a load: from request records to named figures.

In: the records of one load level, pooled over its rounds. Out: flat names with their units, such as `ttft_ms_p90`.
What cannot be computed is absent, never 0 or NaN. Definitions are those of the field (vLLM's `bench serve`), so that
figures can be compared; `METRICS` states each in a line, also of those that others measure: the engine's own, energy,
quality. Pure: no clock, file or process.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from raytune_autotuner.score import records as recorded
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
SAMPLES: Mapping[str, str] = MappingProxyType({"tpot_ms": "tpot_samples", "itl_ms": "itl_samples"})
"""Latencies that not every completed request has, each with the metric that counts its samples."""

CONFIDENCE = 0.95
"""With which the samples of a percentile reach beyond it."""

Across: TypeAlias = Literal["mean", "sum", "max", "tokens", "none"]
"""How a trial's value comes from those of its load levels: `tokens` is the mean by output tokens, so that all that was
spent is divided by all tokens; `none` has no value at a level."""


class EmptySample(AutotunerError):
    """There is nothing to compute a metric from."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's name, unit, good direction (None: it can be no objective) and definition in one line."""

    name: str
    unit: str
    better: Literal["higher", "lower"] | None
    definition: str
    across: Across = "mean"


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
    Metric("max_load_under_slo", "concurrency or requests/s", "higher", "highest load that keeps the SLOs", "none"),
    Metric("cost_per_million_tokens", "price per 1M output tokens", "lower", "price of the machine's time", "tokens"),
    Metric("energy_j_per_token", "J/token", "lower", "energy of the trial's GPUs per output token", "tokens"),
    Metric("perplexity", "1", "lower", "perplexity of a fixed text", "none"),
    Metric("perplexity_rise", "share", None, "rise of the perplexity over the baseline's", "none"),
    Metric("answer_change", "share", None, "share of words at which greedy answers part from the baseline's", "none"),
    Metric("preemptions", "preemptions", "lower", "requests put back by the engine for want of KV cache", "sum"),
    Metric("kv_cache_usage_mean", "share", "lower", "share of the KV cache in use, over the load's time"),
    Metric("kv_cache_usage_max", "share", "lower", "largest share of the KV cache in use", "max"),
    Metric("queue_length_mean", "requests", "lower", "requests that wait in the engine, over the load's time"),
    Metric("queue_length_max", "requests", "lower", "most requests that waited in the engine at once", "max"),
    Metric("prefix_cache_hit_rate", "share", "higher", "share of prompt tokens found in the prefix cache"),
    Metric("drift", "share", None, "output throughput of the last round over the first's, less 1"),
    Metric("requests", "requests", None, "requests sent, failed ones included", "sum"),
    Metric("requests_failed", "requests", None, "requests without a full answer", "sum"),
    Metric("tpot_samples", "requests", None, "completed requests of two output tokens or more, which have TPOT", "sum"),
    Metric("itl_samples", "gaps", None, "gaps between two chunks of an answer, in completed requests", "sum"),
    Metric("tokens_in", "tokens", None, "prompt tokens of completed requests, by the server's count", "sum"),
    Metric("tokens_out", "tokens", None, "output tokens of completed requests, by the server's count", "sum"),
    Metric("duration_s", "s", None, "seconds under load, from a round's start to its last request's end", "sum"),
]
METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _TABLE})
"""Every metric that a trial may have, by name."""

AGAINST_BASELINE = ("perplexity_rise", "answer_change")
"""The baseline has none, so they are limits (`quality`) and no objectives."""
ENGINE_METRICS = (
    "preemptions",
    "kv_cache_usage_mean",
    "kv_cache_usage_max",
    "queue_length_mean",
    "queue_length_max",
    "prefix_cache_hit_rate",
)
"""What the engine tells of itself, where it does."""
_NOT_OF_REQUESTS = {*AGAINST_BASELINE, *ENGINE_METRICS, "perplexity", "energy_j_per_token"}


def is_metric(name: str, levels: Collection[str] = ()) -> bool:
    """Whether `name` is in `METRICS`, alone or at one of the load `levels`: `ttft_ms_p90@c16`."""
    base, at, level = name.partition("@")
    return base in METRICS and (not at or (level in levels and METRICS[base].across != "none"))


def told_by_requests(name: str) -> bool:
    """Whether the metric can be computed from the records of requests, at whatever load level."""
    return name.partition("@")[0] not in _NOT_OF_REQUESTS


def samples_needed(name: str) -> int:
    """The fewest requests of which one at least is above the true percentile with 95 % confidence.

    All n lie below the percentile q with a chance of q^n, so it is the smallest n with 1 - q^n >= 0.95. `name` is a
    metric's, at whatever load level, or a statistic's; 0 for what is no percentile.

    >>> [samples_needed(name) for name in ("p50", "p90", "p95", "ttft_ms_p99@c16", "ttft_ms_mean")]
    [5, 29, 59, 299, 0]
    """
    percentile = _PERCENTILES.get(name.partition("@")[0].rpartition("_")[2])
    return 0 if percentile is None else math.ceil(math.log(1 - CONFIDENCE) / math.log(percentile / 100))


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
        **_drift(records),
        "failed_share": 1 - len(completed) / len(records),
        "requests": float(len(records)),
        "requests_failed": float(len(records) - len(completed)),
        "duration_s": duration_s,
    }


def combine(levels: Mapping[str, Mapping[str, float]], wanted: Collection[str] = ()) -> dict[str, float]:
    """A trial's metrics from those of its load levels, plus each level's own as `name@level`.

    Every level counts: a metric that one of them lacks is absent, and so is all but sums where one of the levels
    `wanted` was not run at all. `Metric.across` says how values become one. Raises `EmptySample` without a level.
    """
    if not levels:
        raise EmptySample("No load level was measured.")
    first, *others = levels.values()
    whole = all(label in levels for label in wanted)
    names = [name for name in first if all(name in other for other in others)]
    names = [name for name in names if whole or METRICS[name].across == "sum"]
    combined = {name: _over_levels(name, list(levels.values())) for name in names}
    for label, level in levels.items():
        combined |= {f"{name}@{label}": value for name, value in level.items()}
    return combined


def cost_metrics(level: Mapping[str, float], price_per_hour: float | None, gpus: float) -> dict[str, float]:
    """`cost_per_million_tokens` of one load level; empty without a price, or without a token to pay for.

    The price is that of one GPU times the `gpus` that the trial holds, or of the machine where it holds less than one.
    """
    tokens = level.get("tokens_out", 0.0)
    if price_per_hour is None or tokens <= 0:
        return {}
    paid = price_per_hour * max(gpus, 1.0) * level["duration_s"] / 3600
    return {"cost_per_million_tokens": paid / tokens * 1e6}


def energy_metrics(joules: float | None, tokens_out: float) -> dict[str, float]:
    """`energy_j_per_token` of one load level; empty without a measurement, which an energy of 0 is not."""
    if joules is None or not 0 < joules < math.inf or tokens_out <= 0:
        return {}
    return {"energy_j_per_token": joules / tokens_out}


def _completed(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    completed = [record for record in records if record.ok]
    if not records:
        raise EmptySample("No request was sent.")
    if not completed:
        error, count = Counter(record.error for record in records).most_common(1)[0]
        raise EmptySample(f"None of {len(records)} requests was completed; {count} of them: {error}.")
    return completed


def _throughput(completed: Sequence[RequestRecord], duration_s: float) -> dict[str, float]:
    tokens_out = sum(record.tokens_out or 0 for record in completed)
    told = [record.tokens_in for record in completed if record.tokens_in is not None]
    metrics = {
        "output_throughput_tok_s": tokens_out / duration_s,
        "request_throughput_rps": len(completed) / duration_s,
        "tokens_out": float(tokens_out),
    }
    if len(told) < len(completed):  # a server that does not count prompts
        return metrics
    return metrics | {
        "input_throughput_tok_s": sum(told) / duration_s,
        "total_throughput_tok_s": (sum(told) + tokens_out) / duration_s,
        "tokens_in": float(sum(told)),
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
    samples = {name: _sample(completed, name) for name in LATENCIES}
    metrics = {count: float(len(samples[name])) for name, count in SAMPLES.items()}
    for name, sample in samples.items():
        if sample:
            metrics |= {f"{name}_{statistic}": value for statistic, value in _statistics(sample).items()}
    return metrics


def _sample(completed: Sequence[RequestRecord], name: str) -> list[float]:
    if name == "itl_ms":
        return [gap for record in completed for gap in record.itl_ms]
    return [value for record in completed if (value := getattr(record, name)) is not None]


def _statistics(sample: Sequence[float]) -> dict[str, float]:
    """The mean and the percentiles, by linear interpolation between the nearest ranks."""
    import numpy as np  # takes a while, and whoever only names metrics does without

    values = np.asarray(sample, dtype=np.float64)
    percentiles = np.percentile(values, list(_PERCENTILES.values()))
    return {"mean": float(values.mean()), **dict(zip(_PERCENTILES, percentiles.tolist(), strict=True))}


def _drift(records: Sequence[RequestRecord]) -> dict[str, float]:
    """By which share the last round's output throughput differs from the first's; empty with one round."""
    rounds: dict[int, list[RequestRecord]] = {}
    for record in records:
        rounds.setdefault(record.round, []).append(record)
    first, last = (_output_tok_s(rounds[number]) for number in (min(rounds), max(rounds)))
    return {"drift": last / first - 1} if len(rounds) > 1 and first > 0 else {}


def _output_tok_s(records: Sequence[RequestRecord]) -> float:
    duration_s = recorded.duration_s(records)
    return sum(record.tokens_out or 0 for record in records if record.ok) / duration_s if duration_s > 0 else 0.0


def _over_levels(name: str, levels: Sequence[Mapping[str, float]]) -> float:
    values, across = [level[name] for level in levels], METRICS[name].across
    if across == "sum":
        return sum(values)
    if across == "max":
        return max(values)
    # Any one metric by tokens has tokens, or it would not be there.
    weights = [level["tokens_out"] if across == "tokens" else 1.0 for level in levels]
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
