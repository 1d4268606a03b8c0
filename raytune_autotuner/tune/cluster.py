"""The Ray cluster under a study: started here, or joined by address."""

from __future__ import annotations

import itertools
import logging
import math
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.engine.gpus import gpus_here
from raytune_autotuner.report.store import Store
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import ResourceSpec, Study

OBJECT_STORE_BYTES = 128 * 1024**2
"""Trials exchange a few kilobytes; Ray's own default takes a third of the memory."""
CONNECT_S = 10.0
ACCELERATOR = "accelerator_type:"
"""Before the name of an accelerator, as Ray counts it among a node's resources."""
ANSWER_S = 3.0
"""So long a node may take to answer before it counts as lost; one that lives answers within milliseconds."""
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_JOBS_FILES = "runtime_resources"
"""Names a folder in which Ray keeps what came with jobs."""
LOOPBACK = "127.0.0.1"
_ENVIRONMENT = {
    # A kill by Ray's memory monitor ends the whole study; without it the kernel ends one actor.
    "RAY_memory_monitor_refresh_ms": "0",
    # Actors, and so engines, would run at nice 15.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Else Ray Tune starts one actor after the other; how many may wait is the searcher's business.
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
}


@dataclass(frozen=True)
class Node:
    """What one node of the cluster has in all."""

    cpus: float
    gpus: float
    node_id: str = ""
    accelerators: tuple[str, ...] = ()
    """Ray's names for its accelerators."""
    labels: Mapping[str, str] = field(default_factory=dict)

    def suits(self, wanted: ResourceSpec) -> bool:
        """Whether a study that wants such nodes may run trials on it."""
        right_kind = wanted.accelerator_type in (None, *self.accelerators)
        return right_kind and wanted.node_labels.items() <= self.labels.items()

    def holds(self, cpus: float, gpus: float) -> int:
        """How many trials of that size fit on it at once."""
        fits = [math.floor(self.cpus / cpus)] if cpus else []
        fits += [math.floor(self.gpus / gpus)] if gpus else []
        return min(fits, default=0)


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster."""

    nodes: tuple[Node, ...]
    dashboard_url: str | None
    here: str = ""
    """Ray's id of the driver's own node."""
    had_gpus: bool = False
    """Whether there were GPUs at an earlier look; their nodes may be gone, but no trial does without."""
    joined: bool = True
    """Whether it was there before the study. Workers of one that was not load this package from the driver's files."""
    metrics_url: str | None = None
    """Where the driver's node shows Ray's metrics and the study's own, for Prometheus."""

    @property
    def login_hint(self) -> str | None:
        """How to log in to the dashboard; the token itself is never printed."""
        if self.dashboard_url is None or os.environ.get("RAY_AUTH_MODE") != "token":
            return None
        return "  it asks for a token: paste what `ray get-auth-token` prints"

    @property
    def shape(self) -> str:
        """For people: `1 node: 2 CPUs, 0 GPUs`."""
        alike = Counter(f"{node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in self.nodes)
        sizes = "; ".join(f"{count} x {size}" if count > 1 else size for size, count in alike.items())
        return f"{len(self.nodes)} node{'s' if len(self.nodes) != 1 else ''}: {sizes}"

    def for_trials(self, study: Study) -> list[Node]:
        """The nodes that may run the study's trials: those with GPUs, where there are some; the largest one first.

        Raises `ConfigError` where there is none.
        """
        wanted = study.resources
        fit = [node for node in self.nodes if node.suits(wanted) and node.cpus >= wanted.cpus]
        if not fit:
            raise ConfigError(f"resources: a trial needs {wanted.cpus:g} CPUs on one node, but {self._offer(wanted)}.")
        with_gpus = [node for node in fit if node.gpus and wanted.gpus != 0]
        return sorted(with_gpus or fit, key=lambda node: (-node.gpus, -node.cpus))

    def runs_trials_here(self, study: Study) -> bool:
        """Whether the driver's own node is one of them."""
        return any(node.node_id == self.here for node in self.for_trials(study))

    def now(self) -> Cluster:
        """The same cluster with the nodes that it has now: some may have joined, others died."""
        return replace(self, nodes=_living_nodes(), had_gpus=self.has_gpus)

    @property
    def has_gpus(self) -> bool:
        """Whether there are GPUs, or were."""
        return self.had_gpus or any(node.gpus for node in self.nodes)

    def trial_resources(self, study: Study, engine: Engine, params: Params) -> dict[str, float]:
        """CPUs and GPUs that a trial of this setting holds on each of its nodes."""
        gpus = study.resources.gpus
        if gpus == "auto":
            gpus = float(engine.parallel_size(params)) if self.has_gpus and engine.uses_gpus else 0.0
        nodes = study.resources.nodes
        return {"cpus": study.resources.cpus, "gpus": gpus if nodes == 1 else float(math.ceil(gpus / nodes))}

    def trial_config(self, study: Study, engine: Engine, params: Params) -> dict[str, Any]:
        """`trial_resources`, the cores that the engine gets for itself as others may run beside it, and which nodes."""
        need = self.trial_resources(study, engine, params)
        wanted = study.resources
        beside = wanted.max_concurrent != 1 and any(node.holds(**need) > 1 for node in self.nodes)
        cores = math.ceil(need["cpus"]) if beside and not need["gpus"] else 0
        kind = {"accelerator": wanted.accelerator_type, "labels": dict(wanted.node_labels)}
        return {**need, "cores": cores, "nodes": wanted.nodes, **kind}

    def slots(self, study: Study, engine: Engine) -> int:
        """Trials at once: as many of the smallest size as fit, at most `resources.max_concurrent`.

        0 while there is no node that holds one. What can never fit is refused by `require`.
        """
        fits = max(self._fitting(study, engine, params) for params in _extremes(study, engine))
        return min(fits, study.resources.max_concurrent or fits)

    def require(self, study: Study, engine: Engine) -> None:
        """Raise `ConfigError` where the cluster cannot hold the smallest or the largest trial."""
        nodes = study.resources.nodes
        if (ranks := engine.parallel_size({})) % nodes:
            raise ConfigError(
                f"resources.nodes: the baseline's tensor x pipeline parallel size, {ranks}, cannot be divided evenly "
                f"among {nodes} nodes.\nRaise it under engine.args, such as pipeline-parallel-size: {nodes}."
            )
        for params in _extremes(study, engine):
            if self._fitting(study, engine, params) == 0:
                need = self.trial_resources(study, engine, params)
                raise ConfigError(
                    f"resources: a trial needs {need['cpus']:g} CPUs and {need['gpus']:g} GPUs on "
                    f"{'one node' if nodes == 1 else f'each of {nodes} nodes'}"
                    f"{f' with {dict(params)}' if params else ''}, but {self._offer(study.resources)}.\n"
                    "Lower resources.cpus or resources.gpus, or the parallel sizes in search_space."
                )

    def _offer(self, wanted: ResourceSpec) -> str:
        """What the cluster has for a study, for people."""
        if all(node.suits(wanted) for node in self.nodes):
            return f"the cluster has {self.shape}"
        suiting = replace(self, nodes=tuple(node for node in self.nodes if node.suits(wanted)))
        there = sorted({name for node in self.nodes for name in node.accelerators}) or ["none"]
        return (
            f"of the cluster's {len(self.nodes)} nodes those with resources.accelerator_type and node_labels are "
            f"{suiting.shape}; accelerators: {', '.join(there)}"
        )

    def _fitting(self, study: Study, engine: Engine, params: Params) -> int:
        need = self.trial_resources(study, engine, params)
        holds = [node.holds(**need) for node in self.nodes if node.suits(study.resources)]
        return groups(holds, study.resources.nodes)


def groups(places: Sequence[int], size: int) -> int:
    """How many trials fit at once that each take a place on `size` different nodes, where a node has so many `places`.

    >>> groups([3, 1], 1), groups([3, 1], 2), groups([2, 2, 2], 2), groups([8], 2)
    (4, 1, 3, 0)
    """
    most = sum(places) // size
    # No trial takes two places of a node; and where the places are enough for so many trials, they can be dealt out.
    return next(count for count in range(most, -1, -1) if sum(min(p, count) for p in places) >= count * size)


def address_of(study: Study, results: Path | Store) -> str | None:
    """The cluster to join: the study's, or that of the Ray job that this process is; None: a Ray of its own.

    Raises `ConfigError` where a job's results would be deleted with it.
    """
    if _JOB not in os.environ:
        return study.ray.address
    if isinstance(results, Path) and _JOBS_FILES in results.absolute().parts:
        raise ConfigError(
            f"--results {results}: lies in the job's own working directory, which Ray deletes.\n"
            "Name a path that stays, best one that all nodes share."
        )
    return study.ray.address or "auto"


def this_machine() -> Cluster:
    """What Ray would find here, without starting it."""
    return Cluster((Node(float(len(os.sched_getaffinity(0))), float(len(gpus_here()))),), None)


@contextmanager
def running_cluster(address: str | None = None, num_cpus: int | None = None) -> Iterator[Cluster]:
    """Ray, started on this machine (or joined at `address`) and shut down at the end.

    `num_cpus` is for a cluster that is started here; None for as many as the machine has.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _check_address(address)
    if address is None:
        _check_path(sys.executable)
    import ray

    joined: dict[str, Any] = {"runtime_env": _travelling()}
    local: dict[str, Any] = {
        "include_dashboard": True,
        "dashboard_host": LOOPBACK,
        "object_store_memory": OBJECT_STORE_BYTES,
        "num_cpus": num_cpus,
    }
    try:
        with _on_loopback() if address is None or _host(address) == LOOPBACK else nullcontext():
            context = ray.init(
                address=address or "local",  # left out, Ray joins whatever `ray start` has left on this machine
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                **(local if address is None else joined),
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(_not_answering(address, str(error).splitlines()[0])) from error
    # Its errors are ours to tell, each once, with its trial.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        url = getattr(context, "dashboard_url", None)
        here = ray.get_runtime_context().get_node_id()
        dashboard = f"http://{url}" if url else None
        yield Cluster(_living_nodes(), dashboard, here, joined=address is not None, metrics_url=_metrics_url(here))
    finally:
        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Within, this machine is 127.0.0.1 to Ray: what it starts listens there alone, and there it joins.

    Otherwise Ray takes the address by which others reach the machine, also where 127.0.0.1 is asked for, and its
    services listen on all of them. The switch is the one by which it stays local on systems without Ray clusters.
    """
    from ray._private import ray_constants as constants

    variable, clusters = constants.ENABLE_RAY_CLUSTERS_ENV_VAR, constants.ENABLE_RAY_CLUSTER
    before = os.environ.get(variable)
    os.environ[variable], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = clusters
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def _travelling() -> dict[str, Any]:
    """What workers on other machines get from here: this package, unless it came with a job, as then they have it."""
    variables = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    package = Path(__file__).parents[1]
    modules = {} if _JOBS_FILES in package.parts else {"py_modules": [str(package)], "excludes": ["__pycache__"]}
    return {"env_vars": variables, **modules}


def node_answers(node_id: str) -> bool:
    """Whether the node lives, by Ray's own account, and its Ray can be reached from here.

    Ray takes up to a minute to see that a node is cut off; one that does not answer is as good as lost.
    """
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    node = next((node for node in nodes if node["NodeID"] == node_id and node["Alive"]), None)
    if node is None:
        return False
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


def address_here() -> str:
    """The IP address by which Ray's other nodes reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _living_nodes() -> tuple[Node, ...]:
    import ray

    nodes = sorted(ray.nodes(), key=lambda node: str(node["NodeID"]))  # type: ignore[no-untyped-call]
    return tuple(_node(node) for node in nodes if node["Alive"])


def _node(said: Mapping[str, Any]) -> Node:
    has = said["Resources"]
    accelerators = tuple(name.removeprefix(ACCELERATOR) for name in has if name.startswith(ACCELERATOR))
    return Node(has.get("CPU", 0.0), has.get("GPU", 0.0), said["NodeID"], accelerators, dict(said["Labels"]))


def _metrics_url(node_id: str) -> str | None:
    import ray

    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)  # type: ignore[no-untyped-call]
    port = node["MetricsExportPort"]
    return f"http://{node['NodeManagerAddress']}:{port}/metrics" if port > 0 else None


def _check_path(python: str) -> None:
    """Raise `ConfigError` where Ray would wait for ever: it starts its workers by an unquoted shell line."""
    if any(character.isspace() for character in python):
        raise ConfigError(
            f"{python}: Ray cannot start its workers with a Python whose path has a space in it.\n"
            "Move the clone (or the virtual environment) to a path without one."
        )


def _check_address(address: str | None) -> None:
    """Raise `ConfigError` where nothing listens at HOST:PORT; Ray itself would try again without end."""
    host, port = _host(address), (address or "").rpartition(":")[2]
    if host is None:
        return  # none, or a word that Ray itself understands, such as `auto`
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(_not_answering(address, getattr(error, "strerror", None) or str(error))) from error


def _host(address: str | None) -> str | None:
    """The host of HOST:PORT; None for an address of another form."""
    host, colon, port = (address or "").rpartition(":")
    return host if colon and port.isdecimal() and "/" not in host else None


def _not_answering(address: str | None, why: str) -> str:
    if address is None:
        return f"Ray does not start on this machine: {why}\nIs there a cluster already? Then name it with --address."
    return (
        f"--address {address}: no Ray cluster answers there: {why}\n"
        "The study has to run on a node of the cluster; from elsewhere, submit it as a Ray job (docs/cluster.md).\n"
        "If it asks for tokens: RAY_AUTH_MODE=token, and its token in ~/.ray/auth_token or RAY_AUTH_TOKEN."
    )


def _extremes(study: Study, engine: Engine) -> list[Params]:
    """The baseline, and the largest setting that the constraints let through."""
    parallel = [parameter for parameter in study.space.parameters if parameter.name.endswith("-parallel-size")]
    names = [parameter.name for parameter in parallel]
    combinations = itertools.product(*(parameter.bounds for parameter in parallel))
    settings = [dict(zip(names, values, strict=True)) for values in combinations] if parallel else []
    allowed = [setting for setting in settings if study.space.violated(setting, study.fixed) is None]
    return [{}, *sorted(allowed, key=engine.parallel_size)[-1:]]
