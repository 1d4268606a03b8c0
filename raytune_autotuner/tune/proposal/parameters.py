"""Which parameters are worth a search for this model, on these machines, under this load, and in which range.

The ready-made spaces are taken (`configs/spaces`), each parameter with its comment, and narrowed: in, what fits and the
load levels; out, parameters in the order of what they are worth. Values that certainly do not fit in memory, and values
that could make no difference, are left out. Pure but for the reading of the spaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from raytune_autotuner.study.spaces import Explained, explained
from raytune_autotuner.tune.proposal.fit import GPU_SHARE, Fit

TENSOR_PARALLEL = "tensor-parallel-size"
SEQS = "max-num-seqs"
BATCHED_TOKENS = "max-num-batched-tokens"
GPU_UTILIZATION = "gpu-memory-utilization"
KV_DTYPE = "kv-cache-dtype"
CHUNKED = "enable-chunked-prefill"
ALL_REDUCE = "disable-custom-all-reduce"
THREADS = "env:VLLM_CPU_OMP_THREADS_BIND"
RESERVED = "env:VLLM_CPU_NUM_OF_RESERVED_CPU"
QUALITY_TOKENS = 512
"""Of max-model-len, which `quality` needs."""
_GOOD_STEP = 8192
_LATER = 3
# No part of the space for CPUs, as it pays on machines of several sockets only.
_NUMA = Explained(
    {"choice": [1, 2, 4, 8]},
    (
        "NUMA nodes (mostly sockets) that share one copy of the model, each with a worker and cores of its own.",
        "Traps: more than there are NUMA nodes fails under automatic binding; each worker takes a KV cache of its own.",
    ),
)
_Ready: TypeAlias = Mapping[str, Explained]
# A parameter's name, its distribution, and what made its range.
_Narrowed: TypeAlias = tuple[str, Any, str]


@dataclass(frozen=True)
class Parameter:
    """A parameter to search."""

    name: str
    distribution: Any
    """As in a study file."""
    why: tuple[str, ...]
    """What it does and its traps."""
    here: str = ""
    """What made this range."""


def ranked(fit: Fit, levels: Sequence[int], *, promises: bool) -> list[Parameter]:
    """All parameters that may matter here, those first that are worth most; one with a single value is none.

    `promises`: whether there are latencies to keep. Without them, and with memory for all requests, fewer at once is
    hardly ever better, and comes later.
    """
    space = {TENSOR_PARALLEL: _NUMA, **explained("vllm-gpu" if fit.site.on_gpus else "vllm-cpu")}
    narrowed = _on_gpus(fit, max(levels), space) if fit.site.on_gpus else _on_cpus(fit, max(levels), space)
    parameters = [
        Parameter(name, distribution, space[name].why, here)
        for name, distribution, here in narrowed
        if not _is_single(distribution)
    ]
    if promises or fit.concurrency < fit.concurrency_wanted:
        return parameters
    others = [parameter for parameter in parameters if parameter.name != SEQS]
    later = [parameter for parameter in parameters if parameter.name == SEQS]
    return [*others[:_LATER], *later, *others[_LATER:]]


def constraints(fit: Fit, names: Sequence[str]) -> list[str]:
    """The conditions between the parameters of these names."""
    found = []
    if SEQS in names and BATCHED_TOKENS in names:
        found.append(f"{BATCHED_TOKENS} >= {SEQS}")
    if CHUNKED in names:
        found.append(f"{CHUNKED} or {BATCHED_TOKENS} >= max-model-len")
    if not fit.site.on_gpus and TENSOR_PARALLEL in names and THREADS in names:
        found.append(f'{TENSOR_PARALLEL} == 1 or {THREADS} == "auto"')
    return found


def first_point(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """A setting that is a good guess, of those parameters that always exist: large batches, all cores."""
    point: dict[str, Any] = {}
    for parameter in parameters:
        values = parameter.distribution.get("choice") if isinstance(parameter.distribution, Mapping) else None
        if parameter.name == SEQS:
            point[SEQS] = values[-1] if values else parameter.distribution["int"][1]
        elif parameter.name == BATCHED_TOKENS and values:
            point[BATCHED_TOKENS] = max([value for value in values if value <= _GOOD_STEP], default=values[0])
        elif parameter.name == THREADS and values:
            point[THREADS] = values[-1]
        elif parameter.name == TENSOR_PARALLEL and values:
            point[TENSOR_PARALLEL] = values[0]
    return point


# --- on CPUs ---


def _on_cpus(fit: Fit, concurrency: int, space: _Ready) -> Iterator[_Narrowed]:
    cores = min((host.cores for host in fit.site.hosts), key=len)
    nodes = min(len(host.numa_gib) for host in fit.site.hosts)
    seqs = [size for size in _values(space, SEQS) if concurrency / 4 <= size <= concurrency]
    yield SEQS, {"choice": seqs}, _seqs_told(concurrency)
    steps = _steps(fit, concurrency, space)
    yield BATCHED_TOKENS, {"choice": steps}, _steps_told(fit, concurrency)
    if nodes > 1:
        yield TENSOR_PARALLEL, _sizes(fit, space), f"of the {nodes} NUMA nodes, by the model's heads"
    bindings = [*_values(space, THREADS), *_own_cores(fit, cores)]
    yield THREADS, {"choice": bindings}, "one thread a core; a list of numbers is all cores of this machine"
    if not fit.model.latent:
        yield "block-size", _blocks(fit, space), "multiples of 32 that are no longer than a request"
    if len(cores) > 2:
        yield RESERVED, space[RESERVED].distribution, ""
    if len(steps) > 1 and steps[-1] >= fit.max_model_len:
        yield CHUNKED, space[CHUNKED].distribution, ""


def _own_cores(fit: Fit, cores: Sequence[int]) -> list[str]:
    """By number where there is one machine: those of others have other numbers."""
    return [as_ranges(cores)] if len(fit.site.hosts) == 1 else []


def as_ranges(numbers: Sequence[int]) -> str:
    """Cores as the engine takes them.

    >>> as_ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(str(end) for end in part) for part in ranges)


# --- on GPUs ---


def _on_gpus(fit: Fit, concurrency: int, space: _Ready) -> Iterator[_Narrowed]:
    sizes = _sizes(fit, space)
    yield TENSOR_PARALLEL, sizes, "those that divide the model's heads, that one machine has, and that fit"
    least = min(space[SEQS].distribution["int"][0], concurrency // 4)
    yield SEQS, {"int": [max(least, 1), concurrency], "log": True}, _seqs_told(concurrency)
    yield BATCHED_TOKENS, {"choice": _steps(fit, concurrency, space)}, _steps_told(fit, concurrency)
    shares = _shares(fit, concurrency, space)
    yield GPU_UTILIZATION, shares, f"from {shares['float'][0]:g}, where model and one request fit"
    if fit.concurrency < fit.concurrency_wanted and fit.max_model_len >= QUALITY_TOKENS:
        yield KV_DTYPE, space[KV_DTYPE].distribution, "searched, as the KV cache limits the requests in flight"
    for name in ("async-scheduling", "max-cudagraph-capture-size"):
        yield name, space[name].distribution, ""
    if not fit.model.latent:
        yield "block-size", _blocks(fit, space), ""
    if sizes["choice"][-1] > 1:
        several = len(sizes["choice"]) > 1
        distribution = space[ALL_REDUCE].distribution
        yield ALL_REDUCE, distribution if several else {"choice": distribution["choice"]}, ""


def _shares(fit: Fit, concurrency: int, space: _Ready) -> dict[str, Any]:
    """Of the GPU's memory: from the least at which the largest batches of the space fit on the fewest GPUs."""
    ready = space[GPU_UTILIZATION].distribution
    (low, high), step = ready["float"], ready["step"]
    most = _steps(fit, concurrency, space)[-1]
    while low + step < high and not _fits(fit, most, concurrency, low):
        low = round(low + step, 4)
    return {"float": [low, high], "step": step}


# --- on both ---


def _values(space: _Ready, name: str) -> list[Any]:
    return list(space[name].distribution["choice"])


def _sizes(fit: Fit, space: _Ready) -> dict[str, Any]:
    return {"choice": [size for size in _values(space, TENSOR_PARALLEL) if size in fit.parallel_sizes]}


def _steps(fit: Fit, concurrency: int, space: _Ready) -> list[int]:
    """Tokens of a step, up to all prompts in flight at once, as far as they fit; at least one value."""
    steps = _values(space, BATCHED_TOKENS)
    at_once = concurrency * fit.traffic.tokens_in.most
    most = next((step for step in steps if step >= at_once), steps[-1])
    fitting = [step for step in steps if step <= most and _fits(fit, step, concurrency, GPU_SHARE)]
    return fitting or steps[:1]


def _fits(fit: Fit, step: int, concurrency: int, share: float) -> bool:
    """Whether the fewest GPUs hold the largest batches; on a CPU batches are no matter of memory."""
    sizes = {TENSOR_PARALLEL: fit.parallel_sizes[0], SEQS: concurrency, BATCHED_TOKENS: step}
    return not fit.site.on_gpus or fit.refused({**sizes, GPU_UTILIZATION: share}) is None


def _seqs_told(concurrency: int) -> str:
    return f"up to the {concurrency} requests in flight, beyond which nothing changes"


def _steps_told(fit: Fit, concurrency: int) -> str:
    each = fit.traffic.tokens_in.most
    return f"{concurrency} prompts of {each:,} tokens are {concurrency * each:,}; more in a step changes nothing"


def _blocks(fit: Fit, space: _Ready) -> dict[str, Any]:
    sizes = _values(space, "block-size")
    return {"choice": [size for size in sizes if size <= max(fit.max_model_len, sizes[0])]}


def _is_single(distribution: Any) -> bool:
    """Whether there is nothing to choose."""
    if not isinstance(distribution, Mapping):
        return False
    values = next(iter(distribution.values()))
    return len(values) < 2 or values[0] == values[1]
