"""Another real engine behind the same contract: transformers' own server, on a CPU, by `engine: {kind: command}`."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from raytune_autotuner.cli import main
from tests.conftest import ROOT
from tests.studies import marks

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_transformers_serve_is_measured_with_exact_lengths_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which bench sets, as a trial does
    load = "workload={traffic: 'D(32,6)', concurrency: 2, requests: 4, warmup_requests: 1}"
    options = ["--results", str(tmp_path), "--set", load, "--set", "trial.timeout_s=240", "--json"]
    code = main(["bench", str(ROOT / "configs" / "transformers-cpu.yaml"), *options])
    told = json.loads(capsys.readouterr().out)
    assert code == 0, told["result"]["failure"]
    folder = Path(told["folder"])
    requests = pd.read_parquet(folder / "trials" / "0-bench" / "requests.parquet")
    assert set(requests["tokens_in"]) == {32}
    assert set(requests["tokens_out"]) == {6}
    assert told["score"] > 0
    assert json.loads((folder / "versions.json").read_text())["engine"].keys() == {"transformers"}
    assert marks(folder.name) == {}
