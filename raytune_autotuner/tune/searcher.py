"""Ray Tune's OptunaSearch, taught what failures mean.

Differs from its base in three ways: it asks again where a suggestion breaks a constraint or was measured before; what
Optuna is told of an ended trial comes from the reporter, so that failures teach; and trials lost by the environment's
fault are run again as new trials. Every hook is called by Ray with a trial id only.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raytune_autotuner.report.finalists import finalists
from raytune_autotuner.study.failure import Failure
from raytune_autotuner.study.space import Params, setting_key
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, State, TrialRow
from raytune_autotuner.tune.cache import EMPTY, Cache
from raytune_autotuner.tune.lessons import Lessons
from raytune_autotuner.tune.reporter import SCORE, TrialReporter
from raytune_autotuner.tune.samplers import unmeasured
from raytune_autotuner.tune.tell import Teller, encode_point, suggest
from raytune_autotuner.tune.verification import next_restart
from raytune_autotuner.tune.warm_start import Learned, best_of

logger = logging.getLogger(__name__)

_MODES = {"maximize": "max", "minimize": "min"}
NO_ANSWERS = (
    "the baseline has given no answers that others could be held against (quality). Make the engine's defaults work by "
    "engine.args, or leave quality out"
)
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
        slots: Callable[[], int],
        placement: Callable[[Params], Mapping[str, Any]],
        may_start: Callable[[], bool],
        may_verify: Callable[[], bool],
        refuse: Callable[[Params], Failure | None] = lambda params: None,
        on_refused: Callable[[Params, str], None] = lambda params, why: None,
        learned: Sequence[Learned] = (),
        cache: Cache = EMPTY,
    ) -> None:
        self._study = study
        self._cache = cache
        self._reporter = reporter
        self._teller = teller
        self._defaults = dict(defaults)
        self._slots = slots
        self._placement = placement
        self._may_start = may_start
        self._may_verify = may_verify
        self._refuse = refuse
        self._on_refused = on_refused
        self._broken: Exception | None = None
        self._refused: set[str] = set()
        self._lessons = Lessons(study.space, defaults)
        self._finalists: list[TrialRow] = []
        self._last_refusal = ": all settings are tried"
        begins = not reporter.rows
        if begins:  # a driver that was killed before its first trial may have left a part of what follows
            with suppress(KeyError):
                optuna.delete_study(study_name=study.study, storage=storage)
        super().__init__(
            space=lambda trial: None,
            # One name for all: Ray only looks whether results have it. The modes are the Optuna study's directions.
            metric=[SCORE for _ in study.objective.targets],
            mode=[_MODES[direction] for _, direction in study.objective.targets],
            sampler=sampler,
            storage=storage,
            study_name=study.study,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.ot_study.set_metric_names([metric for metric, _ in study.objective.targets])  # for dashboards
        for part in learned:
            for row in part.rows:
                self._lessons.note(row)
        if begins:
            self._learn(learned)
            self._enqueue_first_points(best_of(study, learned))

    @property
    def ot_study(self) -> optuna.Study:
        """The Optuna study behind the search."""
        return cast(optuna.Study, self._ot_study)

    def suggest(self, trial_id: str) -> Any:
        """The next setting as a trial's config; None for not now, `Searcher.FINISHED` for never again."""
        if self._broken is not None:
            raise self._broken
        if len(self._reporter.live) >= self._slots():
            return None
        while self._may_start():
            if not self._reporter.wanted or self._awaits_reference():
                return None
            if self._lacks_reference():
                break
            ot_trial, params = self._ask()
            if ot_trial is None:
                why = f"{MAX_REFUSALS} suggestions in a row were refused or known{self._last_refusal}"
                self._reporter.end_search(why)
            elif not self._answered_before(ot_trial, params):
                return self._begin(trial_id, ot_trial, params)
        return self._verification(trial_id)

    def _begin(self, trial_id: str, ot_trial: optuna.Trial, params: Params) -> dict[str, Any]:
        self._ot_trials[trial_id] = ot_trial
        name, retry_of = ot_trial.user_attrs.get("name", ""), ot_trial.user_attrs.get("retry_of")
        row = self._reporter.suggested(trial_id, params, {**self._defaults, **params}, name=name, retry_of=retry_of)
        ot_trial.set_user_attr("trial", row.number)
        return self._config(row)

    def _answered_before(self, ot_trial: optuna.Trial, params: Params) -> bool:
        """Whether an earlier run has measured the setting: its answer is told, and costs no trial."""
        filled = {**self._defaults, **params}
        answer = self._cache.find(filled)
        if answer is None:
            return False
        name = ot_trial.user_attrs.get("name", "")
        row = self._reporter.take(params, filled, answer.source, name, answer.result)
        for attribute, value in (("trial", row.number), ("taken_from", answer.source)):
            ot_trial.set_user_attr(attribute, value)
        self._teller.tell(self.ot_study, ot_trial, row)
        self._lessons.note(row)
        return True

    def _config(self, row: TrialRow) -> dict[str, Any]:
        """What the trial's actor is given."""
        config = {"number": row.number, "params": dict(row.params), "restart": row.restart}
        return {**config, "reference": self._reporter.reference, **self._placement(row.params)}

    def _awaits_reference(self) -> bool:
        """Whether answers must be held against those of a baseline that has not ended yet."""
        if self._study.quality is None or self._reporter.reference is not None:
            return False
        return any(not row.state.finished for row in self._baselines())

    def _lacks_reference(self) -> bool:
        """Whether answers must be held against a baseline's that has ended without any; the search ends with it."""
        if self._study.quality is None or self._reporter.reference is not None:
            return False
        gone = bool(self._baselines()) and not any(one.user_attrs.get("name") for one in self._waiting())
        if gone:
            self._reporter.end_search(NO_ANSWERS)
        return gone

    def _baselines(self) -> list[TrialRow]:
        """The trials that have started the engine's defaults, restarts included."""
        named = {row.number for row in self._reporter.rows if row.name}
        rows = (row for row in self._reporter.rows if row.state is not State.EARLIER)
        return [row for row in rows if row.number in named or row.verifies in named]

    def _waiting(self) -> list[optuna.trial.FrozenTrial]:
        """What is queued."""
        return self.ot_study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _verification(self, trial_id: str) -> Any:
        """The search is over: the next finalist to measure again, if one is due and may still begin."""
        live = self._reporter.live
        if any(row.verifies is None for row in live):
            return None
        if not self._finalists:  # the search is over: they stay the same
            self._finalists = finalists(self._study, self._reporter.rows, self._defaults)
        due = next_restart(self._study, self._reporter.rows, self._finalists) if self._may_verify() else None
        if due is not None and self._reporter.verifies_only and self._awaits_reference():
            return None
        if due is None or (not due[0].name and self._lacks_reference()):
            return None if live else Searcher.FINISHED
        row, restart = due
        filled = {**self._defaults, **row.params}
        return self._config(
            self._reporter.suggested(trial_id, row.params, filled, verifies=row.number, restart=restart)
        )

    def take_over(self, again: Sequence[TrialRow]) -> None:
        """Go on with a storage that an earlier process left behind; `again` are the trials to run once more."""
        rows = {row.number: row for row in self._reporter.rows}
        for kept in rows.values():
            self._lessons.note(kept)
        for frozen in self.ot_study.get_trials(states=(TrialState.RUNNING,)):
            row = rows.get(frozen.user_attrs.get("trial", -1))
            if row is not None and row.state.finished and row.state is not State.INTERRUPTED:
                self._teller.tell(self.ot_study, optuna.Trial(self.ot_study, frozen._trial_id), row)
                continue
            self._teller.tell_lost(self.ot_study, frozen.number, "the driver ended")
            if row is None and "params" in frozen.user_attrs:
                given = frozen.user_attrs
                self._enqueue(given["params"], name=given["name"], retry_of=given.get("retry_of"))
        for row in again:
            self._enqueue_again(row)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Intermediate results stay out of Optuna: a trial is told once, at its end."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how the trial ended; also called for trials whose actor died."""
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        try:
            self._tell(self._reporter.ended(trial_id, None if error else result))
        except Exception as broken:  # noqa: BLE001  Ray Tune keeps it to itself here, and the study would wait for ever
            self._broken = broken

    def _tell(self, row: TrialRow) -> None:
        if row.verifies is not None:
            return
        self._teller.tell(self.ot_study, self._ot_trials.pop(row.trial_id), row)
        self._lessons.note(row)
        if self._reporter.to_retry(row):
            self._enqueue_again(row)

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its parts; what is worth keeping stands in Optuna's storage and the results folder.
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save beside Optuna's own storage and the results folder."""
        with open(checkpoint_path, "w", encoding="utf-8") as file:
            json.dump({"study": self._study.study}, file)

    def restore(self, checkpoint_path: str) -> None:
        """The reverse of `save`."""

    def _learn(self, learned: Sequence[Learned]) -> None:
        """Tell Optuna what earlier studies have measured; these trials are none of this study's."""
        for part in learned:
            for row in part.rows:
                self._enqueue(row.params, name=row.name)
                ot_trial = self.ot_study.ask()
                self._queued(ot_trial)
                ot_trial.set_user_attr("warm_start", part.source.place)
                self._teller.tell(self.ot_study, ot_trial, row)

    def _enqueue_first_points(self, best: TrialRow | None) -> None:
        self._enqueue({}, name=BASELINE)
        for point in self._study.search.points:
            self._enqueue(point)
        if best is not None:
            self._enqueue(best.params)

    def _enqueue_again(self, row: TrialRow) -> None:
        """Queue a trial that was lost; the baseline before whatever waits, since all else is held against it."""
        before = [one.user_attrs for one in self._waiting()] if row.name else []
        for _ in before:
            self.ot_study.tell(self.ot_study.ask(), state=TrialState.FAIL)
        self._enqueue(row.params, name=row.name, retry_of=row.number)
        for given in before:
            self._enqueue(given["params"], name=given["name"], retry_of=given.get("retry_of"))

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
                params, queued = self._queued(ot_trial), True
            else:
                params, queued = suggest(ot_trial, self._study.space, self._study.fixed), False
            known = None if queued else self._known(params)
            if known is not None:
                self._answer_again(ot_trial, known)
            elif not ot_trial.user_attrs.get("name") and (refused := self._refusal(params)) is not None:
                self._teller.tell_refused(self.ot_study, ot_trial, refused)
            else:
                return ot_trial, params
        return self._left_over()

    def _answer_again(self, ot_trial: optuna.Trial, known: TrialRow) -> None:
        """The setting is known: its trial's answer once more, or nothing while that runs."""
        if known.state.teaches:
            self._teller.tell_known(self.ot_study, ot_trial, known)
        else:
            self.ot_study.tell(ot_trial, state=TrialState.FAIL)

    def _refusal(self, params: Params) -> str | Failure | None:
        """Why a setting is not worth a start: a constraint that it breaks, an earlier failure, the engine's word."""
        broken = self._study.space.violated(params, self._study.fixed)
        foreseen = self._lessons.repeated(params) or self._refuse(params) if broken is None else None
        refused = foreseen if broken is None else f"breaks `{broken.text}`"
        if refused is not None:
            self._refused.add(setting_key(params))
            self._last_refusal = f"; the last refusal: {refused}"
            self._on_refused(params, str(refused))
        return refused

    def _left_over(self) -> tuple[optuna.Trial | None, dict[str, Any]]:
        """A setting that the sampler keeps missing, or (None, {}) where all are tried."""
        space, fixed = self._study.space, self._study.fixed
        for _ in range(MAX_REFUSALS):
            params = unmeasured(space, fixed, self._is_spent, self._study.search.seed)
            if params is None:
                return None, {}
            if self._refusal(params) is None:
                self._enqueue(params)
                ot_trial = self.ot_study.ask()
                return ot_trial, self._queued(ot_trial)
        return None, {}

    def _is_spent(self, params: Params) -> bool:
        return self._known(params) is not None or setting_key(params) in self._refused

    def _known(self, params: Params) -> TrialRow | None:
        return self._reporter.known({**self._defaults, **params})

    def _queued(self, ot_trial: optuna.Trial) -> dict[str, Any]:
        """The exact setting that was queued; Optuna's trial gets the values that were queued with it."""
        given = ot_trial.user_attrs["placed"]
        space = self._study.space
        placed = replace(space, parameters=tuple(p for p in space.parameters if p.name in given))
        suggest(ot_trial, placed, self._study.fixed)
        return dict(ot_trial.user_attrs["params"])
