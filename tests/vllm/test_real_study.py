"""A short study on a real vLLM, and the same study on the simulated engine: the same words in Optuna's storage."""

from __future__ import annotations

import json
import math
import os
import shlex
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.trial import State
from raytune_autotuner.tune.tell import CONSTRAINT
from tests.studies import marks, optuna_trials, run_study, write_study

MODEL = "bundled:smollm2-135m-instruct"
STUDY: dict[str, Any] = {
    "model": MODEL,
    # 7 is no block size for either engine.
    "search_space": {"max-num-seqs": {"choice": [4, 16, 128, 256]}, "block-size": {"choice": [7, 16, 128]}},
    "workload": {"traffic": "D(32,16)", "concurrency": 8, "requests": 32, "warmup_requests": 8},
    "search": {"trials": 3, "points": [{"max-num-seqs": 16, "block-size": 7}, {"max-num-seqs": 16, "block-size": 128}]},
    "trial": {"timeout_s": 240, "hung_after_s": 200},
    "resources": {"gpus": "auto", "cpus": 2, "max_concurrent": 1},
}
ENGINES: dict[str, dict[str, Any]] = {
    "vllm": {
        "kind": "vllm",
        "args": {"max-model-len": 512, "enforce-eager": True},
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    },
    "simulated": {"kind": "simulated", "args": {"max-model-len": 512, "enforce-eager": True}},
}


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=pytest.mark.vllm), "simulated"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], ResultsFolder]:
    study = write_study(tmp_path_factory.mktemp(request.param), **STUDY, engine=ENGINES[request.param])
    return run_study(study, timeout_s=600)


def test_a_study_measures_fails_and_ends_with_a_launch_line(finished: tuple[Any, ResultsFolder]) -> None:
    done, folder = finished
    assert done.returncode == 0, done.stdout + done.stderr
    rows = folder.read_rows()
    assert [(row.name, row.state) for row in rows] == [
        ("baseline", State.MEASURED),
        ("", State.FAILED),
        ("", State.MEASURED),
    ]
    failure = rows[1].result.failure
    assert failure is not None
    assert (str(failure.stage), str(failure.kind)) == ("kv-cache", "unsupported")
    assert "No common block size for 7" in failure.evidence
    assert "serve it here:" in done.stdout
    assert marks(folder.path.name) == {}


def test_optuna_holds_values_and_constraints_of_all_trials(finished: tuple[Any, ResultsFolder]) -> None:
    _, folder = finished
    baseline, failed, good = optuna_trials(folder)
    assert {trial.state for trial in (baseline, failed, good)} == {TrialState.COMPLETE}
    assert baseline.params["max-num-seqs"] is not None
    assert [math.isfinite(trial.value or math.nan) for trial in (baseline, failed, good)] == [True] * 3
    assert failed.value == baseline.value  # the worst that was seen
    assert 1 < failed.constraints[CONSTRAINT] < 2
    assert failed.user_attrs["kind"] == "unsupported"
    assert baseline.constraints[CONSTRAINT] <= 0
    assert good.constraints[CONSTRAINT] <= 0


def test_the_requests_have_the_lengths_that_were_asked_for(finished: tuple[Any, ResultsFolder]) -> None:
    _, folder = finished
    metrics = folder.read_rows()[0].result.metrics
    assert metrics["tokens_in"] == 32 * 32
    assert metrics["tokens_out"] == 32 * 16
    assert 0 < metrics["ttft_ms_p50"] < metrics["e2el_ms_p50"]


@pytest.mark.vllm
def test_the_launch_line_serves_the_model_from_a_shell(
    tmp_path_factory: pytest.TempPathFactory, finished: tuple[Any, ResultsFolder]
) -> None:
    _, folder = finished
    line = json.loads((folder.trial_dir(0, folder.read_rows()[0].trial_id) / "command.json").read_text())["launch"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = line.replace("--port 8000", f"--port {port}")
    folder_of_server = tmp_path_factory.mktemp("launched")
    own = {**os.environ, "TMPDIR": str(folder_of_server)}  # a vLLM leaves its sockets there
    with (
        (folder_of_server / "log").open("wb") as output,
        subprocess.Popen(["bash", "-c", f"exec env {line}"], stdout=output, stderr=output, env=own) as server,
    ):
        try:
            answer = _complete(port, _served_name(line))
        finally:
            server.terminate()
    assert answer["choices"][0]["text"]


def _served_name(line: str) -> str:
    words = shlex.split(line)
    option = "--served-model-name" if "--served-model-name" in words else "--model"
    return words[words.index(option) + 1]


def _complete(port: int, model: str) -> Any:
    body = json.dumps({"model": model, "prompt": "The capital of France is", "max_tokens": 8}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    until = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def test_the_results_folder_is_where_it_was_said(finished: tuple[Any, ResultsFolder]) -> None:
    done, folder = finished
    assert f"results: {folder.path}" in done.stdout
    assert Path(folder.launch_file).stat().st_mode & 0o100
