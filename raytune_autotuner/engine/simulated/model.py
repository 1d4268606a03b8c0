"""The simulated engine without its server: what a setting does to a load, in virtual time.

`fate` says how a setting fails; `simulate` gives the times of every token where it does not. The same scheduler
runs inside the server, so that a study replayed here is the study that would have run, thousands of trials a minute.

    setting = Setting.from_params({"max-num-seqs": 32})
    level = Level.fixed(requests=64, prompt_tokens=128, output_tokens=32, concurrency=8)
    timelines = simulate(setting, [level], seed=1)
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raytune_autotuner.engine.simulated.cost import (
    Batch,
    Memory,
    kv_cache_blocks,
    memory,
    startup_plan,
    step_ms,
)
from raytune_autotuner.engine.simulated.fate import fate, leaks
from raytune_autotuner.engine.simulated.faults import Effect, Fault
from raytune_autotuner.engine.simulated.scheduler import Request, Scheduler, Step
from raytune_autotuner.engine.simulated.setting import Hardware, Setting, known_flags, nearest_flag

__all__ = [
    "Batch",
    "Effect",
    "Fault",
    "Hardware",
    "Level",
    "Memory",
    "Request",
    "Scheduler",
    "Setting",
    "Step",
    "Timeline",
    "fate",
    "known_flags",
    "kv_cache_blocks",
    "leaks",
    "memory",
    "nearest_flag",
    "simulate",
    "startup_plan",
    "step_ms",
]


@dataclass(frozen=True, slots=True)
class Level:
    """One load level: (prompt, output) token counts, sent with `concurrency` in flight or at `arrivals_ms`."""

    requests: tuple[tuple[int, int], ...]
    concurrency: int | None = None
    """Closed loop: the next request is sent when one ends."""
    arrivals_ms: tuple[float, ...] = ()
    """Open loop: when each request is sent, from the level's begin."""

    @classmethod
    def fixed(cls, requests: int, prompt_tokens: int, output_tokens: int, concurrency: int) -> Level:
        """Equal requests in a closed loop."""
        return cls(((prompt_tokens, output_tokens),) * requests, concurrency=concurrency)

    @classmethod
    def poisson(cls, requests: Sequence[tuple[int, int]], request_rate_rps: float, seed: int) -> Level:
        """Requests in an open loop with random arrivals at a mean rate."""
        source, now, arrivals = random.Random(seed), 0.0, []
        for _ in requests:
            now += source.expovariate(request_rate_rps) * 1000
            arrivals.append(now)
        return cls(tuple(requests), arrivals_ms=tuple(arrivals))


@dataclass(frozen=True, slots=True)
class Timeline:
    """One request in virtual time; all times in milliseconds from the begin of its level."""

    level: int
    """Index of the load level."""
    prompt_tokens: int
    arrival_ms: float
    token_ms: tuple[float, ...]
    """When each output token arrived; empty where the engine refused the request."""

    @property
    def first_token_ms(self) -> float:
        """When the first token arrived; raises `IndexError` for a refused request."""
        return self.token_ms[0]

    @property
    def end_ms(self) -> float:
        """When the last token arrived; raises `IndexError` for a refused request."""
        return self.token_ms[-1]


def simulate(setting: Setting, levels: Sequence[Level], seed: int, hardware: Hardware | None = None) -> list[Timeline]:
    """Timelines of all requests of `levels`, one level after the other, on one start of the engine.

    Requests that exceed `max-model-len` come back without tokens. Raises `ValueError` for a setting that has a fate
    before `load`: ask `fate` first.
    """
    hardware = hardware or Hardware()
    scheduler = Scheduler(setting, hardware, seed)
    if scheduler.total_blocks * setting.block_size < setting.max_model_len:
        raise ValueError(f"A setting that cannot serve was simulated: {fate(setting, hardware)}.")
    return [timeline for index, level in enumerate(levels) for timeline in _Replay(scheduler, level, index).run()]


class _Replay:
    """One level's way through a scheduler."""

    def __init__(self, scheduler: Scheduler, level: Level, index: int) -> None:
        self._scheduler = scheduler
        self._level = level
        self._index = index
        self._arrived: list[float] = [0.0] * len(level.requests)
        self._tokens: list[list[float]] = [[] for _ in level.requests]

    def run(self) -> Iterator[Timeline]:
        """Send everything, step until all is served."""
        pending = self._first_arrivals()
        now = 0.0
        while pending or not self._scheduler.idle:
            self._send(pending, now)
            if self._scheduler.idle:
                now = max(now, pending[0][0]) if pending else now
                continue
            now = self._advance(pending, now)
        for (prompt, _), arrival, tokens in zip(self._level.requests, self._arrived, self._tokens, strict=True):
            yield Timeline(self._index, prompt, arrival, tuple(tokens))

    def _advance(self, pending: list[tuple[float, int]], now: float) -> float:
        step = self._scheduler.step()
        now += step.duration_ms
        for request_id in step.tokens:
            self._tokens[request_id].append(now)
        for _ in step.finished:
            self._send_next(pending, now)
        return now

    def _first_arrivals(self) -> list[tuple[float, int]]:
        if self._level.concurrency is None:
            return sorted(zip(self._level.arrivals_ms, range(len(self._level.requests)), strict=True))
        self._next = min(self._level.concurrency, len(self._level.requests))
        return [(0.0, request_id) for request_id in range(self._next)]

    def _send_next(self, pending: list[tuple[float, int]], now: float) -> None:
        if self._level.concurrency is not None and self._next < len(self._level.requests):
            heapq.heappush(pending, (now, self._next))
            self._next += 1

    def _send(self, pending: list[tuple[float, int]], now: float) -> None:
        while pending and pending[0][0] <= now:
            arrival, request_id = heapq.heappop(pending)
            prompt, output = self._level.requests[request_id]
            self._arrived[request_id] = arrival
            if prompt + output <= self._scheduler.setting.max_model_len:
                self._scheduler.add(Request(request_id, prompt, output))
            else:
                self._send_next(pending, now)
