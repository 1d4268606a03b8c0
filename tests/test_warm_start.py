"""A study that begins with what an earlier one has measured."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Blame, Kind
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.space import setting_key
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import BASELINE, State, TrialResult, TrialRow
from raytune_autotuner.tune.cache import Cache, read_cache
from raytune_autotuner.tune.versions import versions
from raytune_autotuner.tune.warm_start import Learned, best_of, learn_from_earlier
from tests.report_samples import METRIC, NO_MEMORY, failed, make_study, measured, setting
from tests.searches import Search
from tests.studies import optuna_trials, run_study, write_study
from tests.study_folders import make_folder

COST = "cost_per_million_tokens"
SPACE: dict[str, Any] = {"max-num-seqs": {"choice": [2, 8, 64, 256]}, "block-size": {"choice": [7, 16]}}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Any:
    """A finished study of five trials, one of them failed."""
    study = write_study(
        tmp_path_factory.mktemp("earlier"),
        search_space=SPACE,
        search={"trials": 5, "points": [{"max-num-seqs": 2, "block-size": 7}]},
    )
    return run_study(study, "--address", ray_address)[1]


def later(folder: Path, earlier: Any, **changes: Any) -> Study:
    search = {"warm_start": [str(earlier.path)], "trials": 3}
    return load_study(write_study(folder, **{**changes, "search": search}))


def versions_of(study: Study) -> dict[str, Any]:
    return versions(make_engine(study))


def test_trials_in_the_new_space_are_learned_and_the_others_counted(tmp_path: Path, earlier: Any) -> None:
    study = later(tmp_path, earlier, search_space={"max-num-seqs": {"choice": [2, 8, 64, 256]}})
    (learned,) = learn_from_earlier(study, versions_of(study))
    ended = [row for row in earlier.read_rows() if row.state.teaches]
    assert len(learned.rows) + learned.outside == len(ended)
    assert all(set(row.params) <= {"max-num-seqs"} for row in learned.rows)
    assert learned.outside == sum("block-size" in row.params for row in ended)


def test_figures_are_judged_by_the_new_studys_objective(tmp_path: Path, earlier: Any) -> None:
    study = later(tmp_path, earlier, search_space=SPACE, objective={"maximize": None, "minimize": "e2el_ms_mean"})
    (learned,) = learn_from_earlier(study, versions_of(study))
    best = best_of(study, [learned])
    assert best is not None
    assert best.score == min(row.result.metrics["e2el_ms_mean"] for row in learned.rows if row.score and row.params)


@pytest.mark.parametrize(
    ("quality", "learned"),
    [(None, [0, 1]), ({}, [0, 1, 2]), ({"max_perplexity_rise": 0.001}, [0, 2]), ({"max_perplexity_rise": 0.9}, [0, 1])],
    ids=["no guard", "the same", "stricter", "laxer"],
)
def test_what_would_be_judged_otherwise_in_quality_is_not_learned(
    tmp_path: Path, quality: dict[str, Any] | None, learned: list[int]
) -> None:
    def lost(rise: float) -> dict[str, float]:
        return {METRIC: 90.0, "perplexity_rise": rise, "answer_change": 0.0}

    too_much = replace(NO_MEMORY, kind=Kind.QUALITY_LOSS)
    rows = [
        measured(0, 100.0),
        replace(measured(1, 90.0, {"max-num-seqs": 2}), result=TrialResult(lost(0.01))),
        replace(failed(2, {"max-num-seqs": 8}), result=TrialResult(lost(0.1), too_much)),
    ]
    before = make_folder(tmp_path, rows, load_study(write_study(tmp_path, quality={})))
    study = later(tmp_path, before, quality=quality)
    before.write_versions(versions_of(study))
    (found,) = learn_from_earlier(study, versions_of(study))
    assert [row.number for row in found.rows] == learned


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"workload": {"concurrency": 4}}, "workload was"),
        ({"engine": {"args": {"noise": 0.5}}}, "engine.args was"),
        ({"model": "another"}, "model was 'simulated-model' and is 'another'"),
        ({"resources": {"cpus": 1}}, "resources was"),
        (
            {"objective": {"maximize": None, "minimize": COST}, "resources": {"price_per_hour": 2.0}},
            "resources.price_per_hour was None and is 2.0",
        ),
    ],
)
def test_figures_of_another_study_are_refused_and_the_difference_is_named(
    tmp_path: Path, earlier: Any, changes: dict[str, Any], named: str
) -> None:
    study = later(tmp_path, earlier, **changes)
    with pytest.raises(ConfigError, match="does not compare") as refused:
        learn_from_earlier(study, versions_of(study))
    assert named in str(refused.value)


GOODPUT = "goodput_rps"


def before_this(parent: Path, objective: dict[str, Any], *rows: TrialRow) -> list[str]:
    """The results folder of an earlier study with these rows, for `search.warm_start`."""
    study = make_study(objective=objective)
    run = make_folder(parent, rows, study)
    run.write_versions(versions_of(study))
    return [str(run.path)]


def with_goodput(row: TrialRow, goodput: float) -> TrialRow:
    return replace(row, result=TrialResult({**row.result.metrics, GOODPUT: goodput}))


def test_trials_without_the_objectives_figures_are_not_learned_as_failures(tmp_path: Path) -> None:
    slo = {"ttft_ms": {"p90": 3000}}
    unjudged = with_goodput(measured(3, 9.0, setting(3)), 9.0).result.metrics
    source = before_this(
        tmp_path,
        {"maximize": METRIC, "slo": slo},
        with_goodput(measured(0, 100.0), 5.0),
        measured(1, 120.0, setting(1)),
        replace(with_goodput(measured(2, 9.0, setting(2)), 9.0), state=State.STOPPED, score=None, bound=9.0),
        replace(measured(3, 9.0, setting(3)), result=TrialResult({k: unjudged[k] for k in (METRIC, GOODPUT)})),
        failed(4, setting(4)),
    )
    study = make_study(objective={"maximize": GOODPUT, "slo": slo}, search={"warm_start": source})
    (learned,) = learn_from_earlier(study, versions_of(study))
    assert [(row.number, row.state, row.score) for row in learned.rows] == [
        (0, State.MEASURED, 5.0),
        (4, State.FAILED, None),
    ]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"maximize": METRIC}, False),
        ({"maximize": METRIC, "minimize": GOODPUT}, True),
        ({"maximize": METRIC, "attainment": 0.9}, True),
        ({"maximize": "max_load_under_slo"}, True),
    ],
)
def test_figures_that_rest_on_another_slo_are_refused(tmp_path: Path, changes: dict[str, Any], refused: bool) -> None:
    source = before_this(tmp_path, {"maximize": METRIC, "slo": {"ttft_ms": {"p90": 99}}}, measured(0, 100.0))
    objective = {**changes, "slo": {"ttft_ms": {"p90": 3000}}}
    study = make_study(objective=objective, search={"warm_start": source})
    if not refused:
        assert len(learn_from_earlier(study, versions_of(study))[0].rows) == 1
        return
    with pytest.raises(ConfigError, match=r"objective\.slo was .* and is"):
        learn_from_earlier(study, versions_of(study))


@pytest.mark.parametrize("queued", [[], [{}]], ids=["while it learned", "between the baseline and the points"])
def test_a_driver_killed_before_its_first_trial_loses_neither_the_baseline_nor_the_points(
    tmp_path: Path, queued: list[dict[str, Any]]
) -> None:
    storage = InMemoryStorage()
    left = optuna.create_study(storage=storage, study_name="sample", direction="maximize")
    left.ask().set_user_attr("params", setting(2))  # it was to be told
    for params in queued:
        left.enqueue_trial({}, user_attrs={"name": BASELINE, "params": params, "placed": []})
    search = Search(make_study(search={"points": [setting(9)]}), tmp_path)
    rows = tuple(measured(number, 100.0 + number, setting(number)) for number in (1, 2))
    search.begin(storage, [Learned(search.folder, rows, 0)])
    search.searcher.take_over([])
    begun = []
    for trial in ("a", "b", "c"):
        begun.append(search.suggest(trial)["params"])
        search.end(trial, 1.0)
    assert begun == [{}, setting(9), setting(2)]
    assert sum("warm_start" in one.user_attrs for one in search.searcher.ot_study.trials) == len(rows)


@pytest.mark.slow
def test_a_study_that_starts_warm_tells_optuna_first_and_measures_the_best_again(
    tmp_path: Path, earlier: Any, ray_address: str
) -> None:
    search = {"warm_start": [str(earlier.path)], "trials": 3, "sampler": "tpe"}
    done, folder = run_study(write_study(tmp_path, search_space=SPACE, search=search), "--address", ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    warm = [trial for trial in optuna_trials(folder) if "warm_start" in trial.user_attrs]
    known = [row for row in earlier.read_rows() if row.state.teaches]
    assert len(warm) == len(known)
    assert [trial.number for trial in warm] == list(range(len(warm)))
    best = max((row for row in known if row.feasible and row.params), key=lambda row: row.score or 0)
    assert folder.read_rows()[1].params == best.params
    assert f"learned from {len(known)} trials" in done.stdout


# Answers of earlier runs


def cached(folder: Path, parent: Path, **changes: Any) -> Cache:
    search = {"cache": True, **changes.pop("search", {})}
    study = load_study(write_study(folder, search_space=SPACE, **changes, search=search))
    known = {**versions(make_engine(study)), "cluster": "one"}
    return read_cache(study, known, parent, {"max-num-seqs": 256, "block-size": 16})


def left_behind(parent: Path, *rows: TrialRow, cluster: str = "one") -> None:
    """A run of the same study with these rows."""
    study = load_study(write_study(parent, search_space=SPACE))
    run = make_folder(parent / "results", rows, study)
    run.write_versions({**versions(make_engine(study)), "cluster": cluster})


def test_the_newest_answer_for_a_setting_is_found_also_by_its_defaults(tmp_path: Path) -> None:
    left_behind(tmp_path, measured(0, 100.0), measured(1, 120.0, {"max-num-seqs": 8, "block-size": 16}))
    left_behind(tmp_path, measured(0, 101.0))
    cache = cached(tmp_path, tmp_path / "results")
    baseline = cache.find({"max-num-seqs": 256, "block-size": 16})
    assert baseline is not None
    assert baseline.result.metrics[METRIC] == 101.0
    other = cache.find({"block-size": 16, "max-num-seqs": 8})
    assert other is not None
    assert other.source.startswith("trial 1 of test-")
    assert cache.find({"max-num-seqs": 2, "block-size": 16}) is None
    assert str(cache) == "2 settings are known from 2 earlier runs"


def test_only_measurements_and_failures_of_the_setting_are_answers(tmp_path: Path) -> None:
    lost = replace(NO_MEMORY, blame=Blame.ENVIRONMENT)
    params = [{"max-num-seqs": 2, "block-size": size} for size in (7, 16)]
    left_behind(
        tmp_path,
        measured(0, 100.0),
        failed(1, params[0]),
        replace(failed(2, params[1], lost), state=State.LOST),
        replace(measured(3, 9.0, params[1]), state=State.STOPPED, score=None, bound=9.0),
        replace(measured(4, 9.0, params[1]), verifies=0),
        replace(measured(5, 9.0, params[1]), taken_from="trial 1 of another"),
    )
    assert len(cached(tmp_path, tmp_path / "results").answers) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"workload": {"concurrency": 4}},
        {"trial": {"timeout_s": 31}},
        {"objective": {"slo": {"ttft_ms": {"mean": 5.0}}}},
        {"quality": {}},
        {"resources": {"max_concurrent": 1}},
        {"objective": {"maximize": "perplexity"}},
        {"search": {"cache": False}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_was_not_measured_in_the_same_way_is_no_answer(tmp_path: Path, changes: dict[str, Any]) -> None:
    left_behind(tmp_path, measured(0, 100.0))
    assert len(cached(tmp_path, tmp_path / "results").answers) == 1
    assert not cached(tmp_path, tmp_path / "results", **changes).answers


def test_another_cluster_and_folders_that_are_no_runs_any_more_are_passed_over(tmp_path: Path) -> None:
    left_behind(tmp_path, measured(0, 100.0), cluster="another")
    broken = tmp_path / "results" / "test-20260101-000000"
    broken.mkdir()
    (broken / "study.yaml").write_text("a_key_of_another_version: 1\n")
    left_behind(tmp_path, measured(0, 100.0))
    left_behind(tmp_path, measured(0, 100.0))
    *_, lines, known = ResultsFolder.runs(tmp_path / "results")
    lines.rows_file.write_text("{broken\n")
    known.versions_file.write_text("{broken")
    assert not cached(tmp_path, tmp_path / "results").answers


def searched(parent: Path, trials: int, **search: Any) -> Search:
    """A search, verification included: the smaller the values of a setting, the better."""
    changes = {"search": {"trials": trials, "sampler": "grid", **search}, "verify": {"top": 1, "restarts": 2}}
    found = Search(load_study(write_study(parent, search_space=SPACE, **changes)), parent / "results")
    found.begin()
    for number in itertools.count():
        config = found.suggest(f"t{number}")
        if not isinstance(config, dict):
            break
        found.end(f"t{number}", 5000.0 - math.prod({**found.defaults, **config["params"]}.values()))
    return found


def test_a_search_starts_only_what_no_earlier_run_has_and_verifies_anew(tmp_path: Path) -> None:
    first = searched(tmp_path, 5).folder
    second = searched(tmp_path, 20, cache=True)
    rows = second.folder.read_rows()
    taken = [row.taken_from for row in rows if row.taken_from is not None]
    assert taken == [f"trial {number} of {first.path.name}" for number in range(5)]
    assert rows[0].name == "baseline"
    assert rows[0].score == first.read_rows()[0].score
    assert sum(row.counts for row in rows) == 8 - 5
    assert len({setting_key(row.params) for row in rows if row.verifies is None}) == 8
    again = [row for row in rows if row.verifies is not None]
    assert [row.taken_from for row in again] == [None] * 4
    told = {trial.user_attrs["trial"]: trial.user_attrs.get("taken_from") for trial in second.searcher.ot_study.trials
            if "trial" in trial.user_attrs}  # fmt: skip
    assert told == {row.number: row.taken_from for row in rows if row.verifies is None}
