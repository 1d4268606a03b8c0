"""The front door: wrong use is told in a few lines with exit code 2, and starts nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_autotuner import __version__
from raytune_autotuner.cli import main
from raytune_autotuner.study.failure import Blame, Kind, Stage
from raytune_autotuner.study.file import load_study
from raytune_autotuner.tune.checks import check_study, quality_notes
from tests.studies import BASE, merged, write_study

LOGS = Path(__file__).parent / "engine_logs"
EXPECTED = {entry["file"]: entry for entry in yaml.safe_load((LOGS / "expected.yaml").read_text(encoding="utf-8"))}
CONFIGS = Path(__file__).parent.parent / "configs"
OTHER_PYTHON = "/usr/bin/python3"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message with which the command line refuses `arguments`, once all that holds for every refusal is checked."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return message_in(said.err)


def message_in(text: str) -> str:
    assert text.startswith("error: ")
    assert "Traceback" not in text
    lines = text.rstrip("\n").split("\n")
    assert 1 <= len(lines) <= 3, text
    assert all(line and len(line) < 500 for line in lines)
    assert not Path("results").exists()
    return text.removeprefix("error: ")


def test_a_missing_file_is_named_with_those_that_are_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_study(tmp_path)
    message = refused(capsys, "nosuch.yaml")
    assert "nosuch.yaml: no such file" in message
    assert "study.yaml" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe\x00", "bad.yaml: is not text in UTF-8"),
        (b"", "a mapping of keys, but this file holds NoneType"),
        (b"- a\n- b\n", "a mapping of keys, but this file holds list"),
        (b"just words", "but this file holds str"),
        (b"study: [t\nmodel: m", "broken YAML: "),
        (b"study: t\nstudy: u\n", "line 2: key 'study' stands twice"),
        (b"study: t\nengine: &a {kind: vllm}\nsearch: *a\n", "aliases (*name) are not supported"),
        (b"study: !!python/object:os.system t\n", "tags (!name) are not supported"),
        (b"study: t\nmodel: " + b"[" * 30, "nested more than 20 levels deep"),
        (b"a" * 250_001, "larger than 250,000 bytes"),
    ],
)
def test_what_is_no_study_file_is_refused(capsys: pytest.CaptureFixture[str], content: bytes, told: str) -> None:
    Path("bad.yaml").write_bytes(content)
    message = refused(capsys, "bad.yaml")
    assert message.startswith("bad.yaml")
    assert told in message


@pytest.mark.parametrize("path", [".", "study.yaml/inner.yaml"])
def test_a_folder_or_a_path_through_a_file_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, path: str
) -> None:
    write_study(tmp_path)
    assert refused(capsys, path).startswith(f"{path}: ")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown section": ({"serach": {"trials": 3}}, "unknown key 'serach' in the study. Did you mean 'search'?"),
    "unknown key": ({"search": {"trails": 3}}, "unknown key 'trails' in search. Did you mean 'search.trials'?"),
    "key of another section": ({"search": {"timeout_s": 3}}, "Did you mean 'trial.timeout_s'?"),
    "text for a number": ({"search": {"trials": "many"}}, "search.trials: should be a valid integer, but got 'many'"),
    "true for a number": ({"workload": {"rounds": True}}, "workload.rounds: should be a valid integer, but got True"),
    "number out of range": ({"search": {"trials": 0}}, "search.trials: should be greater than or equal to 1"),
    "endless integer": ({"search": {"seed": 10**40}}, "search.seed: an integer is less than"),
    "not a number": ({"trial": {"timeout_s": float("nan")}}, "trial.timeout_s: nan is not a finite number"),
    "no duration": ({"trial": {"timeout_s": "soon"}}, "trial.timeout_s: a duration is a number of seconds or text"),
    "unknown choice": ({"penalty": {"grade": "none"}}, "penalty.grade: should be 'progress', 'elapsed'"),
    "missing key": ({"model": None}, "model: should be a valid string, but got None"),
    "no objective": ({"objective": {"maximize": None}}, "maximize or minimize is needed"),
    "one objective twice": (
        {"objective": {"maximize": ["goodput_rps", "goodput_rps"]}},
        "the same metric stands there twice",
    ),
    "two kinds of traffic": (
        {"workload": {"dataset": "a.jsonl", "traffic": "D(32,9)"}},
        "traffic and dataset exclude each other",
    ),
    "a trace with a load level": ({"workload": {"trace": "a.jsonl", "traffic": "D(128,32)"}}, "own arrival times"),
    "two loops": ({"workload": {"request_rate_rps": 3}}, "exactly one of concurrency and request_rate_rps is needed"),
    "processes of another client": (
        {"workload": {"client": "vllm-bench", "client_processes": 2}},
        "workload.client_processes: is for workload.client builtin, but that is vllm-bench; leave one out",
    ),
    "low above high": ({"search_space": {"max-num-seqs": {"int": [9, 3]}}}, "`low <= high` must hold, but got (low=9"),
    "no distribution": ({"search_space": {"max-num-seqs": 5}}, "search_space.max-num-seqs: 5 is not a distribution"),
    "log from 0": ({"search_space": {"max-num-seqs": {"int": [0, 3], "log": True}}}, "a log range needs `low > 0`"),
    "no choice": ({"search_space": {"max-num-seqs": {"choice": []}}}, "choice takes a list of at least one value"),
    "dashes": ({"search_space": {"--max-num-seqs": {"int": [1, 3]}}}, "write the flag without dashes: 'max-num-seqs'"),
    "underscores": ({"search_space": {"max_num_seqs": {"int": [1, 3]}}}, "flags have hyphens: write 'max-num-seqs'"),
    "reserved": ({"search_space": {"port": {"int": [1, 3]}}}, "search_space.port: is set by the autotuner itself"),
    "point outside": ({"search": {"points": [{"max-num-seqs": 3}]}}, "search.points[0]: max-num-seqs: 3 is not in"),
    "point that breaks a constraint": (
        {"constraints": ["max-num-seqs > 2"], "search": {"points": [{"max-num-seqs": 2}]}},
        "breaks the constraint `max-num-seqs > 2`",
    ),
    "broken constraint": ({"constraints": ["max-num-seqs >"]}, "constraints[0]: cannot read `max-num-seqs >` at"),
    "constraint on nothing": ({"constraints": ["max-seqs > 1"]}, "`max-seqs > 1` names 'max-seqs', which is neither"),
    "constraint of two types": ({"constraints": ["max-num-seqs > 'a'"]}, "cannot be evaluated for {'max-num-seqs': 2}"),
    "constraint by zero": ({"constraints": ["8 / (max-num-seqs - 2) > 1"]}, "division by zero"),
    "environment without a name": ({"engine": {"env": {"A B": 1}}}, "'A B' is not the name of an environment variable"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_or_value_is_told_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    changes, told = WRONG[case]
    path = write_study(tmp_path, **changes)
    message = refused(capsys, str(path))
    assert told in message
    assert re.match(re.escape(str(path)) + r", line \d+: ", message)


NOT_HERE: dict[str, tuple[dict[str, Any], str]] = {
    "flag the engine lacks": (
        {"search_space": {"max-num-sqs": {"int": [1, 3]}}},
        "search_space.max-num-sqs: the simulated engine has no flag --max-num-sqs. Did you mean 'max-num-seqs'?",
    ),
    "argument the engine lacks": ({"engine": {"args": {"blocksize": 3}}}, "Did you mean 'block-size'?"),
    "value of another type": (
        {"search_space": {"max-num-seqs": {"choice": ["few", 3]}}},
        "search_space.max-num-seqs: --max-num-seqs: invalid literal",
    ),
    "unknown fault": ({"engine": {"args": {"fault": "burn@load"}}}, "engine.args.fault: --fault 'burn@load'"),
    "unknown metric": (
        {"objective": {"maximize": "output_thruput_tok_s"}},
        "objective.maximize: there is no metric 'output_thruput_tok_s'. Did you mean 'output_throughput_tok_s'?",
    ),
    "metric at no level": ({"objective": {"maximize": "goodput_rps@c3"}}, "Did you mean 'goodput_rps@c8'?"),
    "count as objective": ({"objective": {"maximize": "tokens_out"}}, "tokens_out is a count that the workload sets"),
    "engine's figure the wrong way": (
        {"objective": {"maximize": "queue_length_max"}},
        "objective.maximize: of queue_length_max, lower is better; write minimize: queue_length_max",
    ),
    "steadiness as objective": (
        {"objective": {"maximize": [], "minimize": "drift"}},
        "drift tells how steady the measurement was",
    ),
    "loss as objective": (
        {"objective": {"maximize": "goodput_rps", "minimize": "answer_change", "slo": {"ttft_ms": {"mean": 5}}}},
        "objective.minimize: answer_change is held against the baseline, which has none; limit it under quality",
    ),
    "second objective unknown": (
        {"objective": {"minimize": ["ttft_ms_mean", "ttft_mean"]}},
        "objective.minimize: there is no metric 'ttft_mean'. Did you mean 'ttft_ms_mean'?",
    ),
    "second objective the wrong way": (
        {"objective": {"maximize": ["output_throughput_tok_s", "e2el_ms_mean"]}},
        "objective.maximize: of e2el_ms_mean, lower is better; write minimize: e2el_ms_mean",
    ),
    "perplexity without quality": (
        {"objective": {"maximize": [], "minimize": "perplexity"}},
        "perplexity is only measured where there is a quality section",
    ),
    "cost without a price": (
        {"objective": {"maximize": [], "minimize": "cost_per_million_tokens"}},
        "objective.minimize: cost_per_million_tokens needs a price",
    ),
    "energy without a GPU": (
        {"objective": {"maximize": [], "minimize": "energy_j_per_token"}},
        "objective.minimize: energy_j_per_token is that of the GPUs that a trial holds, but resources.gpus is 0",
    ),
    "highest load without an SLO": (
        {"objective": {"maximize": "max_load_under_slo"}, "workload": {"concurrency": [8, 2]}},
        "max_load_under_slo is the highest load that keeps the SLOs, but objective.slo has none",
    ),
    "highest load of one level": (
        {"objective": {"maximize": "max_load_under_slo", "slo": {"ttft_ms": {"mean": 500}}}},
        "workload has one.\nWrite several, such as concurrency: [4, 8, 16, 32]",
    ),
    "highest load at one level": (
        {"objective": {"maximize": "max_load_under_slo@c8", "slo": {"ttft_ms": {"mean": 500}}}},
        "there is no metric 'max_load_under_slo@c8'. Did you mean 'max_load_under_slo'?",
    ),
    "attainment of nothing": (
        {"objective": {"attainment": 0.9}},
        "objective.attainment: is the share of requests that must keep every limit of objective.slo; it has none",
    ),
    "attainment of a pooled latency": (
        {"objective": {"attainment": 0.9, "slo": {"itl_ms": {"p90": 50}}}},
        "objective.slo.itl_ms: objective.attainment judges requests one by one, and a request has no itl_ms",
    ),
    "percentile of too few requests": (
        {"objective": {"slo": {"ttft_ms": {"mean": 500, "p90": 900}}}},
        "objective.slo.ttft_ms.p90: a p90 needs 29 requests at a load level (95 % confidence), but requests 16 x "
        "rounds 1 are 16.\nRaise workload.requests to 29 or workload.rounds to 2",
    ),
    "percentile of too few requests in several rounds": (
        {"objective": {"maximize": [], "minimize": "ttft_ms_p99"}, "workload": {"requests": 64, "rounds": 4}},
        "objective.minimize: ttft_ms_p99: a p99 needs 299 requests at a load level (95 % confidence), but requests 64 "
        "x rounds 4 are 256.\nRaise workload.requests to 75 or workload.rounds to 5",
    ),
    "percentile of too few requests at a level": (
        {"objective": {"maximize": [], "minimize": "e2el_ms_p95@c8"}},
        "objective.minimize: e2el_ms_p95@c8: a p95 needs 59 requests",
    ),
    "time between tokens of answers with one": (
        {"objective": {"slo": {"tpot_ms": {"mean": 50}}}, "workload": {"traffic": "D(32,1)"}},
        "objective.slo.tpot_ms.mean: rests on answers of two tokens or more and needs 1 at a load level, but c8 has 0",
    ),
    "percentile of too few answers with gaps": (
        {"objective": {"maximize": [], "minimize": "itl_ms_p50@c8"}, "workload": {"traffic": "N(32,0)/(1,0)"}},
        "objective.minimize: itl_ms_p50@c8: rests on answers of two tokens or more and needs 5 at a load level, but",
    ),
    "more in flight than there are": (
        {"workload": {"concurrency": [4, 64]}},
        "workload.concurrency: 64 requests are never in flight at once where a load has 16",
    ),
    "arrivals until after the deadline": (
        {"workload": {"concurrency": [], "request_rate_rps": [2, 0.5], "rounds": 2}},
        "trial.timeout_s: 30 s are too short: until the last request has arrived, the loads and their warm-ups",
    ),
    "requests that do not fit": (
        {"engine": {"args": {"max-model-len": 39}}, "workload": {"prefix": {"tokens": 8}, "traffic": "D(24,8)"}},
        "engine.args.max-model-len: 39 tokens do not hold the longest request of the workload, 32 of prompt and 8 of",
    ),
    "requests of a restart that do not fit": (
        {
            "engine": {"args": {"max-model-len": 80}},  # which hold all that the search sends
            "workload": {"traffic": "U(1,60)/(1,40)"},
            "verify": {"top": 1},
        },
        "engine.args.max-model-len: 80 tokens do not hold the longest request of the workload, 56 of prompt and 37 of",
    ),
    "wrong direction": ({"objective": {"maximize": "ttft_ms_p90"}}, "lower is better; write minimize: ttft_ms_p90"),
    "unknown latency": ({"objective": {"slo": {"ttft": {"p90": 5}}}}, "no latency 'ttft'. Did you mean 'ttft_ms'?"),
    "unknown statistic": ({"objective": {"slo": {"ttft_ms": {"max": 5}}}}, "objective.slo.ttft_ms.max: there is no"),
    "misspelt latency before what rests on it": (
        {"objective": {"maximize": "goodput_rps", "slo": {"ttft": {"p90": 5}}}},
        "no latency 'ttft'. Did you mean 'ttft_ms'?",
    ),
    "SLO without a limit": ({"objective": {"slo": {"ttft_ms": {}}}}, "objective.slo.ttft_ms: has no limit"),
    "goodput without an SLO": (
        {"objective": {"maximize": "goodput_rps", "slo": {"itl_ms": {"p90": 5}}}},
        "objective.slo limits none of ttft_ms, tpot_ms, e2el_ms",
    ),
    "traffic from much to little": ({"workload": {"traffic": "U(9,3)/(1,2)"}}, "workload.traffic: `min <= max`"),
    "grid without steps": (
        {"search": {"sampler": "grid"}, "search_space": {"speed": {"float": [1, 2]}}},
        "search_space.speed: a grid needs a step",
    ),
    "grid without end": (
        {"search": {"sampler": "grid"}, "search_space": {"max-num-seqs": {"int": [1, 10**6]}}},
        "search.sampler grid: the space has more than",
    ),
    "gp with a condition": (
        {
            "search": {"sampler": "gp"},
            "search_space": {"seed": {"int": [1, 3]}, "speed": {"float": [1, 2], "when": "seed > 1"}},
        },
        "search.sampler gp cannot search parameters with a condition",
    ),
    "empty space": ({"search_space": {}}, "search_space is empty: name at least one parameter"),
    "nothing to try": ({"constraints": ["max-num-seqs > 256"]}, "constraints: no setting of search_space meets them"),
    "conditions in a circle": (
        {
            "search_space": {
                "seed": {"int": [1, 3], "when": "block-size > 1"},
                "block-size": {"int": [1, 3], "when": "seed > 1"},
            }
        },
        "go in a circle",
    ),
    "Python that is none": (
        {"engine": {"kind": "vllm", "args": {}, "python": "/bin/true"}},
        "engine.python: '/bin/true' does not run as a Python",
    ),
    "Python that is not there": (
        {"engine": {"kind": "vllm", "args": {}, "python": "venv/bin/python"}},
        "does not run as a Python: No such file",
    ),
}


@pytest.mark.parametrize("case", NOT_HERE)
def test_what_cannot_work_is_refused_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    changes, told = NOT_HERE[case]
    assert told in refused(capsys, str(write_study(tmp_path, **changes)))


@pytest.mark.parametrize(("arrivals", "rounds", "told"), [(20, 1, "20 x rounds 1 are 20"), (20, 2, None)])
def test_a_percentile_of_a_short_trace_needs_more_rounds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arrivals: int, rounds: int, told: str | None
) -> None:
    (tmp_path / "trace").write_text('{"timestamp": 1, "input_length": 8, "output_length": 4}\n' * arrivals)
    load = {"trace": str(tmp_path / "trace"), "rounds": rounds, "requests": 64}
    study = {**BASE, "workload": load, "objective": {"minimize": "ttft_ms_p90"}}
    (path := tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    if told is None:
        check_study(load_study(path), tmp_path)
    else:
        assert told in (said := refused(capsys, str(path)))
        assert "Raise workload.rounds to 2, or take a longer trace" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"slo": {"ttft_ms": {"p90": 900}}}, "workload": {"requests": 29}},
        {"objective": {"slo": {"ttft_ms": {"p90": 900}}}, "workload": {"rounds": 2}},
        {"objective": {"slo": {"ttft_ms": {"p99": 900}}, "attainment": 0.99}},
        {"objective": {"maximize": ["output_throughput_tok_s"], "minimize": ["ttft_ms_mean", "ttft_ms_p50@c8"]}},
        {"objective": {"minimize": "cost_per_million_tokens"}, "resources": {"price_per_hour": 2.5}},
        {"objective": {"minimize": "perplexity"}, "quality": {}},
        {
            "objective": {"maximize": "max_load_under_slo", "slo": {"ttft_ms": {"mean": 500}}},
            "workload": {"concurrency": [8, 2, 16]},
        },
        {"engine": {"args": {"max-model-len": 40}}, "workload": {"traffic": "D(32,8)"}},
    ],
)
def test_a_study_that_can_be_measured_is_not_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_study(load_study(write_study(tmp_path, **changes)), tmp_path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_study_in_configs_can_be_measured(tmp_path: Path, path: Path) -> None:
    check_study(load_study(path), tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"search_space": {"max-num-seqs": {"int": [1, 8]}}, "engine": {"args": {"dtype": "float16"}}}, None),
        ({"search_space": {"dtype": {"choice": ["auto", "float16"]}}}, "dtype"),
        (
            {
                "search_space": {
                    "kv-cache-dtype": {"choice": ["auto", "fp8"]},
                    "speculative-config": {"choice": [None, {"method": "ngram"}]},
                    "block-size": {"choice": [16, 32]},
                }
            },
            "kv-cache-dtype, speculative-config",
        ),
        ({"search_space": {"quantization": {"choice": [None, "fp8"]}}, "quality": {}}, None),
    ],
)
def test_a_space_that_may_change_answers_unchecked_is_noted(
    tmp_path: Path, changes: dict[str, Any], named: str | None
) -> None:
    notes = quality_notes(load_study(write_study(tmp_path, **changes)))
    assert [note.partition(" may change the answers")[0] for note in notes] == ([named] if named else [])
    assert all("quality: {}" in note for note in notes)


def test_an_override_is_named_as_the_place_of_its_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(write_study(tmp_path))
    message = refused(capsys, path, "--set", "search.trials=few")
    assert message.startswith("--set 'search.trials=few': search.trials: should be a valid integer, but got 'few'")
    assert "write key.path=value" in refused(capsys, path, "--set", "search.trials")
    assert "'study' is 'test', not a mapping" in refused(capsys, path, "--set", "study.name=x")
    assert "broken YAML" in refused(capsys, path, "--set", "search.trials=[" + "[" * 50)
    assert "search.trials: should be greater" in refused(capsys, path, "--trials", "0")


def vllm_study(folder: Path, **changes: Any) -> Path:
    """A study for vLLM, in a Python of which only the case at hand knows whether it holds one."""
    base = {
        "study": "test",
        "model": "bundled:smollm2-135m-instruct",
        "engine": {"kind": "vllm"},
        "search_space": {"max-num-seqs": {"int": [1, 8]}},
    }
    path = folder / "vllm.yaml"
    path.write_text(yaml.safe_dump(merged(base, changes)), encoding="utf-8")
    return path


@pytest.mark.skipif(not Path(OTHER_PYTHON).exists(), reason="no second Python on this machine")
def test_a_python_without_an_engine_is_refused_with_the_way_to_get_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refused(capsys, str(vllm_study(tmp_path, engine={"python": OTHER_PYTHON})))
    assert f"vllm is not installed in {OTHER_PYTHON}" in message
    assert "scripts/quickstart" in message


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("bundled:smollm3", "there is no bundled model 'smollm3'; bundled: bundled:smollm2-135m-instruct"),
        ("./nosuch", "nosuch: no such folder"),
        ("my model", "'my model' is neither a folder here nor a hub id"),
        (".", "has no config.json in it"),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str, told: str
) -> None:
    message = refused(capsys, str(vllm_study(tmp_path, model=model)))
    assert message.startswith("model: ")
    assert told in message


@pytest.mark.vllm
def test_a_model_larger_than_the_memory_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "giant"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        with (folder / name).open("wb") as file:
            file.truncate(8 * 2**40)  # a sparse file: it takes no space on the disk
    message = refused(capsys, str(vllm_study(tmp_path, model="giant")))
    assert "giant need 16384.0 GiB of memory, but this machine has" in message
    assert "Take a smaller" in message


@pytest.mark.vllm
@pytest.mark.slow
def test_a_flag_that_vllm_lacks_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, str(vllm_study(tmp_path, search_space={"max-num-seq": {"int": [1, 8]}})))
    assert re.match(
        r"search_space\.max-num-seq: vLLM \S+ has no flag --max-num-seq\. Did you mean 'max-num-seqs'", message
    )


@pytest.mark.slow
@pytest.mark.parametrize("resources", [{"cpus": 5000}, {"cpus": 1, "gpus": 64}])
def test_more_than_the_cluster_has_is_refused(tmp_path: Path, ray_address: str, resources: dict[str, float]) -> None:
    path = write_study(tmp_path, resources=resources)
    done = subprocess.run(
        [sys.executable, "-m", "raytune_autotuner", str(path), "--address", ray_address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    message = message_in(done.stderr)
    needs = f"{resources['cpus']} CPUs" + (f" and {resources['gpus']} GPUs" if "gpus" in resources else "")
    assert message.startswith(f"resources: a trial needs {needs} on one node")
    assert "but the cluster has 1 node: " in message


def test_a_cluster_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, str(write_study(tmp_path)), "--address", "127.0.0.1:1")
    assert message.startswith("--address 127.0.0.1:1: no Ray cluster answers there")


@pytest.mark.parametrize("place", ["study.yaml", "study.yaml/results", "/proc/results"])
def test_results_that_cannot_be_written_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str
) -> None:
    path = str(write_study(tmp_path))
    before = sorted(tmp_path.iterdir())
    message = refused(capsys, path, "--results", place)
    assert message.startswith(f"--results {place}: ")
    assert "cannot be written" in message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "STUDY.yaml | COMMAND"),
        (["stauts", "results"], "'stauts' is neither a command nor a file. Did you mean 'status'?"),
        (["study.yaml", "--trails", "3"], "unrecognized arguments: --trails 3"),
        (["study.yaml", "--trials", "few"], "invalid int value: 'few'"),
        (["logs"], "RESULTS"),
        (["logs", "nothere"], "nothere: no such folder"),
        (["logs", ".", "--engine"], "--engine needs a trial's number"),
        (["status", "nothere"], "nothere: no such folder"),
        (["status", "."], "not a results folder"),
        (["diagnose"], "ENGINE_LOG"),
        (["diagnose", "nothere.log"], "nothere.log: cannot be read: No such file or directory"),
        (["diagnose", "."], ".: cannot be read: Is a directory"),
    ],
)
def test_wrong_use_of_the_command_line_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert told in refused(capsys, *arguments)


def test_wrong_use_ends_a_real_process_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "raytune_autotuner", "nosuch.yaml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "nosuch.yaml: no such file" in message_in(done.stderr)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["logs", "-h"], ["diagnose", "--help"]])
def test_help_is_asked_for_and_no_mistake(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m raytune_autotuner")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"raytune_autotuner {__version__}\n"


def diagnosed(capsys: pytest.CaptureFixture[str], log: Path, exit_code: int | None = None) -> dict[str, Any]:
    """What `diagnose --json` says of a log."""
    code = [] if exit_code is None else ["--exit-code", str(exit_code)]
    assert main(["diagnose", str(log), *code, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == ["stage", "kind", "blame", "evidence", "remedy"]
    assert answer["stage"] in {None, *Stage}
    assert answer["kind"] in {None, *Kind}
    assert answer["blame"] in {None, *Blame}
    return dict(answer)


@pytest.mark.parametrize("file", ["badflag.log", "kvsmall.log", "noweights.log", "killworker.log", "offlinehub.log"])
def test_an_engine_log_is_diagnosed(capsys: pytest.CaptureFixture[str], file: str) -> None:
    expected = EXPECTED[file]
    found = diagnosed(capsys, LOGS / file, expected["exit_code"])
    assert {key: found[key] for key in ("stage", "kind", "blame")} == {
        key: expected[key] for key in ("stage", "kind", "blame")
    }
    assert expected["evidence"] in found["evidence"]
    assert found["remedy"]


def test_a_healthy_log_has_no_kind(capsys: pytest.CaptureFixture[str]) -> None:
    found = diagnosed(capsys, LOGS / "served.log")
    assert found == {"stage": "load", "kind": None, "blame": None, "evidence": None, "remedy": None}
    assert main(["diagnose", str(LOGS / "served.log")]) == 0
    assert capsys.readouterr().out == "no failure; stage reached: load\n"


def test_a_diagnosis_for_people_has_a_line_for_each_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(LOGS / "badflag.log"), "--exit-code", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["stage", "kind", "blame", "evidence", "remedy"]


@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 50, b"\n\n\n", b"\xff" * 100_000])
def test_a_log_that_is_none_is_diagnosed_without_a_guess(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    log = tmp_path / "garbage.log"
    log.write_bytes(content)
    assert diagnosed(capsys, log)["kind"] is None
    assert diagnosed(capsys, log, exit_code=1)["kind"] == "unknown"


def test_a_standard_input_that_is_closed_is_said() -> None:
    words = [sys.executable, "-m", "raytune_autotuner", "diagnose", "-"]
    done = subprocess.run(words, preexec_fn=lambda: os.close(0), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "-: cannot be read: standard input is closed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_log_is_read_from_standard_input_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "raytune_autotuner", "diagnose", "-", "--exit-code", "1", "--json"],
        input=(LOGS / "kvsmall.log").read_bytes(),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["kind"] == "kv-cache-too-small"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("stat", ["status"]),
        ("stu", ["study.yaml"]),
        ("study.yaml --res", ["--results", "--resume"]),
        ("status results/", ["results/test-20260101-120000/"]),
        ("logs results/test-20260101-120000 ", ["0", "1"]),
        ("export results --format c", ["compose"]),
        ("verify results/test-20260101-120000 --trial ", ["0", "1"]),
        ("clean --results res", ["results/"]),
    ],
)
def test_tab_offers_what_can_follow(tmp_path: Path, typed: str, offered: list[str]) -> None:
    study = write_study(tmp_path)
    for number in range(2):
        (tmp_path / "results" / "test-20260101-120000" / "trials" / f"{number}-abc").mkdir(parents=True)
    shutil.copy(study, tmp_path / "results" / "test-20260101-120000")
    line, answer = f"raytune-autotuner {typed}", tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    asked |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    command = [sys.executable, "-m", "raytune_autotuner"]
    subprocess.run(command, env={**os.environ, **asked, "PYTHONPATH": str(CONFIGS.parent)}, cwd=tmp_path, check=True)
    found = [word.strip() for word in answer.read_text().splitlines()]
    assert [word for word in found if typed.endswith("--res") or not word.startswith("--")] == offered
