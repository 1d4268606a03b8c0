"""What every engine must be to a trial, whichever it is; and the two that the study itself describes."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest

from raytune_autotuner.cli import main
from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.engine.reading import ANY_RULES, diagnose
from raytune_autotuner.load.dialect import Dialect
from raytune_autotuner.load.stream import BadAnswer, TokenStream
from raytune_autotuner.load.workload import Request
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Blame, Kind, Stage
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.tune.checks import check_study
from tests.simulated_server import Server
from tests.studies import BASE, marks, merged, run_study, write_study
from tests.test_evaluate import play

PROGRAM = ["{python}", "-m", "raytune_autotuner.engine.simulated", "--host", "{host}", "--port", "{port}"]
COMMAND: dict[str, Any] = {
    "kind": "command",
    "command": [*PROGRAM, "--model", "{model}"],
    "args": {"noise": 0.0, "speed": 4},
}


def study_of(engine: dict[str, Any], **changes: Any) -> Study:
    return parse_study(merged({**BASE, "engine": engine}, changes))


@pytest.fixture(scope="class")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The engine of a contract's class."""
    space = {"max-num-seqs": {"choice": [2, 8]}, "env:OMP_NUM_THREADS": {"choice": [1, 2]}}
    contract: type[EngineContract] = request.cls
    engine = make_engine(study_of(contract.spec, model=contract.model, search_space=space))
    engine.preflight()
    yield engine
    engine.close()
    engine.close()


class EngineContract:
    """What the house asks of an engine; `spec` is the study's `engine` section."""

    model: ClassVar = "simulated-model"
    spec: ClassVar[dict[str, Any]]

    def test_its_command_has_the_setting_the_port_and_a_loopback_address(self, engine: Engine) -> None:
        launch = engine.launch({"max-num-seqs": 8, "env:OMP_NUM_THREADS": 2}, 4321)
        line = shlex.join(launch.argv)
        assert "--max-num-seqs 8" in line
        assert "--port 4321" in line
        assert "--host 127.0.0.1" in line
        assert launch.env["OMP_NUM_THREADS"] == "2"
        assert launch.ready.startswith("/")
        assert not any("{" in part for part in launch.argv)

    def test_the_baseline_has_the_fixed_arguments_alone(self, engine: Engine) -> None:
        line = shlex.join(engine.launch({}, 4321).argv)
        assert "max-num-seqs" not in line
        assert all(f"--{name} " in line for name in self.spec.get("args", {}))

    def test_the_lines_for_people_have_the_setting_too(self, engine: Engine) -> None:
        for line in engine.launch_lines({"max-num-seqs": 8}):
            assert "--max-num-seqs 8" in line
            assert "--port 8000" in line

    def test_it_names_the_model_and_its_versions(self, engine: Engine) -> None:
        assert engine.served_model
        assert engine.config_model()
        assert all(engine.versions().values())
        assert engine.versions()

    def test_one_device_is_enough_for_one_worker(self, engine: Engine) -> None:
        assert engine.parallel_size({}) == 1

    def test_a_setting_that_works_is_not_refused(self, engine: Engine) -> None:
        assert engine.refuse({"max-num-seqs": 8}) is None

    def test_its_log_tells_what_no_setting_is_to_blame_for(self, engine: Engine) -> None:
        lines = ["ERROR:    [Errno 98] error while attempting to bind on address: address already in use"]
        failure = diagnose(lines, exit_code=1, rules=engine.rules).failure
        assert failure is not None
        assert (failure.kind, failure.blame) == (Kind.PORT_IN_USE, Blame.ENVIRONMENT)


class TestSimulated(EngineContract):
    spec: ClassVar = {"kind": "simulated", "args": {"noise": 0.0}}


class TestCommand(EngineContract):
    spec: ClassVar = COMMAND


@pytest.mark.vllm
@pytest.mark.slow
class TestVllm(EngineContract):
    model: ClassVar = "bundled:smollm2-135m-instruct"
    spec: ClassVar = {"kind": "vllm", "args": {"max-model-len": 512}}


# kind: command


def played(folder: Path, engine: dict[str, Any], params: dict[str, Any] | None = None, **changes: Any) -> Any:
    return play(folder, {"engine": {**COMMAND, **engine}, **changes}, params)


@pytest.mark.parametrize("api", ["completions", "completions-text", "chat"])
def test_each_way_to_ask_gives_a_measurement_with_the_servers_own_counts(tmp_path: Path, api: str) -> None:
    done = played(tmp_path, {"api": api})
    assert done.result.failure is None, done.result.failure
    requests = pd.read_parquet(done.folder / "requests.parquet")
    assert set(requests["tokens_out"]) == {8}
    assert {len(times) for times in requests["token_times_s"]} == {8}, "the opening of a chat is no token"
    assert (requests["tokens_in"] == 32).all() == (api == "completions")
    said = (done.folder / "engine.log").read_text()
    assert ("/v1/chat/completions" in said) == (api == "chat")


def test_a_parameter_may_stand_in_the_command_and_the_rest_is_appended(tmp_path: Path) -> None:
    engine = {"command": [*COMMAND["command"], "--max-num-seqs={max-num-seqs}"], "args": {"max-num-seqs": 4}}
    study = study_of({**COMMAND, **engine, "env": {"WHERE": "http://{host}:{port}"}})
    launch = make_engine(study).launch({"max-num-seqs": 8, "block-size": 32}, 99)
    assert launch.argv[-3:] == ("--max-num-seqs=8", "--block-size", "32")
    assert "--max-num-seqs=4" in make_engine(study).launch({}, 99).argv
    assert launch.env["WHERE"] == "http://127.0.0.1:99"
    assert launch.argv[0] == sys.executable


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"max-num-sekvens": 2}, (Stage.ARGUMENTS, Kind.BAD_ARGUMENT, Blame.PARAMETERS)),
        ({"fault": "oom@weights"}, (Stage.WEIGHTS, Kind.OUT_OF_MEMORY, Blame.PARAMETERS)),
        ({"fault": "killed@kv-cache"}, (Stage.KV_CACHE, Kind.OUT_OF_MEMORY, Blame.PARAMETERS)),
        ({"fault": "crash@weights"}, (Stage.WEIGHTS, Kind.UNKNOWN, Blame.PARAMETERS)),
    ],
)
def test_a_failure_is_told_by_its_log_with_stage_and_kind(
    tmp_path: Path, params: dict[str, Any], told: tuple[Any, ...]
) -> None:
    failure = played(tmp_path, {}, params).result.failure
    assert (failure.stage, failure.kind, failure.blame) == told
    assert failure.evidence


def test_a_server_that_refuses_the_first_completion_for_good_ends_the_trial_at_once(tmp_path: Path) -> None:
    done = played(tmp_path, {"served_model": "another"})
    assert done.result.failure.blame is Blame.STUDY
    assert "a completion was refused: HTTP 404: The model `another` does not exist" in done.result.failure.evidence
    assert done.result.seconds["total"] < 20


def test_what_is_not_there_is_told_before_anything_starts() -> None:
    for changes, told in [
        ({"command": ["no-such-server", "{port}"]}, "engine.command: there is no program 'no-such-server' here"),
        ({"command": ["bin/server", "{port}"]}, "is a relative path"),
        ({"version": ["false"]}, "engine.version: false ended with exit code 1"),
    ]:
        with pytest.raises(ConfigError, match=told):
            make_engine(study_of({**COMMAND, **changes})).preflight()
    known = make_engine(study_of({**COMMAND, "version": ["echo", "7.1"]}))
    assert known.versions() == {"raytune_autotuner": "7.1"}


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ({"kind": "command"}, "engine.command: is needed with engine.kind command"),
        ({"kind": "command", "command": "llama-server --port {port}"}, "are a list"),
        ({"kind": "command", "command": ["llama-server"]}, "names no {port}"),
        ({"kind": "command", "command": ["x", "{port}", "{modle}"]}, "{modle} has no value; known are model, host"),
        ({"kind": "command", "command": ["x", "{port}", "{max-num-seqs}"]}, "give the baseline's value in engine.args"),
        ({"kind": "command", "command": ["x", "{port}", "--api-key", "abcdefgh"]}, "engine.command: holds a secret"),
        ({"kind": "running"}, "engine.base_url: is needed with engine.kind running"),
        ({"kind": "running", "base_url": "localhost:8000"}, "engine.base_url"),
        ({"kind": "running", "base_url": "http://h", "args": {"a": 1}}, "engine.args: is for engine.kind vllm or"),
        ({"kind": "vllm", "command": ["x", "{port}"]}, "engine.command: is for engine.kind command, but it is vllm"),
        ({"kind": "simulated", "api": "chat"}, "engine.api: is for engine.kind command or running"),
    ],
)
def test_keys_that_do_not_fit_the_kind_are_refused(engine: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        study_of(engine)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"api": "chat"}, "workload.client: vllm-bench sends token ids"),
        ({"request": {"seed": 1}}, "engine.request: {'seed': 1} means nothing to workload.client vllm-bench"),
        ({"exact_lengths": False}, "engine.exact_lengths: False means nothing to workload.client vllm-bench"),
    ],
)
def test_a_client_that_makes_its_own_requests_takes_no_others(tmp_path: Path, more: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_study(study_of({**COMMAND, **more}, workload={"client": "vllm-bench"}), tmp_path)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("lines", "kind", "evidence"),
    [
        (["│ No such option: --max-sekvens      │", "╰───────╯"], Kind.BAD_ARGUMENT, "No such option: --max-sekvens"),
        (["Error: Invalid value for '--port': 'x' is not valid."], Kind.BAD_ARGUMENT, "Invalid value for '--port'"),
        (["flag provided but not defined: -threds"], Kind.BAD_ARGUMENT, "-threds"),
        (["error: invalid argument: --cxt-size"], Kind.BAD_ARGUMENT, "--cxt-size"),
        (["│ in load", "╰────╯", "ValueError: Unsupported dtype: 'float17'."], Kind.UNKNOWN, "Unsupported dtype"),
        (["cudaMalloc failed: out of memory"], Kind.OUT_OF_MEMORY, "cudaMalloc failed"),
        (["memory allocation of 12884901888 bytes failed"], Kind.OUT_OF_MEMORY, "memory allocation"),
    ],
)
def test_the_words_of_common_programs_are_understood(lines: list[str], kind: Kind, evidence: str) -> None:
    failure = diagnose(["starting", *lines], exit_code=2, rules=ANY_RULES).failure
    assert failure is not None
    assert failure.kind is kind
    assert evidence in failure.evidence
    assert "│" not in failure.evidence


@pytest.mark.slow
def test_a_study_of_a_command_is_searched_and_its_winner_can_be_served(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, engine=COMMAND, search={"trials": 3})
    done, folder = run_study(study, "--address", ray_address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(folder.read_rows()) == 3
    assert "raytune_autotuner.engine.simulated --host 127.0.0.1 --port 8000" in folder.launch_file.read_text()
    assert main(["export", str(folder.path)]) == 0
    assert "--port 8000" in capsys.readouterr().out
    assert main(["export", str(folder.path), "--format", "docker"]) == 2
    assert "exists for vLLM only" in capsys.readouterr().err
    assert main(["report", str(folder.path)]) == 0
    assert marks(folder.path.name) == {}
    earlier = [str(folder.path)]
    other = [*COMMAND["command"], "--seed", "5"]
    again = write_study(tmp_path, engine={**COMMAND, "command": other}, search={"trials": 3, "warm_start": earlier})
    assert main([str(again), "--results", str(tmp_path / "again")]) == 2
    assert "engine.command was" in capsys.readouterr().err


# kind: running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path).wait_ready()
    yield server
    server.close()


def test_a_server_that_runs_is_measured_and_left_as_it_is(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = {"kind": "running", "base_url": f"{server.base_url}/v1"}
    study = write_study(tmp_path, engine=engine, search_space={}, model="m")
    assert main(["bench", str(study), "--results", str(tmp_path / "results"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["score"] > 0
    assert told["launch"] is None
    assert server.process.poll() is None
    assert not server.printed("reset_prefix_cache")
    folder = ResultsFolder.open(Path(told["folder"]))
    assert json.loads(folder.versions_file.read_text())["engine"]["running"] != "unknown"
    assert main(["bench", str(study), "--param", "max-num-seqs=3"]) == 2
    assert "takes no parameters" in capsys.readouterr().err


def test_a_server_that_runs_on_beyond_the_deadline_fails_at_the_load_with_its_share(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = {"kind": "running", "base_url": server.base_url}
    load = {"traffic": "D(8,1000)", "requests": 500, "warmup_requests": 0}
    study = write_study(tmp_path, engine=engine, search_space={}, workload=load, trial={"timeout_s": 2})
    assert main(["bench", str(study), "--results", str(tmp_path / "results")]) == 1
    assert "at load: deadline" in capsys.readouterr().out
    (records,) = (tmp_path / "results").glob("*/trials/*/requests.parquet")
    assert list(pd.read_parquet(records)["error"]).count("deadline") == 8


def test_a_study_of_a_server_that_runs_is_refused_and_so_is_a_server_that_is_not_there(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of({"kind": "running", "base_url": server.base_url})
    with pytest.raises(ConfigError, match="nothing can be searched"):
        check_study(study, tmp_path)
    engine = {"kind": "running", "base_url": server.base_url, "served_model": "wrong"}
    assert main(["bench", str(write_study(tmp_path, engine=engine)), "--results", str(tmp_path / "results")]) == 1
    assert "HTTP 404: The model `wrong` does not exist" in capsys.readouterr().out
    server.close()
    assert main(["bench", str(write_study(tmp_path, engine=engine))]) == 2
    assert "engine.base_url: nothing answers at" in capsys.readouterr().err


def test_a_port_that_speaks_another_protocol_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        engine = {"kind": "running", "base_url": f"http://127.0.0.1:{listening.getsockname()[1]}"}
        threading.Thread(target=_greet, args=[listening]).start()
        with pytest.raises(ConfigError, match=r"is no HTTP server: .*SSH"):
            make_engine(study_of(engine)).preflight()


def test_a_url_with_a_control_character_is_called_one() -> None:
    engine = {"kind": "running", "base_url": "http://127.0.0.1:1/\x01"}
    with pytest.raises(ConfigError, match=r"engine.base_url: .*x01.* is no URL") as refused:
        make_engine(study_of(engine)).preflight()
    assert str(refused.value).isprintable()


def _greet(listening: socket.socket) -> None:
    connection, _ = listening.accept()
    with connection:
        connection.sendall(b"SSH-2.0-OpenSSH\r\n")
        connection.recv(1000)


# How a server is asked, and what its stream may look like


@pytest.mark.parametrize(
    ("events", "tokens"),
    [
        (['{"choices":[{"text":" a"}]}', '{"choices":[{"text":""}],"usage":{"completion_tokens":1}}'], 1),
        (['{"choices":[{"text":" a"}]}', '{"choices":[{"text":" b"}],"usage":{"completion_tokens":2}}'], 2),
        (['{"choices":[{"delta":{"role":"assistant"}}]}', '{"choices":[{"delta":{"content":"a"}}]}'], 1),
        (['{"choices":[{"delta":{"role":"assistant","content":"a"}}]}'], 1),
        (['{"choices":[{"delta":{"role":"assistant","content":null}}]}'], 0),
        (['{"choices":[{"delta":{"reasoning_content":"hm"}}]}'], 1),
        (['{"choices":[{"delta":{"content":"a"}}]}', '{"choices":[{"delta":{},"finish_reason":"length"}]}'], 2),
        (['{"choices":[{"text":"say \\"role\\": x"}]}'], 1),
        (['{"choices":[{"text":""}],"usage":{"completion_tokens":3}}'], 1),
        (['{"choices":[],"usage":{"completion_tokens":0}}'], 0),
    ],
)
def test_neither_the_opening_of_a_chat_nor_an_end_without_text_is_a_token(events: list[str], tokens: int) -> None:
    stream = TokenStream()
    for event in events:
        stream.feed(f"data: {event}\n\n".encode(), 1.0)
    assert len(stream.times_s) == tokens


@pytest.mark.parametrize(("answered", "exact", "good"), [(8, True, True), (5, True, False), (5, False, True)])
def test_a_short_answer_is_a_failed_one_unless_the_study_takes_it(answered: int, exact: bool, good: bool) -> None:
    stream = TokenStream()
    stream.feed(f'data: {{"choices":[{{"text":"a"}}],"usage":{{"completion_tokens":{answered}}}}}\n\n'.encode(), 1.0)
    with nullcontext() if good else pytest.raises(BadAnswer, match="8 output tokens wanted, 5 answered"):
        stream.close(8, exact)
    with pytest.raises(BadAnswer, match="3 output tokens wanted"):
        stream.close(3, exact)


def test_a_request_has_the_fields_of_the_study_over_the_usual_ones() -> None:
    request = Request(0, [0, 1, 2], 7)
    usual = json.loads(Dialect().body("m", request))
    assert (usual["prompt"], usual["max_tokens"], usual["min_tokens"]) == ([0, 1, 2], 7, 7)
    fields = {"min_tokens": None, "ignore_eos": None, "temperature": 0.5, "seed": 1}
    other = json.loads(Dialect("completions-text", fields).body("m", request))
    assert other == {
        **{name: value for name, value in usual.items() if name not in ("min_tokens", "ignore_eos")},
        "prompt": "able about above",
        "temperature": 0.5,
        "seed": 1,
    }
    chat = Dialect("chat")
    assert json.loads(chat.body("m", Request(0, "Why?", 7)))["messages"] == [{"role": "user", "content": "Why?"}]
    assert chat.path == "/v1/chat/completions"
