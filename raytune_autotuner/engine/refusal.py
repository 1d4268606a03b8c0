"""A setting that an engine's own check refused before any start, as the failure that its start would have been."""

from __future__ import annotations

import re
from collections.abc import Iterable

from raytune_autotuner.engine.reading import LogRules, diagnose
from raytune_autotuner.study.failure import Blame, Failure, Kind, Stage

# A trial sees the GPUs that it holds, and those of its node; what is said of this machine's means nothing to it.
_OF_THIS_MACHINE = r"number of (?:available|required) GPUs|Cannot re-initialize CUDA"


def refusal(lines: Iterable[str], exit_code: int, rules: LogRules) -> Failure | None:
    """The failure that the last lines of a refused start show; None where the setting may not be to blame.

    Nothing is refused for an error that no rule knows, nor for one of the model, the hub or the machine: what such a
    setting is worth, its trial says.
    """
    failure = diagnose(lines, exit_code=exit_code, rules=rules).failure
    if failure is None or failure.blame is not Blame.PARAMETERS or failure.kind is Kind.UNKNOWN:
        return None
    if failure.stage.order > Stage.CONFIGURATION.order or re.search(_OF_THIS_MACHINE, failure.evidence):
        return None
    return failure
