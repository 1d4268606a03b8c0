"""Whether a trial keeps its SLOs, load level by load level, and by how much it misses them.

In: metrics by flat name, of one level or of a trial (`ttft_ms_p99@c16`), and the study's `objective`. Out: the total
relative violation and the one constraint value that comes of it, and the highest load under which the SLOs hold.
A limit without a measurement is a limit missed. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile

from raytune_autotuner.score.metrics import SAMPLES, samples_needed
from raytune_autotuner.study.study import ObjectiveSpec, Workload

MAX_LOAD = "max_load_under_slo"
ATTAINMENT = "slo_attainment"
UNMEASURED_EXCESS = 1_000.0
"""Relative violation of an SLO that has no finite measurement: as if its limit were missed a thousand times over."""
MAX_EXCESS = 1e6
"""A limit is never counted as missed by more, so that sums stay finite."""
NO_SLO_VALUE = -1.0
"""Constraint value of a measured trial in a study without SLOs: the margin of a latency of nothing."""
_BELOW_ONE = math.nextafter(1.0, 0.0)


def loads(workload: Workload) -> dict[str, float]:
    """Each load level's label and load (requests in flight, or per second), the lowest first; empty for a trace."""
    closed = {f"c{concurrency}": float(concurrency) for concurrency in workload.concurrency}
    opened = {f"r{rate:g}": rate for rate in workload.request_rate_rps}
    return dict(sorted((closed | opened).items(), key=lambda level: level[1]))


def scans_loads(objective: ObjectiveSpec) -> bool:
    """Whether the highest load is looked for: then an SLO may be missed at the higher levels."""
    return any(metric == MAX_LOAD for metric, _ in objective.targets)


def ends_at_first_miss(objective: ObjectiveSpec) -> bool:
    """Whether the levels above the first that misses need not be run: nothing else is asked of them."""
    return scans_loads(objective) and len(objective.targets) == 1


def measured(metrics: Mapping[str, float], name: str) -> float | None:
    """The finite value of a metric; None where it is absent, NaN or infinite: no value is not a value."""
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def slo_metrics(objective: ObjectiveSpec) -> dict[str, float]:
    """The flat names of the statistics that have limits, with these; none where attainment decides instead.

    >>> slo_metrics(ObjectiveSpec(maximize="goodput_rps", slo={"ttft_ms": {"p99": 500.0}}))
    {'ttft_ms_p99': 500.0}
    """
    if objective.attainment is not None:
        return {}
    return {f"{metric}_{stat}": limit for metric, limits in objective.slo.items() for stat, limit in limits.items()}


def excesses(metrics: Mapping[str, float], objective: ObjectiveSpec, levels: Sequence[str] = ()) -> list[float]:
    """For each limit (value - limit) / limit at the level of `levels` that is worst: below 0 the margin, else the miss.

    Without `levels` the metrics are those of one level, under their plain names. With `objective.attainment` there is
    one limit: that share of requests must keep all of them.
    """
    each = [_limits(metrics, objective, f"@{level}") for level in levels] or [_limits(metrics, objective, "")]
    return [max(of_one_limit) for of_one_limit in zip(*each, strict=True)]


def total_violation(metrics: Mapping[str, float], objective: ObjectiveSpec, levels: Sequence[str] = ()) -> float:
    """Sum over all limits of the relative miss: 0 when all are met, continuous there, growing with each miss.

    >>> objective = ObjectiveSpec(maximize="goodput_rps", slo={"ttft_ms": {"p99": 500.0}})
    >>> total_violation({"ttft_ms_p99": 750.0}, objective)
    0.5
    """
    return sum(max(0.0, excess) for excess in excesses(metrics, objective, levels))


def constraint_value(metrics: Mapping[str, float], objective: ObjectiveSpec, levels: Sequence[str] = ()) -> float:
    """The constraint's value of a measured trial: at most 0 when every SLO is met at all levels, else in (0, 1).

    >>> objective = ObjectiveSpec(maximize="goodput_rps", slo={"ttft_ms": {"p99": 500.0}})
    >>> constraint_value({"ttft_ms_p99": 400.0}, objective)
    -0.2
    """
    total = total_violation(metrics, objective, levels)
    if total > 0:
        return min(total / (1.0 + total), _BELOW_ONE)
    return max(excesses(metrics, objective, levels), default=NO_SLO_VALUE)


def meets(level: Mapping[str, float], objective: ObjectiveSpec) -> bool:
    """Whether one load level, by its own metrics, keeps every SLO; with too few samples to say so it does not."""
    enough = not any(lacks_samples(level, name) for name in slo_metrics(objective))
    return enough and total_violation(level, objective) <= 0


def max_load_under_slo(
    levels: Mapping[str, Mapping[str, float]], loads: Mapping[str, float], objective: ObjectiveSpec
) -> float:
    """The highest of `loads` (by label) at which the SLOs hold, and at all below it; 0 where the lowest misses.

    `levels` are the metrics by label. One that is not there missed: a scan may end at the first that does.
    """
    ascending = sorted(loads, key=lambda label: loads[label])
    held = takewhile(lambda label: label in levels and meets(levels[label], objective), ascending)
    return max((loads[label] for label in held), default=0.0)


def samples(metrics: Mapping[str, float], name: str, at: str = "") -> float | None:
    """How many samples the metric `name` rests on (`at` a level: `@c16`); None where they were not counted.

    They are the completed requests, unless the metric is of a latency that not each of them has.
    """
    own = SAMPLES.get(name.rpartition("_")[0])
    if own is not None and (count := measured(metrics, f"{own}{at}")) is not None:
        return count
    sent, failed = (measured(metrics, f"{count}{at}") for count in ("requests", "requests_failed"))
    return None if sent is None or failed is None else sent - failed


def lacks_samples(metrics: Mapping[str, float], name: str, at: str = "") -> bool:
    """Whether it is known that the metric `name` rests on fewer samples than it needs."""
    count = samples(metrics, name, at)
    return count is not None and count < samples_needed(name)


def _limits(metrics: Mapping[str, float], objective: ObjectiveSpec, at: str) -> list[float]:
    """The excess of each limit at one level."""
    if objective.attainment is not None and objective.slo:
        return [_shortfall(measured(metrics, f"{ATTAINMENT}{at}"), objective.attainment)]
    limits = slo_metrics(objective).items()
    return [_excess(measured(metrics, f"{name}{at}"), limit) for name, limit in limits]


def _excess(value: float | None, limit: float) -> float:
    return UNMEASURED_EXCESS if value is None else min((value - limit) / limit, MAX_EXCESS)


def _shortfall(share: float | None, wanted: float) -> float:
    return UNMEASURED_EXCESS if share is None else (wanted - share) / wanted
