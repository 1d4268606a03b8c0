"""What all tests share: which of them cannot run on this machine, and why."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
