"""What spoils a load though its requests were answered: a client that could not keep up, a clock that jumped.

In: what a client knows of itself. Out: a `Trouble`, or None. Pure, but for `Clocks.now`.
"""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.failure import Blame, Kind

MAX_CPU_SHARE = 0.7
"""Above this share of one core in use, tokens wait for the client: the measurement is not the engine's any more."""
MIN_BUSY_S = 1.0
"""A shorter load says nothing of the client's share of CPU: that is the one of opening connections."""
MAX_LAG_SHARE = 0.5
"""Of the median gap between tokens: where one look at the sockets in ten comes later than that, the gaps and the times
to a first token at p90 and above are made by the client."""
MIN_LAG_MS = 10.0
"""What the scheduler of a machine does by itself that is busy, but not too busy (measured: docs/measuring.md)."""
MIN_LOOKS = 20
"""A second of load; fewer looks say nothing about one in ten."""
LOOK_S = 0.05
"""How often a client asks how late it looks."""
MAX_AWAY_SHARE = 0.05
"""Of a load's time. While a client is stopped the engine waits for requests, and the throughput falls by as much."""
MIN_AWAY_S = 0.5
"""So that the hiccups of a busy machine do not spoil a load of a second or two."""
MAX_CLOCK_JUMP_S = 0.5
"""Above what two clocks read one after the other can differ by, and below any suspension worth the name."""
_READINGS = 5
_NO_SOCKETS = re.compile(
    rf"\[Errno ({errno.EMFILE}|{errno.ENFILE}|{errno.EADDRNOTAVAIL}|{errno.ENOBUFS}|{errno.ENOMEM})\]"
)
"""Errors of the client's own machine, which no engine can make."""


class Trouble(NamedTuple):
    """Why a load is no measurement, in the words of a failure."""

    kind: Kind
    evidence: str
    remedy: str
    blame: Blame


@dataclass(frozen=True, slots=True)
class Clocks:
    """The wall clock and the monotonic clock at one moment."""

    wall_s: float
    monotonic_s: float

    @classmethod
    def now(cls) -> Clocks:
        """Both clocks, of some readings the one in which the least time went by between them."""
        return min((cls._read() for _ in range(_READINGS)), key=lambda reading: reading[0])[1]

    @classmethod
    def _read(cls) -> tuple[float, Clocks]:
        before = time.monotonic()
        wall = time.time()
        after = time.monotonic()
        return after - before, cls(wall, (before + after) / 2)

    def jump_s(self, later: Clocks) -> float:
        """How much further the wall clock went than the monotonic one; negative where it was set back.

        A machine that slept stops the monotonic clock only, and a time server moves the wall clock only.
        """
        return (later.wall_s - self.wall_s) - (later.monotonic_s - self.monotonic_s)


def find_trouble(
    records: Sequence[RequestRecord],
    cpu_share: float,
    lags_ms: Sequence[float],
    clock_jump_s: float,
    processes: int = 1,
) -> Trouble | None:
    """What spoils the load, the worst first; None where nothing does."""
    if (starved := starvation(records)) is not None:
        return starved
    if (jumped := clock_trouble(clock_jump_s)) is not None:
        return jumped
    if _too_busy(cpu_share, max((record.end_s for record in records), default=0.0)):
        return _of_cpu(cpu_share, processes)
    return _of_lag(records, lags_ms)


def starvation(records: Iterable[RequestRecord]) -> Trouble | None:
    """That the client had no sockets for requests, which then failed through no fault of the engine."""
    errors = [record.error for record in records if record.error is not None and _NO_SOCKETS.search(record.error)]
    if not errors:
        return None
    return Trouble(
        Kind.CLIENT_LIMITED,
        f"the load client had no sockets for {len(errors)} requests, the first with: {errors[0]}",
        "Lower the load, or raise the limit of open files (ulimit -n).",
        Blame.STUDY,
    )


def clock_trouble(jump_s: float) -> Trouble | None:
    """That the wall clock moved against the monotonic one during a load."""
    if abs(jump_s) <= MAX_CLOCK_JUMP_S:
        return None
    return Trouble(
        Kind.CLOCK_JUMPED,
        f"the wall clock moved {jump_s:+.1f} s against the monotonic one during the load",
        "The machine slept, was paused, or had its clock set; nothing is to be done if that does not happen again.",
        Blame.ENVIRONMENT,
    )


def _of_lag(records: Sequence[RequestRecord], lags_ms: Sequence[float]) -> Trouble | None:
    if len(lags_ms) < MIN_LOOKS:
        return None
    gaps_ms = [gap for record in records if record.ok for gap in record.itl_ms]
    limit_ms = max(MIN_LAG_MS, MAX_LAG_SHARE * float(np.median(gaps_ms or [0.0])))
    lags = np.asarray(lags_ms)
    if not (said := _often_late(lags, limit_ms) or _long_away(lags, limit_ms)):
        return None
    return Trouble(
        Kind.CLIENT_LIMITED,
        f"the load client looked at its sockets late: {said}",
        "See what else runs on the machine, or leave the client a core.",
        Blame.ENVIRONMENT,
    )


def _often_late(lags_ms: np.ndarray, limit_ms: float) -> str:
    lag_ms = float(np.percentile(lags_ms, 90))
    return f"one in ten by {lag_ms:.0f} ms or more (limit {limit_ms:.0f} ms)" if lag_ms > limit_ms else ""


def _long_away(lags_ms: np.ndarray, limit_ms: float) -> str:
    """What few but long lags come to."""
    away_s = float(np.maximum(lags_ms - limit_ms, 0.0).sum()) / 1e3
    share = away_s / (len(lags_ms) * LOOK_S + float(lags_ms.sum()) / 1e3)
    if away_s <= MIN_AWAY_S or share <= MAX_AWAY_SHARE:
        return ""
    return f"it did not look for {away_s:.1f} s in all, {share:.0%} of the load (limit {MAX_AWAY_SHARE:.0%})"


def _too_busy(cpu_share: float, duration_s: float) -> bool:
    return cpu_share > MAX_CPU_SHARE and duration_s >= MIN_BUSY_S


def _of_cpu(share: float, processes: int) -> Trouble:
    who = "the load client" if processes == 1 else f"the busiest of {processes} load clients"
    return Trouble(
        Kind.CLIENT_LIMITED,
        f"{who} used {share:.0%} of a core",
        "Give the client more processes (workload.client_processes) or more CPU, or lower the load.",
        Blame.STUDY,
    )


def processes_wanted(cpu_share: float, processes: int, duration_s: float) -> int:
    """How many client processes a load wants, of whose `processes` the busiest used `cpu_share` of a core.

    Where they are too busy, so many that half of what each may use would do: a busy client hides how much more there
    was to be read.
    """
    if not _too_busy(cpu_share, duration_s):
        return processes
    return math.ceil(2 * processes * cpu_share / MAX_CPU_SHARE)
