"""The settings that are measured again at the end of a search: which, their restarts, their gains over the defaults.

Rows in; finalists out, or contenders, once there are restarts. What is recommended, and in which words, is the
verdict's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raytune_autotuner.score.comparison import Comparison, NotComparable, compare, spread
from raytune_autotuner.score.pareto import cost, knee, pareto_front, scores_of
from raytune_autotuner.study.space import Params, changes
from raytune_autotuner.study.study import Direction, Study
from raytune_autotuner.study.trial import BASELINE, State, TrialRow

Targets = Sequence[tuple[str, Direction]]
"""The objectives: metric and the way that is better."""
ENOUGH = 2
"""Restarts from which on a setting can be told from noise at all."""


def finalists(study: Study, rows: Sequence[TrialRow], defaults: Params) -> list[TrialRow]:
    """The trials whose settings are worth measuring again, the baseline first; empty where there is nothing to decide.

    A setting that is worse than the baseline on first sight is no finalist: the defaults are kept in any case. A
    baseline that was lost, by no fault of its own, has another chance: nobody knows yet what it is worth. The
    settings of an earlier run that is verified are all there is.
    """
    if taken := [row for row in rows if row.state is State.EARLIER]:
        return taken
    found = [row for row in rows if row.verifies is None and row.state is State.MEASURED]
    baseline = next((row for row in [*reversed(found), *reversed(rows)] if _may_be_measured_baseline(row)), None)
    best = _best_first(study, [row for row in found if row.feasible], defaults)
    if baseline in best and len(study.objective.targets) == 1:
        best = best[: best.index(baseline)]
    top = [row for row in best if row.name != BASELINE][: study.verify.top]
    return ([] if baseline is None else [baseline]) + top if top else []


def _may_be_measured_baseline(row: TrialRow) -> bool:
    return row.name == BASELINE and row.verifies is None and row.state in (State.MEASURED, State.LOST)


def _best_first(study: Study, rows: Sequence[TrialRow], defaults: Params) -> list[TrialRow]:
    """By score, of equal ones the baseline first; with several objectives the Pareto front from its knee on."""
    if len(study.objective.targets) > 1:
        return _from_the_knee(study, rows)
    way = study.objective.direction

    def key(row: TrialRow) -> tuple[float, bool, int]:
        return (cost(row.score or 0.0, way), row.name != BASELINE, len(changes(row.params, defaults)))

    return sorted(rows, key=key)


def _from_the_knee(study: Study, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The front's members: its knee, then the knee of the others, and so on."""
    directions = [direction for _, direction in study.objective.targets]
    front, ordered = pareto_front(rows, directions), list[TrialRow]()
    while (best := knee(front, directions)) is not None:
        ordered.append(best)
        front = [row for row in front if row is not best]
    return ordered


@dataclass(frozen=True, slots=True)
class Contender:
    """A setting that was measured again on fresh starts of the engine."""

    row: TrialRow
    """Its trial in the search."""
    restarts: tuple[TrialRow, ...]
    """Those that were measured, by number, and those that failed by the setting's own fault."""
    comparisons: tuple[Comparison, ...] = ()
    """Against the defaults, one for each objective; empty for the defaults, and where they or it cannot be compared."""
    paired: frozenset[int] | None = None
    """Numbers of the restarts that it is compared in, the defaults with whichever finalist; None where in none."""

    @property
    def is_baseline(self) -> bool:
        """Whether it is the engine's defaults."""
        return self.row.name == BASELINE

    @property
    def name(self) -> str:
        """`defaults` or `trial 7`."""
        return "defaults" if self.is_baseline else f"trial {self.row.number}"

    @property
    def measured(self) -> list[TrialRow]:
        """The restarts that have scores."""
        return [row for row in self.restarts if row.state is State.MEASURED and scores_of(row)]

    @property
    def compared(self) -> list[TrialRow]:
        """The measured restarts that mean and spread rest on: those that it is compared in, else all of them."""
        return [row for row in self.measured if self.paired is None or row.restart in self.paired]

    @property
    def failed(self) -> TrialRow | None:
        """The restart that failed; one is enough for a setting to be out."""
        return next((row for row in self.restarts if row.state is State.FAILED), None)

    @property
    def violation(self) -> float | None:
        """The median over the restarts, of an even number the worse of the middle two; None where nothing was measured.

        At most 0 when the SLOs hold: they do in more than half of the restarts.
        """
        found = [row.violation for row in self.measured if row.violation is not None]
        return statistics.median_high(found) if found else None

    @property
    def missed(self) -> int:
        """In how many of the restarts an SLO was missed; where it `holds`, in fewer than half of them."""
        return sum(row.violation is not None and row.violation > 0 for row in self.measured)

    @property
    def ended(self) -> bool:
        """Whether there are restarts enough to speak of it."""
        return self.failed is not None or len(self.measured) >= ENOUGH

    @property
    def holds(self) -> bool:
        """Whether it started every time and meets every SLO."""
        return self.failed is None and self.ended and self.violation is not None and self.violation <= 0

    @property
    def better(self) -> bool:
        """Whether it beats the defaults in some objective, beyond the noise."""
        return any(comparison.better for comparison in self.comparisons)

    def scores(self, objective: int = 0) -> dict[int, float]:
        """Number of the restart to its score."""
        return {row.restart or 0: scores_of(row)[objective] for row in self.measured}

    def mean(self, objective: int = 0) -> float:
        """Of the scores that are compared; raises `StatisticsError` where there are none."""
        return statistics.fmean(scores_of(row)[objective] for row in self.compared)

    def spread(self, objective: int = 0) -> float | None:
        """How much it differs from itself between restarts, as a share; None where that cannot be told."""
        try:
            return spread([scores_of(row)[objective] for row in self.compared])
        except NotComparable:
            return None

    def beside(self, other: Contender) -> Contender:
        """The defaults as they were in the restarts that `other` is compared in."""
        return replace(self, paired=other.paired)


def contenders(rows: Sequence[TrialRow], targets: Targets) -> list[Contender]:
    """What was measured again, the defaults first, each compared with them; empty without verification."""
    found = [_contender(row, rows) for row in rows if row.verifies is None]
    again = sorted((one for one in found if one.restarts), key=lambda one: (not one.is_baseline, one.row.number))
    if not again or not again[0].is_baseline or not _comparable(again[0]):
        return again
    baseline, *finalists = again
    rivals = [one for one in finalists if _comparable(one) and len(one.scores().keys() & baseline.scores().keys()) > 1]
    compared = {
        rival.row.number: replace(rival, comparisons=found, paired=frozenset(rival.scores().keys() & baseline.scores()))
        for rival, found in zip(rivals, _compared(baseline, rivals, targets), strict=True)
    }
    paired = frozenset[int]().union(*(one.paired or () for one in compared.values()))
    return [replace(baseline, paired=paired or None), *(compared.get(one.row.number, one) for one in finalists)]


def started(row: TrialRow, rows: Sequence[TrialRow]) -> TrialRow:
    """The trial that started the row's setting in this run and on the real weights: its first restart, else itself."""
    return next((other for other in rows if other.verifies == row.number and other.state.teaches), row)


def as_good(best: Contender, others: Sequence[Contender], direction: Direction) -> list[Contender]:
    """Those of `others` that cannot be told from `best`."""
    rivals = [one for one in others if len(one.scores().keys() & best.scores().keys()) >= ENOUGH]
    against = compare(best.scores(), [one.scores() for one in rivals], direction) if rivals else []
    return [one for one, comparison in zip(rivals, against, strict=True) if not comparison.worse]


def _contender(row: TrialRow, rows: Sequence[TrialRow]) -> Contender:
    """A lost restart was run again; an interrupted one, or one that the study was to blame for, says nothing."""
    told = (State.MEASURED, State.FAILED)
    again = (one for one in rows if one.verifies == row.number and one.state in told and not one.at_fault)
    return Contender(row, tuple(sorted(again, key=lambda other: (other.restart or 0, other.number))))


def _comparable(one: Contender) -> bool:
    return one.failed is None and len(one.measured) >= ENOUGH


def _compared(baseline: Contender, rivals: Sequence[Contender], targets: Targets) -> list[tuple[Comparison, ...]]:
    """For each rival a comparison for each objective."""
    if not rivals:
        return []
    by_objective = [
        compare(baseline.scores(i), [one.scores(i) for one in rivals], direction, objectives=len(targets))
        for i, (_, direction) in enumerate(targets)
    ]
    return list(zip(*by_objective, strict=True))
