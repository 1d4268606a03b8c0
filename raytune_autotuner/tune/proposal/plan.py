"""How the time is spent: load levels, requests, trials, restarts.

In: the pace, the machines' slots, the promises and the minutes. Out: a `Plan` that ends in time, or `ConfigError` with
the minutes that would do. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raytune_autotuner.load.workload import levels as levels_of
from raytune_autotuner.load.workload import warmup_requests
from raytune_autotuner.score.metrics import samples_needed
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.study import Workload
from raytune_autotuner.tune.proposal.fit import Fit
from raytune_autotuner.tune.proposal.pace import Pace

STUDY_S = 30.0
"""Once a study: its checks, Ray's start, the report."""
DEFAULT_S = 8 * 3600.0
STARTS = 40
"""Of the engine at most, where no time is given, and as many as fit in `DEFAULT_S`."""
MAX_TRIALS = 100
_SPARE = 1.1
"""Requests beyond those that a percentile needs: up to one in twenty may fail."""
# Engine starts in all, from which so many finalists are measured again so many times.
_VERIFY = ((40, 2, 5), (20, 1, 5), (10, 1, 3))
LEAST_STARTS = _VERIFY[-1][0]


@dataclass(frozen=True)
class Plan:
    """What a study measures, and about how long that takes."""

    levels: tuple[int, ...]
    """Requests in flight."""
    requests: int
    trials: int
    top: int
    restarts: int
    trial_s: float
    slots: float
    """Trials at once, on average."""

    @property
    def verification(self) -> int:
        """Engine starts after the search."""
        return (self.top + 1) * self.restarts

    @property
    def seconds(self) -> float:
        """All of it, by the estimate."""
        return STUDY_S + (self.trials + self.verification) * self.trial_s / self.slots


def plan_for(fit: Fit, pace: Pace, slo: Mapping[str, Mapping[str, float]], minutes: float | None) -> Plan:
    """The richest plan for the time; raises `ConfigError` where it does not do for the smallest."""
    slots, most = _slots(fit), math.inf if minutes is not None else STARTS
    left_s = DEFAULT_S if minutes is None else minutes * 60 - STUDY_S
    levels: tuple[int, ...] = ()
    requests, trial_s = 0, 0.0
    for (levels, requests), enough in zip(_loads(fit, slo), (40, 20, LEAST_STARTS), strict=True):
        trial_s = _trial_s(fit, pace, levels, requests)
        starts = math.floor(left_s / trial_s * slots)
        if starts >= enough:
            return _plan(fit, pace, levels, requests, int(min(starts, most)), slots)
    if minutes is None:
        return _plan(fit, pace, levels, requests, LEAST_STARTS, slots)
    raise ConfigError(_too_short(pace, slo, minutes, trial_s, slots))


def _too_short(pace: Pace, slo: Mapping[str, Mapping[str, float]], minutes: float, trial_s: float, slots: float) -> str:
    needed = math.ceil((STUDY_S + LEAST_STARTS * trial_s / slots) / 60)
    return (
        f"--minutes {minutes:g}: is too short. A trial takes about {trial_s:.0f} s here ({pace.told}), and the "
        f"smallest study is {LEAST_STARTS} of them, restarts for the verdict included.\n"
        f"What would do: --minutes {needed}{_shorter(slo) if trial_s > 2 * pace.start_s else ''}."
    )


def _plan(fit: Fit, pace: Pace, levels: tuple[int, ...], requests: int, starts: int, slots: float) -> Plan:
    top, restarts = next((top, restarts) for least, top, restarts in _VERIFY if starts >= least)
    trials = min(starts - (top + 1) * restarts, MAX_TRIALS)
    return Plan(levels, requests, trials, top, restarts, _trial_s(fit, pace, levels, requests), slots)


def _trial_s(fit: Fit, pace: Pace, levels: tuple[int, ...], requests: int) -> float:
    warm = Workload(concurrency=levels)
    loads = ((level.concurrency or 1, requests + warmup_requests(warm, level)) for level in levels_of(warm))
    return pace.start_s + pace.loads_s(fit.traffic, loads)


def _loads(fit: Fit, slo: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Load levels and requests at each, from the richest to what is just enough."""
    most = fit.concurrency
    lower = (max(most // 4, 1),) if most > 1 else ()
    yield (*lower, most), _requests(slo, 4 * most)
    yield (most,), _requests(slo, 4 * most)
    yield (most,), _requests(slo, 2 * most)


def _requests(slo: Mapping[str, Mapping[str, float]], wanted: int) -> int:
    """At a level: several times what is in flight, and enough for every percentile that is promised."""
    needed = max((samples_needed(stat) for stats in slo.values() for stat in stats), default=0)
    return max(wanted, math.ceil(needed * _SPARE / 8) * 8, 16)


def _slots(fit: Fit) -> float:
    if not fit.site.on_gpus:
        return float(len(fit.site.hosts))
    held = sum(fit.parallel_sizes) / len(fit.parallel_sizes)
    return max(sum(host.gpus for host in fit.site.hosts) / held, 1.0)


def _shorter(slo: Mapping[str, Mapping[str, float]]) -> str:
    """What else would help."""
    if max((samples_needed(stat) for stats in slo.values() for stat in stats), default=0) > samples_needed("p90"):
        return ", or promises at p90 (29 requests a load) in place of higher percentiles"
    return ", or a --traffic of fewer tokens"
