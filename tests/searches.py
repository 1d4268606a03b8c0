"""The searcher with its reporter and a results folder, without a cluster: trials end as a test says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage, InMemoryStorage

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.failure import Failure
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialResult
from raytune_autotuner.tune.cache import read_cache
from raytune_autotuner.tune.reporter import RESULT, SCORE, TrialReporter
from raytune_autotuner.tune.samplers import make_sampler
from raytune_autotuner.tune.searcher import StudySearch
from raytune_autotuner.tune.standing import Standing
from raytune_autotuner.tune.tell import Teller
from raytune_autotuner.tune.versions import versions
from raytune_autotuner.tune.warm_start import Learned
from tests.report_samples import METRIC

QUALITY = {"perplexity": 9.0}


class Search:
    """One search; it begins with what earlier runs under `parent` know, if its study asks for that."""

    def __init__(self, study: Study, parent: Path, slots: int = 1) -> None:
        self.study, self.engine = study, make_engine(study)
        self.folder = ResultsFolder.create(parent, study)
        self.folder.write_versions({**versions(self.engine), "cluster": "one"})
        self.defaults = self.engine.defaults()
        self.cache = read_cache(study, self.folder.read_versions(), parent, self.defaults)
        self.standing = Standing()
        """Where every trial is, as last heard."""
        self.reporter = TrialReporter(study, self.folder, self.engine.rules, standing_of=lambda _: self.standing)
        self._slots = slots

    def begin(self, storage: BaseStorage | None = None, learned: Sequence[Learned] = ()) -> None:
        """Make the searcher; what is taken from an earlier run must stand in the reporter before."""
        self.searcher = StudySearch(
            self.study,
            self.reporter,
            sampler=make_sampler(self.study, self._slots)[0],
            storage=storage or InMemoryStorage(),
            teller=Teller(self.study),
            defaults=self.defaults,
            slots=lambda: self._slots,
            placement=lambda params: {"cpus": 1.0},
            may_start=lambda: not self.reporter.complete,
            may_verify=lambda: True,
            learned=learned,
            cache=self.cache,
        )

    def end(self, trial_id: str, score: float) -> None:
        """The trial is measured."""
        result = TrialResult({METRIC: score, **QUALITY}, None, {"total": 1.0}, ("an answer",))
        self.searcher.on_trial_complete(trial_id, {RESULT: json.dumps(result.to_dict()), SCORE: score})

    def fail(self, trial_id: str, failure: Failure, *answers: str) -> None:
        """The trial has failed, perhaps after it was asked for answers."""
        result = TrialResult(QUALITY if answers else {}, failure, {"total": 1.0}, answers)
        self.searcher.on_trial_complete(trial_id, {RESULT: json.dumps(result.to_dict()), SCORE: 0.0})

    def suggest(self, trial_id: str) -> Any:
        """As Ray Tune asks for a trial."""
        return self.searcher.suggest(trial_id)
