"""What a setting needs of memory at the least, reckoned from the model's shape: which settings certainly cannot fit.

In: a model's `config.json`, its tensors as far as they are on disk, the values in force, the memory of one device. Out:
bytes, and the failure that a start would end with. All sums are lower bounds, in bytes; what is not understood counts
as nothing. Pure: no file, process or engine is touched.

Not modelled, so never refused for: memory of drivers, CUDA graphs, communication and fragments; activations inside
attention and experts; vision and audio parts; draft models; LoRA; state-space layers, shared KV layers and other
attention than that of the families in `_FAMILIES`; weights that are partly kept in the machine's memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage

GIB = 2**30
_P = ParamSpec("_P")
_Result = TypeVar("_Result")
_Nothing = TypeVar("_Nothing")

IN_FORCE = (
    "max-model-len",
    "max-num-seqs",
    "max-num-batched-tokens",
    "dtype",
    "kv-cache-dtype",
    "kv-cache-memory-bytes",
    "gpu-memory-utilization",
    "cpu-offload-gb",
    "tensor-parallel-size",
    "pipeline-parallel-size",
    "data-parallel-size",
    "decode-context-parallel-size",
    "prefill-context-parallel-size",
)
"""Flags whose values in force are needed here; those that are missing count as what needs least."""
# Flags under which the model is another one than its config.json tells, or lies elsewhere.
_BEYOND = re.compile(
    r"offload|^hf-(?:overrides|config)|^config-format|^load-format|revision|num-gpu-blocks-override|^model-class|^runner|^convert"
)
_PLAIN_LOADS = ("auto", "safetensors", "dummy")
_GENERATES = r"For(?:CausalLM|ConditionalGeneration)$"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHER_PARTS = re.compile(r"vision|visual|audio|image|video|multi_modal|mm_|encoder|mtp|eagle|rotary")
# Decoders with gated MLPs of three matrices, and either grouped-query or latent attention in each layer.
_FAMILIES = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
    *("phi3", "olmo", "olmo2", "granite", "smollm3", "deepseek_v2", "deepseek_v3"),
}


_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_NEEDED_LATENT = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a weights file."""

    name: str
    dtype: str
    """As safetensors names it: `BF16`, `F32`, `F8_E4M3`, `I32`."""
    elements: int
    stored: int
    """Bytes in the file."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model: numbers that are loaded in the dtype in force, and bytes that stay as they are stored."""

    floats: int
    packed: int = 0

    def size(self, bytes_each: float) -> float:
        """Bytes, with each of `floats` in `bytes_each`."""
        return self.floats * bytes_each + self.packed


@dataclass(frozen=True, slots=True)
class Demand:
    """The least that one device must hold, in bytes."""

    weights: float
    kv_cache: float
    """For one request of `max_model_len` tokens."""
    activations: float
    max_model_len: int | None = None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that tells of the language model."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The language model's part of a `config.json`; None where its shape is not known here, or not told in full."""
    text = text_config(config)
    family = str(text.get("model_type"))
    names = text.get("architectures") or config.get("architectures") or ()
    if (
        family not in _FAMILIES
        or text.get("is_causal") is False
        or not all(re.search(_GENERATES, str(name)) for name in names)
    ):
        return None
    needed = [*_NEEDED, *(_NEEDED_LATENT if text.get("kv_lora_rank") else ("num_key_value_heads",))]
    needed += ["head_dim"] if family.startswith(("qwen3", "gemma")) else []
    return text if all(_is_count(text.get(key)) for key in needed) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _understood_or(nothing: _Nothing) -> Callable[[Callable[_P, _Result]], Callable[_P, _Result | _Nothing]]:
    """`nothing` as the result where a `config.json` holds values of another form than is known here."""

    def decorate(function: Callable[_P, _Result]) -> Callable[_P, _Result | _Nothing]:
        @wraps(function)
        def tried(*args: _P.args, **kwargs: _P.kwargs) -> _Result | _Nothing:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError, ArithmeticError):
                return nothing

        return tried

    return decorate


@_understood_or(Weights(0))
def stored_weights(config: Mapping[str, Any], tensors: Iterable[Tensor]) -> Weights:
    """What an engine must load of the tensors of a model's files."""
    text = text_config(config)
    packed = _is_quantised(config)
    floats = stored = 0
    for tensor in tensors:
        if not _is_loaded(tensor.name, config, text):
            continue
        if tensor.dtype in _FLOATS and not packed:
            floats += tensor.elements
        else:  # of quantised models the scales too: their width is the kernel's choice
            stored += min(tensor.stored, tensor.elements * 2) if tensor.dtype in _FLOATS else tensor.stored
    return Weights(floats, stored)


@_understood_or(None)
def counted_weights(config: Mapping[str, Any]) -> Weights | None:
    """The weights as counted from the shape alone; None for a family or a quantisation that is not known here."""
    text, bits = _decoder(config), _bits(config)
    if text is None or bits is None:
        return None
    hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
    embeddings = int(text["vocab_size"]) * hidden * (1 if text.get("tie_word_embeddings", True) else 2)
    small = (2 * layers + 1) * hidden  # norms
    matrices = layers * _attention_parameters(text) + sum(_mlp_parameters(text, layer) for layer in range(layers))
    if bits == 16:
        return Weights(embeddings + small + matrices)
    return Weights(embeddings + small, matrices * bits // 8)


@_understood_or(None)
def kv_bytes_per_token(config: Mapping[str, Any], value_bytes: float = 2, tensor_parallel: int = 1) -> float | None:
    """Of all layers together, on one of the devices that share the heads; None where the shape is not known here."""
    text = _decoder(config)
    if text is None:
        return None
    return int(text["num_hidden_layers"]) * _kv_values_per_layer(text, tensor_parallel) * value_bytes or None


@_understood_or(Demand(0, 0, 0))
def demand(config: Mapping[str, Any], weights: Weights | None, setting: Mapping[str, Any]) -> Demand:
    """The least that one device must hold under `setting`: all of its flags, with the values in force over them."""
    if any(_BEYOND.search(name) for name, value in setting.items() if value and value not in _PLAIN_LOADS):
        return Demand(0, 0, 0)
    length = _whole(setting, "max-model-len")
    return Demand(
        weights=_weights_per_device(config, weights, setting),
        kv_cache=_one_request(config, setting, length),
        activations=_activations(config, setting),
        max_model_len=length,
    )


def shortage(need: Demand, setting: Mapping[str, Any], device_bytes: float | None, *, on_cpu: bool) -> Failure | None:
    """Why a device of `device_bytes` (None: unknown) certainly cannot serve the setting; None where it may.

    `on_cpu`: the device is the machine, which all workers share. Without kv-cache-memory-bytes (which is also what
    VLLM_CPU_KVCACHE_SPACE sets), the engine may use the share gpu-memory-utilization of the device.
    """
    given = _number(setting, "kv-cache-memory-bytes")
    if given is not None and need.kv_cache > given:
        return _kv_too_small([(_request(need), need.kv_cache)], given)
    if device_bytes is None:
        return None
    workers = _workers(setting) if on_cpu else 1
    if need.weights * workers > device_bytes:
        return _out_of_memory(Stage.WEIGHTS, [("weights", need.weights * workers)], device_bytes)
    if given is not None:
        parts = [("weights", need.weights * workers), ("KV cache", given * workers)]
        return _out_of_memory(Stage.KV_CACHE, parts, device_bytes) if _total(parts) > device_bytes else None
    budget = device_bytes * (_number(setting, "gpu-memory-utilization") or 1.0)
    parts = [("weights", need.weights), (_request(need), need.kv_cache)]
    parts += [] if on_cpu else [("activations", need.activations)]
    return _kv_too_small(parts, budget) if _total(parts) > budget else None


# --- weights ---


def _is_quantised(config: Mapping[str, Any]) -> bool:
    return bool(config.get("quantization_config") or config.get("compression_config"))


def _bits(config: Mapping[str, Any]) -> int | None:
    """Bits of a weight in the matrices of the layers; None where that is not known."""
    if not _is_quantised(config):
        return 16
    given = config.get("quantization_config")
    if not isinstance(given, Mapping):
        return None
    method = given.get("quant_method")
    if method in ("gptq", "awq"):
        bits = given.get("bits", given.get("w_bit"))
        return int(bits) if isinstance(bits, int) else None
    return 8 if method == "fp8" else None


def _is_loaded(name: str, config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether every engine must hold this tensor, as far as its name tells."""
    if name.endswith("lm_head.weight") and text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)):
        return False
    layer = re.search(r"\blayers\.(\d+)\.", name)
    if layer and int(layer[1]) >= int(text.get("num_hidden_layers", math.inf)):
        return False  # for predicting several tokens at once
    return not _OTHER_PARTS.search(name)


def _attention_parameters(text: Mapping[str, Any]) -> int:
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    if rank := text.get("kv_lora_rank"):
        return _latent_attention_parameters(text, hidden, heads, int(rank))
    size = _head_size(text)
    return 2 * hidden * heads * size + 2 * hidden * int(text["num_key_value_heads"]) * size


def _latent_attention_parameters(text: Mapping[str, Any], hidden: int, heads: int, rank: int) -> int:
    nope, rope, value = (int(text[key]) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query_rank = text.get("q_lora_rank")
    query = query_rank * (hidden + heads * (nope + rope)) if query_rank else hidden * heads * (nope + rope)
    keys_values = hidden * (rank + rope) + rank * heads * (nope + value)
    return int(query + keys_values + heads * value * hidden)


def _mlp_parameters(text: Mapping[str, Any], layer: int) -> int:
    hidden, dense = int(text["hidden_size"]), int(text["intermediate_size"])
    experts = _experts(text)
    if not experts or _is_dense(text, layer):
        return 3 * hidden * dense
    expert = int(text.get("moe_intermediate_size") or dense)
    shared = int(text.get("n_shared_experts") or 0) * expert + int(text.get("shared_expert_intermediate_size") or 0)
    return 3 * hidden * (experts * expert + shared) + hidden * experts


def mixes_experts(config: Mapping[str, Any]) -> bool:
    """Whether a model's config counts experts, under whatever name: then the weights decide which of them work."""
    parts = [part for part in config.values() if isinstance(part, Mapping)]
    counts = (value for name, value in config.items() if "expert" in name and isinstance(value, int))
    return any(count > 1 for count in counts) or any(map(mixes_experts, parts))


def _experts(text: Mapping[str, Any]) -> int:
    keys = ("num_local_experts", "n_routed_experts", "num_experts")
    return next((int(text[key]) for key in keys if text.get(key)), 0)


def _is_dense(text: Mapping[str, Any], layer: int) -> bool:
    """Whether this layer of a mixture of experts has an ordinary MLP."""
    if layer < int(text.get("first_k_dense_replace") or 0) or layer in (text.get("mlp_only_layers") or ()):
        return True
    if "decoder_sparse_step" in text:
        return (layer + 1) % int(text["decoder_sparse_step"] or 1) != 0
    return layer % int(text.get("moe_layer_freq") or 1) != 0


def _weights_per_device(config: Mapping[str, Any], weights: Weights | None, setting: Mapping[str, Any]) -> float:
    if weights is None:
        return 0
    value = 4 if str(setting.get("dtype")) in ("float32", "float") else 2
    smaller = setting.get("quantization") and not _is_quantised(config)  # made so while they are loaded
    size = weights.size(0.5 if smaller else value)
    # Experts are spread over data parallel ranks too.
    spread = _whole(setting, "data-parallel-size") or 1 if _experts(text_config(config)) else 1
    return size / _workers(setting) / spread


# --- KV cache ---


def _head_size(text: Mapping[str, Any]) -> int:
    return int(text.get("head_dim") or int(text["hidden_size"]) // int(text["num_attention_heads"]))


def _kv_values_per_layer(text: Mapping[str, Any], tensor_parallel: int) -> int:
    if rank := text.get("kv_lora_rank"):  # the latent vector, which every device holds whole
        return int(rank) + int(text["qk_rope_head_dim"])
    return 2 * max(int(text["num_key_value_heads"]) // tensor_parallel, 1) * _head_size(text)


def _one_request(config: Mapping[str, Any], setting: Mapping[str, Any], length: int | None) -> float:
    text = _decoder(config)
    if text is None or length is None or length < 1:
        return 0
    values = _kv_values_per_layer(text, _whole(setting, "tensor-parallel-size") or 1)
    pipeline, context = (_whole(setting, f"{name}-parallel-size") or 1 for name in ("pipeline", "decode-context"))
    context *= _whole(setting, "prefill-context-parallel-size") or 1
    tokens = sum(_tokens_held(text, layer, length) for layer in range(int(text["num_hidden_layers"])))
    return tokens * values * _kv_value_bytes(config, setting) / pipeline / context


def _tokens_held(text: Mapping[str, Any], layer: int, length: int) -> int:
    """How many of a request's tokens the KV cache of this layer holds: all, or those in the sliding window."""
    window = text.get("sliding_window")
    if not window or text.get("use_sliding_window") is False:
        return length
    kinds = text.get("layer_types")
    full = isinstance(kinds, list) and layer < len(kinds) and kinds[layer] == "full_attention"
    return length if full else min(int(window), length)


def _kv_value_bytes(config: Mapping[str, Any], setting: Mapping[str, Any]) -> float:
    """Bytes of a number in the KV cache; of formats that pack several into a byte, those of the tightest."""
    name = str(setting.get("kv-cache-dtype") or "auto")
    if name == "auto":
        return _own_kv_value_bytes(config, setting)
    if name in ("float16", "bfloat16", "half"):
        return 2
    return 1 if re.match(r"fp8|int8", name) else 0.375


def _own_kv_value_bytes(config: Mapping[str, Any], setting: Mapping[str, Any]) -> float:
    """Where the KV cache has the format that the model asks for."""
    given = config.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if _is_quantised(config) and method not in ("gptq", "awq", "bitsandbytes"):
        return 0.375  # others may bring one of their own
    return 4 if setting.get("dtype") in ("float32", "float") else 2


# --- activations ---


def _activations(config: Mapping[str, Any], setting: Mapping[str, Any]) -> float:
    """While a step of the most tokens runs: what the gated MLP computes of them, or the logits to sample from."""
    text = _decoder(config)
    tokens, seqs = _whole(setting, "max-num-batched-tokens") or 0, _whole(setting, "max-num-seqs") or 0
    if text is None:
        return 0
    shared = _whole(setting, "tensor-parallel-size") or 1
    inner = 0 if _experts(text) else 2 * int(text["intermediate_size"]) / shared
    return max(tokens * inner, min(seqs, tokens) * int(text["vocab_size"])) * 2


# --- values and words ---


def _number(setting: Mapping[str, Any], name: str) -> float | None:
    value = setting.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(setting: Mapping[str, Any], name: str) -> int | None:
    value = _number(setting, name)
    return None if value is None else int(value)


def _workers(setting: Mapping[str, Any]) -> int:
    sizes = (_whole(setting, f"{name}-parallel-size") or 1 for name in ("tensor", "pipeline"))
    return max(math.prod(sizes), 1)


def _request(need: Demand) -> str:
    return f"KV cache for one request of {need.max_model_len} tokens"


def _total(parts: Iterable[tuple[str, float]]) -> float:
    return sum(size for _, size in parts)


def _told(parts: list[tuple[str, float]], room: float) -> str:
    held = [(name, size) for name, size in parts if size > 0]
    listed = " + ".join(f"{name} {_gib(size)}" for name, size in held)
    verb = "do" if len(held) > 1 or held[0][0] == "weights" else "does"
    return f"{listed} {verb} not fit in {_gib(room)}: {_gib(_total(parts) - room)} over"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / GIB:.2f} GiB"


def _out_of_memory(stage: Stage, parts: list[tuple[str, float]], room: float) -> Failure:
    remedy = "Use more devices (tensor-parallel-size), a smaller or quantised model, or a smaller KV cache."
    return Failure(stage, Kind.OUT_OF_MEMORY, Blame.PARAMETERS, _told(parts, room), remedy)


def _kv_too_small(parts: list[tuple[str, float]], room: float) -> Failure:
    remedy = "Lower max-model-len, give the engine more of the memory, or use more devices (tensor-parallel-size)."
    return Failure(Stage.KV_CACHE, Kind.KV_CACHE_TOO_SMALL, Blame.PARAMETERS, _told(parts, room), remedy)
