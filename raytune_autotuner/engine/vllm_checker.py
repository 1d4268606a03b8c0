"""A warm process in the engine's own Python that says what the installed vLLM thinks of flags and settings.

The process runs `vllm_probe.py`, which says what questions and answers look like. Importing vllm takes it seconds, an
answer after that milliseconds. It ends with this object and with the process that has made it, however that ends.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from raytune_autotuner.engine.scratch import Scratch
from raytune_autotuner.study.errors import ConfigError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""For the first answer, which waits for the import of vllm."""
CHECK_TIMEOUT_S = 60.0
"""For each later answer."""
MAX_LOSSES = 2
"""Ends of the process in the middle of a check after which no more settings are checked."""
PROBE = Path(__file__).with_name("vllm_probe.py").read_text(encoding="utf-8")
_CLOSING_S = 5.0
_LAST_BYTES = 4096


@dataclass(frozen=True)
class Verdict:
    """What vLLM said of one setting."""

    lines: tuple[str, ...] = ()
    """The last lines of the log of a server that refuses it; empty for a setting that it would start with."""
    exit_code: int = 0
    in_force: Mapping[str, Any] = field(default_factory=dict)
    """Flag to the value in force, as far as asked for and plain; empty where the setting is refused."""


class _Lost(Exception):
    """The process ended or did not answer in time; the text says how."""


class VllmChecker:
    """Asks the vLLM of `python`, with `environment` over that of this process. A context manager."""

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        self._command = [python, "-c", PROBE]
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._scratch = Scratch({**os.environ, **environment})
        self._rest = b""
        self._answered = False
        self._losses = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def gave_up(self) -> bool:
        """Whether the process was lost too often, so that settings are not checked any more."""
        return self._losses >= MAX_LOSSES

    def start(self) -> None:
        """Start the process if there is none; returns at once, while it imports vllm."""
        if self._process is not None:
            return
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  `close` closes it
        self._rest, self._answered = b"", False
        self._scratch.make()
        self._process = subprocess.Popen(
            # As text: run as a file, its folder would stand first on the path, and this package's modules hide vLLM.
            self._command,
            cwd=os.sep,
            env={**os.environ, **self._environment, **self._scratch.variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C is for the driver alone
        )

    def examine(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a question about the study's flags; raises `ConfigError` where vLLM gives none."""
        try:
            return self._ask(question)
        except _Lost as lost:
            raise ConfigError(f"vLLM in {self._command[0]} does not answer which flags it has: {lost}") from lost

    def check(self, argv: Sequence[str], env: Mapping[str, str], tell: Sequence[str] = ()) -> Verdict | None:
        """vLLM's verdict on a setting, with the values in force of the flags in `tell`; None where it gives none."""
        if self.gave_up:
            return None
        try:
            answer = self._ask({"argv": list(argv), "env": dict(env), "tell": list(tell)})
        except _Lost as lost:
            self._losses += 1
            follows = "It is started anew." if self._losses < MAX_LOSSES else "Settings are not checked any more."
            logger.warning("the process that checks settings was lost: %s %s", lost, follows)
            return None
        return Verdict(tuple(answer["lines"]), int(answer["exit_code"] or 0), answer["in_force"])

    def close(self) -> None:
        """End the process and wait until it is gone; harmless where there is none."""
        process, said = self._process, self._said
        self._process = self._said = None
        if process is not None:
            _end(process)
        if said is not None:
            said.close()
        self._scratch.remove()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line and read one; raises `_Lost`. Without an answer no process is left, also on Ctrl-C."""
        answer: dict[str, Any] | None = None
        try:
            self.start()
            self._send(json.dumps(question).encode() + b"\n")
            answer = json.loads(self._line(CHECK_TIMEOUT_S if self._answered else START_TIMEOUT_S))
        except (OSError, EOFError, ValueError) as error:
            raise _Lost(self._obituary(error)) from error
        finally:
            self._answered = answer is not None
            if answer is None:
                self.close()
        return answer or {}

    def _send(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _line(self, timeout_s: float) -> bytes:
        """The next line of the process; raises `EOFError` where it ends and `TimeoutError` where it takes too long."""
        assert self._process is not None
        assert self._process.stdout is not None
        output, until = self._process.stdout.fileno(), time.monotonic() + timeout_s
        readable = select.poll()
        readable.register(output, select.POLLIN)
        while b"\n" not in self._rest:
            if not readable.poll(max(until - time.monotonic(), 0) * 1000):
                raise TimeoutError(f"no answer within {timeout_s:.0f} s")
            if not (got := os.read(output, 65536)):
                raise EOFError("it ended")
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _obituary(self, error: Exception) -> str:
        """What happened to the process, with its exit code and last words where it ended by itself."""
        if self._process is None or not isinstance(error, (EOFError, BrokenPipeError)):
            return f"{error}."
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSING_S)
        return f"exit code {self._process.returncode}: {self._last_words()}"

    def _last_words(self) -> str:
        assert self._said is not None
        self._said.seek(max(os.fstat(self._said.fileno()).st_size - _LAST_BYTES, 0))
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close its input, which is its sign to end; kill it where it does not."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):  # an unsent question is not missed
            pipe.close()
    try:
        process.wait(_CLOSING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
