"""The load client against a real server on loopback that answers well or badly, byte by byte."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.load.client import LoadRun, completion_error, measure, run
from raytune_autotuner.load.connection import Pool
from raytune_autotuner.load.parquet import read_records, write_records
from raytune_autotuner.load.stream import BadAnswer, TokenStream
from raytune_autotuner.load.trouble import Clocks
from raytune_autotuner.load.workload import Level, Request
from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.failure import Blame, Kind

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]
C1, C4 = Level("c1", concurrency=1), Level("c4", concurrency=4)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def sse(value: Any, **dumps: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value, **dumps).encode()) + b"\n\n"


def text_event(text: str = " word", **dumps: Any) -> bytes:
    return sse({"id": "cmpl-1", "choices": [{"index": 0, "text": text}], "usage": None}, **dumps)


def usage_event(tokens_in: int, tokens_out: int, **dumps: Any) -> bytes:
    return sse({"choices": [], "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}}, **dumps)


DONE = sse(b"[DONE]")


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def stream(writer: asyncio.StreamWriter, *events: bytes, pause_s: float = 0.0) -> None:
    writer.write(HEAD)
    for event in events:
        await asyncio.sleep(pause_s)
        writer.write(chunked(event))
    writer.write(b"0\r\n\r\n")


async def well(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    wanted, tokens_in = body["max_tokens"], len(body["prompt"])
    await stream(writer, *[text_event()] * wanted, usage_event(tokens_in, wanted), DONE, pause_s=0.002)


def status(code: int, text: bytes) -> Answer:
    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%s" % (code, len(text), text))

    return answer


def events(*data: bytes) -> Answer:
    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await stream(writer, *data)

    return answer


async def reset(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunked(text_event()))
    await writer.drain()
    writer.transport.abort()


async def hang_up(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.close()


async def stall(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunked(text_event()))
    await asyncio.sleep(30)


def raw(data: bytes, close: bool = False) -> Answer:
    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            await writer.drain()
            writer.close()

    return answer


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """A base URL whose every request is answered by `answer`; bodies are checked by `json.loads`."""
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                assert head.startswith(b"POST /v1/completions ")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
                await answer(json.loads(await reader.readexactly(int(length.split(b":")[1]))), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            handlers.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=2**24)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(handlers):
            task.cancel()
        if handlers:
            await asyncio.wait(handlers)


def requests(count: int, tokens_out: int = 4, gap_s: float = 0.0, tokens_in: int = 8) -> list[Request]:
    return [Request(index, [1000 + index] * tokens_in, tokens_out, index * gap_s) for index in range(count)]


def load(answer: Answer, sent: list[Request], level: Level = C4, within_s: float = 20.0, **options: Any) -> LoadRun:
    async def go() -> LoadRun:
        async with serving(answer) as url:
            return await run(url, "m", sent, level, deadline=time.monotonic() + within_s, **options)

    return asyncio.run(go())


def only(outcome: LoadRun) -> RequestRecord:
    (record,) = outcome.records
    return record


def test_every_request_gets_a_record_with_the_servers_own_counts() -> None:
    outcome = load(well, requests(10))
    assert outcome.complete
    assert [record.index for record in outcome.records] == list(range(10))
    for record in outcome.records:
        assert record.error is None
        assert (record.tokens_in, record.tokens_out, len(record.token_times_s)) == (8, 4, 4)
        assert 0 <= record.scheduled_s < record.sent_s  # due when its place is free, and sent once it has a connection
        assert record.first_token_s == record.token_times_s[0]
        assert record.sent_s < record.token_times_s[0] <= record.token_times_s[-1] <= record.end_s
    assert outcome.duration_s == max(record.end_s for record in outcome.records)
    assert abs(outcome.started_at - time.time()) < 60
    assert outcome.client_cpu_share > 0


def test_requests_ask_for_an_exact_number_of_tokens_as_a_stream_with_usage() -> None:
    bodies: list[dict[str, Any]] = []

    async def spy(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        bodies.append(body)
        await well(body, writer)

    load(spy, requests(1, tokens_out=3))
    assert bodies == [
        {
            "model": "m",
            "prompt": [1000] * 8,
            "max_tokens": 3,
            "min_tokens": 3,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_closed_loop_keeps_the_concurrency_and_reuses_its_connections() -> None:
    open_now, most, ports = 0, 0, set()

    async def count(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most
        ports.add(writer.get_extra_info("peername")[1])
        open_now += 1
        most = max(most, open_now)
        await well(body, writer)
        open_now -= 1

    outcome = load(count, requests(20), C4)
    assert not [record.error for record in outcome.records if record.error]
    assert most == 4
    assert len(ports) == 4


def test_open_loop_latency_counts_from_the_scheduled_time() -> None:
    outcome = load(well, requests(5, gap_s=0.05), Level("r20", rate_rps=20))
    for record in outcome.records:
        assert record.scheduled_s == pytest.approx(record.index * 0.05)
        assert record.sent_s >= record.scheduled_s
        assert record.ttft_ms is not None
        assert record.first_token_s is not None
        assert record.ttft_ms == pytest.approx((record.first_token_s - record.scheduled_s) * 1e3)


def test_open_loop_does_not_wait_for_answers() -> None:
    async def slow(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        await well(body, writer)

    outcome = load(slow, requests(10, gap_s=0.01), Level("r100", rate_rps=100))
    assert max(record.sent_s for record in outcome.records) < min(record.end_s for record in outcome.records)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (status(500, b'{"error": {"message": "engine is gone", "code": 500}}'), "HTTP 500: engine is gone"),
        (status(400, b'{"detail": "no such model"}'), "HTTP 400: {'detail': 'no such model'}"),
        (status(502, b"<h1>Bad\n gateway</h1>"), "HTTP 502: <h1>Bad gateway</h1>"),
        (reset, "ConnectionResetError: "),
        (hang_up, "ConnectionResetError: .* before its answer was complete"),
        (raw(b"\x00\x01 not HTTP\r\n\r\n"), "not HTTP: "),
        (raw(b"HTTP/1.1 fine\r\n\r\n"), "not HTTP: 'http/1.1 fine'"),
        (raw(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000), "no end of the headers"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"), "not a length: 'many'"),
        (raw(HEAD + b"zz\r\nwhat\r\n"), "not the size of a chunk: 'zz'"),
        (raw(HEAD + b"-4\r\nwhat\r\n"), "a chunk of -4 bytes"),
        (raw(HEAD + b"ffffffff\r\nwhat\r\n"), "a chunk of 4,294,967,295 bytes"),
        (raw(HEAD + b"4\r\nwhat??"), "not a chunk"),
        (raw(HEAD + b"8" * 200_000), "not the size of a chunk: '8888"),
        (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "HTTP 204"),
        (raw(b"HTTP/1.1 307 Elsewhere\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"), "HTTP 307"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), "no usage after 0 chunks"),
        (events(text_event(), sse({"error": {"message": "out of blocks"}}), DONE), "in the stream: out of blocks"),
        (events(sse({"error": "plain text"})), "in the stream: plain text"),
        (events(b"<html>what?</html>\n\n"), "not an event: '<html>what.*"),
        (events(sse(b"{garbage")), "not JSON: '{garbage'"),
        (events(sse([1, 2])), "not a chunk"),
        (events(sse({"choices": 5, "usage": {}})), "not a chunk"),
        (events(sse({"choices": [{"delta": "x", "role": "a"}], "usage": {}})), "not a chunk"),
        (events(sse(b"[" * 100_000)), r"not JSON: '\[\["),
        (status(400, b"[" * 100_000), r"HTTP 400: \[\["),
        (status(400, b'{"error": {"message": "half of \\ud83d"}}'), r"HTTP 400: half of \?"),
        (events(text_event(), usage_event(8, 2**70), DONE), "no usage"),
        (events(b'{"text": "all at once, not streamed"}'), "cut short after"),
        (events(text_event(), text_event()), "cut short: no usage after 2 chunks"),
        (events(text_event(), usage_event(8, 1), DONE), "4 output tokens wanted, 1 answered"),
        (events(usage_event(8, 4), DONE), "no token arrived"),
        (events(*[text_event()] * 4, usage_event(7, 4), DONE), "prompt cut short: 8 tokens sent, 7 read"),
        (events(sse({"choices": [], "usage": {"completion_tokens": "four"}}), DONE), "no usage"),
        (events(DONE), "no usage after 0 chunks"),
        (events(), "no usage after 0 chunks"),
        (events(b"x" * 3_000_000), "no event in"),
    ],
)
def test_a_bad_answer_is_a_failed_record_that_says_why(answer: Answer, error: str) -> None:
    outcome = load(answer, requests(3))
    assert outcome.complete
    assert len(outcome.records) == 3
    for record in outcome.records:
        assert record.error is not None
        assert not record.ok
        assert len(record.error) <= 200
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(outcome.records[0].error)


def test_one_bad_answer_does_not_spoil_the_others() -> None:
    async def every_third(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await (reset if body["prompt"][0] % 3 == 0 else well)(body, writer)

    outcome = load(every_third, requests(12))
    assert [record.index for record in outcome.records if not record.ok] == [2, 5, 8, 11]


def test_nothing_listening_is_a_failed_record() -> None:
    outcome = measure("http://127.0.0.1:1", "m", requests(2), C4, deadline=time.monotonic() + 20)
    assert outcome.complete
    assert all("Connect" in (record.error or "") for record in outcome.records)


def test_a_chunk_of_several_tokens_does_not_distort_the_counts() -> None:
    outcome = load(events(text_event(" a b c"), text_event(" d"), usage_event(8, 4), DONE), requests(1))
    record = only(outcome)
    assert record.ok
    assert (record.tokens_out, len(record.token_times_s)) == (4, 2)
    first, last = record.token_times_s
    assert record.tpot_ms == pytest.approx((last - first) * 1e3 / 3)


def test_an_answer_in_single_bytes_reads_the_same() -> None:
    data = b": ping\n\n" + text_event() * 2 + usage_event(8, 2) + DONE
    outcome = load(events(*[data[i : i + 1] for i in range(len(data))]), requests(1, tokens_out=2))
    assert only(outcome).error is None
    assert len(only(outcome).token_times_s) == 2


FULL = text_event() * 4 + usage_event(8, 4) + DONE


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (raw(HEAD + chunked(FULL) + b"0\r\n\r\n"), 1),
        (raw(HEAD + chunked(FULL).replace(b"\r\n", b";name=value\r\n", 1) + b"0\r\n\r\n"), 1),
        (raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(FULL), FULL)), 1),
        (raw(b"HTTP/1.1 200 OK\r\n\r\n" + FULL, close=True), 3),
        (raw(HEAD[:-2] + b"Connection: close\r\n\r\n" + chunked(FULL) + b"0\r\n\r\n"), 3),
        (raw(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(FULL), FULL)), 3),
    ],
)
def test_an_answer_is_framed_in_any_way_of_http(answer: Answer, connections: int) -> None:
    ports = set()

    async def count(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        ports.add(writer.get_extra_info("peername")[1])
        await answer(body, writer)

    outcome = load(count, requests(3), C1)
    assert [record.error for record in outcome.records] == [None] * 3
    assert len(ports) == connections


def test_a_connection_that_the_server_closed_while_idle_is_not_used_again() -> None:
    async def close_after(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await well(body, writer)
        await writer.drain()
        writer.close()

    outcome = load(close_after, requests(3, gap_s=0.2), Level("r5", rate_rps=5))
    assert [record.error for record in outcome.records] == [None] * 3


def test_a_base_url_may_have_a_path() -> None:
    async def go() -> None:
        async with serving(well) as url:
            outcome = await run(f"{url}/", "m", requests(1), C1, deadline=time.monotonic() + 20)
            assert only(outcome).error is None

    asyncio.run(go())
    assert (
        Pool("http://host:81/some/where/")
        .request("/v1/completions", b"{}")
        .startswith(b"POST /some/where/v1/completions HTTP/1.1\r\nHost: host:81\r\n")
    )


def test_a_long_answer_and_a_long_prompt_pass() -> None:
    async def burst(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        wanted, tokens_in = body["max_tokens"], len(body["prompt"])
        await stream(writer, text_event("x" * 500) * wanted, usage_event(tokens_in, wanted), DONE)

    record = only(load(burst, requests(1, tokens_out=2000, tokens_in=50_000)))
    assert record.error is None
    assert (record.tokens_in, record.tokens_out, len(record.token_times_s)) == (50_000, 2000, 2000)


def test_at_the_deadline_partial_results_come_back() -> None:
    async def some_stall(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await (stall if body["prompt"][0] >= 1003 else well)(body, writer)

    outcome = load(some_stall, requests(10), Level("c2", 2), within_s=0.5)
    assert not outcome.complete
    assert outcome.requests == 10
    assert [(record.index, record.error) for record in outcome.records] == [
        (0, None),
        (1, None),
        (2, None),
        (3, "deadline"),
        (4, "deadline"),
    ]
    assert outcome.records[3].first_token_s is not None


def test_a_deadline_in_the_past_sends_nothing() -> None:
    outcome = load(well, requests(3), within_s=-1)
    assert outcome.records == ()
    assert not outcome.complete
    assert outcome.duration_s == 0


def test_a_request_timeout_fails_that_request_only() -> None:
    async def first_stalls(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await (stall if body["prompt"][0] == 1000 else well)(body, writer)

    outcome = load(first_stalls, requests(3), C1, request_timeout_s=0.3)
    assert outcome.complete
    assert [record.ok for record in outcome.records] == [False, True, True]
    assert "timeout" in (outcome.records[0].error or "")


class EngineGone(Exception):
    pass


def test_what_check_raises_aborts_the_load_and_leaves_its_records() -> None:
    kept: list[RequestRecord] = []

    def check() -> None:
        raise EngineGone

    async def some_stall(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await (stall if body["prompt"][0] >= 1002 else well)(body, writer)

    with pytest.raises(EngineGone):
        load(some_stall, requests(4), check=check, keep=kept)
    assert sorted((record.index, record.error) for record in kept if record.ok) == [(0, None), (1, None)]
    assert sorted((record.index, record.error) for record in kept if not record.ok) == [(2, "aborted"), (3, "aborted")]


def test_progress_is_reported_while_it_runs_and_at_the_end() -> None:
    seen: list[tuple[int, int, int]] = []

    async def slow(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        await (status(500, b"no") if body["prompt"][0] == 1000 else well)(body, writer)

    load(slow, requests(4), Level("c2", 2), on_progress=lambda *counts: seen.append(counts))
    assert seen[0] == (2, 4, 1)
    assert seen[-1] == (4, 4, 1)
    assert seen == sorted(seen)


def test_a_busy_client_says_so() -> None:
    def busy() -> None:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass

    async def slow(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.6)
        await well(body, writer)

    quiet, busied = load(slow, requests(1)), load(slow, requests(1), check=busy)
    assert busied.client_cpu_share > quiet.client_cpu_share
    assert max(busied.loop_lags_ms) >= 200
    assert len(quiet.loop_lags_ms) > 5
    assert quiet.clock_jump_s == pytest.approx(0, abs=0.4)


def outcome_of(seconds: float = 1.0, **seen: Any) -> LoadRun:
    """A load of `seconds` of which the client says `seen` about itself; its tokens came 40 ms apart."""
    record = RequestRecord(0, "c1", 0, "measure", 0.0, 0.0, 0.04, seconds, (0.04, 0.08, 0.12, 0.16, 0.2), 8, 5, 5)
    return LoadRun((record,), 1, complete=True, started_at=0.0, **{"client_cpu_share": 0.1, **seen})


def beats(count: int, late: int, lag_ms: float) -> tuple[float, ...]:
    return (0.1,) * (count - late) + (lag_ms,) * late


@pytest.mark.parametrize(
    ("seen", "evidence"),
    [
        ({"client_cpu_share": 0.7}, None),
        ({"client_cpu_share": 0.9, "seconds": 0.9}, None),
        ({"client_cpu_share": 0.71}, "the load client used 71% of a core"),
        ({"loop_lags_ms": beats(100, 20, 19.0)}, None),
        ({"loop_lags_ms": beats(100, 20, 21.0)}, r"one in ten by 21 ms or more \(limit 20 ms\)"),
        ({"loop_lags_ms": beats(100, 5, 100.0)}, None),
        ({"loop_lags_ms": beats(400, 1, 800.0)}, None),
        ({"loop_lags_ms": beats(100, 1, 3000.0)}, r"did not look for 3\.0 s in all, 37% of the load \(limit 5%\)"),
        ({"loop_lags_ms": beats(19, 19, 500.0)}, None),
    ],
    ids=str,
)
def test_a_client_that_cannot_keep_up_is_the_bottleneck(seen: dict[str, Any], evidence: str | None) -> None:
    trouble = outcome_of(**seen).trouble
    assert (trouble is None) == (evidence is None)
    if trouble is not None:
        assert trouble.kind is Kind.CLIENT_LIMITED
        assert re.search(str(evidence), trouble.evidence)


def test_a_client_without_sockets_is_the_bottleneck_and_not_the_engine() -> None:
    (record,) = outcome_of().records
    failed = replace(record, error="OSError: [Errno 24] Too many open files")
    trouble = replace(outcome_of(), records=(record, failed)).trouble
    assert trouble is not None
    assert (trouble.kind, trouble.blame) == (Kind.CLIENT_LIMITED, Blame.STUDY)
    assert "no sockets for 1 requests, the first with: OSError: [Errno 24]" in trouble.evidence
    gone = replace(record, error="ConnectionRefusedError: [Errno 111] Connect call failed")
    assert replace(outcome_of(), records=(record, gone)).trouble is None


def test_a_load_may_have_more_sockets_than_the_shell_allows() -> None:
    async def slowly(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await well(body, writer)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        outcome = load(slowly, requests(40), Level("c40", 40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [record.error for record in outcome.records] == [None] * 40


@pytest.mark.parametrize(("jump_s", "spoilt"), [(0.4, False), (-0.4, False), (0.6, True), (-3600.0, True)])
def test_a_clock_that_jumps_under_load_spoils_it(jump_s: float, spoilt: bool) -> None:
    trouble = outcome_of(clock_jump_s=jump_s, client_cpu_share=0.9).trouble
    assert trouble is not None
    assert (trouble.kind is Kind.CLOCK_JUMPED) is spoilt
    assert not spoilt or (f"{jump_s:+.1f} s" in trouble.evidence and trouble.blame is Blame.ENVIRONMENT)


def test_the_clocks_of_a_machine_that_does_not_sleep_go_together() -> None:
    before = Clocks.now()
    time.sleep(0.1)
    assert abs(before.jump_s(Clocks.now())) < 0.4
    assert before.jump_s(Clocks(before.wall_s + 5, before.monotonic_s + 2)) == pytest.approx(3)


def test_text_is_sent_as_text() -> None:
    async def count_words(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        assert body["prompt"] == "how many Ω words"
        await stream(writer, *[text_event()] * 2, usage_event(len(body["prompt"].split()), 2), DONE)

    record = only(load(count_words, [Request(0, "how many Ω words", 2)]))
    assert (record.error, record.tokens_in) == (None, 4)


def test_a_trace_is_sent_when_it_is_due_and_not_after_answers() -> None:
    outcome = load(well, requests(5, gap_s=0.05), Level("trace", trace=True))
    for record in outcome.records:
        assert record.scheduled_s == pytest.approx(record.index * 0.05)
        assert record.sent_s >= record.scheduled_s
    assert {record.level for record in outcome.records} == {"trace"}


def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert only(load(well, requests(1))).error is None


@pytest.mark.parametrize(("answer", "ready"), [(well, True), (status(503, b"loading"), False), (stall, False)])
def test_the_probe_is_satisfied_by_a_full_completion_only(answer: Answer, ready: bool) -> None:
    url, stop = "", threading.Event()
    listening = threading.Event()

    def serve() -> None:
        async def go() -> None:
            nonlocal url
            async with serving(answer) as url:
                listening.set()
                await asyncio.to_thread(stop.wait, 20)

        asyncio.run(go())

    thread = threading.Thread(target=serve)
    thread.start()
    assert listening.wait(10)
    assert (completion_error(url, "m", timeout_s=0.5) is None) is ready
    stop.set()
    thread.join()


def test_records_survive_parquet_unchanged(tmp_path: Path) -> None:
    async def mixed(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await (reset if body["prompt"][0] == 1001 else well)(body, writer)

    records = [*load(mixed, requests(4)).records, *load(hang_up, requests(1)).records]
    write_records(tmp_path / "requests.parquet", records)
    assert read_records(tmp_path / "requests.parquet") == records
    assert [path.name for path in tmp_path.iterdir()] == ["requests.parquet"]


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@given(
    texts=st.lists(st.text(max_size=20) | st.sampled_from(['"choices":[{', '"usage":{', "\n\n", 'data: {"error"'])),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_tokens_are_counted_however_the_stream_is_cut(
    separators: tuple[str, str], newline: bytes, texts: list[str], cuts: list[int]
) -> None:
    data = b"".join(text_event(text, separators=separators) for text in texts)
    data = (data + usage_event(3, len(texts), separators=separators) + DONE).replace(b"\n", newline)
    parsed, position, step = TokenStream(), 0, 0
    while position < len(data):
        size = cuts[step % len(cuts)]
        parsed.feed(data[position : position + size], float(step))
        position, step = position + size, step + 1
    assert len(parsed.times_s) == len(texts)
    assert parsed.times_s == sorted(parsed.times_s)
    assert (parsed.tokens_in, parsed.tokens_out, parsed.done) == (3, len(texts), True)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_usage_that_comes_with_a_token_counts_once(separators: tuple[str, str]) -> None:
    parsed = TokenStream()
    for number in (1, 2):
        usage = {"prompt_tokens": 5, "completion_tokens": number}
        parsed.feed(sse({"choices": [{"text": "x"}], "usage": usage}, separators=separators), float(number))
    assert (parsed.times_s, parsed.tokens_out) == ([1.0, 2.0], 2)
    parsed.close(2)
    with pytest.raises(BadAnswer):
        parsed.close(3)


def test_an_event_without_data_says_nothing() -> None:
    parsed = TokenStream()
    parsed.feed(b": a comment\n\nevent: ping\n\nid: 7\nretry: 100\n\ndata:\n\n", 0.0)
    assert (parsed.times_s, parsed.tokens_out, parsed.done) == ([], None, False)


def read(data: bytes) -> None:
    parsed = TokenStream()
    parsed.feed(data, 0.0)
    parsed.close(1)


@given(st.binary(max_size=200))
def test_any_rubbish_is_a_bad_answer_and_nothing_else(data: bytes) -> None:
    with pytest.raises(BadAnswer):
        read(data)
