"""Metrics from records: definitions, and what must hold whatever the records are."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raytune_autotuner.load.engine_metrics import Sample
from raytune_autotuner.load.engine_metrics import summarize as summarize_engine
from raytune_autotuner.score.metrics import (
    CONFIDENCE,
    ENGINE_METRICS,
    LATENCIES,
    METRICS,
    STATISTICS,
    EmptySample,
    combine,
    cost_metrics,
    energy_metrics,
    is_metric,
    samples_needed,
    summarize,
)
from raytune_autotuner.score.records import Phase, RequestRecord, duration_s, measured

SLO = {"ttft_ms": {"p90": 500.0}, "tpot_ms": {"mean": 50.0}, "e2el_ms": {"p99": 5_000.0}}


def record(
    times: list[float],
    index: int = 0,
    tokens_out: int | None = None,
    scheduled: float = 0.0,
    error: str | None = None,
    level: str = "c4",
    round: int = 0,
    phase: Phase = "measure",
) -> RequestRecord:
    return RequestRecord(
        index=index,
        level=level,
        round=round,
        phase=phase,
        scheduled_s=scheduled,
        sent_s=scheduled,
        first_token_s=times[0] if times else None,
        end_s=times[-1] if times else scheduled,
        token_times_s=tuple(times),
        tokens_in=10,
        tokens_out=len(times) if tokens_out is None else tokens_out,
        tokens_out_wanted=max(len(times), 1),
        error=error,
    )


@st.composite
def answers(draw: st.DrawFn, min_tokens: int = 1) -> RequestRecord:
    scheduled = draw(st.floats(0, 10))
    gaps = draw(st.lists(st.floats(1e-4, 2), min_size=min_tokens, max_size=6))
    times = [scheduled + float(total) for total in np.cumsum(gaps)]
    return record(times, scheduled=scheduled)


failures = st.builds(lambda times: record(sorted(times), error="boom"), st.lists(st.floats(0, 1), max_size=3))
loads = st.lists(answers() | failures, min_size=1, max_size=12).filter(lambda load: any(r.ok for r in load))


def test_latencies_follow_the_fields_definitions() -> None:
    metrics = summarize([record([1.2, 1.3, 1.5], scheduled=1.0)], 2.0)
    assert metrics["ttft_ms_mean"] == pytest.approx(200)
    assert metrics["e2el_ms_p99"] == pytest.approx(500)
    assert metrics["tpot_ms_p50"] == pytest.approx((500 - 200) / 2)
    assert metrics["itl_ms_mean"] == pytest.approx(150)
    assert metrics["itl_ms_p50"] == pytest.approx(150)


def test_throughput_counts_the_servers_tokens_of_completed_requests() -> None:
    load = [record([0.1, 0.2], tokens_out=8), record([0.1, 0.2]), record([0.1] * 5, error="reset")]
    metrics = summarize(load, 4.0)
    assert metrics["output_throughput_tok_s"] == 10 / 4
    assert metrics["input_throughput_tok_s"] == 20 / 4
    assert metrics["total_throughput_tok_s"] == 30 / 4
    assert metrics["request_throughput_rps"] == 2 / 4
    assert metrics["failed_share"] == pytest.approx(1 / 3)
    assert (metrics["requests"], metrics["requests_failed"]) == (3, 1)
    assert (metrics["tokens_in"], metrics["tokens_out"], metrics["duration_s"]) == (20, 10, 4.0)


def test_a_failed_request_is_in_no_latency() -> None:
    good = record([0.5, 0.7])
    with_failure = summarize([good, record([0.01, 0.02], error="cut short")], 1.0)
    alone = summarize([good], 1.0)
    assert all(with_failure[f"{name}_{s}"] == alone[f"{name}_{s}"] for name in LATENCIES for s in STATISTICS)


def test_what_cannot_be_computed_is_absent() -> None:
    one_token = summarize([record([0.5])], 1.0)
    assert not [name for name in one_token if name.startswith(("tpot_ms", "itl_ms"))]
    one_chunk = summarize([record([0.5], tokens_out=8)], 1.0, SLO)
    assert not [name for name in one_chunk if name.startswith("itl_ms")]
    assert (one_chunk["tpot_ms_p90"], one_chunk["tpot_samples"], one_chunk["itl_samples"]) == (0, 1, 0)
    assert "goodput_rps" not in one_token
    uncounted = summarize([record([0.5, 0.6]), dataclasses.replace(record([0.5]), tokens_in=None)], 1.0)
    assert uncounted["output_throughput_tok_s"] == 3
    assert not {"tokens_in", "input_throughput_tok_s", "total_throughput_tok_s"} & uncounted.keys()
    assert "slo_attainment" not in summarize([record([0.5])], 1.0, {"itl_ms": {"p90": 1.0}})


@pytest.mark.parametrize("load", [[], [record([], error="refused"), record([0.1], error="refused")]])
def test_an_empty_sample_raises(load: list[RequestRecord]) -> None:
    with pytest.raises(EmptySample, match="No request was sent" if not load else "2 of them: refused"):
        summarize(load, 1.0)


@pytest.mark.parametrize("duration", [0.0, -1.0])
def test_no_duration_is_no_throughput(duration: float) -> None:
    with pytest.raises(EmptySample, match="duration_s > 0"):
        summarize([record([0.1])], duration)


@pytest.mark.parametrize(
    ("times", "tokens_out", "slo", "met"),
    [
        ([0.5, 0.5499], 2, SLO, True),
        ([0.5001, 0.55], 2, SLO, False),
        ([0.5, 0.5501], 2, SLO, False),
        ([0.5], 1, SLO, True),
        ([0.5], 8, SLO, True),
        ([0.1, 5.1], 200, SLO, False),
        ([0.5, 0.6], 2, {"ttft_ms": {"p50": 400.0, "p99": 600.0}}, False),
    ],
)
def test_goodput_judges_each_request_by_every_limit(
    times: list[float], tokens_out: int, slo: dict[str, dict[str, float]], met: bool
) -> None:
    metrics = summarize([record(times, tokens_out=tokens_out), record(times, error="late")], 2.0, slo)
    assert (metrics["goodput_rps"], metrics["slo_attainment"]) == ((0.5, 0.5) if met else (0.0, 0.0))


@given(loads)
def test_percentiles_are_numpys(load: list[RequestRecord]) -> None:
    metrics = summarize(load, 1.0)
    ttfts = [r.ttft_ms for r in load if r.ok]
    for statistic in STATISTICS[1:]:
        expected = np.percentile(np.array(ttfts, dtype=float), int(statistic[1:]))
        assert metrics[f"ttft_ms_{statistic}"] == pytest.approx(float(expected))
    assert metrics["ttft_ms_mean"] == pytest.approx(float(np.mean(np.array(ttfts, dtype=float))))


@st.composite
def trials(draw: st.DrawFn) -> list[RequestRecord]:
    """Two levels of two rounds with an answer in each, some of several tokens a chunk, and failures and warm-up."""
    places = [(level, round) for level in ("c1", "c4") for round in (0, 1)]
    places += draw(st.lists(st.sampled_from(places), max_size=8))
    drawn = []
    for index, (level, round) in enumerate(places):
        kind = draw(answers(min_tokens=2)) if index < 4 else draw(answers() | failures)
        tokens_out = len(kind.token_times_s) * draw(st.integers(1, 3))
        phase: Phase = "measure" if index < 4 else draw(st.sampled_from(["measure", "warmup"]))
        drawn.append(dataclasses.replace(kind, level=level, round=round, tokens_out=tokens_out, phase=phase))
    return drawn


def by_pandas(sent: pd.DataFrame) -> dict[str, float]:
    """What vLLM's `bench serve` would say of one level's requests, and what this project adds to it."""
    seconds = sent.groupby("round")["end_s"].max().sum()
    done = sent[sent["error"].isna()].copy()
    done["ttft_ms"] = (done["first_token_s"] - done["scheduled_s"]) * 1e3
    done["e2el_ms"] = (done["token_times_s"].str[-1] - done["scheduled_s"]) * 1e3
    several = done[done["tokens_out"] > 1]
    tpot_ms = (several["e2el_ms"] - several["ttft_ms"]) / (several["tokens_out"] - 1)
    itl_ms = np.concatenate([np.diff(times) for times in done["token_times_s"]]) * 1e3
    samples = {"ttft_ms": done["ttft_ms"], "e2el_ms": done["e2el_ms"], "tpot_ms": tpot_ms, "itl_ms": pd.Series(itl_ms)}
    tokens, prompts = done["tokens_out"].sum(), done["tokens_in"].sum()
    good = (done["ttft_ms"] <= 500) & (done["e2el_ms"] <= 5000) & ~(tpot_ms.reindex(done.index) > 50)
    speed = [
        part.loc[part["error"].isna(), "tokens_out"].sum() / part["end_s"].max() for _, part in sent.groupby("round")
    ]
    return {
        **{f"{name}_mean": sample.mean() for name, sample in samples.items()},
        **{f"{name}_p{q}": sample.quantile(q / 100) for name, sample in samples.items() for q in (50, 90, 95, 99)},
        "output_throughput_tok_s": tokens / seconds,
        "input_throughput_tok_s": prompts / seconds,
        "total_throughput_tok_s": (tokens + prompts) / seconds,
        "request_throughput_rps": len(done) / seconds,
        "goodput_rps": good.sum() / seconds,
        "slo_attainment": good.sum() / len(sent),
        "failed_share": sent["error"].notna().mean(),
        "requests": len(sent),
        "requests_failed": sent["error"].notna().sum(),
        "tpot_samples": len(tpot_ms),
        "itl_samples": len(itl_ms),
        "tokens_in": prompts,
        "tokens_out": tokens,
        "duration_s": seconds,
        "drift": speed[-1] / speed[0] - 1,
    }


@settings(max_examples=20)
@given(trials())
def test_every_figure_comes_again_by_other_means_from_the_same_requests(load: list[RequestRecord]) -> None:
    levels = {label: summarize(sent, duration_s(sent), SLO) for label, sent in measured(load).items()}
    table = pd.DataFrame([dataclasses.asdict(record) for record in load])
    again = {label: by_pandas(sent) for label, sent in table[table["phase"] == "measure"].groupby("level")}
    for label, level in levels.items():
        assert level == pytest.approx(again[str(label)], rel=1e-6, abs=1e-9)
    whole = combine(levels)
    for name, metric in METRICS.items():
        if name in whole:
            values = [level[name] for level in again.values()]
            assert whole[name] == pytest.approx(sum(values) if metric.across == "sum" else np.mean(values), abs=1e-9)


@given(loads, st.randoms())
def test_the_order_of_records_does_not_matter(load: list[RequestRecord], rng: random.Random) -> None:
    shuffled = rng.sample(load, len(load))
    assert summarize(shuffled, 3.0, SLO) == pytest.approx(summarize(load, 3.0, SLO))


@given(loads, st.data())
def test_no_metric_improves_when_tokens_come_later(load: list[RequestRecord], data: st.DataObject) -> None:
    index = data.draw(st.sampled_from([i for i, r in enumerate(load) if r.ok]))
    victim = load[index]
    start = data.draw(st.integers(0, len(victim.token_times_s) - 1))
    delay = data.draw(st.floats(0.001, 100))
    times = tuple(time + delay * (i >= start) for i, time in enumerate(victim.token_times_s))
    worse = dataclasses.replace(victim, token_times_s=times, first_token_s=times[0], end_s=times[-1])
    before = summarize(load, 3.0, SLO)
    after = summarize([*load[:index], worse, *load[index + 1 :]], 3.0, SLO)
    assert before.keys() == after.keys()
    for name, value in after.items():
        gain = (value - before[name]) * {"higher": 1, "lower": -1, None: 0}[METRICS[name].better]
        assert gain <= 1e-6 * max(1.0, abs(value)), name


@given(loads, st.data())
def test_no_throughput_or_goodput_improves_when_a_request_fails(load: list[RequestRecord], data: st.DataObject) -> None:
    index = data.draw(st.sampled_from([i for i, r in enumerate(load) if r.ok]))
    failed = [*load[:index], dataclasses.replace(load[index], error="reset"), *load[index + 1 :]]
    assume(any(r.ok for r in failed))
    before, after = summarize(load, 3.0, SLO), summarize(failed, 3.0, SLO)
    for name in before:
        if METRICS[name].better == "higher":
            assert after[name] <= before[name]
    assert after["failed_share"] > before["failed_share"]


@given(loads)
def test_every_metric_is_finite_and_in_the_table(load: list[RequestRecord]) -> None:
    metrics = summarize(load, 1.0, SLO)
    assert metrics.keys() <= METRICS.keys()
    assert all(math.isfinite(value) for value in metrics.values())


MEASURED_ELSEWHERE = {
    "max_load_under_slo",
    "cost_per_million_tokens",
    "energy_j_per_token",
    "perplexity",
    "perplexity_rise",
    "answer_change",
    "preemptions",
    "kv_cache_usage_mean",
    "kv_cache_usage_max",
    "queue_length_mean",
    "queue_length_max",
    "prefix_cache_hit_rate",
}


def test_every_metric_of_the_table_can_occur() -> None:
    rounds = [record([0.1, 0.2]), record([0.1, 0.2], round=1)]
    assert summarize(rounds, 1.0, SLO).keys() == METRICS.keys() - MEASURED_ELSEWHERE


def test_what_the_engine_tells_has_the_names_of_the_table() -> None:
    all_there = {"waiting": 2.0, "kv_cache_usage": 0.5, "preemptions": 1.0, "prefix_queries": 8.0, "prefix_hits": 4.0}
    nothing_yet = dict.fromkeys(all_there, 0.0)
    begin, during, end = (
        Sample(0.0, True, **nothing_yet),
        Sample(1.0, False, **all_there),
        Sample(2.0, True, **all_there),
    )
    told = summarize_engine([[begin, during, end]])
    assert told.keys() == set(ENGINE_METRICS)
    assert all(METRICS[name].better is not None for name in told)


def test_metrics_are_known_alone_or_at_a_load_level_of_the_study() -> None:
    assert is_metric("ttft_ms_p90")
    assert is_metric("ttft_ms_p90@c16", ["c16"])
    assert not is_metric("ttft_ms_p90@c4", ["c16"])
    assert not is_metric("ttft_ms_p90@c4")
    assert not is_metric("ttft_p90")
    assert is_metric("max_load_under_slo", ["c16"])
    assert not is_metric("max_load_under_slo@c16", ["c16"])


@pytest.mark.parametrize(("statistic", "needed"), [("mean", 0), ("p50", 5), ("p90", 29), ("p95", 59), ("p99", 299)])
def test_a_percentile_needs_so_many_samples(statistic: str, needed: int) -> None:
    assert samples_needed(statistic) == samples_needed(f"ttft_ms_{statistic}@c16") == needed
    if needed:
        share = int(statistic[1:]) / 100
        assert 1 - share**needed >= CONFIDENCE > 1 - share ** (needed - 1)


@pytest.mark.parametrize("name", ["output_throughput_tok_s", "goodput_rps@r2.5", "p", "", "p12", "@p99"])
def test_what_is_no_percentile_needs_no_samples(name: str) -> None:
    assert samples_needed(name) == 0


def test_all_levels_count_in_a_trials_metrics() -> None:
    levels = {"c1": summarize([record([0.1, 0.2])], 1.0), "c4": summarize([record([0.3, 0.4]), record([0.5])], 3.0)}
    trial = combine(levels)
    assert trial["ttft_ms_mean"] == pytest.approx((100 + 400) / 2)
    assert trial["output_throughput_tok_s"] == pytest.approx((2 + 1) / 2)
    assert (trial["requests"], trial["duration_s"], trial["tokens_out"]) == (3, 4.0, 5)
    assert trial["ttft_ms_mean@c4"] == pytest.approx(400)
    assert {f"{name}@c1" for name in levels["c1"]} <= trial.keys()


def test_a_metric_that_one_level_lacks_is_absent() -> None:
    trial = combine({"c1": summarize([record([0.1])], 1.0), "c4": summarize([record([0.3, 0.4])], 1.0)})
    assert "tpot_ms_mean" not in trial
    assert "tpot_ms_mean@c1" not in trial
    assert "tpot_ms_mean@c4" in trial


def test_a_level_that_was_not_run_leaves_only_sums_beside_each_levels_own() -> None:
    levels = {"c1": summarize([record([0.1, 0.2])], 1.0)}
    trial = combine(levels, ["c1", "c4"])
    assert {name for name in trial if "@" not in name} == {
        "requests",
        "requests_failed",
        "tpot_samples",
        "itl_samples",
        "tokens_in",
        "tokens_out",
        "duration_s",
    }
    assert {name for name in trial if "@" in name} == {f"{name}@c1" for name in levels["c1"]}
    assert combine(levels, ["c1"])["ttft_ms_mean"] == pytest.approx(100)


def test_levels_become_one_as_the_metric_says() -> None:
    one = {"preemptions": 3.0, "queue_length_max": 7.0, "queue_length_mean": 2.0, "tokens_out": 100.0}
    two = {"preemptions": 1.0, "queue_length_max": 9.0, "queue_length_mean": 4.0, "tokens_out": 300.0}
    trial = combine({"c1": one | energy_metrics(200.0, 100.0), "c4": two | energy_metrics(200.0, 300.0)})
    assert (trial["preemptions"], trial["queue_length_max"], trial["queue_length_mean"]) == (4, 9, 3)
    assert trial["energy_j_per_token"] == pytest.approx(400 / 400)


costs = st.floats(1e-3, 1e6)


@given(st.lists(st.tuples(costs, costs), min_size=1, max_size=4), st.floats(0.01, 100), st.floats(0, 16))
def test_the_cost_of_all_levels_is_all_money_over_all_tokens(
    loads: list[tuple[float, float]], price: float, gpus: float
) -> None:
    levels = {}
    for place, (tokens, seconds) in enumerate(loads):
        level = {"tokens_out": tokens, "duration_s": seconds}
        levels[f"c{place}"] = level | cost_metrics(level, price, gpus)
    paid = price * max(gpus, 1) * sum(seconds for _, seconds in loads) / 3600
    expected = paid / sum(tokens for tokens, _ in loads) * 1e6
    assert combine(levels)["cost_per_million_tokens"] == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "price"), [(0.0, 1.0), (5.0, None)])
def test_a_cost_without_price_or_tokens_is_absent(tokens: float, price: float | None) -> None:
    assert cost_metrics({"tokens_out": tokens, "duration_s": 1.0}, price, 1.0) == {}


@pytest.mark.parametrize("joules", [None, 0.0, -1.0, math.inf, math.nan])
def test_energy_without_a_measurement_is_absent_and_never_0(joules: float | None) -> None:
    assert energy_metrics(joules, 10.0) == {}
    assert energy_metrics(5.0, 0.0) == {}
    assert energy_metrics(5.0, 10.0) == {"energy_j_per_token": 0.5}


def test_drift_compares_the_last_round_with_the_first() -> None:
    rounds = [record([0.5, 1.0], tokens_out=8), record([1.0, 2.0], tokens_out=8, round=1)]
    rounds.append(record([1.0, 2.0], tokens_out=12, round=2))
    assert summarize(rounds, 5.0)["drift"] == pytest.approx((12 / 2) / (8 / 1) - 1)
    assert "drift" not in summarize(rounds[:1], 1.0)
    failed_first = [record([0.5], error="reset"), record([1.0, 2.0], round=1)]
    assert "drift" not in summarize(failed_first, 3.0)


def test_no_level_is_an_empty_sample() -> None:
    with pytest.raises(EmptySample, match="No load level"):
        combine({})


def test_one_levels_metrics_are_the_trials() -> None:
    level = summarize([record([0.1, 0.2])], 1.0, SLO)
    trial = combine({"c1": level})
    assert {name: trial[name] for name in level} == level


def test_rounds_are_pooled_by_level_and_warm_up_is_left_out() -> None:
    load = [
        record([9.0], level="c1", phase="warmup"),
        record([1.0], level="c4", round=0),
        record([2.0], level="c1", round=0),
        record([3.0], level="c4", round=1),
        record([2.5], level="c4", round=1),
    ]
    by_level = measured(load)
    assert list(by_level) == ["c4", "c1"]
    assert duration_s(by_level["c4"]) == 1.0 + 3.0
    assert duration_s(by_level["c1"]) == 2.0
