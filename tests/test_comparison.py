"""The arithmetic of a verdict: quantiles, intervals, error rates."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raytune_autotuner.score.comparison import (
    Comparison,
    NotComparable,
    Restarts,
    compare,
    restarts_needed,
    spread,
    t_distribution,
    t_quantile,
    too_noisy,
)
from raytune_autotuner.study.study import Direction

BOTH: tuple[Direction, ...] = ("maximize", "minimize")
SCORES = st.floats(0.1, 1e6)
BASELINE = (100.0, 97.0, 103.0, 99.0, 101.0)


def numbered(scores: Sequence[float]) -> Restarts:
    return dict(enumerate(scores))


def one(baseline: Sequence[float], finalist: Sequence[float], direction: Direction = "maximize") -> Comparison:
    return compare(numbered(baseline), [numbered(finalist)], direction)[0]


def noisy(source: random.Random, worth: float, noise: float, restarts: int) -> list[float]:
    return [worth * math.exp(source.gauss(0.0, noise)) for _ in range(restarts)]


def share_of_claims(worths: Sequence[float], noises: Sequence[float], restarts: int, studies: int) -> float:
    """How often some finalist is called better; the first of `worths` is the baseline's."""
    source, claims = random.Random(1), 0
    for _ in range(studies):
        first, *others = (noisy(source, w, s, restarts) for w, s in zip(worths, noises, strict=True))
        claims += any(c.better for c in compare(numbered(first), [numbered(other) for other in others], "maximize"))
    return claims / studies


# Student's t


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 4, 2.77645),
        (0.975, 8, 2.30600),
        (0.975, 30, 2.04227),
        (0.975, 120, 1.97993),
        (0.995, 4, 4.60409),
        (0.995, 5, 4.03214),
        (0.9995, 3, 12.9240),
        (0.9, 10, 1.37218),
        (0.95, 1, 6.31375),
    ],
)
def test_the_quantiles_are_the_published_ones(probability: float, degrees: int, value: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(value, rel=1e-5)
    assert t_quantile(1 - probability, degrees) == pytest.approx(-value, rel=1e-5)


@given(st.floats(0.001, 0.9999), st.integers(1, 3000))
def test_the_quantile_is_the_reverse_of_the_distribution(probability: float, degrees: int) -> None:
    assert t_distribution(t_quantile(probability, degrees), degrees) == pytest.approx(probability, abs=1e-11)


def test_the_quantiles_are_those_of_scipy_where_it_is_installed() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 7, 8, 15, 64, 999, 4995):
        for probability in (0.5, 0.8, 0.95, 0.975, 0.9875, 0.99875, 0.99999):
            assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 4), (1.0, 4), (float("nan"), 4), (0.9, 0)])
def test_a_quantile_that_does_not_exist_is_refused(probability: float, degrees: int) -> None:
    with pytest.raises(NotComparable, match="must hold"):
        t_quantile(probability, degrees)


# One finalist


def test_one_finalist_is_judged_by_a_paired_t_on_logarithms() -> None:
    stats = pytest.importorskip("scipy.stats")
    finalist = [111.0, 104.0, 115.0, 109.0, 108.0]
    found = one(BASELINE, finalist)
    logs = [math.log(b / a) for a, b in zip(BASELINE, finalist, strict=True)]
    low, high = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.expm1(low), math.expm1(high)))
    assert found.gain == pytest.approx(math.expm1(sum(logs) / 5))
    assert (found.pairs, found.degrees, found.better, found.worse) == (5, 4, True, False)


def test_less_is_a_gain_when_minimising() -> None:
    found = one(BASELINE, [0.8 * score for score in BASELINE], "minimize")
    assert (found.gain, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    assert found.better
    assert one(BASELINE, [1.25 * score for score in BASELINE], "minimize").gain == pytest.approx(-0.25)


def test_what_drifts_for_all_alike_is_no_noise() -> None:
    drifting = [100.0, 90.0, 81.0, 73.0, 66.0]
    found = one(drifting, [1.05 * score for score in drifting])
    assert found.noise == pytest.approx(0, abs=1e-12)
    assert found.better


def test_scores_in_steps_that_repeat_themselves_are_not_told_apart_for_certain() -> None:
    assert not one([8.0, 8.0], [9.0, 9.0]).better  # 8.9 and 9.0 requests in flight, for all that is known
    found = one([8.0] * 5, [9.0] * 5)
    assert found.better
    assert found.deviation == pytest.approx(math.log(9 / 8) / math.sqrt(6))
    assert one([100.0, 100.1], [120.0, 120.1]).deviation == pytest.approx(0, abs=1e-3)


def test_equal_scores_are_no_gain() -> None:
    for direction in BOTH:
        found = one([5.0] * 3, [5.0] * 3, direction)
        assert (found.gain, found.low, found.high, found.better, found.worse) == (0, 0, 0, False, False)


@given(st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=8), st.sampled_from(BOTH), st.floats(0.01, 100))
def test_the_unit_of_a_metric_does_not_matter(
    pairs: list[tuple[float, float]], direction: Direction, unit: float
) -> None:
    (ours, theirs) = zip(*pairs, strict=True)
    plain, scaled = one(ours, theirs, direction), one([unit * s for s in ours], [unit * s for s in theirs], direction)
    assert scaled.difference == pytest.approx(plain.difference, abs=1e-9)
    assert scaled.half_width == pytest.approx(plain.half_width, rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=8), st.sampled_from(BOTH))
def test_the_gain_lies_in_its_interval_and_the_reverse_comparison_has_the_opposite_sign(
    pairs: list[tuple[float, float]], direction: Direction
) -> None:
    ours, theirs = zip(*pairs, strict=True)
    found, reverse = one(ours, theirs, direction), one(theirs, ours, direction)
    assert found.low <= found.gain <= found.high
    assert reverse.difference == pytest.approx(-found.difference)
    assert (found.better, found.worse) == (reverse.worse, reverse.better)


@given(st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=8), st.floats(1.01, 2))
def test_a_better_score_never_makes_the_gain_smaller(pairs: list[tuple[float, float]], factor: float) -> None:
    ours, theirs = zip(*pairs, strict=True)
    raised = [theirs[0] * factor, *theirs[1:]]
    assert one(ours, raised).gain > one(ours, theirs).gain
    assert one(ours, raised, "minimize").gain < one(ours, theirs, "minimize").gain


@given(st.lists(st.tuples(SCORES, SCORES), min_size=2, max_size=8), st.integers(1, 6))
def test_more_finalists_and_objectives_make_an_interval_wider(pairs: list[tuple[float, float]], more: int) -> None:
    ours, theirs = (numbered(scores) for scores in zip(*pairs, strict=True))
    (alone,), (chosen,) = (compare(ours, [theirs], "maximize", objectives=n) for n in (1, 1 + more))
    assume(alone.half_width > 0)
    assert chosen.half_width > alone.half_width
    assert chosen.difference == alone.difference


# Several finalists


def test_the_noise_of_all_settings_is_pooled_but_never_less_than_a_pairs_own() -> None:
    quiet, loud = [104.0, 101.0, 107.0, 103.2, 104.9], [104.0, 131.0, 80.0, 120.0, 90.0]
    calm, rough = compare(numbered(BASELINE), [numbered(quiet), numbered(loud)], "maximize")
    assert (calm.degrees, calm.choices) == (8, 2)
    assert calm.deviation > one(BASELINE, quiet).deviation
    assert rough.deviation == pytest.approx(one(BASELINE, loud).deviation)


def test_restarts_that_only_some_settings_have_are_left_out_of_the_pairs_that_lack_them() -> None:
    some = {0: 110.0, 1: 107.0, 4: 111.0}
    short, full = compare(numbered(BASELINE), [some, numbered([s * 1.1 for s in BASELINE])], "maximize")
    assert (short.pairs, full.pairs, full.degrees) == (3, 5, 4)


def test_two_settings_with_hardly_a_restart_in_common_are_still_compared_with_the_baseline() -> None:
    first, second = compare(numbered(BASELINE), [{0: 110.0, 1: 108.0}, {2: 111.0, 3: 109.0}], "maximize")
    assert (first.pairs, first.degrees, second.pairs) == (2, 1, 2)


@pytest.mark.parametrize("restarts", [3, 5])
def test_where_nothing_differs_few_studies_claim_a_gain(restarts: int) -> None:
    assert share_of_claims([100.0] * 3, [0.03] * 3, restarts, 1000) < 0.03


@pytest.mark.parametrize("noises", [(0.09, 0.03, 0.03), (0.03, 0.09, 0.03), (0.03, 0.5, 0.03), (0.5, 0.03, 0.03)])
def test_a_setting_that_is_noisier_than_the_others_claims_no_more(noises: tuple[float, ...]) -> None:
    assert share_of_claims([100.0] * 3, noises, 5, 1000) < 0.05


def test_a_gain_of_ten_percent_is_mostly_found_by_five_restarts() -> None:
    assert share_of_claims([100.0, 110.0, 100.0], [0.0316] * 3, 5, 500) > 0.85


def test_the_intervals_hold_the_true_gains_as_often_as_they_say() -> None:
    source, held = random.Random(2), 0
    for _ in range(1000):
        settings = [numbered(noisy(source, worth, 0.03, 5)) for worth in (100.0, 104.0, 96.0)]
        up, down = compare(settings[0], settings[1:], "maximize")
        held += up.low <= 0.04 <= up.high and down.low <= -0.04 <= down.high
    assert 0.94 < held / 1000 < 0.99


# Scores without a logarithm


def test_scores_of_zero_are_compared_as_shares_of_the_baselines_mean() -> None:
    found = one([10.0, 0.0, 11.0, 9.0], [20.0, 21.0, 19.0, 20.0])
    assert found.scale == "share"
    assert found.gain == pytest.approx(12.5 / 7.5)


def test_a_baseline_of_zero_gives_a_difference_in_the_metrics_own_unit() -> None:
    found = one([0.0, 0.0, 0.0], [5.0, 5.2, 4.8])
    assert (found.scale, found.better) == ("difference", True)
    assert found.gain == pytest.approx(5.0)
    assert too_noisy(one([0.0, 0.0], [1.0, -1.0])) is None


def test_negative_scores_keep_their_direction() -> None:
    assert one([-10.0, -11.0, -9.0], [-5.0, -5.5, -4.5]).gain == pytest.approx(0.5)
    assert one([-10.0, -11.0, -9.0], [-5.0, -5.5, -4.5], "minimize").gain == pytest.approx(-0.5)


# What cannot be compared


@pytest.mark.parametrize(
    ("baseline", "finalist", "message"),
    [
        ({0: 1.0}, {0: 1.0}, "two restarts or more"),
        ({0: 1.0, 1: 2.0}, {1: 1.0, 2: 2.0}, "but got 1"),
        ({0: 1.0, 1: math.nan}, {0: 1.0, 1: 2.0}, "restart 1: a score is a finite number, but got nan"),
        ({0: 1.0, 1: 1.0}, {0: 1.0, 1: math.inf}, "but got inf"),
    ],
)
def test_what_cannot_be_compared_is_refused(baseline: Restarts, finalist: Restarts, message: str) -> None:
    with pytest.raises(NotComparable, match=message):
        compare(baseline, [finalist], "maximize")


# The noise of the machine


def test_the_spread_is_a_share_of_the_mean() -> None:
    assert spread([97.0, 100.0, 103.0]) == pytest.approx(0.03)
    assert spread([0.0, 0.0]) == 0.0


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, math.nan], [-1.0, 1.0]])
def test_a_spread_of_nothing_is_refused(scores: list[float]) -> None:
    with pytest.raises(NotComparable, match="must hold"):
        spread(scores)


def undecided(gain: float, noise: float) -> Comparison:
    """Five restarts that came out with `gain` between settings that differ from themselves by `noise`."""
    pattern = [noise * z * math.sqrt(10 / 7) for z in (-1.0, 0.5, 1.0, -1.0, 0.5)]
    return one([100.0] * 5, [100 * (1 + gain) * math.exp(z) for z in pattern])


def test_a_quiet_machine_is_no_cause_for_a_warning() -> None:
    assert too_noisy(undecided(0.0, 0.01)) is None
    assert too_noisy(undecided(0.3, 0.03)) is None


def test_where_five_percent_could_not_be_told_the_restarts_needed_are_named() -> None:
    found = too_noisy(undecided(0.01, 0.10))
    assert found is not None
    assert found.gain == pytest.approx(0.05)
    assert found.restarts is not None
    assert found.restarts > 20


def test_where_a_larger_gain_was_found_it_is_that_one_that_should_be_decided() -> None:
    found = too_noisy(undecided(0.12, 0.12))
    assert found is not None
    assert found.gain == pytest.approx(0.12, abs=0.01)


def test_the_restarts_named_do_find_such_a_gain() -> None:
    measured = undecided(0.02, 0.06)
    needed = restarts_needed(measured, math.log1p(0.05))
    assert needed is not None
    source, found = random.Random(3), 0
    for _ in range(400):
        settings = [[100 * math.exp(source.gauss(0.0, measured.noise)) for _ in range(needed)] for _ in range(2)]
        found += one(settings[0], [1.05 * score for score in settings[1]]).better
    assert 0.72 < found / 400 < 0.9


def test_a_hopeless_machine_is_told_as_such() -> None:
    assert restarts_needed(undecided(0.0, 3.0), 0.01) is None
