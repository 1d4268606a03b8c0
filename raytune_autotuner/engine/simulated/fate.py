"""How a setting fails, told without starting it. Pure.

| stage | setting | what happens |
|---|---|---|
| arguments | a value that the parser does not know | bad-argument |
| configuration | parallel sizes that do not fit heads or devices; too small a token budget | invalid-config |
| configuration | `quantization: awq` | unsupported |
| weights | weights larger than the device | out-of-memory |
| compilation | fp8 KV cache computed in float32 | unsupported |
| kv-cache | `block-size` other than 16, 32, 64, 128 | unsupported |
| kv-cache | no room for one request of `max-model-len` | kv-cache-too-small |
| kv-cache, graph-capture, load | `gpu-memory-utilization` too high, by how much | out-of-memory |
| graph-capture | fp8 KV cache in blocks of 128 | a segmentation fault |
| load | pipeline parallelism with async scheduling | hangs |
| load | `kv-cache-dtype: fp8_e5m2` computed in float16 | answers rubbish |

Beside these, `api-server-count` above 1 leaves the extra servers running (`leaks`): that fails no trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from raytune_autotuner.engine.simulated.cost import kv_cache_blocks, memory
from raytune_autotuner.engine.simulated.faults import Effect, Fault
from raytune_autotuner.engine.simulated.setting import Hardware, Setting
from raytune_autotuner.study.failure import Stage

BLOCK_SIZES = (16, 32, 64, 128)
_WORKSPACE_GIB = 0.1
_BAD_AFTER = 8
"""Requests that settings which fail under load still answer."""

_Rule = Callable[[Setting, Hardware], Iterator[Fault]]


def fate(setting: Setting, hardware: Hardware | None = None) -> Fault | None:
    """How `setting` fails on `hardware`, or None where it serves. The earliest failure wins."""
    hardware = hardware or Hardware()
    return next((fault for rule in _RULES for fault in rule(setting, hardware)), None)


def uneven(setting: Setting, nodes: int) -> Fault | None:
    """The refusal of parallel sizes that cannot be divided evenly among so many nodes."""
    world = setting.tensor_parallel_size * setting.pipeline_parallel_size
    if world % nodes == 0:
        return None
    return _refuse(f"`--nnodes {nodes}` must evenly divide the total world size ({world}).")


def leaks(setting: Setting) -> bool:
    """Whether an engine with `setting` leaves processes behind."""
    return setting.api_server_count > 1


def _arguments(setting: Setting, hardware: Hardware) -> Iterator[Fault]:
    for name, spec in Setting.flags().items():
        value, known = getattr(setting, spec.name), spec.metadata.get("choices", ())
        if known and value is not None and value not in known:
            listed = ", ".join(map(repr, known))
            message = f"argument --{name}: invalid choice: {value!r} (choose from {listed})"
            yield Fault(Effect.REFUSE, Stage.ARGUMENTS, message)


def _numbers(setting: Setting, hardware: Hardware) -> Iterator[Fault]:
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "tensor_parallel_size"):
        if getattr(setting, name) < 1:
            yield _refuse(f"{name} must be at least 1, but got {getattr(setting, name)}.")
    if not 0 < setting.gpu_memory_utilization <= 1:
        yield _refuse(f"gpu_memory_utilization must be above 0 and at most 1, got {setting.gpu_memory_utilization}.")
    if setting.pipeline_parallel_size < 1 or setting.max_cudagraph_capture_size < 0 or setting.api_server_count < 1:
        yield _refuse("sizes and counts must not be negative.")


def _model(setting: Setting, hardware: Hardware) -> Iterator[Fault]:
    if setting.max_model_len > hardware.max_positions:
        yield _refuse(
            f"User-specified max_model_len ({setting.max_model_len}) is greater than the derived max_model_len "
            f"(max_position_embeddings={hardware.max_positions})."
        )
    if setting.quantization == "awq":
        message = "The quantization method awq is not supported for the current GPU. Minimum capability: 80. "
        yield Fault(Effect.UNSUPPORTED, Stage.CONFIGURATION, message + "Current capability: 75.")
    heads, size = hardware.attention_heads, setting.tensor_parallel_size
    if heads % size:
        yield _refuse(f"Total number of attention heads ({heads}) must be divisible by tensor parallel size ({size}).")
    world = size * setting.pipeline_parallel_size
    if world > hardware.devices:
        yield _refuse(f"World size ({world}) is larger than the number of available GPUs ({hardware.devices}).")


def _token_budget(setting: Setting, hardware: Hardware) -> Iterator[Fault]:
    tokens = setting.max_num_batched_tokens
    if tokens < setting.max_num_seqs:
        yield _refuse(
            f"max_num_batched_tokens ({tokens}) must be greater than or equal to max_num_seqs ({setting.max_num_seqs})."
        )
    if tokens < setting.max_model_len and not setting.enable_chunked_prefill:
        yield _refuse(
            f"max_num_batched_tokens ({tokens}) is smaller than max_model_len ({setting.max_model_len}) "
            "while chunked prefill is off."
        )


def _weights(setting: Setting, hardware: Hardware) -> Iterator[Fault]:
    room = hardware.device_memory_gib - hardware.reserved_gib
    if memory(setting, hardware).weights_gib > room:
        yield _out_of_memory(Stage.WEIGHTS, memory(setting, hardware).weights_gib, room, hardware)


def _compilation(setting: Setting, hardware: Hardware) -> Iterator[Fault]:
    if setting.kv_cache_dtype != "auto" and setting.dtype == "float32":
        stage = Stage.KV_CACHE if setting.enforce_eager else Stage.COMPILATION
        message = f"{setting.kv_cache_dtype} KV cache is not supported with dtype float32."
        yield Fault(Effect.UNSUPPORTED, stage, message)


def _kv_cache(setting: Setting, hardware: Hardware) -> Iterator[Fault]:
    if setting.block_size not in BLOCK_SIZES:
        known = ", ".join(map(str, BLOCK_SIZES))
        message = f"No common block size for {setting.block_size} (SIM_ATTN: [{known}])."
        yield Fault(Effect.UNSUPPORTED, Stage.KV_CACHE, message)
    share = memory(setting, hardware)
    if share.kv_cache_gib <= 0:
        message = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."
        yield Fault(Effect.KV_TOO_SMALL, Stage.KV_CACHE, message)
    if share.free_gib + share.graphs_gib < 0:
        yield _out_of_memory(Stage.KV_CACHE, share.kv_cache_gib, share.free_gib + share.kv_cache_gib, hardware)
    tokens = kv_cache_blocks(setting, hardware) * setting.block_size
    if tokens < setting.max_model_len:
        needed = setting.max_model_len * share.kv_cache_gib / max(tokens, 1)
        yield Fault(Effect.KV_TOO_SMALL, Stage.KV_CACHE, too_small(setting.max_model_len, needed, share.kv_cache_gib))


def _graph_capture(setting: Setting, hardware: Hardware) -> Iterator[Fault]:
    if setting.enforce_eager:
        return
    if setting.kv_cache_dtype != "auto" and setting.block_size == 128:
        yield Fault(Effect.SEGFAULT, Stage.GRAPH_CAPTURE)
    share = memory(setting, hardware)
    if share.free_gib < 0:
        yield _out_of_memory(Stage.GRAPH_CAPTURE, share.graphs_gib, share.free_gib + share.graphs_gib, hardware)


def _load(setting: Setting, hardware: Hardware) -> Iterator[Fault]:
    if setting.pipeline_parallel_size > 1 and setting.async_scheduling:
        yield Fault(Effect.HANG, Stage.LOAD, after=_BAD_AFTER)
    if setting.kv_cache_dtype == "fp8_e5m2" and setting.dtype == "float16":
        yield Fault(Effect.GARBAGE, Stage.LOAD, mode="empty")
    if memory(setting, hardware).free_gib < _WORKSPACE_GIB:
        short = _out_of_memory(Stage.LOAD, _WORKSPACE_GIB, memory(setting, hardware).free_gib, hardware)
        yield Fault(Effect.OOM, Stage.LOAD, short.message, after=_BAD_AFTER)


_RULES: tuple[_Rule, ...] = (
    _arguments,
    _numbers,
    _model,
    _token_budget,
    _weights,
    _compilation,
    _kv_cache,
    _graph_capture,
    _load,
)


def _refuse(message: str) -> Fault:
    return Fault(Effect.REFUSE, Stage.CONFIGURATION, message)


def _out_of_memory(stage: Stage, wanted_gib: float, free_gib: float, hardware: Hardware) -> Fault:
    return Fault(Effect.OOM, stage, out_of_memory(wanted_gib, free_gib, hardware.device_memory_gib))


def out_of_memory(wanted_gib: float, free_gib: float, total_gib: float) -> str:
    """The words of the tensor library when the device's memory runs out."""
    return (
        f"CUDA out of memory. Tried to allocate {wanted_gib:.2f} GiB. GPU 0 has a total capacity of {total_gib:.2f} "
        f"GiB of which {max(free_gib, 0) * 1024:.2f} MiB is free."
    )


def too_small(max_model_len: int, needed_gib: float, available_gib: float) -> str:
    """The words of an engine whose KV cache cannot hold one request."""
    return (
        f"To serve at least one request with the model's max seq len ({max_model_len}), ({needed_gib:.2f} GiB KV cache "
        f"is needed, which is larger than the available KV cache memory ({available_gib:.2f} GiB)."
    )
