"""Landscapes for `search`: what a trial of each setting would come to, in virtual time. Pure functions.

Made-up ones are shaped like engine settings: memory that must hold weights, activations and KV cache; a best that lies
near the edge of what fits; starts that take 15 to 78 s and end at the stage where the memory runs out. Each is
calibrated so that a given share of random settings is feasible. Two of them give grading nothing to go by: in
`blind` the stage says nothing about the distance, in `flags` every failure has the same stage.
`simulated` asks the simulated engine's model, `recorded` a results table of a real study.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from raytune_autotuner.engine.simulated import model as simulated_engine
from raytune_autotuner.score.objective import assess
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.space import Choice, Parameter, Params, Range, parse_space
from raytune_autotuner.study.study import Study, load_study, parse_study
from raytune_autotuner.study.trial import BASELINE, TrialResult

TIMEOUT_S = 600.0
HUNG_AFTER_S = 300.0
SUCCESS_S = 150.0
SAMPLES = 4000

Outcome = Callable[[Params], TrialResult]

# Seconds from a trial's start to a failure at each stage, and the line that an engine writes there.
_ENDS: dict[Stage, tuple[float, Kind, str]] = {
    Stage.CONFIGURATION: (17.0, Kind.INVALID_CONFIG, "ValidationError: 1 validation error for VllmConfig"),
    Stage.INITIALIZATION: (26.0, Kind.ENGINE_DIED, "Engine core initialization failed"),
    Stage.WEIGHTS: (38.0, Kind.OUT_OF_MEMORY, "torch.OutOfMemoryError: CUDA out of memory"),
    Stage.COMPILATION: (55.0, Kind.UNSUPPORTED, "no kernel for this configuration"),
    Stage.KV_CACHE: (62.0, Kind.KV_CACHE_TOO_SMALL, "ValueError: the KV cache cannot hold one request of this length"),
    Stage.GRAPH_CAPTURE: (78.0, Kind.OUT_OF_MEMORY, "torch.OutOfMemoryError: CUDA out of memory"),
    Stage.LOAD: (110.0, Kind.OUT_OF_MEMORY, "torch.OutOfMemoryError: CUDA out of memory"),
}


@dataclass(frozen=True)
class Landscape:
    """A search space, an objective, a setting that works, and what every setting comes to."""

    name: str
    space: Mapping[str, Any]
    objective: Mapping[str, Any]
    baseline: Params
    outcome: Outcome
    constraints: tuple[str, ...] = ()

    def study(self, grade: str = "progress", trials: int = 40, seed: int = 0, sampler: str = "tpe") -> Study:
        """The landscape as a study file."""
        return parse_study(
            {
                "study": self.name,
                "model": "none",
                "engine": {"kind": "simulated"},
                "search_space": dict(self.space),
                "constraints": list(self.constraints),
                "objective": dict(self.objective),
                "search": {"trials": trials, "seed": seed, "sampler": sampler},
                "trial": {"timeout_s": TIMEOUT_S, "hung_after_s": HUNG_AFTER_S},
                "penalty": {"grade": grade},
            }
        )

    def survey(self, samples: int = SAMPLES) -> tuple[float, float, float]:
        """(share feasible, share failed, best score) of random settings."""
        study = self.study()
        worths = [assess(study, self.outcome(point)) for point in random_points(self, samples)]
        scores = [worth.score for worth in worths if worth.feasible and worth.score is not None]
        pick = max if study.objective.direction == "maximize" else min
        failed = sum(worth.failure is not None for worth in worths) / samples
        return len(scores) / samples, failed, pick(scores, default=float("nan"))


def random_points(landscape: Landscape, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Settings drawn as a random search draws them, those that break a constraint left out."""
    space, source = parse_space(landscape.space, landscape.constraints), random.Random(seed)
    points: list[dict[str, Any]] = []
    while len(points) < count:
        point = {parameter.name: _draw(parameter, source) for parameter in space.parameters}
        if space.violated(point, {}) is None:
            points.append(point)
    return points


def made_up() -> list[Landscape]:
    """All landscapes but recorded ones."""
    return [
        *(memory(share) for share in (0.05, 0.30, 0.65, 0.95)),
        *(latency(share) for share in (0.05, 0.65)),
        blind(0.05),
        flags(),
        slo(0.10),
        simulated(),
    ]


_MEMORY_SPACE = {
    "max-num-seqs": {"int": [1, 512], "log": True},
    "max-num-batched-tokens": {"choice": [512, 1024, 2048, 4096, 8192, 16384]},
    "gpu-memory-utilization": {"float": [0.50, 0.98], "step": 0.02},
    "tensor-parallel-size": {"choice": [1, 2, 4]},
    "max-model-len": {"choice": [2048, 4096, 8192, 16384, 32768]},
}
_MEMORY_BASELINE = {
    "max-num-seqs": 8,
    "max-num-batched-tokens": 512,
    "gpu-memory-utilization": 0.70,
    "tensor-parallel-size": 4,
    "max-model-len": 2048,
}


def memory(share: float) -> Landscape:
    """Throughput, maximised; what does not fit fails the earlier the less it fits."""
    objective = {"maximize": "output_throughput_tok_s"}
    made = Landscape(f"memory-{share * 100:02.0f}", _MEMORY_SPACE, objective, _MEMORY_BASELINE, _served)
    return _calibrated(made, share, lambda device_gib: lambda params: _served(params, device_gib), 5.0, 80.0)


def latency(share: float) -> Landscape:
    """Latency, minimised, of thousands of milliseconds; some settings hang, the slow ones meet the deadline."""
    objective = {"minimize": "e2el_ms_p90"}
    made = Landscape(f"latency-{share * 100:02.0f}", _MEMORY_SPACE, objective, _MEMORY_BASELINE, _slow)
    return _calibrated(made, share, lambda device_gib: lambda params: _slow(params, device_gib), 5.0, 120.0)


def blind(share: float) -> Landscape:
    """As `memory`, but the stage of a failure is drawn by lot."""
    base = memory(share)

    def outcome(params: Params) -> TrialResult:
        result = base.outcome(params)
        return result if result.failure is None else failed(_lot(params).choice(list(_ENDS)))

    return replace(base, name=f"blind-{share * 100:02.0f}", outcome=outcome)


def flags() -> Landscape:
    """Combinations that the engine refuses, all at one stage; what works differs by up to three times."""
    space = {
        "attention-backend": {"choice": ["auto", "flash", "flashinfer", "triton"]},
        "kv-cache-dtype": {"choice": ["auto", "fp8", "fp8_e5m2"]},
        "block-size": {"choice": [16, 32, 64, 128]},
        "enforce-eager": "bool",
        "async-scheduling": "bool",
        "max-num-seqs": {"int": [1, 512], "log": True},
    }
    baseline = {
        "attention-backend": "auto",
        "kv-cache-dtype": "auto",
        "block-size": 16,
        "enforce-eager": True,
        "async-scheduling": False,
        "max-num-seqs": 16,
    }
    return Landscape("flags", space, {"maximize": "output_throughput_tok_s"}, baseline, _flags)


def slo(share: float) -> Landscape:
    """Nearly everything starts; few settings keep the latency promise."""
    objective = {"maximize": "output_throughput_tok_s", "slo": {"ttft_ms": {"p90": 1000}}}
    baseline = {**_MEMORY_BASELINE, "max-num-seqs": 4}
    made = Landscape(f"slo-{share * 100:02.0f}", _MEMORY_SPACE, objective, baseline, _served)
    return _calibrated(made, share, lambda slowness: lambda params: _served(params, 90.0, slowness), 10.0, 0.01)


def simulated() -> Landscape:
    """The simulated engine under a closed loop of 32 requests at a time."""
    space = {
        "max-num-seqs": {"int": [1, 512], "log": True},
        "max-num-batched-tokens": {"choice": [256, 1024, 2048, 4096, 8192, 16384, 32768]},
        "gpu-memory-utilization": {"float": [0.50, 0.98], "step": 0.02},
        "block-size": {"choice": [8, 16, 32, 64, 128]},
        "kv-cache-dtype": {"choice": ["auto", "fp8"]},
        "max-model-len": {"choice": [2048, 4096, 8192, 16384]},
        "enforce-eager": "bool",
    }
    baseline = {
        "max-num-seqs": 16,
        "max-num-batched-tokens": 2048,
        "gpu-memory-utilization": 0.90,
        "block-size": 16,
        "kv-cache-dtype": "auto",
        "max-model-len": 2048,
        "enforce-eager": True,
    }
    objective = {"maximize": "output_throughput_tok_s"}
    return Landscape("simulated", space, objective, baseline, _simulated, ("max-num-batched-tokens >= max-num-seqs",))


def recorded(table: Path, study_file: Path | None = None) -> Landscape:
    """A real study's results table (`trials.csv` or `trials.parquet`), with its `study.yaml` beside it.

    A setting that was not measured comes to what its nearest measured neighbour came to.
    """
    study = load_study(study_file or table.with_name("study.yaml"))
    rows = pd.read_parquet(table) if table.suffix == ".parquet" else pd.read_csv(table)
    rows = rows[rows["state"].isin(["measured", "failed"])]
    points = [(_point(study, row), _result(row)) for row in rows.to_dict("records")]
    first, first_result = next(
        (pair for pair, name in zip(points, rows["name"], strict=True) if name == BASELINE), points[0]
    )
    known = [(point, result) for point, result in points if len(point) == len(study.space.parameters)]

    def outcome(params: Params) -> TrialResult:
        if params == first:
            return first_result
        return min(known, key=lambda pair: _distance(study.space.parameters, params, pair[0]))[1]

    objective = study.objective.model_dump(exclude_none=True)
    return Landscape(table.stem, study.search_space, objective, first, outcome, study.constraints)


def failed(stage: Stage, share: float = 0.0, kind: Kind | None = None, elapsed_s: float | None = None) -> TrialResult:
    """A trial that failed at `stage`."""
    seconds, usual, evidence = _ENDS[stage]
    failure = Failure(stage, kind or usual, Blame.PARAMETERS, evidence if kind is None else str(kind), "", share)
    return TrialResult({}, failure, {"total": seconds if elapsed_s is None else elapsed_s})


def _served(params: Params, device_gib: float = 24.0, slowness: float = 1.0) -> TrialResult:
    """A 7 GiB model: fits or not, stage by stage; else its throughput and time to first token."""
    tp, tokens, seqs = params["tensor-parallel-size"], params["max-num-batched-tokens"], params["max-num-seqs"]
    budget = params["gpu-memory-utilization"] * device_gib
    weights, per_token = 7.0 / tp, 0.0005 / tp
    if weights > budget:
        return failed(Stage.WEIGHTS, min(budget / weights, 1.0))
    room = budget - weights - tokens * 0.0003
    if room <= 0:
        return failed(Stage.KV_CACHE, kind=Kind.OUT_OF_MEMORY, elapsed_s=60.0)
    if room < params["max-model-len"] * per_token:
        return failed(Stage.KV_CACHE)
    left = device_gib - budget - 0.3
    if left < 0.2 + seqs * 0.002:
        return failed(Stage.GRAPH_CAPTURE, max(left, 0.0))
    if left < 0.2 + seqs * 0.002 + tokens * 0.00005:
        return failed(Stage.LOAD, 0.3)
    fitting = room / (1200 * per_token)
    batch = min(seqs, fitting) * (1.0 if seqs <= fitting else (fitting / seqs) ** 0.3)
    pace = {512: 0.70, 1024: 0.85, 2048: 0.95, 4096: 1.0, 8192: 0.97, 16384: 0.90}[tokens]
    throughput = 6000 * tp**0.7 * pace * batch / (batch + 60)
    ttft = slowness * (60 + 0.8 * seqs**1.2 + tokens * 0.05) / tp**0.5
    metrics = {"output_throughput_tok_s": throughput, "ttft_ms_p90": 1000 * ttft / 100}
    return TrialResult(metrics, None, {"total": SUCCESS_S})


def _slow(params: Params, device_gib: float = 24.0) -> TrialResult:
    if params["max-num-batched-tokens"] >= 8192 and params["max-num-seqs"] >= 128:
        return failed(Stage.INITIALIZATION, kind=Kind.HUNG, elapsed_s=HUNG_AFTER_S)
    result = _served(params, device_gib)
    if result.failure is not None:
        return result
    throughput = result.metrics["output_throughput_tok_s"]
    needed_s = 300_000 / throughput
    if needed_s > TIMEOUT_S - 90:
        return failed(Stage.LOAD, (TIMEOUT_S - 90) / needed_s, Kind.DEADLINE, TIMEOUT_S)
    latency_ms = 900 + 18_000_000 / throughput**1.1 + 4 * params["max-num-seqs"]
    return TrialResult({"e2el_ms_p90": latency_ms}, None, {"total": 90 + needed_s})


def _flags(params: Params) -> TrialResult:
    backend, cache_type, block = params["attention-backend"], params["kv-cache-dtype"], params["block-size"]
    kernels = {"auto": (16,), "flash": (16, 32), "flashinfer": (32, 64), "triton": (16, 128)}
    refused = (
        block not in kernels[backend]
        or (cache_type == "fp8" and backend not in ("flashinfer", "triton"))
        or cache_type == "fp8_e5m2"
        or (params["async-scheduling"] and backend == "triton")
        or (params["max-num-seqs"] > 256 and not params["enforce-eager"])
    )
    if refused:
        return failed(Stage.CONFIGURATION)
    gain = {"auto": 1.0, "flash": 1.15, "flashinfer": 1.25, "triton": 0.9}[backend]
    gain *= 1.2 if cache_type == "fp8" else 1.0
    gain *= 1.0 if params["enforce-eager"] else 1.25
    gain *= 1.1 if params["async-scheduling"] else 1.0
    seqs = params["max-num-seqs"]
    return TrialResult({"output_throughput_tok_s": 3000 * gain * seqs / (seqs + 40)}, None, {"total": SUCCESS_S})


def _simulated(params: Params) -> TrialResult:
    return _simulated_cached(json.dumps(params, sort_keys=True))


@cache
def _simulated_cached(key: str) -> TrialResult:
    setting = simulated_engine.Setting.from_params(json.loads(key))
    hardware = simulated_engine.Hardware(device_memory_gib=9.5)
    fault = simulated_engine.fate(setting, hardware)
    if fault is not None:
        kind = fault.kind or Kind.UNKNOWN
        return failed(fault.stage, 0.2, kind, HUNG_AFTER_S if kind is Kind.HUNG else _ENDS[fault.stage][0])
    level = simulated_engine.Level.fixed(requests=64, prompt_tokens=512, output_tokens=64, concurrency=32)
    ends = [timeline.end_ms for timeline in simulated_engine.simulate(setting, [level], seed=1, hardware=hardware)]
    return TrialResult({"output_throughput_tok_s": 64 * 64 / max(ends) * 1000}, None, {"total": SUCCESS_S})


def _calibrated(
    made: Landscape, share: float, outcome: Callable[[float], Outcome], few: float, many: float
) -> Landscape:
    """The landscape with its knob set so that `share` of random settings is feasible: next to none at `few`."""
    for _ in range(14):
        middle = (few * many) ** 0.5
        enough = replace(made, outcome=outcome(middle)).survey(1500)[0] >= share
        few, many = (few, middle) if enough else (middle, many)
    return replace(made, outcome=outcome(many))


def _lot(params: Params) -> random.Random:
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()
    return random.Random(digest)


def _draw(parameter: Parameter, source: random.Random) -> Any:
    spec = parameter.distribution
    if isinstance(spec, Choice):
        return source.choice(spec.values)
    if spec.log:
        value = spec.low * (spec.high / spec.low) ** source.random()
        return round(value) if spec.type == "int" else value
    if spec.step:
        return round(spec.low + source.randrange(int(spec.size)) * spec.step, 12)
    return source.randint(int(spec.low), int(spec.high)) if spec.type == "int" else source.uniform(spec.low, spec.high)


def _point(study: Study, row: Mapping[Any, Any]) -> dict[str, Any]:
    """A table row's setting in the space's own values; parameters that it lacks are left out."""
    point: dict[str, Any] = {}
    for parameter in study.space.parameters:
        cell = row.get(f"param:{parameter.name}")
        cell = study.fixed.get(parameter.name) if pd.isna(cell) else cell
        if cell is not None:
            point[parameter.name] = _in_space(parameter, cell)
    return point


def _in_space(parameter: Parameter, cell: Any) -> Any:
    spec = parameter.distribution
    if isinstance(spec, Range):
        return int(cell) if spec.type == "int" else float(cell)
    texts = {str(value).lower(): value for value in spec.values} | {json.dumps(v): v for v in spec.values}
    number = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
    return texts[number.lower()]


def _result(row: Mapping[Any, Any]) -> TrialResult:
    seconds = {"total": float(row["seconds:total"])}
    if row["state"] == "failed":
        evidence = str(row["evidence"])
        failure = Failure(Stage(row["stage"]), Kind(row["kind"]), Blame.PARAMETERS, evidence, str(row["remedy"]))
        return TrialResult({}, failure, seconds)
    metrics = {str(k): float(v) for k, v in row.items() if isinstance(v, (int, float)) and ":" not in str(k)}
    return TrialResult(metrics, None, seconds)


def _distance(parameters: tuple[Parameter, ...], left: Params, right: Params) -> float:
    """Sum of squares over the parameters, each from 0 to 1; different names are 1 apart."""
    total = 0.0
    for parameter in parameters:
        a, b = left[parameter.name], right[parameter.name]
        total += _apart(parameter.distribution, a, b) ** 2
    return total


def _apart(spec: Range | Choice, a: Any, b: Any) -> float:
    if isinstance(spec, Range):
        return float(abs(a - b)) / ((spec.high - spec.low) or 1)
    if not spec.ordered:
        return float(a != b)
    ordered = sorted(spec.values)
    return abs(ordered.index(a) - ordered.index(b)) / (len(ordered) - 1 or 1)
