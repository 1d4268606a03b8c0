"""Traffic beyond drawn lengths: shared prefixes, datasets, traces, and the files that are wrong."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.load.datasets import read_dataset, read_trace
from raytune_autotuner.load.workload import (
    Level,
    Request,
    check_traffic,
    generate,
    lengths,
    levels,
    longest,
    longest_possible,
)
from raytune_autotuner.score.records import Phase
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.study import Workload

C4, C8, R5 = Level("c4", concurrency=4), Level("c8", concurrency=8), Level("r5", rate_rps=5.0)


def workload(**values: Any) -> Workload:
    loop = {} if "trace" in values or "request_rate_rps" in values else {"concurrency": [4]}
    return Workload.model_validate({**loop, **values})


def lines(folder: Path, *values: Any) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path


def beginnings(requests: Sequence[Request], tokens: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(ids(request)[:tokens]) for request in requests)


def ids(request: Request) -> list[int]:
    assert isinstance(request.prompt, list)
    return request.prompt


# Prefixes


@given(tokens=st.integers(1, 300), groups=st.integers(1, 5), own=st.integers(1, 100))
def test_a_prefix_comes_before_the_tokens_of_its_own(tokens: int, groups: int, own: int) -> None:
    asked = workload(traffic=f"D({own},2)", prefix={"tokens": tokens, "groups": groups}, requests=20)
    requests = generate(asked, C4)
    assert {len(ids(request)) for request in requests} == {tokens + own}
    assert len(beginnings(requests, tokens)) <= groups


def test_prompts_share_their_group_s_prefix_and_nothing_else() -> None:
    requests = generate(workload(traffic="D(32,2)", prefix={"tokens": 64, "groups": 3}, requests=60), C4)
    assert sorted(beginnings(requests, 64).values(), reverse=True)[-1] >= 10
    assert len(beginnings(requests, 64)) == 3
    assert len({tuple(ids(request)[64:]) for request in requests}) == 60


def test_prefixes_are_the_same_for_the_whole_study_and_others_in_warm_up() -> None:
    asked = workload(prefix={"tokens": 16, "groups": 2}, requests=40, warmup_requests=40)
    of_load = [
        set(beginnings(generate(asked, level, number), 16)) for level, number in itertools.product((C4, R5), (0, 1))
    ]
    assert of_load[0] == of_load[1] == of_load[2] == of_load[3]
    assert of_load[0].isdisjoint(beginnings(generate(asked, C4, phase="warmup"), 16))
    assert of_load[0].isdisjoint(beginnings(generate(asked, C4, seed_offset=1), 16))


def test_the_tokens_behind_a_prefix_are_those_without_it() -> None:
    plain = generate(workload(traffic="D(32,2)"), C4)
    behind = generate(workload(traffic="D(32,2)", prefix={"tokens": 8}), C4)
    assert [ids(request)[8:] for request in behind] == [ids(request) for request in plain]


# Datasets


def texts(folder: Path, count: int) -> Path:
    return lines(folder, *({"prompt": f"question {i}", "output_tokens": i + 1} for i in range(count)))


def test_a_dataset_s_prompts_are_sent_as_they_stand(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"prompt": "What is Ω?", "output_tokens": 5, "category": "greek"},
        "",
        {"prompt_token_ids": [1, 2, 3], "output_len": 6},
        {"prompt": "And π?", "max_tokens": 7},
    )
    asked = workload(dataset=path, requests=3, warmup_requests=0)
    requests = generate(asked, C4)
    assert sorted(lengths(asked, C4)) == [(0, 5), (0, 7), (3, 6)]
    assert longest(asked) == longest_possible(workload(dataset=path, requests=1)) == (3, 6)
    assert sorted((request.tokens_out, request.prompt) for request in requests) == [
        (5, "What is Ω?"),
        (6, [1, 2, 3]),
        (7, "And π?"),
    ]


def test_no_line_comes_twice_until_all_have_come(tmp_path: Path) -> None:
    requests = generate(workload(dataset=texts(tmp_path, 10), requests=25, warmup_requests=5), C4)
    drawn = [request.tokens_out for request in requests]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(1, 11))
    assert drawn[:10] != drawn[10:20] != list(range(1, 11))


def test_warm_up_takes_other_lines_where_there_are_enough(tmp_path: Path) -> None:
    enough = workload(dataset=texts(tmp_path, 20), requests=15, warmup_requests=5)
    measured = {
        request.tokens_out for level in (C4, C8) for number in (0, 1) for request in generate(enough, level, number)
    }
    warm = {request.tokens_out for level in (C4, C8) for request in generate(enough, level, phase="warmup")}
    assert (len(measured), len(warm)) == (15, 5)
    assert measured.isdisjoint(warm)
    short = enough.model_copy(update={"requests": 16})
    assert len({request.tokens_out for request in generate(short, C4)}) == 16


def test_each_load_shuffles_a_dataset_anew_and_each_trial_alike(tmp_path: Path) -> None:
    asked = workload(dataset=texts(tmp_path, 30), requests=20)
    phases: tuple[Phase, ...] = ("warmup", "measure")
    orders = [
        tuple(request.tokens_out for request in generate(asked, level, number, phase, seed_offset=offset)[:8])
        for level, number, phase, offset in itertools.product((C4, C8), (0, 1), phases, (0, 1))
    ]
    assert len(set(orders)) == 16
    assert generate(asked, C4, 1) == generate(asked, C4, 1)


def test_a_dataset_can_come_at_a_rate(tmp_path: Path) -> None:
    requests = generate(workload(dataset=texts(tmp_path, 30), request_rate_rps=5, requests=20), R5)
    assert requests[-1].scheduled_s == pytest.approx(4)
    assert [request.scheduled_s for request in requests] == sorted(request.scheduled_s for request in requests)


# Traces


MOONCAKE = [
    {"timestamp": 27000, "input_length": 70, "output_length": 5, "hash_ids": [46, 47]},
    {"timestamp": 27000, "input_length": 30, "output_length": 4, "hash_ids": [46]},
    {"timestamp": 30500.5, "input_length": 50, "output_length": 1},
]


def test_a_trace_is_one_load_level_with_its_own_arrivals(tmp_path: Path) -> None:
    asked = workload(trace=lines(tmp_path, *MOONCAKE))
    (level,) = levels(asked)
    assert level == Level("trace", trace=True)
    requests = generate(asked, level)
    assert [(r.scheduled_s, len(ids(r)), r.tokens_out) for r in requests] == [(0, 70, 5), (0, 30, 4), (3.5005, 50, 1)]
    assert lengths(asked, level) == [(70, 5), (30, 4), (50, 1)]


def test_the_first_requests_of_a_trace_are_taken(tmp_path: Path) -> None:
    asked = workload(trace=lines(tmp_path, *MOONCAKE), requests=2, warmup_requests=1)
    (level,) = levels(asked)
    assert [request.tokens_out for request in generate(asked, level)] == [5, 4]
    (warm,) = generate(asked, level, phase="warmup")
    assert warm.tokens_out == 5
    assert ids(warm) != ids(generate(asked, level)[0])
    assert ids(generate(asked, level, 1)[0]) != ids(generate(asked, level)[0])


# What is wrong with a file


GOOD = {"prompt": "text", "output_tokens": 3}
ARRIVAL = {"timestamp": 5, "input_length": 3, "output_length": 3}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "line 2: is not JSON .*'{not json'"),
        ("[1, 2]", r"line 2: should be a JSON object with keys, but got \[1, 2\]"),
        ("[" * 100_000, "line 2: is not JSON"),
        ({"output_tokens": 3}, "exactly one of prompt, prompt_token_ids is needed, but the line has 'output_tokens'"),
        ({**GOOD, "prompt_token_ids": [1]}, "exactly one .* but prompt and prompt_token_ids both stand there"),
        ({"prompt": "text"}, "one of output_tokens, output_len, max_tokens is needed, but the line has 'prompt'"),
        ({}, "but the line has no keys"),
        ({**GOOD, "max_tokens": 3}, "output_tokens and max_tokens both stand there"),
        ({**GOOD, "output_tokens": "ten"}, "output_tokens: should be a whole number of tokens from 1 to .* got 'ten'"),
        ({**GOOD, "output_tokens": True}, "output_tokens: should be .* got True"),
        ({**GOOD, "output_tokens": 0}, "output_tokens: should be .* got 0"),
        ({**GOOD, "output_tokens": 2.5}, "output_tokens: should be .* got 2.5"),
        ({**GOOD, "output_tokens": 10**400}, "output_tokens: should be .* got 1000"),
        ({**GOOD, "prompt": ""}, "prompt: should be text .* but got ''"),
        (
            {**GOOD, "prompt": [5, 6]},
            r"prompt: should be text \(token ids go under prompt_token_ids\), but got \[5, 6\]",
        ),
        (
            {"prompt_token_ids": [], "output_tokens": 3},
            r"prompt_token_ids: should be a list of token ids, but got \[\]",
        ),
        ({"prompt_token_ids": [1, -1], "output_tokens": 3}, r"prompt_token_ids: .* got \[1, -1\]"),
        ({"prompt_token_ids": [1, 2**31], "output_tokens": 3}, "prompt_token_ids: .* got"),
        ({"prompt_token_ids": "1 2", "output_tokens": 3}, "prompt_token_ids: .* got '1 2'"),
    ],
    ids=str,
)
def test_a_wrong_line_of_a_dataset_is_named(tmp_path: Path, line: Any, complaint: str) -> None:
    path = lines(tmp_path, GOOD, line)
    with pytest.raises(ConfigError, match=complaint) as refused:
        check_traffic(workload(dataset=path))
    assert str(refused.value).startswith(f"workload.dataset: {path}, line 2: ")
    assert len(str(refused.value)) < len(str(path)) + 400


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            {**ARRIVAL, "timestamp": "noon"},
            "timestamp: should be a number of milliseconds from 0 to 1e\\+13, but got 'noon'",
        ),
        ({**ARRIVAL, "timestamp": -1}, "timestamp: should be .* got -1"),
        ({**ARRIVAL, "timestamp": 2e13}, "timestamp: should be .* got 2"),
        ({**ARRIVAL, "timestamp": float("nan")}, "timestamp: should be .* got nan"),
        ({**ARRIVAL, "timestamp": 4}, r"timestamp: should be not below the line before it \(5\), but got 4"),
        ({**ARRIVAL, "input_length": 0}, "input_length: should be a whole number of tokens .* got 0"),
        ({"timestamp": 6, "input_length": 3}, "output_length: is missing; the line has 'timestamp', 'input_length'"),
        ({"input_length": 3, "output_length": 3}, "timestamp: is missing"),
    ],
    ids=str,
)
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, line: Any, complaint: str) -> None:
    path = lines(tmp_path, ARRIVAL, line)
    with pytest.raises(ConfigError, match=complaint) as refused:
        check_traffic(workload(trace=path))
    assert str(refused.value).startswith(f"workload.trace: {path}, line 2: ")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (empty := tmp_path / "empty").write_text("\n  \n")
    (binary := tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, complaint in [
        (tmp_path / "none", "no such file"),
        (tmp_path, "is no file"),
        (pipe, "is no file"),
        (empty, "is empty"),
        (binary, "line 1: is not JSON"),
    ]:
        with pytest.raises(ConfigError, match=complaint):
            check_traffic(workload(dataset=path))


@pytest.mark.parametrize("kind", ["dataset", "trace"])
def test_prefixes_go_with_drawn_prompts_only(tmp_path: Path, kind: str) -> None:
    path = lines(tmp_path, {**GOOD, **ARRIVAL})
    with pytest.raises(ConfigError, match=f"^workload.prefix: .* workload.{kind} is set"):
        check_traffic(workload(**{kind: path, "prefix": {"tokens": 4}}))


def test_good_traffic_passes(tmp_path: Path) -> None:
    check_traffic(workload(traffic="D(5,5)", prefix={"tokens": 4}))
    check_traffic(workload(dataset=lines(tmp_path, GOOD)))
    check_traffic(workload(trace=lines(tmp_path, ARRIVAL)))
    (since_1970 := tmp_path / "epoch").mkdir()
    check_traffic(workload(trace=lines(since_1970, {**ARRIVAL, "timestamp": 1_795_810_088_176})))
    with pytest.raises(ConfigError, match=r"^workload\.traffic"):
        check_traffic(workload(traffic="D(0,5)"))


def test_a_file_is_read_once(tmp_path: Path) -> None:
    dataset = texts(tmp_path, 5)
    assert read_dataset(dataset) is read_dataset(dataset)
    (trace := tmp_path / "trace").write_text(json.dumps(ARRIVAL))
    assert read_trace(trace, 5) is read_trace(trace, 5)
