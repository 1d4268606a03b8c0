"""What in a study could make an engine load or run code, or give a secret away: named, so that it can be refused.

In: names and values of a study, as pure data. Out: why one is not harmless, or None. `engine.trust_code: true` is the
study's word that it means it. Flags are vLLM's, known by name, and by the keys of their configurations; of environment
variables, which any library may read, only those are harmless that are known to be. It asks no engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from raytune_autotuner.study.masking import is_secret, looks_secret

_VARIABLE = "env:"
CODE = "can make the engine load or run other code"
FILES = "opens the machine's files to whoever can send a request"
ELSEWHERE = "can make the engine send its tokens to another host"
UNKNOWN = "is no variable of which it is known that it makes no program load or run other code"
_FLAGS = {
    **dict.fromkeys(
        (
            "additional-config",
            "io-processor-plugin",
            "log-config-file",
            "logits-processors",
            "middleware",
            "model-class-overrides",
            "model-loader-extra-config",
            "ray-workers-use-nsight",
            "reasoning-parser-plugin",
            "scheduler-cls",
            "tool-parser-plugin",
            "tool-server",
            "trust-remote-code",
            "worker-cls",
            "worker-extension-cls",
        ),
        CODE,
    ),
    "allowed-local-media-path": FILES,
}
"""Flags that are never harmless but where they are off."""
_HARMLESS_VALUES = {
    "distributed-executor-backend": {"external_launcher", "mp", "ray", "uni"},
    "load-format": {
        "auto",
        "bitsandbytes",
        "dummy",
        "fastsafetensors",
        "gguf",
        "hf",
        "instanttensor",
        "mistral",
        "runai_streamer",
        "runai_streamer_sharded",
        "safetensors",
        "sharded_state",
    },
}
"""Of flags that take names from plugins, modules or formats that hold code, too."""
_DRAFT = {"spec-method", "spec-model"}
"""Flags whose value is a method or a model, or else names a class."""
_CUSTOM = "custom_class"
_KEYS = re.compile(
    r"(?:^|[^a-z])(?:cls|class|module|module_path|plugins?|qualname|callable|hook|cxx|(?:py)?logging_config_file)$"
)
"""Keys of configurations under which a module, a class or a program is named."""
_PLAIN_ONLY = {"inductor_compile_config", "inductor_passes"}
"""Configurations that take numbers and switches, and whose texts name functions and programs."""
_OPERATIONS = {"custom_ops", "splitting_ops"}
"""Lists of operations, which have dotted names too."""
_DATA = {"json", "jsonl", "jinja", "jinja2", "txt", "yaml", "yml", "safetensors", "gguf", "model"}
"""Ends of files' names, which look like those of classes otherwise."""
_SECRET_KEYS = re.compile(
    r"(?:.*_)?(?:api_?key|(?:hf|auth|access|api|bearer|refresh)_token|access_key|secret|passw(?:or)?d)"
)
_OFF: tuple[Any, ...] = (None, False, "", [], {})
_HARMLESS_VARIABLE = re.compile(
    r"(VLLM|HF|HUGGING_FACE|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|SAFETENSORS|RAYON"
    r"|OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|DNNL|ONEDNN|NUMEXPR|MALLOC"
    r"|CUDA|CUBLAS|CUBLASLT|CUDNN|NVIDIA|NVTE|NCCL|TORCH|PYTORCH|TORCHINDUCTOR|TORCHDYNAMO|TRITON|FLASHINFER|GLOO|UCX"
    r"|NVSHMEM|HIP|HSA|ROCR|ROCM|RCCL|AITER|MIOPEN|GPU|ZE|SYCL|CCL|ONEAPI|HABANA|PT_HPU|ASCEND|HCCL"
    r"|SGLANG|AWS|S3|GOOGLE|AZURE|LC)_\w+|LANG|NO_COLOR|TZ"
)
_CODE_IN_VARIABLE = {
    *("PATH", "PATHS", "DIR", "DIRS", "ROOT", "FILE", "HOME", "MODULES", "SO", "LIB", "LIBS", "LIBRARY", "LIBRARIES"),
    *("DRIVERS", "PLUGIN", "PLUGINS", "PRELOAD", "OVERRIDE", "MANAGER", "INJECTION", "INJECTION64", "SERIALIZATION"),
    *("CC", "CXX", "LD", "NVCC", "PTXAS", "CUOBJDUMP", "NVDISASM", "COMPILER", "CMD", "COMMAND", "EXEC", "EXECUTABLES"),
}
"""Parts of names under which a variable says where code, a compiler or a compiled cache lies."""
_DATA_VARIABLES = {"HF_HOME"}
_CODE_VARIABLES = {"VLLM_TEST_FORCE_LOAD_FORMAT", "TORCH_LOGS"}
_ADDRESS_VARIABLES = {"VLLM_USAGE_STATS_SERVER"}


def danger(name: str, value: Any) -> str | None:
    """Why a flag or an `env:NAME` with this value is not harmless; None where it is, as far as its name tells.

    >>> danger("trust-remote-code", True), danger("trust-remote-code", False), danger("env:VLLM_LOGGING_LEVEL", "INFO")
    ('can make the engine load or run other code', None, None)
    """
    if name.startswith(_VARIABLE):
        return _danger_of_variable(name.removeprefix(_VARIABLE))
    head, _, keys = name.partition(".")
    if head in _FLAGS:
        return None if _is_off(value) else _FLAGS[head]
    if head in _HARMLESS_VALUES:
        return None if _is_off(value) or str(value).lower() in _HARMLESS_VALUES[head] else CODE
    if not keys and head in _DRAFT:
        return CODE if _names_code(value) else None
    return CODE if any(_is_code(*leaf) for leaf in _leaves(name, value)) else None


def exposes(name: str, value: Any) -> bool:
    """Whether a flag with this value would show a secret in the process list."""
    if name.startswith(_VARIABLE):
        return False
    texts = [(path[-1], leaf) for path, leaf in _leaves(name, value) if isinstance(leaf, str) and not _is_off(leaf)]
    return any(_SECRET_KEYS.fullmatch(key) or looks_secret(text) for key, text in texts)


def _danger_of_variable(name: str) -> str | None:
    parts = set(name.upper().split("_"))
    if name in _ADDRESS_VARIABLES or "ENDPOINT" in parts:
        return ELSEWHERE
    if name in _CODE_VARIABLES or (name not in _DATA_VARIABLES and parts & _CODE_IN_VARIABLE):
        return CODE
    return None if _HARMLESS_VARIABLE.fullmatch(name) or is_secret(name) else UNKNOWN


def _is_off(value: Any) -> bool:
    return value in _OFF


def _read(value: Any) -> Any:
    """A configuration that stands as JSON in a text, as the engine would read it."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _leaves(name: str, value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each plain value in that of a flag, with the keys that lead to it, the flag's own name first."""
    path = tuple(key.lower().replace("-", "_") for key in name.split("."))
    value = _read(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(name, inner)
    else:
        yield path, value


def _is_code(path: tuple[str, ...], value: Any) -> bool:
    """Whether a plain value inside a configuration names code, by its keys or by its look."""
    keys = path[1:]
    if not keys or _is_off(value):
        return False
    if _PLAIN_ONLY & {*keys} and isinstance(value, str):
        return True
    return any(map(_KEYS.search, keys)) or (not _OPERATIONS & {*keys} and _names_code(value))


def _names_code(value: Any) -> bool:
    """Whether it looks as `package.module.Name` does."""
    parts = value.strip().split(".") if isinstance(value, str) else []
    dotted = len(parts) > 1 and all(part.isidentifier() for part in parts) and parts[-1] not in _DATA
    return dotted or value == _CUSTOM
