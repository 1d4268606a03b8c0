"""What a measurement rests on: packages and their versions, this one's code, the machine, the cluster.

Knows neither Ray nor Optuna.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raytune_autotuner import __version__
from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.engine.machine import machine
from raytune_autotuner.tune.cluster import Cluster

PACKAGE = Path(__file__).parents[1]


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


def code_state(package: Path = PACKAGE) -> str:
    """Tells the package's code on this machine from what it is after a change."""
    stats = [(str(path.relative_to(package)), path.stat()) for path in sorted(package.rglob("*.py"))]
    known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr(known).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
