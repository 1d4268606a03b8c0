"""Landscapes for `search`: what a trial of each setting would come to, in virtual time. Pure functions.

Made-up ones are shaped like engine settings: memory that must hold weights, activations and KV cache; a best that lies
near the edge of what fits; starts that take 15 to 78 s and end at the stage where the memory runs out. Each is
calibrated so that a given share of random settings is feasible. Two of them give grading nothing to go by: in
`blind` the stage says nothing about the distance, in `flags` every failure has the same stage.
`simulated` asks the simulated engine's model, `recorded` a results table of a real study.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from raytune_autotuner.engine.reading import diagnose
from raytune_autotuner.engine.simulated import model as simulated_engine
from raytune_autotuner.score.metrics import METRICS
from raytune_autotuner.score.objective import assess
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.file import load_study, parse_study
from raytune_autotuner.study.space import Choice, Parameter, Params, Range, parse_space
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, TrialResult

TIMEOUT_S = 600.0
HUNG_AFTER_S = 300.0
SUCCESS_S = 150.0
SAMPLES = 4000
CLIMBERS = 4
"""Random settings, the best ones, from which the best there is is looked for."""
WAY_STATIONS = 12
"""Values of a range that are looked at on the way, beside those nearby."""
FORESEEN = frozenset({Stage.ARGUMENTS, Stage.CONFIGURATION})
"""Stages whose failures the engine's own check finds without a start; see docs/search.md."""
RECORDED = Path(__file__).with_name("recorded")
"""Tables of real studies, a folder each."""

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
    args: Mapping[str, Any] = field(default_factory=dict)
    """Fixed arguments of the engine."""
    workload: Mapping[str, Any] = field(default_factory=lambda: {"concurrency": 16})
    limits: Mapping[str, float] = field(default_factory=lambda: {"timeout_s": TIMEOUT_S, "hung_after_s": HUNG_AFTER_S})

    def study(self, grade: str = "progress", trials: int = 40, seed: int = 0, sampler: str = "tpe") -> Study:
        """The landscape as a study file."""
        return parse_study(
            {
                "study": self.name,
                "model": "none",
                "engine": {"kind": "simulated", "args": dict(self.args)},
                "search_space": dict(self.space),
                "constraints": list(self.constraints),
                "objective": dict(self.objective),
                "search": {"trials": trials, "seed": seed, "sampler": sampler},
                "workload": dict(self.workload),
                "trial": dict(self.limits),
                "penalty": {"grade": grade},
            }
        )

    def survey(self, samples: int = SAMPLES) -> tuple[float, float, float]:
        """(share feasible, share failed, best score) of random settings."""
        study = self.study()
        worths = [assess(study, self.outcome(point)) for point in random_points(self, samples)]
        scores = [worth.score for worth in worths if worth.feasible and worth.score is not None]
        pick = max if self.maximises else min
        failed = sum(worth.failure is not None for worth in worths) / samples
        return len(scores) / samples, failed, pick(scores, default=float("nan"))

    def foreseen(self, params: Params) -> Failure | None:
        """The failure that the engine's own check finds without a start, if there is one."""
        failure = self.outcome(params).failure
        return failure if failure is not None and failure.stage in FORESEEN else None

    @property
    def maximises(self) -> bool:
        """Whether more is better."""
        return "maximize" in self.objective

    @cached_property
    def best(self) -> float:
        """The best score there is, as far as steps of one or two parameters lead from the best random settings."""
        study = self.study()
        starts = sorted(random_points(self, SAMPLES), key=lambda point: self._height(study, point), reverse=True)
        peaks = [self._climb(study, start) for start in starts[:CLIMBERS]]
        return max(peaks) if self.maximises else -max(peaks)

    def _climb(self, study: Study, point: Params) -> float:
        height = self._height(study, point)
        while True:
            steps = ((self._height(study, step), step) for step in _steps(study, point))
            reached, step = max(steps, key=lambda pair: pair[0])
            if reached <= height:
                return height
            height, point = reached, step

    def _height(self, study: Study, point: Params) -> float:
        worth = assess(study, self.outcome(point))
        if not worth.feasible or worth.score is None:
            return float("-inf")
        return worth.score if self.maximises else -worth.score


def _steps(study: Study, point: Params) -> Iterator[dict[str, Any]]:
    """All settings that differ from `point` in one or two parameters, of ranges some."""
    values = {
        parameter.name: [*coarse(parameter, WAY_STATIONS), *_nearby(parameter.distribution, point[parameter.name])]
        for parameter in study.space.parameters
    }
    for one, other in itertools.combinations(values, 2):
        for left, right in itertools.product(values[one], values[other]):
            step = {**point, one: left, other: right}
            if study.space.violated(step, study.fixed) is None:
                yield step


def _nearby(spec: Range | Choice, value: Any) -> list[Any]:
    """The value and, of a range, those around it: one to three steps and a few percent to both sides."""
    if isinstance(spec, Choice):
        return []
    step = spec.step or 1
    moved = [value + sign * way for sign in (-1, 1) for way in (0, step, 2 * step, 3 * step)]
    moved += [value * factor for factor in (0.8, 0.9, 0.95, 1.05, 1.1, 1.25)] if spec.log else []
    whole = [round(one) if spec.type == "int" else round(one, 12) for one in moved]
    return [one for one in dict.fromkeys(whole) if spec.low <= one <= spec.high]


def coarse(parameter: Parameter, most: int) -> list[Any]:
    """All values of a choice; of a range at most `most`, evenly spread, its ends included."""
    spec = parameter.distribution
    if isinstance(spec, Choice):
        return list(spec.values)
    shares = [i / (most - 1) for i in range(most)]
    return list(dict.fromkeys(_at(spec, share) for share in shares))


def _at(spec: Range, share: float) -> int | float:
    """The value of a range that lies at `share` of the way from its low end to its high one."""
    value = spec.low * (spec.high / spec.low) ** share if spec.log else spec.low + share * (spec.high - spec.low)
    if spec.step:
        value = spec.low + round((value - spec.low) / spec.step) * spec.step
    return round(value) if spec.type == "int" else round(float(value), 12)


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


def all_of_them() -> list[Landscape]:
    """The made-up landscapes and the recorded ones."""
    return [*made_up(), *(recorded(table) for table in sorted(RECORDED.glob("*/trials.csv")))]


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

    A setting that the table lacks comes to what its nearest neighbour in it came to.
    """
    study = load_study(study_file or table.with_name("study.yaml"))
    rows = _trials(pd.read_parquet(table) if table.suffix == ".parquet" else pd.read_csv(table))
    points = [(_point(study, row), _result(row)) for row in rows]
    whole = {_key(point): (point, result) for point, result in points if len(point) == len(study.space.parameters)}
    named = [pair for pair, row in zip(points, rows, strict=True) if row["name"] == BASELINE]
    baseline, first = (named or points)[0]

    def outcome(params: Params) -> TrialResult:
        if params == baseline:
            return first
        found = whole.get(_key(params))
        return found[1] if found is not None else _nearest(study.space.parameters, params, list(whole.values()))

    return Landscape(
        study.study,
        study.search_space,
        study.objective.model_dump(exclude_none=True),
        baseline,
        outcome,
        study.constraints,
        study.engine.args,
        study.workload.model_dump(mode="json", exclude_defaults=True),
        {"timeout_s": study.trial.timeout_s, "hung_after_s": study.trial.hung_after_s},
    )


def description(table: Path) -> list[str]:
    """What a recorded table holds: its space, and how its trials ended at what cost."""
    landscape = recorded(table)
    rows = pd.DataFrame(_trials(pd.read_csv(table)))
    study = landscape.study()
    lines = [f"{landscape.name}: {study.space.size:,.0f} settings, {len(rows)} trials"]
    lines += [f"  {parameter.name}: {list(coarse(parameter, 5))}" for parameter in study.space.parameters]
    named = rows[["state", "stage", "kind"]].fillna("").agg(" ".join, axis=1).str.strip()
    for ended, group in rows["seconds:total"].groupby(named):
        spread = f"median {group.median():.0f} s, {group.min():.0f} to {group.max():.0f} s"
        lines.append(f"  {ended}: {len(group)} trials, {group.sum():,.0f} s of engines ({spread})")
    first = assess(study, landscape.outcome(landscape.baseline)).score
    against = "" if first is None else f", baseline {first:.1f}: x{landscape.best / first:.2f}"
    return [*lines, f"  best {study.objective.metric} {landscape.best:.1f}{against}"]


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


def _trials(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """The trials of the search that teach; those that measure a setting again for the verdict are left out."""
    kept = table[table["state"].isin(["measured", "failed"])]
    return (kept[kept["verifies"].isna()] if "verifies" in kept else kept).to_dict("records")


def _key(params: Params) -> str:
    return json.dumps(params, sort_keys=True)


def _nearest(
    parameters: Sequence[Parameter], params: Params, known: Sequence[tuple[Params, TrialResult]]
) -> TrialResult:
    return min(known, key=lambda pair: _distance(parameters, params, pair[0]))[1]


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
        # As its log ended, for which there are rules.
        read = diagnose(["Traceback (most recent call last):", '  File "vllm", line 1', evidence], exit_code=1).failure
        failure = replace(failure, depends=read.depends if read is not None and read.kind is failure.kind else ())
        return TrialResult({}, failure, seconds)
    numbers = {str(k): float(v) for k, v in row.items() if isinstance(v, (int, float)) and not pd.isna(v)}
    metrics = {name: value for name, value in numbers.items() if name.partition("@")[0] in METRICS}
    return TrialResult(metrics, None, seconds)


def _distance(parameters: Sequence[Parameter], left: Params, right: Params) -> float:
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
