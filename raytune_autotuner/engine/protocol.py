"""What the owner of an engine and the supervisor of its processes say to each other: JSON lines over a socket.

    owner -> supervisor   the `Spec`, then {"do": "stop", "grace_s": 10} or {"do": "kill"}
    supervisor -> owner   {"event": ...} with its values:
      hello pid · waiting-for-lock lock · started pid | refused error · progress stage share serving lines ·
      exited exit_code cause · stuck survivors · gone with the values of `Aftermath`

The socket is the owner's lifeline too: its end is the owner's end. Standard library only.
"""

from __future__ import annotations

import base64
import json
import pickle
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from raytune_autotuner.engine.processes import Process
from raytune_autotuner.engine.reading import LogRules

SETTLE_S = 1.0
"""After the root's end, by itself or on `stop`, how long the rest of its tree may take to follow."""
STUCK_S = 10.0
"""After so long of killing, the owner is told who does not go; the killing goes on."""
ASIDE_S = 3600.0
"""How long a GPU whose memory does not come back is kept from other trials at most."""
_CHUNK = 65_536


class Cause(StrEnum):
    """Why the tree was ended."""

    EXITED = "exited"
    """The engine's root process ended by itself."""
    STOPPED = "stopped"
    KILLED = "killed"
    OWNER_ENDED = "owner-ended"
    DEADLINE = "deadline"
    TERMINATED = "terminated"
    """Somebody sent SIGTERM to the supervisor."""
    REFUSED = "refused"
    """The command could not be started."""


def pack_rules(rules: LogRules) -> str:
    """The stages of `rules` as text; the failures are the owner's to read."""
    return base64.b64encode(pickle.dumps(replace(rules, failures=()))).decode()


@dataclass(frozen=True, slots=True)
class Spec:
    """What to run and when to end it."""

    argv: tuple[str, ...]
    env: dict[str, str]
    """The engine's whole environment, its mark included."""
    cwd: str
    log_path: str
    record_path: str
    """Where the end is written down for when the owner is dead."""
    trial_log_path: str
    """Where a line says what was verified at the end."""
    port: int
    """Where the engine listens."""
    log_limit_bytes: int
    deadline_s: float | None
    """On the machine's monotonic clock."""
    locks: tuple[str, ...]
    mark: str
    owner: Process
    raylet: Process | None
    """Ray's node process where the owner is Ray's worker: its end is the owner's, who notices it seconds later."""
    rules: str
    """How to read the log, see `pack_rules`."""
    cores: tuple[int, ...] = ()
    """The CPU cores that the engine may use; empty for all."""

    @property
    def log_rules(self) -> LogRules:
        """How to read the log."""
        rules: LogRules = pickle.loads(base64.b64decode(self.rules))
        return rules

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str | bytes) -> Spec:
        """The reverse of `to_json`."""
        values = json.loads(line)
        values |= {
            "argv": tuple(values["argv"]),
            "locks": tuple(values["locks"]),
            "cores": tuple(values["cores"]),
            "owner": Process(**values["owner"]),
        }
        values["raylet"] = values["raylet"] and Process(**values["raylet"])
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Aftermath:
    """How an engine ended, and what was found when it was over."""

    cause: Cause | None
    """None where the supervisor itself was lost."""
    exit_code: int | None
    killed: int
    """Processes that had to be ended by SIGKILL."""
    survivors: tuple[int, ...]
    port: int
    port_free: bool
    shared_memory_bytes: int
    """Named shared memory that the killed processes had left, and that was removed."""
    gpu_mib: dict[str, tuple[int, int]]
    """GPU to its memory in use before the engine and after it, in MiB."""
    held_gpus: tuple[str, ...]
    """GPUs whose memory did not come back; they are set aside."""

    def __str__(self) -> str:
        """One line for the trial's log."""
        code = "" if self.exit_code is None else f", exit code {self.exit_code}"
        left = f"still running: {', '.join(map(str, self.survivors))}" if self.survivors else "no process left"
        parts = [f"engine ended ({self.cause or 'supervisor lost'}{code})", f"{self.killed} killed", left]
        parts.append(f"port {self.port} {'free' if self.port_free else 'STILL IN USE'}")
        if self.shared_memory_bytes:
            parts.append(f"{self.shared_memory_bytes / 1e6:.0f} MB of shared memory removed")
        for gpu, (before, after) in self.gpu_mib.items():
            verdict = "does not come back: SET ASIDE" if gpu in self.held_gpus else "is back"
            parts.append(f"GPU {gpu} {verdict} ({before} MiB before, {after} MiB now)")
        silent = [gpu for gpu in self.held_gpus if gpu not in self.gpu_mib]
        parts += [f"GPU {gpu} does not answer any more: SET ASIDE" for gpu in silent]
        return "; ".join(parts)


class Channel:
    """JSON lines to and from the owner. Sending never blocks: an owner that does not read cannot hold us up."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.closed = False
        self._in = b""
        self._out = b""

    def read_line(self) -> bytes:
        """The first line, waited for; empty where the owner is gone."""
        self.sock.setblocking(True)
        while b"\n" not in self._in and not self.closed:
            self._receive()
        self.sock.setblocking(False)
        line, _, self._in = self._in.partition(b"\n")
        return line

    def commands(self) -> Iterator[dict[str, Any]]:
        """What has arrived."""
        self._receive()
        *lines, self._in = self._in.split(b"\n")
        yield from (json.loads(line) for line in lines)

    def send(self, event: str, *, droppable: bool = False, **values: Any) -> None:
        """Queue an event; a droppable one is left out while others wait."""
        if not (droppable and self._out):
            self._out += json.dumps({"event": event, **values}).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Send what waits; whether all is sent (or nobody is there to read it)."""
        try:
            while self._out and not self.closed:
                self._out = self._out[self.sock.send(self._out) :]
        except BlockingIOError:
            return False
        except OSError:
            self.closed = True
        return True

    def _receive(self) -> None:
        try:
            data = self.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._in += data
        self.closed = self.closed or not data
