"""The course of a trial's loads, from what the trial left in its folder: `requests.parquet`, `engine_metrics.parquet`.

What has not been left, or is broken, is absent and no error: a trial that was killed leaves neither, unless by its
deadline or as hung. The files are those of `load/`, read by their columns; it knows nothing of scores, charts or event
files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raytune_autotuner.score.records import RequestRecord, measured

REQUESTS, SAMPLES = "requests.parquet", "engine_metrics.parquet"
OUTPUT = "output_throughput_tok_s"
GAUGES: Mapping[str, str] = {
    "running": "running_requests",
    "waiting": "waiting_requests",
    "kv_cache_usage": "kv_cache_usage",
}
"""The engine's own figures at a moment: column of the file to the name shown."""
Points: TypeAlias = list[tuple[float, float]]
"""(seconds, value) in the order of time."""
_Load: TypeAlias = tuple[str, int]
"""Load level and round."""


@dataclass(frozen=True)
class Course:
    """A trial's loads, one after the other, on one clock that starts with the first of them."""

    seconds: float
    """How long they took together."""
    ended_at: float
    """Epoch seconds at which the trial, its engine stopped, wrote its files."""
    lines: Mapping[str, Points]
    """Name to its values: tokens per second over each part of the time, gauges at moments."""


def course(trial_dir: Path) -> Course | None:
    """What the trial in `trial_dir` went through under load; None where it has left no requests."""
    path = trial_dir / REQUESTS
    table = _table(path, ["level", "round", "phase", "end_s", "token_times_s", "tokens_out", "error"])
    table = table.filter(pc.field("phase") == "measure") if table is not None else None
    if table is None or table.num_rows == 0:
        return None
    ends = _ends(table)
    starts = dict(zip(ends, accumulate(ends.values(), initial=0.0), strict=False))
    seconds = sum(ends.values())
    answers = _answers(table.filter(pc.field("error").is_null()), starts)
    lines = {OUTPUT: output_rate(answers, max(round(seconds), 1), seconds), **_gauges(trial_dir / SAMPLES, starts)}
    return Course(seconds, path.stat().st_mtime, {name: points for name, points in lines.items() if points})


def output_rate(answers: Iterable[tuple[Sequence[float], float]], parts: int, seconds: float = 0.0) -> Points:
    """Output tokens per second in each of `parts` equal parts of the time, at its middle.

    `answers` are the arrivals of an answer's chunks, in seconds, and its tokens; `seconds` is the time of the load,
    or else it ends with the last arrival.
    """
    given = [(np.asarray(times), tokens / len(times)) for times, tokens in answers if len(times)]
    end = max([seconds, *(float(times[-1]) for times, _ in given)])
    if not given or end <= 0:
        return []
    moments = np.concatenate([times for times, _ in given])
    weights = np.repeat([share for _, share in given], [len(times) for times, _ in given])
    counts, _ = np.histogram(moments, bins=parts, range=(0.0, end), weights=weights)
    width = end / parts
    return [((index + 0.5) * width, float(count) / width) for index, count in enumerate(counts)]


def requests_of(trial_dir: Path) -> dict[str, list[RequestRecord]]:
    """Load level to its requests of all rounds, warm-up left out."""
    table = _table(trial_dir / REQUESTS, list(RequestRecord.__slots__))
    rows = [] if table is None else table.to_pylist()
    return measured(RequestRecord(**{**row, "token_times_s": tuple(row["token_times_s"])}) for row in rows)


def first_round_of(trial_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Load level to the engine's own figures in its first round: `seconds`, `edge` and the `GAUGES`."""
    levels: dict[str, list[dict[str, Any]]] = {}
    for row in _samples(trial_dir / SAMPLES):
        if row["round"] == 0:
            levels.setdefault(row["level"], []).append(row)
    return levels


def _ends(table: pa.Table) -> dict[_Load, float]:
    """Each load in the order of sending, and its seconds."""
    ends: dict[_Load, float] = {}
    for row in table.select(["level", "round", "end_s"]).to_pylist():
        load = (row["level"], row["round"])
        ends[load] = max(row["end_s"], ends.get(load, 0.0))
    return ends


def _answers(table: pa.Table, starts: Mapping[_Load, float]) -> Iterable[tuple[Sequence[float], float]]:
    """The complete answers, on the clock of all loads. Arrays, not lists: a long load has millions of tokens."""
    times = table["token_times_s"].combine_chunks().to_numpy(zero_copy_only=False)
    rows = table.select(["level", "round", "tokens_out"]).to_pylist()
    for arrivals, row in zip(times, rows, strict=True):
        yield arrivals + starts[row["level"], row["round"]], row["tokens_out"] or 0


def _gauges(path: Path, starts: Mapping[_Load, float]) -> dict[str, Points]:
    lines: dict[str, Points] = {}
    for row in _samples(path):
        start = starts.get((row["level"], row["round"]))
        for column, name in GAUGES.items():
            if start is not None and row[column] is not None and not row["edge"]:
                lines.setdefault(name, []).append((start + row["seconds"], row[column]))
    return lines


def _samples(path: Path) -> list[dict[str, Any]]:
    table = _table(path, ["level", "round", "seconds", "edge", *GAUGES])
    return [] if table is None else table.to_pylist()


def _table(path: Path, columns: list[str]) -> pa.Table | None:
    """These columns of a Parquet file; None where there is no such file, or a broken one."""
    try:
        table = pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowInvalid):
        return None
    return table if table.num_columns == len(columns) else None
