"""The workload: what is sent to an engine, and when.

In: the study's `workload` section. Out: requests with exact token counts and sending times, the same for every trial
of a study, and others for each load level, each round and the warm-up. It sends nothing and knows no engine.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raytune_autotuner.score.records import Phase
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.study import Workload

FIRST_PLAIN_TOKEN = 1000
"""Prompt ids start here: tokenizers keep their special tokens below (or at the very end)."""
VOCAB_SIZE = 30_000
"""Prompt ids end before it: within the vocabulary of every common model."""

_FIXED = re.compile(r"D\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_SPREAD = re.compile(r"([NU])\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*/\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_PHASES: tuple[Phase, ...] = ("warmup", "measure")


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send: its prompt as token ids, so that its length is exact without a tokenizer."""

    index: int
    prompt_token_ids: list[int]
    tokens_out: int
    """Output tokens to generate, no more and no fewer."""
    scheduled_s: float = 0.0
    """Open loop: seconds after the load's start at which it is due. Closed loop: 0, due as soon as there is room."""
    round: int = 0
    phase: Phase = "measure"


@dataclass(frozen=True, slots=True)
class Level:
    """A load level: requests in flight (closed loop) or requests per second (open loop); one of the two is None."""

    label: str
    """`c16` or `r2.5`."""
    concurrency: int | None = None
    rate_rps: float | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: `D` always `a`; `N` normal, mean `a`, sd `b`; `U` uniform from `a` to `b`."""

    shape: Literal["D", "N", "U"]
    a: int
    b: int = 0

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


def levels(workload: Workload) -> list[Level]:
    """The load levels in the study's order, each once."""
    closed = [Level(f"c{concurrency}", concurrency=concurrency) for concurrency in workload.concurrency]
    opened = [Level(f"r{rate:g}", rate_rps=rate) for rate in workload.request_rate_rps]
    return list({level.label: level for level in closed + opened}.values())


def generate(
    workload: Workload, level: Level, round: int = 0, phase: Phase = "measure", *, vocab_size: int = VOCAB_SIZE
) -> list[Request]:
    """The requests of one load, always the same ones for the same arguments.

    Prompts are random token ids, so that no two share a prefix that a cache could serve.
    """
    count = workload.requests if phase == "measure" else workload.warmup_requests
    rng = np.random.default_rng([workload.seed % 2**64, _PHASES.index(phase), round, zlib.crc32(level.label.encode())])
    traffic = parse_traffic(workload.traffic)
    tokens_in, tokens_out = traffic.tokens_in.draw(rng, count), traffic.tokens_out.draw(rng, count)
    arrivals = _arrivals(rng, level, count)
    return [
        Request(index, _prompt(rng, length, vocab_size), tokens_out[index], arrivals[index], round, phase)
        for index, length in enumerate(tokens_in)
    ]


def _prompt(rng: np.random.Generator, length: int, vocab_size: int) -> list[int]:
    low = min(FIRST_PLAIN_TOKEN, vocab_size // 2)
    ids: list[int] = rng.integers(low, vocab_size, size=length).tolist()
    return ids


def _arrivals(rng: np.random.Generator, level: Level, count: int) -> Sequence[float]:
    """Due times: gaps as of a Poisson process, scaled so that the mean rate is exactly the level's."""
    if level.rate_rps is None or count == 0:
        return [0.0] * count
    due = np.cumsum(rng.exponential(size=count))
    times: list[float] = (due * (count / level.rate_rps / due[-1])).tolist()
    return times
