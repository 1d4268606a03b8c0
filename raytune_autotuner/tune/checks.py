"""What is wrong with a study that its file alone does not show, found before anything is started.

The engine's own checks are its `preflight`; what does not fit on the cluster, the cluster says.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable
from pathlib import Path

from raytune_autotuner.load.workload import levels, parse_traffic
from raytune_autotuner.score.metrics import LATENCIES, METRICS, REQUEST_LATENCIES, STATISTICS, is_metric
from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.study import Study
from raytune_autotuner.tune.samplers import MAX_GRID, grid_points, make_sampler
from raytune_autotuner.tune.tell import in_order

_NEED_SLO = ("goodput_rps", "slo_attainment")
_VERBS = {"higher": "maximize", "lower": "minimize"}


def check_study(study: Study, results: Path) -> None:
    """Raise `ConfigError` where the study cannot run or end with a winner, or nothing can be written to `results`."""
    _check_objective(study)
    _check_slo(study)
    parse_traffic(study.workload.traffic)
    _check_space(study)
    make_sampler(study, concurrency=1)
    _check_writable(results)


def _check_objective(study: Study) -> None:
    objective = study.objective
    where, name = f"objective.{objective.direction}", objective.metric
    if not is_metric(name, labels := [level.label for level in levels(study.workload)]):
        base, at, _ = name.partition("@")
        there = f"{base}@{labels[0]}" if at and base in METRICS else None
        raise ConfigError(f"{where}: there is no metric {shown(name)}.{_hint(name, METRICS, there)}")
    metric = METRICS[name.partition("@")[0]]
    if metric.better is None:
        raise ConfigError(
            f"{where}: {name} is a count that the workload sets; take one such as request_throughput_rps."
        )
    if _VERBS[metric.better] != objective.direction:
        raise ConfigError(f"{where}: of {name}, {metric.better} is better; write {_VERBS[metric.better]}: {name}.")
    if metric.name in _NEED_SLO and not any(objective.slo.get(latency) for latency in REQUEST_LATENCIES):
        raise ConfigError(
            f"{where}: {name} counts requests that met the SLOs, but objective.slo limits none of "
            f"{', '.join(REQUEST_LATENCIES)}.\nAdd one, such as slo: {{ttft_ms: {{p99: 500}}}}."
        )


def _check_slo(study: Study) -> None:
    for latency, limits in study.objective.slo.items():
        where = f"objective.slo.{latency}"
        if latency not in LATENCIES:
            raise ConfigError(f"{where}: there is no latency {shown(latency)}.{_hint(latency, LATENCIES)}")
        if not limits:
            raise ConfigError(f"{where}: has no limit; write one, such as {latency}: {{p99: 500}}.")
        for statistic in limits:
            if statistic not in STATISTICS:
                hint = _hint(statistic, STATISTICS)
                raise ConfigError(f"{where}.{statistic}: there is no statistic {shown(statistic)}.{hint}")


def _hint(name: str, known: Iterable[str], meant: str | None = None) -> str:
    close = [meant] if meant else difflib.get_close_matches(name, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Take one of {', '.join(known)}." if len([*known]) < 10 else " docs/metrics.md lists them."


def _check_space(study: Study) -> None:
    space = study.space
    in_order(space)
    if space.size <= MAX_GRID and next(grid_points(space, study.fixed), None) is None:
        raise ConfigError("constraints: no setting of search_space meets them all; widen a range or drop a constraint.")


def _check_writable(results: Path) -> None:
    """Try it, and leave nothing: permissions alone do not tell of read-only and special file systems."""
    folder = results.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".autotuner-"):
            return
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"--results {results}: {folder} cannot be written: {why}. Name another folder.") from error
