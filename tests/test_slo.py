"""Whether SLOs hold, level by level, and by how much they are missed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.load.workload import levels as load_levels
from raytune_autotuner.score.slo import (
    NO_SLO_VALUE,
    UNMEASURED_EXCESS,
    constraint_value,
    ends_at_first_miss,
    loads,
    max_load_under_slo,
    meets,
    scans_loads,
    total_violation,
)
from raytune_autotuner.study.study import ObjectiveSpec, Workload

TTFT, TPOT = "ttft_ms_p99", "tpot_ms_mean"
LATENCIES = st.floats(0.001, 1e7)
SHARES = st.floats(0, 1)


def asked(slo: Mapping[str, Mapping[str, float]] | None = None, **more: Any) -> ObjectiveSpec:
    limits = {"ttft_ms": {"p99": 500.0}, "tpot_ms": {"mean": 50.0}} if slo is None else slo
    return ObjectiveSpec(**{"maximize": "max_load_under_slo", "slo": limits, **more})


SLO = asked()
ONE = asked({"ttft_ms": {"p99": 500.0}})
ATTAINED = asked(attainment=0.9)


def at_levels(**levels: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}@{label}": value for label, level in levels.items() for name, value in level.items()}


def test_the_violation_is_the_sum_of_the_relative_misses() -> None:
    assert total_violation({TTFT: 750.0, TPOT: 60.0}, SLO) == pytest.approx(0.5 + 0.2)


def test_a_limit_that_is_met_exactly_is_met() -> None:
    assert total_violation({TTFT: 500.0, TPOT: 50.0}, SLO) == 0
    assert constraint_value({TTFT: 500.0, TPOT: 50.0}, SLO) == 0
    assert meets({TTFT: 500.0, TPOT: 50.0}, SLO)


def test_a_met_limit_does_not_make_up_for_a_missed_one() -> None:
    assert total_violation({TTFT: 1.0, TPOT: 60.0}, SLO) == pytest.approx(0.2)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_an_slo_without_a_measurement_is_missed(value: float | None) -> None:
    metrics = {TPOT: 1.0} | ({} if value is None else {TTFT: value})
    assert total_violation(metrics, SLO) == UNMEASURED_EXCESS
    assert 0.99 < constraint_value(metrics, SLO) < 1
    assert not meets(metrics, SLO)
    assert not meets({TTFT: 1.0} if value is None else {"slo_attainment": value}, ATTAINED)


def test_without_an_slo_every_measured_trial_is_feasible() -> None:
    assert constraint_value({}, asked({})) == NO_SLO_VALUE < 0
    assert constraint_value({}, asked({}), ["c1", "c4"]) == NO_SLO_VALUE


def test_the_margin_is_that_of_the_tightest_limit_at_the_worst_level() -> None:
    assert constraint_value({TTFT: 250.0, TPOT: 40.0}, SLO) == pytest.approx(-0.2)
    metrics = at_levels(c1={TTFT: 250.0, TPOT: 20.0}, c4={TTFT: 450.0, TPOT: 20.0})
    assert constraint_value(metrics, SLO, ["c1", "c4"]) == pytest.approx(-0.1)


def test_an_slo_must_hold_at_every_level_and_not_in_their_mean() -> None:
    metrics = {TTFT: 450.0, TPOT: 20.0} | at_levels(c1={TTFT: 100.0, TPOT: 20.0}, c4={TTFT: 800.0, TPOT: 20.0})
    assert total_violation(metrics, SLO, ["c1", "c4"]) == pytest.approx(0.6)


def test_of_each_limit_the_worst_level_counts_and_limits_are_summed() -> None:
    metrics = at_levels(c1={TTFT: 600.0, TPOT: 60.0}, c4={TTFT: 750.0, TPOT: 20.0})
    assert total_violation(metrics, SLO, ["c1", "c4"]) == pytest.approx(0.5 + 0.2)


def test_a_level_without_a_measurement_has_missed() -> None:
    metrics = {TTFT: 100.0, TPOT: 20.0} | at_levels(c1={TTFT: 100.0, TPOT: 20.0})
    assert total_violation(metrics, SLO, ["c1", "c4"]) == 2 * UNMEASURED_EXCESS


@given(st.floats(1e-3, 1e6))
def test_the_violation_is_continuous_at_the_threshold(limit: float) -> None:
    objective = asked({"ttft_ms": {"p99": limit}})
    just_over = constraint_value({TTFT: math.nextafter(limit, math.inf)}, objective)
    assert 0 < just_over < 1e-9
    assert constraint_value({TTFT: limit * (1 + 1e-6)}, objective) < 2e-6
    at_worst = at_levels(c1={TTFT: limit / 2}, c4={TTFT: limit * (1 + 1e-6)})
    assert 0 < constraint_value(at_worst, objective, ["c1", "c4"]) < 2e-6


@given(st.floats(0.01, 1))
def test_attainment_is_continuous_at_its_threshold(share: float) -> None:
    objective = asked(attainment=share)
    assert constraint_value({"slo_attainment": share}, objective) == 0
    assert 0 < constraint_value({"slo_attainment": share * (1 - 1e-6)}, objective) < 2e-6


def test_with_attainment_the_share_of_requests_decides_in_place_of_the_statistics() -> None:
    assert meets({"slo_attainment": 0.9, TTFT: 5000.0}, ATTAINED)
    assert not meets({"slo_attainment": 0.89, TTFT: 1.0, TPOT: 1.0}, ATTAINED)
    assert constraint_value({"slo_attainment": 0.45}, ATTAINED) == pytest.approx(0.5 / 1.5)


@given(LATENCIES, LATENCIES, LATENCIES, LATENCIES)
def test_missing_by_less_at_any_level_is_never_worse(ttft: float, other: float, tpot: float, elsewhere: float) -> None:
    low, high = sorted([ttft, other])
    values = [
        constraint_value(at_levels(c1={TTFT: value, TPOT: tpot}, c4={TTFT: elsewhere, TPOT: tpot}), SLO, ["c1", "c4"])
        for value in (low, high)
    ]
    assert values[0] <= values[1]
    assert all(value <= 0 or 0 < value < 1 for value in values)


@given(SHARES, SHARES, SHARES)
def test_attaining_more_at_any_level_is_never_worse(share: float, other: float, elsewhere: float) -> None:
    low, high = sorted([share, other])
    values = [
        constraint_value(
            at_levels(c1={"slo_attainment": value}, c4={"slo_attainment": elsewhere}), ATTAINED, ["c1", "c4"]
        )
        for value in (high, low)
    ]
    assert values[0] <= values[1] < 1


@given(st.floats(500.01, 1e6), st.floats(1.001, 10))
def test_missing_by_clearly_more_is_worse(ttft: float, times: float) -> None:
    assert constraint_value({TTFT: ttft}, ONE) < constraint_value({TTFT: ttft * times}, ONE)


@given(st.lists(LATENCIES, min_size=1, max_size=5))
def test_a_trial_is_feasible_where_each_of_its_levels_meets(ttfts: list[float]) -> None:
    levels = {f"c{place}": {TTFT: ttft} for place, ttft in enumerate(ttfts)}
    value = constraint_value(at_levels(**levels), ONE, [*levels])
    assert (value <= 0) == all(meets(level, ONE) for level in levels.values())


@pytest.mark.parametrize(("failed", "met"), [(0, True), (1, True), (2, False)])
def test_a_level_with_too_few_samples_for_its_percentile_does_not_meet(failed: int, met: bool) -> None:
    level = {TTFT: 1.0, "requests": 300.0, "requests_failed": float(failed), "slo_attainment": 1.0}
    assert meets(level, ONE) is met
    assert meets(level, ATTAINED)


LOADS = {"c16": 16.0, "c4": 4.0, "c64": 64.0}


@pytest.mark.parametrize(
    ("ttfts", "highest"),
    [
        ({"c4": 100, "c16": 200, "c64": 300}, 64),
        ({"c4": 100, "c16": 500, "c64": 501}, 16),
        ({"c4": 100, "c16": 900, "c64": 300}, 4),
        ({"c4": 600, "c16": 100, "c64": 100}, 0),
        ({"c4": 100, "c16": 200}, 16),
        ({"c4": 100, "c64": 200}, 4),
        ({}, 0),
    ],
)
def test_the_highest_load_is_the_last_one_before_the_first_miss(ttfts: dict[str, float], highest: float) -> None:
    levels = {label: {TTFT: float(ttft)} for label, ttft in ttfts.items()}
    assert max_load_under_slo(levels, LOADS, ONE) == highest


@given(st.lists(LATENCIES, min_size=3, max_size=3), st.integers(0, 2), st.floats(1, 100))
def test_the_highest_load_never_rises_when_a_level_gets_slower(ttfts: list[float], place: int, times: float) -> None:
    before = {label: {TTFT: ttft} for label, ttft in zip(LOADS, ttfts, strict=True)}
    after = before | {list(LOADS)[place]: {TTFT: ttfts[place] * times}}
    assert max_load_under_slo(after, LOADS, ONE) <= max_load_under_slo(before, LOADS, ONE)


@pytest.mark.parametrize("more", [{"concurrency": [16, 4, 64, 4]}, {"request_rate_rps": [2.5, 0.5, 10]}])
def test_load_levels_have_the_workloads_labels_from_the_lowest_up(more: dict[str, Any]) -> None:
    found = loads(workload := Workload(**more))
    assert set(found) == {level.label for level in load_levels(workload)}
    assert list(found.values()) == sorted(found.values())


def test_a_scan_may_end_at_the_first_miss_where_nothing_else_is_asked() -> None:
    assert scans_loads(SLO)
    assert ends_at_first_miss(SLO)
    both = asked(minimize="cost_per_million_tokens")
    assert scans_loads(both)
    assert not ends_at_first_miss(both)
    assert not scans_loads(asked(maximize="output_throughput_tok_s"))
