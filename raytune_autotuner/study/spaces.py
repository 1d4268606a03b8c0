"""Search spaces to take over: files that hold a `search_space:` and its `constraints:`, some of them shipped.

In: a study as plain values, with `space: NAME`. Out: the same study, written out. It knows nothing of engines.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raytune_autotuner.study.errors import ConfigError, shown
from raytune_autotuner.study.expressions import parse_expression
from raytune_autotuner.study.paths import expanded

KEY = "space"
"""The key of a study file that names a space."""
_PACKAGE = Path(__file__).parents[1]
# Installed, they lie in the package; in a checkout, beside the studies.
FOLDER = next(
    (folder for folder in (_PACKAGE / "spaces", _PACKAGE.parent / "configs" / "spaces") if folder.is_dir()), _PACKAGE
)
_KEYS = ("search_space", "constraints")


def shipped() -> list[str]:
    """The names of the spaces that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@dataclass(frozen=True)
class Explained:
    """A parameter of a shipped space, as its file has it."""

    distribution: Any
    why: tuple[str, ...]
    """The lines of comment above it."""


def explained(name: str) -> dict[str, Explained]:
    """The parameters of a shipped space with their comments, in the file's order."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    distributions = yaml.safe_load(text)["search_space"]
    found, lines = dict[str, Explained](), list[str]()
    for line in text.splitlines():
        if line.startswith("  # "):
            lines.append(line.removeprefix("  # "))
            continue
        if (parameter := re.match(r"  (\S+): ", line)) and parameter[1] in distributions:
            found[parameter[1]] = Explained(distributions[parameter[1]], tuple(lines))
        lines = []
    return found


def written_out(raw: Mapping[str, Any], load: Callable[[Path], Any]) -> dict[str, Any]:
    """`raw` without `space:`, its parameters and constraints before the study's own; raises `ConfigError`.

    What the study says of a name goes first: another distribution, `null` for none, or a fixed value in `engine`.
    Parameters and constraints whose conditions name what is thereby left out are left out too. `load` reads a file.
    """
    study = dict(raw)
    if study.get(KEY) is None:
        study.pop(KEY, None)
        return study
    parameters, constraints = _read(_path(study.pop(KEY)), load)
    own = study.get("search_space") or {}
    if not isinstance(own, Mapping):
        return study  # which the study's own check refuses
    fixed = _fixed(study.get("engine"))
    space = {name: value for name, value in {**parameters, **own}.items() if value is not None}
    space = {name: value for name, value in space.items() if name in own or name not in fixed}
    space = _standing(space, own, fixed)
    more = study.get("constraints") or []
    if not isinstance(more, list):
        return {**study, "search_space": space}  # which the study's own check refuses
    kept = [text for text in constraints if _stands(text, fixed | set(space))]
    return {**study, "search_space": space, "constraints": [*kept, *more]}


def _standing(space: Mapping[str, Any], own: Mapping[str, Any], fixed: set[str]) -> dict[str, Any]:
    """`space` without parameters, but the study's `own`, whose conditions name what is not there: one takes others."""
    known = fixed | set(space)
    left = {name: value for name, value in space.items() if name in own or _stands(_condition(value), known)}
    return left if len(left) == len(space) else _standing(left, own, fixed)


def _path(name: Any) -> Path:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{KEY}: takes a name or a file, but got {shown(name)}; shipped: {', '.join(shipped())}.")
    if name in shipped():
        return FOLDER / f"{name}.yaml"
    path = expanded(KEY, name)
    if not os.path.isfile(path):  # which unlike `Path.is_file` has an answer for names that are too long
        raise ConfigError(f"{KEY}: {shown(name)} is neither a file nor shipped; shipped: {', '.join(shipped())}.")
    return path


def _read(path: Path, load: Callable[[Path], Any]) -> tuple[Mapping[str, Any], list[str]]:
    raw = load(path)
    if not isinstance(raw, Mapping) or set(raw) - set(_KEYS) or not isinstance(raw.get("search_space"), Mapping):
        raise ConfigError(f"{KEY}: {path} must hold search_space, and beside it constraints at the most.")
    constraints = raw.get("constraints") or []
    if not isinstance(constraints, list):
        raise ConfigError(f"{KEY}: {path}: constraints are a list, but got {shown(constraints)}.")
    return raw["search_space"], [str(text) for text in constraints]


def _fixed(engine: Any) -> set[str]:
    """The names that the study fixes under `engine`."""
    sections = (engine.get(key) if isinstance(engine, Mapping) else None for key in ("args", "env"))
    args, env = (section if isinstance(section, Mapping) else {} for section in sections)
    return {*map(str, args), *(f"env:{name}" for name in env)}


def _condition(parameter: Any) -> str | None:
    when = parameter.get("when") if isinstance(parameter, Mapping) else None
    return when if isinstance(when, str) else None


def _stands(condition: str | None, known: Iterable[str]) -> bool:
    """Whether a condition names only what is known."""
    return condition is None or parse_expression(condition).names <= set(known)
