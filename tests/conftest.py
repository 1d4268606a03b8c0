"""What all tests share: which of them cannot run on this machine, and why."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.s3_server import S3Server

ROOT = Path(__file__).parent.parent

# An example takes longer on a machine that others use, too.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


def _missing(marker: str) -> str | None:
    """Why tests with `marker` cannot run here, or None."""
    if marker == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; scripts/test installs it"
    if marker == "gpu" and not any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return "no NVIDIA GPU on this machine"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker in ("vllm", "gpu"):
        why = _missing(marker)
        for item in items:
            if why is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=why))
    for item in items:
        # They wait for processes of a machine that others use, too. The summary says which were run again.
        if item.get_closest_marker("slow") or item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


_RAY = """
import logging, os, sys
from raytune_autotuner.tune.cluster import running_cluster
with running_cluster(num_cpus=4):
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray cluster of 4 CPUs on this machine, in a process of its own, that all studies of a test session join."""
    with subprocess.Popen(
        [sys.executable, "-c", _RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        os.environ["RAY_AUTH_MODE"] = "token"  # as for everyone who joins a cluster that asks for tokens
        yield process.stdout.readline().strip()
        del os.environ["RAY_AUTH_MODE"]
        process.communicate()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server on this machine, with its keys in the environment."""
    from tests.s3_server import KEYS, S3Server  # here, as it takes seconds to import

    with pytest.MonkeyPatch.context() as environment:
        for name, value in KEYS.items():
            environment.setenv(name, value)
        server = S3Server("studies")
        yield server
        server.close()
