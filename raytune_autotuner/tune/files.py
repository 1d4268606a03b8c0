"""A trial's files, brought to the study's folder from the node on which it ran.

A trial writes straight into its folder, by its path, on its own node. Where that is a shared path nothing is to be
brought. Elsewhere a task on that node packs the folder, after the trial's end and also when its actor was killed: it
is the supervisor that ends the log, and it outlives the actor.
"""

from __future__ import annotations

import io
import logging
import tarfile
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_autotuner.engine.server import read_end
from raytune_autotuner.report.results import SUGGESTION

logger = logging.getLogger(__name__)

SETTLED_S = 5.0
"""So long the supervisor of a killed trial may take to end its processes and the log."""
BRING_S = 60.0
POLL_S = 0.05


def bring_files(trial_dir: Path, node_id: str) -> None:
    """Copy `trial_dir` from the node `node_id` to the same path here; nothing where that is this node or shared."""
    if node_id in ("", ray.get_runtime_context().get_node_id()):
        return
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(_pack).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
    try:
        packed: bytes = ray.get(task.remote(trial_dir), timeout=BRING_S)
    except ray.exceptions.RayError as error:
        logger.warning("%s: its files stay on node %s: %s", trial_dir, node_id, type(error).__name__)
        return
    if packed:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
            archive.extractall(trial_dir, filter="data")


def _pack(trial_dir: Path) -> bytes:
    """The folder as a compressed archive, once nothing writes there any more; empty where it is the study's own."""
    # The driver has put it there before the trial began: on another node it is missing, unless the path is shared.
    if (trial_dir / SUGGESTION).exists() or not trial_dir.is_dir():
        return b""
    until = time.monotonic() + SETTLED_S
    while read_end(trial_dir) is None and time.monotonic() < until:
        time.sleep(POLL_S)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        archive.add(trial_dir, arcname=".")
    return packed.getvalue()
