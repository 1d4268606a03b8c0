"""What is not the same in several runs: model, engine and versions, hardware, load, objective, space, search.

Studies and their `versions.json` go in, differences as text come out, for people. What must be alike for figures to be
compared at all is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_autotuner.study.space import describe, readable
from raytune_autotuner.study.study import Study

SCORE = "score"
"""The name of the first objective among what may differ."""
NONE = "-"
_ORDER = ("model", "engine", "hardware", "autotuner", "workload", "objective", "space", "search")


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in all runs."""

    about: str
    """`model`, `engine`, `hardware`, `autotuner`, `workload`, `objective`, `space` or `search`."""
    name: str
    values: tuple[str, ...]
    """In the order of the runs; `-` where it is not there."""


def differences(runs: Sequence[tuple[Study, Mapping[str, Any]]]) -> list[Difference]:
    """Whatever differs between the runs, each given as its study and its versions."""
    facts = [_facts(study, versions) for study, versions in runs]
    keys = dict.fromkeys(key for one in facts for key in one)
    found = [Difference(*key, tuple(one.get(key, NONE) for one in facts)) for key in keys]
    return sorted((one for one in found if len(set(one.values)) > 1), key=lambda one: _ORDER.index(one.about))


def _facts(study: Study, versions: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(About what, name) to text, of everything that a result rests on."""
    facts = {("model", "model"): study.model, ("engine", "kind"): study.engine.kind}
    facts |= {("engine", name): str(number) for name, number in dict(versions.get("engine") or {}).items()}
    facts |= {("engine", name): readable(value) for name, value in study.fixed.items()}
    facts |= {("hardware", name): str(value) for name, value in dict(versions.get("machine") or {}).items()}
    facts |= {("hardware", "cluster"): str(versions.get("cluster", NONE))}
    facts |= _fields("hardware", study.resources.model_dump(mode="json"))
    own = dict(versions.get("packages") or {}).get("raytune_autotuner", NONE)
    facts |= {("autotuner", "raytune_autotuner"): str(own)}
    facts |= _fields("workload", study.workload.model_dump(mode="json"))
    facts |= {("objective", SCORE): " ".join(study.objective.targets[0])}
    facts |= _fields("objective", study.objective.model_dump(mode="json"))
    facts |= {("space", p.name): describe(p.distribution) for p in study.space.parameters}
    facts |= {("space", "constraints"): "; ".join(study.constraints) or NONE}
    return facts | _fields("search", {**study.search.model_dump(mode="json"), **study.verify.model_dump(mode="json")})


def _fields(about: str, values: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(about, name): NONE if value is None else readable(value) for name, value in values.items()}
