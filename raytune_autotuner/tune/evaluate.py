"""One trial, end to end: engine up, warm-up, rounds of load, engine down, metrics.

Knows neither Ray nor Optuna: a trial can be run and debugged by hand. Everything it leaves lies in `workdir`.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from raytune_autotuner.engine.contract import Engine, Launch
from raytune_autotuner.engine.processes import free_port, make_mark
from raytune_autotuner.engine.server import EngineServer
from raytune_autotuner.load import client
from raytune_autotuner.load.parquet import write_records
from raytune_autotuner.load.workload import Level, generate, levels
from raytune_autotuner.report.logs import LogWriter
from raytune_autotuner.report.results import write_json, write_result
from raytune_autotuner.score.metrics import combine, summarize
from raytune_autotuner.score.records import Phase, RequestRecord
from raytune_autotuner.study.errors import TrialFailed
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialResult

logger = logging.getLogger(__name__)

Metrics: TypeAlias = dict[str, float]
Progress: TypeAlias = Callable[[Stage, float], None]

PROBE_TIMEOUT_S = 30.0
IMPATIENT_S = 0.5
DYING_S = 3.0


@dataclass
class Evaluation:
    """One setting to measure, and where."""

    study: Study
    engine: Engine
    params: Params
    workdir: Path
    run_id: str
    trial_id: str
    on_progress: Progress = lambda stage, share: None
    gpus: Sequence[str] = ()
    """The GPUs that the trial holds; its engine sees no others."""
    deadline: float = 0.0
    """On `time.monotonic()`'s clock."""
    stage: Stage = Stage.ARGUMENTS
    share: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    _moving: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> Generator[Metrics, None, TrialResult]:
        """Yields the metrics after each round and returns the result; a failure is a result too, never an exception."""
        begun = time.monotonic()
        self.deadline = self.deadline or begun + self.study.trial.timeout_s
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._log = LogWriter(self.workdir / "trial.log")
        self._load_log = LogWriter(self.workdir / "load.log")
        self._records: list[RequestRecord] = []
        self._durations: dict[str, float] = defaultdict(float)
        failure = None
        try:
            yield from self._measure()
        except TrialFailed as failed:
            failure = failed.failure
        except Exception as error:  # noqa: BLE001  the trial boundary: what went wrong is its result
            self._log.write(self.stage, traceback.format_exc())
            failure = self._unexpected(error)
        metrics = self._metrics() if failure is None else {}
        self.seconds["total"] = time.monotonic() - begun
        result = TrialResult(metrics, failure, self.seconds)
        self._keep(result)
        return result

    def _measure(self) -> Generator[Metrics, None, None]:
        with free_port() as port:
            launch = self.engine.launch(self.params, port)
            self._describe(launch)
            server = self._server(launch, port)
            try:
                server.start()
                self._await_ready(server)
                self._warm_up(server)
                for number in range(self.study.workload.rounds):
                    yield self._round(server, number)
            finally:
                with self._timed("stop"):
                    # vLLM ignores SIGTERM while it starts, so there is nothing to wait for before it is ready.
                    server.stop(None if self.stage.order >= Stage.READY.order else IMPATIENT_S)

    def _server(self, launch: Launch, port: int) -> EngineServer:
        return EngineServer(
            launch,
            port,
            self.workdir,
            rules=self.engine.rules,
            mark=make_mark(self.run_id, self.trial_id),
            deadline=self.deadline,
            timeout_s=self.study.trial.timeout_s,
            log_limit_mb=self.study.trial.log_limit_mb,
            locks=[f"gpu-{gpu}" for gpu in self.gpus],
            on_progress=self._engine_moved,
        )

    def _await_ready(self, server: EngineServer) -> None:
        with self._timed("start"):
            server.wait_ready()
            server.wait_ready(
                lambda: client.completion_probe(server.base_url, self.engine.served_model, PROBE_TIMEOUT_S)
            )
        self._moved(Stage.READY, 0.0)
        self._log.write(self.stage, f"ready in {self.seconds['start']:.1f} s")

    def _warm_up(self, server: EngineServer) -> None:
        if self.study.workload.warmup_requests == 0:
            return
        self._moved(Stage.WARMUP, 0.0)
        with self._timed("warmup"):
            for level in levels(self.study.workload):
                self._send(server, level, 0, "warmup", 0, 1)

    def _round(self, server: EngineServer, number: int) -> Metrics:
        scale = levels(self.study.workload)
        rounds = self.study.workload.rounds
        with self._timed("load"):
            for index, level in enumerate(scale):
                self._reset_prefix_cache(server)
                done = number * len(scale) + index
                self._durations[level.label] += self._send(server, level, number, "measure", done, rounds * len(scale))
        metrics = self._metrics()
        objective = self.study.objective.metric
        self._log.write(
            self.stage, f"round {number + 1} of {rounds}: {objective} {metrics.get(objective, float('nan')):.4g}"
        )
        return metrics

    def _send(self, server: EngineServer, level: Level, number: int, phase: Phase, done: int, of: int) -> float:
        """Send one load and keep its records; returns its seconds. `done` of `of` loads lie behind it."""
        requests = generate(self.study.workload, level, number, phase)
        stage = Stage.WARMUP if phase == "warmup" else Stage.LOAD

        def progress(finished: int, total: int, failed: int) -> None:
            self._moved(stage, (done + finished / max(total, 1)) / of, always=finished > 0)
            self._load_log.write(
                stage, f"{level.label} round {number}: {finished} of {total} requests, {failed} failed"
            )

        kept: list[RequestRecord] = []
        try:
            load = client.measure(
                server.base_url,
                self.engine.served_model,
                requests,
                level,
                deadline=self.deadline,
                on_progress=progress,
                check=server.check,
                keep=kept,
            )
        finally:
            self._records.extend(kept)
        server.check()
        self._judge(load, server)
        return load.duration_s

    def _judge(self, load: client.LoadRun, server: EngineServer) -> None:
        """Raise `TrialFailed` where a load cannot count as a measurement."""
        failed = [record.error for record in load.records if record.error]
        share = len(failed) / max(len(load.records), 1)
        if not load.complete:
            self._fail(
                Kind.DEADLINE,
                f"timed out after {self.study.trial.timeout_s:g} seconds",
                "Raise trial.timeout_s, or lower workload.requests or rounds.",
            )
        if share > self.study.trial.max_failed_share:
            self._await_death(server)
            self._fail(
                Kind.BAD_RESPONSES,
                f"{len(failed)} of {len(load.records)} requests failed, the first with: {failed[0]}",
                "See load.log and engine.log; if so many failures are acceptable, raise trial.max_failed_share.",
            )
        if load.client_limited and self.stage is Stage.LOAD:
            self._fail(
                Kind.CLIENT_LIMITED,
                f"the load client used {load.client_cpu_share:.0%} of a core",
                "Lower the load, or leave the client more CPU.",
                Blame.STUDY,
            )

    def _await_death(self, server: EngineServer) -> None:
        """Requests fail before the engine that was to answer them has ended: raise its own cause, if it does end."""
        until = time.monotonic() + DYING_S
        while time.monotonic() < until:
            server.check()
            time.sleep(0.1)

    def _fail(self, kind: Kind, evidence: str, remedy: str, blame: Blame = Blame.PARAMETERS) -> None:
        raise TrialFailed(Failure(self.stage, kind, blame, evidence, remedy, self.share))

    def _unexpected(self, error: Exception) -> Failure:
        evidence = f"{type(error).__name__}: {error}".splitlines()[0]
        return Failure(
            self.stage, Kind.UNKNOWN, Blame.PARAMETERS, evidence, "The traceback is in trial.log.", self.share
        )

    def _metrics(self) -> Metrics:
        """What all rounds so far come to, their samples pooled."""
        by_level: dict[str, list[RequestRecord]] = defaultdict(list)
        for record in self._records:
            if record.phase == "measure":
                by_level[record.level].append(record)
        slo = self.study.objective.slo
        return combine({level: summarize(r, self._durations[level], slo) for level, r in by_level.items()})

    def _engine_moved(self, stage: Stage, share: float) -> None:
        """The engine's log moved. To it the first probe that was answered is load already; to a trial that is ready."""
        if stage.order > Stage.READY.order:
            stage, share = Stage.READY, 0.0
        self._moved(stage, share)

    def _moved(self, stage: Stage, share: float, always: bool = True) -> None:
        with self._moving:  # the engine's log is read in another thread than the load is sent from
            if (stage.order, share) > (self.stage.order, self.share):
                if stage is not self.stage:
                    self._log.write(stage, "reached")
                self.stage, self.share = stage, share
        if always:
            self.on_progress(self.stage, self.share)

    def _reset_prefix_cache(self, server: EngineServer) -> None:
        # Engines without the endpoint have no cache to reset; prompts are random, so nothing is shared anyway.
        request = urllib.request.Request(f"{server.base_url}/reset_prefix_cache", method="POST")
        with suppress(OSError):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).close()

    @contextmanager
    def _timed(self, phase: str) -> Generator[None, None, None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun

    def _describe(self, launch: Launch) -> None:
        here, plain = self.engine.launch_lines(self.params)
        command = {"params": dict(self.params), "argv": list(launch.argv), "env": dict(launch.env)}
        write_json(self.workdir / "command.json", {**command, "launch": here, "plain": plain})
        self._log.write(self.stage, f"starting {' '.join(launch.argv)}")

    def _keep(self, result: TrialResult) -> None:
        """Write down what was measured; a disk that is full must not take it from those who wait for it."""
        try:
            write_records(self.workdir / "requests.parquet", self._records)
            write_result(self.workdir, result)
            self._log.write(self.stage, str(result.failure or f"measured in {self.seconds['total']:.1f} s"))
        except OSError as error:
            logger.error("%s: could not be written: %s", self.workdir, error)
        finally:
            self._log.close()
            self._load_log.close()
