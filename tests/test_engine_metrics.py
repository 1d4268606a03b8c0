"""The engine's own counters during a load, read from a real page."""

from __future__ import annotations

import http.server
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from raytune_autotuner.load import client
from raytune_autotuner.load.engine_metrics import (
    EngineWatch,
    Sample,
    read_page,
    read_series,
    summarize,
    write_series,
)
from raytune_autotuner.load.workload import Level, Request
from tests.simulated_server import Server, free_port

# Two engines behind one address, as data parallelism has them; what stands in between is passed over.
PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a \\"b\\" {c}"} 3.0
vllm:num_requests_running{engine="1",model_name="a \\"b\\" {c}"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 5.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.76e+09
vllm:prefix_cache_queries_total{engine="0",model_name="m"} NaN
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 9.0
process_cpu_seconds_total 12.5
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A small engine: two sequences at a time, and room in the KV cache for hardly more than two requests."""
    flags = ("--max-num-seqs", "2", "--max-model-len", "128", "--noise", "0", "--speed", "2")
    started = Server(tmp_path_factory.mktemp("server"), *flags, "--kv-cache-memory-bytes", "72Mi")
    yield started.wait_ready()
    started.close()


@pytest.fixture
def base_url() -> Iterator[str]:
    """A server that has no page of metrics."""
    handler = http.server.BaseHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        thread = threading.Thread(target=plain.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{plain.server_port}"
        plain.shutdown()
        thread.join()


def load(server: Server, requests: int, prompt: list[int] | None = None, concurrency: int = 8) -> None:
    asked = [Request(i, prompt or [1000 + i] * 64, 60) for i in range(requests)]
    done = client.measure(server.base_url, "m", asked, Level("any", concurrency), deadline=time.monotonic() + 30)
    assert [record.error for record in done.records] == [None] * requests


def test_a_load_shows_its_queue_its_kv_cache_and_its_preemptions(server: Server) -> None:
    with EngineWatch(server.base_url, interval_s=0.03) as watch:
        load(server, 10)
    metrics = watch.summary()
    assert 4 <= metrics["queue_length_max"] <= 8
    assert 0 < metrics["queue_length_mean"] < metrics["queue_length_max"]
    assert 0 < metrics["kv_cache_usage_mean"] < metrics["kv_cache_usage_max"] <= 1
    assert metrics["preemptions"] > 0
    assert metrics["prefix_cache_hit_rate"] == 0
    assert watch.series[-1].generation_tokens is not None
    assert watch.series[-1].generation_tokens >= 10 * 60
    assert [s.seconds for s in watch.series] == sorted(s.seconds for s in watch.series)


def test_each_load_counts_only_what_it_added(server: Server) -> None:
    load(server, 2, prompt=[7] * 64)
    with EngineWatch(server.base_url) as watch:
        load(server, 2, prompt=[7] * 64, concurrency=1)
    # All but the last token of each prompt is in the cache, in whole blocks or up to that token.
    assert watch.summary()["prefix_cache_hit_rate"] == pytest.approx(63 / 64, abs=0.2)
    assert watch.summary()["preemptions"] == 0


def test_a_load_shorter_than_the_interval_has_counters_but_no_means(server: Server) -> None:
    with EngineWatch(server.base_url) as watch:
        load(server, 1)
    assert watch.summary().keys() == {"preemptions", "prefix_cache_hit_rate"}
    assert [sample.edge for sample in watch.series] == [True, True]


def test_an_engine_without_the_page_has_no_values_at_all(base_url: str) -> None:
    with EngineWatch(base_url, interval_s=0.01) as watch:
        time.sleep(0.05)
    assert (watch.series, watch.summary()) == ((), {})


def test_an_engine_that_is_gone_has_no_values_and_is_not_waited_for() -> None:
    with EngineWatch(f"http://127.0.0.1:{free_port()}") as watch:
        pass
    assert watch.summary() == {}


def test_an_engine_that_dies_under_the_watch_leaves_what_was_seen(tmp_path: Path) -> None:
    server = Server(tmp_path).wait_ready()
    with EngineWatch(server.base_url, interval_s=0.02) as watch:
        server.wait_until(lambda: len(watch.series) > 2)
        server.close()
        time.sleep(0.05)
    assert "queue_length_mean" in watch.summary()
    assert "preemptions" not in watch.summary()


def test_an_error_in_the_load_passes_and_ends_the_watch(server: Server) -> None:
    with pytest.raises(KeyError), EngineWatch(server.base_url, interval_s=0.01) as watch:
        raise KeyError("as a load may")
    before = len(watch.series)
    time.sleep(0.05)
    assert len(watch.series) == before


def test_proxies_in_the_environment_are_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with EngineWatch(server.base_url) as watch:
        pass
    assert len(watch.series) == 2


def test_several_engines_behind_one_page_are_one() -> None:
    assert read_page(PAGE) == {"running": 7, "waiting": 5, "kv_cache_usage": 0.5, "preemptions": 2}


@pytest.mark.parametrize("page", ["", "<html><body>it works!</body></html>", '{"detail": "Not Found"}'])
def test_what_is_no_page_of_metrics_has_no_values(page: str) -> None:
    assert read_page(page) == {}


def test_rounds_are_pooled() -> None:
    first = [Sample(0, True, preemptions=1), Sample(1, False, waiting=2), Sample(2, True, preemptions=4)]
    second = [Sample(0, True, preemptions=4), Sample(1, False, waiting=4), Sample(2, True, preemptions=5)]
    assert summarize([first, second]) == {"preemptions": 4, "queue_length_mean": 3, "queue_length_max": 4}


def test_a_counter_that_one_round_lacks_is_absent() -> None:
    whole = [Sample(0, True, preemptions=1), Sample(2, True, preemptions=4)]
    for half in (whole[:1], [Sample(0, True), Sample(1, True)], []):
        assert "preemptions" not in summarize([whole, half])


def test_without_a_look_at_the_prefix_cache_there_is_no_hit_rate() -> None:
    idle = [Sample(second, True, prefix_queries=64, prefix_hits=0) for second in range(2)]
    assert "prefix_cache_hit_rate" not in summarize([idle])


def test_series_are_kept_as_parquet(server: Server, tmp_path: Path) -> None:
    loads = {}
    for level, number in itertools.product(("c2", "c8"), range(2)):
        with EngineWatch(server.base_url, interval_s=0.02) as watch:
            load(server, 2)
        loads[level, number] = watch.series
    path = tmp_path / "engine_metrics.parquet"
    write_series(path, loads)
    assert read_series(path) == loads
    table = pd.read_parquet(path)
    assert set(table["level"]) == {"c2", "c8"}
    assert table["waiting"].max() >= 0


def test_a_trial_without_samples_has_a_file_too(tmp_path: Path) -> None:
    write_series(tmp_path / "engine_metrics.parquet", {("c1", 0): ()})
    assert read_series(tmp_path / "engine_metrics.parquet") == {}
