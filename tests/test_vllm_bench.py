"""vLLM's `bench serve` as the client: what becomes of its results, and of its process. No vLLM is needed.

In its place stands a package `vllm` with the few names that `bench_serve.py` uses, whose `main` does what a test wants.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.load.vllm_bench import BenchFailed, BenchServe, measure, require
from raytune_autotuner.load.workload import Level, Request
from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.errors import ConfigError

C2, R10 = Level("c2", concurrency=2), Level("r10", rate_rps=10.0)
STAND_IN = """
import json, os, sys, time
from dataclasses import dataclass
from pathlib import Path

def add_cli_args(parser):
    for flag in ("save-result", "save-detailed", "skip-tokenizer-init", "ignore-eos"):
        parser.add_argument("--" + flag, action="store_true")
    for option in ("backend", "base-url", "endpoint", "model", "temperature", "num-warmups", "dataset-name",
                   "ready-check-timeout-sec", "result-dir", "result-filename", "max-concurrency"):
        parser.add_argument("--" + option)

def save(args, **result):
    (Path(args.result_dir) / args.result_filename).write_text(json.dumps(result))

def main(args):
    requests = get_samples(args, None)
    BEHAVIOUR
"""
DATASETS = """
from dataclasses import dataclass

@dataclass
class SampleRequest:
    prompt: object
    prompt_len: int
    expected_output_len: int
    request_overrides: dict
    timestamp: float
"""
ANSWER_ALL = """
    t = time.perf_counter()
    n = len(requests)
    save(args, duration=30.0, start_times=[t + 1 + r.timestamp for r in requests], ttfts=[0.5] * n, errors=[""] * n,
         itls=[[0.1] * (r.expected_output_len - 1) for r in requests], input_lens=[r.prompt_len for r in requests],
         output_lens=[r.expected_output_len for r in requests])
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Any:
    """`stand_in(behaviour)`: environment in which `import vllm` finds one whose `bench serve` behaves so."""

    def make(behaviour: str) -> dict[str, str]:
        package = tmp_path / "vllm" / "benchmarks"
        package.mkdir(parents=True)
        (tmp_path / "vllm" / "__init__.py").touch()
        (package / "__init__.py").touch()
        (package / "serve.py").write_text(STAND_IN.replace("    BEHAVIOUR", behaviour))
        (package / "datasets.py").write_text(DATASETS)
        return {"PYTHONPATH": str(tmp_path), "NOTES": str(tmp_path / "notes")}

    return make


def requests(count: int, tokens_out: int = 3, gap_s: float = 0.0) -> list[Request]:
    return [Request(index, [1000 + index] * 8, tokens_out, index * gap_s, 1, "measure") for index in range(count)]


def bench(
    environment: dict[str, str], sent: list[Request], level: Level = C2, within_s: float = 60, **more: Any
) -> Any:
    return measure(
        "http://127.0.0.1:1",
        "m",
        sent,
        level,
        python=sys.executable,
        environment=environment,
        deadline=time.monotonic() + within_s,
        **more,
    )


def test_its_result_becomes_the_same_records_as_ours(stand_in: Any) -> None:
    kept: list[RequestRecord] = []
    counts: list[tuple[int, int, int]] = []
    outcome = bench(stand_in(ANSWER_ALL), requests(2), keep=kept, on_progress=lambda *seen: counts.append(seen))
    assert (outcome.complete, outcome.requests, outcome.trouble) == (True, 2, None)
    assert counts[-1] == (2, 2, 0)
    assert list(outcome.records) == kept
    record = outcome.records[1]
    assert (record.index, record.level, record.round, record.phase, record.error) == (1, "c2", 1, "measure", None)
    assert (record.tokens_in, record.tokens_out, record.tokens_out_wanted) == (8, 3, 3)
    assert (record.scheduled_s, record.sent_s) == (0, 0)
    assert record.token_times_s == pytest.approx((0.5, 0.6, 0.7))
    assert record.ttft_ms == pytest.approx(500)
    assert outcome.duration_s == pytest.approx(0.7)
    assert abs(outcome.started_at - time.time()) < 60


def test_under_a_rate_latency_counts_from_when_a_request_was_due(stand_in: Any) -> None:
    late = ANSWER_ALL.replace("t + 1 + r.timestamp", "t + r.timestamp + (0.25 if r.timestamp > 0.15 else 0)")
    outcome = bench(stand_in(late), requests(3, gap_s=0.1), R10)
    assert [record.scheduled_s for record in outcome.records] == pytest.approx([0, 0.1, 0.2])
    assert [record.sent_s for record in outcome.records] == pytest.approx([0, 0.1, 0.45])
    assert [record.ttft_ms for record in outcome.records] == pytest.approx([500, 500, 750])


def test_it_is_given_the_same_prompts_lengths_and_times(stand_in: Any) -> None:
    note = (
        ANSWER_ALL
        + """
    Path(os.environ["NOTES"]).write_text(json.dumps([[vars(r) for r in requests], vars(args)]))
"""
    )
    environment = stand_in(note)
    sent = [Request(0, [5, 6, 7], 4, 0.5), Request(1, "how are you?", 2, 0.75)]
    bench(environment, sent, R10)
    given, options = json.loads(Path(environment["NOTES"]).read_text())
    assert [(r["prompt"], r["expected_output_len"], r["timestamp"]) for r in given] == [
        ([5, 6, 7], 4, 0.5),
        ("how are you?", 2, 0.75),
    ]
    assert [r["request_overrides"] for r in given] == [{"min_tokens": 4}, {"min_tokens": 2}]
    assert (options["ignore_eos"], options["temperature"], options["num_warmups"]) == (True, "0", "0")
    assert (options["base_url"], options["model"]) == ("http://127.0.0.1:1", "m")


@pytest.mark.parametrize(
    ("level", "dataset", "concurrency"),
    [(C2, "custom", "2"), (R10, "timed_trace", None), (Level("trace", trace=True), "timed_trace", None)],
    ids=lambda part: str(getattr(part, "label", part)),
)
def test_it_keeps_the_load_level(stand_in: Any, level: Level, dataset: str, concurrency: str | None) -> None:
    environment = stand_in(ANSWER_ALL + '    Path(os.environ["NOTES"]).write_text(json.dumps(vars(args)))\n')
    bench(environment, requests(1), level)
    options = json.loads(Path(environment["NOTES"]).read_text())
    assert (options["dataset_name"], options["max_concurrency"]) == (dataset, concurrency)


FAILURES = """
    t = time.perf_counter()
    save(args, duration=30.0, start_times=[t] * 5, ttfts=[0.0, 0.1, 0.1, 0.0, 0.1],
         input_lens=[8] * 5, output_lens=[0, 0, 1, 0, 3],
         itls=[[], [0.1], [0.1, 0.1], [], [0.1, 0.1]],
         errors=["Bad Request", "Traceback...\\n  line\\naiohttp.ClientError: gone\\n", "", "", ""])
"""


def test_what_it_reports_as_zero_or_as_a_success_is_a_failed_record(stand_in: Any) -> None:
    outcome = bench(stand_in(FAILURES), requests(5))
    assert outcome.complete
    assert [record.error for record in outcome.records] == [
        "Bad Request",
        "aiohttp.ClientError: gone",
        "3 output tokens wanted, 1 answered",
        "no token arrived",
        None,
    ]
    assert outcome.records[0].ttft_ms is None
    assert outcome.records[3].tokens_out is None
    assert [record.end_s for record in outcome.records] == pytest.approx([30, 30, 0.3, 30, 0.3])


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("    sys.exit('no such model')", "exit code 1 and no result: no such model"),
        ("    raise ValueError('bad flag')", "exit code 1 and no result: .*ValueError: bad flag"),
        ("    pass", "exit code 1 and no result: .*FileNotFoundError"),
        ("    os.kill(os.getpid(), 9)", "exit code -9 and no result"),
    ],
)
def test_an_end_without_a_result_says_what_it_wrote_last(stand_in: Any, behaviour: str, said: str) -> None:
    with pytest.raises(BenchFailed, match=said):
        bench(stand_in(behaviour), requests(1))


HANG = """
    Path(os.environ["NOTES"]).write_text(str(os.getpid()))
    print("  40%|####      | 2/5 [00:01<00:02,  2.0it/s]", file=sys.stderr)
    time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def noted_pid(environment: dict[str, str]) -> int:
    notes = Path(environment["NOTES"])
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if notes.is_file() and notes.read_text():
            return int(notes.read_text())
        time.sleep(0.02)
    raise AssertionError("the stand-in never started")


class EngineGone(Exception):
    pass


def test_it_is_ended_at_the_deadline(stand_in: Any) -> None:
    environment = stand_in(HANG)
    outcome = bench(environment, requests(5), within_s=3)
    assert (outcome.complete, outcome.records, outcome.requests) == (False, (), 5)
    assert not is_alive(noted_pid(environment))


def test_it_is_ended_when_the_engine_is_gone_and_tells_its_progress(stand_in: Any) -> None:
    environment = stand_in(HANG)
    counts: list[tuple[int, int, int]] = []

    def check() -> None:
        if counts and counts[-1] == (2, 5, 0):
            raise EngineGone

    with pytest.raises(EngineGone):
        bench(environment, requests(5), check=check, on_progress=lambda *seen: counts.append(seen))
    assert not is_alive(noted_pid(environment))


def test_vllm_is_imported_once_for_many_loads(stand_in: Any) -> None:
    environment = stand_in(
        ANSWER_ALL + '    open(os.environ["NOTES"], "a").write(f"{os.getpid()} {len(requests)}\\n")\n'
    )
    with BenchServe(sys.executable, environment) as process:
        loads = [
            process.measure("http://127.0.0.1:1", "m", requests(count), C2, deadline=time.monotonic() + 30)
            for count in (3, 1, 2)
        ]
    assert [len(load.records) for load in loads] == [3, 1, 2]
    pids, counts = zip(*(line.split() for line in Path(environment["NOTES"]).read_text().splitlines()), strict=True)
    assert counts == ("3", "1", "2")
    assert len(set(pids)) == 1
    assert not is_alive(int(pids[0]))


def test_a_load_that_was_ended_does_not_spoil_the_next_one(stand_in: Any) -> None:
    environment = stand_in("    if requests[0].prompt == 'hang': time.sleep(60)\n" + ANSWER_ALL)
    hanging = [Request(0, "hang", 1)]
    with BenchServe(sys.executable, environment) as process:
        ended = process.measure("http://127.0.0.1:1", "m", hanging, C2, deadline=time.monotonic() + 1)
        good = process.measure("http://127.0.0.1:1", "m", requests(2), C2, deadline=time.monotonic() + 30)
    assert (ended.complete, good.complete, len(good.records)) == (False, True, 2)


def test_it_ends_with_the_process_that_started_it(stand_in: Any) -> None:
    environment = stand_in(HANG)
    program = """
import json, sys, time
from raytune_autotuner.load.client import LoadRun
from raytune_autotuner.load.vllm_bench import measure
from raytune_autotuner.load.workload import Level, Request
measure("http://127.0.0.1:1", "m", [Request(0, [1], 1)], Level("c1", 1), python=sys.executable,
        environment=json.loads(sys.argv[1]), deadline=time.monotonic() + 60)
"""
    caller = subprocess.Popen([sys.executable, "-c", program, json.dumps(environment)])
    pid = noted_pid(environment)
    assert is_alive(pid)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    until = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_alive(pid)


def test_neither_proxies_nor_keys_are_handed_on(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    environment = stand_in(ANSWER_ALL + '    Path(os.environ["NOTES"]).write_text(json.dumps(dict(os.environ)))\n')
    bench({**environment, "MARK": "a:b"}, requests(1))
    seen = json.loads(Path(environment["NOTES"]).read_text())
    assert not {"HTTP_PROXY", "OPENAI_API_KEY"} & set(seen)
    assert (seen["MARK"], seen["PATH"]) == ("a:b", os.environ["PATH"])


def test_a_python_without_vllm_is_refused(tmp_path: Path) -> None:
    (bare := tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ConfigError, match=r"workload\.client: .* has no vLLM"):
        require(str(bare))
    with pytest.raises(ConfigError, match=r"engine\.python: .* does not run as a Python"):
        require(str(tmp_path / "none"))
