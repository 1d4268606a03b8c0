"""The Ray cluster under a study: started here, or joined by address."""

from __future__ import annotations

import itertools
import logging
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study

OBJECT_STORE_BYTES = 128 * 1024**2
"""Trials exchange a few kilobytes; Ray's own default takes a third of the memory."""
CONNECT_S = 10.0
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
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
}


@dataclass(frozen=True)
class Node:
    """What one node of the cluster has in all."""

    cpus: float
    gpus: float

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

    @property
    def login_hint(self) -> str | None:
        """How to log in to the dashboard; the token itself is never printed."""
        if self.dashboard_url is None or os.environ.get("RAY_AUTH_MODE") != "token":
            return None
        return "  it asks for a token: paste what `ray get-auth-token` prints"

    @property
    def shape(self) -> str:
        """For people: `1 node: 2 CPUs, 0 GPUs`."""
        sizes = "; ".join(f"{node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in self.nodes)
        return f"{len(self.nodes)} node{'s' if len(self.nodes) != 1 else ''}: {sizes}"

    def trial_resources(self, study: Study, engine: Engine, params: Params) -> dict[str, float]:
        """CPUs and GPUs that a trial of this setting holds."""
        gpus = study.resources.gpus
        if gpus == "auto":
            has_gpus = any(node.gpus for node in self.nodes)
            gpus = float(engine.parallel_size(params)) if has_gpus and engine.uses_gpus else 0.0
        return {"cpus": study.resources.cpus, "gpus": gpus}

    def slots(self, study: Study, engine: Engine) -> int:
        """Trials at once: as many of the smallest size as fit, at most `resources.max_concurrent`.

        Raises `ConfigError` where no node can hold the smallest or the largest trial.
        """
        fits = []
        for params in _extremes(study, engine):
            need = self.trial_resources(study, engine, params)
            fits.append(sum(node.holds(**need) for node in self.nodes))
            if fits[-1] == 0:
                raise ConfigError(
                    f"resources: a trial needs {need['cpus']:g} CPUs and {need['gpus']:g} GPUs on one node"
                    f"{f' with {dict(params)}' if params else ''}, but the cluster has {self.shape}.\n"
                    "Lower resources.cpus or resources.gpus, or the parallel sizes in search_space."
                )
        return min(max(fits), study.resources.max_concurrent or max(fits))


def this_machine() -> Cluster:
    """What Ray would find here, without starting it."""
    return Cluster((Node(float(len(os.sched_getaffinity(0))), float(len(gpus_here()))),), None)


def gpus_here() -> list[str]:
    """The GPUs that this process may use, by the names that `CUDA_VISIBLE_DEVICES` takes."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [str(index) for index, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


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

    local: dict[str, Any] = {
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "object_store_memory": OBJECT_STORE_BYTES,
        "num_cpus": num_cpus,
    }
    try:
        context = ray.init(
            address=address or "local",  # left out, Ray joins whatever `ray start` has left on this machine
            logging_level=logging.CRITICAL,
            log_to_driver=False,
            **(local if address is None else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(_not_answering(address, str(error).splitlines()[0])) from error
    # Its errors are ours to tell, each once, with its trial.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        nodes = tuple(
            Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        )
        url = getattr(context, "dashboard_url", None)
        yield Cluster(nodes, f"http://{url}" if url else None)
    finally:
        ray.shutdown()


def _check_path(python: str) -> None:
    """Raise `ConfigError` where Ray would wait for ever: it starts its workers by an unquoted shell line."""
    if any(character.isspace() for character in python):
        raise ConfigError(
            f"{python}: Ray cannot start its workers with a Python whose path has a space in it.\n"
            "Move the clone (or the virtual environment) to a path without one."
        )


def _check_address(address: str | None) -> None:
    """Raise `ConfigError` where nothing listens at HOST:PORT; Ray itself would try again without end."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return  # none, or a word that Ray itself understands, such as `auto`
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(_not_answering(address, getattr(error, "strerror", None) or str(error))) from error


def _not_answering(address: str | None, why: str) -> str:
    if address is None:
        return f"Ray does not start on this machine: {why}\nIs there a cluster already? Then name it with --address."
    return (
        f"--address {address}: no Ray cluster answers there: {why}\n"
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
