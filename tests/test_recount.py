"""A run's figures once more, from the requests of its trials: what the report shows, and what it says is wrong."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.cli import main
from raytune_autotuner.report.html.evidence import gather
from raytune_autotuner.report.results import ResultsFolder, write_result
from raytune_autotuner.report.verdict import study_verdict
from raytune_autotuner.score.objective import metrics_of_requests
from raytune_autotuner.score.records import RequestRecord
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from tests.report_samples import METRIC, make_study
from tests.study_folders import whole_study


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    made = whole_study(tmp_path, 5)
    made.write_verdict(study_verdict(made.load_study(), made.read_rows()))
    return made


def tamper(folder: ResultsFolder, number: int, **metrics: float) -> None:
    """Write other figures of a trial into the table, its score with them."""
    rows = [_other(row, metrics) if row.number == number else row for row in folder.read_rows()]
    folder.write_rows(rows)


def _other(row: TrialRow, metrics: dict[str, float]) -> TrialRow:
    result = replace(row.result, metrics={**row.result.metrics, **metrics})
    score = metrics.get(METRIC, row.score)
    return replace(row, result=result, score=score, scores=() if score is None else (score,))


def test_a_table_that_says_what_the_requests_do_is_believed(folder: ResultsFolder) -> None:
    evidence = gather(folder)
    assert evidence.notes == ()
    assert evidence.counted == 4 + 9  # one of five trials has failed
    assert evidence.rows == tuple(folder.read_rows())


def test_a_table_that_is_older_than_the_counts_of_samples_is_believed(folder: ResultsFolder) -> None:
    counts = ("tpot_samples", "itl_samples")
    old = [
        replace(
            row,
            result=replace(
                row.result,
                metrics={name: value for name, value in row.result.metrics.items() if not name.startswith(counts)},
            ),
        )
        for row in folder.read_rows()
    ]
    assert old != folder.read_rows()
    folder.write_rows(old)
    assert gather(folder).notes == ()


def test_a_figure_that_the_requests_do_not_give_is_named_and_not_shown(folder: ResultsFolder) -> None:
    before = gather(folder)
    tamper(folder, 3, **{METRIC: 900.0, "ttft_ms_p90@c4": 0.5, "requests": 7.0, "drift": 0.1})
    evidence = gather(folder)
    assert evidence.rows == before.rows
    (note,) = evidence.notes
    assert note.startswith("Trial 3: the table (trials.jsonl) says score 900, not ")
    assert note.endswith(" and 3 more; its requests are believed.")


def test_a_verdict_that_the_restarts_do_not_give_is_named_and_not_shown(folder: ResultsFolder) -> None:
    before = gather(folder)
    restart = next(row for row in folder.read_rows() if row.verifies == 3)
    tamper(folder, restart.number, **{METRIC: 9000.0})
    folder.write_verdict(study_verdict(folder.load_study(), folder.read_rows()))
    evidence = gather(folder)
    assert evidence.answer == before.answer
    assert evidence.notes[-1].startswith("verdict.json says otherwise than the figures do: ")


def test_requests_that_are_gone_or_broken_are_named_and_the_table_stands_in(
    folder: ResultsFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, left in ((0, None), (2, b"PAR1 and no more")):
        path = folder.find_trial_dir(number) / "requests.parquet"
        path.unlink()
        if left:
            path.write_bytes(left)
    folder.csv_file.unlink()
    folder.parquet_file.unlink()
    assert gather(folder).rows == tuple(folder.read_rows())
    assert main(["report", str(folder.path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{folder.path / 'report.html'}\n"
    assert said.err == (
        "No requests that can be read (requests.parquet) are left of trials 0, 2: these figures are the table's.\n"
    )
    assert said.err.strip() in html.unescape((folder.path / "report.html").read_text())


def test_a_table_that_is_gone_is_made_up_for_by_what_the_trials_left(folder: ResultsFolder) -> None:
    for row in folder.read_rows():
        folder.add_suggestion(replace(row, state=State.PENDING, result=TrialResult(), score=None, scores=()))
        write_result(folder.trial_dir(row.number, row.trial_id), row.result)
    before = gather(folder)
    folder.rows_file.unlink()
    after = gather(folder)
    assert [(row.state, row.score) for row in after.rows] == [(row.state, row.score) for row in before.rows]
    assert (after.answer.sentence, after.notes) == (before.answer.sentence, ())


def test_a_line_of_the_table_that_is_no_row_is_named(folder: ResultsFolder) -> None:
    folder.rows_file.write_text(folder.rows_file.read_text() + '{"number": 7, and no more\n')
    with pytest.raises(ConfigError, match=r"trials.jsonl, line 15: is no trial's row: Expecting"):
        gather(folder)


def test_what_requests_do_not_tell_is_the_tables(folder: ResultsFolder) -> None:
    own = {"energy_j_per_token": 0.5, "perplexity": 12.0, "preemptions@c4": 3.0, "cost_per_million_tokens": 0.7}
    tamper(folder, 3, **own)
    evidence = gather(folder)
    assert evidence.notes == ()
    assert own.items() <= evidence.rows[3].result.metrics.items()


def test_the_highest_load_is_also_found_among_levels_that_were_tried_between_two_others() -> None:
    goal = {"maximize": "max_load_under_slo", "slo": {"ttft_ms": {"mean": 100.0}}}
    study = make_study(workload={"concurrency": [4, 16]}, objective=goal)
    ttft_ms = {"c4": 50.0, "c16": 400.0, "c10": 90.0, "c13": 120.0, "c11": 99.0}
    requests = {label: [_answered(label, value / 1e3)] for label, value in ttft_ms.items()}
    metrics = metrics_of_requests(study, requests, 1.0)
    assert metrics["max_load_under_slo"] == 11.0
    assert not any(name.endswith(("@c10", "@c11", "@c13")) for name in metrics)


def _answered(level: str, ttft_s: float) -> RequestRecord:
    times = (ttft_s, ttft_s + 0.1)
    return RequestRecord(0, level, 0, "measure", 0.0, 0.0, ttft_s, times[-1], times, 8, 2, 2)


def test_a_results_price_can_be_computed_again_once_it_says_what_was_paid_for(folder: ResultsFolder) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in folder.rows_file.read_text().splitlines()]
    assert all("paid_for" not in line["result"] for line in lines)  # as earlier versions wrote it
    study = folder.load_study()
    priced = study.model_copy(update={"resources": study.resources.model_copy(update={"price_per_hour": 3.6})})
    requests = {"c4": [_answered("c4", 0.1)], "c16": [_answered("c16", 0.1)]}
    one, two = (metrics_of_requests(priced, requests, held)["cost_per_million_tokens"] for held in (1.0, 2.0))
    assert [one, two] == pytest.approx([100.0, 200.0])  # 0.2 s for 2 tokens at 0.001 a second
