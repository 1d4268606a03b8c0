"""A running engine server: a context manager that starts it, waits for it, and leaves only when all of it is gone.

What it stands on is the supervisor's events, not polling: a crash, a deadline or the supervisor's own death is known at
once, whether the process runs, starts or waits for a GPU. It knows nothing of parameters, load or Ray.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from raytune_autotuner.engine.contract import Launch
from raytune_autotuner.engine.logfile import StampedLog, read_log
from raytune_autotuner.engine.processes import MARK_VARIABLE, Process, is_free, marked, oom_kills, sweep
from raytune_autotuner.engine.protocol import SETTLE_S, STUCK_S, Aftermath, Cause, Spec, pack_rules
from raytune_autotuner.engine.reading import LogRules, diagnose
from raytune_autotuner.study.errors import TrialFailed
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage

LOG_NAME = "engine.log"
RECORD_NAME = "process.json"
TRIAL_LOG_NAME = "trial.log"
_POLL_S = 0.1
_WATCH_S = 60.0
_PROBE_TIMEOUT_S = 2.0
_MARGIN_S = 5.0
SUDDEN_ENDS = (Kind.ENGINE_DIED, Kind.WORKER_LOST, Kind.UNKNOWN)
"""Failures that say how an engine ended, but not why."""
# The first process forks and ends, so the supervisor is nobody's child; -I -S keep its start at some 50 ms.
_BOOT = (
    "import os, sys\n"
    "if os.fork(): os._exit(0)\n"
    "sys.path.insert(0, sys.argv[1])\n"
    "from raytune_autotuner.engine.supervisor import main\n"
    "main()\n"
)

ProgressListener = Callable[[Stage, float], None]
"""Called with (stage, share of it) from another thread; must not block or raise."""


@dataclass(frozen=True, slots=True)
class StopReport:
    """How an engine ended."""

    exit_code: int | None
    """Of its root process, negative for a signal; None where it never ran or nobody is left to tell."""
    seconds: float
    """From the request to stop until everything was gone."""
    killed: int
    """Processes that had to be ended by SIGKILL."""
    survivors: int
    """Processes that are still there."""


def engine_environment(launch: Launch, mark: str, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the engine gets: `base` (default: ours) without what Ray added for its workers, then the launch's own."""
    base = os.environ if base is None else base
    dropped = {"OMP_NUM_THREADS"} if _ray_set_threads(base) else set()
    inherited = {k: v for k, v in base.items() if not k.startswith("RAY_") and k not in dropped}
    # SPT_NOENV keeps setproctitle, by which vLLM names its processes, from overwriting the mark in /proc.
    ours = {MARK_VARIABLE: mark, "SPT_NOENV": "1"}
    # NVML counts GPUs in the order of the PCI bus, and so does Ray; CUDA by itself begins with the fastest.
    usual = {"PYTHONUNBUFFERED": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {**usual, **inherited, **launch.env, **ours}


def _raylet() -> Process | None:
    pid = os.environ.get("RAY_RAYLET_PID", "")
    return Process.of(int(pid)) if pid.isdigit() else None


def _ray_set_threads(env: Mapping[str, str]) -> bool:
    """Whether this is a Ray worker whose OMP_NUM_THREADS is Ray's: its raylet was started without one."""
    raylet = env.get("RAY_RAYLET_PID")
    if raylet is None:
        return False
    try:
        return b"\0OMP_NUM_THREADS=" not in b"\0" + Path(f"/proc/{raylet}/environ").read_bytes()
    except OSError:
        return True


class EngineServer:
    """An engine on 127.0.0.1:`port`, logging to `workdir`/engine.log, with everything that it starts.

    Example:
        with EngineServer(launch, port, workdir, rules=rules, mark=mark, deadline=until, timeout_s=600) as server:
            server.wait_ready()
            ...
    """

    def __init__(
        self,
        launch: Launch,
        port: int,
        workdir: Path,
        *,
        rules: LogRules,
        mark: str,
        deadline: float,
        timeout_s: float,
        grace_s: float = 10.0,
        log_limit_mb: float = 64.0,
        locks: Sequence[str] = (),
        cores: Sequence[int] = (),
        on_progress: ProgressListener | None = None,
        rank: int = 0,
    ) -> None:
        """`deadline` is on `time.monotonic()`; `timeout_s` is the limit it stands for, named in the failure.

        A `rank` above 0, of an engine that spans several nodes, serves nothing, and its files have names of their own.
        """
        workdir = workdir.absolute()  # The supervisor works elsewhere.
        self.base_url = f"http://127.0.0.1:{port}"
        self.log_path = workdir / ranked(LOG_NAME, rank)
        self._record_path = workdir / ranked(RECORD_NAME, rank)
        self._trial_log_path = workdir / ranked(TRIAL_LOG_NAME, rank)
        self.stage = Stage.ARGUMENTS
        self.share = 0.0
        self._launch = launch
        self._port = port
        self._workdir = workdir
        self._rules = rules
        self._mark = mark
        self._deadline = deadline
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._log_limit_bytes = int(log_limit_mb * 1e6)
        self._locks = tuple(locks)
        self._cores = tuple(cores)
        self._on_progress = on_progress
        self._changed = threading.Condition()
        self._events: dict[str, dict[str, Any]] = {}
        self._lost = False
        self._served = False
        self._failure: Failure | None = None
        self._report: StopReport | None = None
        self._oom_kills: int | None = None
        self._socket: socket.socket | None = None
        self._listener: threading.Thread | None = None

    # Beginning

    def __enter__(self) -> EngineServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start supervisor and engine; returns at once."""
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._oom_kills = oom_kills()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._boot(theirs.fileno())
        self._listener = threading.Thread(target=self._listen, args=(self._socket,), name="engine-events", daemon=True)
        self._listener.start()
        self._send(self._spec().to_json())

    def _boot(self, descriptor: int) -> None:
        root = Path(__file__).parents[2]
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _BOOT, str(root), str(descriptor)],
            env={k: v for k, v in os.environ.items() if k != MARK_VARIABLE},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[descriptor],
            start_new_session=True,
            check=False,  # A supervisor that did not come up is seen as one that was lost.
        )

    def _spec(self) -> Spec:
        return Spec(
            argv=self._launch.argv,
            env=engine_environment(self._launch, self._mark),
            cwd=str(self._workdir),
            log_path=str(self.log_path),
            record_path=str(self._record_path),
            trial_log_path=str(self._trial_log_path),
            port=self._port,
            log_limit_bytes=self._log_limit_bytes,
            deadline_s=self._deadline,
            locks=self._locks,
            mark=self._mark,
            owner=Process.current(),
            raylet=_raylet(),
            rules=pack_rules(self._rules),
            cores=self._cores,
        )

    # Events

    def _send(self, line: str) -> None:
        """A supervisor that is gone is none of the sender's business: the listener sees it too."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendall(line.encode() + b"\n")

    def _listen(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as lines, suppress(ConnectionError):
            for line in lines:
                self._on_event(json.loads(line))
        if "gone" not in self._events:
            self._stand_in()
        with self._changed:
            self._lost = "gone" not in self._events
            self._changed.notify_all()

    def _stand_in(self) -> None:
        """The supervisor was killed: end what it left, and say so."""
        ended = sweep(self._mark)
        left = tuple(process.pid for process in marked(self._mark))
        aftermath = Aftermath(None, None, len(ended), left, self._port, is_free(self._port), 0, {}, ())
        log = StampedLog(self._trial_log_path, sys.maxsize)
        log.write([(str(self.stage), str(aftermath))])
        log.close()

    def _on_event(self, event: dict[str, Any]) -> None:
        with self._changed:
            self._events[event.pop("event")] = event
            if "stage" in event:
                self.stage, self.share = Stage(event["stage"]), float(event["share"])
            self._changed.notify_all()
        if "stage" in event and self._on_progress is not None:
            self._on_progress(self.stage, self.share)

    def _pause(self, seconds: float) -> None:
        """Wait for the engine's end, or for `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended, max(min(seconds, self._deadline - time.monotonic()), 0.0))

    @property
    def _ended(self) -> bool:
        return self._lost or any(event in self._events for event in ("exited", "refused", "gone"))

    @property
    def pid(self) -> int | None:
        """Of the engine's root process, once it is started."""
        return self._events.get("started", {}).get("pid")

    @property
    def waiting_for(self) -> str | None:
        """The lock that the start waits for."""
        waiting = self._events.get("waiting-for-lock", {}).get("lock")
        return waiting if self.pid is None else None

    @property
    def served(self) -> bool:
        """Whether it has come up."""
        return self._served

    @property
    def lost(self) -> bool:
        """Whether the supervisor ended without a word; what it watched over was then swept."""
        return self._lost

    # Running

    def wait_ready(self, probe: Callable[[], bool] | None = None) -> None:
        """Wait until it serves: until `probe` (default: its path for that answers 200) is true.

        Raises:
            TrialFailed: it ended, was lost or did not get there before the deadline; also where another thread
                stopped it, who then knows why better than this error does.
        """
        probe = probe or self._is_healthy
        while not (self.pid is not None and probe()):
            self.check()
            if self._ended:
                raise TrialFailed(self._stopped_early())
            self._pause(_POLL_S)
        self.check()
        self._served = True

    def wait_end(self) -> None:
        """Wait until it was stopped; raises `TrialFailed` where it ends in another way."""
        while not self._ended:
            self.check()
            self._pause(_WATCH_S)
        self.check()

    def logged_failure(self) -> Failure | None:
        """What its log shows to have gone wrong before it was ended by us."""
        return diagnose(read_log(self.log_path), rules=self._rules, ended_by_us=True).failure

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", self._launch.ready)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def check(self) -> None:
        """Raise `TrialFailed` where the engine is not alive any more or its time is up. Cheap, from any thread."""
        if self._failure is None:
            self._failure = self._find_failure()
        if self._failure is not None:
            raise TrialFailed(self._failure)

    def _find_failure(self) -> Failure | None:
        end = self._events.get("exited") or self._events.get("gone") or {}
        if "refused" in self._events:
            return self._refused()
        if self._lost:
            return self._lost_supervisor("was killed")
        if end.get("cause") == Cause.TERMINATED:
            return self._lost_supervisor("was told to end by somebody else")
        if end.get("cause") == Cause.OWNER_ENDED:
            return self._lost_supervisor("saw Ray end on this node")
        if end.get("cause") == Cause.EXITED:
            return self._diagnosed(end["exit_code"])
        if end.get("cause") == Cause.DEADLINE or time.monotonic() >= self._deadline:
            return self._timed_out()
        return None

    def _refused(self) -> Failure:
        refused = self._events["refused"]
        blame, remedy = Blame.STUDY, "Check the engine's command: its `engine.python` and what is installed there."
        if not refused["by_program"]:
            blame = Blame.ENVIRONMENT
            remedy = "See whether something deletes trials' folders, or the machine has no memory or processes left."
        return Failure(Stage.ARGUMENTS, Kind.ENGINE_DIED, blame, f"could not be started: {refused['error']}", remedy)

    def _lost_supervisor(self, what: str) -> Failure:
        evidence = f"the supervisor of the engine's processes {what}"
        remedy = "Look for who ends processes on this machine: the kernel's log names what it killed for memory."
        return Failure(self._reached, Kind.ENGINE_DIED, Blame.ENVIRONMENT, evidence, remedy, self.share)

    def _stopped_early(self) -> Failure:
        evidence = "was stopped before it served"
        return Failure(self._reached, Kind.UNKNOWN, Blame.ENVIRONMENT, evidence, "None: it was asked for.", self.share)

    def _timed_out(self) -> Failure:
        evidence = f"timed out after {self._timeout_s:g} seconds"
        if self.waiting_for is not None:
            held = f"{evidence}, waiting for {self.waiting_for}, which another trial holds"
            remedy = "See which process holds it (`nvidia-smi`); `clean` ends what a crashed study has left."
            return Failure(Stage.ARGUMENTS, Kind.DEVICE_BUSY, Blame.ENVIRONMENT, held, remedy)
        remedy = "Raise `trial.timeout_s` if such settings are worth the wait."
        return Failure(self._reached, Kind.DEADLINE, Blame.PARAMETERS, evidence, remedy, self.share)

    def _diagnosed(self, exit_code: int) -> Failure:
        diagnosis = diagnose(read_log(self.log_path), exit_code=exit_code, rules=self._rules)
        failure = diagnosis.failure or Failure(
            stage=diagnosis.stage or self.stage,
            kind=Kind.ENGINE_DIED,
            blame=Blame.PARAMETERS,
            evidence=f"the engine ended with {_describe(exit_code)}, and its log does not say why",
            remedy="See the end of engine.log.",
        )
        failure = self._killed_for_memory(failure)
        return under_load(failure) if self._served else failure

    def _killed_for_memory(self, failure: Failure) -> Failure:
        """The failure, or what is behind it where the kernel has ended one of the engine's processes meanwhile."""
        now = oom_kills()
        if now is None or self._oom_kills is None or now <= self._oom_kills or failure.kind not in SUDDEN_ENDS:
            return failure
        evidence = f"the kernel ended a process for want of memory: {failure.evidence}"
        remedy = "Lower what the setting holds in memory, or give the trial a machine with more."
        return replace(failure, kind=Kind.OUT_OF_MEMORY, blame=Blame.PARAMETERS, evidence=evidence, remedy=remedy)

    @property
    def _reached(self) -> Stage:
        return max(self.stage, Stage.READY, key=lambda stage: stage.order) if self._served else self.stage

    # Ending

    def kill(self) -> StopReport:
        """End it at once, without asking."""
        return self._end('{"do": "kill"}', STUCK_S)

    def stop(self, grace_s: float | None = None) -> StopReport:
        """End it and wait: SIGTERM, `grace_s` seconds for the engine's root, then SIGKILL for what is left."""
        grace_s = self._grace_s if grace_s is None else grace_s
        return self._end(json.dumps({"do": "stop", "grace_s": grace_s}), grace_s + SETTLE_S + STUCK_S)

    def _end(self, command: str, limit_s: float) -> StopReport:
        if self._report is not None or self._socket is None:
            return self._report or StopReport(None, 0.0, 0, 0)
        asked = time.monotonic()
        try:
            self._send(command)
            self._await_end(limit_s + _MARGIN_S)
            self._report = self._read_report(time.monotonic() - asked)
        finally:
            self._close()
        return self._report

    def _await_end(self, limit_s: float) -> None:
        def told() -> bool:
            return self._lost or "gone" in self._events or "stuck" in self._events

        with self._changed:
            known = self._changed.wait_for(told, limit_s)
        if not known:
            self._abandon()

    def _abandon(self) -> None:
        """The supervisor does not answer: do its work."""
        supervisor = Process.of(self._events["hello"]["pid"]) if "hello" in self._events else None
        if supervisor is not None:
            supervisor.send(signal.SIGKILL)
        sweep(self._mark)

    def _read_report(self, seconds: float) -> StopReport:
        gone = self._events.get("gone", {})
        exit_code = self._events.get("exited", gone).get("exit_code")
        left = gone["survivors"] if gone else marked(self._mark)
        return StopReport(exit_code, seconds, gone.get("killed", 0), len(left))

    def _close(self) -> None:
        """Let go of the lifeline; a supervisor that still has work goes on with it alone."""
        if self._socket is not None and self._listener is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._listener.join(_MARGIN_S)
            self._socket.close()


def under_load(failure: Failure) -> Failure:
    """The failure of an engine that had come up."""
    kind = Kind.ENGINE_DIED if failure.kind is Kind.UNKNOWN else failure.kind
    return replace(failure, stage=Stage.LOAD, share=0.0, kind=kind)


def ranked(name: str, rank: int) -> str:
    """A file's name as it is for that rank of an engine.

    >>> ranked("engine.log", 0), ranked("engine.log", 1)
    ('engine.log', 'engine-1.log')
    """
    stem, dot, ending = name.partition(".")
    return f"{stem}-{rank}{dot}{ending}" if rank else name


def all_ended(workdir: Path) -> bool:
    """Whether every rank that was started in `workdir` has ended, and one was."""
    stem, _, ending = RECORD_NAME.partition(".")
    records = [path.name for path in workdir.glob(f"{stem}*.{ending}")]
    return bool(records) and all(read_end(workdir, name) is not None for name in records)


def read_end(workdir: Path, record: str = RECORD_NAME) -> Cause | None:
    """Why the engine in `workdir` ended, as its supervisor wrote it down; None where it did not (yet)."""
    try:
        cause = json.loads((workdir / record).read_text(encoding="utf-8")).get("cause")
    except (OSError, ValueError):
        return None
    return None if cause is None else Cause(cause)


def _describe(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"signal {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"signal {-exit_code}"
