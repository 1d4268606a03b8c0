"""Continuous batching: which tokens each step computes, and how long it takes.

Each step serves the running requests first (a token each, or the next part of a long prompt), then lets waiting ones
in, within `max-num-seqs`, `max-num-batched-tokens` and the blocks of the KV cache. When blocks run out, the request
that came in last is preempted: it loses its blocks and computes them again later.

Pure: no clock. The server sleeps for `Step.duration_ms`; replay in virtual time adds it up.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from raytune_autotuner.engine.simulated.cost import Batch, kv_cache_blocks, step_ms
from raytune_autotuner.engine.simulated.setting import Hardware, Setting

_STEP_NOISE_SHARE = 0.25
"""Noise of a step over the noise of a start."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for. `prefix` holds a hash per full block of the prompt, each covering all before it."""

    id: int
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did: its time, and the requests that got a token, or their last one."""

    duration_ms: float
    tokens: tuple[int, ...]
    finished: frozenset[int]


@dataclass(slots=True)
class Sequence:
    """A request on its way."""

    request: Request
    computed: int = 0
    produced: int = 0
    blocks: int = 0
    preempted: bool = False
    """Whether it lost its blocks once; what it then finds in the prefix cache is its own, and not counted as a hit."""

    @property
    def total(self) -> int:
        """Tokens that must be in the KV cache before the next one is produced."""
        return self.request.prompt_tokens + self.produced


@dataclass(slots=True)
class Counters:
    """Totals since the start, as `/metrics` shows them."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


@dataclass(slots=True)
class _Plan:
    """Tokens to compute per sequence in one step, and what is left of the budget."""

    budget: int
    tokens: dict[int, int] = field(default_factory=dict)
    prefill: int = 0
    decodes: int = 0
    context: int = 0

    def add(self, sequence: Sequence, count: int) -> None:
        self.tokens[sequence.request.id] = count
        self.budget -= count
        self.context += sequence.computed + count
        if count == 1 and sequence.produced:
            self.decodes += 1
        else:
            self.prefill += count

    def drop(self, sequence: Sequence) -> None:
        count = self.tokens.pop(sequence.request.id, 0)
        self.budget += count
        self.context -= sequence.computed + count if count else 0
        if count == 1 and sequence.produced:
            self.decodes -= 1
        else:
            self.prefill -= count


class Scheduler:
    """The state of an engine core: running and waiting requests, and the KV cache."""

    def __init__(self, setting: Setting, hardware: Hardware, seed: int) -> None:
        self.setting = setting
        self.hardware = hardware
        self.total_blocks = kv_cache_blocks(setting, hardware)
        self.free_blocks = self.total_blocks
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.counters = Counters()
        self._prefixes: OrderedDict[int, None] = OrderedDict()
        self._random = random.Random(f"{seed}|{setting.key}")
        self.start_factor = math.exp(self._random.gauss(0.0, hardware.noise))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV cache's blocks in use, in [0, 1]."""
        return 1 - self.free_blocks / self.total_blocks if self.total_blocks else 0.0

    def add(self, request: Request) -> None:
        """Queue a request that fits into `max-model-len`."""
        self.waiting.append(Sequence(request))

    def abort(self, request_id: int) -> None:
        """Forget a request, wherever it stands."""
        for sequence in [s for s in self.running if s.request.id == request_id]:
            self.running.remove(sequence)
            self._release(sequence)
        self.waiting = deque(s for s in self.waiting if s.request.id != request_id)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        self._prefixes.clear()

    def step(self) -> Step:
        """Compute one step. Call only when not `idle`."""
        plan = self._plan()
        batch = Batch(plan.prefill, plan.decodes, plan.context)
        duration = step_ms(self.setting, self.hardware, batch) * self.start_factor * self._jitter()
        return self._commit(plan, duration)

    def _jitter(self) -> float:
        sd = self.hardware.noise * _STEP_NOISE_SHARE
        return math.exp(self._random.gauss(0.0, sd)) if sd else 1.0

    def _plan(self) -> _Plan:
        plan = _Plan(self.setting.max_num_batched_tokens)
        preempted = self._plan_running(plan)
        if not preempted:
            self._plan_waiting(plan)
        return plan

    def _plan_running(self, plan: _Plan) -> bool:
        """Give each running request its tokens; whether one was preempted for that."""
        preempted = False
        index = 0
        while index < len(self.running) and plan.budget > 0:
            sequence = self.running[index]
            count = min(sequence.total - sequence.computed, plan.budget)
            while not self._allocate(sequence, count):
                preempted = True
                if self._preempt(plan) is sequence:
                    break
            else:
                plan.add(sequence, count)
                index += 1
        return preempted

    def _plan_waiting(self, plan: _Plan) -> None:
        while self.waiting and plan.budget > 0 and len(self.running) < self.setting.max_num_seqs:
            sequence = self.waiting[0]
            cached = self._cached(sequence)
            count = sequence.total - cached
            if count > plan.budget and not self.setting.enable_chunked_prefill:
                return
            count = min(count, plan.budget)
            sequence.computed = cached
            if not self._allocate(sequence, count):
                sequence.computed = 0
                return
            if not sequence.preempted:
                self.counters.prefix_queries += sequence.total
                self.counters.prefix_hits += cached
            self.running.append(self.waiting.popleft())
            plan.add(sequence, count)

    def _allocate(self, sequence: Sequence, count: int) -> bool:
        needed = -(-(sequence.computed + count) // self.setting.block_size) - sequence.blocks
        if needed > self.free_blocks:
            return False
        if needed > 0:
            self.free_blocks -= needed
            sequence.blocks += needed
        return True

    def _release(self, sequence: Sequence) -> None:
        self.free_blocks += sequence.blocks
        sequence.blocks = 0

    def _preempt(self, plan: _Plan) -> Sequence:
        victim = self.running.pop()
        plan.drop(victim)
        self._release(victim)
        victim.computed, victim.preempted = 0, True
        self.waiting.appendleft(victim)
        self.counters.preemptions += 1
        return victim

    def _cached(self, sequence: Sequence) -> int:
        """Tokens of the prompt that the prefix cache knows; the last token is always computed."""
        if not self.setting.enable_prefix_caching:
            return 0
        known = 0
        for block in sequence.request.prefix:
            if block not in self._prefixes:
                break
            known += 1
        return min(known * self.setting.block_size, sequence.total - 1)

    def _remember(self, sequence: Sequence) -> None:
        if self.setting.enable_prefix_caching:
            self._prefixes.update(dict.fromkeys(sequence.request.prefix))
            while len(self._prefixes) > self.total_blocks:
                self._prefixes.popitem(last=False)

    def _commit(self, plan: _Plan, duration_ms: float) -> Step:
        tokens, finished = [], []
        for sequence in self.running:
            sequence.computed += plan.tokens.get(sequence.request.id, 0)
            if sequence.computed < sequence.total:
                continue
            if sequence.produced == 0:
                self.counters.prompt_tokens += sequence.request.prompt_tokens
                self._remember(sequence)
            sequence.produced += 1
            self.counters.generation_tokens += 1
            tokens.append(sequence.request.id)
            if sequence.produced >= sequence.request.output_tokens:
                finished.append(sequence)
        for sequence in finished:
            self._release(sequence)
        gone = frozenset(sequence.request.id for sequence in finished)
        if gone:
            self.running = [sequence for sequence in self.running if sequence.request.id not in gone]
        return Step(duration_ms, tuple(tokens), gone)
