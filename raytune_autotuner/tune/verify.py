"""An earlier run's answer, to be measured again: as a study of its own.

A results folder goes in; out come a study whose space is the one setting to verify, and what the run claimed of it. The
study is then run as any other, but for its search: it has none. The folder is only read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_autotuner.engine import models
from raytune_autotuner.report.recheck import Claim, claim_of
from raytune_autotuner.report.results import ResultsFolder
from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.file import load_study
from raytune_autotuner.study.masking import MASK
from raytune_autotuner.study.study import EngineSpec, Study, only_setting

CHANGEABLE = ("model", "engine", "workload", "trial", "quality", "resources", "ray", "verify.restarts")
"""What `--set` may change: the rest is what was asked, or how it was searched."""
_SUFFIX = "-verify"
_MAX_NAME = 64


@dataclass(frozen=True, slots=True)
class Verifies:
    """What a run is to verify."""

    claim: Claim
    earlier: ResultsFolder
    """The run that makes the claim."""


def study_to_verify(
    folder: ResultsFolder, number: int | None = None, restarts: int | None = None, overrides: Sequence[str] = ()
) -> tuple[Study, Verifies]:
    """The study that measures trial `number` (None: the winner) and the baseline again, and what was claimed.

    Raises `ConfigError` where there is nothing to verify, an override makes another question of it, or a secret that
    the folder does not hold is missing.
    """
    claim = claim_of(folder, number)
    for override in overrides:
        _check_changeable(override)
    own = ["verify.top=1", *([] if restarts is None else [f"verify.restarts={restarts}"])]
    study = only_setting(load_study(folder.study_file, [*overrides, *own]), claim.params)
    changes = {
        "study": _name(study.study),
        "model": models.absolute(study.model, study.engine.kind),
        "engine": _with_secrets(study.engine),
    }
    study = study.model_copy(update=changes)
    _check_secrets(study, folder)
    return study, Verifies(claim, folder)


def _check_changeable(override: str) -> None:
    key = override.partition("=")[0]
    if not any(key == known or key.startswith(f"{known}.") for known in CHANGEABLE):
        raise ConfigError(f"--set {shown(override)}: verify takes the rest from the run. It may change "
                          f"{', '.join(CHANGEABLE)}.")  # fmt: skip


def _name(study: str) -> str:
    """Another name, so that neither takes the other's runs for its own when it is resumed."""
    return study if study.endswith(_SUFFIX) else study[: _MAX_NAME - len(_SUFFIX)] + _SUFFIX


def _with_secrets(engine: EngineSpec) -> EngineSpec:
    """Secrets are masked in the folder: those of the engine's environment are taken from this process's own."""
    own = {name: os.environ[name] for name, value in engine.env.items() if MASK in value and name in os.environ}
    return engine.model_copy(update={"env": {**engine.env, **own}})


def _check_secrets(study: Study, folder: ResultsFolder) -> None:
    for key, value in _texts(study.model_dump(mode="json")):
        if MASK in value:
            name = key.removeprefix("engine.env.")
            way = f"export {name}" if name != key else f"write --set {key}=..."
            raise ConfigError(f"{folder.study_file}: {key} is a secret, and masked there; {way} before.")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a study's values, with its dotted key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value
