"""What failed trials say of settings that were not tried: a failure that rests on some parameters alone repeats.

Ended rows in; out comes the failure that a start of another setting would end with. Which parameters a failure rests
on, the rule says that read it from the engine's log. Knows neither Ray nor Optuna.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raytune_autotuner.study.failure import Failure
from raytune_autotuner.study.space import Params, SearchSpace
from raytune_autotuner.study.trial import State, TrialRow


class Lessons:
    """The failures of a study that say something of other settings."""

    def __init__(self, space: SearchSpace, defaults: Params) -> None:
        """`defaults` are the values in force where a setting says nothing, as far as the engine tells them."""
        self._searched = space.by_name.keys()
        self._defaults = dict(defaults)
        self._learned: list[tuple[Failure, dict[str, Any]]] = []

    def note(self, row: TrialRow) -> None:
        """Keep what an ended trial says; mostly nothing."""
        failure = row.result.failure
        # Where none of its parameters is searched, no setting can do otherwise: that is for the trials to say.
        if row.state is State.FAILED and failure is not None and self._searched & set(failure.depends):
            told = replace(failure, evidence=f"as trial {row.number}: {failure.evidence}")
            self._learned.append((told, {**self._defaults, **row.params}))

    def repeated(self, params: Params) -> Failure | None:
        """The failure of an earlier trial that a start of the setting would end with again; None where it may not."""
        setting = {**self._defaults, **params}
        for failure, failed in self._learned:
            if all(setting.get(name) == failed.get(name) for name in failure.depends):
                return failure
        return None
