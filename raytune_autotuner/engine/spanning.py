"""An engine that spans several nodes, as one server: rank 0, which serves, here, and those that follow it elsewhere.

The end of any one is the end of all. Of all their failures the one is told that says why, or that came first. How a
rank on another node is started and watched is not known here: that is what a `Follower` is for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

from raytune_autotuner.engine.contract import Rank
from raytune_autotuner.engine.server import SUDDEN_ENDS, EngineServer, StopReport, under_load
from raytune_autotuner.study.errors import TrialFailed
from raytune_autotuner.study.failure import Failure, Kind, Stage

ECHO_S = 3.0
"""So long after one rank's end the others may take to say why they end too."""


class Follower(Protocol):
    """One rank on another node."""

    @property
    def hardware(self) -> str:
        """What its machine is; empty until that is known."""

    def start(self, rank: Rank, on_end: Callable[[Failure | None], None]) -> None:
        """Start it; returns at once. `on_end` is called from another thread with why it ended; None: it was stopped."""

    def lost(self) -> Failure | None:
        """The failure where its machine does not answer any more; may take seconds."""

    def stop(self) -> Failure | None:
        """End it, and wait until it is gone; what its log shows to have gone wrong before."""


class SpanningServer:
    """`head`, which is the rank `rank`, and its followers, with what an `EngineServer` has for those that send load."""

    def __init__(self, head: EngineServer, rank: Rank, followers: Sequence[Follower]) -> None:
        self.base_url = head.base_url
        self._head = head
        self._rank = rank
        self._followers = dict(enumerate(followers, 1))
        self._running = {*self._followers}
        self._failures: list[Failure] = []
        self._cause: Failure | None = None
        self._changed = threading.Condition()
        self._stopping = False

    def start(self) -> None:
        """Start all ranks; returns at once."""
        self._head.start()
        for number, follower in self._followers.items():
            follower.start(_other(self._rank, number), partial(self._on_end, number))

    def wait_ready(self, probe: Callable[[], bool] | None = None) -> None:
        """As `EngineServer.wait_ready`, with the failure of whichever rank it was."""
        with self._explained():
            self._head.wait_ready(probe)

    def check(self) -> None:
        """Raise `TrialFailed` where a rank is not alive any more or the time is up. Cheap while all are well."""
        with self._explained():
            if self._failures:
                raise TrialFailed(self._failures[0])
            self._head.check()

    def stop(self, grace_s: float | None = None) -> StopReport:
        """End all ranks and wait; `grace_s` is for the one that serves."""
        self._stopping = True
        try:
            return self._head.stop(grace_s)
        finally:
            for follower in self._followers.values():
                follower.stop()

    def _on_end(self, number: int, failure: Failure | None) -> None:
        with self._changed:
            self._running.discard(number)
            if failure is not None and not self._stopping:
                self._failures.append(failure)
            self._changed.notify_all()
        if not self._stopping:
            self._head.kill()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except TrialFailed as failed:
            if self._cause is None:
                self._cause = self._find_cause(failed.failure)
            raise TrialFailed(self._cause) from failed

    def _find_cause(self, told: Failure) -> Failure:
        """Why the engine ended, of which one rank has told that it did."""
        cause = self._agreed(told) if told.kind in SUDDEN_ENDS else told
        if self._head.served:
            return under_load(cause)
        told_where = cause.stage is not Stage.ARGUMENTS
        return cause if told_where else replace(cause, stage=self._head.stage, share=self._head.share)

    def _agreed(self, told: Failure) -> Failure:
        """The cause by all ranks, where one of them does not say why it has ended: the others may, a moment later."""
        first = [*self._failures]  # if any, it was that which ended rank 0
        with self._changed:
            self._changed.wait_for(lambda: not self._running, 0 if first else ECHO_S)
        left = [self._followers[number] for number in sorted(self._running)]
        lost = [failure for follower in left if (failure := follower.lost())]
        self._stopping = True
        # Of those that live on, a log may have the error all the same: vLLM's workers go on after one.
        logged = [] if lost else [failure for follower in left if (failure := follower.stop())]
        return root_cause([*first, told, *self._failures, *lost], logged)


def root_cause(ends: Sequence[Failure], logged: Sequence[Failure] = ()) -> Failure:
    """Of the failures of one engine's ranks, the one to tell: `ends` in their order, `logged` by those that lived on.

    A machine that is gone explains the ends of all others; else one that says why, and else the first, with what was
    logged elsewhere.
    """
    lost = [failure for failure in ends if failure.kind is Kind.NODE_LOST]
    telling = [failure for failure in (*ends, *logged) if failure.kind not in SUDDEN_ENDS]
    if lost or telling:
        return (lost or telling)[0]
    return replace(ends[0], evidence="; ".join(failure.evidence for failure in (ends[0], *logged)))


def _other(rank: Rank, number: int) -> Rank:
    return Rank(number, rank.nodes, rank.address, rank.port, host="")
