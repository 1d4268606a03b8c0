"""How far a trial got and what stopped it: stage, kind, blame.

Pure values; standard library only, so that the supervisor of an engine's processes can import it in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Stage(StrEnum):
    """The stages of a trial's life, in the order in which they are reached."""

    ARGUMENTS = "arguments"
    CONFIGURATION = "configuration"
    INITIALIZATION = "initialization"
    WEIGHTS = "weights"
    COMPILATION = "compilation"
    KV_CACHE = "kv-cache"
    GRAPH_CAPTURE = "graph-capture"
    READY = "ready"
    WARMUP = "warmup"
    LOAD = "load"

    @property
    def order(self) -> int:
        """Position in a trial's life, 0 for `arguments`."""
        return _ORDER[self]

    def progress(self, share: float = 0.0) -> float:
        """The share of a trial's life in (0, 1) that is reached at `share` in [0, 1] of this stage.

        >>> Stage.LOAD.progress(0.5)
        0.895
        """
        low, high = _PROGRESS[self]
        return low + (high - low) * min(max(share, 0.0), 1.0)


_ORDER = {stage: index for index, stage in enumerate(Stage)}
_PROGRESS: dict[Stage, tuple[float, float]] = {
    Stage.ARGUMENTS: (0.02, 0.02),
    Stage.CONFIGURATION: (0.10, 0.10),
    Stage.INITIALIZATION: (0.20, 0.20),
    Stage.WEIGHTS: (0.25, 0.40),
    Stage.COMPILATION: (0.45, 0.45),
    Stage.KV_CACHE: (0.55, 0.55),
    Stage.GRAPH_CAPTURE: (0.60, 0.70),
    Stage.READY: (0.75, 0.75),
    Stage.WARMUP: (0.80, 0.80),
    Stage.LOAD: (0.80, 0.99),
}


class Kind(StrEnum):
    """What stopped a trial."""

    BAD_ARGUMENT = "bad-argument"
    INVALID_CONFIG = "invalid-config"
    UNSUPPORTED = "unsupported"
    OUT_OF_MEMORY = "out-of-memory"
    KV_CACHE_TOO_SMALL = "kv-cache-too-small"
    MODEL_NOT_FOUND = "model-not-found"
    ACCESS_DENIED = "access-denied"
    FILE_NOT_FOUND = "file-not-found"
    PORT_IN_USE = "port-in-use"
    DEVICE_BUSY = "device-busy"
    WORKER_LOST = "worker-lost"
    NODE_LOST = "node-lost"
    ENGINE_DIED = "engine-died"
    HUNG = "hung"
    DEADLINE = "deadline"
    BAD_RESPONSES = "bad-responses"
    QUALITY_LOSS = "quality-loss"
    CLIENT_LIMITED = "client-limited"
    CLOCK_JUMPED = "clock-jumped"
    UNKNOWN = "unknown"


class Blame(StrEnum):
    """Whose fault a failure is; decides whether the sampler learns from it."""

    PARAMETERS = "parameters"
    """Graded and told to the sampler."""
    STUDY = "study"
    """No setting can mend it: the study ends, with the remedy."""
    ENVIRONMENT = "environment"
    """Told as FAIL, which samplers ignore, and run again as a new trial."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a trial has no score: the furthest stage, the kind, the line that proves it, and a remedy."""

    stage: Stage
    kind: Kind
    blame: Blame
    evidence: str
    """The one line that proves it."""
    remedy: str
    share: float = 0.0
    """How much of `stage` was done, in [0, 1]: weight shards loaded, requests finished."""
    depends: tuple[str, ...] = ()
    """The parameters that alone decide it: a setting that has the same values of them fails in the same way. Empty
    where nobody can say so."""

    @property
    def progress(self) -> float:
        """Share of a trial's life reached, in (0, 1); later is larger."""
        return self.stage.progress(self.share)

    def __str__(self) -> str:
        return f"{self.kind} at {self.stage}: {self.evidence}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Failure:
        """The reverse of `to_dict`."""
        return cls(
            stage=Stage(values["stage"]),
            kind=Kind(values["kind"]),
            blame=Blame(values["blame"]),
            evidence=str(values["evidence"]),
            remedy=str(values["remedy"]),
            share=float(values.get("share", 0.0)),
            depends=tuple(values.get("depends", ())),
        )
