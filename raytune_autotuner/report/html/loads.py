"""Chosen trials under their load, side by side: the spread of latencies, the course of time, load against latency.

Read from the trials' own `requests.parquet` and `engine_metrics.parquet`; curves are thinned to what an eye can tell.
Every trace carries in `meta` which trial, load level and latency it shows, by which the page's choices turn it on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from raytune_autotuner.report.course import GAUGES, Points, first_round_of, output_rate, requests_of
from raytune_autotuner.report.html.charts import slo_limits
from raytune_autotuner.report.html.evidence import Evidence
from raytune_autotuner.report.html.figures import PLAIN, SERIES, Chart, Trace, axis, label, rounded, scatter, who
from raytune_autotuner.report.wording import format_number
from raytune_autotuner.score.pareto import cost
from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.trial import State, TrialRow

LATENCIES = ("ttft_ms", "tpot_ms", "e2el_ms")
MAX_TRIALS = 8
MAX_LEVELS = 8
POINTS = 60
"""Of a distribution, or of a line over time."""
FEW_POINTS = 15
"""Up to so many points of a line are marked."""


@dataclass(frozen=True)
class TrialLoads:
    """What one trial's files tell of its load."""

    row: TrialRow
    color: str
    shown: bool
    """Whether it is on when the page opens."""
    requests: Mapping[str, Sequence[RequestRecord]]
    """Load level to its requests of all rounds, warm-up left out."""
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    """Load level to the engine's own figures in its first round."""


def chosen_loads(evidence: Evidence) -> list[TrialLoads]:
    """The baseline, the winner, the other finalists and the best of the rest, with what they left behind."""
    found = []
    for index, row in enumerate(_chosen(evidence)):
        color = PLAIN if row is evidence.baseline else SERIES[index % len(SERIES)]
        folder = evidence.trial_dir(row)
        found.append(TrialLoads(row, color, index < 2, requests_of(folder), first_round_of(folder)))
    return found


def levels_of(loads: Iterable[TrialLoads]) -> list[str]:
    """The load levels of the trials, the lightest first; the heaviest of too many."""
    return sorted({level for one in loads for level in one.requests}, key=_load)[-MAX_LEVELS:]


def distributions(evidence: Evidence, loads: Sequence[TrialLoads]) -> Chart:
    """The share of requests that were answered within a time."""
    title = "Latency distribution"
    traces = [_distribution(one, level, name) for one in loads for level in levels_of(loads) for name in LATENCIES]
    drawn = tuple(trace for trace in traces if trace is not None)
    if not drawn:
        return Chart("distributions", title, "", empty="No trial has left its requests (requests.parquet).")
    layout = {
        "xaxis": {"title": {"text": "latency (ms)"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "share of requests"}, "tickformat": ".0%", "range": [0, 1.02]},
    }
    note = "All requests of a load level, its rounds pooled: a curve further to the left is faster." + _promises(
        evidence
    )
    return Chart("distributions", title, note, drawn, layout, height=400)


def over_time(loads: Sequence[TrialLoads]) -> Chart:
    """Tokens per second and the engine's own gauges during the first round of a load level."""
    title = "Over time"
    traces = [trace for one in loads for level in levels_of(loads) for trace in _lines(one, level)]
    if not traces:
        return Chart("over-time", title, "", empty="No trial has left its requests or its engine's metrics.")
    names = ["output tokens/s", "running requests", "waiting requests", "KV cache used"]
    axes: dict[str, Any] = {"xaxis": {"title": {"text": "seconds of the load"}, "anchor": "y4", "rangemode": "tozero"}}
    for index, name in enumerate(names):
        top = 1 - index * 0.26
        end = "" if index == 0 else str(index + 1)
        axes[f"yaxis{end}"] = {
            "domain": [round(top - 0.22, 2), round(top, 2)],
            "title": {"text": name},
            "rangemode": "tozero",
        }
    axes["yaxis4"]["tickformat"] = ".0%"
    note = "The first round of a load level. Output as the client received it; the rest as the engine tells it."
    return Chart("over-time", title, note, tuple(traces), axes, height=720)


def load_latency(evidence: Evidence, loads: Sequence[TrialLoads]) -> Chart:
    """Throughput and latency at each load level that was measured."""
    title = "Load and latency"
    traces = [trace for one in loads for name in LATENCIES if (trace := _curve(one, f"{name}_p90"))]
    if not traces:
        why = "A curve needs more than one load level (workload.concurrency or request_rate_rps)."
        return Chart("load-latency", title, "", empty=why)
    layout = {"xaxis": axis("output_throughput_tok_s", rangemode="tozero"), "yaxis": {"title": {"text": "p90 (ms)"}}}
    layout["yaxis"]["rangemode"] = "tozero"
    note = "Each point is a load level, named beside it: to the right is more output, below is a faster answer."
    return Chart("load-latency", title, note + _promises(evidence), tuple(traces), layout, height=420)


def load_curve(row: TrialRow, latency: str) -> tuple[list[str], list[float | None], list[float | None]] | None:
    """A trial's load levels, its output throughput and a latency at each; None for fewer than two levels."""
    metrics = row.result.metrics
    levels = sorted((name.partition("@")[2] for name in metrics if name.startswith(f"{latency}@")), key=_load)
    levels = [level for level in levels if f"output_throughput_tok_s@{level}" in metrics]
    x = [rounded(metrics[f"output_throughput_tok_s@{level}"]) for level in levels]
    y = [rounded(metrics[f"{latency}@{level}"]) for level in levels]
    return (levels, x, y) if len(levels) > 1 else None


def _chosen(evidence: Evidence) -> list[TrialRow]:
    finalists = [one.row for one in evidence.contenders]
    having = [row for row in evidence.searched if row.state is State.MEASURED and row.taken_from is None]
    if not having:  # a run that verifies an earlier one has restarts only
        having = [one.measured[0] for one in evidence.contenders if one.measured]
    way = evidence.study.objective.direction
    best = sorted(having, key=lambda row: (not row.feasible, cost(row.score or 0.0, way)))
    first = [row for row in (evidence.baseline, evidence.answer.winner) if row is not None]
    numbers = dict.fromkeys(row.number for row in (*first, *finalists, *best))
    known = {row.number: row for row in having}
    return [known[number] for number in numbers if number in known][:MAX_TRIALS]


def _distribution(one: TrialLoads, level: str, name: str) -> Trace | None:
    values = sorted(v for r in one.requests.get(level, ()) if r.ok and (v := getattr(r, name)) is not None)
    if not values:
        return None
    count = min(POINTS, len(values))
    at = [max(round(len(values) * (i + 1) / count) - 1, 0) for i in range(count)]
    x, y = [rounded(values[i]) for i in at], [round((i + 1) / len(values), 4) for i in at]
    look = {"line": {"color": one.color, "width": 2, "shape": "hv"}, "mode": "lines"}
    hover = {"hovertemplate": f"{label(who(one.row))}: %{{y:.0%}} within %{{x:.4g}} ms<extra></extra>"}
    return scatter(x, y, who(one.row), **look, **hover, meta=_meta(one, level, name))


def _lines(one: TrialLoads, level: str) -> list[Trace]:
    lines = [("y", _output(one.requests.get(level, ())))]
    for index, field in enumerate(GAUGES):
        points = [
            (s["seconds"], s[field]) for s in one.samples.get(level, ()) if s[field] is not None and not s["edge"]
        ]
        lines.append((f"y{index + 2}", _thinned(points)))
    look = {"line": {"color": one.color, "width": 2}, "legendgroup": str(one.row.number)}
    hover = {"hovertemplate": f"{label(who(one.row))}: %{{y:.4g}} at %{{x:.3g}} s<extra></extra>"}
    return [
        scatter(
            [rounded(x) for x, _ in points],
            [rounded(y) for _, y in points],
            who(one.row),
            mode="lines" if len(points) > FEW_POINTS else "lines+markers",
            **look,
            **hover,
            yaxis=yaxis,
            showlegend=yaxis == "y",
            meta=_meta(one, level),
        )
        for yaxis, points in lines
        if points
    ]


def _output(records: Sequence[RequestRecord]) -> Points:
    """Output tokens per second over the first round."""
    return output_rate(((r.token_times_s, r.tokens_out or 0) for r in records if r.round == 0 and r.ok), POINTS)


def _thinned(points: Points) -> Points:
    """At most `POINTS` points, each the mean of its neighbours."""
    if len(points) <= POINTS:
        return points
    edges = [round(len(points) * part / POINTS) for part in range(POINTS + 1)]
    parts = [points[low:high] for low, high in pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _curve(one: TrialLoads, latency: str) -> Trace | None:
    found = load_curve(one.row, latency)
    if found is None:
        return None
    levels, x, y = found
    look = {"mode": "lines+markers+text", "line": {"color": one.color}, "marker": {"size": 8}}
    words = {"text": [label(level) for level in levels], "textposition": "top center", "textfont": {"size": 11}}
    hover = {"hovertemplate": f"{label(who(one.row))} at %{{text}}: %{{y:.4g}} ms, %{{x:.4g}} tokens/s<extra></extra>"}
    meta = _meta(one, None, latency.removesuffix("_p90"))
    return {**scatter(x, y, who(one.row), **look, meta=meta), **words, **hover}


def _meta(one: TrialLoads, level: str | None, latency: str | None = None) -> dict[str, Any]:
    given = {"trial": one.row.number, "level": level, "latency": latency}
    return {key: value for key, value in given.items() if value is not None}


def _promises(evidence: Evidence) -> str:
    limits = [f"{name} {format_number(limit)} ms" for name, limit in slo_limits(evidence).items()]
    return f" Promised: {', '.join(limits)}." if limits else ""


def _load(level: str) -> tuple[float, str]:
    """`c16` and `r2.5` by their numbers."""
    found = re.search(r"\d+(?:\.\d+)?", level)
    return (float(found[0]) if found else 0.0, level)
