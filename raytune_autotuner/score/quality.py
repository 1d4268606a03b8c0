"""How much a setting changes what the model says: perplexity and greedy answers against the baseline's.

Pure values; `load.quality` asks an engine for them. What the limits mean, and what was measured, stands in
docs/quality.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raytune_autotuner.study.study import QualitySpec

_END = None
"""What stands behind an answer's last word, so that an answer that ends early differs from one that goes on."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What an engine made of the fixed text and prompts."""

    perplexity: float
    """Of the fixed text, all its passages pooled: exp of the mean negative log-probability of a token."""
    answers: tuple[str, ...]
    """To the fixed prompts, in their order."""


@dataclass(frozen=True, slots=True)
class QualityLoss:
    """How far a setting is from the baseline."""

    perplexity_rise: float
    """Relative to the baseline's: 0.02 is 2 % more; below 0 where it fell."""
    answer_change: float
    """Share, in [0, 1], of the words at which an answer parts from the baseline's, having been the same until then."""


def perplexity(log_probabilities: Sequence[float]) -> float:
    """Perplexity of a text from the natural log-probabilities of its tokens.

    >>> round(perplexity([-1.0, -3.0]), 3)
    7.389
    """
    if not log_probabilities:
        raise ValueError("Perplexity needs at least one token.")
    return math.exp(-math.fsum(log_probabilities) / len(log_probabilities))


def loss(measured: Quality, reference: Quality) -> QualityLoss:
    """How far `measured` is from `reference`; raises `ValueError` where they do not answer the same prompts."""
    rise = measured.perplexity / reference.perplexity - 1.0
    return QualityLoss(rise, answer_change(measured.answers, reference.answers))


def answer_change(answers: Sequence[str], reference: Sequence[str]) -> float:
    """The chance that a setting writes another word than the baseline, given the same words before.

    An answer that has once parted goes its own way for good, so what follows is not counted: a near tie between two
    words that falls the other way by rounding costs one word and not the rest of the answer.

    >>> answer_change(["one two three"], ["one two four five six"])
    0.3333333333333333
    """
    if not reference or len(answers) != len(reference):
        raise ValueError(f"As many answers as the baseline's are needed, but got {len(answers)} and {len(reference)}.")
    compared = parted = 0
    for pair in zip(answers, reference, strict=True):
        ours, theirs = ([*text.split(), _END] for text in pair)
        same = _same_words(ours, theirs)
        parts = same < max(len(ours), len(theirs))
        compared, parted = compared + same + parts, parted + parts
    return parted / compared


def _same_words(ours: Sequence[str | None], theirs: Sequence[str | None]) -> int:
    """How many words the two have in common before they part, the end of both counted as one."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((index for index, (our, their) in pairs if our != their), min(len(ours), len(theirs)))


def judge(loss: QualityLoss, spec: QualitySpec) -> str | None:
    """What is wrong with it in one sentence; None where the setting keeps both limits."""
    if not loss.perplexity_rise <= spec.max_perplexity_rise:
        return (
            f"the perplexity of a fixed text is {loss.perplexity_rise:.2%} above the baseline's, "
            f"with quality.max_perplexity_rise at {spec.max_perplexity_rise:.2%}"
        )
    if not loss.answer_change <= spec.max_answer_change:
        return (
            f"{loss.answer_change:.1%} of the words of greedy answers part from the baseline's, "
            f"with quality.max_answer_change at {spec.max_answer_change:.1%}"
        )
    return None
