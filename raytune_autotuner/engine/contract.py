"""What an engine is to the rest of the house: a command, a URL, and a way to read its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from raytune_autotuner.engine.reading import LogRules
from raytune_autotuner.study.failure import Failure
from raytune_autotuner.study.space import Params


@dataclass(frozen=True)
class Launch:
    """An engine server's command: argument list (never a shell line) and the environment variables it adds."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready: str = "/health"
    """The path that answers with status 200 once the server is up."""


@dataclass(frozen=True)
class Rank:
    """One node's part of an engine that spans several."""

    number: int
    """0 for the one that serves; the others follow it and have no port to send requests to."""
    nodes: int
    address: str
    """Of rank 0's node, by which the others reach it."""
    port: int
    """On which rank 0 awaits the others there."""
    host: str
    """The address of this rank's own node."""


class Engine(Protocol):
    """An inference engine of a study. Implementations hold the study's model and fixed arguments."""

    @property
    def rules(self) -> LogRules:
        """How its log tells stages and failures."""

    @property
    def base_url(self) -> str | None:
        """Where it runs already, so that nothing is started, stopped or changed; None: each trial starts its own."""

    @property
    def served_model(self) -> str:
        """The model name that requests carry."""

    def preflight(self) -> None:
        """Raise `ConfigError` where no trial could ever start: engine not installed, model or parameter unknown."""

    def refuse(self, params: Params) -> Failure | None:
        """The failure that a start of the setting would certainly end with, found without one; None: it may be started.

        Milliseconds, but for the first one, which may wait until the engine's own check is warm. Where the engine
        cannot be asked, or what it says may not hold on a trial's node, nothing is refused.
        """

    def close(self) -> None:
        """End what `preflight` and `refuse` keep running; harmless where nothing runs, and both may be called again."""

    def launch(self, params: Params, port: int, rank: Rank | None = None) -> Launch:
        """The command that serves the setting `params` on 127.0.0.1:`port`; not called where there is a `base_url`.

        `rank` is its part of that, where the engine spans several nodes; None where it does not.
        """

    def launch_lines(self, params: Params) -> tuple[str, str]:
        """(a shell line that works on this machine, the plain form for elsewhere), for people to paste; or empty."""

    def parallel_size(self, params: Params) -> int:
        """GPUs that the setting needs where GPUs are used: tensor x pipeline x data parallel size."""

    @property
    def uses_gpus(self) -> bool:
        """Whether it runs on GPUs where there are some."""

    def defaults(self) -> dict[str, Any]:
        """The values in force at the baseline for parameters of the space, as far as the engine tells."""

    def config_model(self) -> str:
        """What the engine is given to load."""

    def versions(self) -> dict[str, str]:
        """Package to version, of the engine and what its speed rests on."""
