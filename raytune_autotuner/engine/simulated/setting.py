"""What the simulated engine is told: a `Setting` (engine flags, under vLLM's names) and the `Hardware` it runs on.

Both are frozen and come from a mapping of flag names without dashes, as a trial's parameters are. Flags are made
from the fields, so that a field is all it takes to add one. Standard library only.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Self

from raytune_autotuner.study.errors import ConfigError

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", re.IGNORECASE)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"an integer is needed, but got {value!r}")
    return int(value)


def _size(value: Any) -> int | None:
    """Bytes from a number or from text such as `4Gi` or `500M`."""
    if value is None:
        return None
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"a number of bytes such as 4Gi is needed, but got {value!r}")
    return int(float(match.group(1)) * _SUFFIXES[match.group(2).lower()])


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in {"true", "false"}:
        return str(value).lower() == "true"
    raise ValueError(f"true or false is needed, but got {value!r}")


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _integer,
    "float": float,
    "bool": _boolean,
    "str": str,
    "str | None": _text,
    "int | None": _size,
}


def choices(*values: str) -> dict[str, Any]:
    """Field metadata: only these values are known to the argument parser."""
    return {"choices": values}


@dataclass(frozen=True, slots=True)
class FromFlags:
    """A frozen dataclass of which each field is a command-line flag."""

    @classmethod
    def flags(cls) -> dict[str, Field[Any]]:
        """Flag name without dashes, to its field."""
        return {spec.name.replace("_", "-"): spec for spec in fields(cls)}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """The values that `params` holds for this class; flags of other classes and `env:` names are passed over.

        Raises `ConfigError` for a value that cannot be read.
        """
        known = cls.flags()
        return cls(**{known[n].name: _read(n, known[n], v) for n, v in params.items() if n in known and v is not None})

    def to_params(self) -> dict[str, Any]:
        """The reverse of `from_params`, defaults included."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def add_flags(cls, parser: argparse._ActionsContainer) -> None:
        """Add a flag for each field; booleans come as `--name` and `--no-name`."""
        for name, spec in cls.flags().items():
            if spec.type == "bool":
                parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=spec.default)
            else:
                known = spec.metadata.get("choices")
                reader = _READERS[str(spec.type)]
                metavar = None if known else spec.name.upper()
                parser.add_argument(f"--{name}", type=reader, default=spec.default, choices=known, metavar=metavar)


def _read(name: str, spec: Field[Any], value: Any) -> Any:
    try:
        return _READERS[str(spec.type)](value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--{name}: {error}.") from error


@dataclass(frozen=True, slots=True)
class Setting(FromFlags):
    """The flags that a study tunes, with the simulated engine's defaults."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool = False
    enforce_eager: bool = False
    max_cudagraph_capture_size: int = 512
    dtype: str = field(default="auto", metadata=choices("auto", "bfloat16", "float16", "float32"))
    kv_cache_dtype: str = field(default="auto", metadata=choices("auto", "fp8", "fp8_e4m3", "fp8_e5m2"))
    quantization: str | None = field(default=None, metadata=choices("fp8", "awq"))
    api_server_count: int = 1
    load_format: str = field(default="auto", metadata=choices("auto", "dummy"))

    @property
    def key(self) -> str:
        """A text that is equal for settings that are equally fast, in every process: made-up weights are no slower."""
        values = {name: value for name, value in asdict(self).items() if name != "load_format"}
        return json.dumps(values, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Hardware(FromFlags):
    """The simulated machine and model: sizes, and times in milliseconds at speed 1."""

    attention_heads: int = 32
    max_positions: int = 32768
    devices: int = 8
    device_memory_gib: float = 12.0
    reserved_gib: float = 0.3
    """Device memory that driver and runtime hold."""
    weights_gib: float = 6.0
    """At two bytes a parameter."""
    kv_bytes_per_token: int = 524288
    activation_mib_per_token: float = 0.1
    logits_mib_per_seq: float = 0.5
    step_base_ms: float = 2.0
    """Reading the weights, once a step."""
    prefill_ms_per_token: float = 0.01
    decode_ms_per_seq: float = 0.1
    attention_ms_per_1k_tokens: float = 0.05
    """For each 1,000 tokens of context that the step's sequences hold."""
    host_ms: float = 0.4
    """Scheduling and sampling on the CPU, once a step; async scheduling hides it."""
    eager_ms: float = 1.2
    """Kernel launches, once a step, where no CUDA graph covers the batch."""
    speed: float = 1.0
    """All times are divided by it."""
    noise: float = 0.03
    """Standard deviation of the logarithm of a start's speed; 0 for none."""
    startup_s: float = 0.0
    """Seconds from the arguments to ready, spread over the stages."""


def known_flags() -> dict[str, Any]:
    """Flag names without dashes that a study may use, with the defaults in force."""
    return {name: spec.default for cls in (Setting, Hardware) for name, spec in cls.flags().items()}


def nearest_flag(name: str) -> str | None:
    """The known flag that is most like `name`."""
    return next(iter(difflib.get_close_matches(name, known_flags(), n=1)), None)
