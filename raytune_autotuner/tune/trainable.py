"""A trial as Ray Tune's Trainable: one actor, one engine, a round a step.

The actor does its work in `step`, never in `setup`: what fails there would lose its cause. It reports its own
failures as results; those that kill it are found by the monitor and the reporter.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import PlacementGroupFactory

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.machine import hardware
from raytune_autotuner.engine.processes import sweep_orphans
from raytune_autotuner.study.failure import Stage
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialResult
from raytune_autotuner.tune.cluster import ACCELERATOR, address_here
from raytune_autotuner.tune.early_stop import LOADED, LOADS
from raytune_autotuner.tune.evaluate import Evaluation, Metrics
from raytune_autotuner.tune.follower import Part, RayFollower
from raytune_autotuner.tune.reporter import RESULT, ROUND, SCORE
from raytune_autotuner.tune.standing import Standing

BACKSTOP_S = 2.0
"""The actor's own deadline lies so much after the monitor's, which is the one that counts."""
A_TRACE = 0.001
"""Of an accelerator's name, which Ray counts as a resource of which each such node has 1."""
BEAT_S = 0.2
MONITOR_ANSWER_S = 10.0
"""The monitor answers in milliseconds, or after some seconds where it has to be started again."""


@dataclass(frozen=True)
class Job:
    """What all trials of a study share."""

    study: Study
    run_id: str
    trials_dir: Path
    monitor: Any


class EngineTrial(tune.Trainable):
    """One setting, measured on a fresh engine."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """A bundle a node, with the CPUs and GPUs that the trial holds there, on nodes of the kind that is wanted.

        The actor, and rank 0 of the engine with it, is in the first one.
        """
        bundle = {"CPU": config["cpus"], "GPU": config["gpus"]}
        if config["accelerator"]:
            bundle[f"{ACCELERATOR}{config['accelerator']}"] = A_TRACE
        nodes = config["nodes"]
        strategy = "STRICT_PACK" if nodes == 1 else "STRICT_SPREAD"
        return PlacementGroupFactory([bundle] * nodes, strategy, bundle_label_selector=[config["labels"]] * nodes)

    def setup(self, config: dict[str, Any], job: Job) -> None:  # type: ignore[override]
        """Start the trial's clock at the monitor; nothing else."""
        self._begun = time.monotonic()
        self._job = job
        self._rounds: Generator[Metrics, None, TrialResult] | None = None
        self._beaten_at = 0.0
        self._beaten_stage: Stage | None = None
        here = ray.get_runtime_context()
        self._gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        self._others = _other_nodes() if config["nodes"] > 1 else ()
        place = Standing(
            node_id=here.get_node_id(),
            others=self._others,
            node=socket.gethostname(),
            hardware=hardware(self._gpus),
        )
        joined = job.monitor.register.remote(self.trial_id, here.current_actor, place)
        self._welcome = self._ask_monitor(joined, default=True)

    def __repr__(self) -> str:
        """As the Ray dashboard shows the actor."""
        return f"{self._job.run_id} trial {self.config['number']}"

    def step(self) -> dict[str, Any]:
        """One round; the last step has the trial's whole result."""
        if not self._welcome:
            return {SCORE: 0.0, "done": True}  # without its metric a result ends the whole study
        if self._rounds is None:
            self._evaluation = self._make_evaluation()
            self._rounds = self._evaluation.run()
        try:
            metrics = next(self._rounds)
        except StopIteration as stop:
            return self._last(stop.value)
        self._job.monitor.beat.remote(self.trial_id, Stage.LOAD, 0.0, metrics)
        so_far = {LOADS: self._evaluation.values, LOADED: self._evaluation.loaded}
        return {SCORE: _told(metrics, self._job.study.objective.metric), **so_far, ROUND: json.dumps(metrics)}

    def cleanup(self) -> None:
        """Stop the engine where the trial is ended between two rounds."""
        if self._rounds is not None:
            self._rounds.close()
            self._job.monitor.release.remote(self.trial_id)

    def _make_evaluation(self) -> Evaluation:
        sweep_orphans()
        study = self._job.study
        study = study.searched if self.config["restart"] is None else study
        workdir = self._job.trials_dir / f"{self.config['number']}-{self.trial_id}"
        time_up = self._begun + study.trial.timeout_s
        deadline = time_up + BACKSTOP_S
        # Without this a trial that holds no GPU would see all of them.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus)
        return Evaluation(
            self._job.study,
            make_engine(study),
            self.config["params"],
            workdir,
            self._job.run_id,
            self.trial_id,
            on_progress=self._beat,
            on_measured=self._measured,
            gpus=self._gpus,
            cores=self.config["cores"],
            restart=self.config["restart"],
            reference=self.config["reference"],
            deadline=deadline,
            time_up=time_up,
            followers=self._followers(study, workdir, deadline),
            address=address_here(),
        )

    def _followers(self, study: Study, workdir: Path, deadline: float) -> list[RayFollower]:
        """The ranks on the trial's further nodes; `study` is as this trial starts its engine."""
        config, job = self.config, self._job
        part = Part(study, config["params"], workdir, job.run_id, self.trial_id, config["cores"], job.monitor)
        return [RayFollower(part, bundle, node_id, deadline) for bundle, node_id in enumerate(self._others, 1)]

    def _beat(self, stage: Stage, share: float) -> None:
        if stage is not self._beaten_stage or time.monotonic() - self._beaten_at >= BEAT_S:
            self._beaten_at, self._beaten_stage = time.monotonic(), stage
            self._job.monitor.beat.remote(self.trial_id, stage, share, None)

    def _measured(self) -> None:
        self._ask_monitor(self._job.monitor.measured.remote(self.trial_id), default=None)

    def _ask_monitor(self, answer: Any, default: Any) -> Any:
        """A monitor that is gone or mute costs a trial its clock at the monitor, and nothing else."""
        try:
            return ray.get(answer, timeout=MONITOR_ANSWER_S)
        except ray.exceptions.RayError:
            return default

    def _last(self, result: TrialResult) -> dict[str, Any]:
        self._ask_monitor(self._job.monitor.release.remote(self.trial_id), default=None)
        score = _told(result.metrics, self._job.study.objective.metric)
        return {SCORE: score, RESULT: json.dumps(result.to_dict()), "done": True}


def _other_nodes() -> tuple[str, ...]:
    """Ray's ids of the nodes of the trial's further bundles, in their order."""
    table = ray.util.placement_group_table(ray.util.get_current_placement_group())
    return tuple(node_id for bundle, node_id in sorted(table["bundles_to_node_id"].items()) if bundle)


def _told(metrics: Mapping[str, float], name: str) -> float:
    """Ray Tune wants a number in every result; what Optuna is told is the reporter's business."""
    return metrics.get(name, 0.0)
