"""Which parameters matter: for the score, and for failing.

By Optuna's PED-ANOVA, which needs nothing beyond Optuna itself: it compares where the best trials (or the failed ones)
lie with where all of them lie, parameter by parameter. Its shares add up to one even where nothing matters, so each
is held against what it comes to in shuffled trials. Optuna is imported when it is asked.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytune_autotuner.report.html.evidence import Evidence
from raytune_autotuner.report.html.failing import blamed
from raytune_autotuner.report.html.figures import BAD, FAINT, LINE, WARN, Chart, categories, label, scatter
from raytune_autotuner.study.space import Parameter, Range, format_value
from raytune_autotuner.study.trial import State, TrialRow

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

ENOUGH = 5
"""Trials below which nothing is said."""
BEST_SHARE = 0.25
"""The importance for the score is that for being among so many of the trials."""
FEW = 30
_END = 1.03
"""Of the axis of shares: by chance they may come to any multiple."""
SHUFFLES = 19
"""In one of twenty cases a parameter that does not matter passes the most of so many shuffles."""


@dataclass(frozen=True)
class _Weight:
    """A parameter's share of the importance of all, and the largest that it had in shuffled trials."""

    name: str
    share: float
    chance: float

    @property
    def stands_out(self) -> bool:
        return self.share > self.chance


def importance_for_score(evidence: Evidence) -> Chart:
    """Which parameters decide whether a trial is among the best."""
    title, name = "Parameter importance: score", "importance-score"
    rows = [row for row in evidence.searched if row.state is State.MEASURED and row.params and row.score is not None]
    if len(rows) < ENOUGH:
        return Chart(name, title, "", empty=f"Fewer than {ENOUGH} settings beside the baseline were measured.")
    sign = 1.0 if evidence.study.objective.direction == "minimize" else -1.0
    best = math.ceil(BEST_SHARE * len(rows))
    weights = _weigh(evidence, rows, [sign * (row.score or 0.0) for row in rows], best)
    metric = evidence.study.objective.metric
    note = f"For being among the best {best} of {len(rows)} measured trials by {metric} (PED-ANOVA).{_caution(rows)}"
    return _bars(name, title, note, weights, LINE)


def importance_for_failing(evidence: Evidence) -> Chart:
    """Which parameters decide whether the engine fails."""
    title, name = "Parameter importance: failing", "importance-failing"
    rows = blamed(evidence)
    failed = [row.state is State.FAILED for row in rows]
    if len(rows) < ENOUGH or len(set(failed)) < 2:
        why = f"Fewer than {ENOUGH} trials have ended." if len(rows) < ENOUGH else "No trial has failed."
        return Chart(name, title, "", empty="Every trial has failed." if failed and all(failed) else why)
    weights = _weigh(evidence, rows, [0.0 if one else 1.0 for one in failed], sum(failed))
    note = f"For being among the {sum(failed)} failed ones of {len(rows)} trials (PED-ANOVA).{_caution(rows)}"
    return _bars(name, title, note, weights, BAD)


def _weigh(evidence: Evidence, rows: Sequence[TrialRow], costs: Sequence[float], count: int) -> list[_Weight]:
    """The parameters' importances for being one of the `count` trials with the smallest costs, the least one first."""
    names = [name for name in evidence.study.space.by_name if len({repr(r.params.get(name)) for r in rows}) > 1]
    if not names or max(costs) <= sorted(costs)[count - 1]:  # all are among the smallest
        return []
    with _quiet():
        found, *by_chance = (_importances(evidence, rows, names, one, count) for one in (costs, *_shuffled(costs)))
    total = sum(found.values()) or 1.0
    weights = [_Weight(name, found[name] / total, max(one[name] for one in by_chance) / total) for name in names]
    return sorted(weights, key=lambda weight: weight.share)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna neither logs its studies nor warns of `normalize`, which is experimental there."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _importances(
    evidence: Evidence, rows: Sequence[TrialRow], names: Sequence[str], costs: Sequence[float], count: int
) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    study = optuna.create_study(direction="minimize")
    study.add_trials([_trial(evidence, row, names, cost) for row, cost in zip(rows, costs, strict=True)])
    evaluator = PedAnovaImportanceEvaluator(target_quantile=(count - 0.5) / len(rows))
    return dict(get_param_importances(study, evaluator=evaluator, normalize=False))


def _shuffled(costs: Sequence[float]) -> Iterator[list[float]]:
    """The costs dealt out to other trials, in which no parameter matters; the same ones every time."""
    dealer = random.Random(0)
    for _ in range(SHUFFLES):
        yield dealer.sample(costs, len(costs))


def _trial(evidence: Evidence, row: TrialRow, names: Sequence[str], cost: float) -> FrozenTrial:
    import optuna

    space = evidence.study.space.by_name
    given = [n for n in names if n in row.params and space[n].distribution.contains(row.params[n])]
    return optuna.create_trial(
        params={name: _told(space[name], row.params[name]) for name in given},
        distributions={name: _distribution(space[name]) for name in given},
        value=cost,
    )


def _told(parameter: Parameter, value: Any) -> Any:
    """A value as Optuna takes it: numbers of a range as they are, all else as text."""
    return value if isinstance(parameter.distribution, Range) else format_value(value)


def _distribution(parameter: Parameter) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    known = parameter.distribution
    if not isinstance(known, Range):
        return CategoricalDistribution(tuple(dict.fromkeys(format_value(value) for value in known.values)))
    low, high = known.ends
    if known.type == "int":
        return IntDistribution(int(low), int(high), log=known.log)
    return FloatDistribution(low, high, log=known.log)


def _bars(name: str, title: str, note: str, weights: Sequence[_Weight], color: str) -> Chart:
    if not any(weight.share for weight in weights):
        return Chart(name, title, "", empty="No parameter stands out.")
    names = [weight.name for weight in weights]
    y = [label(name) for name in names]
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": "importance",
        "x": [round(weight.share, 4) for weight in weights],
        "y": y,
        "marker": {"color": [color if weight.stands_out else FAINT for weight in weights]},
        "hovertemplate": "%{y}: %{x:.0%}<extra></extra>",
        "showlegend": False,
    }
    mark = {"symbol": "line-ns", "size": 16, "color": WARN, "line": {"color": WARN, "width": 2}}
    chance = [round(min(weight.chance, _END), 4) for weight in weights]
    text = [f"{label(weight.name)}: up to {weight.chance:.0%} by chance" for weight in weights]
    marks = scatter(chance, y, "reached by chance", mode="markers", marker=mark, text=text)
    layout = {
        "xaxis": {"title": {"text": "share of the importance of all"}, "tickformat": ".0%", "range": [0, _END + 0.02]},
        "yaxis": categories(names, automargin=True),
        "showlegend": True,
    }
    told = f"{note} A grey bar does not pass what shuffled trials reach, so it may be chance."
    return Chart(name, title, told, (bars, marks), layout, height=140 + 34 * len(names))


def _caution(rows: Sequence[TrialRow]) -> str:
    return f" From so few as {len(rows)} trials it is a hint." if len(rows) < FEW else ""
