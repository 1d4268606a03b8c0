from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pa_parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.report.best import write_best
from raytune_autotuner.report.html.evidence import gather
from raytune_autotuner.report.progress import time_left_s, time_left_text, times_left_s, verification_progress
from raytune_autotuner.report.recount import broken_files
from raytune_autotuner.report.results import ResultsFolder, flat_row, read_result, write_result
from raytune_autotuner.report.sparing import Sparing
from raytune_autotuner.report.status import LiveTrial, StudyStatus, read_status, write_status
from raytune_autotuner.report.summary import failure_lines, render_status, summarize
from raytune_autotuner.report.verdict import study_verdict
from raytune_autotuner.report.writing import write_json, write_text
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.masking import assignment, mask, mask_line, mask_values
from raytune_autotuner.study.trial import State, TrialResult, TrialRow
from tests.report_samples import (
    BASE,
    METRIC,
    NO_MEMORY,
    again,
    failed,
    make_study,
    measured,
    running,
    sample_rows,
    setting,
    verified,
    verified_rows,
)


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    return ResultsFolder.create(tmp_path / "results", make_study())


# The folder


def test_two_runs_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    runs = [ResultsFolder.create(tmp_path, make_study()) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert ResultsFolder.runs(tmp_path, "sample") == runs
    assert ResultsFolder.runs(tmp_path, "other") == []


def test_the_study_is_read_back_as_it_was_run(folder: ResultsFolder) -> None:
    assert folder.load_study() == make_study()


def test_a_study_with_every_kind_of_value_is_read_back(tmp_path: Path) -> None:
    shared = {"a": [1, 2]}
    study = make_study(
        search_space={
            "x": {"float": [0.5, 0.9], "step": 0.1, "when": "c == 'yes'"},
            "c": {"choice": ["yes", "no", "0123", "null", 1.0, None, shared, [shared]]},
        },
        constraints=[],
        engine={"args": {"one": shared, "two": shared, "none": None, "text": "a: b # c", "on": "off"}},
        workload={"traffic": "U(8,64)/(4,16)", "request_rate_rps": [0.5, 2], "rounds": 3},
        objective={"minimize": "ttft_ms_p90"},
        search={"trials": 3, "time_budget": "1h 30m", "points": [{"c": "0123"}, {"c": shared}]},
        penalty={"grade": "elapsed"},
    )
    assert ResultsFolder.create(tmp_path, study).load_study() == study


def test_a_secret_of_the_study_is_not_written(tmp_path: Path) -> None:
    study = make_study(engine={"args": {}, "env": {"HF_TOKEN": "not-a-known-look", "VLLM_A": "b"}}, constraints=[])
    text = ResultsFolder.create(tmp_path, study).study_file.read_text()
    assert "not-a-known-look" not in text
    assert "HF_TOKEN: '***'" in text


def test_opening_finds_the_run_again(folder: ResultsFolder) -> None:
    assert ResultsFolder.open(folder.path) == folder


def test_opening_the_parent_names_the_newest_run_in_it(folder: ResultsFolder) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean {folder.path}"):
        ResultsFolder.open(folder.path.parent)


@pytest.mark.parametrize(("name", "message"), [("missing", "no such folder"), ("file", "not a results folder")])
def test_what_is_no_results_folder_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=message):
        ResultsFolder.open(tmp_path / name)


def test_a_parent_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to: Not a directory"):
        ResultsFolder.create(tmp_path / "file" / "results", make_study())


def test_an_unknown_trial_is_answered_with_those_there_are(folder: ResultsFolder) -> None:
    with pytest.raises(ConfigError, match="No trial has started yet"):
        folder.find_trial_dir(3)
    for number in (0, 1, 12):
        folder.trial_dir(number, f"x_{number}").mkdir()
    assert folder.find_trial_dir(1).name == "1-x_1"
    with pytest.raises(ConfigError, match=r"no trial 3. It has trials 0 to 12"):
        folder.find_trial_dir(3)


# The results table


def test_rows_are_read_back_exactly(folder: ResultsFolder) -> None:
    lost = replace(failed(5, setting(4)), state=State.LOST, violation=None, penalty=None, retry_of=2)
    rows = [*sample_rows(), lost, replace(running(6, setting(2)), state=State.INTERRUPTED)]
    folder.write_rows(rows[::-1])
    assert folder.read_rows() == rows


def test_before_the_first_trial_there_are_no_rows(folder: ResultsFolder) -> None:
    assert folder.read_rows() == []
    folder.write_rows([])
    assert folder.read_rows() == []


def test_the_table_has_a_row_a_trial_with_typed_columns(folder: ResultsFolder) -> None:
    folder.write_rows(sample_rows())
    table = pa_parquet.read_table(folder.parquet_file)
    assert table.num_rows == 5
    assert {str(table.schema.field(name).type) for name in ("param:max-num-seqs", "param:block-size")} == {"int64"}
    assert str(table.schema.field("param:enable-prefix-caching").type) == "bool"
    assert str(table.schema.field("score").type) == "double"
    rows = table.to_pylist()
    assert (rows[1]["state"], rows[1]["stage"], rows[1]["kind"]) == ("failed", "kv-cache", "out-of-memory")
    assert (rows[1]["penalty"], rows[1]["score"]) == (1.45, None)
    assert (rows[2]["score"], rows[2]["penalty"]) == (143.0, None)
    assert rows[2][f"{METRIC}@c16"] == pytest.approx(157.3)
    assert rows[2]["seconds:start"] == 43.2


def test_the_text_table_says_the_same_as_the_typed_one(folder: ResultsFolder) -> None:
    import pandas as pd

    folder.write_rows(sample_rows())
    typed, text = pd.read_parquet(folder.parquet_file), pd.read_csv(folder.csv_file)
    assert list(text.columns) == list(typed.columns)
    assert text["evidence"][1] == NO_MEMORY.evidence
    assert text["score"].dropna().tolist() == typed["score"].dropna().tolist()


def test_a_parameter_of_mixed_types_becomes_a_text_column(folder: ResultsFolder) -> None:
    values: list[Any] = [1, "auto", True, 2.5, {"a": 1}, [1, 2], 2**70]
    folder.write_rows([measured(i, 1.0, {"x": value}) for i, value in enumerate(values)])
    assert [row.params["x"] for row in folder.read_rows()] == values
    column = pa_parquet.read_table(folder.parquet_file)["param:x"].to_pylist()
    assert column == ["1", "auto", "true", "2.5", '{"a": 1}', "[1, 2]", str(2**70)]


_NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
_VALUES = st.one_of(st.integers(), _NUMBERS, st.booleans(), st.text(), st.lists(st.integers()))


@given(
    st.dictionaries(st.text(min_size=1), _VALUES),
    st.dictionaries(st.text(min_size=1), _NUMBERS),
    st.one_of(st.none(), _NUMBERS),
)
def test_any_row_survives_json(params: dict[str, Any], metrics: dict[str, float], score: float | None) -> None:
    row = TrialRow(1, "id", "", params, State.MEASURED, TrialResult(metrics), score=score)
    assert TrialRow.from_dict(json.loads(json.dumps(row.to_dict(), allow_nan=False))) == row


def test_a_driver_killed_while_writing_leaves_the_rows_before_it(folder: ResultsFolder) -> None:
    folder.write_rows(sample_rows()[:2])
    script = (
        "import os, sys\nfrom pathlib import Path\n"
        "from raytune_autotuner.report.writing import atomically\n"
        f"with atomically(Path({str(folder.rows_file)!r})) as part:\n"
        "    part.write_text('half a li')\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert folder.read_rows() == sample_rows()[:2]


def test_trials_are_put_down_as_they_end_and_half_a_line_is_none(folder: ResultsFolder) -> None:
    rows = sample_rows()
    for row in (rows[1], rows[0], rows[3]):
        folder.add_row(row)
    with folder.rows_file.open("a") as file:
        file.write('{"number": 2, "trial')
    assert folder.read_rows() == [rows[0], rows[1], rows[3]]


def test_a_trial_that_has_not_ended_is_told_as_it_was_suggested(folder: ResultsFolder) -> None:
    suggested = replace(running(1, setting(8)), state=State.PENDING)
    folder.add_suggestion(suggested)
    assert folder.read_rows() == [suggested]
    folder.add_row(measured(0, 100.0))
    write_status(folder, replace(StudyStatus.begin(1), live=(LiveTrial(1, Stage.WEIGHTS, 0.4, 21.0, 600.0),)))
    assert "1 of 12 trials (1 running, 1 measured)" in render_status(summarize(folder))
    folder.add_row(measured(1, 90.0, setting(8)))
    assert folder.read_rows() == [measured(0, 100.0), measured(1, 90.0, setting(8))]


def test_a_full_disk_leaves_the_trials_that_there_were(folder: ResultsFolder) -> None:
    folder.add_row(measured(0, 100.0))
    size, limits = folder.rows_file.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))  # the first ten bytes of the line still fit
    try:
        with pytest.raises(OSError, match="too large"):
            folder.add_row(measured(1, 90.0, setting(8)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folder.rows_file.stat().st_size == size
    assert folder.read_rows() == [measured(0, 100.0)]


def test_what_costs_much_is_done_seldom() -> None:
    clock, times = [0.0], list[float]()

    def act() -> None:
        times.append(clock[0])
        clock[0] += 1.0

    sparing = Sparing(act, lambda: clock[0])
    while clock[0] < 100:
        sparing()
        clock[0] += 0.5
    assert times == [0.0, 20.0, 40.0, 60.0, 80.0]


def test_an_error_while_writing_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_text_that_no_encoding_takes_does_not_end_a_study(folder: ResultsFolder) -> None:
    folder.write_rows([failed(0, setting(4), replace(NO_MEMORY, evidence="half \ud800"))])
    assert folder.read_rows()[0].result.failure == replace(NO_MEMORY, evidence="half \ud800")
    assert "half ?" in folder.csv_file.read_text()


def test_a_trials_result_is_read_back(tmp_path: Path) -> None:
    result = TrialResult({"ttft_ms_p90": 12.5}, NO_MEMORY, {"total": 3.0})
    assert read_result(tmp_path) is None
    write_result(tmp_path, result)
    assert read_result(tmp_path) == result


def test_restarts_are_told_from_trials_of_the_search(folder: ResultsFolder) -> None:
    folder.write_rows(verified_rows())
    assert folder.read_rows() == verified_rows()
    table = pa_parquet.read_table(folder.parquet_file)
    assert {str(table.schema.field(name).type) for name in ("verifies", "restart")} == {"int64"}
    rows = table.to_pylist()
    assert [(row["verifies"], row["restart"]) for row in rows[2:6]] == [(None, None), (0, 0), (2, 0), (3, 0)]
    assert not any(name.startswith("score:") for name in table.column_names)


def test_several_objectives_have_a_column_each(tmp_path: Path) -> None:
    folder = ResultsFolder.create(tmp_path, make_study(objective={"maximize": METRIC, "minimize": "ttft_ms_p90"}))
    folder.write_rows([replace(measured(0, 100.0), scores=(100.0, 50.0)), failed(1, setting(4))])
    rows = pa_parquet.read_table(folder.parquet_file).to_pylist()
    assert [(row["score"], row[f"score:{METRIC}"], row["score:ttft_ms_p90"]) for row in rows] == [
        (100.0, 100.0, 50.0),
        (None, None, None),
    ]


def test_columns_never_take_a_penalty_for_a_measurement() -> None:
    for row in sample_rows():
        cells = flat_row(row)
        assert cells["score"] is None or cells["penalty"] is None


# Best and launch

ANSWERED = (sample_rows()[2], study_verdict(make_study(), sample_rows()[:3]))


def test_the_winner_is_left_as_an_engine_configuration(folder: ResultsFolder) -> None:
    study, rows = make_study(), sample_rows()
    write_best(folder, study, rows[2], study_verdict(study, rows[:3]), "/models/m", "A=1 vllm serve /models/m")
    text = folder.best_file.read_text()
    assert yaml.safe_load(text) == {
        "model": "/models/m",
        "max-model-len": 2048,
        "max-num-seqs": 16,
        "block-size": 64,
        "enable-prefix-caching": False,
    }
    assert f"{METRIC} 143, baseline 100 (one measurement each)" in text
    assert "#   VLLM_CPU_OMP_THREADS_BIND=0-1" in text
    assert "trial 2" in text


def test_what_the_winner_was_worth_when_measured_again_stands_above_it(folder: ResultsFolder) -> None:
    study, rows = make_study(), verified_rows()
    answer = study_verdict(study, rows)
    write_best(folder, study, rows[1], answer, "m", "vllm serve m")
    text = folder.best_file.read_text()
    assert f"# {METRIC} 140, baseline 100: +40.0 % (95 % interval +38.7 to +41.3 %); means of 5 restarts, noise" in text
    assert "one measurement" not in text
    assert text.splitlines()[2] in folder.launch_file.read_text()


def test_that_the_defaults_are_kept_stands_above_them_in_both_files(folder: ResultsFolder) -> None:
    rows = verified([measured(0, 100.0), measured(1, 120.0, setting(16))], {0: BASE, 1: (90.0, 99.0, 108.0)})
    answer = study_verdict(make_study(), rows)
    write_best(folder, make_study(), rows[0], answer, "m", "vllm serve m")
    for file in (folder.best_file, folder.launch_file):
        assert f"# Verdict: {answer.sentence} {answer.warning}\n" in file.read_text()
    assert answer.sentence.startswith("No significant gain: keep the defaults.")


def test_the_verdict_is_left_for_programs_without_secrets(folder: ResultsFolder) -> None:
    assert folder.read_verdict() is None
    answer = study_verdict(make_study(), verified_rows())
    assert answer.winner is not None
    folder.write_verdict(replace(answer, winner=replace(answer.winner, params={"hf-token": "hf_0123456789abc"})))
    told = folder.read_verdict()
    assert told is not None
    assert (told["verified"], told["params"]) == (True, {"hf-token": "***"})


def test_the_launch_script_runs_the_line_with_its_variables(folder: ResultsFolder) -> None:
    show = f"{shlex.quote(sys.executable)} -c 'import os, sys; print(os.environ[\"A\"], sys.argv[1:])' 'two words'"
    write_best(folder, make_study(), *ANSWERED, "m", f"A='x y' {show}")
    run = subprocess.run([folder.launch_file, "--more", "$HOME"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "x y ['two words', '--more', '$HOME']"


def test_the_launch_script_takes_a_secret_from_the_environment(folder: ResultsFolder) -> None:
    token = assignment("HF_TOKEN", "hf_0123456789abc")
    write_best(folder, make_study(), *ANSWERED, "m", f"{token} bash -c 'echo $HF_TOKEN'")
    assert "hf_0123456789abc" not in folder.launch_file.read_text()
    environment = {**os.environ, "HF_TOKEN": "mine"}
    run = subprocess.run([folder.launch_file], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "mine"


# Secrets


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("token hf_abcdefghijk used", "token *** used"),
        ("HF_TOKEN=abc def", "HF_TOKEN=*** def"),
        ("export AWS_SECRET_ACCESS_KEY='a b' x", "export AWS_SECRET_ACCESS_KEY='***' x"),
        ('{"VLLM_API_KEY": "abc"}', '{"VLLM_API_KEY": "***"}'),
        ("'api_key': ['abc'], 'max_tokens': 128", "'api_key': ['***'], 'max_tokens': 128"),
        ("--api-key abc serve", "--api-key *** serve"),
        (
            "['--hf-token', 'abc', '--max-num-batched-tokens', '256']",
            "['--hf-token', '***', '--max-num-batched-tokens', '256']",
        ),
        ("hf_overrides={}, 'hf_token': 'abc'", "hf_overrides={}, 'hf_token': '***'"),
        ("login with token=abcdef ok", "login with token=*** ok"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer ***"),
        ("https://me:pw@host/x", "https://me:***@host/x"),
        ("https://me@example.com:pw@proxy:3128 x@y", "https://me@example.com:***@proxy:3128 x@y"),
        ("http://me:p@ss@host:80/x@y", "http://me:***@host:80/x@y"),
        ('["http://me:pw@host","a@b"]', '["http://me:***@host","a@b"]'),
        ("http://[::1]:8000/x@y", "http://[::1]:8000/x@y"),
        ("docker://me@reg.io:5000@sha256:abcd", "docker://me@reg.io:5000@sha256:abcd"),
        ("http://me:5000@host/x", "http://me:***@host/x"),
        ("Namespace(api_key=['a-1', 'd-2','e'], keys=['f'])", "Namespace(api_key=['***'], keys=['f'])"),
        ("api_key=a-1, other=b", "api_key=***, other=b"),
        ("my_model_HF_TOKEN_2=abc X-Api-Key: abc", "my_model_HF_TOKEN_2=*** X-Api-Key: ***"),
        ("TOKENIZERS_PARALLELISM=false", "TOKENIZERS_PARALLELISM=false"),
        ("max-num-batched-tokens: 256, eos_token_id=2", "max-num-batched-tokens: 256, eos_token_id=2"),
        ("bos_token: '<s>' unknown key: foo", "bos_token: '<s>' unknown key: foo"),
    ],
)
def test_secrets_are_masked_and_nothing_else(text: str, masked: str) -> None:
    assert mask(text, env={}) == masked


def test_the_value_of_a_secret_variable_is_masked_wherever_it_stands() -> None:
    env = {"MY_TOKEN": "plain-looking", "HOME": "/home/someone", "SHORT_KEY": "1"}
    assert mask("in plain-looking text of /home/someone 1", env) == "in *** text of /home/someone 1"


def test_each_line_of_a_secret_and_each_urls_password_is_one() -> None:
    env = {
        "TLS_KEY": "first-line-of-it\n  second-line\nlast\n",
        "INDEXES": "http://u:passwordA@a/s http://u:passwordB@b/s",
    }
    said = mask("first-line-of-it, second-line, last, passwordA, passwordB", env)
    assert said == "***, ***, last, ***, ***"


RUNS = ("_", "A_", "KEY_", "my_", "a-", "a.a-", "-key", "eyJ-", "sk-", "a+", "a://", "a:b@", "KEY='")


@pytest.mark.parametrize("run", RUNS)
def test_a_long_run_of_what_may_be_part_of_a_secrets_name_hides_none(run: str) -> None:
    filler = run * (100_000 // len(run))  # a search that tried each start against each end would take minutes
    said = mask(f"key {filler} HF_TOKEN=abcdef", env={})
    assert "abcdef" not in said


@pytest.mark.parametrize("form", [str, json.dumps, repr, shlex.quote, quote], ids=lambda form: form.__name__)
def test_a_known_secret_is_found_in_every_form_in_which_it_is_written(form: Callable[[str], str]) -> None:
    secret = """pa"ss 'wörd\\/&"""
    said = mask(f"it is {form(secret)} indeed", {"DB_PASSWORD": secret})
    assert "ss" not in said
    assert "rd" not in said


def test_values_under_telling_keys_are_masked_at_any_depth() -> None:
    before = {"env": {"API_KEY": "x", "n": 2}, "argv": ["--hf-token", "hf_0123456789"], "max_tokens": 5}
    assert mask_values(before) == {"env": {"API_KEY": "***", "n": 2}, "argv": ["--hf-token", "***"], "max_tokens": 5}


def test_a_secret_variable_is_assigned_from_the_environment_and_stays_so() -> None:
    assert assignment("OPENAI_API_KEY", "x 'y") == 'OPENAI_API_KEY="$OPENAI_API_KEY"'
    assert (
        mask('A=1 OPENAI_API_KEY="$OPENAI_API_KEY" vllm serve m') == 'A=1 OPENAI_API_KEY="$OPENAI_API_KEY" vllm serve m'
    )


# Status


def test_the_status_is_read_back_and_knows_its_driver(folder: ResultsFolder) -> None:
    assert read_status(folder) is None
    live = (LiveTrial(4, Stage.WEIGHTS, 0.4, 12.5, 600.0, {METRIC: 1.0}),)
    status = replace(StudyStatus.begin(2), live=live)
    write_status(folder, status)
    assert read_status(folder) == status
    assert status.driver_alive
    later = json.loads(folder.status_file.read_text())
    write_json(folder.status_file, {**later, "news": 1, "live": [{**later["live"][0], "news": 1}]})
    assert (read_status(folder), broken_files(folder)) == (status, [])
    assert not replace(status, phase="finished").driver_alive
    assert not replace(status, pid_started=status.pid_started + 1).driver_alive
    assert not replace(status, host="elsewhere", updated_at=status.updated_at - 3600).driver_alive


def test_a_running_study_is_told_from_its_files(folder: ResultsFolder) -> None:
    folder.write_rows(sample_rows())
    status = replace(StudyStatus.begin(1), live=(LiveTrial(4, Stage.WEIGHTS, 0.4, 21.0, 600.0),))
    write_status(folder, status)
    text = render_status(summarize(folder))
    assert "4 of 12 trials (1 running, 3 measured, 1 failed), about" in text
    assert "trial 4 at weights 40%, 21.0 s / 600 s {max-num-seqs: 8" in text
    assert f"best so far: trial 2 with {METRIC} 143 (x1.43 of the baseline)" in text
    assert "out-of-memory x1 (trial 1): Lower gpu-memory-utilization." in text


def test_a_killed_study_is_told_as_killed_with_its_verdict(folder: ResultsFolder) -> None:
    folder.write_rows(sample_rows())
    ran_then = (LiveTrial(2, Stage.LOAD, 0.99), LiveTrial(4, Stage.WEIGHTS))
    write_status(folder, replace(StudyStatus.begin(1), pid_started=1, live=ran_then))
    text = render_status(summarize(folder))
    assert "killed after 0 s: 4 of 12 trials (1 running, 3 measured, 1 failed)" in text
    assert "Run trial 2" in text


def test_a_verification_is_told_from_the_search(folder: ResultsFolder) -> None:
    rows = verified_rows()[:8]
    rows.append(replace(running(9, setting(32, 64)), verifies=3, restart=1))
    folder.write_rows(rows)
    write_status(folder, replace(StudyStatus.begin(1), live=(LiveTrial(9, Stage.WEIGHTS, 0.4, 21.0, 600.0),)))
    text = render_status(summarize(folder))
    assert "3 of 12 trials (3 measured), 5 of 15 restarts to verify, about" in text
    assert "trial 9 at weights 40%, 21.0 s / 600 s verify trial 3, 2 of 5, {max-num-seqs: 32" in text
    assert "best so far: trial 2" in text


def test_an_ended_study_is_told_by_the_verdict_that_it_wrote(folder: ResultsFolder) -> None:
    folder.write_rows(verified_rows())
    answer = study_verdict(make_study(), verified_rows())
    folder.write_verdict(replace(answer, sentence="As it was said then.", warning="And warned."))
    write_status(folder, replace(StudyStatus.begin(1), phase="finished"))
    assert "As it was said then. And warned." in render_status(summarize(folder))


def test_what_is_broken_is_done_without_or_named_and_never_a_traceback(folder: ResultsFolder) -> None:
    def break_it(path: Path, text: str = '{"phase": "fini') -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    folder.write_rows(sample_rows()[:4])
    wrong_params = json.dumps({**running(4, {}).to_dict(), "params": 5})
    something_else = {"trials/5-e/result.json": '{"metrics": 7}', "trials/4-d/trial.json": wrong_params}
    without = ["verdict.json", "status.json", "versions.json", "trials/4-d/trial.json", "trials/5-e/result.json"]
    for name in without:
        break_it(folder.path / name)
    folder.add_suggestion(replace(running(5, setting(8)), trial_id="e"))
    for turn in range(3):  # no JSON, and the JSON of something else
        assert broken_files(folder) == [name for name in without if turn == 0 or name != "versions.json"]
        assert (folder.read_verdict(), read_status(folder), folder.read_versions()) == (None, None, {})
        assert read_result(folder.path / "trials/5-e") is None
        assert [row.number for row in folder.read_rows()] == [0, 1, 2, 3, 5]
        assert "Run trial 2" in gather(folder).answer.sentence
        for name in without:
            break_it(folder.path / name, something_else.get(name, "{}"))
        folder.add_suggestion(replace(running(5, setting(8)), trial_id="e"))
    for file in (folder.verifies_file, folder.rows_file):
        break_it(file, "{}\n")
        with pytest.raises(ConfigError, match=rf"{file.name}.*\nPut a copy of it back"):
            gather(folder)
        file.unlink()


def test_a_study_that_has_not_begun_is_told_too(folder: ResultsFolder) -> None:
    assert "not started: 0 of 12 trials (no trial yet)" in render_status(summarize(folder))


def test_the_status_for_programs_says_the_same(folder: ResultsFolder) -> None:
    folder.write_rows(sample_rows())
    write_status(folder, replace(StudyStatus.begin(1, 100.0), live=(LiveTrial(4, Stage.WEIGHTS, 0.4, 21.0, 600.0),)))
    found = json.loads(json.dumps(summarize(folder).to_dict()))
    assert (found["standing"], found["verdict"]) == ("running", None)
    assert found["trials"] == {"wanted": 12, "counted": 4, "running": 1, "measured": 3, "failed": 1}
    assert found["elapsed_s"] == pytest.approx(100, abs=5)
    assert found["time_left_s"] > 0
    assert (found["running"][0]["number"], found["running"][0]["stage"]) == (4, "weights")
    assert (found["best"]["number"], found["best"]["score"], found["best"]["metric"]) == (2, 143, METRIC)
    assert [(kind["kind"], kind["trials"]) for kind in found["failures"]] == [
        ("out-of-memory", [{"number": 1, "stage": "kv-cache"}])
    ]
    write_status(folder, replace(StudyStatus.begin(1), pid_started=1))
    found = summarize(folder).to_dict()
    assert (found["standing"], found["running"], found["time_left_s"]) == ("killed", [], None)
    assert "Run trial 2" in str(found["verdict"])


def test_failures_are_counted_by_kind_with_the_remedy() -> None:
    other = replace(NO_MEMORY, kind=NO_MEMORY.kind.HUNG, remedy="Wait.")
    rows = [*(failed(i, setting(4)) for i in range(10)), failed(10, setting(4), other)]
    first, second = failure_lines(rows)
    assert first == "out-of-memory x10 (trials 0, 1, 2, 3, 4, 5, 6, 7, ...): Lower gpu-memory-utilization."
    assert second == "hung x1 (trial 10): Wait."


def took(row: TrialRow, seconds: float) -> TrialRow:
    return replace(row, result=replace(row.result, seconds={"total": seconds}))


def test_the_time_left_follows_from_the_later_half_of_the_trials() -> None:
    study = make_study(verify={"top": 0})
    rows = [took(measured(i, 1.0, setting(4)), 10.0) for i in range(2)]
    rows += [took(measured(2, 1.0, setting(4)), 60.0), took(failed(3, setting(4)), 20.0)]
    assert time_left_s(study, [], {}, 1, 0.0) is None
    assert time_left_s(study, rows, {}, 1, 0.0) == pytest.approx(8 * 40)
    assert time_left_s(study, rows, {}, 1, 100.0 + 4 * 3.0) == pytest.approx(8 * (40 + 3))  # idle between trials
    live = {4: LiveTrial(4, Stage.LOAD, elapsed_s=30.0)}  # longer than the failed one took
    assert time_left_s(study, rows, live, 1, 0.0) == pytest.approx(30 + 7 * 40)
    assert time_left_s(study, rows, {}, 2, 0.0) == pytest.approx(8 * 40 / 2 + 40 / 4)
    assert time_left_s(study, [measured(i, 1.0, setting(4)) for i in range(12)], {}, 2, 0.0) == 0


def test_the_time_left_counts_the_restarts_of_the_finalists() -> None:
    study = make_study()
    rows = [measured(0, 1.0), *(measured(i, 1.0 + i, setting(4)) for i in range(1, 12))]
    assert time_left_s(study, rows, {}, 1, 0.0) == pytest.approx(15 * 70)
    assert time_left_s(study, [measured(i, 1.0, setting(4) if i else None) for i in range(12)], {}, 1, 0.0) == 0
    assert verification_progress(study, rows) == ""
    begun = [*rows, *(again(12 + i, rows[i % 2], i // 2, 1.0) for i in range(4))]
    live = {16: LiveTrial(16, Stage.LOAD, elapsed_s=35.0)}
    begun.append(replace(running(16, setting(4)), verifies=0, restart=2))
    assert time_left_s(study, begun, live, 1, 0.0) == pytest.approx(35 + 5 * 70)
    assert verification_progress(study, begun) == "4 of 10 restarts to verify"
    out = [*begun[:-1], again(16, rows[0], 2)]
    assert verification_progress(study, out) == "5 of 8 restarts to verify"


def test_while_nothing_beats_the_defaults_there_are_two_times_the_likely_one_first() -> None:
    study = make_study(verify={"top": 2, "restarts": 3})
    none = [measured(0, 100.0), *(measured(i, 50.0, setting(4)) for i in range(1, 8))]
    early, late = (times_left_s(study, none[:ended], {}, 1, 0.0) for ended in (3, 8))
    assert early[0] > early[1] == pytest.approx(9 * 70)
    # Of the 4 trials to come none wins with 330/495, one with 120/495, more with 45/495.
    assert late == pytest.approx((4 * 70, (4 + (1 + (120 + 2 * 45) / 165) * 3) * 70))
    assert time_left_text(early).endswith("left, or 10:30 if nothing beats the defaults")
    assert time_left_text(late).startswith("about 4:40 left, or ")


def test_once_something_beats_the_defaults_there_is_one_time_with_the_finalists_that_are_likely() -> None:
    study = make_study(verify={"top": 2, "restarts": 3})
    rows = [measured(0, 100.0), *(measured(i, 50.0 * i, setting(4)) for i in range(1, 4))]
    # Of the 8 trials to come none wins with 45/495: then one setting is measured again beside the baseline, else two.
    expected = 1 + (45 * 1 + 450 * 2) / 495
    assert times_left_s(study, rows, {}, 1, 0.0) == pytest.approx(((8 + expected * 3) * 70,))


def test_the_time_left_ends_with_the_time_budget() -> None:
    study = make_study(search={"trials": 100, "time_budget": "10m"})
    assert time_left_s(study, [measured(0, 1.0)], {}, 1, 570.0) == pytest.approx(30 + 70)


def test_the_room_starts_without_heavy_imports() -> None:
    heavy = "{'ray', 'optuna', 'pandas', 'pyarrow', 'tensorboard', 'tensorboardX', 'torch', 'numpy'}"
    modules = ("results", "terminal", "tensorboard", "logs", "summary")
    imports = "\n".join(f"import raytune_autotuner.report.{name}" for name in modules)
    script = f"import sys\n{imports}\nprint(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_launch_line_without_its_secrets_is_still_one_command() -> None:
    words = [
        "vllm",
        "serve",
        "m",
        "--chat-template",
        """{"a/passwd": "x'\\"'\\"'; touch owned #"}""",
        "--api-key",
        "abc",
    ]
    line = mask_line(f"A='x y' HF_TOKEN=abc {shlex.join(words)}")
    assert shlex.split(line)[:2] == ["A=x y", "HF_TOKEN=$HF_TOKEN"]
    kept = shlex.split(line)[2:]
    assert len(kept) == len(words)
    assert (kept[:4], kept[-2:]) == (words[:4], ["--api-key", "***"])
    assert mask_values({"launch": line}) == {"launch": line}
