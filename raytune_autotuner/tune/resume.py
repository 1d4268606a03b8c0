"""Going on with a study that was interrupted, or ended by a fault that is mended now: which run, and what it holds.

Also whether the study file still fits it.

The results folder and Optuna's storage are the truth, not Ray Tune's own state, which is up to ten seconds old: a
trial counts as finished as soon as its own `result.json` is written. Knows neither Ray nor Optuna.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from raytune_autotuner.report.recheck import Claim, read_claim
from raytune_autotuner.report.results import ResultsFolder, order_runs, read_result, study_yaml
from raytune_autotuner.report.runs import fetch, kept_in, runs_at
from raytune_autotuner.report.status import STALE_S, StudyStatus, read_status
from raytune_autotuner.report.store import Store
from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.failure import Blame
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialRow

CHANGEABLE = (
    "search.trials",
    "search.time_budget",
    "search.cache",
    "search.target",
    "search.plateau",
    "search.max_failures_in_a_row",
    "verify.top",
    "verify.restarts",
    "trial.retries",
    "trial.log_limit_mb",
    "resources.max_concurrent",
    "ray.address",
    "results",
)
"""Keys that may differ from the interrupted run's: none of them changes what a trial measures."""
_DECIDES_FINALISTS = [key for key in CHANGEABLE if key.startswith("search.")] + ["verify.top"]


def unfinished_run(study: Study, results: Path | Store) -> ResultsFolder:
    """The newest unfinished run of `study` at `results`, on this machine with all that is known of it.

    Raises `ConfigError` where there is none, it still runs, or the study file differs in what a trial measures.
    """
    runs = [run for run in _runs(study, results) if _unfinished(run)]
    if not runs:
        raise ConfigError(f"--resume: under {results} there is no unfinished run of {study.study}. Leave --resume out.")
    status = read_status(runs[-1])
    if status is not None and status.driver_alive:
        raise ConfigError(f"--resume: {runs[-1].place} still runs ({_driver(status)}).")
    _check_same(study, runs[-1])
    return _brought_here(runs[-1])


def elapsed_before_s(folder: ResultsFolder) -> float:
    """Seconds that the interrupted run has used up of its time budget."""
    status = read_status(folder)
    return 0.0 if status is None else status.elapsed_s


def check_versions(folder: ResultsFolder, engine: Mapping[str, str]) -> None:
    """Raise `ConfigError` where the engine is another version now: its figures could not be compared."""
    known = folder.read_versions().get("engine")
    if known is None:
        return
    changed = [name for name in {**known, **engine} if known.get(name) != engine.get(name)]
    if changed:
        then, now = ({name: of.get(name) for name in changed} for of in (known, engine))
        raise ConfigError(f"--resume: {folder.place} was measured with {shown(then)}, but now there is {shown(now)}.")


def check_claim(folder: ResultsFolder, claim: Claim | None) -> None:
    """Raise `ConfigError` where the run verifies what is not asked for now, or nothing at all."""
    then = read_claim(folder)
    if (then and then.source) != (claim and claim.source):
        what = "searches" if then is None else f"verifies {then.source}"
        way = "the study" if then is None else "`verify` and the same run and trial"
        raise ConfigError(f"--resume: {folder.path} {what}; go on with it by {way}, or leave --resume out.")


def kept_rows(folder: ResultsFolder, study: Study) -> list[TrialRow]:
    """The run's trials by number; those that had not ended carry the result that they left behind, if any.

    Those that failed by the study's fault count as interrupted: they say nothing of their settings. So do restarts for
    the verdict where `study` may find other finalists than the run's own: all are to be measured side by side.
    """
    then, now = _keys_of(folder), dict(_flat(yaml.safe_load(study_yaml(study))))
    again = any(then.get(key) != now.get(key) for key in _DECIDES_FINALISTS)
    return [_kept(_with_result(folder, row), again) for row in folder.read_rows()]


def _kept(row: TrialRow, measured_again: bool) -> TrialRow:
    if measured_again and row.verifies is not None:
        return replace(row, state=State.INTERRUPTED)
    if row.result.failure is None or row.result.failure.blame is not Blame.STUDY:
        return row
    result = replace(row.result, failure=None)
    return replace(row, state=State.INTERRUPTED, result=result, violation=None, penalty=None)


def _with_result(folder: ResultsFolder, row: TrialRow) -> TrialRow:
    """One that had not ended, with the result that it has left behind."""
    result = None if row.state.finished else read_result(folder.trial_dir(row.number, row.trial_id))
    return row if result is None else replace(row, state=State.RUNNING, result=result)


def _runs(study: Study, results: Path | Store) -> list[ResultsFolder]:
    """Oldest first; of a run that this machine and a store both hold, the later state."""
    if isinstance(results, Path):
        return runs_at(results.absolute(), study.study)
    here = ResultsFolder.runs(kept_in(results), study.study)
    known = {run.path.name: replace(run, store=results / run.path.name) for run in here}
    for run in runs_at(results, study.study):
        name = run.path.name
        if name not in known or _heard_at(run) > _heard_at(known[name]):
            known[name] = run
    return [known[name] for name in order_runs(known)]


def _heard_at(run: ResultsFolder) -> float:
    status = read_status(run)
    return 0.0 if status is None else status.updated_at


def _brought_here(run: ResultsFolder) -> ResultsFolder:
    """The run in the folder in which this machine writes it, whole."""
    if run.store is None or run.path == kept_in(run.store):
        return run
    path = kept_in(run.store)
    part = path.with_name(f".{path.name}.part")
    fetch(run.store, part)  # under another name: half of a run must not be taken for all that is known of it
    if path.exists():  # an earlier state, some trials of which may never have come to the store
        path.rename(path.with_name(f"{path.name}.{time.time_ns()}.outdated"))
    part.rename(path)
    return replace(run, path=path)


def _driver(status: StudyStatus) -> str:
    """Who drives a run, as far as that can be told from here."""
    driver = f"process {status.pid} on {status.host}"
    if status.host == socket.gethostname():
        return driver
    silent_s = max(time.time() - status.updated_at, 0.0)
    return f"{driver}, heard of {silent_s:.0f} s ago; one that is silent for {STALE_S:.0f} s counts as dead"


def _unfinished(run: ResultsFolder) -> bool:
    status = read_status(run)
    return status is None or status.phase != "finished"


def _check_same(study: Study, run: ResultsFolder) -> None:
    then = _keys_of(run)
    now = dict(_flat(yaml.safe_load(study_yaml(study))))
    for key in {**then, **now}:
        if then.get(key) != now.get(key) and key not in CHANGEABLE:
            raise ConfigError(
                f"--resume: {key} was {shown(then.get(key))} in {run.place} and is {shown(now.get(key))} now.\n"
                f"Set it back, or start anew without --resume. Free to change: {', '.join(CHANGEABLE)}."
            )


def _keys_of(run: ResultsFolder) -> dict[str, Any]:
    """The keys of the run's study, dotted, as they were written."""
    try:
        return dict(_flat(yaml.safe_load(run.study_file.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise ConfigError(f"{run.study_file}: is broken. Put a copy of it back, or leave --resume out.") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
