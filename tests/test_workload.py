"""The workload: exact lengths, the same requests for every trial, others for each load."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.load.workload import (
    Lengths,
    Level,
    Traffic,
    generate,
    lengths,
    levels,
    longest,
    longest_possible,
    parse_traffic,
    warmup_requests,
)
from raytune_autotuner.score.records import Phase
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.study import Workload

C4, R5 = Level("c4", concurrency=4), Level("r5", rate_rps=5.0)
tokens = st.integers(1, 500)


def closed(**values: object) -> Workload:
    return Workload.model_validate({"concurrency": [4], **values})


@pytest.mark.parametrize(
    ("text", "traffic"),
    [
        ("D(128,32)", Traffic(Lengths("D", 128), Lengths("D", 32))),
        (" D( 128 , 32 ) ", Traffic(Lengths("D", 128), Lengths("D", 32))),
        ("N(480,240)/(300,150)", Traffic(Lengths("N", 480, 240), Lengths("N", 300, 150))),
        ("U(50,100) / (200,250)", Traffic(Lengths("U", 50, 100), Lengths("U", 200, 250))),
    ],
)
def test_traffic_is_read_in_the_fields_grammar(text: str, traffic: Traffic) -> None:
    assert parse_traffic(text) == traffic


@pytest.mark.parametrize("text", ["", "D(1)", "D(0,5)", "D(5,0)", "N(5,1)", "U(9,3)/(1,2)", "X(1,2)", "D(1,2)/(3,4)"])
def test_wrong_traffic_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^workload\.traffic: ") as refused:
        parse_traffic(text)
    assert repr(text) in str(refused.value)


@given(a=tokens, b=tokens)
def test_fixed_lengths_are_exact(a: int, b: int) -> None:
    requests = generate(closed(traffic=f"D({a},{b})", requests=5), C4)
    assert {(len(request.prompt), request.tokens_out) for request in requests} == {(a, b)}


@given(low=tokens, spread=tokens, seed=st.integers())
def test_uniform_lengths_stay_in_their_range(low: int, spread: int, seed: int) -> None:
    workload = closed(traffic=f"U({low},{low + spread})/({low},{low})", requests=30, seed=seed)
    requests = generate(workload, C4)
    assert all(low <= len(request.prompt) <= low + spread for request in requests)
    assert {request.tokens_out for request in requests} == {low}


def test_both_ends_of_a_uniform_range_occur() -> None:
    requests = generate(closed(traffic="U(3,5)/(1,2)", requests=200), C4)
    assert {len(request.prompt) for request in requests} == {3, 4, 5}
    assert {request.tokens_out for request in requests} == {1, 2}


@given(mean=tokens, sd=tokens, seed=st.integers(0, 2**70))
def test_normal_lengths_are_at_least_one_token(mean: int, sd: int, seed: int) -> None:
    requests = generate(closed(traffic=f"N({mean},{sd})/({mean},{sd})", requests=30, seed=seed), C4)
    assert all(request.tokens_out >= 1 and len(request.prompt) >= 1 for request in requests)


@pytest.mark.parametrize("traffic", ["D(40,3)", "N(40,20)/(8,5)", "U(10,90)/(1,9)"])
def test_lengths_are_told_without_the_prompts(traffic: str) -> None:
    workload = closed(traffic=traffic, prefix={"tokens": 7, "groups": 2}, requests=20)
    assert lengths(workload, C4) == [(len(request.prompt), request.tokens_out) for request in generate(workload, C4)]


@pytest.mark.parametrize(("traffic", "most"), [("D(40,3)", 50), ("U(10,90)/(1,9)", 106), ("N(40,20)/(8,5)", 180)])
def test_no_load_or_restart_of_a_study_has_a_longer_request_than_the_longest(traffic: str, most: int) -> None:
    workload = closed(traffic=traffic, prefix={"tokens": 7, "groups": 2}, requests=20, rounds=2, warmup_requests=30)
    loads: list[tuple[int, Phase]] = [(0, "measure"), (1, "measure"), (0, "warmup")]
    sent = [
        len(request.prompt) + request.tokens_out
        for offset, (number, phase) in itertools.product(range(4), loads)
        for request in generate(workload, C4, number, phase, seed_offset=offset)
    ]
    assert sum(longest(workload, restarts=3)) == max(sent) <= sum(longest_possible(workload)) == most


def test_the_longest_request_may_be_one_of_a_level_that_the_study_does_not_name() -> None:
    workload = closed(traffic="N(512,100)/(128,30)", concurrency=[4, 16])
    sent = {
        concurrency: max(map(sum, lengths(workload, Level(f"c{concurrency}", concurrency))))
        for concurrency in range(4, 17)
    }
    assert max(sent.values()) > max(sent[4], sent[16])
    assert sum(longest(workload, refined=True)) >= max(sent.values()) >= sum(longest(workload))


def test_normal_lengths_have_their_mean_and_spread() -> None:
    drawn = [len(r.prompt) for r in generate(closed(traffic="N(300,20)/(5,0)", requests=2000), C4)]
    assert np.mean(drawn) == pytest.approx(300, abs=2)
    assert np.std(drawn) == pytest.approx(20, abs=2)


def test_every_trial_sends_the_same_requests() -> None:
    workload = closed(traffic="N(40,10)/(8,2)")
    assert generate(workload, C4, 1) == generate(workload, C4, 1)


def test_each_level_round_phase_and_seed_sends_other_prompts() -> None:
    small = {"requests": 8, "warmup_requests": 8}
    phases: tuple[Phase, ...] = ("warmup", "measure")
    loads = [
        generate(closed(**small, seed=seed), level, number, phase)
        for seed, level, number, phase in itertools.product((0, 1), (C4, R5), (0, 1), phases)
    ]
    prompts = [tuple(request.prompt[:16]) for requests in loads for request in requests]
    assert len(set(prompts)) == len(prompts) == 128


def test_each_phase_has_its_own_number_of_requests() -> None:
    workload = closed(requests=12, warmup_requests=3)
    assert len(generate(workload, C4)) == 12
    warmup = generate(workload, C4, phase="warmup")
    assert [(request.index, request.phase) for request in warmup] == [(0, "warmup"), (1, "warmup"), (2, "warmup")]
    assert generate(closed(warmup_requests=0), R5, phase="warmup") == []


def test_a_warm_up_makes_the_whole_load_of_its_level() -> None:
    scale = (C4, R5, Level("c64", concurrency=64), Level("r12.5", rate_rps=12.5), Level("trace", trace=True))
    assert [warmup_requests(closed(), level) for level in scale] == [8, 8, 64, 13, 8]
    assert len(generate(closed(), scale[2], phase="warmup")) == 64
    assert warmup_requests(closed(warmup_requests=3), scale[2]) == 3


@given(vocab_size=st.integers(2, 200_000))
def test_prompt_ids_are_in_the_vocabulary(vocab_size: int) -> None:
    ids = [int(i) for r in generate(closed(requests=4), C4, vocab_size=vocab_size) for i in r.prompt]
    assert max(ids) < vocab_size
    assert min(ids) >= min(1000, vocab_size // 2)


def test_in_closed_loop_everything_is_due_at_once() -> None:
    assert {request.scheduled_s for request in generate(closed(), C4)} == {0.0}


@given(rate=st.floats(0.01, 1000), count=st.integers(1, 200))
def test_arrivals_keep_the_mean_rate_exactly(rate: float, count: int) -> None:
    requests = generate(closed(requests=count, traffic="D(1,1)"), Level("r", rate_rps=rate))
    due = [request.scheduled_s for request in requests]
    assert due == sorted(due)
    assert due[0] >= 0
    assert due[-1] == pytest.approx(count / rate)


def test_gaps_between_arrivals_are_those_of_a_poisson_process() -> None:
    requests = generate(closed(requests=4000, traffic="D(1,1)"), Level("r10", rate_rps=10))
    gaps = np.diff([0.0, *(request.scheduled_s for request in requests)])
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1, abs=0.05)


def test_levels_keep_the_studys_order_and_occur_once() -> None:
    assert levels(closed(concurrency=[16, 4, 16])) == [Level("c16", concurrency=16), Level("c4", concurrency=4)]
    opened = Workload.model_validate({"request_rate_rps": [2.5, 10]})
    assert levels(opened) == [Level("r2.5", rate_rps=2.5), Level("r10", rate_rps=10.0)]


def test_another_seed_offset_is_another_load() -> None:
    workload = closed(traffic="N(40,10)/(8,2)")
    assert generate(workload, C4, seed_offset=1) == generate(workload, C4, seed_offset=1)
    assert generate(workload, C4, seed_offset=1) != generate(workload, C4)


@pytest.mark.parametrize(("level", "is_open"), [(C4, False), (R5, True), (Level("trace", trace=True), True)])
def test_a_level_says_whether_requests_wait_for_answers(level: Level, is_open: bool) -> None:
    assert level.open_loop is is_open
