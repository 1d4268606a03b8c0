"""What the engine itself counts during a load: its `/metrics` page, read about once a second by a thread.

    with EngineWatch(base_url) as watch:
        ...  # the load
    watch.series, watch.summary()

The names are vLLM's. An engine without such a page, or without one of the names, gives absent values, never 0. It
knows nothing of requests, trials or scores.
"""

from __future__ import annotations

import http.client
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TypeAlias
from urllib.parse import urlsplit

import prometheus_client.samples
import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client.parser import text_string_to_metric_families

from raytune_autotuner.load.parquet import replace_table

INTERVAL_S = 1.0
_TIMEOUT_S = 2.0
_MAX_PAGE_BYTES = 2**24

_GAUGES = {"running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting"}
_COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
}
_SHARES = {"kv_cache_usage": "vllm:kv_cache_usage_perc"}
_NAMES = {name: field for field, name in (_GAUGES | _COUNTERS | _SHARES).items()}
_PREFIXES = tuple(f"{name}{end}" for name in _NAMES for end in "{ ")


@dataclass(frozen=True, slots=True)
class Sample:
    """The engine at one moment; None where its page does not say. Counters count since the engine's start."""

    seconds: float
    """From the load's start."""
    edge: bool
    """Taken right before or after the load, when nothing of it was in flight: for counters only."""
    running: float | None = None
    waiting: float | None = None
    kv_cache_usage: float | None = None
    """Share of the KV cache in use, in [0, 1]; the mean over several engines behind one address."""
    generation_tokens: float | None = None
    preemptions: float | None = None
    prefix_queries: float | None = None
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: float | None = None
    """Prompt tokens found there."""


Loads: TypeAlias = Mapping[tuple[str, int], Sequence[Sample]]
"""(Load level's label, round) to the samples of that load."""


class EngineWatch:
    """Samples of an engine while a load runs; a context manager around the load."""

    def __init__(self, base_url: str, *, interval_s: float = INTERVAL_S) -> None:
        self._page = _Page(base_url)
        self._interval_s = interval_s
        self._samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine-metrics", daemon=True)
        self._begun = 0.0

    def __enter__(self) -> EngineWatch:
        self._begun = time.monotonic()
        self._take(edge=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:  # else the engine may well be dead or hang
            self._take(edge=True)
        self._page.close()

    @property
    def series(self) -> tuple[Sample, ...]:
        """All samples in the order of time; none for an engine that has no such page."""
        return tuple(self._samples)

    def summary(self) -> dict[str, float]:
        """See `summarize`."""
        return summarize([self.series])

    def _watch(self) -> None:
        wait_s = self._interval_s / 2  # each sample stands for the interval around it
        while not self._over.wait(wait_s) and self._samples:
            begun = time.monotonic()
            self._take(edge=False)
            wait_s = max(self._interval_s - (time.monotonic() - begun), 0.0)

    def _take(self, edge: bool) -> None:
        try:
            values = read_page(self._page.text())
        except ValueError:  # the parser's, for a page that is broken: as good as none
            return
        if values:
            self._samples.append(Sample(time.monotonic() - self._begun, edge, **values))


class _Page:
    """The page's text over one kept connection, past any proxy that the environment names."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
        self._path = f"{parts.path.rstrip('/')}/metrics"

    def text(self) -> str:
        """Empty where nothing usable came back within two seconds: one moment less is known, that is all."""
        try:
            self._connection.request("GET", self._path)
            response = self._connection.getresponse()
            body = response.read(_MAX_PAGE_BYTES)
        except (OSError, http.client.HTTPException):
            self._connection.close()  # the next request opens it again
            return ""
        return body.decode(errors="replace") if response.status == 200 else ""

    def close(self) -> None:
        self._connection.close()


def read_page(text: str) -> dict[str, float]:
    """The fields of a `Sample` that a page in Prometheus' text form tells, summed over the engines behind it.

    Only lines with known names are parsed: a page has a thousand of them, most of them of histograms. Raises
    `ValueError` where one of them cannot be read.
    """
    found: dict[str, list[float]] = {}
    lines = "\n".join(line for line in text.splitlines() if line.startswith(_PREFIXES))
    for family in text_string_to_metric_families(lines):
        for sample in filter(_is_finite, family.samples):
            found.setdefault(_NAMES[sample.name], []).append(sample.value)
    return {name: sum(values) / (len(values) if name in _SHARES else 1) for name, values in found.items()}


def _is_finite(sample: prometheus_client.samples.Sample) -> bool:
    return math.isfinite(sample.value)


def summarize(loads: Iterable[Sequence[Sample]]) -> dict[str, float]:
    """Metrics of one or several loads, their samples pooled: what the counters grew by, and means of the rest.

    Absent is what the engine does not tell, and, of a load shorter than a sample's interval, the means. What a counter
    grew by is unknown where one of the loads has no samples.
    """
    loads = [*loads]
    return {
        **_grown(loads),
        **_statistics("kv_cache_usage", [s.kv_cache_usage for load in loads for s in load if not s.edge]),
        **_statistics("queue_length", [s.waiting for load in loads for s in load if not s.edge]),
    }


def _grown(loads: Sequence[Sequence[Sample]]) -> dict[str, float]:
    metrics = {}
    if (preemptions := _growth(loads, "preemptions")) is not None:
        metrics["preemptions"] = preemptions
    queries, hits = _growth(loads, "prefix_queries"), _growth(loads, "prefix_hits")
    if queries and hits is not None:
        metrics["prefix_cache_hit_rate"] = hits / queries
    return metrics


def _growth(loads: Sequence[Sequence[Sample]], counter: str) -> float | None:
    """By how much a counter grew over all loads; None where one of them does not tell."""
    total = 0.0
    for load in loads:
        if not load:
            return None
        first, last = getattr(load[0], counter), getattr(load[-1], counter)
        if first is None or last is None or not (load[0].edge and load[-1].edge and len(load) > 1):
            return None
        total += last - first
    return total if loads else None


def _statistics(name: str, values: Sequence[float | None]) -> dict[str, float]:
    known = [value for value in values if value is not None]
    return {f"{name}_mean": sum(known) / len(known), f"{name}_max": max(known)} if known else {}


_SAMPLE_FIELDS = tuple(field.name for field in fields(Sample))
SCHEMA = pa.schema(
    [
        pa.field("level", pa.string(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("edge", pa.bool_(), nullable=False),
        *(pa.field(name, pa.float64()) for name in _SAMPLE_FIELDS[2:]),
    ]
)


def write_series(path: Path, loads: Loads) -> None:
    """Write the samples of a trial's loads, a row a sample; see `replace_table`."""
    rows = [
        {"level": level, "round": number, **asdict(sample)}
        for (level, number), samples in loads.items()
        for sample in samples
    ]
    replace_table(path, pa.Table.from_pylist(rows, schema=SCHEMA))


def read_series(path: Path) -> dict[tuple[str, int], tuple[Sample, ...]]:
    """What `write_series` wrote."""
    loads: dict[tuple[str, int], tuple[Sample, ...]] = {}
    for row in pq.read_table(path, schema=SCHEMA).to_pylist():
        key = (row.pop("level"), row.pop("round"))
        loads[key] = (*loads.get(key, ()), Sample(**row))
    return loads
