"""The quality guard and the engine's counters on a real vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.processes import free_port, make_mark
from raytune_autotuner.engine.server import EngineServer
from raytune_autotuner.load import client
from raytune_autotuner.load.engine_metrics import EngineWatch
from raytune_autotuner.load.quality import ask, texts
from raytune_autotuner.load.workload import Level, Request
from raytune_autotuner.score.quality import Quality, judge, loss
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import QualitySpec

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

START_S = 240.0
STUDY = {
    "study": "quality",
    "model": "bundled:smollm2-135m-instruct",
    "engine": {
        "kind": "vllm",
        "args": {"max-model-len": 1024, "enforce-eager": True},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    },
    "search_space": {"dtype": {"choice": ["bfloat16", "float16"]}},
}


@contextmanager
def serving(folder: Path, params: dict[str, Any]) -> Iterator[tuple[EngineServer, str]]:
    """A vLLM with `params` that answers, and its model's name."""
    engine, deadline = make_engine(parse_study(STUDY)), time.monotonic() + START_S
    with free_port() as port:
        mark = make_mark("quality-test", folder.name)
        with EngineServer(
            engine.launch(params, port),
            port,
            folder,
            rules=engine.rules,
            mark=mark,
            deadline=deadline,
            timeout_s=START_S,
        ) as server:
            server.wait_ready()
            server.wait_ready(lambda: client.completion_error(server.base_url, engine.served_model, 30) is None)
            yield server, engine.served_model


def quality(folder: Path, params: dict[str, Any]) -> Quality:
    with serving(folder, params) as (server, model):
        return ask(server.base_url, model, deadline=time.monotonic() + 120, check=server.check)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Quality:
    return quality(tmp_path_factory.mktemp("baseline"), {})


def test_a_small_model_finds_the_text_neither_trivial_nor_random(baseline: Quality) -> None:
    assert 3 < baseline.perplexity < 100
    assert len(baseline.answers) == len(texts().prompts)
    assert sum(map(bool, baseline.answers)) > len(baseline.answers) / 2


@pytest.mark.parametrize(
    ("params", "passes"),
    [
        ({}, True),
        ({"dtype": "float16"}, True),
        ({"kv-cache-dtype": "fp8_e5m2"}, False),
        ({"hf-overrides": {"rms_norm_eps": 0.01}}, False),
    ],
    ids=lambda value: str(value),
)
def test_rounding_passes_and_damage_fails(
    tmp_path: Path, baseline: Quality, params: dict[str, Any], passes: bool
) -> None:
    found = loss(quality(tmp_path / "engine", params), baseline)
    assert (judge(found, QualitySpec()) is None) == passes, found


def test_a_load_shows_its_queue_its_kv_cache_and_its_prefix_hits(tmp_path: Path) -> None:
    requests = [Request(index, [2000] * 96, 24) for index in range(24)]
    with serving(tmp_path / "engine", {"max-num-seqs": 4}) as (server, model):
        with EngineWatch(server.base_url, interval_s=0.2) as watch:
            client.measure(server.base_url, model, requests, Level("c12", 12), deadline=time.monotonic() + 120)
        metrics = watch.summary()
    assert metrics["queue_length_max"] >= 6
    assert 0 < metrics["kv_cache_usage_max"] <= 1
    assert metrics["preemptions"] == 0
    assert 0 <= metrics["prefix_cache_hit_rate"] <= 1
    grown = [watch.series[at].generation_tokens for at in (0, -1)]
    assert grown[1] is not None
    assert grown[1] - (grown[0] or 0) == 24 * 24
