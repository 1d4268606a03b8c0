"""Ray Tune's hooks, passed on to the reporter and to those who watch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from raytune_autotuner.tune.reporter import TrialReporter

REFRESH_S = 0.5


class StudyCallback(Callback):
    """Tells the reporter when trials start, and refreshes what people look at."""

    def __init__(
        self, reporter: TrialReporter, on_round: Callable[[str, dict[str, Any]], None], refresh: Callable[[], None]
    ) -> None:
        self._reporter = reporter
        self._on_round = on_round
        self._refresh = refresh
        self._refreshed_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its parts; nothing here outlives the driver.
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial has its resources; its actor runs."""
        self._reporter.started(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A round was measured."""
        self._on_round(trial.trial_id, result)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """About ten times a second, while the study runs."""
        if time.monotonic() - self._refreshed_at >= REFRESH_S:
            self._refreshed_at = time.monotonic()
            self._refresh()
