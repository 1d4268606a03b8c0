"""What a failure costs: the four grades of `penalty: {grade: ...}`.

A `Failure` (and, for the published scale, a clock) goes in, one number comes out. The number is a penalty and never a
measurement: it is kept, told and shown apart from scores. Which number reaches the sampler, and as what, is decided
in `tune.tell`.

- `progress` (default): 1 + (1 - p) in (1, 2], where p is the share of a trial's life that was reached, by stage.
- `elapsed`: the published scale by elapsed time and words of the message, kept for comparison with its known faults.
- `infinite`: infinity on the bad side, kept for comparison.
- `ignore`: nothing; the sampler does not hear of the failure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from raytune_autotuner.study.failure import Blame, Failure, Kind
from raytune_autotuner.study.study import Direction, Grade

# Share of the time limit below which a failure costs so much; the last row holds for the rest.
_ELAPSED_SCALE = ((0.20, 1000.0), (0.60, 500.0), (0.95, 200.0), (math.inf, 100.0))
# Words of the lower-cased message and their factor; the first row with a hit decides.
_ELAPSED_WORDS = ((("deploy", "not found"), 1.2), (("oom", "memory"), 1.5), (("connection", "timeout"), 0.8))


def progress_violation(failure: Failure) -> float:
    """The constraint's value of a failed trial, in (1, 2]: above every missed SLO, smaller the further it got.

    >>> from raytune_autotuner.study.failure import Stage
    >>> progress_violation(Failure(Stage.KV_CACHE, Kind.OUT_OF_MEMORY, Blame.PARAMETERS, "", ""))
    1.45
    """
    return 1.0 + (1.0 - failure.progress)


def elapsed_penalty(elapsed_s: float, timeout_s: float, message: str, direction: Direction) -> float:
    """The published scale: negative when maximising, positive when minimising.

    The share of the limit is capped at 1; a limit of 0 counts as used up. Its words are matched anywhere in the
    message, so 'bloom' holds 'oom' and 'timed out' is not 'timeout': that is the scale as published.

    >>> elapsed_penalty(300, 600, "CUDA OOM", "maximize")
    -750.0
    """
    share = min(max(elapsed_s, 0.0) / timeout_s, 1.0) if timeout_s > 0 else 1.0
    base = next(cost for below, cost in _ELAPSED_SCALE if share < below)
    penalty = base * _word_factor(message)
    return -penalty if direction == "maximize" else penalty


def penalty(grade: Grade, failure: Failure, elapsed_s: float, timeout_s: float, direction: Direction) -> float | None:
    """What `failure` costs under `grade`; None where nothing is told: `ignore`, and the environment's fault.

    `infinite` is the only grade that is not finite. `elapsed_s` counts from the trial's start.
    """
    if failure.blame is Blame.ENVIRONMENT or grade == "ignore":
        return None
    if grade == "progress":
        return progress_violation(failure)
    if grade == "elapsed":
        return elapsed_penalty(elapsed_s, timeout_s, _message(failure, timeout_s), direction)
    return -math.inf if direction == "maximize" else math.inf


def elapsed_conflict(penalties: Sequence[float], scores: Sequence[float], direction: Direction) -> str | None:
    """A warning where the published scale ranks a failure at or above a real measurement, else None.

    Happens when minimising anything above 80 to 100 units, such as a latency of 5,000 ms.
    """
    if not penalties or not scores:
        return None
    maximising = direction == "maximize"
    mildest, worst = (max(penalties), min(scores)) if maximising else (min(penalties), max(scores))
    if worst > mildest if maximising else worst < mildest:
        return None
    return (
        f"penalty.grade elapsed ranks a failed trial ({mildest:g}) at or above a measured one ({worst:g}), "
        f"to {direction}: the sampler is drawn to failures. penalty: {{grade: progress}} does not do that."
    )


def _word_factor(message: str) -> float:
    text = (message or "").lower()
    return next((factor for words, factor in _ELAPSED_WORDS if any(word in text for word in words)), 1.0)


def _message(failure: Failure, timeout_s: float) -> str:
    """The proving line; of a deadline one fixed sentence, whatever the log said last."""
    return f"timed out after {_plain(timeout_s)} seconds" if failure.kind is Kind.DEADLINE else failure.evidence


def _plain(seconds: float) -> str:
    return str(int(seconds)) if float(seconds).is_integer() else str(seconds)
