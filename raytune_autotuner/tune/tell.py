"""What Optuna is told, and in which words: the search space as distributions, settings as points, ended trials.

Rows of the results table go in; what comes out stands in Optuna's storage. Every trial that teaches ends COMPLETE with
a value for each objective and, under the grades `progress` and `ignore`, with one constraint named `violation`;
whatever Optuna should not learn from ends FAIL, which its samplers skip. The numbers are made in `score/`; Ray is not
known here.

How the grades are told:

- `progress`: a failure as the worst value measured so far of each objective, with its violation in (1, 2].
- `elapsed`, `infinite`: a failure as its penalty and nothing else. A trial without a constraint counts as feasible
  to Optuna, so a missed SLO with one would rank below a crash; hence no trial of such a study has a constraint, and a
  missed SLO worsens the value told.
- `ignore`: a failure as FAIL; measured trials as under `progress`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import TrialState

from raytune_autotuner.score.grades import elapsed_conflict
from raytune_autotuner.score.metrics import METRICS
from raytune_autotuner.score.objective import assess_failure, softened
from raytune_autotuner.score.pareto import scores_of
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.space import Choice, Parameter, Params, Range, SearchSpace
from raytune_autotuner.study.study import Direction, Study
from raytune_autotuner.study.trial import State, TrialRow

logger = logging.getLogger(__name__)

CONSTRAINT = "violation"
"""Name of the one constraint that trials carry."""
REFUSED = "refused"
"""User attribute `state` of a suggestion that was never started."""
KNOWN = "known"
"""User attribute `state` of a suggestion that an earlier trial has answered."""
_EVIDENCE_CHARS = 500
_SECONDS_UNIT = re.compile(r"(?<!tok)(?<!req)_s(_|$)")


class Teller:
    """Ends Optuna's trials by what became of them. Holds no state: all it needs stands in Optuna's storage.

    The directions of the Optuna study are those of `objective.targets`, in that order.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._grade = study.penalty.grade
        self._ceilings = [deadline_ceiling(metric, study.trial.timeout_s) for metric, _ in study.objective.targets]

    def tell(self, ot_study: optuna.Study, ot_trial: optuna.Trial, row: TrialRow) -> None:
        """End `ot_trial` as the finished `row` did: measured, failed, lost or interrupted. To be called once a trial.

        A setting that the search space cannot express, such as a baseline outside its ranges, is kept as FAIL:
        Optuna has no place for it, and a place it never had would mislead.
        """
        self._tell_row(ot_study, ot_trial, row, str(row.state))

    def tell_refused(self, ot_study: optuna.Study, ot_trial: optuna.Trial, reason: str | Failure) -> None:
        """End a suggestion that was refused before any start: graded as a failure, costs no trial.

        A reason in plain words is a constraint of the study that it breaks: refused at stage `arguments`.
        """
        failure = _broken_constraint(reason) if isinstance(reason, str) else reason
        worth = assess_failure(self._study, failure)
        self._tell_failed(ot_study, ot_trial, failure, worth.violation, worth.penalty, REFUSED)

    def tell_known(self, ot_study: optuna.Study, ot_trial: optuna.Trial, row: TrialRow) -> None:
        """End a suggestion that trial `row` has answered already, by that answer once more; costs no trial.

        Left out instead, it would teach nothing, and TPE suggests the same setting until the search gives up.
        """
        ot_trial.set_user_attr("same_as", row.number)
        self._tell_row(ot_study, ot_trial, row, KNOWN)

    def tell_lost(self, ot_study: optuna.Study, number: int, reason: str) -> None:
        """End the RUNNING trial `number` that an earlier process left behind; `reason` is only logged."""
        logger.info("trial %d was lost: %s", number, reason)
        ot_study.tell(number, state=TrialState.FAIL)

    @property
    def _values_only(self) -> bool:
        return self._grade in ("elapsed", "infinite")

    def _tell_row(self, ot_study: optuna.Study, ot_trial: optuna.Trial, row: TrialRow, state: str) -> None:
        ot_trial.set_user_attr("params", dict(row.params))
        if row.state is State.MEASURED:
            self._tell_measured(ot_study, ot_trial, row, state)
        elif row.state is State.STOPPED and row.bound is not None:
            _note(ot_trial, state, None, None)
            self._complete(ot_study, ot_trial, [row.bound], row.violation)
        elif row.state is State.FAILED and not row.at_fault:
            failure = row.result.failure or _unexplained()
            self._tell_failed(ot_study, ot_trial, failure, row.violation, row.penalty, state)
        else:
            _note(ot_trial, state, row.result.failure, None)
            ot_study.tell(ot_trial, state=TrialState.FAIL)

    def _tell_measured(self, ot_study: optuna.Study, ot_trial: optuna.Trial, row: TrialRow, state: str) -> None:
        assert row.violation is not None
        pairs = zip(scores_of(row), ot_study.directions, strict=True)
        values = [self._told(score, row.violation, way) for score, way in pairs]
        _note(ot_trial, state, None, None)
        ot_trial.set_user_attr("values", values)
        self._complete(ot_study, ot_trial, values, row.violation)

    def _told(self, score: float, violation: float, way: StudyDirection) -> float:
        return softened(score, violation, _direction(way)) if self._values_only else score

    def _tell_failed(
        self,
        ot_study: optuna.Study,
        ot_trial: optuna.Trial,
        failure: Failure,
        violation: float | None,
        penalty: float | None,
        state: str,
    ) -> None:
        _note(ot_trial, state, failure, penalty)
        if self._grade == "ignore":
            ot_study.tell(ot_trial, state=TrialState.FAIL)
        elif self._values_only:
            cost = math.inf if penalty is None else penalty
            self._complete(ot_study, ot_trial, _on_bad_side(cost, ot_study), None)
        else:
            self._complete(ot_study, ot_trial, self._worst_values(ot_study), violation)

    def _complete(
        self, ot_study: optuna.Study, ot_trial: optuna.Trial, values: list[float], violation: float | None
    ) -> None:
        if not placed(ot_trial.params, self._study.space, self._study.fixed):
            ot_study.tell(ot_trial, state=TrialState.FAIL)
            return
        if violation is not None and not self._values_only:
            ot_trial.set_constraint(CONSTRAINT, violation)
            ot_trial.set_user_attr(CONSTRAINT, violation)  # dashboards show these
        ot_study.tell(ot_trial, values, state=TrialState.COMPLETE)
        if self._grade == "elapsed":
            self._warn_of_conflict(ot_study)

    def _worst_values(self, ot_study: optuna.Study) -> list[float]:
        """For each objective the worst value measured so far; before any, a value that no success falls below."""
        seen = _measured_values(ot_study)
        return [
            (min if way is StudyDirection.MAXIMIZE else max)(column)
            if (column := [values[index] for values in seen])
            else (0.0 if way is StudyDirection.MAXIMIZE else ceiling)
            for index, (way, ceiling) in enumerate(zip(ot_study.directions, self._ceilings, strict=True))
        ]

    def _warn_of_conflict(self, ot_study: optuna.Study) -> None:
        key = "warned_of_elapsed"
        if ot_study.user_attrs.get(key):
            return
        if conflict := next(filter(None, _conflicts(ot_study)), None):
            logger.warning("%s", conflict)
            ot_study.set_user_attr(key, True)


def deadline_ceiling(metric: str, timeout_s: float) -> float:
    """A finite value of `metric` that no measurement within the time limit exceeds: the limit in the metric's unit.

    A metric that is no time in seconds gets the limit in milliseconds, and a share 1.

    >>> deadline_ceiling("ttft_ms_p99", 600.0), deadline_ceiling("duration_s", 600.0)
    (600000.0, 600.0)
    """
    known = METRICS.get(metric.partition("@")[0])
    if known is not None and known.unit == "share":
        return 1.0
    return timeout_s if _SECONDS_UNIT.search(metric) else timeout_s * 1000.0


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The search space in Optuna's words, by parameter.

    Ordered choices (all numbers) become the index into their sorted values, so that a sampler knows neighbours as
    neighbours; values that Optuna cannot hold or tell apart (JSON, `1` beside `true`) become canonical JSON text.
    """
    return {parameter.name: _distribution(parameter) for parameter in space.parameters}


def suggest(ot_trial: optuna.Trial, space: SearchSpace, fixed: Params | None = None) -> dict[str, Any]:
    """Ask `ot_trial` for a setting of the space, condition by condition; `fixed` are the study's fixed arguments."""
    params: dict[str, Any] = {}
    for parameter in in_order(space):
        if exists(parameter, space, {**(fixed or {}), **params}):
            encoded = _suggest_one(ot_trial, parameter)
            params[parameter.name] = _decode(parameter, encoded)
    return {name: params[name] for name in space.by_name if name in params}


def encode_point(space: SearchSpace, params: Params) -> dict[str, Any]:
    """A setting in Optuna's words, for `enqueue_trial`; each value must be in its distribution."""
    return {name: _encode(space.by_name[name], value) for name, value in params.items()}


def decode_point(space: SearchSpace, encoded: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `encode_point`: a setting from the parameters of one of Optuna's trials."""
    return {name: _decode(space.by_name[name], value) for name, value in encoded.items()}


def placed(encoded: Mapping[str, Any], space: SearchSpace, fixed: Params | None = None) -> bool:
    """Whether Optuna's trial has a value for every parameter that exists in its setting."""
    values = {**(fixed or {}), **decode_point(space, encoded)}
    return all(p.name in encoded or not exists(p, space, values) for p in space.parameters)


def exists(parameter: Parameter, space: SearchSpace, values: Params) -> bool:
    """Whether `parameter` exists beside `values`: its condition holds, and what the condition rests on exists too."""
    if parameter.when is None:
        return True
    absent = any(name in space.by_name and name not in values for name in parameter.when.names)
    return not absent and parameter.when.holds(values)


def in_order(space: SearchSpace) -> list[Parameter]:
    """The parameters, each after those that its condition names; raises `ConfigError` for a circle."""
    done: dict[str, Parameter] = {}
    waiting = list(space.parameters)
    while waiting:
        ready = [p for p in waiting if not p.when or not (p.when.names & {q.name for q in waiting})]
        if not ready:
            names = ", ".join(p.name for p in waiting)
            raise ConfigError(f"search_space: the conditions (when:) of {names} go in a circle.")
        done.update({p.name: p for p in ready})
        waiting = [p for p in waiting if p.name not in done]
    return list(done.values())


def _distribution(parameter: Parameter) -> BaseDistribution:
    spec = parameter.distribution
    if isinstance(spec, Choice):
        return IntDistribution(0, len(spec.values) - 1) if spec.ordered else CategoricalDistribution(_texts(spec))
    if spec.type == "int":
        return IntDistribution(int(spec.low), int(_top(spec)), log=spec.log, step=int(spec.step or 1))
    return FloatDistribution(float(spec.low), float(_top(spec)), log=spec.log, step=spec.step)


def _suggest_one(ot_trial: optuna.Trial, parameter: Parameter) -> CategoricalChoiceType:
    name, spec = parameter.name, _distribution(parameter)
    if isinstance(spec, IntDistribution):
        return ot_trial.suggest_int(name, spec.low, spec.high, log=spec.log, step=spec.step)
    if isinstance(spec, FloatDistribution):
        return ot_trial.suggest_float(name, spec.low, spec.high, log=spec.log, step=spec.step)
    assert isinstance(spec, CategoricalDistribution)
    return ot_trial.suggest_categorical(name, spec.choices)


def _encode(parameter: Parameter, value: Any) -> Any:
    spec = parameter.distribution
    if isinstance(spec, Range):
        return int(value) if spec.type == "int" else float(value)
    keys = [_json(known) for known in _in_row(spec)]
    if _json(value) not in keys:
        raise ConfigError(f"{parameter.name}: {value!r} is not one of {list(spec.values)}.")
    index = keys.index(_json(value))
    return index if spec.ordered else _texts(spec)[index]


def _decode(parameter: Parameter, encoded: Any) -> Any:
    spec = parameter.distribution
    if isinstance(spec, Choice):
        return _in_row(spec)[encoded if spec.ordered else _texts(spec).index(encoded)]
    if spec.type == "int":
        return int(encoded)
    # The sum of many steps is off by a last digit, which would make two settings of one.
    return round(float(encoded), 12) if spec.step else float(encoded)


def _in_row(choice: Choice) -> list[Any]:
    """The values in the order in which Optuna counts them: ordered ones by size, others as in the file."""
    return sorted(choice.values, key=lambda value: (value, _json(value))) if choice.ordered else list(choice.values)


def _texts(choice: Choice) -> list[Any]:
    """The values as Optuna holds them: as they are where that is exact, else all as JSON text."""
    exact = all(value is None or isinstance(value, (bool, int, float, str)) for value in choice.values)
    distinct = exact and len(set(choice.values)) == len(choice.values)
    return list(choice.values) if distinct else [_json(value) for value in choice.values]


def steps(spec: Range) -> int:
    """How many steps fit above the lowest value of a range with one; forgives the last digit of a sum of steps."""
    return math.floor((spec.high - spec.low) / (spec.step or 1) + 1e-9)


def _top(spec: Range) -> float:
    """The highest value that a whole number of steps reaches: Optuna warns of any other."""
    return round(spec.low + steps(spec) * spec.step, 12) if spec.step else spec.high


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _note(ot_trial: optuna.Trial, state: str, failure: Failure | None, penalty: float | None) -> None:
    """What became of a trial, as its user attributes: `state`, and of a failure its cause and penalty."""
    attributes: dict[str, Any] = {"state": state}
    if failure is not None:
        evidence = failure.evidence[:_EVIDENCE_CHARS]
        attributes |= {"stage": str(failure.stage), "kind": str(failure.kind), "evidence": evidence}
    if penalty is not None:
        attributes["penalty"] = penalty
    for name, value in attributes.items():
        ot_trial.set_user_attr(name, value)


def _measured_values(ot_study: optuna.Study) -> list[Sequence[float]]:
    """The values of all measured trials, also of those without a place in the space."""
    trials: Iterator[Any] = (trial.user_attrs for trial in ot_study.get_trials(deepcopy=False))
    return [attributes["values"] for attributes in trials if attributes.get("state") == State.MEASURED]


def _conflicts(ot_study: optuna.Study) -> Iterator[str | None]:
    """For each objective a warning where the published scale ranks a failure above a measurement, else None."""
    trials = ot_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    penalties = [trial.values for trial in trials if "penalty" in trial.user_attrs]
    measured = _measured_values(ot_study)
    for index, way in enumerate(ot_study.directions):
        costs, scores = ([values[index] for values in told] for told in (penalties, measured))
        yield elapsed_conflict(costs, scores, _direction(way))


def _on_bad_side(cost: float, ot_study: optuna.Study) -> list[float]:
    """The cost of a failure for each objective, on that objective's bad side."""
    return [-abs(cost) if way is StudyDirection.MAXIMIZE else abs(cost) for way in ot_study.directions]


def _direction(way: StudyDirection) -> Direction:
    return "maximize" if way is StudyDirection.MAXIMIZE else "minimize"


def _broken_constraint(reason: str) -> Failure:
    remedy = "Nothing to do: it was never started."
    return Failure(Stage.ARGUMENTS, Kind.INVALID_CONFIG, Blame.PARAMETERS, reason, remedy)


def _unexplained() -> Failure:
    return Failure(Stage.ARGUMENTS, Kind.UNKNOWN, Blame.PARAMETERS, "no cause was kept", "Look into trial.log.")
