"""What a measurement rests on: packages and their versions, the machine, the cluster. Knows neither Ray nor Optuna."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from raytune_autotuner import __version__
from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.engine.machine import machine
from raytune_autotuner.tune.cluster import Cluster


def versions(engine: Engine, cluster: Cluster | None = None) -> dict[str, Any]:
    """What a result rests on: packages, the engine's own values, machine, and the cluster once there is one."""
    packages = {name: _version(name) for name in ("ray", "optuna", "pyarrow", "pandas")}
    own = {"raytune_autotuner": __version__, "python": sys.version.split()[0]}
    return {
        "engine": engine.versions(),
        "defaults": engine.defaults(),
        "packages": own | packages,
        "machine": machine(),
        **({} if cluster is None else {"cluster": cluster.shape}),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
