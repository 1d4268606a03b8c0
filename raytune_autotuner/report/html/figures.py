"""A chart as plain values that Plotly draws: its traces and layout, with the words around it.

A colour is the name of one of the page's own (`--good`), which is looked up where the chart is drawn, so that it fits
light and dark. Names and values of a study are escaped, as Plotly takes some tags in text for markup.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from raytune_autotuner.report.html.evidence import unit_of
from raytune_autotuner.report.wording import format_number
from raytune_autotuner.study.space import format_value
from raytune_autotuner.study.trial import TrialRow

Trace: TypeAlias = dict[str, Any]

GOOD, BAD, WARN, PLAIN, FAINT, LINE = "--good", "--bad", "--warn", "--plain", "--faint", "--line"
SERIES = tuple(f"--series-{number}" for number in range(1, 9))
"""Colours that can be told apart, for settings side by side."""
_HOVER_PARAMS = 12
_HOVER_CHARACTERS = 60


@dataclass(frozen=True)
class Chart:
    """A chart, or why there is none."""

    name: str
    """Its id on the page."""
    title: str
    note: str
    """How to read it, in a sentence or two."""
    traces: tuple[Trace, ...] = ()
    layout: Mapping[str, Any] | None = None
    empty: str = ""
    """Why there is nothing to draw."""
    height: int = 380

    @property
    def figure(self) -> dict[str, Any]:
        """Traces and layout, for Plotly."""
        return {"data": list(self.traces), "layout": {**(self.layout or {}), "height": self.height}}


def label(value: object) -> str:
    """A name or value of the study as text in a chart."""
    return html.escape(str(value), quote=False)


def axis(metric: str, **more: Any) -> dict[str, Any]:
    """An axis of a metric, named with its unit."""
    unit = unit_of(metric)
    return {"title": {"text": label(f"{metric} ({unit})" if unit else metric)}, **more}


def categories(values: Sequence[str], **more: Any) -> dict[str, Any]:
    """An axis of names, which stay names where they look like numbers or dates."""
    order = {"categoryorder": "array", "categoryarray": [label(value) for value in values]}
    return {"type": "category", **order, **more}


def scatter(x: Sequence[Any], y: Sequence[Any], name: str, **more: Any) -> Trace:
    """Points or a line; `text` in `more` is what shows under the pointer."""
    given = {"type": "scatter", "x": list(x), "y": list(y), "name": label(name), **more}
    return {"hovertemplate": "%{text}<extra></extra>", **given} if "text" in more else given


def level_line(value: float, text: str, way: str = "y", color: str = FAINT) -> tuple[dict[str, Any], dict[str, Any]]:
    """A line across the chart at a value of one axis: its shape and its annotation."""
    other = "x" if way == "y" else "y"
    line = {"color": color, "width": 1.5, "dash": "dot"}
    ends = {f"{way}0": value, f"{way}1": value, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    place = {"x": 1, "xref": "paper", "xanchor": "right"} if way == "y" else {"y": 1, "yref": "paper", "yanchor": "top"}
    words = {"text": label(text), "showarrow": False, "font": {"color": color, "size": 12}}
    anchor = {"yanchor": "bottom"} if way == "y" else {"xanchor": "left"}
    return {"type": "line", "line": line, **ends}, {way: value, **place, **anchor, **words}


def who(row: TrialRow) -> str:
    """`trial 7` or `trial 0 (baseline)`."""
    return f"trial {row.number}" + (f" ({row.name})" if row.name else "")


def hover(row: TrialRow, *lines: str) -> str:
    """What shows under the pointer: the trial, `lines`, its setting."""
    shown = [f"{name}: {format_value(value)}"[:_HOVER_CHARACTERS] for name, value in row.params.items()]
    more = [f"and {len(shown) - _HOVER_PARAMS} more"] if len(shown) > _HOVER_PARAMS else []
    return "<br>".join(map(label, [who(row), *lines, *shown[:_HOVER_PARAMS], *more]))


def valued(metric: str, value: float) -> str:
    """`ttft_ms_p90 41.2 ms`."""
    return f"{metric} {format_number(value)} {unit_of(metric)}".rstrip()


def rounded(value: float | None) -> float | None:
    """Five significant digits are enough for a chart, and a fifth of the bytes."""
    return None if value is None else float(f"{value:.5g}")
