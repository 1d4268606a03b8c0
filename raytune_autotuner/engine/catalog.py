"""Which engine a study means."""

from __future__ import annotations

from raytune_autotuner.engine.contract import Engine
from raytune_autotuner.engine.simulated.engine import SimulatedEngine
from raytune_autotuner.engine.vllm import VllmEngine
from raytune_autotuner.study.study import Study


def make_engine(study: Study) -> Engine:
    """The engine of `study.engine.kind`, holding the study's model and fixed arguments."""
    return SimulatedEngine(study) if study.engine.kind == "simulated" else VllmEngine(study)
