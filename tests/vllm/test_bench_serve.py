"""The installed vLLM's `bench serve` on a server that answers badly: what it calls a success is not taken for one."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from raytune_autotuner.load import vllm_bench
from raytune_autotuner.load.workload import Level, Request
from tests.test_client import DONE, events, hang_up, reset, serving, status, text_event, usage_event, well

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ANSWERS = {
    1000: well,
    1001: events(text_event(), usage_event(8, 1), DONE),
    1002: events(text_event(), text_event()),
    1003: status(500, b"no"),
    1004: reset,
    1005: hang_up,
}


@contextmanager
def server() -> Iterator[str]:
    """A base URL that answers each prompt as `ANSWERS` says for its first token."""
    url: list[str] = []
    listening, stop = threading.Event(), threading.Event()

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await ANSWERS[body["prompt"][0]](body, writer)

    async def go() -> None:
        async with serving(answer) as base_url:
            url.append(base_url)
            listening.set()
            await asyncio.to_thread(stop.wait, 120)

    thread = threading.Thread(target=lambda: asyncio.run(go()))
    thread.start()
    assert listening.wait(10)
    try:
        yield url[0]
    finally:
        stop.set()
        thread.join()


def test_bad_answers_are_failed_records_whatever_it_makes_of_them() -> None:
    sent = [Request(index, [1000 + index] * 8, 4) for index in range(len(ANSWERS))]
    with server() as url:
        load = vllm_bench.measure(
            url, "m", sent, Level("c2", 2), python=sys.executable, deadline=time.monotonic() + 120
        )
    assert load.complete
    errors = [record.error for record in load.records]
    assert errors[:2] == [None, "4 output tokens wanted, 1 answered"]
    assert all(errors[1:])
    assert load.records[0].tokens_in == 8
    assert (load.records[0].tokens_out, len(load.records[0].token_times_s)) == (4, 4)
