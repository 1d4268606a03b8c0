"""The simulated engine: its pure model, its wire form, and each of its faults."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_autotuner.engine.reading import SIMULATED_RULES, diagnose
from raytune_autotuner.engine.simulated.faults import TREE, Effect, parse_fault, parse_faults
from raytune_autotuner.engine.simulated.model import (
    Batch,
    Hardware,
    Level,
    Request,
    Scheduler,
    Setting,
    fate,
    known_flags,
    leaks,
    nearest_flag,
    simulate,
    startup_plan,
    step_ms,
)
from raytune_autotuner.engine.simulated.startup import parser
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Kind, Stage
from tests.simulated_server import TIMEOUT_S, Server, events

QUIET = Hardware(noise=0.0)


# --- the pure model ---


def serving_settings() -> st.SearchStrategy[Setting]:
    """Settings over the range that studies search, of which those with a fate are left out."""
    drawn = st.builds(
        Setting,
        max_num_seqs=st.integers(1, 64),
        max_num_batched_tokens=st.integers(64, 4096),
        max_model_len=st.sampled_from([512, 1024, 4096]),
        block_size=st.sampled_from([16, 32, 64, 128]),
        gpu_memory_utilization=st.floats(0.6, 0.95),
        tensor_parallel_size=st.sampled_from([1, 2, 4]),
        enable_prefix_caching=st.booleans(),
        enforce_eager=st.booleans(),
        async_scheduling=st.booleans(),
    )
    return drawn.filter(lambda setting: fate(setting, QUIET) is None)


def requests(most: int = 12) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    one = st.tuples(st.integers(1, 300), st.integers(1, 40))
    return st.lists(one, min_size=1, max_size=most).map(tuple)


@settings(max_examples=50)
@given(serving_settings(), requests(), st.integers(1, 8))
def test_each_request_gets_exactly_its_tokens_in_order(
    setting: Setting, asked: tuple[tuple[int, int], ...], concurrency: int
) -> None:
    timelines = simulate(setting, [Level(asked, concurrency=concurrency)], seed=1)
    assert [(t.prompt_tokens, len(t.token_ms)) for t in timelines] == list(asked)
    for timeline in timelines:
        assert timeline.arrival_ms < timeline.first_token_ms <= timeline.end_ms
        assert list(timeline.token_ms) == sorted(timeline.token_ms)


@settings(max_examples=50)
@given(serving_settings(), requests(), st.integers(200, 600))
def test_the_kv_cache_and_the_batch_limits_hold_at_every_step(
    setting: Setting, asked: tuple[tuple[int, int], ...], tokens_in_cache: int
) -> None:
    small = replace(setting, max_model_len=340, kv_cache_memory_bytes=tokens_in_cache * QUIET.kv_bytes_per_token)
    scheduler = Scheduler(small, QUIET, seed=1)
    if scheduler.total_blocks * small.block_size < small.max_model_len:
        return
    for index, (prompt, output) in enumerate(asked):
        scheduler.add(Request(index, prompt, output))
    while not scheduler.idle:
        scheduler.step()
        held = sum(sequence.blocks for sequence in scheduler.running)
        assert scheduler.free_blocks == scheduler.total_blocks - held >= 0
        assert len(scheduler.running) <= small.max_num_seqs
    assert scheduler.free_blocks == scheduler.total_blocks
    assert scheduler.counters.generation_tokens == sum(output for _, output in asked)


def test_requests_are_preempted_when_the_kv_cache_is_full() -> None:
    setting = Setting(max_model_len=200, kv_cache_memory_bytes=400 * QUIET.kv_bytes_per_token)
    scheduler = Scheduler(setting, QUIET, seed=1)
    for index in range(4):
        scheduler.add(Request(index, 80, 100))
    while not scheduler.idle:
        scheduler.step()
    assert scheduler.counters.preemptions > 0
    assert scheduler.counters.prompt_tokens == 4 * 80


@settings(max_examples=30)
@given(serving_settings(), requests(), st.integers(0, 1000))
def test_the_same_seed_gives_the_same_times(setting: Setting, asked: tuple[tuple[int, int], ...], seed: int) -> None:
    levels = [Level(asked, concurrency=2), Level.poisson(asked, request_rate_rps=50, seed=seed)]
    assert simulate(setting, levels, seed) == simulate(setting, levels, seed)
    assert simulate(setting, levels, seed) != simulate(setting, levels, seed + 1)


@settings(max_examples=40)
@given(serving_settings(), st.integers(1, 20), st.integers(1, 20), st.integers(1, 300), st.integers(2, 30))
def test_more_load_never_lowers_the_median_ttft(
    setting: Setting, low: int, more: int, prompt: int, output: int
) -> None:
    def median_ttft_ms(concurrency: int) -> float:
        level = Level.fixed(requests=60, prompt_tokens=prompt, output_tokens=output, concurrency=concurrency)
        return statistics.median(t.first_token_ms - t.arrival_ms for t in simulate(setting, [level], 1, QUIET))

    assert median_ttft_ms(low + more) >= median_ttft_ms(low) * 0.95


@given(serving_settings(), st.integers(0, 4096), st.integers(0, 64), st.integers(0, 8192))
def test_a_step_never_gets_shorter_by_more_work(setting: Setting, prefill: int, decodes: int, context: int) -> None:
    time_ms = step_ms(setting, QUIET, Batch(prefill, decodes, context))
    assert time_ms > 0
    for more in (Batch(prefill + 1, decodes, context), Batch(prefill, decodes + 1, context + 1)):
        assert step_ms(setting, QUIET, more) >= time_ms


def ttft_and_itl_ms(setting: Setting, level: Level) -> tuple[float, float]:
    timelines = simulate(setting, [level], 1, QUIET)
    gaps = [b - a for t in timelines for a, b in zip(t.token_ms, t.token_ms[1:], strict=False)]
    return statistics.median(t.first_token_ms - t.arrival_ms for t in timelines), max(gaps)


def test_too_few_sequences_make_requests_queue() -> None:
    level = Level.fixed(requests=64, prompt_tokens=128, output_tokens=32, concurrency=16)
    narrow, wide = (ttft_and_itl_ms(Setting(max_num_seqs=n), level)[0] for n in (2, 16))
    assert narrow > 5 * wide


def test_a_large_token_budget_makes_gaps_between_tokens() -> None:
    level = Level.poisson([(2000, 32)] * 32, request_rate_rps=12, seed=1)
    small, large = (ttft_and_itl_ms(Setting(max_num_batched_tokens=n), level)[1] for n in (256, 4096))
    assert large > 2 * small


def test_eager_mode_is_slower_and_skips_the_compilation() -> None:
    eager, graphs = Setting(enforce_eager=True), Setting()
    assert step_ms(eager, QUIET, Batch(0, 8, 800)) > step_ms(graphs, QUIET, Batch(0, 8, 800))
    hardware = Hardware(startup_s=10)
    assert Stage.COMPILATION not in dict(startup_plan(eager, hardware))
    assert sum(dict(startup_plan(graphs, hardware)).values()) == pytest.approx(10)


def test_the_prefix_cache_saves_the_shared_part_until_it_is_reset() -> None:
    scheduler = Scheduler(Setting(), QUIET, seed=1)

    def run(request_id: int) -> None:
        scheduler.add(Request(request_id, 64, 1, prefix=(11, 22, 33, 44)))
        while not scheduler.idle:
            scheduler.step()

    run(0)
    assert scheduler.counters.prefix_hits == 0
    run(1)
    assert scheduler.counters.prefix_hits == 63
    scheduler.forget_prefixes()
    run(2)
    assert scheduler.counters.prefix_hits == 63


def test_what_a_preempted_request_finds_of_its_own_is_no_hit() -> None:
    scheduler = Scheduler(
        Setting(max_model_len=200, kv_cache_memory_bytes=400 * QUIET.kv_bytes_per_token), QUIET, seed=1
    )
    for index in range(4):
        scheduler.add(Request(index, 80, 100, prefix=tuple(range(index * 10, index * 10 + 5))))
    while not scheduler.idle:
        scheduler.step()
    assert scheduler.counters.preemptions > 0
    assert (scheduler.counters.prefix_queries, scheduler.counters.prefix_hits) == (4 * 80, 0)


def test_starts_differ_by_the_stated_noise() -> None:
    factors = [Scheduler(Setting(), Hardware(noise=0.03), seed).start_factor for seed in range(400)]
    assert statistics.stdev(factors) == pytest.approx(0.03, rel=0.2)
    assert Scheduler(Setting(), QUIET, 1).start_factor == 1.0


def test_a_request_that_is_too_long_gets_no_token() -> None:
    level = Level(((90, 20), (90, 10)), concurrency=1)
    refused, served = simulate(Setting(max_model_len=100), [level], seed=1)
    assert (len(refused.token_ms), len(served.token_ms)) == (0, 10)


@pytest.mark.parametrize(
    ("params", "stage", "kind"),
    [
        ({"dtype": "int3"}, Stage.ARGUMENTS, Kind.BAD_ARGUMENT),
        ({"tensor-parallel-size": 3}, Stage.CONFIGURATION, Kind.INVALID_CONFIG),
        ({"tensor-parallel-size": 16}, Stage.CONFIGURATION, Kind.INVALID_CONFIG),
        ({"max-num-batched-tokens": 64}, Stage.CONFIGURATION, Kind.INVALID_CONFIG),
        ({"enable-chunked-prefill": False}, Stage.CONFIGURATION, Kind.INVALID_CONFIG),
        ({"max-model-len": 100000}, Stage.CONFIGURATION, Kind.INVALID_CONFIG),
        ({"quantization": "awq"}, Stage.CONFIGURATION, Kind.UNSUPPORTED),
        ({"dtype": "float32"}, Stage.WEIGHTS, Kind.OUT_OF_MEMORY),
        ({"block-size": 7}, Stage.KV_CACHE, Kind.UNSUPPORTED),
        ({"gpu-memory-utilization": 0.5}, Stage.KV_CACHE, Kind.KV_CACHE_TOO_SMALL),
        ({"gpu-memory-utilization": 0.6}, Stage.KV_CACHE, Kind.KV_CACHE_TOO_SMALL),
        ({"gpu-memory-utilization": 0.99}, Stage.KV_CACHE, Kind.OUT_OF_MEMORY),
        ({"kv-cache-memory-bytes": "20Gi"}, Stage.KV_CACHE, Kind.OUT_OF_MEMORY),
        ({"gpu-memory-utilization": 0.93}, Stage.GRAPH_CAPTURE, Kind.OUT_OF_MEMORY),
        ({"gpu-memory-utilization": 0.91}, Stage.LOAD, Kind.OUT_OF_MEMORY),
        ({"kv-cache-dtype": "fp8", "block-size": 128}, Stage.GRAPH_CAPTURE, Kind.ENGINE_DIED),
        ({"pipeline-parallel-size": 2, "async-scheduling": True}, Stage.LOAD, Kind.HUNG),
        ({"kv-cache-dtype": "fp8_e5m2", "dtype": "float16"}, Stage.LOAD, Kind.BAD_RESPONSES),
        (
            {"kv-cache-dtype": "fp8", "dtype": "float32", "tensor-parallel-size": 2},
            Stage.COMPILATION,
            Kind.UNSUPPORTED,
        ),
    ],
)
def test_a_setting_has_its_fate(params: dict[str, Any], stage: Stage, kind: Kind) -> None:
    own = fate(Setting.from_params(params))
    assert own is not None
    assert (own.stage, own.kind) == (stage, kind)


@given(serving_settings())
def test_a_serving_setting_serves_a_request_of_full_length(setting: Setting) -> None:
    level = Level(((setting.max_model_len - 1, 1),), concurrency=1)
    assert len(simulate(setting, [level], 1, QUIET)[0].token_ms) == 1


def test_a_setting_that_cannot_serve_is_not_simulated() -> None:
    with pytest.raises(ValueError, match="kv-too-small"):
        simulate(Setting(gpu_memory_utilization=0.5), [Level.fixed(1, 1, 1, 1)], seed=1)


# --- flags and faults as values ---


@given(serving_settings())
def test_flags_to_setting_to_flags_is_the_identity(setting: Setting) -> None:
    argv = ["--model", "m"]
    for name, value in setting.to_params().items():
        argv += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    values = {name.replace("_", "-"): value for name, value in vars(parser().parse_args(argv)).items()}
    assert Setting.from_params(values) == setting
    assert Setting.from_params(setting.to_params()) == setting


def test_a_value_of_the_wrong_type_names_its_flag() -> None:
    with pytest.raises(ConfigError, match=r"--max-num-seqs: an integer is needed, but got 1\.5"):
        Setting.from_params({"max-num-seqs": 1.5})
    with pytest.raises(ConfigError, match="--enforce-eager"):
        Setting.from_params({"enforce-eager": "maybe"})


def test_flags_are_known_with_their_defaults() -> None:
    assert known_flags()["max-num-seqs"] == Setting().max_num_seqs
    assert nearest_flag("max-num-seq") == "max-num-seqs"
    assert leaks(Setting(api_server_count=2))


def test_faults_are_parsed_from_text() -> None:
    assert parse_faults(["none", "crash@load:after=3,leak@ready", '["hang@weights"]']) == (
        parse_fault("crash@load:after=3"),
        parse_fault("leak@ready"),
        parse_fault("hang@weights"),
    )
    assert parse_fault("error500").stage is Stage.LOAD


@pytest.mark.parametrize("text", ["crush@load", "crash@nowhere", "crash@load:after", "crash@load:when=3"])
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        parse_fault(text)


@given(st.integers(0, 20), st.floats(0.05, 1.0))
def test_a_fault_spoils_its_share_of_the_requests(after: int, share: float) -> None:
    fault = replace(parse_fault("error500@load"), after=after, share=share)
    spoiled = [index for index in range(after + 200) if fault.spoils(index)]
    assert len(spoiled) == pytest.approx(200 * share, abs=1)
    assert all(index >= after for index in spoiled)


# --- the server ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A healthy server for all that does not break it."""
    started = Server(tmp_path_factory.mktemp("server"), "--served-model-name", "m", "also-m", "--max-num-seqs", "4")
    yield started.wait_ready()
    started.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that are closed at the test's end."""
    started: list[Server] = []

    def start_one(*flags: str) -> Server:
        started.append(Server(tmp_path, *flags))
        return started[-1]

    yield start_one
    for one in started:
        one.close()


def test_health_and_models_are_answered(server: Server) -> None:
    assert server.request("GET", "/health") == (200, b"")
    models = json.loads(server.request("GET", "/v1/models")[1])
    assert [(card["id"], card["max_model_len"]) for card in models["data"]] == [("m", 4096), ("also-m", 4096)]


def test_a_completion_streams_one_token_an_event(server: Server) -> None:
    *chunks, usage, done = server.stream(max_tokens=5)
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert done == "[DONE]"
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["length"]
    assert all(choice["text"] for choice in choices)
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"] == {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5}
    assert {json.loads(chunk)["object"] for chunk in chunks} == {"text_completion"}
    assert len({json.loads(chunk)["id"] for chunk in [*chunks, usage]}) == 1


def test_without_include_usage_there_is_no_usage_event(server: Server) -> None:
    answer = events(server.complete(stream=True, max_tokens=2)[1])
    assert len(answer) == 3
    assert all("usage" not in json.loads(chunk) for chunk in answer[:-1])


def test_a_chat_streams_role_then_tokens(server: Server) -> None:
    body = {
        "model": "also-m",
        "messages": [{"role": "user", "content": "hello there"}],
        "max_completion_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, answer = server.request("POST", "/v1/chat/completions", body)
    chunks = [json.loads(chunk) for chunk in events(answer)[:-1]]
    assert status == 200
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[1:-1]] == [None, None, "length"]
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_a_whole_answer_says_what_the_stream_says(server: Server) -> None:
    streamed = [json.loads(chunk)["choices"][0]["text"] for chunk in server.stream(max_tokens=6)[:-2]]
    whole = json.loads(server.complete(max_tokens=6)[1])
    assert whole["choices"][0]["text"] == "".join(streamed)
    assert whole["usage"] == {"prompt_tokens": 3, "total_tokens": 9, "completion_tokens": 6}


def test_a_text_prompt_counts_a_token_for_four_characters(server: Server) -> None:
    assert json.loads(server.complete(prompt="x" * 42)[1])["usage"]["prompt_tokens"] == 11


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        ({"model": "other"}, 404, "does not exist"),
        ({"max_tokens": 5000}, 400, "maximum context length is 4096"),
        ({"max_tokens": 0}, 400, "max_tokens must be at least 1"),
        ({"prompt": []}, 400, "prompt must be"),
        ({"prompt": ["a", "b"]}, 400, "prompt must be"),
        ({"prompt_logprobs": 21}, 400, "prompt_logprobs must be an integer from 0 to 20"),
        ({"prompt_logprobs": True}, 400, "prompt_logprobs must be"),
    ],
)
def test_a_bad_request_is_refused_in_the_wire_form_of_errors(
    server: Server, more: dict[str, Any], status: int, words: str
) -> None:
    got, answer = server.complete(**more)
    assert got == status
    error = json.loads(answer)["error"]
    assert error["code"] == status
    assert words in error["message"]


def metrics(server: Server) -> dict[str, float]:
    text = server.request("GET", "/metrics")[1].decode()
    samples = re.findall(r'^vllm:(\w+)\{engine="0",model_name="m"\} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


def test_metrics_count_tokens_under_vllms_names(server: Server) -> None:
    before = metrics(server)
    server.complete(prompt=list(range(50)), max_tokens=7)
    after = metrics(server)
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 50
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 7
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0
    assert "num_preemptions_total" in after


def test_prompt_log_probabilities_come_in_vllms_form(server: Server) -> None:
    choice = json.loads(server.complete(prompt="one two three", prompt_logprobs=0)[1])["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == 3
    for entry in others:
        ((token, told),) = entry.items()
        assert token.isdigit()
        assert told["logprob"] < 0
        assert told.keys() == {"logprob", "rank", "decoded_token"}
    assert json.loads(server.complete()[1])["choices"][0]["prompt_logprobs"] is None


def test_the_prefix_cache_is_reset_on_request(server: Server) -> None:
    prompt = list(range(100, 180))
    hits = []
    for _ in range(2):
        server.complete(prompt=prompt)
        hits.append(metrics(server)["prefix_cache_hits_total"])
    assert server.request("POST", "/reset_prefix_cache")[0] == 200
    server.complete(prompt=prompt)
    assert hits[1] > hits[0]
    assert metrics(server)["prefix_cache_hits_total"] == hits[1]


def test_requests_are_logged_as_uvicorn_does(server: Server) -> None:
    server.complete()
    line = r'INFO: {5}127\.0\.0\.1:\d+ - "POST /v1/completions HTTP/1\.1" 200 OK'
    assert any(re.fullmatch(line, text) for text in server.lines)


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    body = {"model": "m", "prompt": [1], "max_tokens": 4000, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.request("POST", "/v1/completions", json.dumps(body))
    connection.getresponse().read(10)
    assert metrics(server)["num_requests_running"] == 1
    connection.close()
    server.wait_until(lambda: metrics(server)["num_requests_running"] == 0)


def finish_order(server: Server, asked: dict[str, int]) -> list[str]:
    """The names of concurrent requests of so many tokens, in the order in which they ended."""
    ended: list[str] = []

    def send(name: str, tokens: int) -> None:
        server.stream(max_tokens=tokens)
        ended.append(name)

    threads = [threading.Thread(target=send, args=item) for item in asked.items()]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return ended


def test_a_batch_lets_a_short_request_overtake_a_long_one(start: Callable[..., Server]) -> None:
    wide = start("--max-num-seqs", "2").wait_ready()
    assert finish_order(wide, {"long": 200, "short": 2}) == ["short", "long"]


def test_one_sequence_at_a_time_makes_the_short_request_wait(start: Callable[..., Server]) -> None:
    narrow = start("--max-num-seqs", "1").wait_ready()
    assert finish_order(narrow, {"long": 200, "short": 2}) == ["long", "short"]


def test_sigterm_is_a_clean_end(start: Callable[..., Server]) -> None:
    server = start().wait_ready()
    server.complete()
    server.process.terminate()
    assert server.wait_exit() == 0
    assert server.printed("[shutdown] API server: shutdown triggered")
    assert diagnose(server.lines, exit_code=0).failure is None


def test_a_second_server_on_the_port_ends_with_address_in_use(server: Server, start: Callable[..., Server]) -> None:
    second = start("--port", str(server.port))
    assert second.wait_exit() == 1
    found = diagnose(second.lines, exit_code=1).failure
    assert found is not None
    assert (found.stage, found.kind) == (Stage.CONFIGURATION, Kind.PORT_IN_USE)


# --- the server's faults ---

START_FAULTS = [
    ("refuse@arguments", 2, "api_server.py: error:"),
    ("refuse@configuration", 1, "ValidationError"),
    ("model-not-found@configuration", 1, "not a valid model identifier"),
    ("access-denied@configuration", 1, "gated repo"),
    ("port-in-use@configuration", 1, "Address already in use"),
    ("unsupported@configuration", 1, "not supported"),
    ("device-busy@initialization", 1, "is less than desired GPU memory utilization"),
    ("worker-lost@initialization", 1, "died unexpectedly"),
    ("crash@weights", 1, "RuntimeError: the engine broke down"),
    ("oom@weights", 1, "torch.OutOfMemoryError: CUDA out of memory"),
    ("unsupported@compilation", 1, "not supported"),
    ("oom@kv-cache", 1, "torch.OutOfMemoryError: CUDA out of memory"),
    ("kv-too-small@kv-cache", 1, "KV cache is needed, which is larger than the available"),
    ("oom@graph-capture", 1, "torch.OutOfMemoryError: CUDA out of memory"),
    ("segfault@graph-capture", -signal.SIGSEGV, "Segmentation fault"),
    ("killed@weights", -signal.SIGKILL, "Starting to load model"),
    ("crash@ready", 1, "EngineCore encountered a fatal error"),
]


@pytest.mark.parametrize(("fault", "exit_code", "words"), START_FAULTS)
def test_a_fault_at_the_start_has_its_exit_code_and_its_cause(
    start: Callable[..., Server], fault: str, exit_code: int, words: str
) -> None:
    server = start("--fault", fault)
    assert server.wait_exit() == exit_code
    assert server.printed(words)
    found = diagnose(server.lines, exit_code=exit_code, rules=SIMULATED_RULES).failure
    assert found is not None
    assert (found.stage, found.kind) == (parse_fault(fault).stage, parse_fault(fault).kind)


LOAD_FAULTS = [
    ("crash@load", 1, "RuntimeError: the engine broke down"),
    ("oom@load", 1, "torch.OutOfMemoryError"),
    ("worker-lost@load", 1, "died unexpectedly"),
    ("segfault@load", -signal.SIGSEGV, "Segmentation fault"),
    ("killed@load", -signal.SIGKILL, "Application startup complete."),
]


@pytest.mark.parametrize(("fault", "exit_code", "words"), LOAD_FAULTS)
def test_a_fault_under_load_comes_after_so_many_requests(
    start: Callable[..., Server], fault: str, exit_code: int, words: str
) -> None:
    server = start("--fault", f"{fault}:after=2").wait_ready()
    for _ in range(2):
        assert server.complete()[0] == 200
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        server.complete()
    assert server.wait_exit() == exit_code
    assert server.printed(words)
    found = diagnose(server.lines, exit_code=exit_code, rules=SIMULATED_RULES).failure
    assert found is not None
    assert (found.stage, found.kind) == (Stage.LOAD, parse_fault(fault).kind)


SETTING_FAULTS: list[tuple[list[str], int]] = [
    (["--dtype", "int3"], 2),
    (["--max-num-seq-typo", "4"], 2),
    (["--tensor-parallel-size", "3"], 1),
    (["--max-num-batched-tokens", "64"], 1),
    (["--max-model-len", "100000"], 1),
    (["--dtype", "float32"], 1),
    (["--block-size", "7"], 1),
    (["--gpu-memory-utilization", "0.5"], 1),
    (["--gpu-memory-utilization", "0.6"], 1),
    (["--gpu-memory-utilization", "0.93"], 1),
    (["--gpu-memory-utilization", "0.99"], 1),
    (["--quantization", "awq"], 1),
]


@pytest.mark.parametrize(("flags", "exit_code"), SETTING_FAULTS)
def test_the_server_meets_the_fate_that_the_model_foretells(
    start: Callable[..., Server], flags: list[str], exit_code: int
) -> None:
    server = start(*flags)
    assert server.wait_exit() == exit_code
    own = fate(Setting.from_params({flags[0].removeprefix("--"): flags[1]}))
    foretold = (own.stage, own.kind) if own else (Stage.ARGUMENTS, Kind.BAD_ARGUMENT)
    found = diagnose(server.lines, exit_code=exit_code, rules=SIMULATED_RULES).failure
    assert found is not None
    assert (found.stage, found.kind) == foretold


def test_a_hung_start_prints_nothing_more(start: Callable[..., Server]) -> None:
    server = start("--fault", "hang@weights")
    server.wait_until(lambda: server.printed(" 50% Completed"))
    before = server.lines
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(0.3)
    assert server.lines == before


def test_a_hung_server_answers_nothing(start: Callable[..., Server]) -> None:
    server = start("--fault", "hang@load:after=1").wait_ready()
    assert server.complete()[0] == 200
    for method, path, body in (("POST", "/v1/completions", {"model": "m", "prompt": [1]}), ("GET", "/health", None)):
        with pytest.raises(TimeoutError):
            server.request(method, path, body, timeout_s=0.3)


def test_a_hung_engine_leaves_the_health_check_answering(start: Callable[..., Server]) -> None:
    server = start("--fault", "hang@load:mode=engine").wait_ready()
    with pytest.raises(TimeoutError):
        server.request("POST", "/v1/completions", {"model": "m", "prompt": [1]}, timeout_s=0.3)
    assert server.request("GET", "/health")[0] == 200


def test_a_slow_start_gets_there(start: Callable[..., Server]) -> None:
    assert start("--fault", "slow-start@weights:seconds=0.1").wait_ready().complete()[0] == 200


@pytest.mark.parametrize(
    ("mode", "begin"), [("html", b"<html>"), ("json", b'{"unexpected"'), ("empty", b'data: {"id"')]
)
def test_garbage_comes_with_status_200(start: Callable[..., Server], mode: str, begin: bytes) -> None:
    server = start("--fault", f"garbage@load:mode={mode}").wait_ready()
    status, answer = server.complete(stream=True, stream_options={"include_usage": True})
    assert status == 200
    assert answer.startswith(begin)
    assert b'"text"' not in answer


def test_a_share_of_requests_fails_with_500(start: Callable[..., Server]) -> None:
    server = start("--fault", "error500@load:share=0.25:after=1").wait_ready()
    assert [server.complete()[0] for _ in range(9)].count(500) == 2


def test_answers_are_cut_short(start: Callable[..., Server]) -> None:
    *chunks, usage, _ = start("--fault", "cut-short@load:keep=0.5").wait_ready().stream(max_tokens=8)
    assert len(chunks) == 4
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "stop"
    assert json.loads(usage)["usage"]["completion_tokens"] == 4


def test_a_connection_is_closed_in_the_middle(start: Callable[..., Server]) -> None:
    server = start("--fault", "disconnect@load").wait_ready()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        server.stream(max_tokens=8)
    assert server.request("GET", "/health")[0] == 200


def test_sigterm_is_ignored_where_asked(start: Callable[..., Server]) -> None:
    server = start("--fault", "ignore-term@weights").wait_ready()
    server.process.terminate()
    assert server.complete()[0] == 200
    assert server.process.poll() is None


def test_a_zombie_keeps_printing_its_text(start: Callable[..., Server]) -> None:
    server = start("--fault", "zombie-print@ready:text=late line:every=0.01").wait_ready()
    server.wait_until(lambda: server.lines.count("late line") > 3)


def test_a_fault_with_once_happens_once(start: Callable[..., Server], tmp_path: Path) -> None:
    fault = f"port-in-use@configuration:once={tmp_path / 'mark'}"
    assert start("--fault", fault).wait_exit() == 1
    start("--fault", fault).wait_ready()


def test_leaked_processes_outlive_the_engine_and_print(start: Callable[..., Server]) -> None:
    server = start("--fault", "leak@ready:every=0.02:ttl=20").wait_ready()
    server.wait_until(lambda: len(leaked(server)) == len(TREE))
    server.process.terminate()
    assert server.wait_exit() == 0
    pids = leaked(server)
    try:
        assert set(pids) == set(TREE)
        assert all(Path(f"/proc/{pid}").exists() for pid in pids.values())
        assert os.getsid(pids["daemon"]) != os.getsid(pids["child"])
        os.kill(pids["stubborn"], signal.SIGTERM)
        before = server.log.read_text().count("leaked stubborn")
        server.wait_until(lambda: server.log.read_text().count("leaked stubborn") > before + 2)
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)


def leaked(server: Server) -> dict[str, int]:
    """Kind to process id of the leaked processes that have printed."""
    found = re.findall(r"^leaked (\S+) still prints pid=(\d+)$", server.log.read_text(), re.MULTILINE)
    return {name: int(pid) for name, pid in found}


def test_every_effect_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [effect for effect in Effect if f"{effect}@" not in text] == []
