"""How long a trial will take: by earlier runs of the same model where there are any, else by a stated guess.

In: what fits (`Fit`), and the results folders of a parent. Out: a `Pace`, from which loads of any size are reckoned.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raytune_autotuner.engine import models
from raytune_autotuner.load.workload import Traffic, levels, parse_traffic, warmup_requests
from raytune_autotuner.report.runs import runs_at
from raytune_autotuner.report.store import Store
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.study import Study, Workload
from raytune_autotuner.study.trial import State, TrialRow
from raytune_autotuner.tune.proposal.fit import Fit

_LOADING_B_PER_S = 1e9
# Around what a trial itself measures: Ray's fresh actor, the driver, as scripts/bench/overhead has it.
_AROUND_S = 2.5
# Of a trial without its loads: vLLM's imports and start, Ray's fresh actor, the stop. Measured on 2 CPU cores, with
# enforce-eager; on GPUs compilation and graphs come on top, and that figure is a guess.
_START_S = {"cpu": 55.0, "gpu": 120.0}
# A CPU core's operations per second, for prompts and for answers with 16 requests in flight: what SmolLM2-135M on two
# cores comes to (128 tokens in: 64 out give 144 tokens/s, 32 out 3.4 requests/s).
_CORE_IN, _CORE_OUT, _AT = 110e9, 30e9, 16
_GUESSED_PARAMETERS = {"cpu": 1e9, "gpu": 8e9}
_GPU_STEP_S = 0.008


@dataclass(frozen=True)
class Pace:
    """What one trial costs in seconds, part by part."""

    start_s: float
    """Everything but its loads."""
    parameters: float
    on_gpus: bool
    devices: float
    """CPU cores, or GPUs."""
    gpu_gib: float = 0.0
    scale: float = 1.0
    """What earlier runs took over what is guessed for them."""
    told: str = "a guess, as no run of this model on such machines lies in --results"

    def loads_s(self, traffic: Traffic, loads: Iterable[tuple[int, int]]) -> float:
        """Of loads, each so many in flight and so many requests."""
        tokens = traffic.tokens_in.mean, traffic.tokens_out.mean
        return sum(requests * self._request_s(*tokens, concurrency) for concurrency, requests in loads)

    def _request_s(self, tokens_in: float, tokens_out: float, concurrency: int) -> float:
        """Of the machine's time, where so many are in flight."""
        if self.on_gpus:
            return self.scale * self._on_gpus(tokens_in, tokens_out, concurrency)
        operations = 2 * self.parameters / self.devices
        # 40, 85, 144 and 205 tokens/s at 4, 8, 16 and 32 in flight.
        fewer = math.pow(concurrency / _AT, 0.8 if concurrency < _AT else 0.5)
        return self.scale * operations * (tokens_in / _CORE_IN + tokens_out / _CORE_OUT / fewer)

    def _on_gpus(self, tokens_in: float, tokens_out: float, concurrency: int) -> float:
        """By arithmetic for prompts, and by the reading of all weights once a step for answers."""
        large = self.gpu_gib >= 40
        operations, bytes_read = (2e14, 1.5e12) if large else (5e13, 4e11)
        step_s = _GPU_STEP_S + 2 * self.parameters / self.devices / bytes_read
        return tokens_in * 2 * self.parameters / self.devices / operations + tokens_out * step_s / concurrency


def pace_of(fit: Fit, results: Path | Store) -> Pace:
    """The pace on the site's machines, held against what lies in `results`."""
    hardware = {host.hardware for host in fit.site.hosts}
    trials = [
        (study, row)
        for study, rows in _earlier(fit.model.name, results)
        for row in rows
        if row.result.hardware in ("", *hardware)
    ]
    return _corrected(_guess(fit), trials, results)


def _guess(fit: Fit) -> Pace:
    kind = "gpu" if fit.site.on_gpus else "cpu"
    known = fit.model.weights
    parameters = known.floats + known.packed if known is not None else _GUESSED_PARAMETERS[kind]
    devices = fit.parallel_sizes[0] if fit.site.on_gpus else min(host.cpus for host in fit.site.hosts)
    start_s = _START_S[kind] + 2 * parameters / _LOADING_B_PER_S
    return Pace(start_s, float(parameters), fit.site.on_gpus, float(devices), fit.site.smallest_gpu_gib or 0.0)


def _corrected(guess: Pace, trials: Sequence[tuple[Study, TrialRow]], results: Path | Store) -> Pace:
    if not trials:
        return guess
    starts, ratios = [], []
    for study, row in trials:
        seconds = row.result.seconds
        loads = seconds.get("load", 0.0) + seconds.get("warmup", 0.0)
        starts.append(seconds.get("total", 0.0) - loads + _AROUND_S)
        ratios.append(loads / _guessed_loads_s(guess, study.workload))
    told = f"by {len(trials)} trial{'s' if len(trials) > 1 else ''} of earlier runs in {results}"
    return replace(guess, start_s=statistics.median(starts), scale=statistics.median(ratios), told=told)


def _guessed_loads_s(guess: Pace, load: Workload) -> float:
    measured = load.requests * load.rounds
    loads = ((level.concurrency or _AT, measured + warmup_requests(load, level)) for level in levels(load))
    return guess.loads_s(parse_traffic(load.traffic), loads)


def _earlier(model: str, results: Path | Store) -> list[tuple[Study, list[TrialRow]]]:
    """The measured trials of this model on a real engine, under drawn traffic."""
    found = []
    for run in runs_at(results):
        try:
            study, rows = run.load_study(), run.read_rows()
        except (ConfigError, OSError, ValueError, KeyError, TypeError):
            continue  # a folder of another version, or one that is half written: nothing to learn from
        drawn = study.workload.dataset is None and study.workload.trace is None
        if models.absolute(study.model) == model and study.engine.kind == "vllm" and drawn:
            found.append((study, [row for row in rows if _is_whole(row)]))
    return found


def _is_whole(row: TrialRow) -> bool:
    """Whether all of a trial ran, and was timed."""
    return row.state is State.MEASURED and row.result.seconds.get("total", 0) > row.result.seconds.get("load", 0) > 0
