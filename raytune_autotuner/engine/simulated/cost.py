"""What a setting costs on a hardware: memory, milliseconds of a step, seconds of a start. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raytune_autotuner.engine.simulated.setting import Hardware, Setting
from raytune_autotuner.study.failure import Stage

GIB = 2**30
_STARTUP_SHARES = {
    Stage.CONFIGURATION: 0.05,
    Stage.INITIALIZATION: 0.20,
    Stage.WEIGHTS: 0.30,
    Stage.COMPILATION: 0.30,
    Stage.KV_CACHE: 0.05,
    Stage.GRAPH_CAPTURE: 0.10,
}
_WITH_GRAPHS_ONLY = (Stage.COMPILATION, Stage.GRAPH_CAPTURE)


@dataclass(frozen=True, slots=True)
class Memory:
    """How one device's memory is shared out, in GiB."""

    weights_gib: float
    activations_gib: float
    kv_cache_gib: float
    """May be negative: then there is no memory for it."""
    graphs_gib: float
    free_gib: float
    """What is left beside all the others; negative where they do not fit."""


def memory(setting: Setting, hardware: Hardware) -> Memory:
    """The memory of each device; CUDA graphs come on top of what `gpu-memory-utilization` allows."""
    shards = max(setting.tensor_parallel_size * setting.pipeline_parallel_size, 1)
    weights = hardware.weights_gib * _weight_width(setting) / shards
    activations = (
        setting.max_num_batched_tokens * hardware.activation_mib_per_token
        + setting.max_num_seqs * hardware.logits_mib_per_seq
    ) / 1024
    budget = setting.gpu_memory_utilization * hardware.device_memory_gib
    explicit = setting.kv_cache_memory_bytes
    kv_cache = budget - weights - activations if explicit is None else explicit / GIB
    graphs = 0.0 if setting.enforce_eager else 0.3 + 0.4 * setting.max_cudagraph_capture_size / 512
    used = hardware.reserved_gib + weights + activations + max(kv_cache, 0.0) + graphs
    return Memory(weights, activations, kv_cache, graphs, hardware.device_memory_gib - used)


def kv_cache_blocks(setting: Setting, hardware: Hardware) -> int:
    """Whole blocks that the KV cache holds; 0 where there is no memory for one."""
    per_token = hardware.kv_bytes_per_token * _kv_width(setting) / max(setting.tensor_parallel_size, 1)
    per_block = per_token * max(setting.block_size, 1) / max(setting.pipeline_parallel_size, 1)
    return max(math.floor(memory(setting, hardware).kv_cache_gib * GIB / per_block), 0)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes."""

    prefill_tokens: int
    decode_seqs: int
    context_tokens: int
    """Tokens in the KV cache that the step's sequences attend to."""


def step_ms(setting: Setting, hardware: Hardware, batch: Batch) -> float:
    """Milliseconds of one step, free of noise; grows with each number of `batch`."""
    parallel = math.pow(setting.tensor_parallel_size, 0.85)
    slowdown = 2.0 if setting.dtype == "float32" else 1.0
    decode = hardware.decode_ms_per_seq * batch.decode_seqs * (1 + batch.decode_seqs / 256)
    compute = (hardware.prefill_ms_per_token * batch.prefill_tokens + decode) * slowdown
    if setting.quantization == "fp8":
        compute *= 0.85
    reading = hardware.step_base_ms * _weight_width(setting)
    attention = hardware.attention_ms_per_1k_tokens * batch.context_tokens / 1000 * _block_factor(setting)
    device = (reading + compute + attention) / parallel
    return (device + _overhead_ms(setting, hardware, batch)) / hardware.speed


def startup_plan(setting: Setting, hardware: Hardware) -> tuple[tuple[Stage, float], ...]:
    """The stages of a start that this setting goes through, and the seconds that each takes."""
    size = memory(setting, hardware).weights_gib / max(hardware.weights_gib, 1e-9)
    plan = {stage: hardware.startup_s * share for stage, share in _STARTUP_SHARES.items()}
    plan[Stage.WEIGHTS] *= 0.0 if setting.load_format == "dummy" else size
    plan[Stage.GRAPH_CAPTURE] *= setting.max_cudagraph_capture_size / 512
    skipped = _WITH_GRAPHS_ONLY if setting.enforce_eager else ()
    return tuple((stage, seconds) for stage, seconds in plan.items() if stage not in skipped)


def _overhead_ms(setting: Setting, hardware: Hardware, batch: Batch) -> float:
    """What a step costs beside the device: host work, launches, communication, pipeline bubbles."""
    host = hardware.host_ms * (0.2 if setting.async_scheduling else 1.0)
    covered = batch.decode_seqs <= setting.max_cudagraph_capture_size and batch.prefill_tokens == 0
    launches = 0.0 if covered and not setting.enforce_eager else hardware.eager_ms
    communication = 0.25 * math.log2(max(setting.tensor_parallel_size, 1))
    return host + launches + communication + 0.4 * (setting.pipeline_parallel_size - 1)


def _weight_width(setting: Setting) -> float:
    """Bytes of a weight over two."""
    if setting.quantization == "fp8":
        return 0.5
    return 2.0 if setting.dtype == "float32" else 1.0


def _kv_width(setting: Setting) -> float:
    """Bytes of a value in the KV cache over two."""
    if setting.kv_cache_dtype.startswith("fp8"):
        return 0.5
    return 2.0 if setting.dtype == "float32" else 1.0


def _block_factor(setting: Setting) -> float:
    """Small blocks cost look-ups, large ones padding."""
    return {16: 1.1, 32: 1.0, 64: 1.03, 128: 1.15}.get(setting.block_size, 1.2)
