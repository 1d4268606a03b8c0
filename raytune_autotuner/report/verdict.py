"""Which setting to run: the winner of a study's rows, its gain over the baseline, and one sentence about it.

Pure: rows in, verdict out. It rests on one measurement a setting and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raytune_autotuner.study.space import Params, format_value
from raytune_autotuner.study.trial import BASELINE, State, TrialRow

Direction = Literal["maximize", "minimize"]
_DEFAULT = object()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The study's answer."""

    winner: TrialRow | None
    """The setting to run; the baseline's row where nothing beats it; None where nothing was measured."""
    baseline: TrialRow | None
    gain: float | None
    """By which share of the baseline's score the winner is better, in either direction; 0.43 is 43 % better."""
    sentence: str

    @property
    def keeps_defaults(self) -> bool:
        """Whether the engine's defaults are the answer."""
        return self.winner is not None and self.winner.name == BASELINE


def verdict(
    rows: Sequence[TrialRow], direction: Direction, metric: str = "score", fixed: Params | None = None
) -> Verdict:
    """The best feasible measured row, else the least violating one, else none.

    Of equal scores the one with fewer changes against the `fixed` arguments wins, and the baseline before all.
    """
    # The last one: a baseline that was lost has been run again.
    baseline = next((row for row in reversed(rows) if row.name == BASELINE), None)
    measured = [row for row in rows if row.state is State.MEASURED and row.score is not None]
    if not measured:
        return Verdict(None, baseline, None, _nothing_measured(rows))
    feasible = [row for row in measured if row.feasible]
    winner = min(feasible or measured, key=lambda row: _rank(row, direction, bool(feasible), fixed or {}))
    gain = _gain(winner, baseline, direction)
    if not feasible:
        return Verdict(winner, baseline, gain, _none_feasible(winner, metric, len(measured)))
    return Verdict(winner, baseline, gain, _sentence(winner, baseline, gain, metric, len(measured)))


def best_so_far(rows: Iterable[TrialRow], direction: Direction) -> TrialRow | None:
    """The feasible row with the best score."""
    feasible = [row for row in rows if row.feasible and row.score is not None]
    return min(feasible, key=lambda row: _rank(row, direction, True, {})) if feasible else None


def changes(params: Params, fixed: Params) -> dict[str, Any]:
    """The parameters of a setting that differ from the baseline's arguments."""
    return {name: value for name, value in params.items() if fixed.get(name, _DEFAULT) != value}


def describe_params(params: Params) -> str:
    """`{max-num-seqs: 8, block-size: 64}`."""
    return "{" + ", ".join(f"{name}: {format_value(value)}" for name, value in params.items()) + "}"


def format_number(value: float) -> str:
    """Four significant digits, whole numbers whole.

    >>> format_number(126.4412), format_number(0.04321), format_number(12345.6)
    ('126.4', '0.04321', '12,346')
    """
    if value == 0 or not abs(value) < float("inf"):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _rank(row: TrialRow, direction: Direction, feasible: bool, fixed: Params) -> tuple[float, float, bool, int, int]:
    """Smaller is better."""
    score = row.score if row.score is not None else float("nan")
    violation = 0.0 if feasible or row.violation is None else row.violation
    cost = -score if direction == "maximize" else score
    return (violation, cost, row.name != BASELINE, len(changes(row.params, fixed)), row.number)


def _gain(winner: TrialRow, baseline: TrialRow | None, direction: Direction) -> float | None:
    if baseline is None or not baseline.score or winner.score is None:
        return None
    change = (winner.score - baseline.score) / abs(baseline.score)
    return change if direction == "maximize" else -change


def _sentence(winner: TrialRow, baseline: TrialRow | None, gain: float | None, metric: str, measured: int) -> str:
    value = f"{metric} {format_number(winner.score or 0.0)}"
    if winner.name == BASELINE:
        others = (
            "it was the only setting measured" if measured == 1 else f"none of {measured - 1} other settings beat it"
        )
        return f"Keep the defaults: {value}, {others}. Each was measured once."
    caution = "Each was measured once, so a small gain may be noise."
    if baseline is None or baseline.state is not State.MEASURED or baseline.score is None:
        return f"Run trial {winner.number}: {value}; the defaults have no score to compare it with. Measured once."
    defaults = f"{format_number(baseline.score)} with the defaults"
    if not baseline.feasible:
        return f"Run trial {winner.number}: {value} and every SLO met; the defaults miss one ({defaults}). {caution}"
    share = "" if gain is None else f", {100 * gain:.3g} % better (x{(winner.score or 0.0) / baseline.score:.2f})"
    return f"Run trial {winner.number}: {value} against {defaults}{share}. {caution}"


def _none_feasible(winner: TrialRow, metric: str, measured: int) -> str:
    who = "the defaults come" if winner.name == BASELINE else f"trial {winner.number} comes"
    settings = "The one setting measured misses" if measured == 1 else f"All {measured} settings measured miss"
    return (
        f"{settings} an SLO; {who} closest (violation {format_number(winner.violation or 0.0)}, "
        f"{metric} {format_number(winner.score or 0.0)}). Relax the SLO or lower the load. Each was measured once."
    )


def _nothing_measured(rows: Sequence[TrialRow]) -> str:
    failed = sum(row.state is State.FAILED for row in rows)
    if not failed:
        return "Nothing was measured: no trial ended. Run the study again, with more time."
    trials = "the only trial" if failed == 1 else f"all {failed} trials"
    return (
        f"Nothing was measured: {trials} failed. Follow the remedies of the failures, then lower the load, "
        "lengthen trial.timeout_s or narrow search_space to safer ranges."
    )
