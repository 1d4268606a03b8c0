"""A setting for where it is served: whole, quoted, without secrets, and as the formats' own schemas want it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_autotuner import cli
from raytune_autotuner.cli.results import EXPORT_FORMS
from raytune_autotuner.engine.flags import arguments
from raytune_autotuner.report.best import caution as caution_of
from raytune_autotuner.report.export import FORMS, Form, export
from raytune_autotuner.report.html.evidence import gather
from raytune_autotuner.report.recheck import claim_of
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.report.status import StudyStatus, write_status
from raytune_autotuner.report.summary import summarize
from raytune_autotuner.report.verdict import study_verdict
from raytune_autotuner.report.writing import write_json
from raytune_autotuner.study.errors import WRONG_USE, ConfigError
from raytune_autotuner.study.trial import State, TrialRow
from tests.report_samples import BASE, again, failed, make_study, measured, running, setting, verified
from tests.studies import run_study, write_study
from tests.study_folders import VERSIONS, make_folder

HOSTILE = "a \"b\" $HOME $(id) `id`; 'x' \\ # {{ }}"
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
SPACE = {
    "max-num-seqs": {"int": [1, 64]},
    "block-size": {"choice": [16, 32, 64]},
    "enable-prefix-caching": "bool",
    "env:VLLM_CPU_OMP_THREADS_BIND": {"choice": ["auto", "0-1"]},
    "chat-template": {"choice": [HOSTILE, "plain"]},
    "tensor-parallel-size": {"choice": [1, 2]},
    "env:VLLM_USE_V2": {"choice": [None, "1"]},
}
ARGS = {"max-model-len": 2048, "compilation-config": {"mode": 3}, "enforce-eager": False}
RECORDER = """#!/usr/bin/env python3
import json, os, sys
json.dump({"argv": sys.argv[1:], "env": dict(os.environ)}, open(os.environ["RECORD"], "w"))
"""


def folder_of(parent: Path, **changes: Any) -> ResultsFolder:
    """A study on vLLM of which trial 2 is the verified winner, with a hostile value in it."""
    engine = {"kind": "vllm", "args": ARGS, "env": {"HF_TOKEN": "hf_abcdefghijklmnop", "VLLM_CPU_KVCACHE_SPACE": "2"}}
    study = make_study(**{"model": MODEL, "engine": engine, "search_space": SPACE, **changes})
    params = {**setting(16, bind="0-1"), "chat-template": HOSTILE, "tensor-parallel-size": 2, "env:VLLM_USE_V2": None}
    rows = [measured(0, 100.0), failed(1, setting(64)), measured(2, 143.0, params), measured(3, 121.0, setting(32))]
    scores: dict[int, tuple[float, ...]] = {0: (100.0, 97.0, 103.0), 2: (140.0, 137.0, 144.0), 3: (119.0, 118.0, 123.0)}
    return make_folder(parent, verified(rows, scores), study)


def exported(folder: ResultsFolder, form: Form, **options: Any) -> str:
    return export(folder, form, as_flags=arguments, **options)


def recorded(parent: Path, program: str, script: str) -> dict[str, Any]:
    """What a program of this name was really given when a shell ran the script."""
    place = parent / program
    place.write_text(RECORDER)
    place.chmod(0o755)
    record = parent / "record.json"
    environment = {**os.environ, "PATH": f"{parent}:{os.environ['PATH']}", "RECORD": str(record)}
    subprocess.run(["bash", "-c", script], env=environment, check=True, timeout=60)
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def engine_arguments(command: list[str]) -> list[str]:
    """The engine's own arguments, model, name and address taken off."""
    return command[command.index("--served-model-name") + 2 : command.index("--host")]


def wanted(folder: ResultsFolder, number: int = 2) -> list[str]:
    """The arguments of a trial as its engine had them."""
    row = next(row for row in folder.read_rows() if row.number == number)
    return arguments(folder.load_study().setting(row.params))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_where_the_setting_comes_from_and_what_it_was_worth(tmp_path: Path, form: Form) -> None:
    text = exported(folder_of(tmp_path), form)
    for fact in ("study: sample", "trial: 2", "vllm 0.32.0", "output_throughput_tok_s 140", "95 % interval"):
        assert fact in text


@pytest.mark.parametrize("form", FORMS)
def test_no_form_holds_a_secret_or_its_mask(tmp_path: Path, form: Form) -> None:
    text = exported(folder_of(tmp_path), form)
    assert "hf_abc" not in text
    assert "***" not in text


def test_a_shell_gives_the_engine_every_value_as_it_is(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    run = recorded(tmp_path, "vllm", exported(folder, "vllm"))
    assert run["argv"][:2] == ["serve", MODEL]
    assert engine_arguments(run["argv"]) == wanted(folder)
    assert HOSTILE in run["argv"]
    assert run["argv"][-4:] == ["--host", "127.0.0.1", "--port", "8000"]
    assert run["env"]["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert run["env"]["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_docker_gets_gpus_environment_and_the_same_arguments(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    argv = recorded(tmp_path, "docker", exported(folder, "docker"))["argv"]
    assert argv[:2] == ["run", "--rm"]
    assert argv[argv.index("--gpus") + 1] == "2"
    assert argv[argv.index("--publish") + 1] == "127.0.0.1:8000:8000"
    assert argv[argv.index("--entrypoint") + 1 :][:4] == ["vllm", "vllm/vllm-openai:v0.32.0", "serve", MODEL]
    variables = [argv[i + 1] for i, part in enumerate(argv) if part == "--env"]
    assert variables == ["HF_TOKEN", "VLLM_CPU_KVCACHE_SPACE=2", "VLLM_CPU_OMP_THREADS_BIND=0-1"]
    assert engine_arguments(argv) == wanted(folder)


def test_the_config_file_holds_what_the_engine_was_given(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (config,) = documents(text := exported(folder, "yaml"))
    assert config.pop("model") == MODEL
    assert config.pop("served-model-name") == MODEL
    assert arguments(config) == wanted(folder)
    assert "#   VLLM_CPU_OMP_THREADS_BIND=0-1" in text


def test_the_compose_file_is_one_by_the_specification(tmp_path: Path) -> None:
    compose = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    folder = folder_of(tmp_path)
    text = exported(folder, "compose")
    compose.PyCompose.from_yaml(text).validate()
    service = documents(text)[0]["services"]["vllm-sample"]
    command = [part.replace("$$", "$") for part in service["command"]]
    assert "$HOME" not in " ".join(service["command"]).replace("$$", "")
    assert engine_arguments(command) == wanted(folder)
    assert service["environment"]["HF_TOKEN"] is None
    assert service["environment"]["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}
    assert service["labels"]["raytune-autotuner.trial"] == "2"


def test_a_compose_file_with_an_unknown_key_would_have_been_refused(tmp_path: Path) -> None:
    compose = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    broken = exported(folder_of(tmp_path), "compose").replace("    image:", "    imag:")
    with pytest.raises(ValueError, match="imag"):
        compose.PyCompose.from_yaml(broken)


def test_the_kubernetes_objects_keep_the_published_schema(tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    folder = folder_of(tmp_path)
    deployment, service = documents(exported(folder, "k8s"))
    for one in (deployment, service):
        validate.validate(one, validate.latest_version(), strict=True)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert engine_arguments([part.replace("$$", "$") for part in container["args"]]) == wanted(folder)
    assert "$(id)" not in " ".join(container["args"]).replace("$$", "")
    variables = {one["name"]: one for one in container["env"]}
    assert variables["VLLM_CPU_OMP_THREADS_BIND"]["value"] == "0-1"
    assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_a_kubernetes_object_with_an_unknown_key_would_have_been_refused(tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    deployment, _ = documents(exported(folder_of(tmp_path), "k8s"))
    deployment["spec"]["replica"] = 1
    with pytest.raises(validate.ValidationError):
        validate.validate(deployment, validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ["Llama.3_1--x", "a" * 64, "7b"])
def test_a_studys_name_becomes_one_that_kubernetes_takes(tmp_path: Path, name: str) -> None:
    deployment, service = documents(exported(folder_of(tmp_path, study=name), "k8s"))
    found = service["metadata"]["name"]
    assert found == deployment["metadata"]["name"]
    assert len(found) <= 63
    assert found.replace("-", "").isalnum()
    assert found[0].isalpha()
    assert not found.endswith("-")


@pytest.mark.parametrize("form", ["docker", "compose", "k8s"])
def test_a_models_folder_is_mounted(tmp_path: Path, form: Form) -> None:
    text = exported(folder_of(tmp_path, model="/models/my llama"), form)
    assert "/models/my llama" in text
    assert "--served-model-name" in text
    if form == "docker":
        argv = recorded(tmp_path, "docker", text)["argv"]
        assert argv[argv.index("--volume") + 1] == "/models/my llama:/model:ro"
        assert argv[argv.index("serve") + 1] == "/model"


def test_without_gpus_in_the_study_none_are_asked_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    cpu = {"engine": {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, "cluster": "1 node: 2 CPUs, 0 GPUs"}
    folder.write_versions({**VERSIONS, **cpu})
    argv = recorded(tmp_path, "docker", exported(folder, "docker"))["argv"]
    assert "--gpus" not in argv
    assert "vllm/vllm-openai-cpu:v0.32.0" in argv
    assert "nvidia" not in exported(folder, "k8s") + exported(folder, "compose")


def test_a_community_build_is_started_by_its_module(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.write_versions({**VERSIONS, "engine": {"vllm-cpu": "0.32.0"}})
    argv = recorded(tmp_path, "python", exported(folder, "vllm"))["argv"]
    assert argv[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", MODEL]


def test_an_image_of_ones_own_takes_the_place_of_the_usual_one(tmp_path: Path) -> None:
    assert "registry.example/vllm:7" in exported(folder_of(tmp_path), "docker", image="registry.example/vllm:7")


def test_any_trial_can_be_exported_and_a_failed_one_says_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert "--max-num-seqs 32" in exported(folder, "vllm", number=3)
    assert "trial: 0 (baseline)" in exported(folder, "vllm", number=0)
    assert "caution: this trial failed: out-of-memory at kv-cache" in exported(folder, "vllm", number=1)


def test_a_bundled_model_is_the_folder_that_the_trial_loaded(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, model="bundled:smollm2-135m-instruct")
    with pytest.raises(ConfigError, match=r"no command\.json"):
        exported(folder, "docker")
    place = folder.trial_dir(2, "abc_00002")
    place.mkdir(parents=True)
    write_json(place / "command.json", {"argv": ["python", "-m", "x", "--model", "/cache/smol"]})
    assert "--volume /cache/smol:/model:ro" in exported(folder, "docker")


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--trial", "99"], "has no such trial. It has trials 0 to"), (["--format", "nope"], "invalid choice")],
)
def test_wrong_use_is_told_and_nothing_is_printed(
    tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(folder_of(tmp_path).path), *options]) == WRONG_USE
    out, error = capsys.readouterr()
    assert out == ""
    assert said in error


def test_without_a_measured_trial_there_is_no_winner_to_export(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, [failed(0)], make_study(engine={"kind": "vllm"}, constraints=[]))
    with pytest.raises(ConfigError, match="nothing was measured"):
        exported(folder, "vllm")


def test_a_simulated_engine_has_a_launch_line_and_no_container(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, [measured(0, 100.0)])
    with pytest.raises(ConfigError, match="exists for vLLM only"):
        exported(folder, "docker")


def test_the_command_prints_the_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path)
    assert cli.main(["export", str(folder.path), "--format", "yaml"]) == 0
    assert capsys.readouterr().out == exported(folder, "yaml")
    assert EXPORT_FORMS == FORMS


def test_the_winner_is_the_one_that_the_studys_end_has_written_down(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_json(folder.verdict_file, {"winner": 3, "sentence": "Run trial 3.", "warning": None})
    assert "trial: 3" in exported(folder, "vllm")


def test_a_run_that_was_killed_after_a_resume_gives_one_answer_everywhere(tmp_path: Path) -> None:
    study = make_study(engine={"kind": "vllm"}, constraints=[], model=MODEL)
    spelled_out = {"max-num-seqs": 16, "block-size": 16}
    rows = [measured(0, 100.0), measured(1, 120.0, spelled_out), measured(2, 120.0, {"max-num-seqs": 9})]
    folder = make_folder(tmp_path, rows, study)
    folder.write_versions({**VERSIONS, "defaults": {"block-size": 16}})  # so trials 1 and 2 change one thing each
    write_json(folder.verdict_file, {"winner": 2, "sentence": "As before the resume.", "warning": None})
    write_status(folder, replace(StudyStatus.begin(1), pid_started=1))
    sentence = gather(folder).answer.sentence
    assert sentence.startswith("Run trial 1")
    assert summarize(folder).answer == claim_of(folder).sentence == sentence
    assert "trial: 1" in exported(folder, "vllm")


def test_figures_of_a_single_measurement_are_called_so(tmp_path: Path) -> None:
    study = make_study(engine={"kind": "vllm"}, constraints=[], model=MODEL)
    rows = [measured(0, 100.0), replace(measured(1, 120.0, {"max-num-seqs": 8}), violation=0.3)]
    text = exported(make_folder(tmp_path, rows, study), "vllm", number=1)
    assert "output_throughput_tok_s 120, baseline 100 (one measurement each)" in text
    assert "caution: it does not meet every SLO of the study" in text


@pytest.mark.parametrize(
    ("row", "caution"),
    [
        (measured(1, 120.0, setting(8)), None),
        (replace(failed(1, setting(8)), penalty=None), "this trial failed: out-of-memory at kv-cache"),
        (replace(running(1, setting(8)), state=State.STOPPED, bound=9.0), "this trial was ended before its last load"),
        (replace(running(1, setting(8)), state=State.INTERRUPTED), "this trial has no figures: it is interrupted"),
        (replace(running(1, setting(8)), state=State.EARLIER), "this setting of an earlier run has not been measured"),
    ],
)
def test_what_speaks_against_a_setting_is_named_for_what_it_is(row: TrialRow, caution: str | None) -> None:
    found = caution_of(row, study_verdict(make_study(), [measured(0, 100.0), row]))
    assert found is None if caution is None else str(found).startswith(caution)


def test_a_setting_that_failed_when_it_was_started_again_is_not_said_to_miss_an_slo() -> None:
    rows = verified([measured(0, 100.0), measured(1, 120.0, setting(8))], {0: BASE})
    rows.append(again(90, rows[1], 0))
    found = caution_of(rows[1], study_verdict(make_study(), rows))
    assert found == "trial 1 failed when started again (out-of-memory in trial 90)"


@pytest.mark.slow
def test_the_exported_launch_line_starts_a_server_that_answers(tmp_path: Path) -> None:
    path = write_study(tmp_path, search={"trials": 2, "points": [{"max-num-seqs": 8, "block-size": 16}]})
    done, folder = run_study(path)
    assert done.returncode == 0, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = exported(folder, "vllm").replace("--port 8000", f"--port {port}")
    server = subprocess.Popen(["bash", "-c", f"exec {line}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert _answers(f"http://127.0.0.1:{port}/v1/models", server)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def _answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(json.load(answer)["data"])
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    return False
