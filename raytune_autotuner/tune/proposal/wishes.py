"""What a person asks a proposal for: model, traffic, promises, time.

The texts of a command line in, checked values out; what is wrong with one is a `ConfigError` that names the option.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raytune_autotuner.load.workload import Traffic, parse_traffic
from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.tune.checks import check_latency, check_statistic

MAX_MINUTES = 100_000
_EXAMPLE = "write a latency, a statistic and a limit in milliseconds, such as --slo ttft_ms.p90=500"


@dataclass(frozen=True)
class Wishes:
    """What is asked for; what is left open, the proposal chooses."""

    model: str
    """As in a study: a hub id, a folder, or `bundled:NAME`."""
    traffic: str | None = None
    slo: Mapping[str, Mapping[str, float]] | None = None
    """As in a study: latency to statistic to limit."""
    minutes: float | None = None
    """For everything, verification included."""
    python: Path | None = None
    """The Python that has the engine in it; None: this one."""

    @property
    def limits(self) -> dict[str, dict[str, float]]:
        """The SLOs; empty where none are asked for."""
        return {latency: dict(stats) for latency, stats in (self.slo or {}).items()}


def parse_wishes(
    model: str, traffic: str | None, slo: Sequence[str], minutes: float | None, python: Path | None = None
) -> Wishes:
    """The options of a command line, checked; raises `ConfigError`."""
    if traffic is not None:
        lengths(traffic)
    if minutes is not None and not 0 < minutes <= MAX_MINUTES:
        raise ConfigError(f"--minutes: is a number above 0 and at most {MAX_MINUTES}, but got {minutes:g}.")
    return Wishes(model, traffic and traffic.strip(), _limits(slo), minutes, python)


def lengths(traffic: str) -> Traffic:
    """The token counts of `--traffic`; raises `ConfigError`."""
    try:
        return parse_traffic(traffic)
    except ConfigError as error:
        raise ConfigError(f"--traffic: {str(error).removeprefix('workload.traffic: ')}") from error


def _limits(texts: Sequence[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for text in texts:
        latency, statistic, limit = _limit(text)
        if statistic in found.setdefault(latency, {}):
            raise ConfigError(f"--slo {shown(text)}: {latency}.{statistic} has a limit already; leave one out.")
        found[latency][statistic] = limit
    return found


def _limit(text: str) -> tuple[str, str, float]:
    """(latency, statistic, limit) of `ttft_ms.p90=500`."""
    where = f"--slo {shown(text)}"
    name, equals, value = text.partition("=")
    latency, dot, statistic = name.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"{where}: {_EXAMPLE}.")
    check_latency(where, latency)
    check_statistic(where, statistic)
    try:
        limit = float(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {shown(value)} is no number of milliseconds; {_EXAMPLE}.") from error
    if not math.isfinite(limit) or limit <= 0:
        raise ConfigError(f"{where}: a limit is above 0, but got {value}.")
    return latency, statistic, limit
