"""What is wrong with a study that its file alone does not show, found before anything is started.

The engine's own checks are its `preflight`; what does not fit on the cluster, the cluster says.
"""

from __future__ import annotations

import difflib
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from raytune_autotuner.load import vllm_bench
from raytune_autotuner.load.datasets import read_dataset
from raytune_autotuner.load.workload import check_traffic, levels
from raytune_autotuner.report.store import Store
from raytune_autotuner.score.metrics import (
    AGAINST_BASELINE,
    LATENCIES,
    METRICS,
    REQUEST_LATENCIES,
    STATISTICS,
    Metric,
    is_metric,
)
from raytune_autotuner.score.slo import MAX_LOAD, loads
from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.study import EngineSpec, Study
from raytune_autotuner.tune.load_checks import check_loads
from raytune_autotuner.tune.samplers import MAX_GRID, grid_points, make_sampler
from raytune_autotuner.tune.tell import in_order

_JUDGE_REQUESTS = ("goodput_rps", "slo_attainment")
_VERBS = {"higher": "maximize", "lower": "minimize"}
_CHANGES_ANSWERS = (
    "dtype",
    "quantization",
    "kv-cache-dtype",
    "calculate-kv-scales",
    "mamba-cache-dtype",
    "mamba-ssm-cache-dtype",
    "speculative-config",
    "hf-overrides",
    "load-format",
)
"""vLLM's flags of which one value may answer otherwise, or worse, than another."""


def check_study(study: Study, results: Path | Store) -> None:
    """Raise `ConfigError` where the study cannot run or end with a winner, or nothing can be written to `results`."""
    if study.engine.kind == "running":
        raise ConfigError(
            "engine.kind: running: nothing can be searched on a server that is not started with each setting.\n"
            "Measure it as it is: python -m raytune_autotuner bench STUDY.yaml"
        )
    check_measurement(study, results)
    _check_space(study)
    make_sampler(study, concurrency=1)


def check_measurement(study: Study, results: Path | Store) -> None:
    """Raise `ConfigError` where no setting could be measured and judged, or nothing can be written to `results`."""
    _check_slo(study)
    for name, direction in study.objective.targets:
        where = f"objective.{direction}"
        _check_measured(study, where, name, _known_metric(study, where, name, direction))
    _check_attainment(study)
    check_traffic(study.workload)
    check_loads(study)
    _check_dialect(study)
    if study.workload.client == "vllm-bench" and study.ray.address is None:
        vllm_bench.require(str(study.engine.python or sys.executable))
    if isinstance(results, Store):
        results.check_writable()
    else:
        _check_writable(results)


def quality_notes(study: Study) -> list[str]:
    """Warnings for people: what is searched may change answers, and no `quality` section holds them to the baseline's.

    A fixed argument is no concern: the baseline has it too.
    """
    found = [name for name in study.space.by_name if name.partition(".")[0] in _CHANGES_ANSWERS]
    if study.quality is not None or not found:
        return []
    return [
        f"{', '.join(found)} may change the answers, and nothing checks them: a setting that answers worse can win. "
        "Add `quality: {}` to hold every setting's answers against the baseline's."
    ]


def _known_metric(study: Study, where: str, name: str, direction: str) -> Metric:
    """The metric that an objective names; raises `ConfigError` for what is none, or none to go in that direction."""
    if not is_metric(name, labels := [level.label for level in levels(study.workload)]):
        raise ConfigError(f"{where}: there is no metric {shown(name)}.{_nearest_metric(name, labels)}")
    metric = METRICS[name.partition("@")[0]]
    if metric.better is None:
        raise ConfigError(f"{where}: {name} {_why_no_objective(metric)}.")
    if _VERBS[metric.better] != direction:
        raise ConfigError(f"{where}: of {name}, {metric.better} is better; write {_VERBS[metric.better]}: {name}.")
    return metric


def _nearest_metric(name: str, labels: list[str]) -> str:
    base, at, _ = name.partition("@")
    if at and base in METRICS:
        of_trial = METRICS[base].across == "none" or not labels
        return _hint(name, METRICS, base if of_trial else f"{base}@{labels[0]}")
    return _hint(name, METRICS)


def _why_no_objective(metric: Metric) -> str:
    """What it is, and what to take in its place."""
    if metric.name in AGAINST_BASELINE:
        return "is held against the baseline, which has none; limit it under quality, or minimize: perplexity"
    what = "tells how steady the measurement was" if metric.name == "drift" else "is a count that the workload sets"
    return f"{what}; take one such as request_throughput_rps"


def _check_measured(study: Study, where: str, name: str, metric: Metric) -> None:
    """Raise `ConfigError` for an objective that this study cannot measure."""
    lacking = {
        **dict.fromkeys(_JUDGE_REQUESTS, _no_request_slo(study)),
        MAX_LOAD: _no_scan(study),
        "cost_per_million_tokens": _no_price(study),
        "energy_j_per_token": _no_gpu(study),
        "perplexity": "" if study.quality else "is only measured where there is a quality section.\nAdd quality: {}.",
    }
    if why := lacking.get(metric.name):
        raise ConfigError(f"{where}: {name} {why}")


def _no_request_slo(study: Study) -> str:
    if any(study.objective.slo.get(latency) for latency in REQUEST_LATENCIES):
        return ""
    return (
        f"counts requests that met the SLOs, but objective.slo limits none of {', '.join(REQUEST_LATENCIES)}.\n"
        "Add one, such as slo: {ttft_ms: {p90: 500}}."
    )


def _no_scan(study: Study) -> str:
    if not study.objective.slo:
        return "is the highest load that keeps the SLOs, but objective.slo has none.\nAdd slo: {ttft_ms: {p90: 500}}."
    if len(loads(study.workload)) < 2:
        return (
            "is the highest of several load levels that keeps the SLOs, but workload has "
            f"{'one' if study.workload.trace is None else 'a trace instead of any'}.\n"
            "Write several, such as concurrency: [4, 8, 16, 32] or request_rate_rps: [1, 2, 4]."
        )
    return ""


def _no_price(study: Study) -> str:
    if study.resources.price_per_hour is not None:
        return ""
    return "needs a price.\nWrite that of one GPU, or of the machine, such as resources: {price_per_hour: 2.5}."


def _no_gpu(study: Study) -> str:
    if study.resources.nodes > 1:
        return f"is measured on one node, but resources.nodes is {study.resources.nodes}."
    return "is that of the GPUs that a trial holds, but resources.gpus is 0." if study.resources.gpus == 0 else ""


def _check_slo(study: Study) -> None:
    for latency, limits in study.objective.slo.items():
        where = f"objective.slo.{latency}"
        check_latency(where, latency)
        if not limits:
            raise ConfigError(f"{where}: has no limit; write one, such as {latency}: {{p90: 500}}.")
        for statistic in limits:
            check_statistic(f"{where}.{statistic}", statistic)


def check_latency(where: str, name: str) -> None:
    """Raise `ConfigError` where `name` is no latency that an SLO can limit."""
    if name not in LATENCIES:
        raise ConfigError(f"{where}: there is no latency {shown(name)}.{_hint(name, LATENCIES)}")


def check_statistic(where: str, name: str) -> None:
    """Raise `ConfigError` where `name` is no statistic that an SLO can limit."""
    if name not in STATISTICS:
        raise ConfigError(f"{where}: there is no statistic {shown(name)}.{_hint(name, STATISTICS)}")


def _check_attainment(study: Study) -> None:
    objective = study.objective
    if objective.attainment is None:
        return
    if not objective.slo:
        raise ConfigError(
            "objective.attainment: is the share of requests that must keep every limit of objective.slo; it has none.\n"
            "Add one, such as slo: {ttft_ms: {mean: 500}}, or leave attainment out."
        )
    if pooled := [latency for latency in objective.slo if latency not in REQUEST_LATENCIES]:
        raise ConfigError(
            f"objective.slo.{pooled[0]}: objective.attainment judges requests one by one, and a request has no "
            f"{pooled[0]}.\nLimit one of {', '.join(REQUEST_LATENCIES)}, or leave attainment out."
        )


def _check_dialect(study: Study) -> None:
    """Raise `ConfigError` for what only token ids on `/v1/completions` allow, and what only our own client can say."""
    if study.workload.client == "vllm-bench":
        _check_usual_requests(study.engine)
    if study.engine.api == "completions":
        return
    if study.quality is not None:
        raise ConfigError(f"quality: needs engine.api: completions, but it is {study.engine.api}. Leave one out.")
    if study.workload.client == "vllm-bench":
        raise ConfigError(f"workload.client: vllm-bench sends token ids, but engine.api is {study.engine.api}.")
    if study.workload.dataset is not None and any(
        not isinstance(sample.prompt, str) for sample in read_dataset(study.workload.dataset)
    ):
        raise ConfigError(
            f"workload.dataset: {study.workload.dataset} holds token ids, but engine.api {study.engine.api} takes text."
        )


def _check_usual_requests(engine: EngineSpec) -> None:
    for key, value, usual in (("request", engine.request, {}), ("exact_lengths", engine.exact_lengths, True)):
        if value != usual:
            raise ConfigError(
                f"engine.{key}: {shown(value)} means nothing to workload.client vllm-bench, which makes its own "
                "requests.\nLeave it out, or take workload.client: builtin."
            )


def _hint(name: str, known: Iterable[str], meant: str | None = None) -> str:
    close = [meant] if meant else difflib.get_close_matches(name, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Take one of {', '.join(known)}." if len([*known]) < 10 else " docs/metrics.md lists them."


def _check_space(study: Study) -> None:
    space = study.space
    if not space.parameters:
        raise ConfigError(
            "search_space is empty: name at least one parameter, such as max-num-seqs: {int: [1, 64]}.\n"
            "To measure one setting: python -m raytune_autotuner bench STUDY.yaml"
        )
    in_order(space)
    if space.size <= MAX_GRID and next(grid_points(space, study.fixed), None) is None:
        raise ConfigError("constraints: no setting of search_space meets them all; widen a range or drop a constraint.")


def _check_writable(results: Path) -> None:
    """Try it, and leave nothing: permissions alone do not tell of read-only and special file systems."""
    folder = results.absolute()
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryDirectory(dir=folder, prefix=".autotuner-"):
            return
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"--results {results}: {folder} cannot be written: {why}. Name another folder.") from error
