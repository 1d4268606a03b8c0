"""The charts of a study's trials: how the search went, what was found, and what it was traded for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from raytune_autotuner.report.html.evidence import Evidence, unit_of
from raytune_autotuner.report.html.figures import (
    BAD,
    FAINT,
    GOOD,
    LINE,
    PLAIN,
    SERIES,
    WARN,
    Chart,
    Trace,
    axis,
    hover,
    label,
    level_line,
    rounded,
    scatter,
    valued,
)
from raytune_autotuner.report.wording import format_number
from raytune_autotuner.score.objective import judged_levels
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.space import Choice, Range, format_value
from raytune_autotuner.study.trial import State, TrialRow

_OUTCOMES = ("failed", "misses an SLO", "meets every SLO")
_MAX_DIMENSIONS = 14


def convergence(evidence: Evidence) -> Chart:
    """Scores in the order of the trials, and the best so far."""
    metric, direction = evidence.study.objective.targets[0]
    why = "No trial has ended yet." if evidence.recheck is None else "Nothing was searched: an earlier run is verified."
    empty = Chart("convergence", "Convergence", "", empty=why)
    ended = [row for row in evidence.searched if row.state.teaches]
    if not ended:
        return empty
    best = _best_line(ended, direction)
    traces = [*_points(ended, metric), *_stopped(ended, metric), *best, *_failed(ended)]
    shapes, words = _baseline_line(evidence)
    layout = {
        "xaxis": {"title": {"text": "trial"}, "dtick": None if len(ended) > 25 else 1},
        "yaxis": axis(metric),
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        "shapes": shapes,
        "annotations": words,
    }
    way = "Higher" if direction == "maximize" else "Lower"
    note = f"{way} is better. Crosses at the bottom are failed trials; open circles miss an SLO and cannot win."
    return Chart("convergence", "Convergence: best so far", note, tuple(traces), layout)


def trade_off(evidence: Evidence) -> Chart:
    """The Pareto front of several objectives; of one objective, the score against the main latency."""
    return _front(evidence) if len(evidence.study.objective.targets) > 1 else _against_latency(evidence)


def restarts(evidence: Evidence) -> Chart:
    """The scores of the settings that were measured again, restart by restart."""
    metric = evidence.study.objective.metric
    title = "Finalists, measured again"
    if not evidence.contenders:
        why = "Nothing has been measured again" + (": verify.top is 0." if not evidence.study.verify.top else " yet.")
        return Chart("restarts", title, "", empty=why)
    traces = []
    for index, one in enumerate(evidence.contenders):
        color = PLAIN if one.is_baseline else SERIES[(index - 1) % len(SERIES)]
        runs = one.measured
        x, y = [(row.restart or 0) + 1 for row in runs], [rounded(scores_of(row)[0]) for row in runs]
        text = [hover(row, f"restart {(row.restart or 0) + 1} of {one.name}", _score_line(row, metric)) for row in runs]
        marker = {"size": 10}
        traces.append(scatter(x, y, one.name, mode="lines+markers", line={"color": color}, marker=marker, text=text))
    if not any(trace["x"] for trace in traces):
        return Chart("restarts", title, "", empty="Every restart failed.")
    layout = {"xaxis": {"title": {"text": "restart"}, "dtick": 1}, "yaxis": axis(metric)}
    note = (
        "Fresh engine starts, interleaved: what one restart has in common with the others drops out of the comparison."
    )
    return Chart("restarts", title, note, tuple(traces), layout, height=320)


def parallel(evidence: Evidence) -> Chart:
    """Every setting as a line through its parameters to its score."""
    title = "Parallel coordinates"
    rows = [row for row in evidence.searched if row.state in (State.MEASURED, State.FAILED) and row.params]
    if len(rows) < 2:
        return Chart("parallel", title, "", empty="Fewer than two settings beside the baseline have ended.")
    names = [name for name in evidence.study.space.by_name if any(name in row.params for row in rows)]
    dimensions = [_dimension(evidence, rows, name) for name in names[:_MAX_DIMENSIONS]]
    dimensions += [_outcome(rows), *(_scores(evidence, rows, i) for i in range(len(evidence.study.objective.targets)))]
    colors = [_relative_score(row, rows, evidence) for row in rows]
    scale = [[0, BAD], [0.199, BAD], [0.2, "--scale-low"], [1, "--scale-high"]]
    line = {"color": colors, "colorscale": scale, "cmin": -0.25, "cmax": 1}
    note = "Drag along an axis to keep only the lines that pass there. Red lines failed; the others go by their score."
    left_out = len(names) - _MAX_DIMENSIONS
    note += f" {left_out} more parameters are not shown." if left_out > 0 else ""
    trace = {"type": "parcoords", "dimensions": dimensions, "line": line, "labelangle": -18}
    return Chart("parallel", title, note, (trace,), {"margin": {"l": 70, "r": 140, "t": 100, "b": 30}}, height=460)


def main_latency(evidence: Evidence) -> str:
    """The latency that matters most: the first with an SLO, else the time to first token."""
    limits = [f"{name}_{statistic}" for name, slo in evidence.study.objective.slo.items() for statistic in slo]
    metric = evidence.study.objective.metric
    usual = "output_throughput_tok_s" if metric.partition("@")[0].startswith(("ttft", "tpot", "itl", "e2el")) else None
    return next((name for name in limits if name != metric), usual or "ttft_ms_p90")


def worst(row: TrialRow, latency: str, levels: Sequence[str]) -> float | None:
    """A metric at the one of the judged `levels` where it is largest; None where it was not measured."""
    metrics = row.result.metrics
    found = [metrics[name] for level in levels if (name := f"{latency}@{level}") in metrics]
    return max(found, default=metrics.get(latency))


def slo_limits(evidence: Evidence) -> dict[str, float]:
    """Metric to its upper limit: `{"ttft_ms_p90": 500.0}`."""
    slo = evidence.study.objective.slo
    return {f"{name}_{statistic}": limit for name, limits in slo.items() for statistic, limit in limits.items()}


# Convergence


def _points(rows: Sequence[TrialRow], metric: str) -> list[Trace]:
    """The measured trials, in and out of the SLOs."""
    traces = []
    for name, feasible, marker in (
        ("meets every SLO", True, {"color": GOOD, "size": 9}),
        ("misses an SLO", False, {"color": WARN, "size": 9, "symbol": "circle-open", "line": {"width": 2}}),
    ):
        of_kind = [row for row in rows if row.state is State.MEASURED and row.feasible is feasible]
        of_kind = [row for row in of_kind if row.score is not None]
        text = [hover(row, _score_line(row, metric)) for row in of_kind]
        if of_kind:
            x, y = [row.number for row in of_kind], [rounded(row.score) for row in of_kind]
            traces.append(scatter(x, y, name, mode="markers", marker=marker, text=text))
    return traces


def _stopped(rows: Sequence[TrialRow], metric: str) -> list[Trace]:
    stopped = [row for row in rows if row.state is State.STOPPED and row.bound is not None]
    if not stopped:
        return []
    text = [hover(row, f"stopped early: at best {metric} {format_number(row.bound or 0.0)}") for row in stopped]
    marker = {"color": FAINT, "size": 9, "symbol": "triangle-down-open"}
    x, y = [row.number for row in stopped], [rounded(row.bound) for row in stopped]
    return [scatter(x, y, "stopped early (its bound)", mode="markers", marker=marker, text=text)]


def _failed(rows: Sequence[TrialRow]) -> list[Trace]:
    failed = [row for row in rows if row.state is State.FAILED]
    if not failed:
        return []
    text = [hover(row, _failure_line(row)) for row in failed]
    marker = {"color": BAD, "size": 9, "symbol": "x"}
    x, y = [row.number for row in failed], [0.02] * len(failed)
    return [scatter(x, y, "failed", mode="markers", marker=marker, text=text, yaxis="y2", cliponaxis=False)]


def _best_line(rows: Sequence[TrialRow], direction: str) -> list[Trace]:
    pick = max if direction == "maximize" else min
    x: list[int] = []
    y: list[float | None] = []
    best: float | None = None
    for row in sorted(rows, key=lambda row: row.number):
        if row.feasible and row.score is not None:
            best = row.score if best is None else pick(best, row.score)
        x.append(row.number)
        y.append(rounded(best))
    line = {"color": LINE, "width": 2.5, "shape": "hv"}
    return [scatter(x, y, "best so far", mode="lines", line=line, hoverinfo="skip")] if best is not None else []


def _baseline_line(evidence: Evidence) -> tuple[list[Any], list[Any]]:
    base = evidence.baseline
    if base is None or base.score is None:
        return [], []
    shape, words = level_line(base.score, f"baseline {format_number(base.score)}")
    return [shape], [words]


# What was traded for what


def _front(evidence: Evidence) -> Chart:
    (first, _), (second, _) = evidence.study.objective.targets[:2]
    rows = [row for row in evidence.searched if len(scores_of(row)) > 1]
    title = f"Pareto front: {second} against {first}"
    if not rows:
        return Chart("front", title, "", empty="No trial has a score in every objective.")
    traces = _clouds(evidence, rows, lambda row: scores_of(row)[0], lambda row: scores_of(row)[1], (first, second))
    on_front = sorted((scores_of(row)[:2] for row in rows if row.number in evidence.answer.front), key=lambda at: at[0])
    if len(on_front) > 1:
        x, y = zip(*on_front, strict=True)
        line = {"color": GOOD, "width": 1.5, "dash": "dash"}
        traces.insert(0, scatter(x, y, "Pareto front", mode="lines", line=line, hoverinfo="skip"))
    note = "No setting on the front can be bettered in one objective without losing in another."
    if len(evidence.study.objective.targets) > 2:
        note += " The front is that of all objectives; the first two are drawn."
    layout = {"xaxis": axis(first), "yaxis": axis(second), **_slo_lines(evidence, first, second)}
    return Chart("front", title, note, tuple(traces), layout, height=440)


def _against_latency(evidence: Evidence) -> Chart:
    metric, latency = evidence.study.objective.metric, main_latency(evidence)
    levels = judged_levels(evidence.study)

    def slowest(row: TrialRow) -> float | None:
        return worst(row, latency, levels)

    rows = [row for row in evidence.searched if row.score is not None and slowest(row) is not None]
    title = f"Score against {latency}"
    if not rows:
        return Chart("front", title, "", empty=f"No trial has both a score and {latency}.")
    traces = _clouds(evidence, rows, slowest, lambda row: row.score, (latency, metric))
    layout = {"xaxis": axis(latency), "yaxis": axis(metric), **_slo_lines(evidence, latency, metric)}
    where = "the load level where that is largest" if len(levels) != 1 else f"{levels[0]}, where SLOs must be kept"
    note = f"What a score costs in latency, at {where}; a dotted line is an SLO's limit."
    return Chart("front", title, note, tuple(traces), layout, height=440)


def _clouds(
    evidence: Evidence,
    rows: Sequence[TrialRow],
    x: Callable[[TrialRow], float | None],
    y: Callable[[TrialRow], float | None],
    metrics: tuple[str, str],
) -> list[Trace]:
    """The measured settings: feasible, not feasible, and the two that matter most."""
    winner, base = evidence.answer.winner, evidence.baseline
    special = {row.number for row in (winner, base) if row is not None}
    common = [row for row in rows if row.number not in special]
    groups = [
        ("meets every SLO", [row for row in common if row.feasible], {"color": GOOD, "size": 9, "opacity": 0.75}),
        ("misses an SLO", [row for row in common if not row.feasible], _hollow(WARN)),
        ("baseline", [row for row in rows if row is base], {"color": PLAIN, "size": 14, "symbol": "square"}),
    ]
    if winner is not base:
        chosen = [row for row in rows if winner is not None and row.number == winner.number]
        groups.append(("winner", chosen, {"color": SERIES[0], "size": 17, "symbol": "star"}))
    traces = []
    for name, group, marker in groups:
        if group:
            text = [hover(r, *(valued(m, v(r) or 0.0) for m, v in zip(metrics, (x, y), strict=True))) for r in group]
            xs, ys = [rounded(x(row)) for row in group], [rounded(y(row)) for row in group]
            traces.append(scatter(xs, ys, name, mode="markers", marker=marker, text=text))
    return traces


def _hollow(color: str) -> dict[str, Any]:
    return {"color": color, "size": 9, "symbol": "circle-open", "line": {"width": 2}}


def _slo_lines(evidence: Evidence, x: str, y: str) -> dict[str, Any]:
    limits = slo_limits(evidence)
    ways = [("x", x), ("y", y)]
    lines = [
        level_line(limits[name.partition("@")[0]], f"SLO {format_number(limits[name.partition('@')[0]])}", way, BAD)
        for way, name in ways
        if name.partition("@")[0] in limits
    ]
    return {"shapes": [shape for shape, _ in lines], "annotations": [words for _, words in lines]}


# Parallel coordinates


def _dimension(evidence: Evidence, rows: Sequence[TrialRow], name: str) -> dict[str, Any]:
    """A parameter's axis: numbers by their size, logarithmic where it was searched so; all else by name."""
    values = [row.params.get(name) for row in rows]
    distribution = evidence.study.space.by_name[name].distribution
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) == len(values) and isinstance(distribution, Range):
        return _numeric(name, numbers, distribution.log and min(numbers) > 0)
    order = [format_value(value) for value in distribution.values] if isinstance(distribution, Choice) else []
    texts = ["not set" if value is None else format_value(value) for value in values]
    return _named(name, texts, order)


def _numeric(name: str, numbers: Sequence[float], log: bool) -> dict[str, Any]:
    if not log:
        return {"label": _short(name), "values": [rounded(value) for value in numbers]}
    low, high = min(numbers), max(numbers)
    ticks = sorted({low, high, *(2.0**power for power in range(-10, 40) if low < 2.0**power < high)})
    at = [rounded(math.log2(value)) for value in numbers]
    marks = {"tickvals": [rounded(math.log2(tick)) for tick in ticks], "ticktext": [format_number(t) for t in ticks]}
    return {"label": _short(name), "values": at, **marks}


def _named(name: str, texts: Sequence[str], order: Sequence[str] = ()) -> dict[str, Any]:
    places = {text: index for index, text in enumerate(dict.fromkeys((*(o for o in order if o in texts), *texts)))}
    marks = {"tickvals": list(places.values()), "ticktext": [_short(text) for text in places]}
    margin = {"range": [-0.3, max(len(places) - 1, 1) + 0.3]}
    return {"label": _short(name), "values": [places[text] for text in texts], **marks, **margin}


def _outcome(rows: Sequence[TrialRow]) -> dict[str, Any]:
    places = [0 if row.state is State.FAILED else 2 if row.feasible else 1 for row in rows]
    ticks = {"tickvals": [0, 1, 2], "ticktext": list(_OUTCOMES), "range": [-0.3, 2.3]}
    return {"label": "outcome", "values": places, **ticks}


def _scores(evidence: Evidence, rows: Sequence[TrialRow], objective: int) -> dict[str, Any]:
    """An objective's axis, with a place below all scores for those that have none."""
    metric = evidence.study.objective.targets[objective][0]
    scores = [scores_of(row)[objective] if len(scores_of(row)) > objective else None for row in rows]
    known = [score for score in scores if score is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    span = (high - low) or abs(high) or 1.0
    none = low - 0.2 * span
    ticks = [low + span * part / 4 for part in range(5)] if high > low else [low]
    marks = {"tickvals": [none, *ticks], "ticktext": ["none", *(format_number(tick) for tick in ticks)]}
    return {"label": _short(metric), "values": [rounded(none if s is None else s) for s in scores], **marks}


def _relative_score(row: TrialRow, rows: Sequence[TrialRow], evidence: Evidence) -> float:
    """From 0 for the worst to 1 for the best; below 0 without a score."""
    scores = [other.score for other in rows if other.score is not None]
    if row.score is None:
        return -0.25
    span = max(scores) - min(scores)
    share = (row.score - min(scores)) / span if span else 1.0
    return round(share if evidence.study.objective.direction == "maximize" else 1 - share, 3)


def _short(text: str) -> str:
    return label(text if len(text) <= 28 else f"{text[:27]}…")


def _score_line(row: TrialRow, metric: str) -> str:
    slo = "" if row.feasible else f", misses an SLO (violation {format_number(row.violation or 0.0)})"
    return f"{metric} {format_number(row.score or 0.0)} {unit_of(metric)}".rstrip() + slo


def _failure_line(row: TrialRow) -> str:
    failure = row.result.failure
    return "failed" if failure is None else f"{failure.kind} at {failure.stage}: {failure.evidence[:100]}"
