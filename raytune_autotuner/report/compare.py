"""Several studies side by side: another GPU, another engine version, another model or load.

Results folders go in; what differs between them, and what each came to, comes out: as a terminal's table and as a page
like `report.html`. Scores are set side by side only where the studies have the same objective.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raytune_autotuner.report.differences import NONE, SCORE, Difference, differences
from raytune_autotuner.report.html.charts import main_latency
from raytune_autotuner.report.html.evidence import Evidence, gather
from raytune_autotuner.report.html.figures import PLAIN, SERIES, Chart, axis, categories, label, rounded, scatter
from raytune_autotuner.report.html.loads import load_curve
from raytune_autotuner.report.html.markup import Markup, number_cell, number_head, table, tag
from raytune_autotuner.report.html.page import document
from raytune_autotuner.report.html.sections import chart_box, copy_box, section
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.wording import format_number, percent
from raytune_autotuner.report.writing import write_text
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.space import readable
from raytune_autotuner.study.trial import State, TrialRow

_NAVIGATION = {"outcome": "Outcome", "differences": "What differs", "settings": "Settings", "charts": "Charts"}


@dataclass(frozen=True)
class Comparison:
    """Studies side by side, in the order in which they were named."""

    studies: tuple[Evidence, ...]
    names: tuple[str, ...]
    """What tells them apart: the study's name, with the run's where that is needed."""
    differences: tuple[Difference, ...]

    @property
    def comparable(self) -> bool:
        """Whether scores may be held against each other: the same objective under the same load."""
        return not self._in_the_way

    @property
    def caution(self) -> str:
        """Why the scores say little side by side; empty where they may be compared."""
        names = [f"{one.about} {one.name}" for one in self._in_the_way]
        return f"Not measured alike, so hold no score against another: {', '.join(names)}." if names else ""

    @property
    def _in_the_way(self) -> list[Difference]:
        in_scores = {SCORE, *(key for one in self.studies for key in one.study.objective.in_scores)}
        return [one for one in self.differences if one.about == "workload" or _is_of(one, in_scores)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "studies": [_plain(name, one) for name, one in zip(self.names, self.studies, strict=True)],
            "differences": [asdict(one) for one in self.differences],
            "comparable": self.comparable,
        }


def _is_of(difference: Difference, keys: Collection[str]) -> bool:
    return difference.about == "objective" and difference.name in keys


def compare(folders: Sequence[ResultsFolder]) -> Comparison:
    """The studies in `folders`; raises `ConfigError` for fewer than two, or for one that stands there twice."""
    if len(folders) < 2:
        raise ConfigError("compare takes two results folders or more: compare RESULTS RESULTS...")
    paths = [folder.path.resolve() for folder in folders]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise ConfigError(f"{twice}: stands there twice; leave one out.")
    studies = tuple(gather(folder) for folder in folders)
    return Comparison(studies, _names(studies), tuple(differences([(one.study, one.versions) for one in studies])))


def terminal_table(comparison: Comparison) -> RenderableType:
    """What each study came to, and what differs between them."""
    outcome = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for index, head in enumerate(_HEAD):
        outcome.add_column(head, justify="right" if index else "left", overflow="fold")
    for cells in _outcomes(comparison):
        outcome.add_row(*map(Text, cells))
    named = zip(comparison.names, comparison.studies, strict=True)
    sentences = [Text(f"{name}: {one.answer.sentence}") for name, one in named]
    differs = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("differs", "", *comparison.names):
        differs.add_column(head, overflow="fold")
    for one in comparison.differences:
        differs.add_row(*map(Text, (one.about, one.name, *one.values)))
    parts: list[RenderableType] = [outcome, Text(""), *sentences, Text("")]
    parts.append(differs if comparison.differences else Text("Model, engine, hardware, load and space are the same."))
    return Group(*parts, Text(comparison.caution, style="yellow")) if comparison.caution else Group(*parts)


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page; returns its path. Raises `ConfigError` where it cannot be written."""
    try:
        write_text(path, comparison_page(comparison))
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror or error}.") from error
    return path


def comparison_page(comparison: Comparison) -> str:
    """The text of the page."""
    drawn = [chart(comparison) for chart in (_scores, _progress, _curves)]
    body = [
        _verdicts(comparison),
        _differing(comparison),
        _settings(comparison),
        section("charts", "Charts", *(chart_box(one) for one in drawn)),
    ]
    return document("Studies side by side", " · ".join(comparison.names), body, drawn, _NAVIGATION)


def _names(studies: Sequence[Evidence]) -> tuple[str, ...]:
    """The study's name where it is enough, else the run's, else the whole path."""
    ways: tuple[Callable[[Evidence], str], ...] = (
        lambda one: one.study.study,
        lambda one: one.folder.path.name,
        lambda one: one.folder.place,
    )
    for way in ways:
        names = tuple(way(one) for one in studies)
        if len(set(names)) == len(names):
            return names
    return names


# What each came to

_HEAD = ("study", "baseline", "winner", "gain", "interval", "noise", "trials", "failed")


def _outcomes(comparison: Comparison) -> list[list[str]]:
    return [_outcome(name, one) for name, one in zip(comparison.names, comparison.studies, strict=True)]


def _outcome(name: str, evidence: Evidence) -> list[str]:
    ends, noise = evidence.answer.interval, evidence.answer.noise
    return [
        name if evidence.standing == "finished" else f"{name} ({evidence.standing})",
        _score(evidence, evidence.baseline),
        _score(evidence, evidence.answer.winner),
        NONE if evidence.answer.gain is None else percent(evidence.answer.gain, sign=True),
        NONE if ends is None else f"{100 * ends[0]:+.1f} to {percent(ends[1], sign=True)}",
        NONE if noise is None else percent(noise),
        str(len(evidence.searched)),
        str(_failed(evidence)),
    ]


def _plain(name: str, evidence: Evidence) -> dict[str, Any]:
    """What a study came to, for JSON."""
    winner = evidence.answer.winner
    return {
        "study": name,
        "results": evidence.folder.place,
        "standing": evidence.standing,
        "metric": evidence.study.objective.metric,
        "baseline": _mean(evidence, evidence.baseline),
        "winner": _mean(evidence, winner),
        "params": None if winner is None else dict(winner.params),
        "gain": evidence.answer.gain,
        "interval": evidence.answer.interval,
        "noise": evidence.answer.noise,
        "trials": len(evidence.searched),
        "failed": _failed(evidence),
        "sentence": evidence.answer.sentence,
    }


def _failed(evidence: Evidence) -> int:
    return sum(row.state is State.FAILED for row in evidence.searched)


def _score(evidence: Evidence, row: TrialRow | None) -> str:
    value = _mean(evidence, row)
    return NONE if value is None else format_number(value)


def _mean(evidence: Evidence, row: TrialRow | None) -> float | None:
    """The first objective of a setting, over its restarts where it was measured again."""
    if row is None:
        return None
    again = next((one for one in evidence.contenders if one.row.number == row.number and one.measured), None)
    if again is not None:
        return again.mean()
    return next(iter(scores_of(row)), None)


# The page


def _verdicts(comparison: Comparison) -> Markup:
    cells = [[row[0], *map(number_cell, row[1:])] for row in _outcomes(comparison)]
    head = (_HEAD[0], *map(number_head, _HEAD[1:]))
    named = zip(comparison.names, comparison.studies, strict=True)
    sentences = [tag("p", tag("strong", name), ": ", one.answer.sentence) for name, one in named]
    caution = tag("p", comparison.caution, cls="warning") if comparison.caution else ""
    return section("outcome", "What each study came to", caution, table(head, cells), *sentences)


def _differing(comparison: Comparison) -> Markup:
    if not comparison.differences:
        return section(
            "differences", "What differs", tag("p", "Nothing: model, engine, hardware, load and space agree.")
        )
    rows = [(one.about, tag("code", one.name), *one.values) for one in comparison.differences]
    return section("differences", "What differs", table(("", "", *comparison.names), rows))


def _settings(comparison: Comparison) -> Markup:
    """The winners' parameters side by side, and their launch lines."""
    winners = [one.answer.winner for one in comparison.studies]
    names = dict.fromkeys(name for row in winners if row is not None for name in row.params)
    rows = [(tag("code", name), *(_value(one, name) for one in comparison.studies)) for name in names]
    body = [table(("parameter", *comparison.names), rows)] if rows else [tag("p", "Every winner is the defaults.")]
    for name, one in zip(comparison.names, comparison.studies, strict=True):
        line = None if one.answer.winner is None else one.command(one.answer.winner).get("launch")
        body += [copy_box(f"launch line of {name}", line)] if isinstance(line, str) else []
    return section("settings", "The winners' settings", *body)


def _value(one: Evidence, name: str) -> str:
    if one.answer.winner is None:
        return NONE
    return readable(one.answer.winner.params[name]) if name in one.answer.winner.params else one.before(name)


def _scores(comparison: Comparison) -> Chart:
    """Baseline and winner of each study as bars."""
    title, metric = "Baseline and winner", comparison.studies[0].study.objective.metric
    if any(one.study.objective.metric != metric for one in comparison.studies):
        return Chart("scores", title, "", empty="The studies have different objectives.")
    means = [(_mean(one, one.baseline), _mean(one, one.answer.winner)) for one in comparison.studies]
    if not any(value is not None for pair in means for value in pair):
        return Chart("scores", title, "", empty="Nothing was measured.")
    traces = []
    for index, (name, color) in enumerate((("baseline", PLAIN), ("winner", SERIES[0]))):
        y = [rounded(pair[index]) for pair in means]
        text = ["" if pair[index] is None else format_number(pair[index] or 0.0) for pair in means]
        look = {"marker": {"color": color}, "textposition": "outside", "cliponaxis": False}
        traces.append(
            {"type": "bar", "x": list(map(label, comparison.names)), "y": y, "name": name, "text": text, **look}
        )
    layout = {"xaxis": categories(comparison.names), "yaxis": axis(metric), "barmode": "group"}
    return Chart("scores", title, comparison.caution, tuple(traces), layout)


def _progress(comparison: Comparison) -> Chart:
    """The best so far of each study, trial by trial, over its own baseline."""
    title, traces = "Convergence, over each study's own baseline", []
    for index, (name, one) in enumerate(zip(comparison.names, comparison.studies, strict=True)):
        points = _best_so_far(one)
        if points:
            line = {"color": SERIES[index % len(SERIES)], "width": 2, "shape": "hv"}
            x, y = [number for number, _ in points], [rounded(share) for _, share in points]
            traces.append(scatter(x, y, name, mode="lines", line=line))
    if not traces:
        return Chart("progress", title, "", empty="No study has a baseline that was measured.")
    layout = {"xaxis": {"title": {"text": "trial"}}, "yaxis": {"title": {"text": "best so far / baseline"}}}
    return Chart("progress", title, "1 is the baseline.", tuple(traces), layout)


def _best_so_far(evidence: Evidence) -> list[tuple[int, float]]:
    pick = max if evidence.study.objective.direction == "maximize" else min
    points: list[tuple[int, float]] = []
    for row in evidence.searched:
        if row.feasible and row.relative is not None:
            points.append((row.number, pick(row.relative, points[-1][1]) if points else row.relative))
    return points


def _curves(comparison: Comparison) -> Chart:
    """Load against latency of each study's winner."""
    latency = main_latency(comparison.studies[0])
    title, traces = f"The winners' load and {latency}", []
    for index, (name, one) in enumerate(zip(comparison.names, comparison.studies, strict=True)):
        curve = None if one.answer.winner is None else load_curve(one.answer.winner, latency)
        if curve is not None:
            levels, x, y = curve
            line, text = {"color": SERIES[index % len(SERIES)]}, [label(level) for level in levels]
            look = {"mode": "lines+markers+text", "textposition": "top center"}
            traces.append({**scatter(x, y, name, line=line, **look), "text": text})
    if not traces:
        return Chart("curves", title, "", empty="No study has measured its winner at more than one load level.")
    layout = {"xaxis": axis("output_throughput_tok_s", rangemode="tozero"), "yaxis": axis(latency, rangemode="tozero")}
    return Chart("curves", title, "Each point is a load level, named beside it.", tuple(traces), layout)
