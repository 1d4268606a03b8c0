"""What could make an engine load code is refused wherever it stands, unless the study says that it means it."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.trust import danger, exposes
from tests.hostile import CODE_FLAGS, CODE_VARIABLES
from tests.studies import BASE, merged

HARMLESS: dict[str, Any] = {
    "trust-remote-code": False,
    "no-trust-remote-code": True,
    "middleware": [],
    "worker-extension-cls": "",
    "load-format": "safetensors",
    "distributed-executor-backend": "mp",
    "compilation-config": {"mode": 3, "backend": "inductor", "custom_ops": ["+rms_norm"], "cudagraph_mode": "FULL"},
    "compilation-config.splitting_ops": ["vllm.unified_attention"],
    "compilation-config.inductor_compile_config": {"max_autotune": True, "coordinate_descent_tuning": False},
    "speculative-config": '{"method": "eagle3", "model": "org/draft-1.5", "num_speculative_tokens": 3}',
    "spec-model": "org/draft",
    "hf-overrides": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "kv-transfer-config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
    "chat-template": "template.jinja",
    "reasoning-parser": "qwen3",
    "attention-backend": "FLASH_ATTN",
    "max-num-seqs": 64,
    "dtype": "bfloat16",
    "env:VLLM_CPU_KVCACHE_SPACE": "2",
    "env:VLLM_DISABLE_COMPILE_CACHE": "1",
    "env:PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "env:OMP_NUM_THREADS": "4",
    "env:NCCL_P2P_DISABLE": "1",
    "env:CUDA_MODULE_LOADING": "LAZY",
    "env:HF_TOKEN": "x",
    "env:HF_HOME": "/data/hub",
    "env:MY_API_KEY": "x",
}
MORE_CODE: dict[str, Any] = {
    "compilation-config.backend": "a.B",
    "compilation-config.inductor_compile_config.cpp.cxx": ["/tmp/x"],
    "compilation-config": ' {"inductor_passes": {"x": "f"}}',
    "structured-outputs-config.reasoning-parser-plugin": "/tmp/x.py",
    "kv-transfer-config": {"kv_connector_extra_config": {"external_backend.x.module_path": "m"}},
    "ec-manager-config": {"encoder_cache_manager_cls": "x"},
    "logging-config": {"pylogging_config_file": "/tmp/x.json"},
    "hf-overrides": {"auto_map": {"AutoModel": "modeling.Évil"}},
    "spec-method": "custom_class",
    "load-format": "PT",
    "model-loader-extra-config": {"x": 1},
    "env:LD_AUDIT": "/tmp/x.so",
    "env:GCONV_PATH": "/tmp",
    "env:http_proxy": "http://127.0.0.1:1",
    "env:VLLM_CACHE_ROOT": "/tmp",
    "env:GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES": "1",
}


def with_(name: str, value: Any, **engine: Any) -> dict[str, Any]:
    """A study with a flag or a variable of this value among its fixed ones."""
    section, key = ("env", name.removeprefix("env:")) if name.startswith("env:") else ("args", name)
    return merged(BASE, {"engine": {section: {key: value}, **engine}})


def searched(name: str, value: Any) -> dict[str, Any]:
    return merged(BASE, {"search_space": {name: {"choice": [value]}}})


DANGERS = {**{f"env:{name}": "/tmp/x" for name in CODE_VARIABLES}, **CODE_FLAGS}


@pytest.mark.parametrize(("name", "value"), [*DANGERS.items(), *MORE_CODE.items()], ids=str)
def test_what_loads_code_is_refused_with_the_key_that_allows_it(name: str, value: Any) -> None:
    for study in (with_(name, value), searched(name, value)):
        with pytest.raises(ConfigError, match=r"add engine: \{trust_code: true\}") as refused:
            parse_study(study)
        assert name.removeprefix("env:") in str(refused.value)
    assert parse_study(with_(name, value, trust_code=True)).engine.trust_code


@pytest.mark.parametrize(("name", "value"), HARMLESS.items(), ids=str)
def test_what_is_harmless_needs_no_word(name: str, value: Any) -> None:
    assert danger(name, value) is None
    parse_study(with_(name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hf-token", "x"),
        ("otlp-traces-endpoint", "https://me:pw@host/x"),
        ("kv-transfer-config", {"kv_connector_extra_config": {"password": "x"}}),
        ("tokenizer", "hf_0123456789abcdef"),
    ],
)
def test_a_secret_that_the_process_list_would_show_is_refused_and_not_repeated(name: str, value: Any) -> None:
    for study in (with_(name, value), with_(name, value, trust_code=True), searched(name, value)):
        with pytest.raises(ConfigError, match="the process list would show") as refused:
            parse_study(study)
        assert "pw" not in str(refused.value)
        assert "hf_0" not in str(refused.value)
    assert not exposes("hf-token", True)
    assert not exposes("long-prefill-token-threshold", 4)


@pytest.mark.parametrize(
    "word", ["--api-key=x1y2z3", "--hf-token=x1y2z3", "HF_TOKEN=x1y2z3", "--proxy=http://u:x1y2z3@h"]
)
def test_a_secret_in_a_word_of_the_command_is_refused_too(word: str) -> None:
    from_outside = ["HF_TOKEN=$TOKEN", 'HF_TOKEN="$HF_TOKEN" exec server']
    engine = {"kind": "command", "command": ["server", "--port", "{port}", "--key-file=/x", *from_outside, word]}
    with pytest.raises(ConfigError, match=r"engine\.command: holds a secret") as refused:
        parse_study({**BASE, "engine": engine})
    assert "x1y2z3" not in str(refused.value)
    engine["command"] = engine["command"][:-1]
    with pytest.raises(ConfigError, match=r"engine\.version: holds a secret"):
        parse_study({**BASE, "engine": {**engine, "version": ["server", word]}})
    assert parse_study({**BASE, "engine": engine}).engine.kind == "command"


def test_a_secret_is_no_parameter() -> None:
    with pytest.raises(ConfigError, match="a secret is no parameter"):
        parse_study(searched("env:HF_TOKEN", "a"))


def test_a_model_is_no_flag() -> None:
    with pytest.raises(ConfigError, match="would be a flag to the engine"):
        parse_study({**BASE, "model": "--trust-remote-code"})
