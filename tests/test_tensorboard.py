from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.tensorboard import TensorBoardWriter, tag
from raytune_autotuner.report.verdict import study_verdict
from raytune_autotuner.study.failure import Stage
from tests.report_samples import METRIC, failed, make_study, measured, sample_rows, setting, verified_rows
from tests.study_folders import LEVELS, leave_files, requests


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    """A study of four trials that has ended."""
    made = ResultsFolder.create(tmp_path, make_study())
    writer = TensorBoardWriter(made, make_study())
    for row in sample_rows()[:4]:
        if row.score is not None:
            writer.round(row, 1, {METRIC: row.score - 10})
            writer.round(row, 2, {METRIC: row.score - 1})
        writer.ended(row)
    return made


def events(path: Path) -> EventAccumulator:
    return EventAccumulator(str(path)).Reload()


def scalars(path: Path) -> dict[str, list[tuple[int, Any]]]:
    read = events(path)
    return {name: [(e.step, pytest.approx(e.value)) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


def hparams(path: Path, name: str) -> HParamsPluginData:
    content = events(path).SummaryMetadata(f"_hparams_/{name}").plugin_data.content
    return HParamsPluginData.FromString(content)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("ttft_ms_p90", "latency/ttft_ms_p90"),
        ("output_throughput_tok_s@c16", "throughput/output_throughput_tok_s@c16"),
        ("goodput_rps", "goodput/goodput_rps"),
        ("requests_failed", "requests/requests_failed"),
    ],
)
def test_metrics_are_grouped(metric: str, expected: str) -> None:
    assert tag(metric) == expected


def test_a_measured_trial_has_its_rounds_metrics_and_score(folder: ResultsFolder) -> None:
    found = scalars(folder.find_trial_dir(2))
    assert found[f"throughput/{METRIC}"][:2] == [(1, 133), (2, 142)]
    assert found["latency/ttft_ms_p90"] == [(1, 1234.5)]
    assert found["outcome/score"] == [(1, 143)]
    assert found["outcome/stage"] == [(1, Stage.LOAD.order)]
    assert found["seconds/start"] == [(1, 43.2)]
    assert "outcome/penalty" not in found


def test_a_failed_trial_has_its_penalty_and_stage_and_no_score(folder: ResultsFolder) -> None:
    found = scalars(folder.find_trial_dir(1))
    assert found["outcome/penalty"] == [(1, 1.45)]
    assert found["outcome/stage"] == [(1, Stage.KV_CACHE.order)]
    assert "outcome/score" not in found


def test_the_study_has_curves_over_its_trials(folder: ResultsFolder) -> None:
    found = scalars(folder.path)
    assert found["study/best_score"] == [(0, 100), (1, 100), (2, 143), (3, 143)]
    assert found["study/penalty"] == [(1, 1.45)]


def test_each_trial_is_a_session_with_its_parameters(folder: ResultsFolder) -> None:
    start = hparams(folder.find_trial_dir(2), "session_start_info").session_start_info.hparams
    assert start["max-num-seqs"].number_value == 16
    assert start["enable-prefix-caching"].bool_value is False
    assert start["env:VLLM_CPU_OMP_THREADS_BIND"].string_value == "0-1"
    assert start["trial"].string_value == "2"
    status = [hparams(folder.find_trial_dir(i), "session_end_info").session_end_info.status for i in range(3)]
    assert status == [1, 2, 1]  # success, failure, success


def test_a_running_trial_can_be_watched(tmp_path: Path) -> None:
    made = ResultsFolder.create(tmp_path, make_study())
    writer = TensorBoardWriter(made, make_study())
    row = measured(1, 50.0, setting(4))
    writer.round(row, 1, {METRIC: 40.0})
    assert scalars(made.find_trial_dir(1)) == {f"throughput/{METRIC}": [(1, 40)]}


def test_a_parameter_of_the_baseline_is_shown_where_the_study_fixes_it(tmp_path: Path) -> None:
    study = make_study(engine={"args": {"max-num-seqs": 8, "max-model-len": 64}})
    made = ResultsFolder.create(tmp_path, study)
    writer = TensorBoardWriter(made, study)
    writer.ended(failed(0))
    start = hparams(made.find_trial_dir(0), "session_start_info").session_start_info.hparams
    assert set(start) == {"max-num-seqs", "trial"}
    assert start["trial"].string_value == "0 baseline"


def test_restarts_are_curves_of_their_own_and_the_verdict_is_text(tmp_path: Path) -> None:
    study, rows = make_study(), verified_rows()
    made = ResultsFolder.create(tmp_path, study)
    writer = TensorBoardWriter(made, study)
    for row in rows:
        writer.ended(row)
    writer.verdict(study_verdict(study, rows))
    found = scalars(made.path)
    assert found["study/best_score"] == [(0, 100), (2, 143), (3, 143)]
    assert found[f"verification/{METRIC}/trial_2"] == [(0, 140), (1, 137), (2, 144), (3, 138), (4, 141)]
    start = hparams(made.find_trial_dir(5), "session_start_info").session_start_info.hparams
    assert start["trial"].string_value == "5 verify trial 2, 1 of 5"
    (text,) = events(made.path).Tensors("verdict")
    said = text.tensor_proto.string_val[0].decode()
    assert said.startswith("Run trial 2: ")
    assert f"| trial 2 | {METRIC} | 140 | 2.0 % | +40.0 % | +38.7 to +41.3 % |" in said


def test_every_objective_has_its_scalar(tmp_path: Path) -> None:
    study = make_study(objective={"maximize": METRIC, "minimize": "tpot_ms_p90"})
    made = ResultsFolder.create(tmp_path, study)
    writer = TensorBoardWriter(made, study)
    writer.ended(replace(measured(0, 100.0), scores=(100.0, 50.0)))
    found = scalars(made.find_trial_dir(0))
    assert (found[f"outcome/score:{METRIC}"], found["outcome/score:tpot_ms_p90"]) == ([(1, 100)], [(1, 50)])


def test_a_trials_load_is_a_curve_over_its_seconds_at_the_time_at_which_it_ran(tmp_path: Path) -> None:
    study, row = make_study(), measured(2, 143.0, setting(16))
    made = ResultsFolder.create(tmp_path, study)
    leave_files(made, row)
    writer = TensorBoardWriter(made, study)
    before = time.time()
    writer.ended(row)
    read = events(made.find_trial_dir(2))
    records = requests(143.0)
    loads = [max(r.end_s for r in records if r.level == level) for level in LEVELS]
    output = read.Scalars(f"over_time/{METRIC}")
    assert [event.step for event in output] == list(range(round(sum(loads))))
    assert sum(event.value for event in output) * sum(loads) / len(output) == pytest.approx(len(records) * 8)
    assert output[0].wall_time == pytest.approx(before - sum(loads), abs=1)
    running = read.Scalars("over_time/running_requests")
    assert [event.value for event in running] == [4] * 8 + [16] * 8
    assert running[8].step == int(loads[0] + 0.5)
    assert max(event.value for event in read.Scalars("over_time/kv_cache_usage")) == pytest.approx(0.7)


def test_the_cause_of_a_failure_is_text_beside_its_curves(folder: ResultsFolder) -> None:
    (text,) = events(folder.find_trial_dir(1)).Tensors("failure")
    said = text.tensor_proto.string_val[0].decode()
    assert said.startswith("**out-of-memory** at kv-cache: ValueError: 12.3 GiB")


class Server:
    """A real TensorBoard on loopback."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", f"--port={port}", "--host=127.0.0.1"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def post(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._base + path, json.dumps(body).encode(), headers)
        with self._open(request, timeout=20) as answer:
            return json.load(answer)

    def sessions(self, count: int) -> list[Any]:
        """The lines of the HParams table, as soon as there are `count`."""
        query = {"startIndex": 0, "sliceSize": 100, "colParams": []}
        query["allowedStatuses"] = ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"]
        end = time.monotonic() + 60
        found: list[Any] = []
        while len(found) < count and time.monotonic() < end:
            time.sleep(0.3)
            try:
                found = self.post("/data/plugin/hparams/session_groups", query).get("sessionGroups", [])
            except OSError:
                assert self.process.poll() is None
        return found


@pytest.fixture
def server(folder: ResultsFolder) -> Iterator[Server]:
    running = Server(folder.path)
    yield running
    running.process.terminate()
    running.process.wait()


@pytest.mark.slow
def test_tensorboards_hparams_table_lists_every_trial(server: Server) -> None:
    groups = server.sessions(4)
    by_trial = {group["hparams"]["trial"]: group for group in groups}
    assert sorted(by_trial) == ["0 baseline", "1", "2", "3"]
    values = {metric["name"]["tag"]: metric["value"] for metric in by_trial["1"]["metricValues"]}
    assert values["outcome/penalty"] == pytest.approx(1.45)
    assert "outcome/score" not in values
    columns = server.post("/data/plugin/hparams/experiment", {})
    assert {info["name"] for info in columns["hparamInfos"]} == {"trial", *setting(1)}
    assert {"score", "penalty", "stage", METRIC} <= {info["displayName"] for info in columns["metricInfos"]}
