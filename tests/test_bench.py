"""`bench`: one setting by hand, with the simulated engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.cli import main
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.trial import State
from tests.studies import marks, write_study

SLO = {"maximize": "output_throughput_tok_s", "slo": {"ttft_ms": {"p50": 5000}, "tpot_ms": {"mean": 0.0001}}}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which bench sets, as a trial does


def bench(folder: Path, *options: str, **changes: Any) -> int:
    """The exit code of one `bench` of a study with `changes`."""
    return main(["bench", str(write_study(folder, **changes)), "--results", str(folder / "results"), *options])


def only_folder(folder: Path) -> ResultsFolder:
    (found,) = (folder / "results").iterdir()
    return ResultsFolder.open(found)


def test_the_baseline_is_measured_and_told_with_units_levels_and_slos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, workload={"concurrency": [2, 4]}, objective=SLO, search_space={}) == 0
    out, err = capsys.readouterr()
    assert "score     output_throughput_tok_s" in out
    assert "met     ttft_ms_p50@c2 <= 5000" in out
    assert "MISSED  tpot_ms_mean@c4 <= 0.0001" in out
    head = next(line for line in out.splitlines() if line.startswith("metric"))
    assert head.split() == ["metric", "all", "c2", "c4", "unit"]
    assert "started: baseline, the engine's defaults and the fixed arguments" in err
    assert err.index("ready in") < err.index("c2: output_throughput_tok_s") < err.index("c4: output_throughput_tok_s")
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_its_folder_is_no_run_of_the_study_and_is_read_as_one_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, "--param", "max-num-seqs=2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    folder = only_folder(tmp_path)
    assert ResultsFolder.runs(tmp_path / "results") == []
    assert told["folder"] == str(folder.path)
    assert told["params"] == {"max-num-seqs": 2}
    assert told["score"] == told["result"]["metrics"]["output_throughput_tok_s"]
    (row,) = folder.read_rows()
    assert (row.state, row.params, row.score) == (State.MEASURED, {"max-num-seqs": 2}, told["score"])
    names = {path.name for path in folder.find_trial_dir(0).iterdir()}
    assert {"trial.log", "engine.log", "requests.parquet", "result.json", "command.json"} <= names
    assert main(["logs", str(folder.path), "0", "--engine"]) == 0
    assert main(["logs", str(folder.path)]) == 0
    assert main(["export", str(folder.path), "--trial", "0"]) == 0
    assert "--max-num-seqs 2" in capsys.readouterr().out


def test_a_trial_is_repeated_with_its_study_and_other_parameters_over_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, "--param", "max-num-seqs=2", "--param", "block-size=32") == 0
    first = only_folder(tmp_path).path
    again = ["bench", "--trial", str(first), "0", "--param", "block-size=16", "--results", str(tmp_path / "again")]
    capsys.readouterr()
    assert main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == {"max-num-seqs": 2, "block-size": 16}
    assert main(["bench", "--trial", str(first), "7"]) == 2
    assert "has no such trial" in capsys.readouterr().err


def test_a_setting_that_fails_is_told_with_evidence_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, "--param", "fault=oom@weights") == 1
    out = capsys.readouterr().out
    assert "failed    at weights: out-of-memory; whose fault: parameters" in out
    assert "evidence  " in out
    assert "remedy    " in out
    assert only_folder(tmp_path).read_rows()[0].state is State.FAILED


def test_what_a_search_would_not_start_is_not_started_and_a_broken_constraint_is_only_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, "--param", "tensor-parallel-size=5") == 1
    assert "refused before any start, at configuration: invalid-config" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert bench(tmp_path, "--param", "max-num-seqs=2", constraints=["max-num-seqs > 2"]) == 0
    assert "it breaks the constraint `max-num-seqs > 2`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--param", "max-num-seq=2"], "Did you mean 'max-num-seqs'?"),
        (["--param", "max_num_seqs=2"], "--param: search_space.max_num_seqs: flags have hyphens"),
        (["--param", "max-num-seqs"], "write name=value, such as --param max-num-seqs=32"),
        (["--param", "port=1"], "is set by the autotuner itself"),
        (["--set", "resources.gpus=3"], "this setting needs 3 GPUs, but this machine has 0"),
    ],
)
def test_wrong_use_starts_nothing(
    tmp_path: Path, options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, *options) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_at_the_deadline_and_on_ctrl_c_nothing_is_left_running(tmp_path: Path) -> None:
    hung = bench(tmp_path, "--param", "fault=hang@kv-cache", "--set", "trial.timeout_s=3")
    assert hung == 1
    folder = only_folder(tmp_path)
    failure = folder.read_rows()[0].result.failure
    assert failure is not None
    assert (failure.kind, marks(folder.path.name)) == ("deadline", {})
    study = write_study(tmp_path, workload={"requests": 2000, "traffic": "D(32,64)"}, engine={"args": {"speed": 0.2}})
    command = [sys.executable, "-m", "raytune_autotuner", "bench", str(study), "--results", str(tmp_path / "second")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("ready" in line for line in process.stderr)
        time.sleep(1.0)
        (run,) = (tmp_path / "second").iterdir()
        assert marks(run.name)
        os.kill(process.pid, signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted: the engine is stopped" in rest
    assert marks(run.name) == {}
    assert ResultsFolder.open(run).read_rows()[0].state is State.INTERRUPTED
    assert "no process left" in next(run.glob("trials/0-*/trial.log")).read_text()
