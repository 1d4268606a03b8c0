"""When a trial that has measured a part of its loads can no longer beat the best one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.score.hopeless import ENOUGH_PAIRS, USUAL_NOISE, WIDTH, Seen, Values, can_be_judged
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import Direction
from tests.studies import BASE, merged

LEVELS = ["c8", "c32"]
values = st.floats(min_value=0.1, max_value=1e6)
trials = st.dictionaries(st.sampled_from(LEVELS), st.lists(values, min_size=1, max_size=4), min_size=1)
whole = st.fixed_dictionaries({level: st.lists(values, min_size=3, max_size=3) for level in LEVELS})


def noise(share: float, sizes: int = 6) -> list[Values]:
    """Trials whose rounds lie `share` apart, so that their spread is known."""
    return [{"c8": [100.0, 100.0 * math.exp(share * math.sqrt(2))]} for _ in range(sizes)]


@pytest.mark.parametrize(
    ("changes", "judged"),
    [
        ({}, False),
        ({"workload": {"rounds": 3}}, True),
        ({"workload": {"concurrency": [8, 32]}}, True),
        ({"workload": {"concurrency": None, "request_rate_rps": [1, 2]}}, True),
        ({"workload": {"rounds": 3}, "objective": {"maximize": None, "minimize": "ttft_ms_p50"}}, False),
        ({"workload": {"concurrency": [8, 32]}, "objective": {"maximize": None, "minimize": "ttft_ms_p50"}}, True),
        ({"workload": {"rounds": 3}, "objective": {"maximize": "output_throughput_tok_s@c8"}}, False),
        ({"workload": {"rounds": 3}, "objective": {"minimize": "ttft_ms_mean"}}, False),
        ({"workload": {"concurrency": [8, 32]}, "objective": {"maximize": "max_load_under_slo"}}, False),
        ({"workload": {"rounds": 3}, "objective": {"maximize": "of_my_own"}}, False),
    ],
)
def test_a_part_tells_about_the_whole_for_one_objective_that_is_a_mean_over_loads(
    changes: dict[str, Any], judged: bool
) -> None:
    raw = merged(BASE, changes)
    raw = {key: _without_none(value) for key, value in raw.items()}
    assert can_be_judged(parse_study(raw)) is judged


def _without_none(value: Any) -> Any:
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def test_what_was_measured_counts_with_three_times_its_uncertainty() -> None:
    assert Seen("maximize", []).bound({"c8": [100.0]}, ["c8"]) == pytest.approx(100 * math.exp(WIDTH * USUAL_NOISE))
    assert Seen("minimize", []).bound({"c8": [100.0]}, ["c8"]) == pytest.approx(100 / math.exp(WIDTH * USUAL_NOISE))


def test_more_rounds_narrow_the_interval() -> None:
    widths = [Seen("maximize", noise(0.05)).bound({"c8": [100.0] * n}, ["c8"]) for n in (1, 2, 3)]
    assert all(width is not None for width in widths)
    assert widths == sorted(widths, key=lambda width: -(width or 0))


def test_a_level_that_is_not_measured_yet_counts_as_the_best_seen_there() -> None:
    others: list[Values] = [{"c8": [10.0], "c32": [40.0]}, {"c8": [11.0], "c32": [60.0]}]
    far = math.exp(WIDTH * USUAL_NOISE)
    assert Seen("maximize", others).bound({"c8": [20.0]}, LEVELS) == pytest.approx((20 * far + 60 * far) / 2)
    assert Seen("minimize", others).bound({"c8": [20.0]}, LEVELS) == pytest.approx((20 / far + 40 / far) / 2)


def test_a_level_that_nobody_has_measured_leaves_everything_open() -> None:
    assert Seen("maximize", [{"c8": [100.0]}]).bound({"c8": [1.0]}, LEVELS) is None
    assert Seen("maximize", []).bound({}, []) is None


def test_a_goodput_of_nothing_so_far_leaves_everything_open() -> None:
    assert Seen("maximize", [{"c8": [1.0, 1.2, 1.1]}]).bound({"c8": [0.0]}, ["c8"]) is None
    assert Seen("maximize", [{"c8": [0.0], "c16": [2.0]}]).bound({"c16": [2.0]}, ["c8", "c16"]) is None
    assert Seen("minimize", [{"c8": [1.0, 1.2, 1.1]}]).bound({"c8": [0.0]}, ["c8"]) == 0


def test_the_usual_noise_is_taken_for_granted_until_enough_was_seen() -> None:
    assert Seen("maximize").noise({}) == USUAL_NOISE
    assert Seen("maximize", noise(0.2, ENOUGH_PAIRS - 1)).noise({}) == USUAL_NOISE
    assert Seen("maximize", noise(0.2, ENOUGH_PAIRS)).noise({}) == pytest.approx(0.2)


def test_levels_that_differ_and_values_of_zero_are_no_noise() -> None:
    assert Seen("maximize", [{"c8": [1.0, 1.0], "c32": [50.0, 50.0]} for _ in range(5)]).noise({}) == 0.0
    assert Seen("maximize", [{"c8": [0.0, 1.0, 1.0]} for _ in range(6)]).noise({}) == 0.0


@given(so_far=trials, others=st.lists(whole, max_size=4), direction=st.sampled_from(["maximize", "minimize"]))
def test_the_bound_is_never_worse_than_what_was_measured_so_far(
    so_far: dict[str, list[float]], others: list[dict[str, list[float]]], direction: Direction
) -> None:
    measured = [sum(found) / len(found) for found in so_far.values()]
    reached = Seen(direction, others).bound(so_far, list(so_far))
    assert reached is not None
    mean = sum(measured) / len(measured)
    assert reached >= mean * (1 - 1e-9) if direction == "maximize" else reached <= mean * (1 + 1e-9)


@given(
    true=st.floats(min_value=1.0, max_value=1e4),
    shifts=st.lists(st.floats(min_value=-1.0, max_value=1.0), min_size=6, max_size=6),
    direction=st.sampled_from(["maximize", "minimize"]),
)
def test_a_trial_within_its_noise_keeps_its_end_within_the_bound(
    true: float, shifts: list[float], direction: Direction
) -> None:
    """Rounds that stray by at most one standard deviation: after any of them the whole is still within reach."""
    rounds = [true * math.exp(0.05 * shift) for shift in shifts]
    whole_mean = sum(rounds) / len(rounds)
    for n in range(1, len(rounds)):
        reached = Seen(direction, noise(0.05, 40)).bound({"c8": rounds[:n]}, ["c8"])
        assert reached is not None
        assert reached >= whole_mean * 0.999 if direction == "maximize" else reached <= whole_mean * 1.001
