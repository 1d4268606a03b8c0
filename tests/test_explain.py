"""`check`: a study explained without starting an engine or a cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from raytune_autotuner.tune.explain import SAMPLED, SUGGESTIONS, Explanation, explain, render
from tests.studies import BASE, merged, write_study

SPACE: dict[str, Any] = {
    "max-num-seqs": {"int": [1, 512], "log": True},
    "max-num-batched-tokens": {"choice": [256, 1024, 4096]},
    "tensor-parallel-size": {"choice": [1, 5]},
}


def explained(tmp_path: Path, **changes: Any) -> Explanation:
    return explain(load_study(write_study(tmp_path, **changes)), tmp_path / "results")


def test_the_size_of_the_space_and_the_sampler_are_named(tmp_path: Path) -> None:
    found = explained(tmp_path, search_space=SPACE, search={"trials": 20})
    assert found.settings == 512 * 3 * 2
    assert "tpe: 20 trials of 3,072 settings" in found.sampler
    assert found.trials == 20


def test_what_constraints_and_the_engine_refuse_is_counted_with_its_reasons(tmp_path: Path) -> None:
    found = explained(tmp_path, search_space=SPACE, constraints=["max-num-batched-tokens >= max-num-seqs"])
    assert found.refused_share == sum(found.reasons.values()) / SAMPLED
    assert 0.4 < found.refused_share < 0.7, "half of the settings have 5 devices where there are fewer heads"
    assert any("must be divisible by tensor parallel size" in reason for reason in found.reasons)
    assert "breaks `max-num-batched-tokens >= max-num-seqs`" in found.reasons
    assert list(found.reasons.values()) == sorted(found.reasons.values(), reverse=True)


def test_reasons_that_differ_in_their_numbers_only_are_one(tmp_path: Path) -> None:
    found = explained(tmp_path, search_space={name: SPACE[name] for name in list(SPACE)[:2]})
    (reason,) = found.reasons
    assert re.search(r"max_num_batched_tokens \(256\) must be greater than or equal to max_num_seqs \(\d+\)", reason)
    assert found.reasons[reason] > 1


def test_the_first_suggestions_are_the_baseline_the_studys_points_and_the_samplers(tmp_path: Path) -> None:
    points = [{"max-num-seqs": 8, "max-num-batched-tokens": 256, "tensor-parallel-size": 5}]
    found = explained(tmp_path, search_space=SPACE, search={"trials": 20, "points": points})
    assert len(found.suggestions) == SUGGESTIONS
    assert [one.params for one in found.suggestions[:2]] == [{}, points[0]]
    assert found.suggestions[0].refused is None
    assert "must be divisible" in (found.suggestions[1].refused or "")


def test_the_load_is_told_in_requests_and_tokens(tmp_path: Path) -> None:
    load = {"concurrency": [2, 8], "rounds": 3, "prefix": {"tokens": 8}}
    assert "load      c2, c8 in 3 rounds: 16 requests each, of 40 + 8 tokens on average\n" in render(
        explained(tmp_path, workload=load)
    )
    (tmp_path / "asked").write_text('{"prompt": "Why?", "output_tokens": 3}\n' * 9)
    study = {**BASE, "workload": {"dataset": str(tmp_path / "asked"), "request_rate_rps": 4, "requests": 5}}
    (path := tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    found = explain(load_study(path), tmp_path / "results")
    assert str(found.load) == "r4: 5 requests each, of text and 3 tokens on average"


def test_a_small_space_is_suggested_once_and_not_over_and_over(tmp_path: Path) -> None:
    found = explained(tmp_path, search_space={"max-num-seqs": {"choice": [2, 8, 64]}})
    shown = [json.dumps(one.params) for one in found.suggestions]
    assert len(shown) == len(set(shown)) == 4


@pytest.mark.parametrize(
    ("changes", "at_most_s"),
    [
        ({"search": {"trials": 4}, "resources": {"max_concurrent": 1}}, 4 * 30),
        ({"search": {"trials": 4}, "verify": {"top": 2, "restarts": 3}, "resources": {"max_concurrent": 1}}, 13 * 30),
        ({"search": {"trials": 90, "time_budget": "10m"}, "resources": {"max_concurrent": 1}}, 600 + 30),
        ({"search": {"trials": 3}, "resources": {"max_concurrent": 2, "cpus": 0.5}}, 2 * 30),
    ],
)
def test_the_time_is_the_limit_of_every_trial_in_turn(
    tmp_path: Path, changes: dict[str, Any], at_most_s: float
) -> None:
    assert explained(tmp_path, **changes).at_most_s == at_most_s


def test_earlier_runs_of_the_study_tell_what_is_likely(tmp_path: Path) -> None:
    assert explained(tmp_path, resources={"max_concurrent": 1}).likely_s is None
    folder = ResultsFolder.create(tmp_path / "results", load_study(tmp_path / "study.yaml"))
    rows = [TrialRow(n, str(n), "", {}, State.MEASURED, TrialResult({}, None, {"total": 10.0})) for n in range(3)]
    lost = replace(rows[0], number=3, trial_id="3", state=State.LOST, result=TrialResult({}, None, {"total": 99.0}))
    folder.write_rows([*rows, lost])
    assert explained(tmp_path, resources={"max_concurrent": 1}).likely_s == 4 * 10


def test_a_price_is_what_the_time_at_most_costs(tmp_path: Path) -> None:
    assert explained(tmp_path).price_at_most is None
    found = explained(tmp_path, resources={"price_per_hour": 36.0, "max_concurrent": 1})
    assert found.price_at_most == pytest.approx(36.0 * found.at_most_s / 3600)


def test_what_would_keep_a_study_from_running_is_said_in_place_of_an_explanation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.maximize"):
        explained(tmp_path, objective={"maximize": "output_throughput_tok"})
    with pytest.raises(ConfigError, match="a grid needs a step"):
        explained(tmp_path, search_space={"x": {"float": [0.0, 1.0]}}, search={"sampler": "grid"})


def test_an_endless_space_is_plain_json(tmp_path: Path) -> None:
    space = {"gpu-memory-utilization": {"float": [0.5, 0.9]}}
    found = explained(tmp_path, search_space=space)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["settings"] is None
    assert "space     endless settings" in render(found)


def test_it_is_rendered_for_people(tmp_path: Path) -> None:
    points = [{"max-num-seqs": 8, "max-num-batched-tokens": 256, "tensor-parallel-size": 5}]
    search = {"trials": 20, "points": points}
    text = render(explained(tmp_path, search_space=SPACE, search=search, resources={"price_per_hour": 2.0}))
    assert "study test\n" in text
    assert "3,072 settings" in text
    assert "0  the baseline: the engine's defaults" in text
    assert "refused: invalid-config" in text
    assert "no earlier run to tell what is likely" in text
    assert "price     at most" in text


@pytest.mark.slow
def test_the_command_prints_it_starts_no_cluster_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(merged(BASE, {"search_space": SPACE})))
    command = [sys.executable, "-m", "raytune_autotuner", "check", str(path), "--results", str(tmp_path / "results")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert found["study"] == "test"
    assert found["settings"] == 3072
    assert len(found["suggestions"]) == SUGGESTIONS
    assert [entry.name for entry in tmp_path.iterdir()] == ["study.yaml"]
    broken = subprocess.run([*command, "--set", "search.trial=3"], capture_output=True, text=True, timeout=120)
    assert broken.returncode == 2
    assert "search.trials" in broken.stderr
