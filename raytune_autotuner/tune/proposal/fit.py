"""What of a model and its traffic fits on the machines: parallel sizes, requests at once, KV cache, context.

In: a `Model`, a `Site`, the lengths of requests. Out: numbers, each such that `engine.memory` does not refuse it. What
is not known of the model or the machines refuses nothing. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raytune_autotuner.engine import memory
from raytune_autotuner.engine.memory import GIB
from raytune_autotuner.load.workload import Traffic
from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.failure import Failure
from raytune_autotuner.tune.proposal.facts import Model, Site

GPU_SHARE = 0.92
"""vLLM's default of gpu-memory-utilization."""
BASELINE = {"max-num-seqs": 1024, "max-num-batched-tokens": 8192, "gpu-memory-utilization": GPU_SHARE}
"""The largest defaults that vLLM has for common GPUs."""
OWN_GIB = 4.0
"""What an engine's processes take on a CPU beside weights and KV cache: 0.7, 0.8 and 3.3 GB, as was measured."""
HEADROOM = 0.9
"""Share of a machine's memory that a proposal counts on."""
_GRAIN = 128
_GUESSED_KV_GIB = 4


@dataclass(frozen=True)
class Fit:
    """One model under one traffic, on the smallest machine of a site."""

    model: Model
    site: Site
    traffic: Traffic

    @cached_property
    def request_tokens(self) -> int:
        """The longest request that is to be expected."""
        return self.traffic.tokens_in.most + self.traffic.tokens_out.most

    @cached_property
    def max_model_len(self) -> int:
        """Covers the traffic; raises `ConfigError` where the model takes no requests of such a length."""
        longest = self.model.longest
        if longest is not None and self.request_tokens > longest:
            raise ConfigError(
                f"--traffic: its longest requests have {self.request_tokens:,} tokens, prompt and answer together, but "
                f"{shown(self.model.name)} takes {longest:,} at the most.\n"
                "Shorten one of the two, or take another model."
            )
        rounded = math.ceil(self.request_tokens / _GRAIN) * _GRAIN
        return rounded if longest is None else min(rounded, longest)

    def refused(self, setting: Mapping[str, Any]) -> Failure | None:
        """Why a setting certainly does not fit; on a CPU, `env:VLLM_CPU_KVCACHE_SPACE` is part of it."""
        in_force = {"max-model-len": self.max_model_len, **setting}
        if not self.site.on_gpus:
            in_force["kv-cache-memory-bytes"] = setting.get("env:VLLM_CPU_KVCACHE_SPACE", 0) * GIB or None
        need = memory.demand(self.model.config, self.model.weights, in_force)
        return memory.shortage(need, in_force, self._device_bytes, on_cpu=not self.site.on_gpus)

    @cached_property
    def parallel_sizes(self) -> tuple[int, ...]:
        """Sizes of tensor parallelism that share the model evenly, that a machine holds and that fit; at least one.

        The first is the smallest at which the engine's defaults fit. Raises `ConfigError` where none does.
        """
        even = [size for size in self._held_sizes if self.model.shared_among(size)]
        fitting = [size for size in even if self._baseline_refused(size) is None]
        if fitting:
            return tuple(fitting)
        if self.model.by_name:
            return (even[-1] if self.site.on_gpus else 1,)  # its size is a guess: no ground to refuse it
        failure = self._baseline_refused(even[-1])
        raise ConfigError(
            f"model: {shown(self.model.name)} does not fit on {self.site.shape}: {failure.evidence if failure else ''}."
            "\nTake a smaller or a quantised model, larger machines, or, where it is too long, a shorter --traffic."
        )

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against a start at all, by a size that is only a guess."""
        failure = self._baseline_refused(self.parallel_sizes[0]) if self.model.by_name else None
        return () if failure is None else (f"whether it fits; of the size that its name tells, {failure.evidence}",)

    @cached_property
    def kv_gib(self) -> int:
        """GiB for the KV cache of each worker on a CPU: what the load wants, within what the memory has."""
        if self.model.kv_bytes is None:
            return max(min(_GUESSED_KV_GIB, self._spare_gib), 1)
        wanted = self.concurrency * self.request_tokens * 1.25 * self.model.kv_bytes / GIB
        return max(min(math.ceil(wanted), self._spare_gib), self._one_request_gib)

    @cached_property
    def concurrency(self) -> int:
        """Requests in flight that are worth a measurement: a power of two whose KV cache fits."""
        fitting = min(max(self._requests_held, 1), self.concurrency_wanted)
        return int(2 ** math.floor(math.log2(fitting)))

    @property
    def concurrency_wanted(self) -> int:
        """What would load such a machine well, whatever the model needs of memory."""
        if self.site.on_gpus:
            return 128 if (self.site.smallest_gpu_gib or 0) >= 40 else 64
        return 16 if min(host.cpus for host in self.site.hosts) < 16 else 32

    @property
    def _held_sizes(self) -> list[int]:
        """Devices that one machine has for a copy of the model: GPUs, or NUMA nodes on a CPU; powers of two."""
        counts = [host.gpus if self.site.on_gpus else len(host.numa_gib) for host in self.site.hosts]
        most = max(counts) if self.site.on_gpus else min(counts)
        return [size for size in (1, 2, 4, 8) if size <= max(most, 1)]

    @property
    def _device_bytes(self) -> float | None:
        if not self.site.on_gpus:
            return self._memory_gib * GIB
        size = self.site.smallest_gpu_gib
        return None if size is None else size * GIB

    @property
    def _memory_gib(self) -> float:
        return min(host.memory_gib for host in self.site.hosts)

    def _baseline_refused(self, size: int) -> Failure | None:
        setting: dict[str, Any] = {"tensor-parallel-size": size}
        if self.site.on_gpus:
            return self.refused({**BASELINE, **setting})
        return self.refused({**setting, "env:VLLM_CPU_KVCACHE_SPACE": self._one_request_gib})

    @property
    def _requests_held(self) -> float:
        """How many of the longest requests the KV cache could hold at once; infinite where nobody knows."""
        size = self.parallel_sizes[0]
        each = memory.kv_bytes_per_token(self.model.config, tensor_parallel=size)
        if each is None or self._device_bytes is None:
            return math.inf
        return max(self._kv_room(size), 0) / (each * self.request_tokens)

    def _kv_room(self, size: int) -> float:
        """Bytes for the KV cache on one device."""
        if not self.site.on_gpus:
            return self._spare_gib * GIB
        need = memory.demand(self.model.config, self.model.weights, {**BASELINE, "tensor-parallel-size": size})
        return (self._device_bytes or 0) * GPU_SHARE - need.weights - need.activations

    @property
    def _spare_gib(self) -> int:
        """Whole GiB that every worker on a CPU may take for its KV cache beside all weights."""
        workers = max(self._held_sizes)
        machine = (self._memory_gib * HEADROOM - OWN_GIB - (self.model.weight_gib or 0)) / workers
        node = min(size for host in self.site.hosts for size in host.numa_gib) * HEADROOM - OWN_GIB
        return max(math.floor(min(machine, node)), 0)

    @property
    def _one_request_gib(self) -> int:
        need = memory.demand(self.model.config, None, {"max-model-len": self.max_model_len})
        return max(math.ceil(need.kv_cache / GIB), 1)
