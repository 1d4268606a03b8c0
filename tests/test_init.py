"""`init`: what it looks at, and the file that it leaves, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_autotuner.cli import main
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.study import Study
from raytune_autotuner.tune.proposal.facts import look_at_host, look_at_model
from tests.test_memory import LLAMA, SMOLLM

ROOT = Path(__file__).parent.parent
SHAPE = SMOLLM | {"max_position_embeddings": 8192}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder of a name that YAML would read as something else."""
    found = tmp_path / "my: model #1"
    found.mkdir()
    (found / "config.json").write_text(json.dumps(SHAPE))
    return found


def test_a_study_goes_to_standard_output_and_what_is_said_to_standard_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promises = ["--slo", "ttft_ms.p90=500", "--slo", "tpot_ms.mean=80"]
    assert main(["init", folder.name, *promises, "--traffic", "U(10,90)/(5,20)", "--minutes", "20"]) == 0
    said = capsys.readouterr()
    Path("study.yaml").write_text(said.out)
    study = load_study(Path("study.yaml"))
    assert study.model == str(folder), "from whatever folder it is run"
    assert study.workload.traffic == "U(10,90)/(5,20)"
    assert study.objective.slo == {"ttft_ms": {"p90": 500}, "tpot_ms": {"mean": 80}}
    assert study.search.time_budget == 1200
    assert "to run it: python -m raytune_autotuner STUDY.yaml" in said.err
    assert main(["check", "study.yaml", "--set", "engine.kind=simulated"]) == 0
    assert "study my-model-1" in capsys.readouterr().out


@pytest.mark.vllm
def test_the_installed_vllm_accepts_what_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(folder), "--minutes", "300", "--output", "study.yaml"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["check", "study.yaml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not [one for one in told["suggestions"][:2] if one["refused"]], "neither the baseline nor the first point"
    assert not [why for why in told["reasons"] if not why.startswith("breaks ")]


def test_a_hub_id_that_is_not_here_gets_a_study_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "org/Name-0.5B", "--output", "study.yaml"]) == 0
    said = capsys.readouterr()
    assert "could not look at the model's config.json: 'org/Name-0.5B' is not in the hub's cache" in said.err
    assert "# Not seen: the model's config.json" in Path("study.yaml").read_text()
    assert isinstance(load_study(Path("study.yaml")), Study)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["org/no/such/folder"], "no such folder"),
        (["org/name", "--traffic", "short"], "--traffic: should be D(in,out)"),
        (["org/name", "--slo", "speed.p90=3"], "there is no latency 'speed'"),
        (["org/name", "--minutes", "soon"], "invalid float value: 'soon'"),
        (["org/name", "--minutes", "1"], "--minutes 1: is too short"),
        (["org/name", "--address", "127.0.0.1:1"], "no Ray cluster answers there"),
        (["org/name", "--output", "no/such/study.yaml"], "study.yaml: cannot be written: No such file"),
        (["org/name", "--output", "hub"], "--output hub: exists already"),
        ([], "the following arguments are required: MODEL"),
    ],
    ids=str,
)
def test_a_wrong_option_is_told_and_nothing_is_written(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("hub").mkdir()
    assert main(["init", *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert told in said.err
    assert len(said.err.splitlines()) <= 3
    assert [path.name for path in Path().iterdir()] == ["hub"]


def test_the_python_with_the_engine_is_asked_and_written_down(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without any packages
    other.chmod(0o755)
    assert main(["init", str(folder), "--python", str(other), "--output", "study.yaml"]) == 0
    assert "no vLLM is installed in this Python" in capsys.readouterr().err
    assert load_study(Path("study.yaml")).engine.python == other
    assert main(["init", str(folder), "--python", "no/python"]) == 2
    assert "does not run as a Python" in capsys.readouterr().err


def test_a_model_in_the_hubs_cache_is_looked_at(tmp_path: Path) -> None:
    kept = tmp_path / "hub" / "models--org--name"
    snapshot = kept / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 4096}))
    (snapshot / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    found = look_at_model("org/name")
    assert (found.name, found.longest, found.unseen, found.by_name) == ("org/name", 1024, (), False)
    assert found.weight_gib == pytest.approx(15, abs=0.1)


def test_this_machine_has_what_the_system_says() -> None:
    host = look_at_host([])
    assert 1 <= host.cpus <= len(os.sched_getaffinity(0))
    assert set(host.cores) <= os.sched_getaffinity(0)
    assert 0 < max(host.numa_gib) <= host.memory_gib
    assert (host.gpus, host.gpu_gib) == (0, None)


@pytest.mark.slow
def test_the_nodes_of_a_cluster_are_asked(ray_address: str) -> None:
    # In a process of its own: Ray reads once whether it is to show a token.
    code = """
import json, sys
from raytune_autotuner.tune.proposal.facts import look_at_cluster
site = look_at_cluster("org/name", sys.argv[1])
print(json.dumps([[host.memory_gib for host in site.hosts], site.hosts[0].cpus, site.on_gpus]))
"""
    command = [sys.executable, "-c", code, ray_address]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True, cwd=ROOT)
    memory_gib, cpus, on_gpus = json.loads(done.stdout)
    assert memory_gib == [look_at_host([]).memory_gib]
    assert cpus <= 4
    assert not on_gpus
