"""The installed vLLM's own check of settings, against what its servers were seen to do with the same settings.

One process is asked for all of it; its import of vllm takes most of the time. No server is started.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine.reading import diagnose
from raytune_autotuner.engine.vllm import VllmEngine
from raytune_autotuner.engine.vllm_checker import VllmChecker
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.file import parse_study
from tests.studies import BASE, merged

pytestmark = pytest.mark.vllm

LOGS = Path(__file__).parent.parent / "engine_logs"


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    changes = {
        "model": "bundled:smollm2-135m-instruct",
        "engine": {"kind": "vllm", "python": sys.executable, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
    }
    engine = VllmEngine(parse_study(merged(BASE, changes)))
    engine.preflight()
    yield engine
    engine.close()


def logged(name: str) -> Failure:
    """What a server's log shows."""
    lines = (LOGS / f"{name}.log").read_text(encoding="utf-8").splitlines()
    failure = diagnose(lines, exit_code=1).failure
    assert failure is not None
    return failure


@pytest.mark.parametrize(
    ("log", "params"),
    [
        ("tp2heads", {"tensor-parallel-size": 2}),
        ("fewtokens", {"max-num-seqs": 64, "max-num-batched-tokens": 4}),
        ("nochunk", {"enable-chunked-prefill": False, "max-num-batched-tokens": 256, "max-model-len": 2048}),
        ("zeroseqs", {"max-num-seqs": 0}),
        ("modellen", {"max-model-len": 100000}),
        ("util150", {"gpu-memory-utilization": 1.5}),
        ("awq", {"quantization": "awq"}),
        ("badquant", {"quantization": "nosuch"}),
        ("specmethod", {"speculative-config": {"method": "nosuch", "num_speculative_tokens": 2}}),
        ("kvspacehalf", {"env:VLLM_CPU_KVCACHE_SPACE": "1.5"}),
        ("badchoice", {"dtype": "float8"}),
        ("specjson", {"speculative-config": "{method: ngram"}),
    ],
)
def test_what_a_start_was_seen_to_refuse_is_refused_in_the_same_words(
    engine: VllmEngine, log: str, params: dict[str, Any]
) -> None:
    seen, failure = logged(log), engine.refuse(params)
    assert failure is not None
    assert (failure.stage, failure.kind, failure.blame) == (seen.stage, seen.kind, Blame.PARAMETERS)
    assert failure.remedy == seen.remedy
    assert failure.evidence.split("error: ")[-1][:60] == seen.evidence.split("error: ")[-1][:60]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max-num-seqs": 4, "max-num-batched-tokens": 128},
        {"block-size": 16},  # fails while the KV cache is made, which only a start shows
        {"enforce-eager": True, "enable-prefix-caching": False},
        {"dtype": "float16", "kv-cache-dtype": "fp8"},
        {"speculative-config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}},
        {"compilation-config": {"mode": 0}},
        {"max-model-len": "1k", "env:VLLM_CPU_OMP_THREADS_BIND": "0-1"},
        {"max-model-len": 20000, "env:VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
    ],
    ids=str,
)
def test_what_may_start_is_not_refused(engine: VllmEngine, params: dict[str, Any]) -> None:
    assert engine.refuse(params) is None


def test_a_kv_cache_that_holds_no_request_is_refused_with_the_logs_figures(engine: VllmEngine) -> None:
    seen = logged("kvsmall")
    failure = engine.refuse({"env:VLLM_CPU_KVCACHE_SPACE": "", "kv-cache-memory-bytes": 10**8, "max-model-len": 8192})
    assert failure is not None
    assert (failure.stage, failure.kind) == (seen.stage, seen.kind) == (Stage.KV_CACHE, Kind.KV_CACHE_TOO_SMALL)
    assert "(8192), (0.18 GiB KV cache is needed" in seen.evidence
    assert "one request of 8192 tokens 0.18 GiB does not fit in 0.09 GiB" in failure.evidence


def test_a_kv_cache_beyond_the_machine_is_refused(engine: VllmEngine) -> None:
    seen, failure = logged("kvhuge"), engine.refuse({"env:VLLM_CPU_KVCACHE_SPACE": 4000, "max-num-seqs": 8})
    assert failure is not None
    assert (failure.stage, failure.kind) == (seen.stage, seen.kind)
    assert "KV cache 4000.0 GiB do not fit in" in failure.evidence


def setting(draw: random.Random) -> tuple[list[str], dict[str, str]]:
    """Some setting, good or bad."""
    options: list[tuple[str, list[str]]] = [
        ("--max-model-len", ["512", "2048", "100000"]),
        ("--max-num-seqs", ["4", "256"]),
        ("--max-num-batched-tokens", ["128", "4096"]),
        ("--block-size", ["16", "128"]),
        ("--tensor-parallel-size", ["1", "2", "3"]),
        ("--dtype", ["float32", "float8"]),
        ("--kv-cache-dtype", ["fp8", "nosuch"]),
        ("--quantization", ["fp8", "nosuch"]),
        ("--speculative-config", ['{"method": "ngram", "num_speculative_tokens": 2}', '{"method": "nosuch"}']),
        ("--compilation-config", ['{"mode": 0}', '{"nosuch": 1}']),
    ]
    argv = [part for name, values in options if draw.random() < 0.3 for part in (name, draw.choice(values))]
    argv += draw.choice([[], ["--no-enable-chunked-prefill"], ["--enforce-eager"]])
    return argv, draw.choice([{}, {"VLLM_CPU_KVCACHE_SPACE": "2"}, {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}])


def test_a_warm_process_says_what_a_fresh_one_says_in_milliseconds(engine: VllmEngine) -> None:
    draw = random.Random(1)
    asked = [setting(draw) for _ in range(60)]
    tell = ["max-model-len", "max-num-seqs", "max-num-batched-tokens", "kv-cache-memory-bytes", "block-size"]

    def answers(checker: VllmChecker, order: list[int]) -> tuple[dict[int, Any], list[float]]:
        told, times_ms = {}, []
        for index in order:
            argv, env = asked[index]
            began = time.monotonic()
            verdict = checker.check(["--model", engine.model, *argv], env, tell)
            times_ms.append((time.monotonic() - began) * 1000)
            assert verdict is not None
            told[index] = (verdict.lines[-3:], verdict.exit_code, verdict.in_force)
        return told, times_ms

    forwards, times_ms = answers(engine._checker, [*range(len(asked))])
    shuffled = draw.sample(range(len(asked)), len(asked))
    with VllmChecker(sys.executable, engine._environment({})) as fresh:
        assert answers(fresh, shuffled)[0] == forwards
    assert {bool(lines) for lines, _, _ in forwards.values()} == {True, False}
    print(f"median {statistics.median(times_ms):.1f} ms, p95 {statistics.quantiles(times_ms, n=20)[-1]:.1f} ms")
