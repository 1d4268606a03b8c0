"""Faults carried out by the server's process: the tracebacks, exits, signals and left-over processes."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from raytune_autotuner.engine.simulated import log
from raytune_autotuner.engine.simulated.fate import out_of_memory, too_small
from raytune_autotuner.engine.simulated.faults import PER_REQUEST, Effect, Fault
from raytune_autotuner.study.failure import Stage

_ERRORS = {
    Effect.REFUSE: "ValueError: This configuration is invalid (a simulated fault).",
    Effect.UNSUPPORTED: "ValueError: This configuration is not supported (a simulated fault).",
    Effect.MODEL_NOT_FOUND: "OSError: the model is not a local folder and is not a valid model identifier.",
    Effect.ACCESS_DENIED: (
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo: access is restricted."
    ),
    Effect.DEVICE_BUSY: (
        "ValueError: Free memory on device cuda:0 (1.20/12.00 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 10.80 GiB). Reduce GPU memory used by other processes."
    ),
    Effect.PORT_IN_USE: "OSError: [Errno 98] Address already in use",
    Effect.CRASH: "RuntimeError: the engine broke down (a simulated fault).",
    Effect.WORKER_LOST: "RuntimeError: Executor failed.",
    Effect.OOM: "torch.OutOfMemoryError: " + out_of_memory(2.0, 0.5, 12.0),
    Effect.KV_TOO_SMALL: "ValueError: " + too_small(4096, 2.0, 1.2),
}
_WORKER_EFFECTS = {Effect.OOM, Effect.UNSUPPORTED}
_FUNCTIONS = {
    Stage.WEIGHTS: "load_model",
    Stage.COMPILATION: "compile_or_warm_up_model",
    Stage.KV_CACHE: "_initialize_kv_caches",
    Stage.GRAPH_CAPTURE: "capture_model",
}
"""In which function a start fails."""
_API_EFFECTS = {Effect.PORT_IN_USE, Effect.MODEL_NOT_FOUND, Effect.ACCESS_DENIED}


class Actor:
    """Carries out the faults of one engine process, each once."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        due = [fault for fault in faults if _first_time(fault)]
        self._due = [fault for fault in due if fault.effect not in PER_REQUEST]
        self._spoilers = [fault for fault in due if fault.effect in PER_REQUEST]
        self.ignores_term = False
        self.engine_hangs = False

    def reach(self, stage: Stage) -> None:
        """Carry out what is due at `stage` of the start; side effects first, then what ends the process."""
        due = [fault for fault in self._due if fault.stage is stage]
        for fault in sorted(due, key=lambda fault: fault.effect not in _SIDE_EFFECTS):
            self._act(fault)

    def request(self, index: int) -> Fault | None:
        """Carry out what is due when request `index` arrives; the fault that spoils its answer, if any."""
        for fault in [fault for fault in self._due if fault.stage.order > Stage.READY.order]:
            if index >= fault.after:
                self._act(fault)
        return next((fault for fault in self._spoilers if fault.spoils(index)), None)

    def _act(self, fault: Fault) -> None:
        self._due.remove(fault)
        if fault.effect is Effect.IGNORE_TERM:
            self.ignores_term = True
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif fault.effect is Effect.HANG and fault.mode == "engine":
            self.engine_hangs = True
        elif fault.effect in _SIDE_EFFECTS:
            _SIDE_EFFECTS[fault.effect](fault)
        else:
            _end(fault)


def _first_time(fault: Fault) -> bool:
    if not fault.once:
        return True
    try:
        Path(fault.once).open("x").close()
    except FileExistsError:
        return False
    return True


def usage_error(fault: Fault, usage: str) -> NoReturn:
    """End as an argument parser does."""
    message = fault.message or "argument --max-num-seqs: invalid value (a simulated fault)"
    log.put(f"{usage.rstrip()}\napi_server.py: error: {message}", sys.stderr)
    sys.exit(2)


def _end(fault: Fault) -> None:
    if fault.effect is Effect.SEGFAULT:
        log.put("Fatal Python error: Segmentation fault\n\nCurrent thread (most recent call first):", sys.stderr)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault.effect is Effect.KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.effect is Effect.HANG:
        _hang()
    _print_end(fault)
    sys.stdout.flush()
    os._exit(1)  # at once, also from within the event loop


def _hang() -> NoReturn:
    while True:
        signal.pause()


def _print_end(fault: Fault) -> None:
    error = _error(fault)
    if fault.effect is Effect.WORKER_LOST:
        log.say(
            log.CORE, "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor.", "ERROR"
        )
    if fault.stage.order >= Stage.READY.order:
        log.core_died(error)
    elif fault.effect in _API_EFFECTS or fault.stage.order < Stage.CONFIGURATION.order:
        log.api_failed(error)
    elif fault.stage is Stage.CONFIGURATION and fault.effect in {Effect.REFUSE, Effect.UNSUPPORTED}:
        log.config_refused(error.partition(": ")[2])
    elif fault.stage is Stage.CONFIGURATION:
        log.api_failed(error)
    else:
        role = log.WORKER if fault.effect in _WORKER_EFFECTS else log.CORE
        log.core_failed(error, role, _FUNCTIONS.get(fault.stage, "initialize"))


def _error(fault: Fault) -> str:
    usual = _ERRORS[fault.effect]
    return f"{usual.partition(': ')[0]}: {fault.message}" if fault.message else usual


def _slow_start(fault: Fault) -> None:
    time.sleep(fault.seconds)


def _zombie_print(fault: Fault) -> None:
    variable = fault.text.startswith("$")
    line = os.environ.get(fault.text[1:], "") if variable else fault.text or "a simulated zombie still prints"
    threading.Thread(target=_print_for_ever, args=(line, fault.every, None), daemon=True).start()


def _print_for_ever(line: str, every: float, until: float | None) -> None:
    while until is None or time.monotonic() < until:
        with contextlib.suppress(OSError):
            os.write(1, f"{line}\n".encode())
        time.sleep(every)


def _leak(fault: Fault) -> None:
    for name in fault.tree.split("+"):
        _SPAWN[name](fault)


def _fork(act: Callable[[], None]) -> int:
    """Run `act` in a forked process that shares only the standard streams; its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.closerange(3, 4096)
            act()
        finally:
            os._exit(0)
    return pid


def _linger(fault: Fault, name: str) -> None:
    line = fault.text or f"leaked {name} still prints"
    _print_for_ever(f"{line} pid={os.getpid()}", fault.every, time.monotonic() + fault.ttl)


def _in_new_session(act: Callable[[], None]) -> None:
    os.setsid()
    act()


def _fork_and_wait(act: Callable[[], None]) -> None:
    os.waitpid(_fork(act), 0)


def _stubborn(fault: Fault) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _linger(fault, "stubborn")


def _daemon(fault: Fault) -> None:
    pid = _fork(lambda: _in_new_session(lambda: _fork_away(lambda: _linger(fault, "daemon"))))
    os.waitpid(pid, 0)


def _fork_away(act: Callable[[], None]) -> None:
    _fork(act)


_SPAWN: dict[str, Callable[[Fault], object]] = {
    "child": lambda fault: _fork(lambda: _linger(fault, "child")),
    "grandchild": lambda fault: _fork(lambda: _fork_and_wait(lambda: _linger(fault, "grandchild"))),
    "setsid": lambda fault: _fork(lambda: _in_new_session(lambda: _linger(fault, "setsid"))),
    "setsid-grandchild": lambda fault: _fork(
        lambda: _fork_and_wait(lambda: _in_new_session(lambda: _linger(fault, "setsid-grandchild")))
    ),
    "daemon": _daemon,
    "stubborn": lambda fault: _fork(lambda: _stubborn(fault)),
}
_SIDE_EFFECTS: dict[Effect, Callable[[Fault], None]] = {
    Effect.SLOW_START: _slow_start,
    Effect.LEAK: _leak,
    Effect.ZOMBIE_PRINT: _zombie_print,
    Effect.IGNORE_TERM: lambda fault: None,
}
