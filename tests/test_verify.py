"""An earlier run's answer measured again: what is asked for, what it comes to, and whole runs of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner import cli
from raytune_autotuner.report.recheck import Claim, Gain, Recheck, claim_of, recheck
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.verdict import study_verdict
from raytune_autotuner.study.errors import WRONG_USE, ConfigError
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.trial import BASELINE, State, TrialResult, TrialRow
from raytune_autotuner.tune.verify import study_to_verify
from tests.report_samples import BASE, METRIC, again, failed, make_study, measured, setting, verified, verified_rows
from tests.searches import Search
from tests.studies import marks, write_study
from tests.study_folders import VERSIONS, make_folder

CLAIM = Claim("sample-run", 2, setting(16), (Gain(METRIC, 0.40, 0.36, 0.44, 0.95),), "Run trial 2.")
FORTY = (140.0, 137.0, 144.0, 138.0, 141.0)


def taken() -> list[TrialRow]:
    """The two settings of the earlier run, as a run that verifies it puts them down."""
    rows = [TrialRow(0, "earlier_0", BASELINE, {}, State.EARLIER, taken_from="baseline of sample-run")]
    return [*rows, TrialRow(1, "earlier_1", "", setting(16), State.EARLIER, taken_from=CLAIM.source)]


def judged(rows: list[TrialRow], claim: Claim = CLAIM) -> Recheck:
    return recheck(study_verdict(make_study(), rows), rows, claim)


def measured_again(baseline: tuple[float, ...], setting_: tuple[float, ...]) -> list[TrialRow]:
    return verified(taken(), {0: baseline, 1: setting_})


# What is claimed


def test_the_claim_is_the_gain_over_the_restarts_with_its_interval(tmp_path: Path) -> None:
    claim = claim_of(make_folder(tmp_path, verified_rows()))
    assert (claim.trial, claim.params) == (2, setting(16))
    (gain,) = claim.gains
    assert gain.low is not None
    assert gain.high is not None
    assert gain.low < 0.4 < gain.high
    assert "+40.0 % (95 % interval +3" in claim.then
    assert Claim.from_dict(json.loads(json.dumps(claim.to_dict()))) == claim


def test_another_trial_can_be_named_also_one_that_failed(tmp_path: Path) -> None:
    rows = [measured(0, 100.0), measured(1, 120.0, setting(8)), failed(2, setting(64))]
    folder = make_folder(tmp_path, rows)
    assert claim_of(folder, 1).then == "+20.0 % (one measurement each)"
    assert claim_of(folder, 2).then == "it failed (out-of-memory)"


@pytest.mark.parametrize(
    ("number", "why"),
    [(None, "the defaults are what it recommends"), (0, "every setting is held against"), (9, "no such trial")],
)
def test_where_there_is_nothing_to_verify_it_says_so(tmp_path: Path, number: int | None, why: str) -> None:
    folder = make_folder(tmp_path, [measured(0, 100.0), measured(1, 90.0, setting(8))])
    with pytest.raises(ConfigError, match=why):
        claim_of(folder, number)


def test_a_restart_is_no_setting_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a restart of trial 0; write --trial 0"):
        claim_of(make_folder(tmp_path, verified_rows()), 4)


# What became of it


def test_a_gain_that_is_found_again_holds() -> None:
    answer = judged(measured_again(BASE, FORTY))
    assert answer.holds is True
    assert answer.sentence.startswith("Holds: the setting of trial 2 of sample-run gives output_throughput_tok_s 140")
    assert answer.sentence.endswith("Then: +40.0 % (95 % interval +36.0 to +44.0 %).")


@pytest.mark.parametrize(
    ("factor", "word"), [(0.85, "The gain is smaller than it was."), (1.15, "The gain is larger than it was.")]
)
def test_a_gain_of_another_size_holds_and_that_is_said(factor: float, word: str) -> None:
    answer = judged(measured_again(BASE, tuple(factor * score for score in FORTY)))
    assert answer.holds is True
    assert word in answer.sentence


def test_a_gain_that_is_gone_does_not_hold_and_the_defaults_are_recommended() -> None:
    answer = judged(measured_again(BASE, (101.0, 96.5, 103.5, 98.0, 101.5)))
    assert answer.holds is False
    assert answer.keeps_defaults
    assert answer.sentence.startswith("Does not hold: ")


def test_noise_that_leaves_room_for_the_claim_is_no_answer() -> None:
    answer = judged(measured_again((100.0, 60.0, 140.0), (150.0, 130.0, 90.0)))
    assert answer.holds is None
    assert answer.sentence.startswith("Undecided: ")


def test_a_setting_that_fails_now_does_not_hold() -> None:
    rows = measured_again(BASE, ())
    answer = judged([*rows, again(len(rows), rows[1], 0)])
    assert answer.holds is False
    assert "failed when started again (out-of-memory in trial 7)" in answer.sentence


def test_defaults_that_fail_now_leave_a_setting_that_works() -> None:
    rows = measured_again((), FORTY)
    answer = judged([*rows, again(len(rows), rows[0], 0)])
    assert answer.holds is True
    assert answer.winner is not None
    assert answer.winner.number == 1
    assert "the defaults failed when started again" in answer.sentence


def test_where_both_fail_there_is_no_answer() -> None:
    rows = taken()
    answer = judged([*rows, again(2, rows[0], 0), again(3, rows[1], 0)])
    assert answer.holds is None
    assert answer.winner is None


def test_figures_of_then_are_never_taken_for_an_answer() -> None:
    answer = judged(taken())
    assert (answer.holds, answer.winner) == (None, None)
    assert answer.sentence.startswith("No answer: too little was measured.")


# What is asked for


def test_the_study_is_the_runs_with_the_one_setting_as_its_space(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, verified_rows())
    study, verifies = study_to_verify(folder, restarts=7, overrides=["workload.concurrency=4"])
    assert study.study == "sample-verify"
    assert study.space.size == 1
    assert set(study.space.by_name) == set(setting(16))
    assert (study.verify.top, study.verify.restarts, study.workload.concurrency) == (1, 7, (4,))
    assert study.objective == folder.load_study().objective
    assert verifies.claim.trial == 2


def test_what_would_make_another_question_of_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="verify takes the rest from the run"):
        study_to_verify(make_folder(tmp_path, verified_rows()), overrides=["objective.maximize=goodput_rps"])


def test_a_masked_secret_is_taken_from_the_environment_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = {"kind": "simulated", "env": {"HF_TOKEN": "hf_0123456789"}}
    folder = make_folder(tmp_path, verified_rows(), make_study(engine=engine, constraints=[]))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"engine.env.HF_TOKEN is a secret, and masked there; export HF_TOKEN"):
        study_to_verify(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    assert study_to_verify(folder)[0].engine.env["HF_TOKEN"] == "hf_abcdefgh"


def test_where_answers_are_judged_the_setting_waits_for_those_of_the_defaults(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"quality": {}, "verify": {"top": 1, "restarts": 2}}
    study = load_study(write_study(tmp_path, search_space={"max-num-seqs": {"choice": [64]}}, **changes))
    search = Search(study, tmp_path / "results", slots=2)
    search.reporter.take({}, search.defaults, "the baseline of RUN", BASELINE)
    search.reporter.take({"max-num-seqs": 64}, {"max-num-seqs": 64}, "trial 1 of RUN")
    search.begin()
    assert search.suggest("a")["reference"] is None
    assert search.suggest("b") is None
    search.end("a", 100.0)
    first = search.suggest("b")
    assert first["params"] == {"max-num-seqs": 64}
    assert first["reference"].answers == ("an answer",)
    search.end("b", 130.0)
    assert search.reporter.row("b").relative == 1.3
    assert not search.searcher.ot_study.trials


# Whole runs


def earlier(folder: Path, params: dict[str, Any], **changes: Any) -> ResultsFolder:
    """A finished run of a simulated engine that claims 30 % for `params`, as it would have left it."""
    base = {"engine": {"args": {"noise": 0.0, "speed": 4, "max-num-seqs": 2}}, "verify": {"top": 1, "restarts": 3}}
    study = load_study(write_study(folder, **{**base, **changes}))
    found = [
        replace(measured(number, score, values), result=TrialResult({METRIC: score}, None, {"total": 3.0}))
        for number, score, values in ((0, 100.0, None), (1, 130.0, params))
    ]
    run = make_folder(folder / "results", verified(found, {0: (100.0, 99.0, 101.0), 1: (130.0, 129.0, 131.0)}), study)
    run.write_versions({**VERSIONS, "engine": {"simulated": "0.0.1"}})
    return run


def command(run: ResultsFolder, *options: str) -> list[str]:
    return [sys.executable, "-m", "raytune_autotuner", "verify", str(run.path), *options]


def contents(run: ResultsFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def the_other(run: ResultsFolder) -> ResultsFolder:
    (found,) = [one for one in ResultsFolder.runs(run.path.parent) if one.path != run.path]
    return found


@pytest.mark.slow
def test_a_gain_is_verified_on_fresh_engines_through_ctrl_c_and_resume(tmp_path: Path, ray_address: str) -> None:
    slow: dict[str, Any] = {  # Seconds of waiting, so that a busy machine adds little to them.
        "engine": {"args": {"noise": 0.0, "speed": 1, "max-num-seqs": 2}},
        "workload": {"traffic": "D(32,32)", "requests": 32},
    }
    run = earlier(tmp_path, {"max-num-seqs": 64}, **slow)
    before = contents(run)
    whole = command(run, "--address", ray_address, "--restarts", "3")
    with subprocess.Popen(whole, stdout=subprocess.PIPE, text=True) as driver:
        _await_a_restart(run)
        driver.send_signal(signal.SIGINT)
        said = driver.communicate(timeout=60)[0]
    assert driver.returncode == 130
    assert "verifies trial 1 of " in said
    assert "different: simulated: 0.0.1 then" in said
    ended = {row.number: row for row in the_other(run).read_rows() if row.state is State.MEASURED}
    done = subprocess.run([*whole, "--resume"], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = the_other(run)
    rows = folder.read_rows()
    assert [row.state for row in rows[:2]] == [State.EARLIER, State.EARLIER]
    assert all(rows[number] == row for number, row in ended.items())
    kept = [(row.verifies, row.restart) for row in rows if row.state is State.MEASURED]
    assert sorted(kept) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    written = folder.read_verdict()
    assert written is not None
    assert written["holds"] is True
    assert written["claim"]["trial"] == 1
    assert written["sentence"].startswith("Holds: the setting of trial 1 of ")
    assert "Then: +30.0 %" in done.stdout
    assert "--max-num-seqs 64" in folder.launch_file.read_text()
    page = (folder.path / "report.html").read_text()
    assert written["sentence"] in page
    assert "simulated: 0.0.1 then" in page
    assert contents(run) == before
    assert marks(folder.path.name) == {}
    status = subprocess.run(
        [*whole[:3], "status", str(folder.path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "finished" in status.stdout
    assert written["sentence"] in status.stdout


def test_a_flag_that_the_engine_has_no_more_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = earlier(tmp_path, {"max-num-sequences": 64})
    assert cli.main(["verify", str(run.path)]) == WRONG_USE
    said = capsys.readouterr().err
    assert "the simulated engine has no flag --max-num-sequences" in said
    assert "trial 1 of" in said
    assert "its gain does not hold" in said
    assert ResultsFolder.runs(run.path.parent) == [run]


def _await_a_restart(run: ResultsFolder) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for one in ResultsFolder.runs(run.path.parent):
            if one.path != run.path and any(row.state is State.MEASURED for row in one.read_rows()):
                return
        time.sleep(0.1)
    raise AssertionError("no restart has ended within two minutes")
