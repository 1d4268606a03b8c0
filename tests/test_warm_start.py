"""A study that begins with what an earlier one has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine.machine import machine
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.study import Study, load_study
from raytune_autotuner.tune.warm_start import best_of, learn_from_earlier
from tests.studies import optuna_trials, run_study, write_study

VERSIONS: dict[str, Any] = {"engine": {}, "machine": machine()}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Any:
    """A finished study of five trials, one of them failed."""
    study = write_study(
        tmp_path_factory.mktemp("earlier"),
        search_space={"max-num-seqs": {"choice": [2, 8, 64, 256]}, "block-size": {"choice": [7, 16]}},
        search={"trials": 5, "points": [{"max-num-seqs": 2, "block-size": 7}]},
    )
    return run_study(study, "--address", ray_address)[1]


def later(folder: Path, earlier: Any, **changes: Any) -> Study:
    search = {"warm_start": [str(earlier.path)], "trials": 3}
    return load_study(write_study(folder, **{**changes, "search": search}))


def versions_of(study: Study) -> dict[str, Any]:
    from raytune_autotuner.engine.catalog import make_engine

    return {"engine": make_engine(study).versions(), "machine": machine()}


def test_trials_in_the_new_space_are_learned_and_the_others_counted(tmp_path: Path, earlier: Any) -> None:
    study = later(tmp_path, earlier, search_space={"max-num-seqs": {"choice": [2, 8, 64, 256]}})
    (learned,) = learn_from_earlier(study, versions_of(study))
    ended = [row for row in earlier.read_rows() if row.state.teaches]
    assert len(learned.rows) + learned.outside == len(ended)
    assert all(set(row.params) <= {"max-num-seqs"} for row in learned.rows)
    assert learned.outside == sum("block-size" in row.params for row in ended)


def test_figures_are_judged_by_the_new_studys_objective(tmp_path: Path, earlier: Any) -> None:
    space = {"max-num-seqs": {"choice": [2, 8, 64, 256]}, "block-size": {"choice": [7, 16]}}
    study = later(tmp_path, earlier, search_space=space, objective={"maximize": None, "minimize": "e2el_ms_mean"})
    (learned,) = learn_from_earlier(study, versions_of(study))
    best = best_of(study, [learned])
    assert best is not None
    assert best.score == min(row.result.metrics["e2el_ms_mean"] for row in learned.rows if row.score and row.params)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"workload": {"concurrency": 4}}, "workload was"),
        ({"engine": {"args": {"noise": 0.5}}}, "engine.args was"),
        ({"model": "another"}, "model was 'simulated-model' and is 'another'"),
        ({"resources": {"cpus": 1}}, "resources was"),
    ],
)
def test_figures_of_another_study_are_refused_and_the_difference_is_named(
    tmp_path: Path, earlier: Any, changes: dict[str, Any], named: str
) -> None:
    study = later(tmp_path, earlier, **changes)
    with pytest.raises(ConfigError, match="does not compare") as refused:
        learn_from_earlier(study, versions_of(study))
    assert named in str(refused.value)


@pytest.mark.slow
def test_a_study_that_starts_warm_tells_optuna_first_and_measures_the_best_again(
    tmp_path: Path, earlier: Any, ray_address: str
) -> None:
    space = {"max-num-seqs": {"choice": [2, 8, 64, 256]}, "block-size": {"choice": [7, 16]}}
    search = {"warm_start": [str(earlier.path)], "trials": 3, "sampler": "tpe"}
    done, folder = run_study(write_study(tmp_path, search_space=space, search=search), "--address", ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    warm = [trial for trial in optuna_trials(folder) if "warm_start" in trial.user_attrs]
    known = [row for row in earlier.read_rows() if row.state.teaches]
    assert len(warm) == len(known)
    assert [trial.number for trial in warm] == list(range(len(warm)))
    best = max((row for row in known if row.feasible and row.params), key=lambda row: row.score or 0)
    assert folder.read_rows()[1].params == best.params
    assert f"learned from {len(known)} trials" in done.stdout
