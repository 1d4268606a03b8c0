"""The workload: what is sent to an engine, and when.

In: the study's `workload` section. Out: requests with exact token counts and sending times, the same for every trial
of a study, and others for each load level, each round and the warm-up. It sends nothing and knows no engine.

Three kinds of traffic: drawn from a distribution of lengths (with shared beginnings where `prefix` asks for them), the
prompts of a dataset, or the arrivals of a trace.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal, TypeAlias

import numpy as np

from raytune_autotuner.load.datasets import Arrival, read_dataset, read_trace
from raytune_autotuner.score.records import Phase
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.study import Workload

FIRST_PLAIN_TOKEN = 1000
"""Prompt ids start here: tokenizers keep their special tokens below (or at the very end)."""
VOCAB_SIZE = 30_000
"""Prompt ids end before it: within the vocabulary of every common model."""

_FIXED = re.compile(r"D\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_SPREAD = re.compile(r"([NU])\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*/\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")
MAX_BISECTIONS = 5
CLOSE_ENOUGH = 1.05
"""Two loads of which one keeps the SLOs and the other does not, so near that the step between them is not searched."""
_PHASES: tuple[Phase, ...] = ("warmup", "measure")
# Last numbers of a seed: what is drawn for a whole study is drawn from other seeds than what is drawn for a load.
_PREFIXES, _WARMUP_LINES = 1, 2
_FEWEST_WARM = 8

Prompt: TypeAlias = str | list[int]
"""Token ids, so that the length is exact without a tokenizer; or a dataset's text, whose tokens the server counts."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send."""

    index: int
    prompt: Prompt
    tokens_out: int
    """Output tokens to generate, no more and no fewer."""
    scheduled_s: float = 0.0
    """Open loop: seconds after the load's start at which it is due. Closed loop: 0, due as soon as there is room."""
    round: int = 0
    phase: Phase = "measure"


@dataclass(frozen=True, slots=True)
class Level:
    """A load level: requests in flight (closed loop), requests per second (open loop), or a trace's own arrivals."""

    label: str
    """`c16`, `r2.5` or `trace`."""
    concurrency: int | None = None
    rate_rps: float | None = None
    trace: bool = False

    @property
    def load(self) -> float:
        """Requests in flight, or per second; 0 for a trace."""
        return float(self.concurrency or self.rate_rps or 0)

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent when they are due, answered or not."""
        return self.trace or self.rate_rps is not None


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: `D` always `a`; `N` normal, mean `a`, sd `b`; `U` uniform from `a` to `b`."""

    shape: Literal["D", "N", "U"]
    a: int
    b: int = 0

    @property
    def mean(self) -> float:
        """Tokens, over many requests."""
        return (self.a + self.b) / 2 if self.shape == "U" else float(self.a)

    @property
    def most(self) -> int:
        """The longest that is to be expected: of a normal distribution, one in three million is longer."""
        return {"D": self.a, "N": self.a + 5 * self.b, "U": self.b}[self.shape]

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` token counts, at least 1 each."""
        if self.shape == "D":
            drawn = np.full(count, self.a)
        elif self.shape == "U":
            drawn = rng.integers(self.a, self.b, size=count, endpoint=True)
        else:
            drawn = np.rint(rng.normal(self.a, self.b, size=count)).astype(np.int64)
        lengths: list[int] = np.maximum(drawn, 1).tolist()
        return lengths


@dataclass(frozen=True, slots=True)
class Traffic:
    """Token counts of prompts and outputs."""

    tokens_in: Lengths
    tokens_out: Lengths


def parse_traffic(text: str) -> Traffic:
    """`D(in,out)`, `N(mean,sd)/(mean,sd)` or `U(min,max)/(min,max)`, prompts before outputs; raises `ConfigError`."""
    if match := _FIXED.fullmatch(text.strip()):
        return Traffic(_lengths("D", text, int(match[1])), _lengths("D", text, int(match[2])))
    if match := _SPREAD.fullmatch(text.strip()):
        numbers = [int(number) for number in match.groups()[1:]]
        return Traffic(_lengths(match[1], text, *numbers[:2]), _lengths(match[1], text, *numbers[2:]))
    raise ConfigError(
        f"workload.traffic: should be D(in,out), N(mean,sd)/(mean,sd) or U(min,max)/(min,max), but got {text!r}."
    )


def _lengths(shape: str, text: str, a: int, b: int = 0) -> Lengths:
    if a < 1:
        raise ConfigError(f"workload.traffic: at least 1 token is needed on either side, but got {text!r}.")
    if shape == "D":
        return Lengths("D", a)
    if shape == "N":
        return Lengths("N", a, b)
    if a > b:
        raise ConfigError(f"workload.traffic: `min <= max` must hold, but got ({a}, {b}) in {text!r}.")
    return Lengths("U", a, b)


def check_traffic(workload: Workload) -> None:
    """Raise `ConfigError` where the workload's traffic cannot be made: a bad file, lengths that make no sense."""
    if workload.dataset is None and workload.trace is None:
        parse_traffic(workload.traffic)
    elif workload.prefix is not None:
        name = "dataset" if workload.dataset is not None else "trace"
        raise ConfigError(f"workload.prefix: goes before drawn prompts, but workload.{name} is set; leave one out.")
    elif workload.dataset is not None:
        read_dataset(workload.dataset)
    elif workload.trace is not None:
        read_trace(workload.trace, workload.requests)


def levels(workload: Workload) -> list[Level]:
    """The load levels in the study's order, each once."""
    if workload.trace is not None:
        return [Level("trace", trace=True)]
    closed = [Level(f"c{concurrency}", concurrency=concurrency) for concurrency in workload.concurrency]
    opened = [Level(f"r{rate:g}", rate_rps=rate) for rate in workload.request_rate_rps]
    return list({level.label: level for level in closed + opened}.values())


def warmup_requests(workload: Workload, level: Level) -> int:
    """Requests that warm up one load level: by default enough of them to make all of its load."""
    if workload.warmup_requests != "auto":
        return workload.warmup_requests
    return max(math.ceil(level.load), _FEWEST_WARM)


def generate(
    workload: Workload,
    level: Level,
    round: int = 0,
    phase: Phase = "measure",
    *,
    vocab_size: int = VOCAB_SIZE,
    seed_offset: int = 0,
) -> list[Request]:
    """The requests of one load, always the same ones for the same arguments; `seed_offset` gives a study other ones.

    Prompts are random token ids, so that none begins as another does, beyond the prefixes that the study asks for.
    """
    draw = _Draw(workload, level, round, phase, seed_offset, vocab_size)
    return [
        Request(index, prompt, tokens_out, due_s, round, phase)
        for index, (prompt, tokens_out, due_s) in enumerate(draw.bodies())
    ]


def lengths(workload: Workload, level: Level) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of each request of a level's first round, without making the prompts.

    The prompt of a dataset's line of text counts as 0 tokens: how many it has, the engine says.
    """
    return _Draw(workload, level, 0, "measure", 0, VOCAB_SIZE).lengths()


def longest(workload: Workload, restarts: int = 0, refined: bool = False) -> tuple[int, int]:
    """Tokens of prompt and answer of the longest request that a study with so many restarts sends.

    It is that of all loads, warm-ups and restarts, which are drawn here; with `refined` also of the levels in between
    that a restart may come to. A prompt of text counts as 0 tokens.
    """
    scale = levels(workload)
    scale += between_all(sorted(scale, key=lambda level: level.load)) if refined else []
    loads: list[tuple[int, Phase]] = [(0, "warmup"), *((number, "measure") for number in range(workload.rounds))]
    drawn = (
        _Draw(workload, level, number, phase, offset, VOCAB_SIZE).lengths()
        for level, (number, phase), offset in product(scale, loads, range(restarts + 1))
    )
    return max((request for load in drawn for request in load), key=sum, default=(0, 0))


def longest_possible(workload: Workload) -> tuple[int, int]:
    """Tokens of prompt and answer that no request is longer than, without drawing any; of normal lengths, hardly any.

    A prompt of text counts as 0 tokens.
    """
    if workload.trace is not None:
        lines = [(line.tokens_in, line.tokens_out) for line in read_trace(workload.trace, workload.requests)]
    elif workload.dataset is not None:
        lines = [(_known_tokens(line.prompt), line.tokens_out) for line in read_dataset(workload.dataset)]
    else:
        traffic = parse_traffic(workload.traffic)
        lines = [(_prefix_tokens(workload) + traffic.tokens_in.most, traffic.tokens_out.most)]
    return max(lines, key=sum, default=(0, 0))


def between(held: Level, missed: Level) -> Level | None:
    """The load halfway between two levels of one kind; None where they are next to each other."""
    if held.concurrency is not None and missed.concurrency is not None:
        middle = (held.concurrency + missed.concurrency) // 2
        near = missed.concurrency - held.concurrency <= 1 or missed.concurrency / held.concurrency < CLOSE_ENOUGH
        return None if near else Level(f"c{middle}", concurrency=middle)
    assert held.rate_rps is not None
    assert missed.rate_rps is not None
    rate = float(f"{(held.rate_rps * missed.rate_rps) ** 0.5:.4g}")
    return None if missed.rate_rps / held.rate_rps < CLOSE_ENOUGH else Level(f"r{rate:g}", rate_rps=rate)


def between_all(ascending: Sequence[Level], steps: int = MAX_BISECTIONS) -> list[Level]:
    """All levels that so many bisections may come to, wherever the SLOs are missed first."""
    found: list[Level] = []
    for held, missed in pairwise(ascending) if steps else ():
        if (middle := between(held, missed)) is not None:
            found += [middle, *between_all([held, middle, missed], steps - 1)]
    return found


def arrivals_s(workload: Workload, level: Level, phase: Phase = "measure") -> float:
    """Seconds from a load's start to its last arrival; 0 in closed loop, where requests come as there is room."""
    count = workload.requests if phase == "measure" else warmup_requests(workload, level)
    if workload.trace is not None:
        taken = read_trace(workload.trace, workload.requests)[:count]
        return taken[-1].due_s if taken else 0.0
    return count / level.rate_rps if level.rate_rps else 0.0


def _known_tokens(prompt: Prompt) -> int:
    return 0 if isinstance(prompt, str) else len(prompt)


def _prefix_tokens(workload: Workload) -> int:
    return workload.prefix.tokens if workload.prefix else 0


class _Draw:
    """The numbers of one load, drawn from its seed."""

    def __init__(
        self, workload: Workload, level: Level, round: int, phase: Phase, seed_offset: int, vocab_size: int
    ) -> None:
        self._workload = workload
        self._level = level
        self._phase: Phase = phase
        self._vocab_size = vocab_size
        self._seed = (workload.seed + seed_offset) % 2**64
        self._rng = self._generator(_PHASES.index(phase), round, zlib.crc32(level.label.encode()))
        self._count = workload.requests if phase == "measure" else warmup_requests(workload, level)

    def bodies(self) -> Iterable[tuple[Prompt, int, float]]:
        """Prompt, output tokens and due time of each request."""
        if self._level.trace:
            return self._traced()
        return self._drawn() if self._workload.dataset is None else self._sampled()

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of prompt and answer of each request."""
        if self._level.trace:
            return [(arrival.tokens_in, arrival.tokens_out) for arrival in self._taken()]
        if self._workload.dataset is not None:
            return [(_known_tokens(prompt), out) for prompt, out, _ in self._sampled()]
        prefix = _prefix_tokens(self._workload)
        return [(prefix + own, out) for own, out in zip(*self._counts(), strict=True)]

    def _counts(self) -> tuple[list[int], list[int]]:
        traffic = parse_traffic(self._workload.traffic)
        return traffic.tokens_in.draw(self._rng, self._count), traffic.tokens_out.draw(self._rng, self._count)

    def _drawn(self) -> Iterable[tuple[Prompt, int, float]]:
        tokens_in, tokens_out = self._counts()
        arrivals = self._arrivals()
        prompts = [self._token_ids(self._rng, length) for length in tokens_in]
        return zip(self._prefixed(prompts), tokens_out, arrivals, strict=True)

    def _sampled(self) -> Iterable[tuple[Prompt, int, float]]:
        assert self._workload.dataset is not None
        samples = read_dataset(self._workload.dataset)
        lines = self._lines(len(samples))
        drawn: list[int] = []
        while len(drawn) < self._count:
            drawn += self._rng.permutation(lines).tolist()
        return [
            (samples[line].prompt, samples[line].tokens_out, due_s)
            for line, due_s in zip(drawn[: self._count], self._arrivals(), strict=True)
        ]

    def _traced(self) -> Iterable[tuple[Prompt, int, float]]:
        for arrival in self._taken():
            yield self._token_ids(self._rng, arrival.tokens_in), arrival.tokens_out, arrival.due_s

    def _taken(self) -> Sequence[Arrival]:
        assert self._workload.trace is not None
        return read_trace(self._workload.trace, self._workload.requests)[: self._count]

    def _lines(self, count: int) -> list[int]:
        """The lines of a dataset that this phase takes: warm-up keeps some to itself where there are enough."""
        workload = self._workload
        order: list[int] = self._generator(0, 0, 0, _WARMUP_LINES).permutation(count).tolist()
        kept = max(warmup_requests(workload, level) for level in levels(workload))
        if count < workload.requests + kept:
            return order
        return order[:kept] if self._phase == "warmup" else order[kept:]

    def _prefixed(self, prompts: list[list[int]]) -> list[list[int]]:
        """The prompts behind one of the study's shared prefixes each; warm-up has prefixes of its own."""
        spec = self._workload.prefix
        if spec is None:
            return prompts
        rng = self._generator(_PHASES.index(self._phase), 0, 0, _PREFIXES)
        prefixes = [self._token_ids(rng, spec.tokens) for _ in range(spec.groups)]
        groups = self._rng.integers(spec.groups, size=len(prompts)).tolist()
        return [prefixes[group] + prompt for group, prompt in zip(groups, prompts, strict=True)]

    def _arrivals(self) -> Sequence[float]:
        """Due times: gaps as of a Poisson process, scaled so that the mean rate is exactly the level's."""
        if self._level.rate_rps is None or self._count == 0:
            return [0.0] * self._count
        due = np.cumsum(self._rng.exponential(size=self._count))
        times: list[float] = (due * (self._count / self._level.rate_rps / due[-1])).tolist()
        return times

    def _token_ids(self, rng: np.random.Generator, length: int) -> list[int]:
        low = min(FIRST_PLAIN_TOKEN, self._vocab_size // 2)
        ids: list[int] = rng.integers(low, self._vocab_size, size=length).tolist()
        return ids

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *numbers])
