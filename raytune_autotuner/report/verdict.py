"""Which setting to run: the winner of a study's rows, its gain over the baseline, and the sentence that says so.

Pure: rows in, verdict out. Where the finalists and the baseline were measured again, it rests on their restarts and on
the intervals of `score/comparison.py`; else on one measurement a setting, and says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytune_autotuner.report import wording
from raytune_autotuner.report.finalists import Contender, Targets, as_good, contenders
from raytune_autotuner.score.comparison import Comparison, too_noisy
from raytune_autotuner.score.pareto import cost, dominates, knee, pareto_front
from raytune_autotuner.score.slo import MAX_LOAD
from raytune_autotuner.study.space import Params, changes
from raytune_autotuner.study.study import Direction, Study
from raytune_autotuner.study.trial import BASELINE, State, TrialRow


@dataclass(frozen=True, slots=True)
class Verdict:
    """The study's answer."""

    winner: TrialRow | None
    """The setting to run; the baseline's row where nothing beats it; None where nothing was measured."""
    baseline: TrialRow | None
    gain: float | None
    """By which share of the baseline's score the winner is better, in either direction; 0.43 is 43 % better."""
    sentence: str
    contenders: tuple[Contender, ...] = ()
    """The settings that were measured again, the defaults first; empty where it rests on single measurements."""
    warning: str | None = None
    """That the machine is too noisy to decide, and how many restarts would do; that scores are of several hardwares."""
    targets: Targets = ()
    front: tuple[int, ...] = ()
    """With several objectives: the trials of the search that no other one dominates."""

    @property
    def keeps_defaults(self) -> bool:
        """Whether the engine's defaults are the answer."""
        return self.winner is not None and self.winner.name == BASELINE

    @property
    def verified(self) -> bool:
        """Whether it rests on several engine starts of each setting."""
        return bool(self.contenders)

    @property
    def chosen(self) -> Contender | None:
        """The winner as it was measured again."""
        number = None if self.winner is None else self.winner.number
        return next((one for one in self.contenders if one.row.number == number), None)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the gain, for the first objective; None without one."""
        comparison = self._comparison
        return None if comparison is None else (comparison.low, comparison.high)

    @property
    def noise(self) -> float | None:
        """How much the defaults differ from themselves between restarts, as a share."""
        return next((one.spread() for one in self.contenders if one.is_baseline), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `verdict.json`."""
        interval, comparison = self.interval, self._comparison
        return {
            "sentence": self.sentence,
            "warning": self.warning,
            "verified": self.verified,
            "keep_defaults": self.keeps_defaults,
            "winner": None if self.winner is None else self.winner.number,
            "params": None if self.winner is None else dict(self.winner.params),
            "baseline": None if self.baseline is None else self.baseline.number,
            "objectives": [{"metric": metric, "direction": direction} for metric, direction in self.targets],
            "gain": self.gain,
            "interval": None if interval is None else list(interval),
            "confidence": None if comparison is None else comparison.confidence,
            "noise": self.noise,
            "front": list(self.front),
            "measured_again": [_plain(one, self.targets) for one in self.contenders],
        }

    @property
    def _comparison(self) -> Comparison | None:
        chosen = self.chosen
        return chosen.comparisons[0] if chosen is not None and chosen.comparisons else None


def study_verdict(study: Study, rows: Sequence[TrialRow], defaults: Params | None = None) -> Verdict:
    """The verdict on a study's rows; `defaults` are the engine's own values and fixed arguments, if they are known."""
    objective = study.objective
    fixed = study.fixed if defaults is None else defaults
    answer = verdict(rows, objective.direction, objective.metric, fixed, objective.targets)
    warnings = (answer.warning, wording.mixed_hardware(hardware_of(rows)), _ceiling(study, rows))
    answer = replace(answer, warning=" ".join(filter(None, warnings)) or None)
    if study.engine.search_weights == "real" or answer.verified or answer.winner is None:
        return answer
    return replace(answer, sentence=f"{answer.sentence} All figures are of dummy weights (engine.search_weights).")


def defaults_of(study: Study, versions: Mapping[str, Any]) -> Params:
    """The values in force in the baseline, as far as the engine has told them (`versions.json`)."""
    told = versions.get("defaults")
    return {**(told if isinstance(told, dict) else {}), **study.fixed}


def _ceiling(study: Study, rows: Iterable[TrialRow]) -> str | None:
    """That a scan for the highest load has found no end to it."""
    if MAX_LOAD not in study.objective.maximize:
        return None
    highest = max((*study.workload.concurrency, *study.workload.request_rate_rps))
    own = [row for row in rows if row.state is State.MEASURED and row.feasible and row.verifies is None]
    return wording.ceiling(highest, [row.number for row in own if row.result.metrics.get(MAX_LOAD) == highest])


def hardware_of(rows: Iterable[TrialRow]) -> Counter[str]:
    """The hardware that the scores come from, and how many come from each; what is not known is left out."""
    return Counter(row.result.hardware for row in rows if row.state is State.MEASURED and row.result.hardware)


def verdict(
    rows: Sequence[TrialRow],
    direction: Direction,
    metric: str = "score",
    fixed: Params | None = None,
    targets: Targets = (),
) -> Verdict:
    """The setting to run, by the settings that were measured again; without them by single measurements.

    `targets` are all objectives, where there are several. Of equally good settings the one with fewer changes against
    the `fixed` arguments wins, and the baseline before all.
    """
    goals = tuple(targets) or ((metric, direction),)
    again = contenders(rows, goals)
    baseline = baseline_of(rows)
    if _decidable(again, baseline):
        found = _by_restarts(again, goals, fixed or {}, baseline)
    else:
        found = _by_single(rows, goals, fixed or {})
    return replace(found, targets=goals, front=_front(rows, goals))


def baseline_of(rows: Sequence[TrialRow]) -> TrialRow | None:
    """The study's baseline; the last one, as a baseline that was lost has been run again."""
    return next((row for row in reversed(rows) if row.name == BASELINE and row.verifies is None), None)


def best_so_far(rows: Iterable[TrialRow], direction: Direction) -> TrialRow | None:
    """The feasible row of the search with the best score, of the first objective."""
    feasible = [row for row in rows if row.feasible and row.score is not None and row.verifies is None]
    return min(feasible, key=lambda row: _rank(row, direction, True, {})) if feasible else None


def best_with(best: TrialRow | None, row: TrialRow, direction: Direction) -> TrialRow | None:
    """The better one of the best row so far and one more: `best_so_far` of a growing study."""
    return best_so_far((row,) if best is None else (best, row), direction)


# By restarts


def _decidable(again: Sequence[Contender], baseline: TrialRow | None) -> bool:
    """Whether the defaults, if there is something to measure of them again, and one finalist have ended."""
    due = baseline is not None and baseline.state in (State.MEASURED, State.EARLIER)
    defaults = [one for one in again if one.is_baseline]
    ended = any(one.ended for one in again if not one.is_baseline) and all(one.ended for one in defaults)
    return ended and (bool(defaults) or not due)


def _by_restarts(again: Sequence[Contender], targets: Targets, fixed: Params, baseline: TrialRow | None) -> Verdict:
    defaults = next((one for one in again if one.is_baseline), None)
    finalists = [one for one in again if not one.is_baseline]
    holding = [one for one in finalists if one.holds]
    if defaults is None or not defaults.holds:
        closest = _best(holding, targets[:1], fixed) if holding else _least_missing(again)
        sentence = wording.without_defaults(closest, defaults, baseline, finalists, targets)
        row = None if closest is None else closest.row
        return Verdict(row, baseline, _gain_again(closest), sentence, tuple(again))
    good = [one for one in holding if one.better]
    winner = _choice(defaults, good, targets, fixed)
    if winner is defaults:
        sentence = wording.no_gain(defaults, finalists, targets)
        return Verdict(defaults.row, baseline, 0.0, sentence, tuple(again), _warning(holding))
    sentence = wording.gain(winner, defaults, finalists, _level(good, targets) if len(targets) == 1 else [], targets)
    return Verdict(winner.row, baseline, _gain_again(winner), sentence, tuple(again))


def _choice(defaults: Contender, good: Sequence[Contender], targets: Targets, fixed: Params) -> Contender:
    """The best of the finalists that beat the defaults, else the defaults."""
    if not good:
        return defaults
    return _best(good, targets, fixed) if len(targets) == 1 else _compromise(defaults, good, targets)


def _best(good: Sequence[Contender], targets: Targets, fixed: Params) -> Contender:
    """Of the best mean and what cannot be told from it the fewest changes, else the best mean."""
    return min(_level(good, targets), key=lambda one: len(changes(one.row.params, fixed)))


def _level(good: Sequence[Contender], targets: Targets) -> list[Contender]:
    """The best mean, and then those that cannot be told from it, the better ones first."""
    way = targets[0][1]
    best, *others = sorted(good, key=lambda one: cost(one.mean(), way))
    return [best, *as_good(best, others, way)]


def _compromise(defaults: Contender, good: Sequence[Contender], targets: Targets) -> Contender:
    """The knee of the front of those measured again, where what cannot be told from the defaults counts as equal."""
    directions = [direction for _, direction in targets]
    points = {one.row.number: one for one in (defaults, *good)}
    rows = [replace(one.row, scores=_told_apart(one, defaults, targets)) for one in points.values()]
    front = [row for row in rows if not any(dominates(other.scores, row.scores, directions) for other in rows)]
    chosen = knee(front, directions)
    return defaults if chosen is None else points[chosen.number]


def _told_apart(one: Contender, defaults: Contender, targets: Targets) -> tuple[float, ...]:
    means = []
    for i in range(len(targets)):
        apart = bool(one.comparisons) and (one.comparisons[i].better or one.comparisons[i].worse)
        means.append(one.mean(i) if apart else defaults.mean(i))
    return tuple(means)


def _least_missing(again: Sequence[Contender]) -> Contender | None:
    """Of the settings that started every time, the one that comes closest to its SLOs."""
    missing = [one for one in again if one.failed is None and one.ended]
    return min(missing, key=lambda one: one.violation or 0.0, default=None)


def _warning(holding: Sequence[Contender]) -> str | None:
    """That there is too much noise, by the finalist that needs the fewest restarts to be decided."""
    compared = [(one, too_noisy(one.comparisons[0])) for one in holding if one.comparisons]
    noisy = [(one, found) for one, found in compared if found is not None]
    if not noisy:
        return None
    return wording.warning(*min(noisy, key=lambda pair: pair[1].restarts or float("inf")))


def _gain_again(winner: Contender | None) -> float | None:
    """As a share, for the first objective."""
    comparison = next(iter(winner.comparisons if winner else ()), None)
    return None if comparison is None or comparison.scale == "difference" else comparison.gain


# By single measurements


def _by_single(rows: Sequence[TrialRow], targets: Targets, fixed: Params) -> Verdict:
    """The best feasible measured row, else the least violating one, else none."""
    metric, direction = targets[0]
    searched = [row for row in rows if row.verifies is None]
    cut_short = len(searched) < len(rows)
    baseline = baseline_of(rows)
    measured = [row for row in searched if row.state is State.MEASURED and row.score is not None]
    if not measured:
        return Verdict(None, baseline, None, wording.nothing_measured(searched))
    feasible = [row for row in measured if row.feasible]
    winner = min(feasible or measured, key=lambda row: _rank(row, direction, bool(feasible), fixed))
    if not feasible:
        sentence = wording.none_feasible(winner, metric, len(measured))
        return Verdict(winner, baseline, _gain(winner, baseline, direction), sentence)
    if len(targets) > 1:
        front = pareto_front(searched, [way for _, way in targets])
        winner = knee(front, [way for _, way in targets]) or winner
        sentence = wording.knee(winner, baseline, [row.number for row in front], targets)
    else:
        sentence = wording.single(winner, baseline, _gain(winner, baseline, direction), metric, len(measured))
    if cut_short:
        sentence += " Measuring again was cut short."
    return Verdict(winner, baseline, _gain(winner, baseline, direction), sentence)


def _front(rows: Sequence[TrialRow], targets: Targets) -> tuple[int, ...]:
    if len(targets) < 2:
        return ()
    return tuple(row.number for row in pareto_front(rows, [direction for _, direction in targets]))


def _rank(row: TrialRow, direction: Direction, feasible: bool, fixed: Params) -> tuple[float, float, bool, int, int]:
    """Smaller is better."""
    score = row.score if row.score is not None else float("nan")
    violation = 0.0 if feasible or row.violation is None else row.violation
    return (violation, cost(score, direction), row.name != BASELINE, len(changes(row.params, fixed)), row.number)


def _gain(winner: TrialRow, baseline: TrialRow | None, direction: Direction) -> float | None:
    if baseline is None or not baseline.score or winner.score is None:
        return None
    change = (winner.score - baseline.score) / abs(baseline.score)
    return change if direction == "maximize" else -change


def _plain(one: Contender, targets: Targets) -> dict[str, Any]:
    """A contender for JSON."""
    means = {metric: one.mean(i) for i, (metric, _) in enumerate(targets)} if one.measured else {}
    spreads = {metric: one.spread(i) for i, (metric, _) in enumerate(targets)} if one.measured else {}
    return {
        "trial": one.row.number,
        "name": one.row.name,
        "params": dict(one.row.params),
        "holds": one.holds,
        "why_not": wording.why_out(one),
        "restarts": [row.number for row in one.restarts],
        "scores": {metric: list(one.scores(i).values()) for i, (metric, _) in enumerate(targets)},
        "mean": means,
        "spread": spreads,
        "violation": one.violation,
        "gains": {metric: _plain_gain(c) for (metric, _), c in zip(targets, one.comparisons, strict=False)},
    }


def _plain_gain(comparison: Comparison) -> dict[str, Any]:
    names = ("gain", "low", "high", "better", "worse", "noise", "pairs", "degrees", "choices", "confidence", "scale")
    return {name: getattr(comparison, name) for name in names}
