"""A small study and its rows, for the tests of the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, State, TrialResult, TrialRow

METRIC = "output_throughput_tok_s"
NO_MEMORY = Failure(
    Stage.KV_CACHE,
    Kind.OUT_OF_MEMORY,
    Blame.PARAMETERS,
    'ValueError: 12.3 GiB is needed, "quoted", and a comma',
    "Lower gpu-memory-utilization.",
    0.25,
)


def make_study(**changes: Any) -> Study:
    """Four parameters of different types, an SLO, 12 trials."""
    raw: dict[str, Any] = {
        "study": "sample",
        "model": "bundled:smollm2-135m-instruct",
        "engine": {"kind": "simulated", "args": {"max-model-len": 2048}, "env": {"VLLM_CPU_KVCACHE_SPACE": 2}},
        "search_space": {
            "max-num-seqs": {"int": [1, 64], "log": True},
            "block-size": {"choice": [16, 32, 64]},
            "enable-prefix-caching": "bool",
            "env:VLLM_CPU_OMP_THREADS_BIND": {"choice": ["auto", "0-1"]},
        },
        "constraints": ["max-num-seqs <= max-model-len"],
        "objective": {"maximize": METRIC, "slo": {"ttft_ms": {"p90": 3000}}},
        "search": {"trials": 12},
    }
    return parse_study({**raw, **changes})


def setting(seqs: int, block: int = 32, caching: bool = True, bind: str = "auto") -> dict[str, Any]:
    return {
        "max-num-seqs": seqs,
        "block-size": block,
        "enable-prefix-caching": caching,
        "env:VLLM_CPU_OMP_THREADS_BIND": bind,
    }


def measured(number: int, score: float, params: dict[str, Any] | None = None, violation: float = -0.5) -> TrialRow:
    """A measured trial; without `params` the baseline."""
    metrics = {METRIC: score, "ttft_ms_p90": 1234.5, f"{METRIC}@c16": score * 1.1, "requests": 64.0}
    return TrialRow(
        number,
        f"abc_{number:05d}",
        BASELINE if params is None else "",
        params or {},
        State.MEASURED,
        TrialResult(metrics, None, {"start": 43.2, "load": 20.0, "total": 70.0}),
        score=score,
        violation=violation,
        relative=score / 100.0,
    )


def failed(number: int, params: dict[str, Any] | None = None, failure: Failure = NO_MEMORY) -> TrialRow:
    return TrialRow(
        number,
        f"abc_{number:05d}",
        BASELINE if params is None else "",
        params or {},
        State.FAILED,
        TrialResult({}, failure, {"total": 45.3}),
        violation=1.45,
        penalty=1.45,
    )


def again(
    number: int, of: TrialRow, restart: int, *scores: float, violation: float = -0.5, failure: Failure | None = None
) -> TrialRow:
    """One more measurement of the setting of trial `of`, on a fresh start; without scores it failed."""
    row = failed(number, dict(of.params), failure or NO_MEMORY)
    if scores:
        row = replace(measured(number, scores[0], dict(of.params), violation), scores=scores if scores[1:] else ())
    return replace(row, name="", verifies=of.number, restart=restart)


def verified(rows: list[TrialRow], scores: dict[int, tuple[float, ...]], violation: float = -0.5) -> list[TrialRow]:
    """The rows and their verification: trial number to its score in each restart, interleaved."""
    by_number = {row.number: row for row in rows}
    order = [(restart, of) for restart in range(max(map(len, scores.values()))) for of in scores]
    due = [(restart, of) for restart, of in order if restart < len(scores[of])]
    first = max(by_number) + 1
    return rows + [
        again(first + i, by_number[of], restart, scores[of][restart], violation=violation)
        for i, (restart, of) in enumerate(due)
    ]


BASE = (100.0, 97.0, 103.0, 99.0, 101.0)
"""The baseline's own restarts: they differ by 2.2 %."""


def verified_rows() -> list[TrialRow]:
    """Baseline 100; trial 2 wins by 40 %; trial 3 is 20 % better, changes more and fails no SLO here."""
    rows = [measured(0, 100.0), measured(2, 143.0, setting(16)), measured(3, 121.0, setting(32, 64))]
    return verified(rows, {0: BASE, 2: (140.0, 137.0, 144.0, 138.0, 141.0), 3: (119.0, 118.0, 123.0, 118.0, 122.0)})


def running(number: int, params: dict[str, Any] | None = None) -> TrialRow:
    return replace(measured(number, 1.0, params), state=State.RUNNING, result=TrialResult(), score=None, violation=None)


def sample_rows() -> list[TrialRow]:
    """Baseline 100; trial 2 wins with 143; trial 3 is faster but misses the SLO."""
    return [
        measured(0, 100.0),
        failed(1, setting(64, bind="0-1")),
        measured(2, 143.0, setting(16, 64, False, "0-1")),
        measured(3, 160.0, setting(32), violation=0.27),
        running(4, setting(8)),
    ]
