"""One setting measured by hand, the way a trial is: no search, and no Ray.

In: a study and a setting. Out: progress on standard error, figures or the failure on standard output, and a results
folder with this one trial, which `logs`, `report` and `export` read as any other.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.engine.gpus import gpus_here
from raytune_autotuner.engine.processes import sweep_orphans
from raytune_autotuner.report.bench import Progress, as_values, render
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.runs import create_run, mirrored, open_run
from raytune_autotuner.report.status import Phase, StudyStatus, write_status
from raytune_autotuner.report.store import Store, place
from raytune_autotuner.score.objective import judged
from raytune_autotuner.study.errors import INTERRUPTED, NO_RESULT, OK, ConfigError
from raytune_autotuner.study.masking import MASK, mask_line, mask_values
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study, only_setting
from raytune_autotuner.study.trial import BASELINE, State, TrialResult, TrialRow
from raytune_autotuner.tune.checks import check_measurement
from raytune_autotuner.tune.cluster import this_machine
from raytune_autotuner.tune.evaluate import Evaluation
from raytune_autotuner.tune.versions import versions

ENDING = "-bench"
"""Of the folder's name, so that it is not taken for a run of the study."""


def run_bench(
    study: Study, params: Params, results: Path | Store, *, restart: int | None = None, as_json: bool = False
) -> int:
    """Measure `params` (none: the baseline) and tell what came of it; returns the exit code.

    `restart` has the load seeds of that restart of a verification. Raises `ConfigError` before anything is started.
    """
    check_measurement(study, results)
    _check_secrets(study)
    if study.resources.nodes > 1:
        raise ConfigError(
            f"resources.nodes: bench measures on this machine alone, but a trial spans {study.resources.nodes} nodes.\n"
            "Run the study with --trials 1, which measures its baseline."
        )
    if params and study.engine.kind == "running":
        raise ConfigError("--param: a server that runs already (engine.kind: running) takes no parameters.")
    engine = make_engine(_with_only(study, params))
    with closing(engine):
        engine.preflight()
        gpus = _gpus(study, engine, params)
        row = TrialRow(0, "bench", "" if params else BASELINE, dict(params), State.RUNNING)
        if (refused := engine.refuse(params)) is not None:
            row = judged(study, row, TrialResult({}, refused))
            _tell(study, row, None, None, as_json)
            return NO_RESULT
        folder = create_run(results, study, ENDING)
        with mirrored(folder, lambda text: print(text, file=sys.stderr)):
            return _Bench(study, engine, row, folder).run(gpus, restart, as_json)


class _Bench:
    """The measurement and its folder."""

    def __init__(self, study: Study, engine: Engine, row: TrialRow, folder: ResultsFolder) -> None:
        self._study = study
        self._engine = engine
        self._row = row
        self._folder = folder
        self._status = StudyStatus.begin(1)
        self._progress = Progress(study, row, folder.study_log)

    def run(self, gpus: list[str], restart: int | None, as_json: bool) -> int:
        """Measure, write down, tell."""
        with closing(self._progress), _interruptible():
            self._begin()
            try:
                row = judged(self._study, self._row, self._measure(gpus, restart))
            except KeyboardInterrupt:
                self._end(replace(self._row, state=State.INTERRUPTED))
                self._progress.say(f"interrupted: the engine is stopped; what there is lies in {self._folder.path}")
                return INTERRUPTED
            self._end(row)
        _tell(self._study, row, self._engine.launch_lines(row.params)[0], self._folder.path, as_json)
        return OK if row.result.failure is None else NO_RESULT

    def _begin(self) -> None:
        self._folder.write_versions(versions(self._engine, this_machine()))
        write_status(self._folder, self._status)
        self._progress.say(f"files: {self._folder.path}")
        broken = self._study.space.violated(self._row.params, self._study.fixed)
        if broken is not None:
            self._progress.say(f"a search would not try this: it breaks the constraint `{broken.text}`")

    def _measure(self, gpus: list[str], restart: int | None) -> TrialResult:
        sweep_orphans()
        # Without this an engine that holds no GPU would see all of them.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        evaluation = Evaluation(
            self._study,
            self._engine,
            self._row.params,
            self._folder.trial_dir(self._row.number, self._row.trial_id),
            self._folder.path.name,
            self._row.trial_id,
            on_progress=self._progress.moved,
            gpus=gpus,
            restart=restart,
        )
        rounds = evaluation.run()
        while True:
            try:
                next(rounds)
            except StopIteration as stop:
                result: TrialResult = stop.value
                return result
            self._progress.loaded(evaluation.values)

    def _end(self, row: TrialRow) -> None:
        self._folder.write_rows([row])
        phase: Phase = "interrupted" if row.state is State.INTERRUPTED else "finished"
        write_status(self._folder, replace(self._status, phase=phase, updated_at=time.time()))


@dataclass(frozen=True)
class Start:
    """Where a setting comes from: a study file alone, or a trial of an earlier run."""

    study_file: Path
    params: Params = field(default_factory=dict)
    restart: int | None = None
    """Where the trial measured a finalist again: which of its restarts, whose load seeds it had."""


def earlier_setting(results: str, number: str) -> Start:
    """Trial `number` of the run in `results`; raises `ConfigError` where there is none."""
    if not number.isdecimal():
        raise ConfigError(f"--trial {results} {number}: write the results folder, then the trial's number.")
    folder = open_run(place(results), trials="")
    row = folder.read_row(int(number))
    return Start(folder.study_file, row.params, row.restart)


def _with_only(study: Study, params: Params) -> Study:
    try:
        return only_setting(study, params)
    except ConfigError as error:
        raise ConfigError(f"--param: {error}") from error


def _check_secrets(study: Study) -> None:
    """A study that comes from a results folder has none: they were not kept."""
    for name, value in study.fixed.items():
        if MASK in str(value):
            key = f"engine.env.{name.removeprefix('env:')}" if name.startswith("env:") else f"engine.args.{name}"
            raise ConfigError(f"{key}: is a secret, which the results do not hold. Name the study file, too.")


def _gpus(study: Study, engine: Engine, params: Params) -> list[str]:
    """Those that a trial of this setting would hold, the first ones there are."""
    if engine.base_url is not None:
        return []
    here = gpus_here()
    needed = math.ceil(this_machine().trial_resources(study, engine, params)["gpus"])
    if needed > len(here):
        raise ConfigError(f"resources.gpus: this setting needs {needed} GPUs, but this machine has {len(here)}.")
    return here[:needed]


def _tell(study: Study, row: TrialRow, launch: str | None, folder: Path | None, as_json: bool) -> None:
    launch = mask_line(launch) if launch else None
    if as_json:
        print(json.dumps(mask_values(as_values(study, row, launch, folder))))
    else:
        print(render(study, row, launch, folder))


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
