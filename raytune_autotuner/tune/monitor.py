"""The one clock of every trial, outside of its actor.

A trial registers in its `setup`; when its time is up, or nothing of it has moved for too long, the monitor ends it
with `ray.kill`, also when its actor is blocked in C code. Trials say where they are through `beat`, which is what the
live table shows and what is known of a trial whose actor has died.

Should the monitor itself die, Ray starts it again, for the trials to come. Those that ran are then ended by deadlines
of their own, a little later: in the actor, and in the supervisor of the engine's processes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_autotuner.study.failure import Kind, Stage
from raytune_autotuner.tune.cluster import node_answers
from raytune_autotuner.tune.standing import Standing

TICK_S = 0.1


class TrialMonitor:
    """Keeps the time of all running trials; one actor per study, and it holds no resources."""

    def __init__(self, run_id: str, timeout_s: float, hung_after_s: float) -> None:
        self._run_id = run_id
        self._timeout_s = timeout_s
        self._hung_after_s = hung_after_s
        self._actors: dict[str, Any] = {}
        self._live: set[str] = set()
        self._standing: dict[str, Standing] = {}
        self._closed = False
        self._over = False

    def __repr__(self) -> str:
        """As the Ray dashboard shows the actor."""
        return f"{self._run_id} monitor"

    async def watch(self) -> None:
        """End trials whose time is up; runs until the study ends."""
        while not self._over:
            overdue = {trial_id: kind for trial_id in self._actors if (kind := self._why_overdue(trial_id))}
            ends = [self._end_overdue(trial_id, kind) for trial_id, kind in overdue.items()]
            await asyncio.gather(*ends, asyncio.sleep(TICK_S))

    def _why_overdue(self, trial_id: str) -> Kind | None:
        """Why the trial is to be ended now; None where it is not."""
        now, standing = time.time(), self._standing[trial_id]
        if now - standing.started_at >= self._timeout_s:
            moving = now - standing.moved_at < min(self._hung_after_s, self._timeout_s / 2)
            return Kind.DEADLINE if moving else Kind.HUNG
        return Kind.HUNG if now - standing.moved_at >= self._hung_after_s else None

    async def _end_overdue(self, trial_id: str, kind: Kind) -> None:
        """End a trial; one that was not heard of because its node is cut off is not to blame for it."""
        node_ids = self._standing[trial_id].node_ids
        answers = await asyncio.gather(*(asyncio.to_thread(node_answers, node_id) for node_id in node_ids))
        if trial_id in self._actors:  # else it has got there meanwhile
            self._end(trial_id, kind if all(answers) else Kind.NODE_LOST)

    async def register(self, trial_id: str, actor: Any, standing: Standing) -> bool:
        """A trial's clock starts, where it stands; False where the study is ending and it must not begin."""
        now = time.time()
        self._standing[trial_id] = replace(standing, started_at=now, moved_at=now)
        if self._closed:
            return False
        self._actors[trial_id] = actor
        self._live.add(trial_id)
        return True

    async def beat(self, trial_id: str, stage: Stage, share: float, metrics: Mapping[str, float] | None) -> None:
        """The trial moved: it is at `share` of `stage`; a stage never goes back."""
        known = self._standing.get(trial_id, Standing())
        if (stage.order, share) >= (known.stage.order, known.share):
            known = replace(known, stage=stage, share=share)
        self._standing[trial_id] = replace(known, moved_at=time.time(), metrics=metrics or known.metrics)

    async def measured(self, trial_id: str) -> None:
        """The trial has what it was for and only ends its engine: a late deadline cannot take the result away."""
        self._actors.pop(trial_id, None)

    async def release(self, trial_id: str) -> None:
        """The trial is over."""
        self._actors.pop(trial_id, None)
        self._live.discard(trial_id)

    async def standing(self, trial_id: str) -> Standing:
        """Where the trial is, or was when it ended."""
        return self._standing.get(trial_id, Standing())

    async def standings(self) -> dict[str, Standing]:
        """Of all trials that have begun and not said that they are over."""
        return {trial_id: self._standing[trial_id] for trial_id in self._live}

    async def close(self) -> None:
        """The study is ending: end every trial now, let none begin."""
        self._closed = True
        for trial_id in list(self._actors):
            self._end(trial_id, None)

    async def finish(self) -> None:
        """The study has ended: stop watching, or Ray would tell of a task that was lost with it."""
        self._over = True

    def _end(self, trial_id: str, kind: Kind | None) -> None:
        self._standing[trial_id] = replace(self._standing[trial_id], ended_by=kind, ended_at=time.time())
        self._live.discard(trial_id)
        ray.kill(self._actors.pop(trial_id))


def start_monitor(run_id: str, timeout_s: float, hung_after_s: float) -> Any:
    """The study's monitor as an actor handle, its clock running; on the driver's node, with which it ends."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}  # `watch` goes on after a restart
    monitor: Any = (
        ray.remote(TrialMonitor).options(**options, scheduling_strategy=here).remote(run_id, timeout_s, hung_after_s)
    )
    monitor.watch.remote()
    return monitor
