"""Ray Tune's OptunaSearch, taught what failures mean.

Differs from its base in three ways: it asks again where a suggestion breaks a constraint or was measured before; what
Optuna is told of an ended trial comes from the reporter, so that failures teach; and trials lost by the environment's
fault are run again as new trials. Every hook is called by Ray with a trial id only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, TrialRow
from raytune_autotuner.tune.reporter import SCORE, TrialReporter
from raytune_autotuner.tune.samplers import unmeasured
from raytune_autotuner.tune.tell import Teller, encode_point, suggest

logger = logging.getLogger(__name__)

MAX_REFUSALS = 100
"""Suggestions refused in a row after which the space counts as exhausted."""


class StudySearch(OptunaSearch):
    """Suggests settings to Ray Tune and tells Optuna how they ended."""

    def __init__(
        self,
        study: Study,
        reporter: TrialReporter,
        *,
        sampler: BaseSampler,
        storage: BaseStorage,
        teller: Teller,
        defaults: Params,
        slots: int,
        trial_resources: Callable[[Params], Mapping[str, float]],
        may_start: Callable[[], bool],
    ) -> None:
        self._study = study
        self._reporter = reporter
        self._teller = teller
        self._defaults = dict(defaults)
        self._slots = slots
        self._trial_resources = trial_resources
        self._may_start = may_start
        self._refused_in_a_row = 0
        super().__init__(
            space=lambda trial: None,
            metric=SCORE,
            mode="max" if study.objective.direction == "maximize" else "min",
            sampler=sampler,
            storage=storage,
            study_name=study.study,
        )
        self._enqueue_first_points()

    @property
    def ot_study(self) -> optuna.Study:
        """The Optuna study behind the search."""
        return cast(optuna.Study, self._ot_study)

    def suggest(self, trial_id: str) -> Any:
        """The next setting as a trial's config; None for not now, `Searcher.FINISHED` for never again."""
        if self._over():
            return Searcher.FINISHED if not self._reporter.live else None
        if len(self._reporter.live) >= self._slots or not self._reporter.wanted:
            return None
        ot_trial, params = self._ask()
        if ot_trial is None:
            self._reporter.end_search(
                f"{MAX_REFUSALS} suggestions in a row were refused or known: all settings are tried"
            )
            return Searcher.FINISHED if not self._reporter.live else None
        self._ot_trials[trial_id] = ot_trial
        attributes = ot_trial.user_attrs
        filled = {**self._defaults, **params}
        name, retry_of = attributes.get("name", ""), attributes.get("retry_of")
        number = self._reporter.suggested(trial_id, params, filled, name, retry_of)
        ot_trial.set_user_attr("trial", number)
        return {"number": number, "params": params, **self._trial_resources(params)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Intermediate results stay out of Optuna: a trial is told once, at its end."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how the trial ended; also called for trials whose actor died."""
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        row = self._reporter.ended(trial_id, None if error else result)
        self._teller.tell(self.ot_study, self._ot_trials.pop(trial_id), row)
        if self._reporter.to_retry(row):
            self._enqueue(row.params, name=row.name, retry_of=row.number)

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its parts; what is worth keeping stands in Optuna's storage and the results folder.
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save beside Optuna's own storage and the results folder."""
        with open(checkpoint_path, "w", encoding="utf-8") as file:
            json.dump({"study": self._study.study}, file)

    def restore(self, checkpoint_path: str) -> None:
        """The reverse of `save`."""

    def _over(self) -> bool:
        if not self._may_start():
            return True
        return self._reporter.complete and not self._reporter.live

    def _enqueue_first_points(self) -> None:
        self._enqueue({}, name=BASELINE)
        for point in self._study.search.points:
            self._enqueue(point)

    def _enqueue(self, params: Params, name: str = "", retry_of: int | None = None) -> None:
        """Queue exactly `params`; Optuna is given the defaults in force beside them, as far as the space has them."""
        filled = {**self._defaults, **params}
        expressible = {
            parameter.name: filled[parameter.name]
            for parameter in self._study.space.parameters
            if parameter.name in filled and parameter.distribution.contains(filled[parameter.name])
        }
        attributes: dict[str, Any] = {"name": name, "params": dict(params), "placed": list(expressible)}
        if retry_of is not None:
            attributes["retry_of"] = retry_of
        self.ot_study.enqueue_trial(encode_point(self._study.space, expressible), user_attrs=attributes)

    def _ask(self) -> tuple[optuna.Trial | None, dict[str, Any]]:
        """An Optuna trial with a setting to measure, or (None, {}) after too many refusals in a row."""
        for _ in range(MAX_REFUSALS):
            ot_trial = self.ot_study.ask()
            if "params" in ot_trial.user_attrs:
                return ot_trial, self._queued(ot_trial)
            params = suggest(ot_trial, self._study.space, self._study.fixed)
            known = self._known(params)
            broken = self._study.space.violated(params, self._study.fixed)
            if broken is not None:
                self._teller.tell_refused(self.ot_study, ot_trial, f"breaks `{broken.text}`")
            elif known is None:
                return ot_trial, params
            elif known.state.teaches:
                self._teller.tell_known(self.ot_study, ot_trial, known)
            else:  # it runs just now
                self.ot_study.tell(ot_trial, state=TrialState.FAIL)
        return self._left_over()

    def _left_over(self) -> tuple[optuna.Trial | None, dict[str, Any]]:
        """A setting that the sampler keeps missing, or (None, {}) where all are tried."""
        space, fixed = self._study.space, self._study.fixed
        params = unmeasured(space, fixed, lambda point: self._known(point) is not None, self._study.search.seed)
        if params is None:
            return None, {}
        self._enqueue(params)
        ot_trial = self.ot_study.ask()
        return ot_trial, self._queued(ot_trial)

    def _known(self, params: Params) -> TrialRow | None:
        return self._reporter.known({**self._defaults, **params})

    def _queued(self, ot_trial: optuna.Trial) -> dict[str, Any]:
        """The exact setting that was queued; Optuna's trial gets the values that were queued with it."""
        given = ot_trial.user_attrs["placed"]
        space = self._study.space
        placed = replace(space, parameters=tuple(p for p in space.parameters if p.name in given))
        suggest(ot_trial, placed, self._study.fixed)
        return dict(ot_trial.user_attrs["params"])
