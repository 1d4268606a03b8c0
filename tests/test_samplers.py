"""Which sampler a study gets, and what samplers make of failures."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from raytune_autotuner.score.objective import assess
from raytune_autotuner.score.pareto import pareto_front
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.space import Params, parse_space
from raytune_autotuner.study.study import PenaltySpec, Study
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from raytune_autotuner.tune.samplers import Grid, grid_points, make_sampler, population, startup_trials, unmeasured
from raytune_autotuner.tune.tell import Teller, encode_point, suggest

WIDE: dict[str, Any] = {"x": {"float": [0.0, 1.0]}, "n": {"int": [1, 64], "log": True}}
CONDITIONAL: dict[str, Any] = {"speculate": "bool", "tokens": {"int": [1, 8], "when": "speculate"}, **WIDE}
SMALL: dict[str, Any] = {"a": {"choice": [16, 32, 64]}, "b": "bool", "c": {"float": [0.1, 0.5], "step": 0.2}}
has_gp = all(importlib.util.find_spec(module) for module in ("torch", "scipy"))
NO_GP = pytest.mark.skipif(not has_gp, reason="torch and scipy are not both installed")


def make_study(
    space: dict[str, Any],
    trials: int = 20,
    sampler: str = "auto",
    direction: str = "maximize",
    also: dict[str, str] | None = None,
) -> Study:
    return parse_study(
        {
            "study": "s",
            "model": "m",
            "search_space": space,
            "objective": {direction: "score", "slo": {"ttft_ms": {"p90": 100}}, **(also or {})},
            "search": {"trials": trials, "sampler": sampler, "seed": 3},
        }
    )


def run(study: Study, sampler: BaseSampler, outcome: Callable[[Params], TrialResult], trials: int) -> list[TrialRow]:
    """A search in no time: ask, assess, tell."""
    directions = [direction for _, direction in study.objective.targets]
    ot_study = optuna.create_study(directions=directions, sampler=sampler)
    teller, rows = Teller(study), list[TrialRow]()
    for _ in range(trials):
        trial = ot_study.ask()
        params = suggest(trial, study.space, study.fixed)
        result = outcome(params)
        worth = assess(study, result)
        state = State.FAILED if worth.failure else State.MEASURED
        row = TrialRow(trial.number, "", "", params, state, result, worth.score, worth.violation, worth.penalty)
        rows.append(replace(row, scores=worth.scores))
        teller.tell(ot_study, trial, rows[-1])
    return rows


def measured(score: float, ttft_ms: float = 50.0) -> TrialResult:
    return TrialResult({"score": score, "ttft_ms_p90": ttft_ms})


def failed(stage: Stage) -> TrialResult:
    return TrialResult({}, Failure(stage, Kind.OUT_OF_MEMORY, Blame.PARAMETERS, "CUDA out of memory", ""))


@pytest.mark.parametrize(("trials", "expected"), [(1, 1), (4, 1), (8, 2), (12, 3), (20, 5), (40, 10), (1000, 10)])
def test_the_random_start_is_at_most_a_quarter_of_the_budget(trials: int, expected: int) -> None:
    assert startup_trials(trials) == expected


def test_auto_takes_the_grid_where_the_budget_reaches_all_settings() -> None:
    sampler, reason = make_sampler(make_study(SMALL, trials=18), 1)
    assert isinstance(sampler, Grid)
    assert "all 18 settings" in reason


@pytest.mark.parametrize(("space", "shown"), [(WIDE, "very many settings"), (SMALL, "18 settings")])
def test_auto_takes_tpe_otherwise_and_says_why(space: dict[str, Any], shown: str) -> None:
    sampler, reason = make_sampler(make_study(space, trials=8), 1)
    assert isinstance(sampler, TPESampler)
    assert shown in reason
    assert "first 2 of them at random" in reason


def test_auto_groups_a_conditional_space_by_its_conditions() -> None:
    sampler, reason = make_sampler(make_study(CONDITIONAL), 1)
    assert isinstance(sampler, TPESampler)
    assert "grouped by condition" in reason


@pytest.mark.parametrize(
    ("name", "kind"), [("tpe", TPESampler), ("random", RandomSampler), ("grid", Grid), ("nsga2", NSGAIISampler)]
)
def test_a_sampler_that_is_asked_for_is_taken(name: str, kind: type[BaseSampler]) -> None:
    sampler, reason = make_sampler(make_study(SMALL, trials=2, sampler=name), 1)
    assert isinstance(sampler, kind)
    assert name in reason


@NO_GP
def test_gp_is_taken_where_it_can_work() -> None:
    assert isinstance(make_sampler(make_study(WIDE, sampler="gp"), 1)[0], GPSampler)


@pytest.mark.skipif(has_gp, reason="torch and scipy are installed")
def test_gp_without_its_packages_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"search\.sampler gp needs"):
        make_sampler(make_study(WIDE, sampler="gp"), 1)


@NO_GP
def test_gp_on_a_conditional_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="condition"):
        make_sampler(make_study(CONDITIONAL, sampler="gp"), 1)


@pytest.mark.parametrize("space", [WIDE, CONDITIONAL])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_same_seed_makes_the_same_search(space: dict[str, Any], concurrency: int) -> None:
    def once() -> list[Params]:
        study = make_study(space)
        rows = run(study, make_sampler(study, concurrency)[0], lambda p: measured(float(p["x"])), 12)
        return [row.params for row in rows]

    assert once() == once()


def test_a_resumed_search_does_not_draw_the_same_settings_again() -> None:
    study = make_study(WIDE, sampler="random")
    first, again = (run(study, make_sampler(study, 1, n)[0], lambda p: measured(1.0), 5) for n in (0, 5))
    assert not {row.params["x"] for row in first} & {row.params["x"] for row in again}


def test_tpe_heeds_trials_that_still_run() -> None:
    study = make_study({"x": {"int": [0, 3]}, "y": {"float": [0.0, 1.0]}}, trials=40, sampler="tpe")
    ot_study = optuna.create_study(direction="maximize", sampler=make_sampler(study, 8)[0])
    assert len({round(suggest(ot_study.ask(), study.space)["y"], 3) for _ in range(16)}) == 16


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("name", ["tpe", pytest.param("gp", marks=[NO_GP, pytest.mark.slow])])
def test_the_search_goes_from_failures_over_missed_slos_to_what_is_feasible(name: str, direction: str) -> None:
    """A step towards larger `x` at a time: stages, then the SLO, then the score, of either sign."""

    def outcome(params: Params) -> TrialResult:
        x = params["x"]
        if x < 0.5:
            return failed(list(Stage)[int(x * 12)])
        score = x if direction == "maximize" else 5000.0 - 1000.0 * x
        return measured(score, ttft_ms=100.0 + (0.8 - x) * 1000)

    trials = 30 if name == "tpe" else 14
    study = make_study({"x": {"float": [0.0, 1.0]}}, trials, name, direction)
    late = [row.params["x"] for row in run(study, make_sampler(study, 1)[0], outcome, trials)[trials // 2 :]]
    assert statistics.median(late) > 0.8


def changed(left: Params, right: Params) -> set[str]:
    return {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}


def steps_of(works: Callable[[Params], bool], direction: str) -> int:
    """How many of the 30 first settings are a single step from the best before them, over some seeds."""
    sign = 1.0 if direction == "maximize" else -1.0
    study, steps = make_study({**WIDE, **SMALL}, 40, "tpe", direction), 0

    def outcome(params: Params) -> TrialResult:
        return measured(100.0 + sign * params["x"]) if works(params) else failed(Stage.WEIGHTS)

    for seed in range(3):
        search = study.search.model_copy(update={"seed": seed})
        rows = run(study, make_sampler(study.model_copy(update={"search": search}), 1)[0], outcome, 10)
        for number, row in enumerate(rows):
            before = [one for one in rows[:number] if one.score is not None]
            best = max(before, key=lambda one: sign * (one.score or 0.0), default=row)
            steps += len(changed(row.params, best.params)) == 1
    return steps


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_where_most_fails_the_start_goes_by_single_steps_from_the_best_that_works(direction: str) -> None:
    assert steps_of(lambda params: params["a"] == 16 and params["b"], direction) >= 6
    assert steps_of(lambda params: True, direction) <= 2


@pytest.mark.parametrize("result", [failed(Stage.WEIGHTS), measured(1.0, ttft_ms=500.0)])
def test_before_anything_works_the_start_is_random(result: TrialResult) -> None:
    study = make_study({**WIDE, **SMALL}, 40, "tpe")
    ours, random = (run(study, s, lambda _: result, 10) for s in (make_sampler(study, 1)[0], RandomSampler(seed=3)))
    assert [row.params for row in ours] == [row.params for row in random]


@pytest.mark.parametrize(("trials", "expected"), [(1, 4), (16, 4), (40, 10), (200, 50), (1000, 50)])
def test_a_generation_is_at_most_a_quarter_of_the_budget_and_no_less_than_4(trials: int, expected: int) -> None:
    assert population(trials) == expected


def test_auto_takes_tpe_for_several_objectives_and_says_why() -> None:
    sampler, reason = make_sampler(make_study(WIDE, also={"minimize": "ttft_ms_mean"}), 1)
    assert isinstance(sampler, TPESampler)
    assert "for 2 objectives, as nsga2 finds less" in reason
    assert "nsga2" not in make_sampler(make_study(WIDE), 1)[1]


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_with_two_objectives_the_search_goes_to_the_front_past_failures_and_missed_slos(name: str) -> None:
    """The front is `x` above 0.7, all of it: more throughput costs more time. Below it there is nothing to have."""

    def outcome(params: Params) -> TrialResult:
        x = params["x"]
        if x < 0.4:
            return failed(list(Stage)[int(x * 12)])
        metrics = {"score": x, "ttft_ms_mean": 100.0 * x, "ttft_ms_p90": 100.0 + (0.7 - x) * 1000}
        return TrialResult(metrics)

    study = make_study({**WIDE, **SMALL}, 40, name, also={"minimize": "ttft_ms_mean"})
    rows = run(study, make_sampler(study, 1)[0], outcome, 40)
    front = pareto_front(rows, ("maximize", "minimize"))
    assert len(front) >= 3
    assert all(row.params["x"] > 0.7 for row in front)
    assert statistics.median(row.params["x"] for row in rows[20:]) > 0.6


@NO_GP
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # Optuna's, once it is certain
def test_gp_takes_several_objectives_with_failures_and_missed_slos() -> None:
    def outcome(params: Params) -> TrialResult:
        x = params["x"]
        latencies = {"ttft_ms_mean": 100.0 * x, "ttft_ms_p90": 100.0 + (0.7 - x) * 1000}
        return TrialResult({"score": x, **latencies}) if x > 0.4 else failed(Stage.KV_CACHE)

    study = make_study({"x": {"float": [0.0, 1.0]}}, 6, "gp", also={"minimize": "ttft_ms_mean"})
    assert len(run(study, make_sampler(study, 1)[0], outcome, 6)) == 6


@pytest.mark.parametrize("grade", ["elapsed", "infinite", "ignore", "progress"])
@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_every_grade_can_be_told_with_several_objectives(name: str, grade: str) -> None:
    study = make_study(CONDITIONAL, 12, name, also={"minimize": "ttft_ms_mean"})
    study = study.model_copy(update={"penalty": PenaltySpec.model_validate({"grade": grade})})

    def outcome(params: Params) -> TrialResult:
        if params["n"] > 20:
            return failed(Stage.KV_CACHE)
        return TrialResult({"score": params["x"], "ttft_ms_mean": 1.0, "ttft_ms_p90": 10.0 * params["n"]})

    assert len(run(study, make_sampler(study, 3)[0], outcome, 12)) == 12


def test_tpe_prefers_a_later_failure_where_nothing_else_was_seen() -> None:
    study = make_study({"x": {"float": [0.0, 1.0]}}, 40, "tpe")
    stages = [Stage.ARGUMENTS, Stage.WEIGHTS, Stage.KV_CACHE, Stage.LOAD]
    rows = run(study, make_sampler(study, 1)[0], lambda p: failed(stages[min(int(p["x"] * 4), 3)]), 40)
    assert statistics.median(row.params["x"] for row in rows[20:]) > 0.7


@pytest.mark.parametrize("name", ["tpe", "random", "grid"])
def test_suggestions_satisfy_a_conditional_space(name: str) -> None:
    space = {**CONDITIONAL, "x": {"float": [0.0, 1.0], "step": 0.5}}
    study = make_study(space, trials=24, sampler=name)
    rows = run(study, make_sampler(study, 1)[0], lambda p: measured(float(p["n"])), 24)
    for row in rows:
        assert ("tokens" in row.params) is row.params["speculate"]
        study.space.check_point(row.params, "suggestion")


def test_grid_points_meet_conditions_and_constraints() -> None:
    space = parse_space(
        {"a": {"int": [1, 3]}, "b": {"choice": [1, 2], "when": "a > 1"}, "c": {"float": [0.1, 0.3], "step": 0.1}},
        ["b <= a - 1", "c < limit"],
    )
    points = list(grid_points(space, {"limit": 0.25}))
    assert len(points) == len({tuple(point.items()) for point in points}) == 2 * (1 + 1 + 2)
    assert {point["c"] for point in points} == {0.1, 0.2}
    assert all(("b" in point) is (point["a"] > 1) for point in points)


def test_the_grid_suggests_every_setting_once_and_then_starts_over() -> None:
    study = make_study(SMALL)
    ot_study = optuna.create_study(sampler=Grid(study.space, seed=1))
    every = sorted(map(str, grid_points(study.space)))
    seen = [str(suggest(ot_study.ask(), study.space)) for _ in range(len(every) + 1)]
    assert sorted(seen[:-1]) == every
    assert seen[-1] in every


def test_the_grid_skips_queued_settings_and_goes_on_after_a_restart() -> None:
    study = make_study(SMALL)
    ot_study = optuna.create_study(sampler=Grid(study.space, seed=1))
    ot_study.enqueue_trial(encode_point(study.space, {"a": 64, "b": True, "c": 0.5}))
    seen = [suggest(ot_study.ask(), study.space) for _ in range(9)]
    ot_study.tell(0, state=TrialState.FAIL)
    ot_study.sampler = Grid(study.space, seed=1)
    seen += [suggest(ot_study.ask(), study.space) for _ in range(9)]
    assert len({str(params) for params in seen}) == 18


def test_two_seeds_shuffle_the_grid_differently() -> None:
    study = make_study(SMALL)

    def order(seed: int) -> list[Params]:
        ot_study = optuna.create_study(sampler=Grid(study.space, seed=seed))
        return [suggest(ot_study.ask(), study.space) for _ in range(5)]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(
    ("space", "constraints", "message"),
    [
        ({"x": {"float": [0.0, 1.0]}}, [], "search_space.x: a grid needs a step"),
        ({"x": {"int": [1, 1_000_000]}}, [], "more than 100,000 settings"),
        ({"x": {"int": [1, 5]}}, ["x > 5"], "no setting of the space meets its constraints"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(space: dict[str, Any], constraints: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grid(parse_space(space, constraints))


def test_what_is_left_of_a_small_space_is_found_and_its_end_is_certain() -> None:
    space = parse_space(SMALL)
    seen: list[Params] = []
    while (point := unmeasured(space, {}, seen.__contains__, seed=len(seen))) is not None:
        seen.append(point)
    assert len(seen) == 18
    assert unmeasured(parse_space(WIDE), {}, lambda _: False, seed=0) is None


def test_tpe_visits_nearly_all_of_a_small_space() -> None:
    study = make_study({"a": {"choice": [1, 2, 4, 8, 16]}, "b": "bool", "c": {"choice": [1, 2, 3]}}, 25, "tpe")
    ot_study = optuna.create_study(direction="maximize", sampler=make_sampler(study, 1)[0])
    teller, rows = Teller(study), dict[str, TrialRow]()
    for _ in range(100):
        trial = ot_study.ask()
        params = suggest(trial, study.space)
        if str(params) in rows:
            teller.tell_known(ot_study, trial, rows[str(params)])
            continue
        worth = assess(study, measured(float(params["a"] * params["c"])))
        row = TrialRow(trial.number, "", "", params, State.MEASURED, TrialResult(), worth.score, worth.violation)
        rows[str(params)] = row
        teller.tell(ot_study, trial, row)
    assert len(rows) >= 25


@pytest.mark.slow
def test_the_search_benchmark_prints_its_table(root: Path) -> None:
    options = ["--only", "memory-65", "--sampler", "tpe", "--seeds", "1", "--trials", "6"]
    command = [sys.executable, str(root / "scripts/bench/search"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "memory-65: maximising, 62% of settings feasible" in done.stdout
    assert all(name in done.stdout for name in ("random", "ignore", "infinite", "elapsed", "progress + baseline"))
