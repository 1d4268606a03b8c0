"""Whole studies through the command line, and what they leave behind: for tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from raytune_autotuner.engine.processes import MARK_VARIABLE
from raytune_autotuner.report.results import ResultsFolder

BASE: dict[str, Any] = {
    "study": "test",
    "model": "simulated-model",
    "engine": {"kind": "simulated", "args": {"noise": 0.0, "speed": 4}},
    "search_space": {"max-num-seqs": {"choice": [2, 8, 64, 256]}, "block-size": {"choice": [16, 32]}},
    "workload": {"traffic": "D(32,8)", "concurrency": 8, "requests": 16, "warmup_requests": 2},
    "objective": {"maximize": "output_throughput_tok_s"},
    "search": {"trials": 4, "seed": 1, "stop_early": False},
    "trial": {"timeout_s": 30, "hung_after_s": 20},
    "verify": {"top": 0},
    "resources": {"gpus": 0, "cpus": 2},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` over it, mapping by mapping; a search space or an engine of its own kind is replaced."""
    result = dict(base)
    for key, value in changes.items():
        deep = (
            isinstance(value, dict)
            and isinstance(base.get(key), dict)
            and key != "search_space"
            and "kind" not in value
        )
        result[key] = merged(base[key], value) if deep else value
    return result


def write_study(folder: Path, **changes: Any) -> Path:
    """A study file in `folder`: `BASE` with `changes`."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(merged(BASE, changes)))
    return path


def command(study: Path, *options: str) -> list[str]:
    """The command that runs `study` with its results beside it."""
    return [sys.executable, "-m", "raytune_autotuner", str(study), "--results", str(study.parent / "results"), *options]


def run_study(
    study: Path, *options: str, timeout_s: float = 300
) -> tuple[subprocess.CompletedProcess[str], ResultsFolder]:
    """Run `study` to its end; its output and its results folder."""
    done = subprocess.run(command(study, *options), capture_output=True, text=True, timeout=timeout_s, check=False)
    return done, only_run(study)


def only_run(study: Path) -> ResultsFolder:
    """The one results folder of `study`."""
    (folder,) = ResultsFolder.runs(study.parent / "results")
    return folder


def optuna_trials(folder: ResultsFolder) -> list[optuna.trial.FrozenTrial]:
    """What Optuna's storage holds, by number."""
    storage = JournalStorage(JournalFileBackend(str(folder.optuna_log)))
    (summary,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=summary.study_name, storage=storage).trials


def marks(run_id: str) -> dict[int, str]:
    """The processes that trials of the run have started and that still run, with their marks."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            running = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            continue
        mark = next((item for item in environment if item.startswith(f"{MARK_VARIABLE}=")), "")
        if entry.name.isdigit() and running and f":{run_id}:" in mark:
            found[int(entry.name)] = mark.partition("=")[2]
    return found


def actor_of(run_id: str, trial_id: str) -> int | None:
    """The process id of a trial's actor while its engine runs."""
    owners = [mark.split(":")[1] for mark in marks(run_id).values() if mark.endswith(f":{trial_id}")]
    return int(owners[0]) if owners else None
