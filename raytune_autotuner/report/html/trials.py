"""Every trial as a row of a table that the page sorts, filters and searches, with links to the trial's logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from raytune_autotuner.report.events import promised_metrics
from raytune_autotuner.report.html.evidence import Evidence, unit_of
from raytune_autotuner.report.html.markup import Markup, join, tag
from raytune_autotuner.report.html.sections import nothing, section
from raytune_autotuner.report.wording import format_number
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.masking import mask
from raytune_autotuner.study.space import format_value
from raytune_autotuner.study.trial import State, TrialRow

_MAX_METRICS = 7
_LOGS = ("trial", "engine", "load")
_EVIDENCE_CHARACTERS = 300


@dataclass(frozen=True)
class _Column:
    name: str
    cell: Callable[[TrialRow], Markup]
    unit: str = ""


def trials(evidence: Evidence) -> Markup:
    """The table, with the fields that filter and search it."""
    if not evidence.rows:
        return section("trials", "Trials", nothing("No trial has started yet."))
    columns = _columns(evidence)
    head = tag("thead", tag("tr", *(_head(column) for column in columns)))
    body = tag("tbody", *(_row(evidence, row, columns) for row in evidence.rows))
    grid = tag("div", tag("table", head, body, id="trial-table"), cls="scroll tall", tabindex="0")
    note = "A click on a column's head sorts by it. A score is a measurement, a penalty what a failure was told as."
    return section("trials", "Trials", _controls(evidence), grid, note=note)


def outcome(row: TrialRow) -> str:
    """The state, in which a missed SLO is told from a kept one."""
    return "misses SLO" if row.state is State.MEASURED and not row.feasible else str(row.state)


def _controls(evidence: Evidence) -> Markup:
    outcomes = dict.fromkeys(sorted(outcome(row) for row in evidence.rows))
    options = [tag("option", "all states", value=""), *(tag("option", one, value=one) for one in outcomes)]
    roles = [("", "search and restarts"), ("search", "search only"), ("restart", "restarts only")]
    return tag(
        "div",
        tag("select", *options, id="trial-state", aria_label="state"),
        tag("select", *(tag("option", text, value=value) for value, text in roles), id="trial-role", aria_label="role"),
        tag(
            "input", type="search", id="trial-search", placeholder="search: a parameter, a kind …", aria_label="search"
        ),
        tag("span", id="trial-count", aria_live="polite"),
        cls="controls",
    )


def _columns(evidence: Evidence) -> list[_Column]:
    rows, study = evidence.rows, evidence.study
    objectives = [metric for metric, _ in study.objective.targets]
    names = [name for name in study.space.by_name if any(name in row.params for row in rows)]
    metrics = [m for m in promised_metrics(study) if m not in objectives and any(m in r.result.metrics for r in rows)]
    failing = [
        _Column("failed at", lambda row: _of_failure(row, "stage")),
        _Column("kind", lambda row: _of_failure(row, "kind")),
    ]
    failed = any(row.result.failure for row in rows)
    return [
        _Column("trial", lambda row: _number(row.number, str(row.number))),
        _Column("role", lambda row: tag("td", _role(row))),
        _Column("state", lambda row: tag("td", tag("span", outcome(row), cls=f"state {_slug(outcome(row))}"))),
        *(failing if failed else ()),
        *(_score(metric, index) for index, metric in enumerate(objectives)),
        _Column("vs baseline", _relative),
        *([_Column("penalty", lambda row: _maybe(row.penalty))] if failed else []),
        *(_parameter(evidence, name) for name in names),
        *(_metric(name) for name in metrics[:_MAX_METRICS]),
        _Column("time", lambda row: _maybe(row.result.seconds.get("total")), "s"),
        _Column("logs", lambda row: tag("td", _links(evidence, row), cls="logs")),
        *([_Column("why", _why)] if failed else []),
    ]


def _score(metric: str, index: int) -> _Column:
    def cell(row: TrialRow) -> Markup:
        found = scores_of(row)
        return _maybe(found[index] if index < len(found) else None)

    return _Column(metric, cell, unit_of(metric))


def _metric(name: str) -> _Column:
    return _Column(name, lambda row: _maybe(row.result.metrics.get(name)), unit_of(name))


def _parameter(evidence: Evidence, name: str) -> _Column:
    fixed = evidence.study.fixed

    def cell(row: TrialRow) -> Markup:
        if name not in row.params and name not in fixed:
            return tag("td", "", cls="parameter")
        value = row.params.get(name, fixed.get(name))
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        cls = "parameter number" if number else "parameter"
        return tag("td", format_value(value), cls=cls, data_v=value if number else None)

    return _Column(name, cell)


def _head(column: _Column) -> Markup:
    unit = tag("small", column.unit) if column.unit else ""
    button = tag("button", join((_breakable(column.name), unit)), type="button")
    return tag("th", button, scope="col", aria_sort="none")


def _breakable(name: str) -> Markup:
    """A long name, which may be broken after its marks."""
    pieces = name.replace("_", "_\0").replace("-", "-\0").split("\0")
    return join(piece for part in pieces for piece in (part, Markup("<wbr>")))


def _row(evidence: Evidence, row: TrialRow, columns: Sequence[_Column]) -> Markup:
    cells = [column.cell(row) for column in columns]
    winner = evidence.answer.winner is not None and evidence.answer.winner.number == row.number
    role = "search" if row.verifies is None else "restart"
    return tag("tr", *cells, data_state=outcome(row), data_role=role, cls="winner" if winner else None)


def _role(row: TrialRow) -> str:
    if row.verifies is not None:
        return f"restart {(row.restart or 0) + 1} of trial {row.verifies}"
    again = "" if row.retry_of is None else f"trial {row.retry_of} again"
    taken = "" if row.taken_from is None else f"from {row.taken_from}"
    return " ".join(filter(None, (row.name, again, taken)))


def _relative(row: TrialRow) -> Markup:
    return _maybe(None) if row.relative is None else _number(row.relative, f"x{row.relative:.2f}")


def _maybe(value: float | None) -> Markup:
    return tag("td", "", cls="number") if value is None else _number(value, format_number(value))


def _number(value: float, text: str) -> Markup:
    return tag("td", text, cls="number", data_v=f"{value:.9g}")


def _of_failure(row: TrialRow, field: str) -> Markup:
    return tag("td", "" if row.result.failure is None else str(getattr(row.result.failure, field)))


def _why(row: TrialRow) -> Markup:
    if row.result.failure is None:
        return tag("td", "")
    text = mask(row.result.failure.evidence)[:_EVIDENCE_CHARACTERS]
    return tag("td", tag("div", text, title=row.result.failure.remedy), cls="why")


def _links(evidence: Evidence, row: TrialRow) -> Markup:
    folder = evidence.trial_dir(row)
    there = [name for name in _LOGS if (folder / f"{name}.log").is_file()]
    links = [tag("a", name, href=quote(f"trials/{folder.name}/{name}.log")) for name in there]
    return join(links) if links else Markup("")


def _slug(text: str) -> str:
    return text.replace(" ", "-").lower()
