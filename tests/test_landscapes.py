"""The landscapes of `scripts/bench/search`: made-up ones are what they say, the recorded one is what was recorded."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.file import load_study
from raytune_autotuner.tune.samplers import grid_points

SCRIPTS = Path(__file__).parent.parent / "scripts" / "bench"
TABLE = SCRIPTS / "recorded" / "vllm-cpu" / "trials.csv"


def load(name: str, file: str) -> ModuleType:
    loader = SourceFileLoader(name, str(SCRIPTS / file))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


landscapes = load("landscapes", "landscapes.py")
search = load("bench_search", "search")


@pytest.fixture(scope="module")
def recorded() -> Any:
    return landscapes.recorded(TABLE)


@pytest.fixture(scope="module")
def memory() -> Any:
    return landscapes.memory(0.30)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_setting_of_the_recorded_space_was_tried_once(recorded: Any, rows: list[dict[str, str]]) -> None:
    names = [name for name in rows[0] if name.startswith("param:")]
    tried = Counter(tuple(row[name] for name in names) for row in rows if row["name"] != "baseline")
    assert set(tried.values()) == {1}
    assert len(tried) == recorded.study().space.size == 108


def test_a_recorded_setting_comes_to_exactly_what_it_came_to(recorded: Any, rows: list[dict[str, str]]) -> None:
    found = {json.dumps(point): recorded.outcome(point) for point in grid_points(recorded.study().space)}
    scores = sorted(result.metrics["output_throughput_tok_s"] for result in found.values() if not result.failure)
    assert scores == sorted(float(row["score"]) for row in rows if row["score"] and row["name"] != "baseline")
    seconds = sum(result.seconds["total"] for result in found.values())
    assert seconds == pytest.approx(sum(float(row["seconds:total"]) for row in rows[1:]))
    kinds = Counter(str(result.failure.kind) for result in found.values() if result.failure)
    assert kinds == Counter(row["kind"] for row in rows if row["state"] == "failed")


def test_the_recorded_baseline_is_the_engines_defaults(recorded: Any, rows: list[dict[str, str]]) -> None:
    assert recorded.baseline == {}
    assert recorded.outcome({}).metrics["output_throughput_tok_s"] == float(rows[0]["score"])


def test_the_recorded_best_is_the_tables_best(recorded: Any, rows: list[dict[str, str]]) -> None:
    assert recorded.best == max(float(row["score"]) for row in rows if row["score"])


def test_the_engines_own_check_foresees_what_failed_at_configuration_and_nothing_else(recorded: Any) -> None:
    for point in grid_points(recorded.study().space):
        failure, foreseen = recorded.outcome(point).failure, recorded.foreseen(point)
        assert (foreseen is not None) is (failure is not None and failure.stage is Stage.CONFIGURATION)


def test_the_recorded_study_is_replayed_with_its_own_load_and_limits(recorded: Any) -> None:
    then, now = load_study(TABLE.with_name("study.yaml")), recorded.study()
    assert (now.workload, now.objective, now.search_space) == (then.workload, then.objective, then.search_space)
    assert (now.trial.timeout_s, now.trial.hung_after_s) == (300, 150)


def test_nothing_recorded_names_a_place_on_a_machine() -> None:
    for file in TABLE.parent.iterdir():
        assert not re.search(r"(^|[\s\"'=:])/\w+/", file.read_text()), file


def test_an_incomplete_table_answers_by_its_nearest_neighbour(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    shutil.copy(TABLE.with_name("study.yaml"), tmp_path)
    kept = [row for row in rows if row["param:block-size"] != "64"]
    with (tmp_path / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    some = landscapes.recorded(tmp_path / "trials.csv")
    point = {
        "max-num-seqs": 16,
        "max-num-batched-tokens": 1024,
        "block-size": 64,
        "tensor-parallel-size": 1,
        "env:VLLM_CPU_OMP_THREADS_BIND": "0-1",
    }
    neighbours = [some.outcome({**point, "block-size": size}) for size in (16, 128)]
    assert some.outcome(point) in neighbours


@pytest.mark.parametrize(("share", "name"), [(0.05, "memory-05"), (0.30, "memory-30"), (0.95, "memory-95")])
def test_a_made_up_landscape_has_the_share_of_feasible_settings_that_it_names(share: float, name: str) -> None:
    made = landscapes.memory(share)
    feasible, failed, _ = made.survey(2000)
    assert made.name == name
    assert feasible == pytest.approx(share, abs=0.03)
    assert feasible + failed == pytest.approx(1)


@pytest.mark.slow
def test_the_baseline_of_every_landscape_works() -> None:
    for made in landscapes.all_of_them():
        assert made.outcome(made.baseline).failure is None, made.name


@pytest.mark.slow
def test_the_best_that_is_found_by_steps_is_the_best_there_is() -> None:
    made = landscapes.memory(0.05)
    space = made.study().space.by_name
    values = [range(1, 257), *(landscapes.coarse(space[name], 64) for name in list(space)[1:4]), [2048]]
    settings = (dict(zip(space, point, strict=True)) for point in itertools.product(*values))
    results = (made.outcome(setting) for setting in settings)
    assert made.best == max(r.metrics["output_throughput_tok_s"] for r in results if r.failure is None)


def test_a_coarse_grid_holds_both_ends_of_a_range(memory: Any) -> None:
    space = memory.study().space.by_name
    assert landscapes.coarse(space["max-num-seqs"], 4) == [1, 8, 64, 512]
    assert landscapes.coarse(space["gpu-memory-utilization"], 4) == [0.5, 0.66, 0.82, 0.98]
    assert landscapes.coarse(space["tensor-parallel-size"], 2) == [1, 2, 4]


def run(landscape: Any, name: str, trials: int = 12, cap: int = 12, seed: int = 0) -> Any:
    (treatment,) = [one for one in search.SEARCHES if one.name == name]
    return search.search(landscape, treatment, search.Budget(trials, cap, 1), seed)


@pytest.mark.parametrize("name", [one.name for one in search.SEARCHES])
def test_every_search_uses_its_budget_and_its_seconds_add_up(memory: Any, name: str) -> None:
    found = run(memory, name)
    assert len(found.best) == len(found.seconds) == len(found.failed) == 12
    assert list(found.seconds) == sorted(found.seconds)
    assert found == run(memory, name), "the same seed is the same search"


def test_what_is_refused_before_the_start_costs_no_engine_time_and_counts_as_no_trial(recorded: Any) -> None:
    ours, random = run(recorded, "our defaults", 20, 20), run(recorded, "random", 20, 20)
    assert ours.asked > 20
    assert random.asked >= 20
    starts = [after - before for before, after in itertools.pairwise((0.0, *ours.seconds))]
    cheapest = min(
        r.seconds["total"]
        for p in grid_points(recorded.study().space)
        if not recorded.foreseen(p)
        for r in [recorded.outcome(p)]
    )
    assert min(starts) >= cheapest > 20
    assert ours.best[0] == recorded.outcome({}).metrics["output_throughput_tok_s"]


def test_a_search_goes_on_past_its_budget_until_it_comes_near_the_best(recorded: Any) -> None:
    found = run(recorded, "random", 5, 100)
    assert 5 <= len(found.best) <= 108
    assert search.share(recorded, found.best[-1]) >= 0.95
    assert all(search.share(recorded, score) < 0.95 for score in found.best[5:-1])


def test_a_search_that_has_tried_everything_ends(recorded: Any) -> None:
    landscape = landscapes.replace(recorded)
    landscape.__dict__["best"] = 1e9
    assert len(run(landscape, "random", 5, 1000).best) == 108
    assert len(run(landscape, "grid", 5, 1000).best) == 108
    assert len(run(landscape, "ours, without lessons", 5, 1000).best) == 1 + 45
    # Of the 15 block sizes without a kernel, one is tried: the others would fail as it did.
    assert len(run(landscape, "random, ours otherwise", 5, 1000).best) == 1 + 30 + 1


def test_plain_optuna_hears_nothing_of_failures(recorded: Any) -> None:
    (treatment,) = [one for one in search.SEARCHES if one.name == "plain OptunaSearch"]
    asker = search.Asker(recorded, treatment, 40, 1)
    while asker.next().result.failure is None:
        pass
    last = asker._ot_study.trials[-1]
    assert str(last.state.name) == "FAIL"
    assert last.values is None


def test_a_line_without_half_of_its_seeds_near_the_best_says_after_how_long_they_were_given_up() -> None:
    runs = [search.Run((1.0,), (False,), 1, (100.0,)) for _ in range(3)]
    landscape = landscapes.replace(landscapes.flags())
    landscape.__dict__["best"] = 2.0
    summary = search.summarize(landscape, search.SEARCHES[0], runs, search.Budget(1, 1, 3))
    assert summary.s_to_95 is None
    assert search.line(summary).endswith(">100")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["search", "--compare", "searches", "--only", "flags", "--seeds", "1", "--trials", "6"],
        ["growth", "--trials", "12"],
        ["growth", "--trials", "12", "--sampler", "random", "--space", "small"],
    ],
)
def test_the_scripts_print_their_tables(options: list[str]) -> None:
    command = [sys.executable, str(SCRIPTS / options[0]), *options[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert ("our defaults" if options[0] == "search" else "longest of all 12 steps") in done.stdout
