"""Our client and vLLM's own `bench serve` on one server, in turn, with the same requests: they say the same.

Prints the table of docs/measuring.md: python -m pytest -s tests/vllm/test_clients_agree.py
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.processes import free_port, make_mark
from raytune_autotuner.engine.server import EngineServer
from raytune_autotuner.load import client, vllm_bench
from raytune_autotuner.load.client import LoadRun
from raytune_autotuner.load.workload import generate, levels
from raytune_autotuner.score.metrics import summarize
from raytune_autotuner.score.records import Phase
from raytune_autotuner.study.file import parse_study

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

RUNS = 6
T_999 = 4.59
"""Student's t at 99.9 % for twice six runs: six comparisons together are wrong in fewer than one test in 150."""
TOO_NOISY = 0.3
"""Where clients may differ in throughput by more than this share, the machine is too busy to tell anything."""
LEAST = 0.03
"""By this share of the value the two may differ for certain: each has its own CPU use and its own first requests."""
COMPARED = ("output_throughput_tok_s", "ttft_ms_mean", "tpot_ms_mean", "itl_ms_mean", "e2el_ms_mean", "goodput_rps")
STUDY = parse_study(
    {
        "study": "clients-agree",
        "model": "bundled:smollm2-135m-instruct",
        "engine": {
            "kind": "vllm",
            "args": {"max-model-len": 512, "enforce-eager": True},
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        },
        "search_space": {"max-num-seqs": {"int": [1, 64]}},
        "workload": {"traffic": "U(24,40)/(8,24)", "concurrency": 8, "requests": 64},
    }
)


@dataclass(frozen=True)
class Served:
    """The study's baseline on a server, and both clients, warmed up."""

    url: str
    model: str
    clients: dict[str, Callable[..., LoadRun]]

    def loads(self, runs: int) -> dict[str, list[LoadRun]]:
        """`runs` loads by client, the same requests each time, sent in turn."""
        loads: dict[str, list[LoadRun]] = {name: [] for name in self.clients}
        for number in range(runs):
            for name in sorted(self.clients, reverse=number % 2 == 1):
                _reset_prefix_cache(self.url)
                loads[name].append(self.send(name, "measure"))
        return loads

    def send(self, name: str, phase: Phase) -> LoadRun:
        (level,) = levels(STUDY.workload)
        requests = generate(STUDY.workload, level, phase=phase)
        return self.clients[name](self.url, self.model, requests, level, deadline=time.monotonic() + 120)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = make_engine(STUDY)
    with (
        free_port() as port,
        EngineServer(
            engine.launch({}, port),
            port,
            tmp_path_factory.mktemp("served"),
            rules=engine.rules,
            mark=make_mark("clients-agree", "0"),
            deadline=time.monotonic() + 600,
            timeout_s=600,
        ) as server,
        vllm_bench.BenchServe(sys.executable) as bench,
    ):
        server.wait_ready(lambda: client.completion_error(server.base_url, engine.served_model, 30) is None)
        clients: dict[str, Callable[..., LoadRun]] = {"ours": client.measure, "bench serve": bench.measure}
        served = Served(server.base_url, engine.served_model, clients)
        for name in clients:
            served.send(name, "warmup")
        yield served


def _reset_prefix_cache(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/reset_prefix_cache", method="POST"), timeout=10).close()


def test_both_send_the_same_and_all_of_it_is_answered(served: Served) -> None:
    (ours,), (theirs,) = served.loads(1).values()
    assert [record.error for record in (*ours.records, *theirs.records)] == [None] * 2 * STUDY.workload.requests
    assert ours.trouble is None
    assert theirs.trouble is None
    assert _counts(ours) == _counts(theirs)


def _counts(load: LoadRun) -> list[Any]:
    return [(r.index, r.level, r.round, r.tokens_in, r.tokens_out, len(r.token_times_s)) for r in load.records]


def test_both_say_the_same_within_what_each_says_of_itself(served: Served) -> None:
    measured = served.loads(RUNS)
    first = summarize(measured["ours"][0].records, measured["ours"][0].duration_s)
    # A limit that most requests keep, and not all: goodput has something to count.
    slo = {"e2el_ms": {"p90": first["e2el_ms_p90"]}}
    metrics = {
        name: [summarize(load.records, load.duration_s, slo) for load in loads] for name, loads in measured.items()
    }
    print("\n\n| metric | ours | bench serve | difference | may differ by |\n|---|--:|--:|--:|--:|")
    apart = {name: _compare(name, *([run[name] for run in runs] for runs in metrics.values())) for name in COMPARED}
    if apart["output_throughput_tok_s"][1] > TOO_NOISY:
        pytest.skip("this machine is too busy: the loads of one client differ too much among themselves")
    assert not [name for name, (difference, allowed) in apart.items() if abs(difference) > allowed]


def _compare(name: str, ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """(by which share the two differ, by how much they may for what runs of one client differ); prints a row."""
    middle = statistics.mean(ours)
    difference = statistics.mean(theirs) / middle - 1
    error = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / RUNS) / middle
    allowed = LEAST + T_999 * error
    print(f"| `{name}` | {_shown(ours)} | {_shown(theirs)} | {difference:+.1%} | {allowed:.1%} |")
    return difference, allowed


def _shown(values: list[float]) -> str:
    return f"{statistics.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})"
