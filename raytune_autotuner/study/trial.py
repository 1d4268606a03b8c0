"""A trial as it ended: what was measured, or why nothing was.

`TrialResult` is what one evaluation comes to (`result.json`); `TrialRow` is its line in the study's results table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from raytune_autotuner.study.failure import Blame, Failure

BASELINE = "baseline"


class State(StrEnum):
    """Where a trial stands."""

    PENDING = "pending"
    RUNNING = "running"
    MEASURED = "measured"
    FAILED = "failed"
    """By the parameters' (or the study's) fault: graded."""
    STOPPED = "stopped"
    """Ended between two of its loads, as it could not beat the best trial any more: told by its bound."""
    LOST = "lost"
    """By the environment's fault: not told to the sampler, run again as a new trial."""
    INTERRUPTED = "interrupted"
    """The study was ended while it ran."""
    EARLIER = "earlier"
    """A setting of an earlier run, to be measured again by restarts: it has no figures of its own."""

    @property
    def finished(self) -> bool:
        """Whether it will not change any more."""
        return self not in (State.PENDING, State.RUNNING)

    @property
    def teaches(self) -> bool:
        """Whether the sampler learns from it."""
        return self in (State.MEASURED, State.FAILED, State.STOPPED)


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What one evaluation of a setting came to: metrics or a failure, and the seconds each phase took."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase (`start`, `warmup`, `load`, `stop`, `total`) to seconds."""
    answers: tuple[str, ...] = ()
    """The baseline's greedy answers, which those of other settings are held against; empty without `quality`."""
    node: str = ""
    """Host name of the machine that it ran on."""
    hardware: str = ""
    """What that machine is, as far as figures depend on it."""
    paid_for: float | None = None
    """GPUs that it held, or machines where it held none: what has a price; None in results of earlier versions."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "metrics": dict(self.metrics),
            "failure": None if self.failure is None else self.failure.to_dict(),
            "seconds": dict(self.seconds),
            **({"answers": list(self.answers)} if self.answers else {}),
            "node": self.node,
            "hardware": self.hardware,
            **({} if self.paid_for is None else {"paid_for": self.paid_for}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialResult:
        """The reverse of `to_dict`."""
        failure = values.get("failure")
        return cls(
            metrics={str(k): float(v) for k, v in values.get("metrics", {}).items()},
            failure=None if failure is None else Failure.from_dict(failure),
            seconds={str(k): float(v) for k, v in values.get("seconds", {}).items()},
            answers=tuple(str(answer) for answer in values.get("answers", ())),
            node=str(values.get("node", "")),
            hardware=str(values.get("hardware", "")),
            paid_for=values.get("paid_for"),
        )


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One line of the results table. `score` and `penalty` exclude each other."""

    number: int
    trial_id: str
    name: str
    """`baseline` or empty."""
    params: Mapping[str, Any]
    state: State = State.PENDING
    result: TrialResult = field(default_factory=TrialResult)
    score: float | None = None
    """The (first) objective's value, in the metric's own unit; None where there is none."""
    violation: float | None = None
    """The constraint told to the sampler: at most 0 feasible, (0, 1) an SLO missed, (1, 2] failed."""
    penalty: float | None = None
    """What the failure cost; never a measurement."""
    relative: float | None = None
    """`score` over the baseline's score."""
    bound: float | None = None
    """Of a stopped trial: the best that the (first) objective could still have come to; never a measurement."""
    retry_of: int | None = None
    """Number of the lost trial that this one runs again."""
    verifies: int | None = None
    """Number of the trial whose setting this one measures again, for the verdict; it is no part of the search."""
    restart: int | None = None
    """Of a verification: which of the interleaved restarts, from 0. Restarts of one number share their seeds."""
    taken_from: str | None = None
    """`RUN trial 7`: the trial of an earlier run whose setting this is, and whose figures, where it has any."""
    scores: tuple[float, ...] = ()
    """The value of every objective, the first one's included; empty where there is no score."""

    @property
    def counts(self) -> bool:
        """Whether it uses up the search's budget: measured or graded, by this run, in its search."""
        return self.state.teaches and self.verifies is None and self.taken_from is None

    @property
    def feasible(self) -> bool:
        """Measured, with every SLO met."""
        return self.state is State.MEASURED and self.violation is not None and self.violation <= 0

    @property
    def at_fault(self) -> bool:
        """Failed in a way that no setting can mend: it ends the study, and says nothing of its setting."""
        failure = self.result.failure
        return self.state is State.FAILED and failure is not None and failure.blame is Blame.STUDY

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        plain = {"params": dict(self.params), "state": str(self.state), "scores": list(self.scores)}
        return {**values, **plain, "result": self.result.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialRow:
        """The reverse of `to_dict`."""
        given = {"state": State(values["state"]), "result": TrialResult.from_dict(values["result"])}
        return cls(**{**values, **given, "params": {**values["params"]}, "scores": tuple(values.get("scores", ()))})
