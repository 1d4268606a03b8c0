"""Where a running trial is, as last heard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from raytune_autotuner.study.failure import Kind, Stage


@dataclass(frozen=True)
class Standing:
    """A trial's place in its life; the default is a trial that was not heard of yet."""

    stage: Stage = Stage.ARGUMENTS
    share: float = 0.0
    started_at: float = 0.0
    """Epoch seconds of its actor's start; 0 before it."""
    moved_at: float = 0.0
    """Epoch seconds of the last sign of life: a log line or a finished request."""
    ended_by: Kind | None = None
    """Why the monitor ended it, if it did: `hung` or `deadline`."""
    ended_at: float | None = None
    node_id: str = ""
    """Ray's id of the node that it runs on."""
    others: tuple[str, ...] = ()
    """The ids of the further nodes that its engine spans."""
    node: str = ""
    """That machine's host name."""
    hardware: str = ""
    metrics: Mapping[str, float] | None = None
    """What was measured in the rounds so far."""

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Ray's ids of all of its nodes, as far as they are known."""
        return (self.node_id, *self.others) if self.node_id else ()

    @property
    def elapsed_s(self) -> float:
        """Seconds from the actor's start to now, or to its end by the monitor; 0 before its start."""
        return (self.ended_at or time.time()) - self.started_at if self.started_at else 0.0
