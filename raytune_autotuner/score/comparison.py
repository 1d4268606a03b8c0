"""Whether a setting is better than the defaults: scores of several engine starts of each, told from their noise.

In: a score a restart, of the baseline and of every finalist. Restarts of one number were run side by side with the
same seeds, so what drifts on the machine is common to them and drops out of their difference. Out: the gain of each
finalist with its interval. Pure arithmetic on numbers; it knows no trial and no study.

The interval is Student's, over the differences of the logarithms of paired scores, at a level that is split among
the finalists (Bonferroni). Its noise is pooled over all settings that were restarted together, which three to six
scores each can hardly tell alone, but is never taken to be less than the pair's own: so one noisy setting does not
hide among quiet ones. `docs/measuring.md` has the error rates.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, TypeAlias

from raytune_autotuner.study.errors import AutotunerError
from raytune_autotuner.study.study import Direction

Restarts: TypeAlias = Mapping[int, float]
"""Number of the restart to the score that was measured in it."""
Scale: TypeAlias = Literal["ratio", "share", "difference"]
"""Differences of what: logarithms; scores over the baseline's mean; scores in the metric's own unit.

`share` where a score is not positive and so has no logarithm, `difference` where the baseline's mean is 0 too.
"""

CONFIDENCE = 0.95
RELEVANT_GAIN = 0.05
"""A machine on which a gain of this size cannot be told from noise is called too noisy."""
POWER = 0.8
"""How often a gain of the stated size is to be found by the number of restarts that is asked for."""
MAX_RESTARTS = 1000
_TOLERANCE = 1e-12


class NotComparable(AutotunerError):
    """The scores do not allow a comparison: too few of them, or values that are no numbers."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finalist against the baseline. Positive is better, whichever way the metric is optimised."""

    difference: float
    """Mean difference of the paired scores, on `scale`."""
    half_width: float
    """Of its interval, on `scale`."""
    deviation: float
    """Standard deviation of one pair's difference, on `scale`."""
    pairs: int
    degrees: int
    """Degrees of freedom of `deviation`: more than pairs - 1 where it is pooled over several finalists."""
    choices: int = 1
    """How many gains the recommendation chooses from, over finalists and objectives: the wider is each interval."""
    confidence: float = CONFIDENCE
    """That all intervals of the choice hold their true gains."""
    direction: Direction = "maximize"
    scale: Scale = "ratio"
    rounding: float = 0.0
    """The part of `deviation` that comes of scores in steps, whether or not they differ between restarts."""

    @property
    def in_steps(self) -> bool:
        """Whether the scores differ so little between restarts that only the width of their steps is in the way."""
        return 0 < self.deviation <= self.rounding

    @property
    def gain(self) -> float:
        """By which share of the baseline's score it is better: 0.1 is 10 % more, or less when minimising.

        On scale `difference` it is in the metric's own unit, as are `low` and `high`.
        """
        return self._as_gain(self.difference)

    @property
    def low(self) -> float:
        """Lower end of the gain's interval."""
        return self._as_gain(self.difference - self.half_width)

    @property
    def high(self) -> float:
        """Upper end of the gain's interval."""
        return self._as_gain(self.difference + self.half_width)

    @property
    def noise(self) -> float:
        """Standard deviation of one setting's scores between restarts, what is common to a pair taken off."""
        return self.deviation / math.sqrt(2)

    @property
    def better(self) -> bool:
        """Whether the whole interval lies on the good side of 0."""
        return self.difference - self.half_width > 0

    @property
    def worse(self) -> bool:
        """Whether the whole interval lies on the bad side of 0."""
        return self.difference + self.half_width < 0

    def _as_gain(self, difference: float) -> float:
        if self.scale != "ratio":
            return difference
        return math.expm1(difference) if self.direction == "maximize" else -math.expm1(-difference)


@dataclass(frozen=True, slots=True)
class TooNoisy:
    """An undecided comparison that so few restarts could hardly decide."""

    gain: float
    """The gain that could not be told from noise, as `Comparison.gain`."""
    restarts: int | None
    """About how many restarts would find it in four of five studies; None: more than `MAX_RESTARTS`."""


def compare(
    baseline: Restarts,
    finalists: Sequence[Restarts],
    direction: Direction,
    objectives: int = 1,
    confidence: float = CONFIDENCE,
) -> list[Comparison]:
    """Each finalist against the baseline, paired by restart.

    With several `objectives` it is called once for each, and a finalist may be chosen for any of them.

    Raises `NotComparable` where a finalist shares fewer than two restarts with the baseline, or a score is not finite.
    """
    _check(baseline, finalists)
    scale = _scale(baseline, finalists)
    first, *others = (_transformed(scores, baseline, direction, scale) for scores in (baseline, *finalists))
    pooled, least = _pooled([first, *others]), _rounding([first, *others])
    stated = (objectives * len(finalists), confidence, direction, scale)
    return [
        Comparison(*_estimate(_differences(first, scores), pooled, least, *stated[:2]), *stated, math.sqrt(least))
        for scores in others
    ]


def spread(scores: Sequence[float]) -> float:
    """How much a setting differs from itself between restarts: the standard deviation as a share of the mean.

    >>> round(spread([97.0, 100.0, 103.0]), 3)
    0.03

    Raises `NotComparable` for fewer than two scores, and for a mean of 0 that not all of them have.
    """
    if len(scores) < 2 or not all(map(math.isfinite, scores)):
        raise NotComparable(f"`two finite scores or more` must hold for a spread, but got ({list(scores)}).")
    deviation, mean = statistics.stdev(scores), statistics.fmean(scores)
    if deviation and not mean:
        raise NotComparable(f"`mean != 0` must hold for a relative spread, but got ({list(scores)}).")
    return deviation / abs(mean) if deviation else 0.0


def too_noisy(comparison: Comparison) -> TooNoisy | None:
    """The gain that an undecided comparison should have decided but could not: what was found, or 5 % if that is more.

    None where it was decided, or where so large a gain would have shown.
    """
    wanted = max(comparison.difference, _relevant(comparison))
    if comparison.better or comparison.worse or not 0 < wanted < comparison.half_width:
        return None
    return TooNoisy(comparison._as_gain(wanted), restarts_needed(comparison, wanted))


def restarts_needed(comparison: Comparison, difference: float) -> int | None:
    """The fewest restarts that find a true `difference` (on the comparison's scale) with probability `POWER`.

    By this comparison's noise, which is itself an estimate. None: more than `MAX_RESTARTS`.
    """
    low, high = 1, MAX_RESTARTS
    if not _finds(comparison, difference, high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _finds(comparison, difference, middle) else (middle, high)
    return high


@lru_cache(maxsize=4096)
def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution.

    >>> round(t_quantile(0.975, 4), 3)
    2.776
    """
    if not (0 < probability < 1 and degrees >= 1):
        raise NotComparable(f"`0 < probability < 1 <= degrees` must hold, but got ({probability=}, {degrees=}).")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    # Beyond the median the distribution function is concave and t's quantile lies beyond the normal one. So Newton's
    # steps from there all go up, until nothing is left of them but rounding.
    value = statistics.NormalDist().inv_cdf(probability)
    while (step := _newton_step(value, probability, degrees)) > _TOLERANCE * value:
        value += step
    return value


def t_distribution(value: float, degrees: int) -> float:
    """Probability of at most `value` under Student's t, by the finite series for whole degrees of freedom."""
    angle = math.atan2(value, math.sqrt(degrees))
    square = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(1 + odd, degrees - 2, 2):
        term *= square * k / (k + 1)
        total += term
    within = math.sin(angle) * total
    return 0.5 + ((angle + within) / math.pi if odd else within / 2)


def _newton_step(value: float, probability: float, degrees: int) -> float:
    return (probability - t_distribution(value, degrees)) / _t_density(value, degrees)


def _t_density(value: float, degrees: int) -> float:
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    return math.exp(log_scale - (degrees + 1) / 2 * math.log1p(value * value / degrees))


def _check(baseline: Restarts, finalists: Sequence[Restarts]) -> None:
    for scores in (baseline, *finalists):
        for restart, score in scores.items():
            if not math.isfinite(score):
                raise NotComparable(f"restart {restart}: a score is a finite number, but got {score}.")
    for index, scores in enumerate(finalists):
        if len(common := scores.keys() & baseline.keys()) < 2:
            raise NotComparable(
                f"finalist {index}: two restarts or more in common with the baseline are needed, but got {len(common)}."
            )


def _scale(baseline: Restarts, finalists: Sequence[Restarts]) -> Scale:
    if all(score > 0 for scores in (baseline, *finalists) for score in scores.values()):
        return "ratio"
    return "share" if statistics.fmean(baseline.values()) else "difference"


def _transformed(scores: Restarts, baseline: Restarts, direction: Direction, scale: Scale) -> dict[int, float]:
    """The scores so that their differences are on `scale`, larger being better."""
    sign = 1.0 if direction == "maximize" else -1.0
    if scale == "ratio":
        return {restart: sign * math.log(score) for restart, score in scores.items()}
    unit = abs(statistics.fmean(baseline.values())) if scale == "share" else 1.0
    return {restart: sign * score / unit for restart, score in scores.items()}


def _differences(baseline: Restarts, scores: Restarts) -> list[float]:
    return [scores[restart] - baseline[restart] for restart in sorted(scores.keys() & baseline.keys())]


def _pooled(settings: Sequence[Restarts]) -> tuple[float, int]:
    """Variance of a pair's difference over the restarts that all settings share, and its degrees of freedom.

    What is left of the scores once each restart's and each setting's own mean are taken off.
    """
    common = sorted(set.intersection(*(set(scores) for scores in settings)))
    degrees = (len(common) - 1) * (len(settings) - 1)
    if degrees < 1:
        return 0.0, 0
    of_restart = {restart: statistics.fmean(scores[restart] for scores in settings) for restart in common}
    rest = [[scores[restart] - of_restart[restart] for restart in common] for scores in settings]
    squares = sum((value - statistics.fmean(row)) ** 2 for row in rest for value in row)
    return 2 * squares / degrees, degrees


def _rounding(settings: Sequence[Restarts]) -> float:
    """Variance of a pair's difference that comes of scores in steps, such as a number of requests in flight.

    Only such scores are ever equal. A step is the smallest difference between two of them; a score is right to within
    half of it, evenly spread. Without this, scores that fall on the same steps by luck would be told apart for certain.
    """
    scores = sorted(score for restarts in settings for score in restarts.values())
    steps = [later - earlier for earlier, later in pairwise(scores)]
    wide = [step for step in steps if step > _TOLERANCE]
    return 2 * min(wide) ** 2 / 12 if wide and len(wide) < len(steps) else 0.0


def _estimate(
    differences: Sequence[float], pooled: tuple[float, int], least: float, choices: int, confidence: float
) -> tuple[float, float, float, int, int]:
    """A comparison's difference, half width, deviation, pairs and degrees of freedom."""
    pairs = len(differences)
    variance = max(statistics.variance(differences), pooled[0], least)
    degrees = max(pairs - 1, pooled[1])
    half_width = _quantile(confidence, choices, degrees) * math.sqrt(variance / pairs)
    return statistics.fmean(differences), half_width, math.sqrt(variance), pairs, degrees


def _quantile(confidence: float, choices: int, degrees: int) -> float:
    return t_quantile(1 - (1 - confidence) / (2 * choices), degrees)


def _finds(comparison: Comparison, difference: float, restarts: int) -> bool:
    degrees = max(comparison.degrees // (comparison.pairs - 1), 1) * (restarts - 1)
    quantiles = _quantile(comparison.confidence, comparison.choices, degrees) + t_quantile(POWER, degrees)
    return quantiles * comparison.deviation / math.sqrt(restarts) <= difference


def _relevant(comparison: Comparison) -> float:
    """`RELEVANT_GAIN` on the comparison's scale; 0 where it has no meaning there."""
    if comparison.scale != "ratio":
        return RELEVANT_GAIN if comparison.scale == "share" else 0.0
    return math.log1p(RELEVANT_GAIN) if comparison.direction == "maximize" else -math.log1p(-RELEVANT_GAIN)
