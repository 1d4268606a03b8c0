"""One trial, end to end: engine up, warm-up, rounds of load, engine down, metrics.

Knows neither Ray nor Optuna: a trial can be run and debugged by hand. Everything it leaves lies in `workdir`.
"""

from __future__ import annotations

import logging
import math
import re
import socket
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from raytune_autotuner.engine.contract import Engine, Launch, Rank
from raytune_autotuner.engine.gpus import EnergyMeter
from raytune_autotuner.engine.machine import hardware, together
from raytune_autotuner.engine.processes import free_cores, free_port, make_mark
from raytune_autotuner.engine.running import RunningServer
from raytune_autotuner.engine.server import EngineServer
from raytune_autotuner.engine.spanning import Follower, SpanningServer
from raytune_autotuner.load import client, quality
from raytune_autotuner.load.dialect import Dialect
from raytune_autotuner.load.engine_metrics import EngineWatch
from raytune_autotuner.load.spread import ClientLost
from raytune_autotuner.load.trouble import clock_trouble, starvation
from raytune_autotuner.load.vllm_bench import BenchFailed
from raytune_autotuner.load.workload import MAX_BISECTIONS, Level, between, generate, levels, warmup_requests
from raytune_autotuner.report.logs import LogWriter
from raytune_autotuner.report.results import COMMAND, QUALITY, RESULT, write_result
from raytune_autotuner.report.writing import write_json
from raytune_autotuner.score import slo
from raytune_autotuner.score.quality import Quality, judge, loss
from raytune_autotuner.score.records import Phase, RequestRecord
from raytune_autotuner.study.errors import TrialFailed
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.masking import learn, mask_line
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study
from raytune_autotuner.study.trial import TrialResult
from raytune_autotuner.tune.measured import Measured
from raytune_autotuner.tune.sender import Sender

logger = logging.getLogger(__name__)

Metrics: TypeAlias = dict[str, float]
Progress: TypeAlias = Callable[[Stage, float], None]
Server: TypeAlias = EngineServer | SpanningServer | RunningServer

PROBE_TIMEOUT_S = 30.0
IMPATIENT_S = 0.5
DYING_S = 3.0
LAST_WORDS_S = 1.2
"""Before a trial may be ended: a load is heard twice a second, and its requests take some tenths of one to write."""
SPARE = 1.2
"""Times what a load is expected to take, so much time must be left for one that a trial can do without."""
_FINAL = r"HTTP 4(?!08|25|29)\d\d|answer cut short: no usage"
"""Answers to the first completion after which no other one can be expected."""


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
    on_measured: Callable[[], None] = lambda: None
    """Called once all loads are measured, before the engine is stopped."""
    gpus: Sequence[str] = ()
    """The GPUs that the trial holds here; its engine sees no others."""
    followers: Sequence[Follower] = ()
    """The ranks of its engine on other nodes."""
    address: str = "127.0.0.1"
    """By which those reach this one."""
    cores: int = 0
    """So many CPU cores the engine gets for itself; 0: it shares all of them."""
    restart: int | None = None
    """Of a verification, its number from 0: it gives the load seeds of its own, and refines the highest load."""
    reference: Quality | None = None
    """What the baseline's engine answered; None for the baseline itself."""
    deadline: float = 0.0
    """On `time.monotonic()`'s clock."""
    time_up: float = math.inf
    """On the same clock: then the trial is ended from outside."""
    stage: Stage = Stage.ARGUMENTS
    share: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    loaded: bool = False
    """Whether the load that was reported last was the last of all."""
    _moving: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> Generator[Metrics, None, TrialResult]:
        """Yields the metrics after each load (a round at one level) and returns the result.

        A failure is a result too, never an exception.
        """
        begun = time.monotonic()
        learn(self.study.secrets)
        self.deadline = self.deadline or begun + self.study.trial.timeout_s
        self._log = LogWriter(self.workdir / "trial.log")
        self._load_log = LogWriter(self.workdir / "load.log")
        self._measured = Measured(self.study, self._paid_for)
        self._answers: tuple[str, ...] = ()
        failure = None
        try:
            yield from self._measure()
        except GeneratorExit:
            self._keep(None, "ended between two loads: it cannot beat the best trial any more")
            raise
        except KeyboardInterrupt:
            self._keep(None, "interrupted")
            raise
        except TrialFailed as failed:
            failure = self._placed(failed.failure)
        except Exception as error:  # noqa: BLE001  the trial boundary: what went wrong is its result
            self._log.write(self.stage, traceback.format_exc())
            failure = self._unexpected(error)
        metrics = self._measured.metrics() if failure is None else self._measured.quality
        self.seconds["total"] = time.monotonic() - begun
        machines = [hardware(self.gpus), *(follower.hardware for follower in self.followers)]
        place = (socket.gethostname(), together(machines), self._paid_for)
        result = TrialResult(metrics, failure, self.seconds, self._answers, *place)
        self._keep(result, str(failure or f"measured in {self.seconds['total']:.1f} s"))
        return result

    def _measure(self) -> Generator[Metrics, None, None]:
        self._require_files()
        with self._place() as server, Sender(self.study, make_mark(self.run_id, self.trial_id)) as self._sender:
            try:
                server.start()
                self._await_ready(server)
                self._sender.start()
                self._ask_quality(server)
                yield from self._loads(server)
                self.on_measured()
            except ClientLost as error:
                self._await_death(server)  # what ended it may have ended the engine too
                remedy = "See what ended it: the kernel's log, where memory ran out."
                self._fail(Kind.UNKNOWN, str(error), remedy, Blame.ENVIRONMENT)
            finally:
                self._sender.close()
                with self._timed("stop"):
                    # vLLM ignores SIGTERM while it starts, so there is nothing to wait for before it is ready.
                    server.stop(None if self.stage.order >= Stage.READY.order else IMPATIENT_S)

    def _require_files(self) -> None:
        """Paths mean the same on every machine that runs trials, or the study cannot be run there."""
        for key, path in self.study.files.items():
            if not path.exists():
                self._fail(
                    Kind.FILE_NOT_FOUND,
                    f"{key}: {path} is not on {socket.gethostname()}",
                    "Put it there on every machine that runs trials, or name a path that they share.",
                    Blame.STUDY,
                )

    @contextmanager
    def _place(self) -> Generator[Server, None, None]:
        """The server: one that runs already, or one to be started, on a port and on cores of its own."""
        if self.engine.base_url is not None:
            self._note({"base_url": self.engine.base_url})
            self._log.write(self.stage, f"asking {self.engine.base_url}, which runs already")
            yield RunningServer(self.engine.base_url, deadline=self.deadline, timeout_s=self.study.trial.timeout_s)
            return
        with free_port() as port, free_cores(self.cores) as cores, self._rank() as rank:
            launch = self.engine.launch(self.params, port, rank)
            self._describe(launch, cores)
            server = self._server(launch, port, cores)
            yield server if rank is None else SpanningServer(server, rank, self.followers)

    @contextmanager
    def _rank(self) -> Generator[Rank | None, None, None]:
        """The part of the engine that is started here, where there are others."""
        if not self.followers:
            yield None
            return
        with free_port(self.address) as meeting:
            yield Rank(0, self._nodes, self.address, meeting, host=self.address)

    @property
    def _nodes(self) -> int:
        return 1 + len(self.followers)

    def _server(self, launch: Launch, port: int, cores: tuple[int, ...]) -> EngineServer:
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
            cores=cores,
            on_progress=self._engine_moved,
        )

    def _await_ready(self, server: Server) -> None:
        with self._timed("start"):
            server.wait_ready()
            server.wait_ready(lambda: self._completes(server.base_url))
        self._moved(Stage.READY, 0.0)
        self._log.write(self.stage, f"ready in {self.seconds['start']:.1f} s")

    def _completes(self, base_url: str) -> bool:
        """Whether a real completion came back; raises `TrialFailed` where the server will never give one."""
        dialect = Dialect.of(self.study.engine)
        error = client.completion_error(base_url, self.engine.served_model, PROBE_TIMEOUT_S, dialect)
        if error is not None and re.match(_FINAL, error):
            remedy = "Compare engine.api, engine.served_model and engine.request with what the server takes."
            blame = Blame.PARAMETERS if self.params else Blame.STUDY
            self._fail(Kind.BAD_RESPONSES, f"a completion was refused: {error}", remedy, blame)
        return error is None

    def _ask_quality(self, server: Server) -> None:
        """Hold the engine's answers against the baseline's; raise `TrialFailed` where they are too far from them."""
        if self.study.quality is None:
            return
        try:
            with self._timed("quality"):
                found = quality.ask(
                    server.base_url, self.engine.served_model, deadline=self.deadline, check=server.check
                )
        except TimeoutError:
            self._out_of_time()
        except quality.QualityUnknown as error:
            self._await_death(server)  # an engine that died while it was asked has a cause of its own
            if self.reference is None:
                self._fail(Kind.BAD_RESPONSES, str(error), "Leave quality out of the study.", Blame.STUDY)
            self._fail(Kind.BAD_RESPONSES, str(error), "Leave this setting out of the space.")
        self._measured.quality["perplexity"] = found.perplexity
        lost = None if self.reference is None else loss(found, self.reference)
        if lost is None:
            self._answers = found.answers
        else:
            self._measured.quality |= {"perplexity_rise": lost.perplexity_rise, "answer_change": lost.answer_change}
        self._write(TrialResult(self._measured.quality, answers=self._answers), QUALITY)
        if lost is not None and (sentence := judge(lost, self.study.quality)):
            self._fail(Kind.QUALITY_LOSS, sentence, "If so much loss is acceptable, raise the limit under quality.")

    def _warm_up(self, server: Server, scale: Sequence[Level]) -> None:
        """The load of each level, before any of them is measured; of those with a number of requests for it."""
        for level in scale:
            if warmup_requests(self.study.workload, level):
                self._moved(Stage.WARMUP, 0.0)
                with self._timed("warmup"):
                    load = self._send(server, level, 0, "warmup", 0, 1)
                    self._takes_more_clients(load, level)

    def _loads(self, server: Server) -> Generator[Metrics, None, None]:
        """Every load level in every round; a scan for the highest load ends at the first level that misses an SLO."""
        scale = levels(self.study.workload)
        ascending = sorted(scale, key=lambda level: level.load)
        if slo.ends_at_first_miss(self.study.objective):
            yield from self._scan(server, ascending)
        else:
            yield from self._all(server, scale)
        if self.restart is not None and slo.scans_loads(self.study.objective):
            yield from self._refine(server, ascending)

    def _all(self, server: Server, scale: Sequence[Level]) -> Generator[Metrics, None, None]:
        self._warm_up(server, scale)
        order = [(number, level) for number in range(self.study.workload.rounds) for level in scale]
        for done, (number, level) in enumerate(order):
            metrics = self._round(server, level, number, done, len(order))
            self.loaded = done + 1 == len(order)
            yield metrics

    def _scan(self, server: Server, ascending: Sequence[Level]) -> Generator[Metrics, None, None]:
        rounds = self.study.workload.rounds
        for place, level in enumerate(ascending):
            self._warm_up(server, [level])  # one by one, as most scans end before the last
            for number in range(rounds):
                yield self._round(server, level, number, place * rounds + number, len(ascending) * rounds)
            if not self._measured.meets(level):
                return

    def _refine(self, server: Server, ascending: Sequence[Level]) -> Generator[Metrics, None, None]:
        """Between the last level that keeps the SLOs and the one above it, halve the step until it is small.

        Or until there is no time for a further one: a coarser answer is a result, a trial that is ended is none.
        """
        kept = len([*takewhile(self._measured.meets, ascending)])
        if not 0 < kept < len(ascending):
            return
        held, missed = ascending[kept - 1], ascending[kept]
        for _ in range(MAX_BISECTIONS):
            middle = between(held, missed)
            if middle is None or not self._has_time_for(middle, held, missed):
                return
            self._warm_up(server, [middle])
            for number in range(self.study.workload.rounds):
                yield self._round(server, middle, number, 1, 1)
            held, missed = (middle, missed) if self._measured.meets(middle) else (held, middle)

    def _has_time_for(self, middle: Level, held: Level, missed: Level) -> bool:
        """Whether all loads at a level will end before the trial does, told from those of the levels on both sides."""
        slower = held.load / middle.load if middle.open_loop else 1.0  # in closed loop it may be no faster at all
        expected_s = SPARE * max(self._measured.seconds(held) * slower, self._measured.seconds(missed))
        left_s = min(self.deadline, self.time_up) - time.monotonic() - LAST_WORDS_S
        if expected_s < left_s:
            return True
        until = f"{middle.label} may take {expected_s:.0f} s, and {max(left_s, 0.0):.0f} s are left"
        self._log.write(self.stage, f"the highest load is not refined further: {until}")
        return False

    def _round(self, server: Server, level: Level, number: int, done: int, of: int) -> Metrics:
        """One load: round `number` at `level`; `done` of `of` loads lie behind it."""
        with self._timed("load"):
            while not self._load(server, level, number, done, of):
                pass
        metrics = self._measured.metrics()
        name, rounds = self.study.objective.metric.partition("@")[0], self.study.workload.rounds
        here = metrics.get(f"{name}@{level.label}", metrics.get(name))
        said = "" if here is None else f": {name} {here:.4g}"
        self._log.write(self.stage, f"{level.label} round {number + 1} of {rounds}{said}")
        return metrics

    def _load(self, server: Server, level: Level, number: int, done: int, of: int) -> bool:
        """Send it; returns whether it counts. Else it is to be sent once more, by more client processes."""
        self._reset_prefix_cache(server)
        before = len(self._measured.records)
        energy = EnergyMeter(() if self.followers else self.gpus)  # those elsewhere are not seen
        with EngineWatch(server.base_url) as watch:
            load = self._send(server, level, number, "measure", done, of)
        joules = energy.joules
        if self._takes_more_clients(load, level):
            del self._measured.records[before:]
            return False
        if (trouble := load.trouble) is not None:
            self._fail(*trouble)
        self._measured.add(level, number, joules, watch.series)
        return True

    def _send(self, server: Server, level: Level, number: int, phase: Phase, done: int, of: int) -> client.LoadRun:
        """Send one load and keep its records. `done` of `of` loads lie behind it."""
        offset = 0 if self.restart is None else self.restart + 1
        requests = generate(self.study.workload, level, number, phase, seed_offset=offset)
        stage = Stage.WARMUP if phase == "warmup" else Stage.LOAD

        answered, answered_at, written = 0, time.monotonic(), 0

        def progress(finished: int, total: int, failed: int) -> None:
            nonlocal answered, answered_at, written
            self._moved(stage, (done + (finished - failed) / max(total, 1)) / of, always=finished > answered)
            if finished > answered:
                answered, answered_at = finished, time.monotonic()
            self._load_log.write(
                stage, f"{level.label} round {number}: {finished} of {total} requests, {failed} failed"
            )
            if len(kept) > written and self._ends_soon(answered_at):
                written = len(kept)
                self._keep_requests(kept)

        kept: list[RequestRecord] = []
        try:
            load = self._sender.send(
                server.base_url,
                self.engine.served_model,
                requests,
                level,
                phase,
                deadline=self.deadline,
                on_progress=progress,
                check=server.check,
                keep=kept,
            )
        except BenchFailed as error:
            self._await_death(server)
            self._fail(Kind.UNKNOWN, str(error), "Take workload.client: builtin, or see load.log.", Blame.ENVIRONMENT)
        finally:
            self._measured.records.extend(kept)
        server.check()
        self._load_log.write(
            stage,
            f"{level.label} round {number}: client processes: {load.processes}; "
            f"the busiest used {load.client_cpu_share:.0%} of a core",
        )
        self._judge(load, server)
        return load

    def _ends_soon(self, answered_at: float) -> bool:
        """Whether the trial may be ended from outside before its load is heard again: out of time, or as hung."""
        now, patience_s = time.monotonic(), self.study.trial.hung_after_s
        hangs = now - answered_at >= max(patience_s - LAST_WORDS_S, patience_s / 2)
        return hangs or now >= self.time_up - LAST_WORDS_S

    def _takes_more_clients(self, load: client.LoadRun, level: Level) -> bool:
        """Whether a load had too few client processes and can have more, which are there for all loads from now on."""
        if not self._sender.grow(load, level):
            return False
        said = f"{load.client_cpu_share:.0%} of a core: from now on {self._sender.processes} client processes"
        self._log.write(self.stage, f"{level.label}: the busiest client process used {said}")
        return True

    def _judge(self, load: client.LoadRun, server: Server) -> None:
        """Raise `TrialFailed` where a load was not answered as it should be."""
        failed = [record.error for record in load.records if record.error]
        share = len(failed) / max(len(load.records), 1)
        if not load.complete:
            self._out_of_time()
        if (starved := starvation(load.records)) is not None:
            self._fail(*starved)
        if share > self.study.trial.max_failed_share:
            if (jumped := clock_trouble(load.clock_jump_s)) is not None:
                self._fail(*jumped)  # connections do not outlive a machine that sleeps
            self._await_death(server)
            self._fail(
                Kind.BAD_RESPONSES,
                f"{len(failed)} of {len(load.records)} requests failed, the first with: {failed[0]}",
                "See load.log and engine.log; if so many failures are acceptable, raise trial.max_failed_share.",
            )

    def _out_of_time(self) -> NoReturn:
        self._fail(
            Kind.DEADLINE,
            f"timed out after {self.study.trial.timeout_s:g} seconds",
            "Raise trial.timeout_s, or lower workload.requests or rounds.",
        )

    def _await_death(self, server: Server) -> None:
        """Requests fail before the engine that was to answer them has ended: raise its own cause, if it does end."""
        until = time.monotonic() + DYING_S
        while time.monotonic() < until:
            server.check()
            time.sleep(0.1)

    def _fail(self, kind: Kind, evidence: str, remedy: str, blame: Blame = Blame.PARAMETERS) -> NoReturn:
        raise TrialFailed(Failure(self.stage, kind, blame, evidence, remedy, self.share))

    def _placed(self, failure: Failure) -> Failure:
        """The failure of an engine under load, put where the trial is: a log does not tell warm-up from load."""
        if failure.stage is Stage.LOAD and self.stage.order >= Stage.READY.order:
            return replace(failure, stage=self.stage, share=self.share)
        return failure

    def _unexpected(self, error: Exception) -> Failure:
        evidence = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
            remedy = "Make room on the trial's disk, or its folder writable; the traceback is in trial.log."
            return Failure(self.stage, Kind.UNKNOWN, Blame.ENVIRONMENT, evidence, remedy, self.share)
        return Failure(
            self.stage, Kind.UNKNOWN, Blame.PARAMETERS, evidence, "The traceback is in trial.log.", self.share
        )

    @property
    def values(self) -> Mapping[str, Sequence[float]]:
        """Load level to the objective's value in each round that was measured there."""
        return self._measured.values

    @property
    def _paid_for(self) -> float:
        return float(max(len(self.gpus), 1) * self._nodes)

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

    def _reset_prefix_cache(self, server: Server) -> None:
        if self.engine.base_url is not None:
            return  # others may use it
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

    def _describe(self, launch: Launch, cores: tuple[int, ...]) -> None:
        here, plain = map(mask_line, self.engine.launch_lines(self.params))
        self._note({"argv": list(launch.argv), "env": dict(launch.env), "launch": here, "plain": plain})
        bound = f" on cores {', '.join(map(str, cores))}" if cores else ""
        self._log.write(self.stage, f"starting{bound} {' '.join(launch.argv)}")

    def _note(self, command: Mapping[str, Any]) -> None:
        write_json(self.workdir / COMMAND, {"params": dict(self.params), **command})

    def _keep(self, result: TrialResult | None, said: str) -> None:
        """Write down what was measured; a disk that is full must not take it from those who wait for it.

        A trial that was ended early has no result of its own, lest its part be taken for the whole.
        """
        self._keep_requests()
        if result is not None:
            self._write(result)
        try:
            self._log.write(self.stage, said)
        except OSError as error:
            logger.error("%s: could not be written: %s", self.workdir, error)
        finally:
            self._log.close()
            self._load_log.close()

    def _write(self, result: TrialResult, name: str = RESULT) -> None:
        try:
            write_result(self.workdir, result, name)
        except OSError as error:
            logger.error("%s: could not be written: %s", self.workdir, error)

    def _keep_requests(self, more: Sequence[RequestRecord] = ()) -> None:
        try:
            self._measured.write(self.workdir, more)
        except (OSError, ValueError, OverflowError) as error:  # the latter: what no column of a table can hold
            logger.error("%s: could not be written: %s", self.workdir, error)
