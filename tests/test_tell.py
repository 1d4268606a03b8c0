"""What stands in Optuna's storage after each kind of ending, and how settings get there and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from raytune_autotuner.score.objective import assess
from raytune_autotuner.score.pareto import pareto_front
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.space import Params, SearchSpace, parse_space
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from raytune_autotuner.tune.tell import (
    CONSTRAINT,
    KNOWN,
    REFUSED,
    Teller,
    deadline_ceiling,
    decode_point,
    distributions,
    encode_point,
    exists,
    in_order,
    placed,
    suggest,
)

OOM = Failure(Stage.KV_CACHE, Kind.OUT_OF_MEMORY, Blame.PARAMETERS, "CUDA out of memory", "use less")
NODE_LOST = Failure(Stage.LOAD, Kind.WORKER_LOST, Blame.ENVIRONMENT, "the node was lost", "")
DIRECTIONS = ["maximize", "minimize"]


def make_study(
    direction: str = "maximize",
    grade: str = "progress",
    metric: str = "ttft_ms_p99",
    also: dict[str, str] | None = None,
) -> Study:
    return parse_study(
        {
            "study": "s",
            "model": "m",
            "search_space": {"max-num-seqs": {"int": [1, 64]}},
            "objective": {direction: metric, "slo": {"itl_ms": {"p99": 100}}, **(also or {})},
            "penalty": {"grade": grade},
            "trial": {"timeout_s": 600},
        }
    )


class Told:
    """An Optuna study that trials are told to, one after the other."""

    def __init__(self, study: Study, storage: BaseStorage | None = None) -> None:
        self.study = study
        self.teller = Teller(study)
        self.rows: list[TrialRow] = []
        directions = [direction for _, direction in study.objective.targets]
        self.ot_study = optuna.create_study(directions=directions, storage=storage, study_name="s")

    def measured(self, *scores: float, itl_ms: float = 50.0, params: Params | None = None) -> FrozenTrial:
        names = [name for name, _ in self.study.objective.targets]
        metrics = dict(zip(names, scores, strict=True)) | {"itl_ms_p99": itl_ms}
        return self.ended(TrialResult(metrics, None, {"total": 60.0}), State.MEASURED, params)

    def failed(self, failure: Failure = OOM, elapsed_s: float = 60.0) -> FrozenTrial:
        return self.ended(TrialResult({}, failure, {"total": elapsed_s}), State.FAILED)

    def ended(self, result: TrialResult, state: State, params: Params | None = None) -> FrozenTrial:
        trial = self.ot_study.ask()
        params = suggest(trial, self.study.space) if params is None else params
        worth = assess(self.study, result)
        row = TrialRow(trial.number, "id", "", params, state, result, worth.score, worth.violation, worth.penalty)
        row = replace(row, scores=worth.scores)
        self.teller.tell(self.ot_study, trial, row)
        self.rows.append(row)
        return self.ot_study.trials[trial.number]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(params=["memory", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> BaseStorage:
    if request.param == "memory":
        return InMemoryStorage()
    return JournalStorage(JournalFileBackend(str(tmp_path / "optuna.log")))


def test_a_measured_trial_is_complete_with_its_score_and_its_margin(storage: BaseStorage) -> None:
    trial = Told(make_study(), storage).measured(42.0)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 42.0)
    assert trial.constraints == {CONSTRAINT: -0.5}
    assert trial.user_attrs["state"] == "measured"
    assert "penalty" not in trial.user_attrs


def test_a_missed_slo_keeps_the_score_and_has_a_violation_below_1(storage: BaseStorage) -> None:
    trial = Told(make_study(), storage).measured(42.0, itl_ms=200.0)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 42.0)
    assert trial.constraints == {CONSTRAINT: 0.5}


def test_a_failed_trial_is_complete_with_the_worst_value_and_says_why(storage: BaseStorage) -> None:
    told = Told(make_study(), storage)
    told.measured(42.0)
    told.measured(17.0, itl_ms=500.0)
    trial = told.failed()
    assert (trial.state, trial.value, trial.constraints) == (TrialState.COMPLETE, 17.0, {CONSTRAINT: 1.45})
    assert trial.user_attrs | {"params": {}} == {
        "params": {},
        "state": "failed",
        "stage": "kv-cache",
        "kind": "out-of-memory",
        "evidence": "CUDA out of memory",
        "penalty": 1.45,
        "violation": 1.45,
    }


def test_the_real_values_of_a_setting_are_kept_beside_the_encoded_ones(storage: BaseStorage) -> None:
    told = Told(make_study(), storage)
    trial = told.measured(1.0)
    assert trial.user_attrs["params"] == decode_point(told.study.space, trial.params)


@pytest.mark.parametrize(("direction", "worst"), [("maximize", 3.0), ("minimize", 70.0)])
def test_the_value_of_a_failure_is_the_worst_measured_in_its_direction(direction: str, worst: float) -> None:
    told = Told(make_study(direction))
    for score in (20.0, 3.0, 70.0):
        told.measured(score)
    assert told.failed().value == worst


@pytest.mark.parametrize(("direction", "neutral"), [("maximize", 0.0), ("minimize", 600_000.0)])
def test_before_any_success_a_failure_has_a_neutral_value_that_no_success_falls_below(
    direction: str, neutral: float
) -> None:
    told = Told(make_study(direction))
    assert [told.failed().value, told.failed().value] == [neutral, neutral]
    told.measured(123.0)
    assert told.failed().value == 123.0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("score", [5000.0, 1e-6, 0.5])
def test_the_best_trial_is_never_a_failure_nor_a_missed_slo(direction: str, score: float) -> None:
    told = Told(make_study(direction))
    told.failed()
    told.measured(score * 1000, itl_ms=1000.0)
    told.measured(score / 1000, itl_ms=1000.0)
    success = told.measured(score)
    told.failed(replace(OOM, stage=Stage.LOAD, share=1.0))
    assert told.ot_study.best_trial.number == success.number


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_a_feasible_trial_there_is_no_best_one(direction: str) -> None:
    told = Told(make_study(direction))
    told.failed()
    told.measured(5.0, itl_ms=1000.0)
    with pytest.raises(ValueError, match="No feasible trials"):
        told.ot_study.best_trial  # noqa: B018


@pytest.mark.parametrize("state", [State.LOST, State.INTERRUPTED])
@pytest.mark.parametrize("failure", [NODE_LOST, None])
def test_what_the_parameters_did_not_cause_is_fail_and_teaches_nothing(
    storage: BaseStorage, state: State, failure: Failure | None
) -> None:
    told = Told(make_study(), storage)
    trial = told.ot_study.ask()
    params = suggest(trial, told.study.space)
    told.teller.tell(told.ot_study, trial, TrialRow(0, "id", "", params, state, TrialResult({}, failure)))
    (ended,) = told.ot_study.trials
    assert (ended.state, ended.values, ended.constraints) == (TrialState.FAIL, None, {})
    assert ended.user_attrs["state"] == str(state)


def test_a_trial_that_an_earlier_process_left_running_can_be_ended(tmp_path: Path) -> None:
    path = str(tmp_path / "optuna.log")
    left = Told(make_study(), JournalStorage(JournalFileBackend(path)))
    left.ot_study.ask()
    again = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(path)))
    Teller(left.study).tell_lost(again, 0, "the driver was ended")
    assert [trial.state for trial in again.trials] == [TrialState.FAIL]


def test_a_resumed_study_knows_the_worst_value(tmp_path: Path) -> None:
    path = str(tmp_path / "optuna.log")
    first = Told(make_study(), JournalStorage(JournalFileBackend(path)))
    first.measured(42.0)
    again = Told.__new__(Told)
    again.study, again.teller, again.rows = first.study, Teller(first.study), []
    again.ot_study = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(path)))
    assert again.failed().value == 42.0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_refused_suggestion_is_infeasible_with_its_grade(direction: str) -> None:
    told = Told(make_study(direction))
    for reason in ("breaks `a >= b`", replace(OOM, stage=Stage.CONFIGURATION, kind=Kind.INVALID_CONFIG)):
        trial = told.ot_study.ask()
        suggest(trial, told.study.space)
        told.teller.tell_refused(told.ot_study, trial, reason)
    by_constraint, by_engine = told.ot_study.trials
    assert by_constraint.user_attrs["state"] == by_engine.user_attrs["state"] == REFUSED
    assert by_constraint.user_attrs["evidence"] == "breaks `a >= b`"
    assert by_constraint.constraints[CONSTRAINT] == pytest.approx(1.98)
    assert by_engine.constraints[CONSTRAINT] == pytest.approx(1.90)
    assert by_constraint.state is by_engine.state is TrialState.COMPLETE


def test_a_known_setting_is_answered_as_before_and_marked() -> None:
    told = Told(make_study())
    told.measured(42.0)
    told.failed()
    for number, row in enumerate(told.rows[:2]):
        trial = told.ot_study.ask()
        suggest(trial, told.study.space)
        told.teller.tell_known(told.ot_study, trial, row)
        first, again = told.ot_study.trials[number], told.ot_study.trials[-1]
        assert (again.state, again.values, again.constraints) == (first.state, first.values, first.constraints)
        assert (again.user_attrs["state"], again.user_attrs["same_as"]) == (KNOWN, number)


def test_a_baseline_outside_the_space_is_kept_out_of_the_model_but_counts_as_a_value() -> None:
    told = Told(make_study())
    outside = told.measured(5.0, params={})
    assert (outside.state, outside.user_attrs["state"]) == (TrialState.FAIL, "measured")
    assert told.failed().value == 5.0


@pytest.mark.parametrize(("direction", "sign"), [("maximize", -1), ("minimize", 1)])
def test_elapsed_and_infinite_tell_a_value_and_no_constraint(direction: str, sign: int) -> None:
    told = Told(make_study(direction, "elapsed"))
    failed = told.failed(elapsed_s=300)
    assert (failed.value, failed.constraints, failed.user_attrs["penalty"]) == (sign * 750.0, {}, sign * 750.0)
    told = Told(make_study(direction, "infinite"))
    failed = told.failed()
    assert (failed.state, failed.value, failed.constraints) == (TrialState.COMPLETE, sign * math.inf, {})
    assert "penalty" not in failed.user_attrs


def test_infinite_values_survive_the_journal(storage: BaseStorage) -> None:
    told = Told(make_study("minimize", "infinite"), storage)
    told.failed()
    told.measured(9.0)
    assert [trial.value for trial in told.ot_study.trials] == [math.inf, 9.0]
    assert told.ot_study.best_trial.number == 1


@pytest.mark.parametrize(("direction", "softened"), [("maximize", 20.0), ("minimize", 80.0)])
def test_without_constraints_a_missed_slo_worsens_the_value_told(direction: str, softened: float) -> None:
    for grade in ("elapsed", "infinite"):
        told = Told(make_study(direction, grade))
        met, missed = told.measured(40.0), told.measured(40.0, itl_ms=200.0)
        assert (met.value, missed.value) == (40.0, softened)
        assert met.constraints == missed.constraints == {}


def test_ignore_leaves_failures_out_and_keeps_the_slo() -> None:
    told = Told(make_study("maximize", "ignore"))
    failed, missed = told.failed(), told.measured(40.0, itl_ms=200.0)
    assert (failed.state, failed.user_attrs["stage"]) == (TrialState.FAIL, "kv-cache")
    assert missed.constraints == {CONSTRAINT: 0.5}


def test_the_elapsed_grade_warns_once_where_a_failure_beats_a_measurement(caplog: pytest.LogCaptureFixture) -> None:
    told = Told(make_study("minimize", "elapsed"))
    with caplog.at_level(logging.WARNING):
        told.failed()
        assert not warnings_of(caplog)
        for _ in range(3):
            told.measured(5000.0)
    (warning,) = warnings_of(caplog)
    assert "5000" in warning


def test_the_progress_grade_never_warns(caplog: pytest.LogCaptureFixture) -> None:
    told = Told(make_study("minimize"))
    told.failed()
    told.measured(5000.0)
    assert not warnings_of(caplog)


def test_a_failure_that_only_assess_found_is_told_with_its_cause() -> None:
    told = Told(make_study())
    trial = told.ot_study.ask()
    params = suggest(trial, told.study.space)
    worth = assess(told.study, TrialResult({"itl_ms_p99": 5.0}))
    assert worth.failure is not None
    result = TrialResult({}, worth.failure)
    row = TrialRow(0, "id", "", params, State.FAILED, result, None, worth.violation, worth.penalty)
    told.teller.tell(told.ot_study, trial, row)
    assert told.ot_study.trials[0].user_attrs["kind"] == "bad-responses"


def two_objectives(grade: str = "progress") -> Told:
    """Throughput to make large, and the time to the first token small."""
    return Told(make_study("maximize", grade, "output_throughput_tok_s", {"minimize": "ttft_ms_mean"}))


def test_several_objectives_are_all_told_in_their_order(storage: BaseStorage) -> None:
    study = make_study("minimize", metric="ttft_ms_mean", also={"maximize": "output_throughput_tok_s"})
    trial = Told(study, storage).measured(120.0, 80.0)
    assert (trial.values, trial.constraints) == ([120.0, 80.0], {CONSTRAINT: -0.5})


def test_a_failure_has_the_worst_value_of_each_objective() -> None:
    told = two_objectives()
    assert told.failed().values == [0.0, 600_000.0]
    told.measured(120.0, 80.0)
    told.measured(100.0, 20.0, itl_ms=900.0)
    assert told.failed().values == [100.0, 80.0]


@pytest.mark.parametrize(("grade", "cost"), [("elapsed", 750.0), ("infinite", math.inf)])
def test_a_penalty_is_on_the_bad_side_of_each_objective(grade: str, cost: float) -> None:
    told = two_objectives(grade)
    assert told.failed(elapsed_s=300).values == [-cost, cost]
    assert told.measured(120.0, 80.0, itl_ms=200.0).values == [60.0, 160.0]


def test_the_elapsed_grade_warns_of_any_objective_that_a_failure_beats(caplog: pytest.LogCaptureFixture) -> None:
    told = two_objectives("elapsed")
    with caplog.at_level(logging.WARNING):
        told.failed()
        told.measured(5.0, 5000.0)
    (warning,) = warnings_of(caplog)
    assert "to minimize" in warning


def test_neither_a_failure_nor_a_missed_slo_is_on_optunas_front() -> None:
    told = two_objectives()
    told.failed()
    told.measured(9000.0, 1.0, itl_ms=101.0)
    good = [told.measured(100.0, 50.0), told.measured(200.0, 90.0)]
    told.measured(90.0, 60.0)
    told.failed()
    assert [trial.number for trial in told.ot_study.best_trials] == [trial.number for trial in good]
    assert [row.number for row in pareto_front(told.rows, ("maximize", "minimize"))] == [t.number for t in good]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([50, 200])), min_size=1, max_size=8))
def test_our_front_is_optunas(trials: list[tuple[int, int, int]]) -> None:
    told = two_objectives()
    for throughput, ttft, itl_ms in trials:
        told.measured(float(throughput), float(ttft), itl_ms=float(itl_ms))
    ours = pareto_front(told.rows, ("maximize", "minimize"))
    assert {row.number for row in ours} == {trial.number for trial in told.ot_study.best_trials}


def test_a_row_from_before_there_were_several_objectives_is_told_by_its_score() -> None:
    told = Told(make_study())
    trial = told.ot_study.ask()
    params = suggest(trial, told.study.space)
    row = TrialRow(0, "id", "", params, State.MEASURED, TrialResult(), 42.0, -0.5)
    told.teller.tell(told.ot_study, trial, row)
    assert told.ot_study.trials[0].value == 42.0


def test_long_evidence_is_cut() -> None:
    told = Told(make_study())
    assert len(told.failed(replace(OOM, evidence="x" * 10_000)).user_attrs["evidence"]) == 500


@pytest.mark.parametrize(
    ("metric", "ceiling"),
    [
        ("ttft_ms_p99", 600_000.0),
        ("duration_s", 600.0),
        ("total_s_mean", 600.0),
        ("output_throughput_tok_s", 600_000.0),
        ("failed_share@c16", 1.0),
    ],
)
def test_the_ceiling_is_the_deadline_in_the_metrics_unit(metric: str, ceiling: float) -> None:
    assert deadline_ceiling(metric, 600.0) == ceiling


SPACE = {
    "max-num-seqs": {"int": [1, 64], "log": True},
    "stepped": {"int": [1, 8], "step": 3},
    "gpu-memory-utilization": {"float": [0.5, 0.96], "step": 0.1},
    "swap-space": {"float": [0.5, 4.0], "log": True},
    "max-num-batched-tokens": {"choice": [4096, 256, 1024]},
    "dtype": {"choice": ["auto", "bfloat16"]},
    "mixed": {"choice": [None, 1, "1", True, 1.0]},
    "speculative-config": {"choice": [None, {"method": "ngram", "num_speculative_tokens": 3}, [1, 2]]},
    "enforce-eager": "bool",
    "env:OMP_THREADS": {"choice": ["auto", "0-1"]},
    "one": {"choice": [7]},
}


def test_distributions_keep_range_step_log_and_order() -> None:
    made = distributions(parse_space(SPACE))
    assert made["max-num-seqs"] == IntDistribution(1, 64, log=True)
    assert made["stepped"] == IntDistribution(1, 7, step=3)
    assert made["gpu-memory-utilization"] == FloatDistribution(0.5, 0.9, step=0.1)
    assert made["swap-space"] == FloatDistribution(0.5, 4.0, log=True)
    assert made["max-num-batched-tokens"] == IntDistribution(0, 2)
    assert made["dtype"] == CategoricalDistribution(("auto", "bfloat16"))
    assert made["mixed"] == CategoricalDistribution(("null", "1", '"1"', "true", "1.0"))
    assert made["enforce-eager"] == CategoricalDistribution((False, True))


def test_ordered_choices_keep_their_order_whatever_the_files_order() -> None:
    space = parse_space(SPACE)
    encoded = [encode_point(space, {"max-num-batched-tokens": v})["max-num-batched-tokens"] for v in (256, 1024, 4096)]
    assert encoded == [0, 1, 2]


def same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and left == right


def all_values(space: SearchSpace) -> dict[str, tuple[Any, ...]]:
    return {p.name: getattr(p.distribution, "values", ()) for p in space.parameters}


def test_values_keep_their_exact_types_to_optuna_and_back() -> None:
    space = parse_space(SPACE)
    for name, values in all_values(space).items():
        for value in values:
            assert same(decode_point(space, encode_point(space, {name: value}))[name], value), (name, value)


def test_suggestions_are_in_the_space_with_the_types_of_the_file() -> None:
    space = parse_space(SPACE)
    ot_study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(60):
        params = suggest(ot_study.ask(), space)
        assert list(params) == list(space.by_name)
        for name, value in params.items():
            distribution = space.by_name[name].distribution
            assert distribution.contains(value), (name, value)
            assert not getattr(distribution, "values", ()) or any(same(value, v) for v in all_values(space)[name])
        assert type(params["max-num-seqs"]) is type(params["stepped"]) is int
        assert params["gpu-memory-utilization"] in (0.5, 0.6, 0.7, 0.8, 0.9)


def test_all_of_a_suggestion_survives_the_journal(tmp_path: Path) -> None:
    space = parse_space(SPACE)
    journal = JournalStorage(JournalFileBackend(str(tmp_path / "optuna.log")))
    ot_study = optuna.create_study(storage=journal, study_name="s")
    suggested = [suggest(ot_study.ask(), space) for _ in range(10)]
    again = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(tmp_path / "optuna.log"))))
    assert [decode_point(space, trial.params) for trial in again.trials] == suggested


def test_a_queued_point_comes_back_as_it_was() -> None:
    space = parse_space(SPACE)
    ot_study = optuna.create_study()
    point = suggest(ot_study.ask(), space)
    ot_study.enqueue_trial(encode_point(space, point))
    assert suggest(ot_study.ask(), space) == point


def test_a_value_outside_a_choice_is_named() -> None:
    with pytest.raises(ConfigError, match="dtype: 'float8' is not one of"):
        encode_point(parse_space(SPACE), {"dtype": "float8"})


CONDITIONAL = {
    "num-tokens": {"int": [1, 8], "when": "method == 'ngram' and speculate"},
    "method": {"choice": ["ngram", "eagle"], "when": "speculate"},
    "speculate": "bool",
    "depth": {"int": [1, 4], "when": "fixed-mode != 'off'"},
}


@pytest.mark.parametrize(("mode", "has_depth"), [("on", True), ("off", False)])
def test_parameters_exist_only_under_their_condition_in_any_order_of_the_file(mode: str, has_depth: bool) -> None:
    space = parse_space(CONDITIONAL)
    ot_study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(40):
        params = suggest(ot_study.ask(), space, {"fixed-mode": mode})
        assert ("method" in params) is params["speculate"]
        assert ("num-tokens" in params) is (params.get("method") == "ngram")
        assert ("depth" in params) is has_depth
        seen.add(frozenset(params))
    assert len(seen) == 3


def test_what_rests_on_an_absent_parameter_is_absent_too() -> None:
    space = parse_space({"a": "bool", "b": {"int": [1, 2], "when": "a"}, "c": {"int": [1, 2], "when": "b != 1"}})
    assert not exists(space.by_name["c"], space, {"a": False})
    assert exists(space.by_name["c"], space, {"a": True, "b": 2})


def test_conditions_in_a_circle_are_refused() -> None:
    space = parse_space({"a": {"int": [1, 2], "when": "b == 1"}, "b": {"int": [1, 2], "when": "a == 1"}})
    with pytest.raises(ConfigError, match="a, b go in a circle"):
        in_order(space)


def test_a_trial_is_placed_when_all_that_exists_has_a_value() -> None:
    space = parse_space({"a": "bool", "b": {"int": [1, 2], "when": "a"}})
    assert placed({"a": False}, space)
    assert placed({"a": True, "b": 2}, space)
    assert not placed({"a": True}, space)
    assert not placed({}, space)


CHOICES: list[Callable[[], st.SearchStrategy[Any]]] = [
    lambda: st.integers(-5, 5),
    lambda: st.floats(-5, 5),
    lambda: st.one_of(st.none(), st.booleans(), st.integers(-1, 2), st.text(max_size=3), st.just(1.0)),
    lambda: st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=2),
]


@settings(max_examples=60)
@given(st.data())
def test_any_choice_is_told_apart_and_comes_back(data: st.DataObject) -> None:
    drawn = data.draw(st.lists(data.draw(st.sampled_from(CHOICES))(), min_size=1, max_size=5, unique_by=repr))
    space = parse_space({"x": {"choice": drawn}})
    encoded = [encode_point(space, {"x": value})["x"] for value in drawn]
    distribution = distributions(space)["x"]
    assert len({distribution.to_internal_repr(value) for value in encoded}) == len(drawn)
    assert all(same(decode_point(space, {"x": e})["x"], v) for e, v in zip(encoded, drawn, strict=True))
