"""Which parameters are worth a search for this model, on these machines, under this load, and in which range.

The ready-made spaces are taken (`configs/spaces`), each parameter with its comment, and narrowed: in, what fits and the
load levels; out, parameters in the order of what they are worth. Values that certainly do not fit in memory, and values
that could make no difference, are left out. Pure but for the reading of the spaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_autotuner.study.spaces import explained
from raytune_autotuner.tune.proposal.fit import GPU_SHARE, Fit

TENSOR_PARALLEL = "tensor-parallel-size"
SEQS = "max-num-seqs"
BATCHED_TOKENS = "max-num-batched-tokens"
GPU_UTILIZATION = "gpu-memory-utilization"
THREADS = "env:VLLM_CPU_OMP_THREADS_BIND"
QUALITY_TOKENS = 512
"""Of max-model-len, which `quality` needs."""
_STEPS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_GOOD_STEP = 8192
_LATER = 3
_SHARES = (0.80, 0.84, 0.88, GPU_SHARE)
_NUMA_WHY = (
    "NUMA nodes (mostly sockets) that share one copy of the model, each with a worker and cores of its own.",
    "Traps: more than there are NUMA nodes fails under automatic binding; each worker takes a KV cache of its own.",
)


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
    space = "vllm-gpu" if fit.site.on_gpus else "vllm-cpu"
    comments = explained(space)
    found = _on_gpus(fit, max(levels)) if fit.site.on_gpus else _on_cpus(fit, max(levels))
    parameters = [
        Parameter(name, distribution, comments.get(name, _NUMA_WHY), here)
        for name, distribution, here in found
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
    if "enable-chunked-prefill" in names:
        found.append(f"enable-chunked-prefill or {BATCHED_TOKENS} >= max-model-len")
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


def _on_cpus(fit: Fit, concurrency: int) -> Iterator[tuple[str, Any, str]]:
    cores = min((host.cores for host in fit.site.hosts), key=len)
    nodes = min(len(host.numa_gib) for host in fit.site.hosts)
    yield SEQS, {"choice": _powers(concurrency)}, _seqs_told(concurrency)
    yield BATCHED_TOKENS, {"choice": _steps(fit, concurrency)}, _steps_told(fit, concurrency)
    if nodes > 1:
        yield TENSOR_PARALLEL, {"choice": list(fit.parallel_sizes)}, f"of the {nodes} NUMA nodes, by the model's heads"
    yield THREADS, {"choice": _bindings(fit, cores)}, "one thread a core; the last choice is all cores of this machine"
    if not fit.model.latent:
        yield "block-size", {"choice": _blocks(fit, (32, 64, 128))}, "multiples of 32, as the CPU's attention wants"
    if len(cores) > 2:
        when = f'{THREADS} == "auto"'
        yield "env:VLLM_CPU_NUM_OF_RESERVED_CPU", {"choice": [0, 1], "when": when}, ""
    steps = _steps(fit, concurrency)
    if len(steps) > 1 and steps[-1] >= fit.max_model_len:
        yield "enable-chunked-prefill", "bool", ""


def _bindings(fit: Fit, cores: Sequence[int]) -> list[str]:
    """With the cores by number where there is one machine: those of others have other numbers."""
    return ["auto", "nobind", *([as_ranges(cores)] if len(fit.site.hosts) == 1 else [])]


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


def _on_gpus(fit: Fit, concurrency: int) -> Iterator[tuple[str, Any, str]]:
    sizes = list(fit.parallel_sizes)
    yield TENSOR_PARALLEL, {"choice": sizes}, "those that divide the model's heads, that one machine has, and that fit"
    low = max(concurrency // 8, 1)
    yield SEQS, {"int": [low, concurrency], "log": True}, _seqs_told(concurrency)
    yield BATCHED_TOKENS, {"choice": _steps(fit, concurrency)}, _steps_told(fit, concurrency)
    share = _least_share(fit, concurrency)
    yield GPU_UTILIZATION, {"float": [share, 0.96], "step": 0.04}, f"from {share:g}, where model and one request fit"
    if fit.concurrency < fit.concurrency_wanted and fit.max_model_len >= QUALITY_TOKENS:
        yield "kv-cache-dtype", {"choice": ["auto", "fp8"]}, "as the KV cache limits the requests in flight"
    yield "async-scheduling", "bool", ""
    yield "max-cudagraph-capture-size", {"choice": [128, 256, 512]}, ""
    if not fit.model.latent:
        yield "block-size", {"choice": _blocks(fit, (16, 32, 64))}, ""
    if sizes[-1] > 1:
        when = f"{TENSOR_PARALLEL} > 1" if len(sizes) > 1 else None
        choice = {"choice": [False, True], **({"when": when} if when else {})}
        yield "disable-custom-all-reduce", choice, ""


def _least_share(fit: Fit, concurrency: int) -> float:
    """Of the GPU's memory: the least at which the largest batches of the space fit on the fewest GPUs."""
    largest = {TENSOR_PARALLEL: fit.parallel_sizes[0], SEQS: concurrency, BATCHED_TOKENS: _steps(fit, concurrency)[-1]}
    fitting = [share for share in _SHARES if fit.refused({**largest, GPU_UTILIZATION: share}) is None]
    return fitting[0] if fitting else GPU_SHARE


# --- on both ---


def _powers(most: int) -> list[int]:
    """Halved twice from `most` down.

    >>> _powers(16), _powers(2)
    ([4, 8, 16], [1, 2])
    """
    return sorted({most // 4, most // 2, most} - {0})


def _steps(fit: Fit, concurrency: int) -> list[int]:
    """Tokens of a step, up to all prompts in flight at once, as far as they fit; at least one value."""
    at_once = concurrency * fit.traffic.tokens_in.most
    wanted = next((step for step in _STEPS if step >= at_once), _STEPS[-1])
    least = 1024 if fit.site.on_gpus else 256
    steps = [step for step in _STEPS if min(least, wanted) <= step <= wanted]
    return [step for step in steps if not fit.site.on_gpus or _fits(fit, step, concurrency)] or steps[:1]


def _fits(fit: Fit, step: int, concurrency: int) -> bool:
    sizes = {TENSOR_PARALLEL: fit.parallel_sizes[0], SEQS: concurrency, BATCHED_TOKENS: step}
    return fit.refused({**sizes, GPU_UTILIZATION: GPU_SHARE}) is None


def _seqs_told(concurrency: int) -> str:
    return f"up to the {concurrency} requests in flight, beyond which nothing changes"


def _steps_told(fit: Fit, concurrency: int) -> str:
    each = fit.traffic.tokens_in.most
    return f"{concurrency} prompts of {each:,} tokens are {concurrency * each:,}; more in a step changes nothing"


def _blocks(fit: Fit, sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size <= max(fit.max_model_len, sizes[0])]


def _is_single(distribution: Any) -> bool:
    if not isinstance(distribution, Mapping):
        return False
    values = next(iter(distribution.values()))
    return len(values) < 2 or ("choice" not in distribution and values[0] == values[1])
