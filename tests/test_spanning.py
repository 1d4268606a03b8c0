"""An engine over several nodes as one server: the end of any rank is the end of all, told with its cause. Without Ray:
the ranks are processes of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.contract import Rank
from raytune_autotuner.engine.processes import make_mark, marked
from raytune_autotuner.engine.protocol import Cause
from raytune_autotuner.engine.server import EngineServer, all_ended, read_end
from raytune_autotuner.engine.spanning import root_cause
from raytune_autotuner.engine.vllm import VllmEngine
from raytune_autotuner.study.errors import ConfigError, TrialFailed
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialResult
from raytune_autotuner.tune.evaluate import Evaluation
from tests.studies import BASE, merged
from tests.test_evaluate import run_through

PAIR: dict[str, Any] = {"engine": {"args": {"pipeline-parallel-size": 2}}, "resources": {"nodes": 2}}


def pair(**changes: Any) -> Study:
    """A study whose trials span two nodes."""
    return parse_study(merged(merged(BASE, PAIR), changes))


class NearFollower:
    """The second rank, on this machine."""

    hardware = "another machine"

    def __init__(self, study: Study, workdir: Path) -> None:
        self._study = study
        self._workdir = workdir

    def start(self, rank: Rank, on_end: Callable[[Failure | None], None]) -> None:
        engine = make_engine(self._study)
        self._server = EngineServer(
            engine.launch({}, rank.port, rank),
            rank.port,
            self._workdir,
            rules=engine.rules,
            mark=make_mark("run", "trial"),
            deadline=time.monotonic() + 30,
            timeout_s=30,
            rank=rank.number,
        )
        self._server.start()
        self._watch = threading.Thread(target=lambda: on_end(self._end()))
        self._watch.start()

    def _end(self) -> Failure | None:
        try:
            self._server.wait_end()
        except TrialFailed as failed:
            return failed.failure
        return None

    def lost(self) -> Failure | None:
        return None

    def stop(self) -> Failure | None:
        self._server.kill()
        self._watch.join()
        return self._server.logged_failure()


def play(study: Study, workdir: Path) -> TrialResult:
    """One trial of the baseline over two nodes, to its end."""
    follower = NearFollower(study, workdir)
    deadline = time.monotonic() + 30
    trial = Evaluation(study, make_engine(study), {}, workdir, "run", "trial", followers=[follower], deadline=deadline)
    return run_through(trial)[1]


def test_both_ranks_are_started_measured_and_ended_and_each_has_files_of_its_own(tmp_path: Path) -> None:
    result = play(pair(resources={"price_per_hour": 1.0}), tmp_path)
    assert result.failure is None
    assert result.hardware.endswith(" + another machine") or result.hardware.startswith("another machine + ")
    tokens_paid = 1e6 / result.metrics["cost_per_million_tokens"]  # for an hour of one machine
    assert tokens_paid == pytest.approx(result.metrics["output_throughput_tok_s"] * 3600 / 2, rel=0.01)
    assert "Application startup complete" in (tmp_path / "engine.log").read_text()
    assert "--headless" in (tmp_path / "process-1.json").read_text()
    assert "Loading weights took" in (tmp_path / "engine-1.log").read_text()
    assert "no process left" in (tmp_path / "trial-1.log").read_text()
    assert (read_end(tmp_path), all_ended(tmp_path)) == (Cause.STOPPED, True)
    assert marked(make_mark("run", "trial")) == []


@pytest.mark.parametrize(
    ("fault", "stage", "kind"),
    [
        ("oom@weights:rank=1", Stage.WEIGHTS, Kind.OUT_OF_MEMORY),
        ("oom@load:after=5:rank=1", Stage.LOAD, Kind.OUT_OF_MEMORY),
    ],
)
def test_what_ends_a_follower_ends_the_trial_by_the_cause_in_the_followers_log(
    tmp_path: Path, fault: str, stage: Stage, kind: Kind
) -> None:
    failure = play(pair(engine={"args": {"fault": fault}}), tmp_path).failure
    assert failure is not None
    assert (failure.stage, failure.kind, failure.blame) == (stage, kind, Blame.PARAMETERS)
    assert "CUDA out of memory" in failure.evidence
    assert marked(make_mark("run", "trial")) == []


def test_what_ends_the_first_rank_ends_the_follower(tmp_path: Path) -> None:
    failure = play(pair(engine={"args": {"fault": "kv-too-small@kv-cache"}}), tmp_path).failure
    assert failure is not None
    assert failure.kind is Kind.KV_CACHE_TOO_SMALL
    assert all_ended(tmp_path)
    assert marked(make_mark("run", "trial")) == []


def failure(kind: Kind) -> Failure:
    return Failure(Stage.LOAD, kind, Blame.PARAMETERS, str(kind), "")


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ([Kind.UNKNOWN, Kind.OUT_OF_MEMORY], Kind.OUT_OF_MEMORY),
        ([Kind.ENGINE_DIED, Kind.WORKER_LOST], Kind.ENGINE_DIED),
        ([Kind.OUT_OF_MEMORY, Kind.UNSUPPORTED], Kind.OUT_OF_MEMORY),
        ([Kind.OUT_OF_MEMORY, Kind.WORKER_LOST, Kind.NODE_LOST], Kind.NODE_LOST),
    ],
)
def test_of_several_failures_the_one_that_says_why_is_told(kinds: list[Kind], told: Kind) -> None:
    assert root_cause([failure(kind) for kind in kinds]).kind is told


def test_what_a_rank_has_logged_that_lived_on_is_told_too() -> None:
    assert root_cause([failure(Kind.ENGINE_DIED)], [failure(Kind.OUT_OF_MEMORY)]).kind is Kind.OUT_OF_MEMORY
    assert root_cause([failure(Kind.ENGINE_DIED)], [failure(Kind.UNKNOWN)]).evidence == "engine-died; unknown"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": {"kind": "running", "base_url": "http://127.0.0.1:1"}}, "resources.nodes: is for engine.kind"),
        ({"resources": {"gpus": 3}}, "resources.gpus: 3 cannot be divided evenly among 2 nodes"),
        ({"engine": {"kind": "vllm", "args": {"data-parallel-size": 2}}}, "engine.args.data-parallel-size: copies"),
        ({"search_space": {"data-parallel-size": {"choice": [1, 2]}}}, "search_space.data-parallel-size: copies"),
        ({"engine": {"args": {"nnodes": 2}}}, "engine.args.nnodes: is set by the autotuner itself"),
    ],
)
def test_what_cannot_span_nodes_is_refused_by_its_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pair(**changes)


def test_a_setting_that_cannot_be_divided_among_the_nodes_is_never_started() -> None:
    engine = make_engine(pair())
    refused = engine.refuse({"pipeline-parallel-size": 1})
    assert refused is not None
    assert (refused.kind, engine.refuse({"tensor-parallel-size": 4})) == (Kind.INVALID_CONFIG, None)


def test_vllms_ranks_find_each_other_and_one_of_them_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytune_autotuner.engine.vllm._installed", lambda python: {"vllm": "0.32.0"})
    (tmp_path / "config.json").write_text("{}")
    engine = VllmEngine(pair(model=str(tmp_path), engine={"kind": "vllm", "args": {"pipeline-parallel-size": 2}}))
    first, second = (engine.launch({}, 8000, Rank(n, 2, "10.0.0.1", 25000, f"10.0.0.{n + 1}")) for n in (0, 1))
    meeting = ("--master-addr", "10.0.0.1", "--master-port", "25000")
    assert first.argv[-12:] == ("--nnodes", "2", "--node-rank", "0", *meeting, "--host", "127.0.0.1", "--port", "8000")
    assert second.argv[-9:] == ("--nnodes", "2", "--node-rank", "1", *meeting, "--headless")
    assert (first.env["VLLM_HOST_IP"], second.env["VLLM_HOST_IP"]) == ("10.0.0.1", "10.0.0.2")
    assert "--nnodes 2 --node-rank 0 --master-addr ADDRESS_OF_THE_FIRST_NODE" in engine.launch_lines({})[1]
