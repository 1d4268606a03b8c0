"""The ways in which the simulated engine goes wrong, as values: what happens, at which stage, in which words.

    crash@weights            at a stage of the start
    crash@load:after=20      when the 21st request arrives
    error500@load:share=0.2  one request in five

Several are separated by commas, or `--fault` is given several times; `none` is no fault. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

from raytune_autotuner.study.errors import ConfigError
from raytune_autotuner.study.failure import Kind, Stage


class Effect(StrEnum):
    """What happens."""

    REFUSE = "refuse"
    """Refuses its configuration, exit code 1 (at `arguments`: usage and exit code 2)."""
    UNSUPPORTED = "unsupported"
    """Has no kernel for the configuration, exit code 1."""
    MODEL_NOT_FOUND = "model-not-found"
    ACCESS_DENIED = "access-denied"
    DEVICE_BUSY = "device-busy"
    """Another process holds the device's memory."""
    PORT_IN_USE = "port-in-use"
    CRASH = "crash"
    """An unexpected error with a traceback, exit code 1."""
    WORKER_LOST = "worker-lost"
    """A worker process ended without a word, exit code 1."""
    SEGFAULT = "segfault"
    """SIGSEGV to itself."""
    KILLED = "killed"
    """SIGKILL to itself without a word, as the kernel does when memory runs out."""
    OOM = "oom"
    """Device memory runs out, exit code 1."""
    KV_TOO_SMALL = "kv-too-small"
    """The KV cache cannot hold one request of full length, exit code 1."""
    HANG = "hang"
    """Prints and answers nothing any more; with `mode=engine` /health and /metrics still answer."""
    SLOW_START = "slow-start"
    """Takes `seconds` more at that stage."""
    LEAK = "leak"
    """Starts processes that outlive it and print to its standard output (`tree`: which, joined by `+`)."""
    GARBAGE = "garbage"
    """Answers 200 with rubbish (`mode`: `html`, `empty`, `json`)."""
    ERROR500 = "error500"
    CUT_SHORT = "cut-short"
    """Ends a request after the share `keep` of its tokens."""
    DISCONNECT = "disconnect"
    """Closes the connection in the middle of an answer."""
    IGNORE_TERM = "ignore-term"
    """SIGTERM has no effect from that stage on."""
    ZOMBIE_PRINT = "zombie-print"
    """Prints `text`, or of `$NAME` the variable's value, for ever from that stage on, every `every` seconds."""


KINDS: dict[Effect, Kind] = {
    Effect.REFUSE: Kind.INVALID_CONFIG,
    Effect.UNSUPPORTED: Kind.UNSUPPORTED,
    Effect.MODEL_NOT_FOUND: Kind.MODEL_NOT_FOUND,
    Effect.ACCESS_DENIED: Kind.ACCESS_DENIED,
    Effect.DEVICE_BUSY: Kind.DEVICE_BUSY,
    Effect.PORT_IN_USE: Kind.PORT_IN_USE,
    Effect.CRASH: Kind.UNKNOWN,
    Effect.WORKER_LOST: Kind.WORKER_LOST,
    Effect.SEGFAULT: Kind.ENGINE_DIED,
    Effect.KILLED: Kind.OUT_OF_MEMORY,
    Effect.OOM: Kind.OUT_OF_MEMORY,
    Effect.KV_TOO_SMALL: Kind.KV_CACHE_TOO_SMALL,
    Effect.HANG: Kind.HUNG,
    Effect.GARBAGE: Kind.BAD_RESPONSES,
    Effect.ERROR500: Kind.BAD_RESPONSES,
    Effect.CUT_SHORT: Kind.BAD_RESPONSES,
    Effect.DISCONNECT: Kind.BAD_RESPONSES,
}
"""What a trial with this effect fails as; effects that are not here do not fail a trial by themselves."""

PER_REQUEST = frozenset({Effect.GARBAGE, Effect.ERROR500, Effect.CUT_SHORT, Effect.DISCONNECT})
"""Effects that spoil a share of the answers and leave the engine running; their stage does not matter."""

TREE = ("child", "grandchild", "setsid", "setsid-grandchild", "daemon", "stubborn")
"""Processes that a leak can start: the last one ignores SIGTERM."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong; which options mean something depends on the effect."""

    effect: Effect
    stage: Stage
    message: str = ""
    """The error's own words; empty for the effect's usual ones."""
    after: int = 0
    """At load: requests that still arrive in peace, readiness probes and warm-up included."""
    share: float = 1.0
    """Of the requests after that, spread evenly."""
    keep: float = 0.5
    seconds: float = 5.0
    every: float = 0.2
    text: str = ""
    mode: str = ""
    tree: str = "+".join(TREE)
    ttl: float = 120.0
    """Seconds after which leaked processes end by themselves, so that a broken test leaves nothing behind."""
    once: str = ""
    """A file: the fault happens only where it does not exist yet, and makes it."""
    rank: int = 0
    """Where the engine spans several nodes: on which of them."""

    @property
    def kind(self) -> Kind | None:
        """What a trial with this fault fails as; None where it does not fail by it."""
        if self.effect is Effect.REFUSE and self.stage is Stage.ARGUMENTS:
            return Kind.BAD_ARGUMENT
        return KINDS.get(self.effect)

    def spoils(self, index: int) -> bool:
        """Whether request `index`, counted from 0, is among the spoiled ones: as even as the share allows."""
        since = index - self.after
        return since >= 0 and int((since + 1) * self.share + 1e-9) > int(since * self.share + 1e-9)


_OPTIONS = {spec.name: spec for spec in fields(Fault) if spec.name not in {"effect", "stage"}}
_READERS = {"int": int, "float": float, "str": str}


def parse_faults(texts: Sequence[str]) -> tuple[Fault, ...]:
    """Faults from the values of `--fault`; raises `ConfigError` for what is not one."""
    words = [word.strip() for text in texts for word in _split(text)]
    return tuple(parse_fault(word) for word in words if word and word != "none")


def _split(text: str) -> list[str]:
    return [str(word) for word in json.loads(text)] if text.lstrip().startswith("[") else text.split(",")


def parse_fault(text: str) -> Fault:
    """A fault from `effect@stage:option=value:option`.

    >>> parse_fault("crash@load:after=20").after
    20
    """
    head, *options = text.split(":")
    effect, _, stage = head.partition("@")
    try:
        values = dict(_option(option) for option in options)
        return Fault(Effect(effect), Stage(stage or Stage.LOAD), **values)  # type: ignore[arg-type]
    except ValueError as error:
        known = ", ".join(Effect)
        form = f"write EFFECT@STAGE:option=value, with one of {known}"
        raise ConfigError(f"--fault {text!r}: {error}; {form}.") from error


def _option(text: str) -> tuple[str, int | float | str]:
    name, separator, value = text.partition("=")
    if name not in _OPTIONS or not separator:
        raise ValueError(f"{text!r} is none of the options {', '.join(_OPTIONS)}")
    return name, _READERS[str(_OPTIONS[name].type)](value)
