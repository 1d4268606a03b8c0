"""A rank of a trial's engine on one of the further nodes that it spans: an actor in that node's bundle, and its handle.

The actor starts the rank under a supervisor of its node's own, as the trial's actor does rank 0, and ends with the
trial's actor, which has made it. Its files are beside those of rank 0: `engine-1.log` and so on, on its own node.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.contract import Rank
from raytune_autotuner.engine.machine import hardware
from raytune_autotuner.engine.processes import free_cores, make_mark, sweep_orphans
from raytune_autotuner.engine.server import LOG_NAME, EngineServer, ranked
from raytune_autotuner.study.errors import AutotunerError, TrialFailed
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.masking import learn
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study
from raytune_autotuner.tune.cluster import address_here, node_answers

BEAT_S = 1.0
STOP_S = 30.0
"""For the end of a rank; what is then left ends with its actor."""


@dataclass(frozen=True)
class Part:
    """What a rank's actor is told of its trial."""

    study: Study
    """As this trial starts its engine."""
    params: Params
    workdir: Path
    run_id: str
    trial_id: str
    cores: int
    monitor: Any


class RankActor:
    """Runs one rank on its node."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        self._server: EngineServer | None = None
        self._beaten_at = 0.0

    def __repr__(self) -> str:
        """As the Ray dashboard shows the actor."""
        return f"{self._part.run_id} follower of trial {self._part.trial_id} on {socket.gethostname()}"

    def hardware(self) -> str:
        """What this machine is."""
        return hardware(self._gpus)

    def run(self, rank: Rank, left_s: float) -> Failure | None:
        """Start the rank, and wait for its end, `left_s` seconds at most; why it ended, None where it was stopped."""
        learn(self._part.study.secrets)
        sweep_orphans()
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus)
        rank = replace(rank, host=address_here())
        self._name = f"rank {rank.number} on {socket.gethostname()} ({ranked(LOG_NAME, rank.number)})"
        try:
            with free_cores(self._part.cores) as cores, self._make_server(rank, left_s, cores) as self._server:
                self._server.wait_end()
        except TrialFailed as failed:
            return self._named(failed.failure)
        return None

    def stop(self) -> Failure | None:
        """End the rank, and wait until it is gone; what its log shows to have gone wrong before."""
        if self._server is None:
            return None
        self._server.kill()
        failure = self._server.logged_failure()
        return None if failure is None else self._named(failure)

    def _named(self, failure: Failure) -> Failure:
        return replace(failure, evidence=f"{self._name}: {failure.evidence}")

    def _make_server(self, rank: Rank, left_s: float, cores: tuple[int, ...]) -> EngineServer:
        part = self._part
        engine = make_engine(part.study)
        return EngineServer(
            engine.launch(part.params, rank.port, rank),
            rank.port,
            part.workdir,
            rules=engine.rules,
            mark=make_mark(part.run_id, part.trial_id),
            deadline=time.monotonic() + left_s,
            timeout_s=part.study.trial.timeout_s,
            log_limit_mb=part.study.trial.log_limit_mb,
            locks=[f"gpu-{gpu}" for gpu in self._gpus],
            cores=cores,
            on_progress=self._beat,
            rank=rank.number,
        )

    def _beat(self, stage: Stage, share: float) -> None:
        """A sign of life; how far the trial is, rank 0 says."""
        if time.monotonic() - self._beaten_at >= BEAT_S:
            self._beaten_at = time.monotonic()
            self._part.monitor.beat.remote(self._part.trial_id, Stage.ARGUMENTS, 0.0, None)


class RayFollower:
    """The rank on node `node_id`, as the trial's actor has it: a `Follower`."""

    def __init__(self, part: Part, bundle: int, node_id: str, deadline: float) -> None:
        """`bundle` is that of the trial's placement group on this node; `deadline` on `time.monotonic()`'s clock."""
        group = ray.util.get_current_placement_group()
        assert group is not None
        held = group.bundle_specs[bundle]
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        options = {"num_cpus": held.get("CPU", 0), "num_gpus": held.get("GPU", 0), "max_concurrency": 3}
        self.hardware = ""
        self._actor: Any = ray.remote(RankActor).options(**options, scheduling_strategy=place).remote(part)
        self._node_id = node_id
        self._deadline = deadline

    def start(self, rank: Rank, on_end: Callable[[Failure | None], None]) -> None:
        """Start the rank there, once its actor runs."""
        run = self._actor.run.remote(rank, self._deadline - time.monotonic())
        threading.Thread(target=lambda: on_end(self._end_of(run)), name=f"rank-{rank.number}", daemon=True).start()

    def lost(self) -> Failure | None:
        """The failure where its node does not answer."""
        if node_answers(self._node_id):
            return None
        evidence = "a node of the trial died, or cannot be reached any more"
        remedy = "See what became of the machine; the setting is run again on other ones."
        return Failure(Stage.ARGUMENTS, Kind.NODE_LOST, Blame.ENVIRONMENT, evidence, remedy)

    def stop(self) -> Failure | None:
        """End the rank and its actor; what the rank's log shows to have gone wrong before."""
        try:
            limit_s = STOP_S if node_answers(self._node_id) else 0
            failure: Failure | None = ray.get(self._actor.stop.remote(), timeout=limit_s)
        except ray.exceptions.RayError:
            failure = None
        ray.kill(self._actor)
        return failure

    def _end_of(self, run: Any) -> Failure | None:
        try:
            self.hardware = ray.get(self._actor.hardware.remote())
            failure: Failure | None = ray.get(run)
        except ray.exceptions.RayTaskError as error:
            return _broken(error)
        except ray.exceptions.RayError as error:
            return self.lost() or _actor_died(error)
        return failure


def _broken(error: ray.exceptions.RayTaskError) -> Failure:
    """The rank could not even be started, as when its engine is not installed there."""
    cause = error.cause if isinstance(error.cause, AutotunerError) else error
    evidence = str(cause).strip().splitlines()[-1]
    remedy = "Every node needs what rank 0's has: engine, model and paths."
    return Failure(Stage.ARGUMENTS, Kind.UNKNOWN, Blame.PARAMETERS, evidence, remedy)


def _actor_died(error: ray.exceptions.RayError) -> Failure:
    evidence = f"the actor of one of the engine's ranks died: {type(error).__name__}"
    remedy = "Look for who ends processes on that machine, which may be short of memory."
    return Failure(Stage.ARGUMENTS, Kind.WORKER_LOST, Blame.ENVIRONMENT, evidence, remedy)
