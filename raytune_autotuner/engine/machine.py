"""What a machine is: for `versions.json`, and to tell results of different hardware apart.

Knows nothing of engines and clusters.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import psutil

from raytune_autotuner.engine.gpus import describe_gpus, gpus_and_driver


def machine() -> dict[str, Any]:
    """What `versions.json` says of the machine that asks."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        **gpus_and_driver(),
    }


def hardware(gpus: Sequence[str]) -> str:
    """What a trial's figures rest on: the kind of its GPUs, or where it holds none, processor, cores and memory."""
    if gpus:
        return describe_gpus(gpus)
    memory_gib = psutil.virtual_memory().total / 2**30
    return f"{_processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB"


def together(machines: Iterable[str]) -> str:
    """What the figures of an engine rest on that spans several machines, each as `hardware` tells it.

    >>> together(["8 x H100", "8 x H100"]), together(["8 x H100"])
    ('2 nodes: 8 x H100', '8 x H100')
    """
    counts = Counter(machine for machine in machines if machine)
    return " + ".join(
        f"{count} nodes: {machine}" if count > 1 else machine for machine, count in sorted(counts.items())
    )


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
