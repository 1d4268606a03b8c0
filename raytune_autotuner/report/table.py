"""The table of trials, cut to the width and height that there is.

Columns come in by importance until the width is used up; rows are the running ones, the best and the newest.
Scores and penalties are separate columns: a penalty is never taken for a measurement.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from raytune_autotuner.report.events import shown_metrics
from raytune_autotuner.report.status import LiveTrial
from raytune_autotuner.report.wording import format_number, verification_of
from raytune_autotuner.study.space import Params, readable
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow

_STYLES = {
    State.PENDING: "dim",
    State.RUNNING: "cyan",
    State.FAILED: "red",
    State.LOST: "magenta",
    State.INTERRUPTED: "yellow",
}
_NONE = "-"
_GAP = 2  # between two columns
_HEADER_LINES = 4
_LEAST_BESIDE = 3
"""Lines of a table that are no rows: its caption, an empty one, a header of one line."""
_ROOMY = 100
_ABSENT = object()


@dataclass(frozen=True)
class _Column:
    """A column: its header, its cells, and when it comes in (a smaller `rank` earlier)."""

    header: str
    cell: Callable[[TrialRow], str]
    rank: int
    right: bool = True
    max_width: int = 24


def trial_table(
    study: Study,
    rows: Sequence[TrialRow],
    live: Mapping[int, LiveTrial],
    width: int,
    height: int | None,
    best: int | None,
) -> RenderableType:
    """The trials as a table at most `width` wide and `height` lines high (None: all of them)."""
    # Only rows that may be shown are looked at: there may be thousands, and a table is drawn four times a second.
    ranked = _by_importance(rows, best, None if height is None else height - _LEAST_BESIDE)
    first = _by_number(ranked)
    columns = _fitting(_columns(study, first, live, width), first, width)
    heads = {column.header: _wrap_header(column, first) for column in columns}
    spare = None if height is None else max(height - 2 - max(head.count("\n") + 1 for head in heads.values()), 1)
    shown = _by_number(ranked[:spare])
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold", collapse_padding=True)
    for column in columns:
        table.add_column(
            heads[column.header],
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            vertical="bottom",
            width=_column_width(column, first),
        )
    for row in shown:
        table.add_row(*(Text(column.cell(row)) for column in columns), style=_style(row, best))
    return _with_caption(table, study, len(rows) - len(shown))


def _with_caption(table: Table, study: Study, hidden: int) -> RenderableType:
    better = "higher" if study.objective.direction == "maximize" else "lower"
    caption = f"score: {study.objective.metric}, {better} is better"
    for metric, direction in study.objective.targets[1:]:
        caption += f"; {metric}, {'higher' if direction == 'maximize' else 'lower'} is better"
    if hidden:
        caption += f"; {hidden} more trial{'s' if hidden > 1 else ''} not shown"
    return Group(table, Text(caption, style="dim", no_wrap=True, overflow="ellipsis"))


def _columns(study: Study, rows: Sequence[TrialRow], live: Mapping[int, LiveTrial], width: int) -> list[_Column]:
    """All columns that there is anything to show in, from left to right."""
    metrics, objectives = shown_metrics(study, rows), dict(study.objective.targets)
    columns = [
        _Column("trial", lambda row: _who(row, study, width), 0, right=False, max_width=30),
        _Column("state", lambda row: _state(row, live), 0, right=False),
        *_stage_column(rows),
        *(_parameter_column(name, study.fixed, 20 + i) for i, name in enumerate(differing(rows))),
        *(_metric_column(name, live, 1 if name in objectives else 40 + i) for i, name in enumerate(metrics)),
        _Column("score", lambda row: _score(row, study, live), 0),
        _Column("vs base", _relative, 1),
    ]
    if any(row.penalty is not None for row in rows):
        columns.append(_Column("penalty", _penalty, 2))
    columns.append(_Column("time", lambda row: _seconds(row, live), 39))
    return columns


def differing(rows: Sequence[TrialRow]) -> list[str]:
    """The parameters that are not the same in all rows."""
    names = dict.fromkeys(name for row in rows for name in row.params)
    return [name for name in names if len({repr(row.params.get(name, _ABSENT)) for row in rows}) > 1]


def _fitting(columns: list[_Column], rows: Sequence[TrialRow], width: int) -> list[_Column]:
    """The most important columns that fit side by side, in their order."""
    chosen: list[_Column] = []
    used = -_GAP
    for column in sorted(columns, key=lambda column: column.rank):
        needed = _column_width(column, rows) + _GAP
        if column.rank == 0 or used + needed <= width:
            chosen.append(column)
            used += needed
    return [column for column in columns if column in chosen]


def _by_importance(rows: Sequence[TrialRow], best: int | None, room: int | None) -> list[TrialRow]:
    """The `room` most important rows: first the best and the running ones, then the newest."""
    again = {row.verifies for row in rows}

    def importance(row: TrialRow) -> tuple[bool, bool, bool, bool, int]:
        finalist = row.number in again
        return (row.number != best, row.state is not State.RUNNING, not row.name, not finalist, -row.number)

    return heapq.nsmallest(len(rows) if room is None else max(room, 1), rows, key=importance)


def _by_number(rows: Sequence[TrialRow]) -> list[TrialRow]:
    return sorted(rows, key=lambda row: row.number)


def _column_width(column: _Column, rows: Sequence[TrialRow]) -> int:
    cells = max((len(column.cell(row)) for row in rows), default=0)
    return min(max(cells, _header_width(column, cells)), column.max_width)


def _header_width(column: _Column, cells: int) -> int:
    """The narrowest that lets the header stand in at most `_HEADER_LINES` lines."""
    pieces = _pieces(column.header)
    width = max(cells, max(map(len, pieces)))
    while len(_fill(pieces, width)) > _HEADER_LINES:
        width += 1
    return width


def _wrap_header(column: _Column, rows: Sequence[TrialRow]) -> str:
    return "\n".join(_fill(_pieces(column.header), _column_width(column, rows)))


def _pieces(header: str) -> list[str]:
    """Where a name may be broken: after `-`, `_`, `:` and blanks."""
    marked = header
    for mark in "-_: ":
        marked = marked.replace(mark, f"{mark}\n")
    return [piece for piece in marked.split("\n") if piece]


def _fill(pieces: Sequence[str], width: int) -> list[str]:
    lines = [""]
    for piece in pieces:
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _style(row: TrialRow, best: int | None) -> Style:
    if row.number == best:
        return Style.parse("bold green")
    return Style.parse(_STYLES.get(row.state, ""))


def _who(row: TrialRow, study: Study, width: int) -> str:
    """`0 baseline`, `7`, `23 verify trial 7, 2 of 5`, and that shorter where there is little room."""
    if row.verifies is not None:
        restarts = study.verify.restarts
        short = f"verify {row.verifies}, {(row.restart or 0) + 1}/{restarts}"
        return f"{row.number} {short if width < _ROOMY else verification_of(row, restarts)}"
    return f"{row.number} {row.name}" if row.name else str(row.number)


def _state(row: TrialRow, live: Mapping[int, LiveTrial]) -> str:
    """`measured`, `misses SLO 0.27`, `weights 40%` while running, a failure's kind."""
    if row.result.failure is not None:
        return str(row.result.failure.kind)
    if row.state is State.MEASURED and not row.feasible:
        return f"misses SLO {format_number(row.violation or 0.0)}"
    trial = live.get(row.number)
    if row.state is State.RUNNING and trial is not None:
        return f"{trial.stage} {trial.share:.0%}" if trial.share else str(trial.stage)
    return str(row.state)


def _stage_column(rows: Sequence[TrialRow]) -> list[_Column]:
    """Where failed trials failed, if any did."""

    def cell(row: TrialRow) -> str:
        return str(row.result.failure.stage) if row.result.failure else ""

    return [_Column("failed at", cell, 38, right=False)] if any(map(cell, rows)) else []


def _parameter_column(name: str, fixed: Params, rank: int) -> _Column:
    def cell(row: TrialRow) -> str:
        value = row.params.get(name, fixed.get(name, _ABSENT))
        return _NONE if value is _ABSENT else readable(value)

    return _Column(name, cell, rank, max_width=16)


def _metric_column(name: str, live: Mapping[int, LiveTrial], rank: int) -> _Column:
    def cell(row: TrialRow) -> str:
        value = _metrics(row, live).get(name)
        return _NONE if value is None else format_number(value)

    return _Column(name, cell, rank)


def _metrics(row: TrialRow, live: Mapping[int, LiveTrial]) -> Mapping[str, float]:
    if row.state is State.RUNNING and row.number in live:
        return live[row.number].metrics_now
    return row.result.metrics


def _score(row: TrialRow, study: Study, live: Mapping[int, LiveTrial]) -> str:
    if row.score is not None:
        return format_number(row.score)
    now = _metrics(row, live).get(study.objective.metric)
    return _NONE if now is None or row.state is not State.RUNNING else f"~{format_number(now)}"


def _relative(row: TrialRow) -> str:
    return _NONE if row.relative is None else f"x{row.relative:.2f}"


def _penalty(row: TrialRow) -> str:
    return "" if row.penalty is None else format_number(row.penalty)


def _seconds(row: TrialRow, live: Mapping[int, LiveTrial]) -> str:
    if row.number in live and not row.state.finished:
        return f"{live[row.number].elapsed_s:.0f} s"
    total = row.result.seconds.get("total")
    return _NONE if total is None else f"{total:.0f} s"
