"""Studies side by side: what differs is named, and scores that were not measured alike are not held together."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from rich.console import Console

from raytune_autotuner import cli
from raytune_autotuner.report.compare import Comparison, compare, comparison_page, terminal_table
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.errors import WRONG_USE, ConfigError
from tests.report_samples import failed, make_study, sample_rows, verified_rows
from tests.study_folders import VERSIONS, make_folder, whole_study
from tests.test_html import HOSTILE, Elements, figures_of, painted


def two(parent: Path, versions: dict[str, Any] | None = None, **changes: Any) -> Comparison:
    """A study, and the same with `changes` and other `versions`."""
    first = make_folder(parent, verified_rows(), make_study(study="one"))
    second = make_folder(parent, sample_rows(), make_study(**{"study": "other", **changes}))
    second.write_versions({**VERSIONS, **(versions or {})})
    return compare([first, second])


def printed(comparison: Comparison, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False).print(terminal_table(comparison))
    return out.getvalue()


def differing(comparison: Comparison) -> dict[tuple[str, str], tuple[str, ...]]:
    return {(one.about, one.name): one.values for one in comparison.differences}


def test_another_gpu_engine_and_model_are_named(tmp_path: Path) -> None:
    versions = {"engine": {"vllm": "0.33.0"}, "machine": {"processor": "Xeon"}, "cluster": "1 node: 8 CPUs, 1 GPUs"}
    found = differing(two(tmp_path, versions, model="org/other"))
    assert found["model", "model"] == ("bundled:smollm2-135m-instruct", "org/other")
    assert found["engine", "vllm"] == ("0.32.0", "0.33.0")
    assert found["engine", "torch"] == ("2.13.0", "-")
    assert found["hardware", "processor"] == ("EPYC", "Xeon")
    assert found["hardware", "cluster"][1] == "1 node: 8 CPUs, 1 GPUs"


def test_scores_under_another_load_or_objective_are_not_held_together(tmp_path: Path) -> None:
    assert two(tmp_path / "a").comparable
    load = two(tmp_path / "b", workload={"concurrency": 32})
    assert not load.comparable
    assert "workload concurrency" in load.caution
    goal = two(tmp_path / "c", objective={"minimize": "ttft_ms_p90"})
    assert "objective score" in goal.caution
    assert "The studies have different objectives." in Elements(comparison_page(goal)).text


def test_goodput_under_another_slo_is_another_figure_and_throughput_is_not(tmp_path: Path) -> None:
    def under(metric: str, limit: float) -> ResultsFolder:
        objective = {"maximize": metric, "slo": {"ttft_ms": {"mean": limit}}}
        return make_folder(tmp_path, sample_rows(), make_study(study=f"{metric}-{limit:g}", objective=objective))

    found = compare([under("goodput_rps", 100), under("goodput_rps", 5000)])
    assert not found.comparable
    assert "objective slo" in found.caution
    assert compare([under("output_throughput_tok_s", 100), under("output_throughput_tok_s", 5000)]).comparable


def test_the_terminal_says_what_each_came_to_and_what_differs(tmp_path: Path) -> None:
    text = printed(two(tmp_path, search={"trials": 7}))
    assert "one" in text
    assert "+40.0 %" in text
    assert "Run trial 2" in text
    assert [line.split() for line in text.splitlines() if "trials" in line][-1] == ["search", "trials", "12", "7"]


def test_two_equal_studies_differ_in_nothing_and_are_told_apart_by_their_runs(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / name, verified_rows()) for name in ("a", "b")]
    comparison = compare(folders)
    assert len(set(comparison.names)) == 2
    assert comparison.differences == ()
    assert "are the same" in printed(comparison)


def test_the_page_has_every_chart_and_both_launch_lines(tmp_path: Path) -> None:
    other = whole_study(tmp_path, 8, make_study(study="two", workload={"concurrency": [4, 16]}))
    page = comparison_page(compare([whole_study(tmp_path, 6), other]))
    figures = figures_of(page)
    assert set(figures) == {"scores", "progress", "curves"}
    for figure in figures.values():
        assert len(go.Figure(painted(figure)).data) > 0
    assert Elements(page).text.count("vllm serve the-model --max-num-seqs 11") == 2


def test_a_study_in_which_nothing_was_measured_stands_beside_others(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path, verified_rows()), make_folder(tmp_path, [failed(0)], make_study(study="failing"))]
    comparison = compare(folders)
    assert "Nothing was measured" in printed(comparison)
    assert "Nothing was measured" in Elements(comparison_page(comparison)).text


def test_hostile_values_are_text_on_this_page_too(tmp_path: Path) -> None:
    elements = Elements(comparison_page(two(tmp_path, model=f"/{HOSTILE}")))
    assert not elements.named("img")
    assert len(elements.named("script")) == 3


def test_one_study_or_the_same_twice_is_no_comparison(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, sample_rows())
    with pytest.raises(ConfigError, match="two results folders or more"):
        compare([folder])
    with pytest.raises(ConfigError, match="stands there twice"):
        compare([folder, ResultsFolder.open(folder.path)])


def test_the_command_prints_a_table_or_json_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(one.folder.path) for one in two(tmp_path).studies]
    page = tmp_path / "compared.html"
    assert cli.main(["compare", *paths, "--output", str(page)]) == 0
    assert "baseline" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert cli.main(["compare", *paths, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["study"] for one in told["studies"]] == ["one", "other"]
    assert told["studies"][0]["gain"] == pytest.approx(0.4, abs=0.01)
    assert told["comparable"] is True


def test_a_page_that_cannot_be_written_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(one.folder.path) for one in two(tmp_path).studies]
    assert cli.main(["compare", *paths, "--output", str(tmp_path / "no" / "such.html")]) == WRONG_USE
    assert "--output" in capsys.readouterr().err
