"""A study's engine on a node that runs its trials, for a driver whose own machine is not one of them.

The head of a cluster often has no engine and no GPU. Whatever is asked of the engine before and between trials (is it
installed, which flags has it, would it take this setting?) is then asked on a node that runs trials, in a process that
lives as long as the study. Should that node die, the next question starts another one elsewhere.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_autotuner.engine.catalog import make_engine
from raytune_autotuner.engine.contract import Engine, Launch, Rank
from raytune_autotuner.engine.reading import LogRules
from raytune_autotuner.study.errors import AutotunerError, ConfigError
from raytune_autotuner.study.failure import Failure
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study
from raytune_autotuner.tune.cluster import Cluster, node_answers

logger = logging.getLogger(__name__)

FIRST_S = 600.0
"""For what may start a process, import an engine or make a model ready."""
REFUSE_S = 60.0
POLL_S = 2.0


def engine_of(study: Study, cluster: Cluster | None) -> Engine:
    """The engine of a study: here, unless trials run on other machines only."""
    if cluster is None or cluster.runs_trials_here(study):
        return make_engine(study)
    return EngineThere(study, cluster)


class EngineThere:
    """Passes every question on."""

    def __init__(self, study: Study, cluster: Cluster) -> None:
        self._study = study
        self._cluster = cluster
        self._here = make_engine(study)
        self._host: Any = None
        self._node_id = ""
        self._known: dict[str, Any] = {}

    @property
    def rules(self) -> LogRules:
        """The same everywhere."""
        return self._here.rules

    @property
    def base_url(self) -> str | None:
        """The same everywhere."""
        return self._here.base_url

    @property
    def served_model(self) -> str:
        """As its node names it."""
        return str(self._ask("served_model"))

    @property
    def uses_gpus(self) -> bool:
        """By what is installed there."""
        return bool(self._ask("uses_gpus"))

    def preflight(self) -> None:
        """Raise `ConfigError` where no trial could ever start there."""
        self._ask("preflight")

    def refuse(self, params: Params) -> Failure | None:
        """The engine's word there; nothing is refused while it cannot be asked."""
        try:
            failure: Failure | None = self._ask("refuse", params, timeout_s=REFUSE_S)
        except AutotunerError as error:
            logger.warning("%s", error)
            return None
        return failure

    def close(self) -> None:
        """End the process there."""
        if self._host is not None:
            ray.kill(self._host)
            self._host = None

    def launch(self, params: Params, port: int, rank: Rank | None = None) -> Launch:
        """As its node would."""
        launch: Launch = self._ask("launch", params, port, rank)
        return launch

    def launch_lines(self, params: Params) -> tuple[str, str]:
        """The first one works on that node."""
        here, plain = self._ask("launch_lines", params)
        return here, plain

    def parallel_size(self, params: Params) -> int:
        """The same everywhere."""
        return self._here.parallel_size(params)

    def defaults(self) -> dict[str, Any]:
        """The values in force there."""
        return dict(self._ask("defaults"))

    def config_model(self) -> str:
        """As its node has it."""
        return str(self._ask("config_model"))

    def versions(self) -> dict[str, str]:
        """What is installed there."""
        return dict(self._ask("versions"))

    def _ask(self, name: str, *arguments: Any, timeout_s: float = FIRST_S) -> Any:
        """The answer of a node; raises `ConfigError` as the engine there does, `AutotunerError` where none answers."""
        if not arguments and name in self._known:
            return self._known[name]
        if self._host is None:
            self._start()
        try:
            error, answer = self._await(self._host.answer.remote(name, *arguments), timeout_s)
        except ray.exceptions.RayError as lost:
            self.close()
            raise AutotunerError(f"no node answers for the engine: {str(lost).strip().splitlines()[0]}") from lost
        if error is not None:
            raise ConfigError(error)
        if not arguments:
            self._known[name] = answer
        return answer

    def _start(self) -> None:
        self._node_id = self._cluster.now().for_trials(self._study)[0].node_id
        there = NodeAffinitySchedulingStrategy(self._node_id, soft=False)
        self._host = ray.remote(EngineHost).options(num_cpus=0, scheduling_strategy=there).remote(self._study)

    def _await(self, answer: Any, timeout_s: float) -> Any:
        """What `ray.get` gives; a node that is cut off is not waited for until Ray has noticed."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                return ray.get(answer, timeout=POLL_S)
            except ray.exceptions.GetTimeoutError:
                if time.monotonic() >= until or not node_answers(self._node_id):
                    raise


class EngineHost:
    """The engine on its node, as an actor."""

    def __init__(self, study: Study) -> None:
        self._study = study.study
        self._engine = make_engine(study)

    def __repr__(self) -> str:
        """As the Ray dashboard shows the actor."""
        return f"{self._study} engine on {socket.gethostname()}"

    def answer(self, name: str, *arguments: Any) -> tuple[str | None, Any]:
        """(what is wrong with the study, if anything is; the answer)."""
        try:
            found = getattr(self._engine, name)
            return None, found(*arguments) if callable(found) else found
        except ConfigError as error:
            return str(error), None
