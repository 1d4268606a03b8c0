"""Which engine a study means."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from raytune_autotuner.engine.command import CommandEngine
from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.engine.running import RunningEngine
from raytune_autotuner.engine.simulated.engine import SimulatedEngine
from raytune_autotuner.engine.vllm import VllmEngine
from raytune_autotuner.study.study import Study

_MAKERS: Mapping[str, Callable[[Study], Engine]] = {
    "vllm": VllmEngine,
    "simulated": SimulatedEngine,
    "command": CommandEngine,
    "running": RunningEngine,
}


def make_engine(study: Study) -> Engine:
    """The engine of `study.engine.kind`, holding the study's model and fixed arguments."""
    return _MAKERS[study.engine.kind](study)
