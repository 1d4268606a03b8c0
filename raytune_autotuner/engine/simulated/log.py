"""What the simulated engine prints: lines in vLLM's form, so that one reader understands both.

Logger lines go to standard output, tracebacks to standard error, each written at once. A reader that went away does
not stop the engine.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TextIO

API = "APIServer"
CORE = "EngineCore"
WORKER = "Worker"
VERSION = "0.0.0+simulated"


def put(text: str, stream: TextIO | None = None) -> None:
    """Print a line as it is."""
    with contextlib.suppress(OSError):
        out = stream or sys.stdout
        out.write(text + "\n")
        out.flush()


def pid() -> int:
    """The id of this process."""
    return os.getpid()


def say(role: str, text: str, level: str = "INFO") -> None:
    """Print a logger line of the process that plays `role`; each line of `text` has the prefix."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    for line in text.split("\n"):
        put(f"({role} pid={pid()}) {level} {stamp} [simulated.py:1] {line}")


def traceback_of(error: str, *where: str) -> str:
    """A traceback that ends in `error`, through the functions `where`."""
    frames = [f'  File "simulated/{name}.py", line 1, in {name}\n    {name}()' for name in where]
    return "\n".join(["Traceback (most recent call last):", *frames, error])


def config_refused(message: str) -> None:
    """The end of a start whose configuration does not hold."""
    error = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
        f"  Value error, {message} [type=value_error, input_value=ArgsKwargs(()), input_type=ArgsKwargs]"
    )
    api_failed(error)


def api_failed(error: str) -> None:
    """A traceback of the API server itself."""
    put(traceback_of(error, "main", "create_engine_config"), sys.stderr)


def core_failed(error: str, role: str, function: str) -> None:
    """The end of a start whose engine core failed in `function`: the cause first, then what follows from it."""
    if role == WORKER:
        say(WORKER, "WorkerProc hit an exception.\n" + traceback_of(error, "worker_busy_loop", function), "ERROR")
        cause = error.partition(": ")[2].splitlines()[0]
        hint = "please check the stack trace above for the root cause"
        error = f"RuntimeError: Worker failed with error '{cause}', {hint}"
    say(CORE, "EngineCore failed to start.\n" + traceback_of(error, "run_engine_core", function), "ERROR")
    put("Process EngineCore:\n" + traceback_of(error, "run_engine_core", function), sys.stderr)
    follow = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    put(traceback_of(follow, "main", "wait_for_engine_startup"), sys.stderr)


def core_died(error: str) -> None:
    """The end of a serving engine whose core failed."""
    trace = traceback_of(error, "run_busy_loop", "execute_model")
    say(CORE, f"EngineCore encountered a fatal error.\n{trace}", "ERROR")
    dead = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)."
    say(API, "AsyncLLM output_handler failed.\n" + traceback_of(dead, "output_handler"), "ERROR")


def shutting_down() -> None:
    """The lines of a clean end after SIGTERM."""
    say(CORE, "[shutdown] EngineCore: trigger received signal=SIGTERM")
    say(CORE, "[shutdown] EngineCore: exiting busy loop")
    say(API, "[shutdown] API server: shutdown triggered")
    say(API, "[shutdown] API server: engine client stopped")
    put("INFO:     Shutting down", sys.stderr)


def shut_down() -> None:
    """The last lines of a clean end."""
    put("INFO:     Waiting for application shutdown.", sys.stderr)
    put("INFO:     Application shutdown complete.", sys.stderr)
