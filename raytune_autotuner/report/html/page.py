"""`report.html`: one file that holds a whole study and opens without a network.

Made from the results folder alone, also of a study that runs or was killed. Plotly's script is embedded once; charts
are data beside it. A policy in the page allows its own scripts and no others, and no request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from raytune_autotuner.report.html import charts, failing, importance, loads, sections
from raytune_autotuner.report.html.evidence import Evidence, gather
from raytune_autotuner.report.html.figures import Chart, who
from raytune_autotuner.report.html.loads import TrialLoads
from raytune_autotuner.report.html.markup import Markup, json_text, tag
from raytune_autotuner.report.html.sections import chart_box, section
from raytune_autotuner.report.html.trials import trials
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.writing import write_text
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.masking import mask_values

FILE = "report.html"
_IMPORTANCES = ("importance-score", "importance-failing")
_NAVIGATION = {
    "verdict": "Verdict",
    "launch": "Launch",
    "versus": "Baseline against winner",
    "search": "Search",
    "trials": "Trials",
    "parameters": "Parameters",
    "failures": "Failures",
    "load": "Under load",
    "provenance": "Provenance",
}


def write_report(folder: ResultsFolder, evidence: Evidence | None = None) -> Path:
    """Write `report.html` into the results folder, from its `evidence` if that is gathered already; returns its path.

    Raises `ConfigError` where the folder's study file is broken or nothing can be written there, and nothing for
    whatever else is missing.
    """
    path = folder.path / FILE
    try:
        write_text(path, report_page(evidence or gather(folder)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}.") from error
    return path


def report_page(evidence: Evidence) -> str:
    """The text of the page."""
    chosen = loads.chosen_loads(evidence)
    drawn = _charts(evidence, chosen)
    by_name = {chart.name: chart for chart in drawn}
    body = [
        sections.verdict(evidence),
        sections.launch(evidence),
        sections.versus(evidence),
        _search(evidence, by_name),
        trials(evidence),
        section("parameters", "Parameters", chart_box(by_name["parallel"]), _pair(by_name, *_IMPORTANCES)),
        section("failures", "Failures", sections.failures(evidence), _pair(by_name, "failure-map", "failing-values")),
        _under_load(by_name, chosen),
        sections.provenance(evidence),
    ]  # fmt: skip
    title = f"{evidence.study.study}: {evidence.study.model}"
    return document(title, evidence.folder.path.name, body, drawn, _NAVIGATION)


def document(
    title: str, subtitle: str, body: Iterable[object], drawn: Sequence[Chart], navigation: dict[str, str]
) -> str:
    """A whole page with its style, its scripts and the data of its charts."""
    data = tag("script", Markup(json_text(_figures(drawn))), type="application/json", id="figures")
    scripts = [get_plotlyjs(), _asset("page.js")]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(_asset("page.css"))),
    )
    links = [tag("a", text, href=f"#{name}") for name, text in navigation.items()]
    theme = tag("button", "Light / dark", type="button", id="theme")
    top = tag("header", tag("div", tag("h1", title), tag("p", subtitle), cls="title"), theme)
    page = tag("body", top, tag("nav", *links), tag("main", *body), data, *(tag("script", Markup(s)) for s in scripts))
    return f"<!DOCTYPE html>\n{tag('html', head, page, lang='en')}\n"


def _charts(evidence: Evidence, chosen: Sequence[TrialLoads]) -> list[Chart]:
    return [
        charts.convergence(evidence),
        charts.trade_off(evidence),
        charts.restarts(evidence),
        charts.parallel(evidence),
        importance.importance_for_score(evidence),
        importance.importance_for_failing(evidence),
        failing.failure_map(evidence),
        failing.failing_values(evidence),
        loads.distributions(evidence, chosen),
        loads.over_time(chosen),
        loads.load_latency(evidence, chosen),
    ]


def _search(evidence: Evidence, by_name: dict[str, Chart]) -> Markup:
    again = tag("div", tag("h3", "Finalists: gains and intervals"), sections.finalists(evidence), cls="card")
    table = again if evidence.contenders else ""
    content = [chart_box(by_name["convergence"]), chart_box(by_name["front"]), chart_box(by_name["restarts"]), table]
    return section("search", "Search", *content)


def _pair(by_name: dict[str, Chart], *names: str) -> Markup:
    return tag("div", *(chart_box(by_name[name]) for name in names), cls="pair")


def _under_load(by_name: dict[str, Chart], chosen: Sequence[TrialLoads]) -> Markup:
    shown = [by_name[name] for name in ("distributions", "over-time", "load-latency")]
    controls = _controls(chosen) if any(not chart.empty for chart in shown) else ""
    return section("load", "Under load", controls, *(chart_box(chart) for chart in shown))


def _controls(chosen: Sequence[TrialLoads]) -> Markup:
    """Which trials, load level and latency the charts below show."""
    boxes = [_box(one) for one in chosen]
    levels = loads.levels_of(chosen)
    options = [tag("option", level, value=level, selected="" if level == levels[-1] else None) for level in levels]
    names = [tag("option", name, value=name) for name in loads.LATENCIES]
    level = tag("label", "load level ", tag("select", *options, id="load-level"))
    latency = tag("label", "latency ", tag("select", *names, id="load-latency-name"))
    return tag("div", *boxes, level, latency, cls="controls sticky", id="load-controls")


def _box(one: TrialLoads) -> Markup:
    tick = tag("input", type="checkbox", value=one.row.number, checked="" if one.shown else None)
    return tag("label", tick, tag("span", who(one.row)), cls="pick", data_color=one.color)


def _figures(drawn: Sequence[Chart]) -> dict[str, Any]:
    return {chart.name: mask_values(chart.figure) for chart in drawn if not chart.empty}


def _policy(scripts: Sequence[str]) -> str:
    """Only these scripts; Plotly's parallel coordinates make code from text, and its own styles are inline."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    own = f"script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
