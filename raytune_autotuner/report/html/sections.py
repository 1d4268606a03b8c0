"""The parts of the report that are words and tables: verdict, launch line, baseline against winner, provenance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from raytune_autotuner.report.events import promised_metrics
from raytune_autotuner.report.finalists import Contender
from raytune_autotuner.report.html.evidence import Evidence, unit_of
from raytune_autotuner.report.html.figures import Chart, who
from raytune_autotuner.report.html.markup import Markup, join, number_cell, number_head, table, tag
from raytune_autotuner.report.wording import contender_cells, format_number, percent
from raytune_autotuner.score.metrics import METRICS
from raytune_autotuner.score.pareto import cost
from raytune_autotuner.study.masking import mask
from raytune_autotuner.study.space import changes, format_value
from raytune_autotuner.study.trial import State, TrialRow

_STANDING = {
    "running": "The study still runs: this is what is known so far.",
    "killed": "The study was killed before its end: this is what it had measured.",
    "interrupted": "The study was interrupted: this is what it had measured.",
    "at fault": "The study was ended by a fault of its own, that no setting can mend: this is what it had measured.",
    "not started": "The study has not begun.",
}
_NOTES = 3
"""So many are told with the verdict; all of them stand at the page's end."""


def section(name: str, title: str, *content: object, note: str = "") -> Markup:
    """A part of the page, with its heading."""
    told = tag("p", note, cls="note") if note else ""
    return tag("section", tag("h2", title), told, *content, id=name)


def chart_box(chart: Chart, heading: str = "h3") -> Markup:
    """The place of a chart, or the reason why there is none."""
    head = tag(heading, chart.title)
    if chart.empty:
        return tag("div", head, nothing(chart.empty), cls="card")
    words = tag("p", chart.note, cls="note") if chart.note else ""
    look = f"height:{chart.height}px"
    place = tag("div", cls="chart", data_chart=chart.name, style=look, role="img", aria_label=chart.title)
    return tag("div", head, words, place, cls="card")


def nothing(why: str) -> Markup:
    """An empty part says why it is empty."""
    return tag("p", why, cls="nothing")


def verdict(evidence: Evidence) -> Markup:
    """The answer in one sentence, with the figures that it rests on."""
    standing = _STANDING.get(evidence.standing)
    return tag(
        "section",
        tag("p", standing, cls="standing") if standing else "",
        tag("p", evidence.answer.sentence, cls="sentence"),
        *(tag("p", text, cls="warning") for text in (evidence.answer.warning, *evidence.notes[:_NOTES]) if text),
        tag("div", *_tiles(evidence), cls="tiles"),
        _then_and_now(evidence),
        id="verdict",
    )


def launch(evidence: Evidence) -> Markup:
    """The lines that serve the winner, to be copied."""
    winner = evidence.answer.winner
    if winner is None:
        return section("launch", "Launch line", nothing("No setting was measured, so there is none to launch."))
    command = evidence.command(winner)
    lines = dict.fromkeys(command[key] for key in ("launch", "plain") if isinstance(command.get(key), str))
    titles = ("On the machine of the study", "Elsewhere")
    boxes = [copy_box(title, line) for title, line in zip(titles, lines, strict=False)]
    if not boxes:
        boxes = [nothing(f"{who(winner).capitalize()} has left no command.json; see launch.sh in the study's folder.")]
    exported = f"python -m raytune_autotuner export {evidence.folder.path.name} --format docker"
    more = tag("p", "As a container, a Compose file or for Kubernetes: ", tag("code", exported), cls="note")
    return section("launch", "Launch line", *boxes, more if evidence.study.engine.kind == "vllm" else "")


def copy_box(title: str, text: str) -> Markup:
    """Text with a button that copies it."""
    button = tag("button", "Copy", type="button", cls="copy")
    return tag("div", tag("div", tag("span", title), button, cls="bar"), tag("pre", tag("code", text)), cls="copybox")


def versus(evidence: Evidence) -> Markup:
    """Baseline against winner: settings and figures with their differences."""
    title, base, other = "Baseline against winner", evidence.baseline, _rival(evidence)
    if base is None or (base.state is not State.MEASURED and not _measured_again(evidence, base)):
        why = "There is no baseline" if base is None else f"The baseline has no figures: it is {base.state}"
        return section("versus", title, nothing(f"{why}, so nothing can be compared with it."))
    if other is None:
        return section("versus", title, nothing("No other setting has been measured."))
    name = f"best other setting: {who(other)}" if _keeps_defaults(evidence) else f"winner: {who(other)}"
    starts = _starts(evidence, base, other)
    one, two = map(_means, starts)
    settings = table(("parameter", "baseline", name), _setting_rows(evidence, other), cls="versus")
    head = ("metric", "unit", *map(number_head, ("baseline", name, "difference", "relative")))
    first = promised_metrics(evidence.study)
    rows = [
        table(head, found, cls="versus")
        for names in (first, [n for n in METRICS if n not in first])
        if (found := _metric_rows(names, one, two))
    ]
    more = [tag("details", tag("summary", "All other metrics"), *rows[1:])] if rows[1:] else []
    note = f"{_basis(*map(len, starts))} Green is better, red is worse."
    return section("versus", title, settings, *rows[:1], *more, note=note)


def finalists(evidence: Evidence) -> Markup:
    """The settings that were measured again, with their gains and intervals."""
    if not evidence.contenders:
        return Markup("")
    head, *body = contender_cells(evidence.contenders, evidence.study.objective.targets)
    cells = [[*row[:2], *(number_cell(text) for text in row[2:])] for row in body]
    return table((*head[:2], *map(number_head, head[2:])), cells)


def failures(evidence: Evidence) -> Markup:
    """Every kind of failure once: how often, its last evidence, its remedy."""
    found: dict[tuple[str, str], list[TrialRow]] = {}
    for row in evidence.rows:
        if row.result.failure is not None:
            found.setdefault((str(row.result.failure.kind), str(row.result.failure.stage)), []).append(row)
    if not found:
        return Markup("")
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    rows = [_failure_cells(kind, stage, of_kind) for (kind, stage), of_kind in ordered]
    return table(("kind", "stage", "trials", "evidence", "remedy"), rows, cls="failures")


def provenance(evidence: Evidence) -> Markup:
    """What was measured on which machine, with which versions and seeds, and how to do it again."""
    machine, study = _mapping(evidence.versions.get("machine")), evidence.study
    facts = {
        "model": study.model,
        "engine": ", ".join(f"{name} {number}" for name, number in _mapping(evidence.versions.get("engine")).items()),
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()),
        "cluster": evidence.versions.get("cluster"),
        "host": evidence.status.host if evidence.status else None,
        "begun": _moment(evidence.status.started_at) if evidence.status else None,
        "took": evidence.elapsed,
        "packages": ", ".join(f"{n} {v}" for n, v in _mapping(evidence.versions.get("packages")).items()),
        "load": _load(evidence),
        "seeds": f"search {study.search.seed}, workload {study.workload.seed}",
        "sampler": study.search.sampler,
        "failures are graded by": study.penalty.grade,
        "figures": f"computed again from the requests of {evidence.counted} trials" if evidence.counted else None,
        **{f"note {number}": note for number, note in enumerate(evidence.notes, start=1)},
    }
    rows = [(name, value) for name, value in facts.items() if value]
    again = copy_box("Again", _again(evidence))
    text = mask(evidence.folder.study_file.read_text(encoding="utf-8"))
    file = tag("details", tag("summary", "study.yaml, as it was run"), copy_box("study.yaml", text))
    note = "With the same versions, on the same machine. Secrets are masked (***): fill them in before a new run."
    return section("provenance", "What was measured, and how to do it again", table((), rows, cls="facts"), again, file,
                   note=note)  # fmt: skip


# Parts


def _again(evidence: Evidence) -> str:
    if evidence.recheck is None:
        return "python -m raytune_autotuner study.yaml --results results"
    return f"python -m raytune_autotuner verify results/{evidence.recheck.claim.run}"


def _then_and_now(evidence: Evidence) -> Markup:
    """What an earlier run claimed, and what is not as it was; empty for a run that searches."""
    again = evidence.recheck
    if again is None:
        return Markup("")
    facts = [("then", again.claim.then), ("by", again.claim.source), ("its verdict", again.claim.sentence)]
    nothing_else = ("nothing: engine, machine and load are the same",)
    different = [("different now", one) for one in again.different or nothing_else]
    return tag("div", tag("h3", "What is verified"), table((), [*facts, *different], cls="facts"), cls="card")


def _tiles(evidence: Evidence) -> list[Markup]:
    metric = evidence.study.objective.metric
    tiles = []
    if evidence.answer.gain is not None and not _keeps_defaults(evidence):
        ends = evidence.answer.interval
        span = (
            "single measurements" if ends is None else f"interval {percent(ends[0], True)} to {percent(ends[1], True)}"
        )
        tiles.append(_tile("gain over the baseline", percent(evidence.answer.gain, sign=True), span))
    named = (("winner", None if _keeps_defaults(evidence) else evidence.answer.winner), ("baseline", evidence.baseline))
    for name, row in named:
        if row is not None and (row.score is not None or _measured_again(evidence, row)):
            value = _contender_mean(evidence, row)
            unit = f" ({unit_of(metric)})" if unit_of(metric) else ""
            tiles.append(_tile(f"{name}, trial {row.number}", format_number(value), f"{metric}{unit}"))
    if evidence.answer.noise is not None:
        tiles.append(_tile("noise", percent(evidence.answer.noise), "of the baseline between engine starts"))
    searched, failed = evidence.searched, sum(row.state is State.FAILED for row in evidence.searched)
    again = len(evidence.rows) - len(searched)
    if evidence.recheck is not None:
        tiles.append(_tile("restarts", str(again), "of both settings"))
    else:
        more = f"{failed} failed" + (f" · {again} restarts to verify" if again else "")
        tiles.append(_tile("trials", str(len(searched)), more))
    if evidence.elapsed:
        tiles.append(_tile("time", evidence.elapsed, evidence.standing))
    return tiles


def _keeps_defaults(evidence: Evidence) -> bool:
    winner, base = evidence.answer.winner, evidence.baseline
    return winner is not None and base is not None and winner.number == base.number


def _tile(name: str, value: str, more: str) -> Markup:
    return tag("div", tag("span", name, cls="name"), tag("strong", value), tag("span", more, cls="more"), cls="tile")


def _contender_mean(evidence: Evidence, row: TrialRow) -> float:
    one = _contender(evidence, row)
    return one.mean() if one is not None and one.measured else row.score or 0.0


def _measured_again(evidence: Evidence, row: TrialRow) -> bool:
    one = _contender(evidence, row)
    return one is not None and bool(one.measured)


def _contender(evidence: Evidence, row: TrialRow) -> Contender | None:
    return next((one for one in evidence.contenders if one.row.number == row.number), None)


def _rival(evidence: Evidence) -> TrialRow | None:
    """The winner; where the defaults are the answer, the best of the others, of those that were measured again."""
    winner, base = evidence.answer.winner, evidence.baseline
    if winner is not None and base is not None and winner.number != base.number:
        return winner
    way = evidence.study.objective.direction
    again = [one for one in evidence.contenders if one.measured and not one.is_baseline]
    if again:
        return min(again, key=lambda one: (not one.holds, cost(one.mean(), way))).row
    others = [row for row in evidence.searched if row.state is State.MEASURED and row.params and row.score is not None]
    return min(others, key=lambda row: (not row.feasible, cost(row.score or 0.0, way)), default=None)


def _starts(evidence: Evidence, base: TrialRow, other: TrialRow) -> tuple[list[TrialRow], list[TrialRow]]:
    """What the two are compared by: their restarts; where one has none, the search's trials if both were measured."""
    one, two = (_contender(evidence, row) for row in (base, other))
    mine = [] if one is None else one.compared if two is None else one.beside(two).compared
    theirs = [] if two is None else two.compared
    if not (mine and theirs) and base.result.metrics and other.result.metrics:
        return [base], [other]
    return mine or [base], theirs or [other]


def _basis(baseline: int, other: int) -> str:
    """What the figures rest on, by the number of engine starts of each setting."""
    if baseline != other:
        return f"Means of {baseline} and {other} engine starts."
    return f"Means of {other} engine starts each." if other > 1 else "One measurement each."


def _means(starts: Sequence[TrialRow]) -> Mapping[str, float]:
    metrics = [row.result.metrics for row in starts]
    common = [name for name in metrics[0] if all(name in other for other in metrics)]
    return {name: statistics.fmean(other[name] for other in metrics) for name in common}


def _setting_rows(evidence: Evidence, other: TrialRow) -> list[list[object]]:
    changed = changes(other.params, evidence.defaults)
    return [
        [tag("code", name), evidence.before(name),
         tag("td", format_value(value), cls="changed" if name in changed else "")]
        for name, value in other.params.items()
    ]  # fmt: skip


def _metric_rows(names: Sequence[str], base: Mapping[str, float], other: Mapping[str, float]) -> list[list[object]]:
    return [_metric_row(name, base[name], other[name]) for name in names if name in base and name in other]


def _metric_row(name: str, base: float, other: float) -> list[object]:
    change = other - base
    known = METRICS.get(name.partition("@")[0])
    better = None if known is None or known.better is None or not change else (change > 0) == (known.better == "higher")
    cls = "number" if better is None else f"number {'better' if better else 'worse'}"
    sign = "+" if change > 0 else ""
    relative = percent(change / abs(base), sign=True) if base else "-"
    return [
        tag("code", name),
        unit_of(name),
        number_cell(format_number(base)),
        number_cell(format_number(other)),
        tag("td", f"{sign}{format_number(change)}", cls=cls),
        tag("td", relative, cls=cls),
    ]


def _failure_cells(kind: str, stage: str, rows: Sequence[TrialRow]) -> list[object]:
    failure = rows[-1].result.failure
    assert failure is not None
    numbers = ", ".join(str(row.number) for row in rows[:10]) + (", …" if len(rows) > 10 else "")
    count = join((tag("strong", len(rows)), f": {numbers}"))
    return [tag("code", kind), stage, count, tag("code", mask(failure.evidence)), failure.remedy]


def _load(evidence: Evidence) -> str:
    load = evidence.study.workload
    levels = [f"concurrency {', '.join(map(str, load.concurrency))}"] if load.concurrency else []
    levels += (
        [f"rates {', '.join(map(format_number, load.request_rate_rps))} requests/s"] if load.request_rate_rps else []
    )
    what = str(load.dataset or load.trace or load.traffic)
    return ", ".join([what, *levels, f"{load.requests} requests a level, {load.rounds} rounds"])


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
