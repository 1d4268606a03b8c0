"""One record per request, failed ones included: the raw sample from which every figure is computed.

Pure values. All times are seconds on one monotonic clock that starts with the load (one level of one round), so
records of different loads are never compared by their times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Phase = Literal["warmup", "measure"]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of one request.

    Latencies count from `scheduled_s`, when the request was due: under a request rate by its arrival, in closed loop as
    a place became free. So they include the time for which it could not be sent, such as that of a new connection.
    """

    index: int
    level: str
    """The load level's label: `c16` requests in flight, `r2.5` requests per second."""
    round: int
    phase: Phase
    scheduled_s: float
    sent_s: float
    first_token_s: float | None
    end_s: float
    """When the answer was complete, or the request was given up."""
    token_times_s: tuple[float, ...]
    """Arrival of each chunk with text in it; a chunk may hold several tokens, so its length is no token count."""
    tokens_in: int | None
    """Prompt tokens by the server's own count."""
    tokens_out: int | None
    """Output tokens by the server's own count."""
    tokens_out_wanted: int
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Answered in full."""
        return self.error is None

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else (self.first_token_s - self.scheduled_s) * 1e3

    @property
    def e2el_ms(self) -> float | None:
        """End-to-end latency: to the last token's arrival."""
        return (self.token_times_s[-1] - self.scheduled_s) * 1e3 if self.token_times_s else None

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first, 0 where all came in one chunk; None for an answer of one token."""
        if self.tokens_out is None or self.tokens_out < 2 or not self.token_times_s:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) * 1e3 / (self.tokens_out - 1)

    @property
    def itl_ms(self) -> list[float]:
        """Inter-token latencies: the gaps between chunks."""
        return [(later - earlier) * 1e3 for earlier, later in pairwise(self.token_times_s)]


def measured(records: Iterable[RequestRecord]) -> dict[str, list[RequestRecord]]:
    """Level to its records of all rounds, warm-up left out; in the order in which levels first occur."""
    levels: dict[str, list[RequestRecord]] = {}
    for record in records:
        if record.phase == "measure":
            levels.setdefault(record.level, []).append(record)
    return levels


def duration_s(records: Iterable[RequestRecord]) -> float:
    """Seconds that one level was under load: each round from its start to its last request's end, summed."""
    ends: dict[int, float] = {}
    for record in records:
        ends[record.round] = max(record.end_s, ends.get(record.round, 0.0))
    return sum(ends.values())
