"""A server that runs already: it is loaded and read, and neither started nor stopped, nor changed in any way."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from functools import cached_property
from http.client import HTTPException, InvalidURL
from typing import Any, NoReturn

from raytune_autotuner.engine.contract import Rank
from raytune_autotuner.engine.reading import ANY_RULES, LogRules
from raytune_autotuner.study.errors import ConfigError, TrialFailed, shown
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage
from raytune_autotuner.study.space import Params
from raytune_autotuner.study.study import Study

_TIMEOUT_S = 10.0
_MAX_BYTES = 2**20
_POLL_S = 0.5


class RunningEngine:
    """The server at `engine.base_url`. It has no parameters, so nothing can be searched."""

    def __init__(self, study: Study) -> None:
        self._study = study

    @property
    def rules(self) -> LogRules:
        """Its log is out of reach."""
        return ANY_RULES

    @property
    def base_url(self) -> str:
        """Without the `/v1` with which clients of OpenAI's write it."""
        return str(self._study.engine.base_url).rstrip("/").removesuffix("/v1")

    @property
    def served_model(self) -> str:
        """`engine.served_model`, else the study's model where the server has it, else the only one that it has."""
        return self._study.engine.served_model or self._found_model

    @property
    def uses_gpus(self) -> bool:
        """None of this machine's, as far as a trial is concerned."""
        return False

    def preflight(self) -> None:
        """Raise `ConfigError` where nothing answers there, or it does not serve the model."""
        if self._study.engine.served_model is None:
            _ = self._found_model
        else:
            self._models()

    def refuse(self, params: Params) -> Failure | None:
        """Never."""
        return None

    def close(self) -> None:
        """Nothing of ours runs."""

    def launch(self, params: Params, port: int, rank: Rank | None = None) -> NoReturn:
        """There is nothing to launch."""
        raise ConfigError(f"engine.kind: running: {self.base_url} is not ours to start.")

    def launch_lines(self, params: Params) -> tuple[str, str]:
        """Empty: how it was launched is not known."""
        return "", ""

    def parallel_size(self, params: Params) -> int:
        """Unknown, and of no consequence."""
        return 1

    def defaults(self) -> dict[str, Any]:
        """It does not tell."""
        return {}

    def config_model(self) -> str:
        """The name that it serves."""
        return self.served_model

    def versions(self) -> dict[str, str]:
        """What `/version` tells, which vLLM has."""
        told = _get(f"{self.base_url}/version")
        known = told.get("version") if isinstance(told, dict) else None
        return {"running": str(known or "unknown")}

    @cached_property
    def _found_model(self) -> str:
        names = self._models()
        if self._study.model in names:
            return self._study.model
        if len(names) == 1:
            return names[0]
        raise ConfigError(
            f"engine.served_model: {self.base_url} serves {shown(names)}, and none of them is the study's model.\n"
            "Name the one that is meant."
        )

    def _models(self) -> list[str]:
        """The names on its `/v1/models`; none where it has no such page. Raises `ConfigError` where nothing answers."""
        told = _get(f"{self.base_url}/v1/models", required=True)
        cards = told.get("data") if isinstance(told, dict) else None
        return [str(card["id"]) for card in cards or [] if isinstance(card, dict) and "id" in card]


class RunningServer:
    """The same server to a trial: what `EngineServer` is for one that is started."""

    def __init__(self, base_url: str, *, deadline: float, timeout_s: float) -> None:
        """`deadline` is on `time.monotonic()`; `timeout_s` is the limit it stands for, named in the failure."""
        self.base_url = base_url
        self._deadline = deadline
        self._timeout_s = timeout_s

    def start(self) -> None:
        """It runs."""

    def wait_ready(self, probe: Callable[[], bool] | None = None) -> None:
        """Wait until `probe` is true; raises `TrialFailed` at the deadline."""
        while probe is not None and not probe():
            if time.monotonic() >= self._deadline:
                evidence = f"timed out after {self._timeout_s:g} seconds"
                remedy = "See whether the server answers at all; else raise trial.timeout_s."
                raise TrialFailed(Failure(Stage.READY, Kind.DEADLINE, Blame.PARAMETERS, evidence, remedy))
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Whether it lives, its answers tell."""

    def stop(self, grace_s: float | None = None) -> None:
        """It goes on."""


def _get(url: str, required: bool = False) -> Any:
    """The JSON at `url`; None where there is none. Raises `ConfigError` where nothing answers and `required`."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            return json.loads(answer.read(_MAX_BYTES))
    except urllib.error.HTTPError:
        return None
    except InvalidURL as error:
        raise ConfigError(f"engine.base_url: {shown(url)} is no URL: {shown(str(error))}.") from error
    except (OSError, HTTPException) as error:
        if not required:
            return None
        why = getattr(error, "reason", error)
        found = f"what answers at {url} is no HTTP server" if isinstance(error, HTTPException) else None
        raise ConfigError(
            f"engine.base_url: {found or f'nothing answers at {url}'}: {shown(str(why))}. Is the server up?"
        ) from error
    except ValueError:
        return None
