"""Where a study's trials fail: which kind at which stage, and with which values of the parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from raytune_autotuner.report.html.evidence import Evidence
from raytune_autotuner.report.html.figures import BAD, FAINT, Chart, categories, label
from raytune_autotuner.report.wording import format_number
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.space import Choice, format_value
from raytune_autotuner.study.trial import State, TrialRow

MAX_GROUPS = 6
"""A parameter's values are told in at most so many groups."""
_LABEL_CHARACTERS = 34


@dataclass(frozen=True)
class Group:
    """The trials that had one value, or one range of values, of a parameter."""

    text: str
    failed: int
    ended: int

    @property
    def share(self) -> float:
        """Of its trials that failed."""
        return self.failed / self.ended


def failure_map(evidence: Evidence) -> Chart:
    """How many trials failed at which stage, of which kind."""
    title = "Failure map: stage and kind"
    failed = [row.result.failure for row in evidence.rows if row.result.failure is not None]
    if not failed:
        return Chart("failure-map", title, "", empty="No trial has failed.")
    counts = Counter((str(one.stage), str(one.kind)) for one in failed)
    stages = [str(stage) for stage in Stage if any(stage == at for at, _ in counts)]
    kinds = [kind for kind, _ in Counter(str(one.kind) for one in failed).most_common()][::-1]
    z = [[counts.get((stage, kind)) or None for stage in stages] for kind in kinds]
    text = [["" if count is None else str(count) for count in row] for row in z]
    scale = [[0, "--scale-fail-low"], [1, "--scale-fail-high"]]
    trace = {"type": "heatmap", "x": stages, "y": kinds, "z": z, "text": text, "texttemplate": "%{text}"}
    look = {"colorscale": scale, "showscale": False, "xgap": 3, "ygap": 3, "zmin": 0}
    hover = {"hovertemplate": "%{y} at %{x}: %{z}<extra></extra>"}
    axes = {
        "xaxis": categories(stages, title={"text": "stage, in the order of a trial's life"}, showgrid=False),
        "yaxis": categories(kinds, automargin=True, showgrid=False),
    }
    note = "Failures of all trials, restarts and those by the environment's fault included."
    height = 150 + 42 * len(kinds)
    return Chart("failure-map", title, note, ({**trace, **look, **hover},), axes, height=height)


def failing_values(evidence: Evidence) -> Chart:
    """The share of failed trials for every value of every parameter."""
    title = "Failed share by value"
    rows = blamed(evidence)
    if not any(row.state is State.FAILED for row in rows):
        return Chart("failing-values", title, "", empty="No trial has failed by its setting's fault.")
    groups = {name: found for name in evidence.study.space.by_name if (found := grouped(evidence, rows, name))}
    bars = [(f"{_cut(name)} = {_cut(one.text)}", one) for name, found in groups.items() for one in found][::-1]
    names = [name for name, _ in bars]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [one.share for _, one in bars],
        "y": [label(name) for name in names],
        "text": [f"{one.failed} of {one.ended}" for _, one in bars],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": BAD},
        "hovertemplate": "%{y}: %{text} failed<extra></extra>",
    }
    overall = sum(row.state is State.FAILED for row in rows) / len(rows)
    line = {"type": "line", "x0": overall, "x1": overall, "y0": 0, "y1": 1, "yref": "paper"}
    layout = {
        "xaxis": {"title": {"text": "share of the trials that failed"}, "range": [0, 1.28], "tickformat": ".0%"},
        "yaxis": categories(names, automargin=True),
        "shapes": [{**line, "line": {"color": FAINT, "width": 1.5, "dash": "dot"}}],
    }
    note = f"The dotted line is the study's own share, {overall:.0%}. Few trials of a value say little about it."
    return Chart("failing-values", title, note, (trace,), layout, height=110 + 22 * len(bars))


def blamed(evidence: Evidence) -> list[TrialRow]:
    """The trials of the search that say something about their setting: measured, cut short, or failed by its fault."""
    return [row for row in evidence.searched if row.state.teaches and row.params]


def grouped(evidence: Evidence, rows: Sequence[TrialRow], name: str) -> list[Group]:
    """The trials by their value of one parameter; numbers of many values in ranges of about equal counts."""
    distribution = evidence.study.space.by_name[name].distribution
    values = [(row.params[name], row.state is State.FAILED) for row in rows if name in row.params]
    different = {format_value(value) for value, _ in values}
    if len(different) <= MAX_GROUPS:
        order = [format_value(value) for value in distribution.values] if isinstance(distribution, Choice) else []
        return _by_value(values, order)
    if all(isinstance(value, (int, float)) for value, _ in values):
        return _by_range(values)
    return _by_value(values, [])[:MAX_GROUPS]


def _by_value(values: Sequence[tuple[Any, bool]], order: Sequence[str]) -> list[Group]:
    counts: dict[str, list[bool]] = {}
    ordered = values if order else sorted(values, key=lambda pair: _sort_key(pair[0]))
    for value, failed in ordered:
        counts.setdefault(format_value(value), []).append(failed)
    names = [text for text in order if text in counts] or list(counts)
    return [_group(text, counts) for text in names]


def _group(text: str, counts: Mapping[str, Sequence[bool]]) -> Group:
    return Group(text, sum(counts[text]), len(counts[text]))


def _by_range(values: Sequence[tuple[float, bool]]) -> list[Group]:
    ordered = sorted(values)
    parts: dict[int, list[tuple[float, bool]]] = {}
    for _, equal in groupby(enumerate(ordered), key=lambda item: item[1][0]):
        same = list(equal)  # equal values stay together
        parts.setdefault(same[0][0] * MAX_GROUPS // len(ordered), []).extend(pair for _, pair in same)
    return [Group(_span(part), sum(failed for _, failed in part), len(part)) for part in parts.values()]


def _span(part: Sequence[tuple[float, bool]]) -> str:
    low, high = part[0][0], part[-1][0]
    return format_number(low) if low == high else f"{format_number(low)} to {format_number(high)}"


def _sort_key(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (not number, value if number else 0.0, format_value(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LABEL_CHARACTERS else f"{text[: _LABEL_CHARACTERS - 1]}…"
